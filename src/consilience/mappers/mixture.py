"""Mappers by density: task anchors are means or mixtures in a space that all agents have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.correction import Learned, Mapper, Me, Memory, Routing
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Item, Module, Statistics
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.schedule import Facts
from consilience.core.source import Source


class Anchored(Mapper):
    """Routes to the expert whose anchor an input is nearest to. Anchors lie in a space that all agents have in common and training
    does not move: the `features` of a frozen backbone, or the flattened `inputs`, which serve any model."""

    on: Literal["features", "inputs"]

    def __post_init__(self) -> None:
        if self.on not in ("features", "inputs"):
            raise ConsilienceError(f"`on` should be features or inputs. Found `on = {self.on!r}`.")

    def refuse(self, facts: Facts) -> str | None:
        model: Model | None = facts.model
        if facts.kind == "value":
            return "anchors are made for experts of classes, and here targets are values"
        if not facts.learns:
            return "anchors are made from data, and here only trained models are given; use an entropy or average mapper"
        if self.on == "inputs" or model is None:
            return None
        if not model.backbone(model.init(torch.Generator().manual_seed(0))[0]):
            return "anchors on features need a frozen backbone that all agents share; use on='inputs', or models.multi_head on a frozen trunk"
        return None

    def begin(
        self, model: Model, params: Params, sources: tuple[Source, ...], known: object, generator: torch.Generator
    ) -> tuple[Params, Mapping[str, Tensor]]:
        """Refuse a feature space that training would move."""
        if self.on == "inputs":
            return params, {}
        x = sources[0].train.select(torch.arange(1)).whole()[0]
        like = next(p for p in params.values() if p.is_floating_point())
        x = x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)
        buffers = model.init(torch.Generator().manual_seed(0))[1]
        moved = {n: p if model.frozen(n) or not p.is_floating_point() else p + 1 for n, p in params.items()}
        with torch.no_grad():
            if not torch.equal(model.features(params, buffers, x), model.features(moved, buffers, x)):
                raise Refusal(
                    "anchors on features need some that training does not move; use on='inputs'. Found trainable entries under the features."
                )
        return params, {}

    def psi(self, learned: Learned) -> Callable[[Tensor], Tensor]:
        """x [B, ...] -> its place in the space [B, d], in float64 on the CPU."""

        def place(x: Tensor) -> Tensor:
            with torch.no_grad():
                f = x.flatten(1) if self.on == "inputs" else learned.model.features(learned.params, learned.buffers, x, None)
            return f.double().cpu()

        return place

    def places(self, learned: Learned) -> Tensor:
        """Where the training data of a source lie [N, d]."""
        psi = self.psi(learned)
        return torch.cat([psi(x) for x, _ in learned.source.train.chunks(1024)])

    def scores(self, psi: Tensor, items: list[Item], known: list[Item]) -> Tensor:
        """How well places [B, d] fit each of the experts' anchors [B, K]; higher is nearer. `known` are all anchors there are."""
        raise NotImplementedError

    def weigh(self, scores: Tensor) -> Tensor:
        """Weights [B, K] from scores."""
        return F.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        missing = [k for k in routing.experts if k not in memory]
        if missing:
            raise ConsilienceError(
                f"every expert should come with its anchor. Found none for {missing[0][1]!r} of {missing[0][0]!r}."
            )
        psi = (routing.x.flatten(1) if self.on == "inputs" else routing.features()).double().cpu()
        memory = {k: replace(i, tensors={n: t.cpu() for n, t in i.tensors.items()}) for k, i in memory.items()}
        known = [memory[k] for k in sorted(memory, key=lambda k: (k[1], k[0]))]
        weights = self.weigh(self.scores(psi, [memory[k] for k in routing.experts], known))
        return weights.to(routing.x.device, torch.get_default_dtype())


def means(item: Item) -> Tensor:
    """The means [classes that it has, d] of an anchor's classes."""
    n = item.tensors["count"]
    return item.tensors["first"].T[n > 0] / n[n > 0][:, None]


@dataclass(frozen=True)
class NearestMean(Anchored):
    """score = -min_c ||psi - mu_c||^2 over the classes of the source. Anchors are class sums and counts: they add."""

    on: Literal["features", "inputs"] = "features"

    def summarise(self, learned: Learned, me: Me) -> Statistics:
        return Statistics(learned.sums(self.psi(learned), second=False))

    def scores(self, psi: Tensor, items: list[Item], known: list[Item]) -> Tensor:
        return torch.stack([-torch.cdist(psi, means(i)).min(1).values for i in items], 1)


@dataclass(frozen=True)
class GaussianMixture(Anchored):
    """score = max_j log(phi_j N(psi; mu_j, diag sigma_j^2)) over the k components of the source (GMMC).

    `prior="uniform"` pools the mixtures as the paper does; "size" weighs each by its source's share of the examples. Mixtures are fitted by
    scikit-learn on one source's features alone, so the order in which sources arrive changes nothing. Ge et al. 2023 (SKILL).
    """

    components: int = 25
    prior: Literal["size", "uniform"] = "uniform"
    floor: float = 1e-3
    """Added to the variances, as a share of the mean variance of the features."""
    on: Literal["features", "inputs"] = "features"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.components < 1:
            raise ConsilienceError(f"`components` should be at least 1. Found `components = {self.components}`.")
        if self.prior not in ("size", "uniform"):
            raise ConsilienceError(f"`prior` should be size or uniform. Found `prior = {self.prior!r}`.")
        if not 0 < self.floor < float("inf"):
            raise ConsilienceError(f"`floor` should be positive and finite. Found `floor = {self.floor}`.")

    def summarise(self, learned: Learned, me: Me) -> Module:
        import warnings

        from sklearn.mixture import GaussianMixture as Mixture

        psi = self.places(learned)
        spread = float(psi.var(0, unbiased=False).mean()) or 1.0
        seed = int(torch.randint(2**31 - 1, (1,), generator=learned.generator))
        k = min(self.components, len(psi))
        fit = Mixture(k, covariance_type="diag", reg_covar=self.floor * spread, random_state=seed, init_params="k-means++")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit.fit(psi.numpy())
        tensors = {"mean": fit.means_, "variance": fit.covariances_, "weight": fit.weights_}
        item = {name: torch.from_numpy(t).to(torch.float32) for name, t in tensors.items()}
        return Module({**item, "count": torch.tensor([float(len(psi))])})

    def scores(self, psi: Tensor, items: list[Item], known: list[Item]) -> Tensor:
        total = sum(float(i.tensors["count"].sum()) for i in items)
        return torch.stack([self._score(psi, i, total) for i in items], 1)

    def _score(self, psi: Tensor, item: Item, total: float) -> Tensor:
        mean, variance = item.tensors["mean"].double(), item.tensors["variance"].double()
        weight = item.tensors["weight"].double().log()
        precision = 1 / variance
        distance = psi.square() @ precision.T - 2 * psi @ (mean * precision).T + (mean.square() * precision).sum(1)
        log = weight - 0.5 * (distance + variance.log().sum(1))
        prior = torch.log(item.tensors["count"].double().sum() / total) if self.prior == "size" else 0.0
        return log.max(1).values + prior
