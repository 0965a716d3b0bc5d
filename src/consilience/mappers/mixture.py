"""Mappers by density: task anchors are means or mixtures in a space that all agents have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, Routing
from consilience.core.correction import Mapper
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Item, Module, Statistics
from consilience.core.model import Model
from consilience.core.schedule import ScheduleFacts
from consilience.mappers import _em
from consilience.mappers._screen import Screen

KEPT = 256
"""How many scores of its own validation examples an anchor keeps."""


class Anchored(Mapper):
    """Routes to the expert whose anchor an input is nearest to. Anchors lie in a space that all agents have in common and
    training does not move: the `features` of a frozen backbone, or the flattened `inputs`, which serve any model."""

    on: Literal["features", "inputs"]
    reject: float
    """The share of a task's own validation examples that may be called unknown; 0: every input belongs to a task."""

    def __post_init__(self) -> None:
        if self.on not in ("features", "inputs"):
            raise ConsilienceError(f"`on` should be features or inputs. Found `on = {self.on!r}`.")
        if not 0 <= self.reject < 1:
            raise ConsilienceError(f"`reject` should be in [0, 1). Found `reject = {self.reject}`.")

    @property
    def rejects(self) -> bool:
        return self.reject > 0

    def refuse(self, facts: ScheduleFacts) -> str | None:
        model: Model | None = facts.model
        if facts.kind == "value":
            return "anchors are made for experts of classes, and here targets are values"
        if not facts.trains:
            return "anchors are made from data, and here only trained models are given; use an entropy or average mapper"
        if self.on == "inputs" or model is None:
            return None
        if not model.backbone(model.init(torch.Generator().manual_seed(0))[0]):
            return "anchors on features need a frozen backbone that all agents share; use on='inputs', or models.multi_head on a frozen trunk"
        return None

    def begin(self, start: Beginning) -> Begun:
        """Refuse a feature space that training would move."""
        if self.on == "inputs":
            return Begun(start.params)
        x = start.sources[0].train.select(torch.arange(1)).whole()[0]
        like = next(p for p in start.params.values() if p.is_floating_point())
        x = x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)
        moved = {
            n: p if start.model.frozen(n) or not p.is_floating_point() else p + 1
            for n, p in start.params.items()
        }
        with torch.no_grad():
            if not torch.equal(
                start.model.features(start.params, start.buffers, x),
                start.model.features(moved, start.buffers, x),
            ):
                raise Refusal(
                    "anchors on features need some that training does not move; use on='inputs'. Found trainable entries under the features."
                )
        return Begun(start.params)

    def place(self, x: Tensor, features: Callable[[Tensor], Tensor]) -> Tensor:
        """Where inputs x [B, ...] lie [B, d], in float64 or float32."""
        with torch.no_grad():
            psi = x.flatten(1) if self.on == "inputs" else features(x)
        return psi if psi.dtype == torch.float64 else psi.float()

    def psi(self, learned: Learned) -> Callable[[Tensor], Tensor]:
        """x [B, ...] -> its place in the space [B, d], in float64 on the CPU."""
        features = lambda x: learned.model.features(learned.params, learned.buffers, x, None)  # noqa: E731
        return lambda x: self.place(x, features).double().cpu()

    def places(self, learned: Learned) -> Tensor:
        """Where the training data of a source lie [N, d]."""
        psi = self.psi(learned)
        return torch.cat([psi(x) for x, _ in learned.source.train.chunks(1024)])

    def held(self, learned: Learned) -> Tensor:
        """Where the validation data of a source lie [V, d]: by them `reject` is calibrated."""
        source, psi = learned.source, self.psi(learned)
        if not len(source.validation):
            raise ConsilienceError(
                f"`reject` is calibrated on validation examples, and a source should have some. Found none in {source.name!r}."
            )
        return torch.cat(
            [
                psi(x)
                for x, _ in source.validation.to(learned.layout.device, learned.layout.dtype).chunks(1024)
            ]
        )

    def settle(self, item: Item, place: Callable[[Tensor], Tensor]) -> Item:
        """An anchor as this agent reads it, made once: on the CPU."""
        if all(t.device.type == "cpu" for t in item.tensors.values()):
            return item
        return replace(item, tensors={n: t.cpu() for n, t in item.tensors.items()})

    def ready(self, items: tuple[Item, ...], known: tuple[Item, ...]) -> Anchors:
        """The experts' anchors, made ready to be asked; `known` are all anchors there are, in an order that is not that of
        arrival."""
        raise NotImplementedError

    def scores(self, psi: Tensor, items: Sequence[Item], known: Sequence[Item]) -> Tensor:
        """How well places [B, d] fit each of the experts' anchors [B, K], in float64; higher is nearer. `known` are all anchors
        there are.

        Raises:
            ConsilienceError: anchors on features that are of shared images: they pass the features of a model, which `route` has.
        """
        if self.on == "features" and any("y" in i.tensors for i in (*items, *known)):
            raise ConsilienceError(
                "`scores` on features should be asked of anchors of sums or factors; use `route`, whose model gives shared images their features. Found an anchor of images."
            )
        place = lambda x: self.place(x, lambda x: x)  # noqa: E731
        return self.ready(
            tuple(_settled(self, i, place) for i in items), tuple(_settled(self, i, place) for i in known)
        ).scores(psi)

    def weights(self, psi: Tensor, anchors: Anchors) -> Tensor:
        """Weights [B, K] of the experts: all to the one whose anchor fits best; none, with `reject`, where that one does not know
        the input."""
        best, score = anchors.best(psi, self.rejects)
        weights = F.one_hot(best, len(anchors.own)).double()
        if self.rejects:
            weights *= (score >= anchors.marks(self.reject)[best, 0])[:, None]  # not so for what is no number
        return weights

    def _read(self, routing: Routing, memory: Memory) -> tuple[Tensor, Anchors, list[int]]:
        """Where the inputs lie, the anchors in canonical order, and where each expert stands in it."""
        missing = [k for k in routing.experts if k not in memory]
        if missing:
            raise ConsilienceError(
                f"every expert should come with its anchor. Found none for {missing[0][1]!r} of {missing[0][0]!r}."
            )
        like = routing.x
        psi = self.place(like, lambda x: routing.features()).cpu()

        def place(x: Tensor) -> Tensor:
            return self.place(
                x.to(like.device, like.dtype if like.is_floating_point() else x.dtype), routing.features
            ).cpu()

        order = sorted(memory, key=lambda k: (k[1], k[0]))
        told = {k: _settled(self, memory[k], place) for k in order}
        wanted = set(routing.experts)
        mine = [k for k in order if k in wanted]
        anchors = _ready(self, tuple(told[k] for k in mine), tuple(told.values()))
        if self.rejects:
            lacks = [k for k, own in zip(mine, anchors.own, strict=True) if own is None]
            if lacks:
                raise ConsilienceError(
                    f"with `reject` above 0 every anchor should be made with it. Found one without validation scores, of {lacks[0][1]!r}."
                )
        where = {k: i for i, k in enumerate(mine)}
        return psi, anchors, [where[k] for k in routing.experts]

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        psi, anchors, where = self._read(routing, memory)
        return self.weights(psi, anchors)[:, where].to(routing.x.device, torch.get_default_dtype())

    def familiarity(self, routing: Routing, memory: Memory) -> Tensor:
        """How known inputs are [B], comparable between tasks: (s - median) / (median - lower quartile) of the best task, s its
        score and the others those of its own validation examples. 0 is as an own example, -1 worse than three quarters of them.
        Needs `reject` > 0."""
        if not self.rejects:
            raise ConsilienceError(
                f"`reject` should be above 0, so that anchors have scores to compare with. Found {self.reject}."
            )
        psi, anchors, _ = self._read(routing, memory)
        best, score = anchors.best(psi, True)
        _, median, quartile = anchors.marks(self.reject)[best].unbind(1)
        spread = torch.maximum(median - quartile, 1e-9 * median.abs().clamp_min(1e-9))
        return ((score - median) / spread).to(routing.x.device)


class Anchors:
    """Anchors of K experts, ready to be asked. `own` are the sorted scores that each gives its own validation examples, or
    None."""

    own: Sequence[Tensor | None]

    def scores(self, psi: Tensor) -> Tensor:
        """Scores [B, K] of places [B, d] in float64."""
        raise NotImplementedError

    def best(self, psi: Tensor, scored: bool) -> tuple[Tensor, Tensor]:
        """The expert [B] of the highest score, the first of equal ones, and (`scored`) the score [B]."""
        score = self.scores(psi)
        best = score.argmax(1)
        return best, score.gather(1, best[:, None])[:, 0]

    def marks(self, reject: float) -> Tensor:
        """By expert the `reject` quantile, the median and the lower quartile of its own scores [K, 3]."""
        own = [s for s in self.own if s is not None]
        at = [[s[int(reject * (len(s) - 1))], s[len(s) // 2], s[len(s) // 4]] for s in own]
        marks = torch.tensor(at, dtype=torch.float64)
        marks[:, 0] -= 1e-6 * marks[:, 0].abs()  # features of another batch differ by as much
        return marks


class Screened(Anchors):
    """Anchors whose best one is found by a screen, of points or components [J], each of an expert."""

    screen: Screen

    def columns(self, x: Tensor) -> Tensor:
        """Places [B, d] as the screen takes them [B, n]."""
        raise NotImplementedError

    def exact(self, psi: Tensor, rows: Tensor, j: Tensor) -> Tensor:
        """The scores [P] of places psi[rows] by the points or components j [P]."""
        raise NotImplementedError

    def best(self, psi: Tensor, scored: bool) -> tuple[Tensor, Tensor]:
        return self.screen(psi, self.columns, lambda rows, j: self.exact(psi, rows, j), scored)


@lru_cache(maxsize=2)
def _ready(mapper: Anchored, items: tuple[Item, ...], known: tuple[Item, ...]) -> Anchors:
    return mapper.ready(items, known)


_SETTLED: WeakKeyDictionary[Item, dict[Anchored, Item]] = WeakKeyDictionary()


def _settled(mapper: Anchored, item: Item, place: Callable[[Tensor], Tensor]) -> Item:
    """`settle`, once for each item."""
    found = _SETTLED.get(item, {}).get(mapper)
    if found is None:
        found = mapper.settle(item, place)
        if found is not item:
            _SETTLED.setdefault(item, {})[mapper] = found
    return found


def sketch(scores: Tensor) -> Tensor:
    """Scores [V] in ascending order, or 256 of them, evenly spaced, with the least and the greatest: the i-th is of rank
    floor(i (V - 1) / 255), so that below it are no more than the share i / 255.

    >>> sketch(torch.tensor([3.0, 1.0, 2.0])).tolist(), len(sketch(torch.arange(9999.0)))
    ([1.0, 2.0, 3.0], 256)
    """
    ordered = scores.double().sort().values
    if len(ordered) <= KEPT:
        return ordered
    return ordered[torch.arange(KEPT) * (len(ordered) - 1) // (KEPT - 1)]


def separation(known: Tensor, unknown: Tensor) -> float:
    """P(known > unknown) + P(equal) / 2 over all pairs of values [N] and [M]."""
    if not len(known) or not len(unknown):
        raise ConsilienceError(
            f"an area under a curve needs values of both kinds. Found {len(known)} known and {len(unknown)} unknown."
        )
    other = unknown.sort().values
    below, upto = torch.searchsorted(other, known), torch.searchsorted(other, known, right=True)
    return float((below + upto).double().sum()) / (2 * len(known) * len(other))


def sums(learned: Learned, psi: Callable[[Tensor], Tensor], second: bool = True) -> dict[str, Tensor]:
    """`Learned.sums` of the source's own classes alone: what an anchor says of others is nothing."""
    found, own = learned.sums(psi, second), list(learned.source.classes)
    return {**found, "first": found["first"][:, own], "count": found["count"][own]}


def means(item: Item) -> Tensor:
    """The means [classes that it has, d] of an anchor's classes."""
    n = item.tensors["count"]
    return item.tensors["first"].T[n > 0] / n[n > 0][:, None]


def grouped(parts: Sequence[Tensor]) -> Tensor:
    """Which part each row of all parts together is of."""
    return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts]))


class Points(Screened):
    """-min_j ||x - mu_j||^2 over the points [.., d] of each expert, in float64."""

    def __init__(self, points: Sequence[Tensor], own: Sequence[Tensor | None]) -> None:
        self.own, self.group, every = own, grouped(points), torch.cat(list(points))
        self.centre = every.mean(0).float()
        self.points = every - self.centre
        self.screen = Screen.of(self.points, -0.5 * self.points.square().sum(1), self.group)

    def scores(self, psi: Tensor) -> Tensor:
        distance = torch.cdist(
            psi.double() - self.centre, self.points, compute_mode="donot_use_mm_for_euclid_dist"
        ).square()
        return torch.stack([-distance[:, self.group == k].amin(1) for k in range(len(self.own))], 1)

    def columns(self, x: Tensor) -> Tensor:
        return (x - self.centre).float()

    def exact(self, psi: Tensor, rows: Tensor, j: Tensor) -> Tensor:
        return -(psi[rows].double() - self.centre - self.points[j]).square().sum(1)


@dataclass(frozen=True)
class NearestMean(Anchored):
    """score = -min_c ||psi - mu_c||^2 over the classes of the source. Anchors are class sums and counts: those of the same classes add.

    With `reject` > 0 an anchor has the sorted scores of at most 256 validation examples besides, which do not add. An input is
    unknown where its score by the task that it is nearest to is below the `reject` quantile of them: of a task's own validation
    examples at most so many are, where no other task is nearer.
    """

    on: Literal["features", "inputs"] = "features"
    reject: float = 0.0

    def summarise(self, learned: Learned, ctx: Context) -> Statistics | Module:
        item = Statistics(sums(learned, self.psi(learned), second=False))
        if not self.rejects:
            return item
        own = Points([means(item)], [None]).scores(self.held(learned))[:, 0]
        return Module({**item.tensors, "validation": sketch(own)})

    def ready(self, items: tuple[Item, ...], known: tuple[Item, ...]) -> Anchors:
        return Points([means(i) for i in items], [i.tensors.get("validation") for i in items])


class Mixtures(Screened):
    """max_j log(w_j N(x; mu_j, diag s_j)) - log of (2 pi)^(-d/2), plus a constant by expert, over the components of each
    expert."""

    def __init__(self, items: Sequence[Item], prior: Sequence[float]) -> None:
        own = [i.tensors.get("validation") for i in items]
        self.own = [o if o is None else o + p for o, p in zip(own, prior, strict=True)]
        self.group = grouped([i.tensors["weight"] for i in items])
        self.mean, self.variance, weight = (
            torch.cat([i.tensors[n] for i in items]) for n in ("mean", "variance", "weight")
        )
        tiny = torch.finfo(torch.float64).tiny
        constant = (
            weight.double().clamp_min(tiny).log() + torch.tensor(prior, dtype=torch.float64)[self.group]
        )
        precision = 1 / self.variance.double()
        self.constant = constant + 0.5 * precision.log().sum(1)
        # where the components are on average, and how wide: what all have in common leaves the products
        total = precision.sum(0)
        self.centre, self.width = (
            ((precision * self.mean).sum(0) / total).float(),
            (len(precision) / total).sqrt().float(),
        )
        off = (self.mean.double() - self.centre) / self.width
        precision *= self.width.double().square()
        base = self.constant - 0.5 * (precision * off.square()).sum(1)
        self.screen = Screen.of(
            torch.cat([(precision * off).float(), (0.5 - 0.5 * precision).float()], 1),
            base,
            self.group,
            parts=2,
        )

    def scores(self, psi: Tensor) -> Tensor:
        psi = psi.double() - self.centre
        found, square = [], psi.square()
        for k in range(len(self.own)):
            j = self.group == k
            mean, precision = self.mean[j].double() - self.centre, 1 / self.variance[j].double()
            distance = (
                square @ precision.T - 2 * psi @ (mean * precision).T + (mean.square() * precision).sum(1)
            )
            found.append((self.constant[j] - 0.5 * distance).max(1).values)
        return torch.stack(found, 1)

    def columns(self, x: Tensor) -> Tensor:
        z = ((x - self.centre) / self.width).float()
        return torch.cat([z, z.square()], 1)

    def exact(self, psi: Tensor, rows: Tensor, j: Tensor) -> Tensor:
        off = psi[rows].double().sub_(self.mean[j])
        return self.constant[j] - 0.5 * off.square_().div_(self.variance[j]).sum(1)


@dataclass(frozen=True)
class GaussianMixture(Anchored):
    """score = max_j log(phi_j N(psi; mu_j, diag sigma_j^2)) over the k components of the source (GMMC).

    k is `components`, or one for each `least` examples where these are fewer: a component of a handful of them is so narrow that no
    other example of its source falls to it. `floor` x (mean variance of the features) is added to all variances. On 15 real tasks
    (benchmarks/results/skill.md) .1 finds the task of 84 % of validation images, .001 of 77 %. `floor=1e-6, least=1` is the paper's.
    `prior="uniform"` pools the mixtures as the paper does; "size" weighs each by its source's share of the examples. Mixtures
    are fitted on one source's features alone, so the order in which sources arrive changes nothing. `fit="torch"` is expectation
    maximisation of our own (products in float32, on the device of the data), "sklearn" is scikit-learn's: same start, stop and
    log-likelihood. With `reject` > 0 an anchor has the sorted scores of at most 256 validation examples besides, and an input is
    unknown where its score by the best task is below that task's own `reject` quantile of them. Ge et al. 2023 (SKILL).
    """

    components: int = 25
    prior: Literal["size", "uniform"] = "uniform"
    floor: float = 0.1
    """Added to the variances, as a share of the mean variance of the features."""
    on: Literal["features", "inputs"] = "features"
    fit: Literal["torch", "sklearn"] = "torch"
    reject: float = 0.0
    least: int = 20
    """Examples for each component: of fewer a mixture has fewer components."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("components", "least"):
            if getattr(self, name) < 1:
                raise ConsilienceError(
                    f"`{name}` should be at least 1. Found `{name} = {getattr(self, name)}`."
                )
        for name, words in (("prior", ("size", "uniform")), ("fit", ("torch", "sklearn"))):
            if getattr(self, name) not in words:
                raise ConsilienceError(
                    f"`{name}` should be {' or '.join(words)}. Found `{name} = {getattr(self, name)!r}`."
                )
        if not 0 < self.floor < float("inf"):
            raise ConsilienceError(f"`floor` should be positive and finite. Found `floor = {self.floor}`.")

    def summarise(self, learned: Learned, ctx: Context) -> Module:
        features = lambda x: learned.model.features(learned.params, learned.buffers, x, None)  # noqa: E731
        psi = torch.cat([self.place(x, features) for x, _ in learned.source.train.chunks(1024)])
        spread = float(psi.var(0, unbiased=False).mean()) or 1.0
        make = _em.fit if self.fit == "torch" else by_sklearn
        k = min(self.components, max(1, len(psi) // self.least))
        fit = make(psi, k, learned.generator, self.floor * spread)
        tensors = {n: getattr(fit, n).to("cpu", torch.float32) for n in ("mean", "variance", "weight")}
        item = Module({**tensors, "count": torch.tensor([float(len(psi))])})
        if not self.rejects:
            return item
        held = self.held(learned)
        _, own = Mixtures([item], [0.0]).best(held, True)
        return replace(item, tensors={**item.tensors, "validation": sketch(own)})

    def ready(self, items: tuple[Item, ...], known: tuple[Item, ...]) -> Anchors:
        sizes = torch.stack([i.tensors["count"].double().sum() for i in items])
        prior = (sizes / sizes.sum()).log().tolist() if self.prior == "size" else [0.0] * len(items)
        return Mixtures(items, prior)


def by_sklearn(x: Tensor, k: int, generator: torch.Generator, floor: float) -> _em.Fit:
    """`_em.fit` by scikit-learn; one component, of which there is nothing to search (and one example it refuses), is `_em.fit`."""
    if min(k, len(x)) == 1:
        return _em.fit(x, k, generator, floor)
    import warnings

    from sklearn.mixture import GaussianMixture as Mixture

    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    fit = Mixture(
        min(k, len(x)), covariance_type="diag", reg_covar=floor, random_state=seed, init_params="k-means++"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(x.double().cpu().numpy())
    mean, variance, weight = (torch.from_numpy(t) for t in (fit.means_, fit.covariances_, fit.weights_))
    return _em.Fit(mean, variance, weight, float(fit.lower_bound_), int(fit.n_iter_), bool(fit.converged_))
