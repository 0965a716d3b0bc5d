"""Mappers by density: task anchors are means or mixtures in a space that all agents have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import ClassVar, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, Routing
from consilience.core.correction import Mapper
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Item, Message, Module, Statistics
from consilience.core.model import Model
from consilience.core.outliers import Clip, check_features, checked_clip
from consilience.core.params import Params, computing, fits_float32
from consilience.core.schedule import ScheduleFacts
from consilience.core.tree import Input, cast_to, one_tensor
from consilience.mappers import _em
from consilience.mappers._screen import Screen

KEPT = 256
"""How many scores of its own validation examples an anchor keeps."""


class Located(NamedTuple):
    """Where inputs lie, psi [B, d]; the experts' anchors in canonical order; each expert's place in it."""

    psi: Tensor
    anchors: Anchors
    places: list[int]


class Anchored(Mapper):
    """Routes to the expert whose anchor is nearest to an input.

    Anchors lie in a space that all agents have in common and training does not move: the `features` of a
    frozen backbone, or the flattened `inputs`, which serve any model.
    """

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    instead: ClassVar[str] = "use the oracle or average mapper"

    on: Literal["features", "inputs"]
    reject: float
    """Fraction of a task's validation examples to reject (sets the threshold); 0: every input has a task."""
    clip: float
    """The largest distance of an example from the median of its source, in median distances; 0: no limit.

    Farther ones are moved to it when anchors are made, so that a few outliers change little."""

    def __post_init__(self) -> None:
        if self.on not in ("features", "inputs"):
            raise ConsilienceError(f"`on` must be features or inputs, got {self.on!r}.")
        if not 0 <= self.reject < 1:
            raise ConsilienceError(f"`reject` must be in [0, 1), got {self.reject}.")
        checked_clip(self.clip)

    @property
    def rejects(self) -> bool:
        return self.reject > 0

    def default_model(self, inputs: tuple[int, ...], outputs: int) -> Model | None:
        """Return heads on frozen random features, for anchors that lie on features."""
        # Rooms of parts do not import one another when they are loaded.
        from consilience.models import multi_head, random_features

        if self.on == "inputs":
            return None
        size = prod(inputs)
        return multi_head(random_features(size, max(512, 2 * size)), outputs)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        model: Model | None = facts.model
        if self.on == "inputs" and facts.trees:
            return "anchors on inputs need one tensor, and here inputs have several parts; use on='features'"
        if not facts.trains:
            return (
                "anchors are made from data, and here only trained models are given; "
                "use an entropy or average mapper"
            )
        if self.on == "inputs" or model is None:
            return None
        if not model.backbone(model.init(torch.Generator().manual_seed(0))[0]):
            return (
                "anchors on features need a frozen backbone that all agents share; use on='inputs', "
                "or models.multi_head on a frozen trunk"
            )
        return None

    def begin(self, start: Beginning) -> Begun:
        """Refuse a feature space that training would move."""
        if self.on == "inputs":
            return Begun(start.params)
        x = start.sources[0].train.first()[0]
        like = computing(start.params)
        x = cast_to(x, like.device, like.dtype)
        # Every trainable entry is moved, and the features of one example must not follow.
        moved = {
            name: p if start.model.frozen(name) or not p.is_floating_point() else p + 1
            for name, p in start.params.items()
        }
        with torch.no_grad():
            before = start.model.features(start.params, start.buffers, x)
            after = start.model.features(moved, start.buffers, x)
        if not torch.equal(before, after):
            raise Refusal(
                "anchors on features need features that training does not move, and there are trainable "
                "entries under the features; use on='inputs'."
            )
        return Begun(start.params)

    def refuse_message(self, message: Message, params: Params) -> str | None:
        """Return why an anchor could not be routed by, or why a module has none."""
        anchor = message.items.get(self.name)
        if anchor is None:
            if not isinstance(message.items.get("model"), Module):
                return None
            return (
                f"a module must have the anchor that this agent's mapper reads, that of `{self.name}`, "
                f"got {', '.join(message.items)}"
            )
        if self.rejects and "validation" not in anchor.tensors:
            return (
                "with `reject` above 0 every anchor must be made with it, got one without validation scores"
            )
        return self.misfit(anchor)

    def misfit(self, anchor: Item) -> str | None:
        """Return why an anchor is not one that `summarise` makes, or None."""
        return None

    def width(self, anchor: Item) -> int:
        """Return the number of dimensions d of the space that an anchor lies in."""
        raise NotImplementedError

    def place(self, x: Input, features: Callable[[Input], Tensor]) -> Tensor:
        """Return where inputs x [B, ...] lie [B, d], in float64 or float32."""
        with torch.no_grad():
            psi = one_tensor(x, "an anchor on inputs").flatten(1) if self.on == "inputs" else features(x)
        return psi if psi.dtype == torch.float64 else psi.float()

    def psi(self, learned: Learned) -> Callable[[Input], Tensor]:
        """Return the function from x [B, ...] to its place in the space [B, d], in float64 on the CPU."""
        return lambda x: self.place(x, features_of(learned)).double().cpu()

    def limited(self, learned: Learned) -> Callable[[Input], Tensor]:
        """Return `psi`, clipped by where all training data lie if there is a `clip`."""
        psi = self.psi(learned)
        if not self.clip:
            return psi
        clip = Clip.of(torch.cat([psi(x) for x, _ in learned.source.train.chunks(1024)]), self.clip)
        return lambda x: clip(psi(x))

    def places(self, learned: Learned) -> Tensor:
        """Return where the training data of a source lie [N, d], clipped if there is a `clip`."""
        psi = self.limited(learned)
        found = torch.cat([psi(x) for x, _ in learned.source.train.chunks(1024)])
        check_features(found, range(len(found)), learned.source.name)
        return found

    def held(self, learned: Learned) -> Tensor:
        """Return where the validation data of a source lie [V, d]; `reject` is calibrated on them."""
        source, psi = learned.source, self.psi(learned)
        if not len(source.validation):
            raise ConsilienceError(
                f"`reject` is calibrated on validation examples, and {source.name!r} has none; "
                "give it some, or use reject=0."
            )
        near = source.validation.to(learned.layout.device, learned.layout.dtype)
        return torch.cat([psi(x) for x, _ in near.chunks(1024)])

    def settle(self, item: Item, place: Callable[[Input], Tensor]) -> Item:
        """Return an anchor as this agent reads it, made once: on the CPU."""
        if all(t.device.type == "cpu" for t in item.tensors.values()):
            return item
        return replace(item, tensors={name: t.cpu() for name, t in item.tensors.items()})

    def ready(self, items: tuple[Item, ...], every: tuple[Item, ...]) -> Anchors:
        """Prepare the experts' anchors; `every` are all anchors of the bank, in canonical order."""
        raise NotImplementedError

    def scores(self, psi: Tensor, items: Sequence[Item], every: Sequence[Item]) -> Tensor:
        """Return how well places [B, d] fit the experts' anchors [B, K], in float64; higher is nearer.

        `every` are all anchors of the bank. Raises ConsilienceError for anchors on features made of shared
        images: they pass the features of a model, which only `route` has.
        """
        if self.on == "features" and any("y" in item.tensors for item in (*items, *every)):
            raise ConsilienceError(
                "`scores` on features must be given anchors of sums or factors, got an anchor of images; "
                "use `route`, whose model computes the features of images."
            )

        def place(x: Input) -> Tensor:
            return self.place(x, lambda features: one_tensor(features, "`scores`"))

        settled = tuple(_settled(self, item, place) for item in items)
        return self.ready(settled, tuple(_settled(self, item, place) for item in every)).scores(psi)

    def weights(self, psi: Tensor, anchors: Anchors) -> Tensor:
        """Return weights [B, K]: 1 for the expert whose anchor fits best, 0 for the others.

        With `reject` all are 0 where the score of the best one is below its threshold.
        """
        best, score = anchors.best(psi, self.rejects)
        # One-hot also with equal scores: `best` has the first of them.
        weights = F.one_hot(best, len(anchors.own)).double()
        if self.rejects:
            # A score that is not a number is at no threshold, so such an input is unknown too.
            weights *= (score >= anchors.marks(self.reject)[best, 0])[:, None]
        return weights

    def _locate(self, routing: Routing, memory: Memory) -> Located:
        """Prepare the anchors in memory, and find where the inputs lie."""
        missing = [expert for expert in routing.experts if expert not in memory]
        if missing:
            sender, source = missing[0]
            raise ConsilienceError(f"every expert needs an anchor, and {source!r} of {sender!r} has none.")
        like = routing.x
        psi = self.place(like, lambda x: routing.features()).cpu()

        def place(x: Input) -> Tensor:
            return self.place(cast_to(x, like.device, like.dtype), routing.features).cpu()

        # Prepared in one order, whatever arrived first, anchors score alike to the last bit.
        order = sorted(memory, key=lambda key: (key[1], key[0]))
        for sender, source in order:
            # An anchor of width 1 would fit any place by broadcasting.
            if (width := self.width(memory[sender, source])) != psi.shape[1]:
                raise ConsilienceError(
                    f"an anchor must lie where inputs do, in {psi.shape[1]} dimensions, got {width} for "
                    f"{source!r} of {sender!r}."
                )
        settled = {key: _settled(self, memory[key], place) for key in order}
        wanted = set(routing.experts)
        own = [key for key in order if key in wanted]
        anchors = _ready(self, tuple(settled[key] for key in own), tuple(settled.values()))
        if self.rejects:
            lacking = [key for key, scores in zip(own, anchors.own, strict=True) if scores is None]
            if lacking:
                raise ConsilienceError(
                    "with `reject` above 0 every anchor must hold scores of validation examples, and that of "
                    f"{lacking[0][1]!r} does not; make all anchors with `reject` above 0."
                )
        position = {key: i for i, key in enumerate(own)}
        return Located(psi, anchors, [position[expert] for expert in routing.experts])

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        psi, anchors, places = self._locate(routing, memory)
        return self.weights(psi, anchors)[:, places].to(routing.x.device, torch.get_default_dtype())

    def familiarity(self, routing: Routing, memory: Memory) -> Tensor:
        """Return how familiar inputs are [B], comparable between tasks; it needs `reject` > 0.

        It is (s - median) / (median - lower quartile) of the best task, s its score and the others those of
        its own validation examples: 0 is as familiar as the median own example, -1 worse than three quarters
        of them.
        """
        if not self.rejects:
            raise ConsilienceError(
                f"`reject` must be above 0, so that anchors have scores to compare with, got {self.reject}."
            )
        psi, anchors, _ = self._locate(routing, memory)
        best, score = anchors.best(psi, True)
        _, median, quartile = anchors.marks(self.reject)[best].unbind(1)
        # Validation examples that are all alike have no spread.
        spread = torch.maximum(median - quartile, 1e-9 * median.abs().clamp_min(1e-9))
        return ((score - median) / spread).to(routing.x.device)


class Anchors:
    """Anchors of K experts, prepared for scoring.

    `own` are the sorted scores that each anchor gives its own validation examples, or None.
    """

    own: Sequence[Tensor | None]

    def scores(self, psi: Tensor) -> Tensor:
        """Return scores [B, K] of places [B, d] in float64."""
        raise NotImplementedError

    def best(self, psi: Tensor, scored: bool) -> tuple[Tensor, Tensor]:
        """Return the expert [B] of the highest score, the first of equals, and (`scored`) its score [B]."""
        score = self.scores(psi)
        best = score.argmax(1)
        return best, score.gather(1, best[:, None])[:, 0]

    def marks(self, reject: float) -> Tensor:
        """Return `reject` quantile, median and lower quartile of each expert's own scores [K, 3]."""
        own = [scores for scores in self.own if scores is not None]
        rows = [[s[int(reject * (len(s) - 1))], s[len(s) // 2], s[len(s) // 4]] for s in own]
        marks = torch.tensor(rows, dtype=torch.float64)
        # Features that were computed in another batch differ by as much.
        marks[:, 0] -= 1e-6 * marks[:, 0].abs()
        return marks


class Screened(Anchors):
    """Anchors whose best one is found by a screen over points or components [J], each of an expert."""

    screen: Screen

    def columns(self, x: Tensor) -> Tensor:
        """Return places [B, d] as the screen takes them [B, n]."""
        raise NotImplementedError

    def exact(self, psi: Tensor, rows: Tensor, j: Tensor) -> Tensor:
        """Return the scores [P] of places psi[rows] by the points or components j [P]."""
        raise NotImplementedError

    def best(self, psi: Tensor, scored: bool) -> tuple[Tensor, Tensor]:
        return self.screen(psi, self.columns, lambda rows, j: self.exact(psi, rows, j), scored)


@lru_cache(maxsize=2)
def _ready(mapper: Anchored, items: tuple[Item, ...], every: tuple[Item, ...]) -> Anchors:
    """Return `mapper.ready`, which is asked again for each batch, from a cache."""
    return mapper.ready(items, every)


_SETTLED: WeakKeyDictionary[Item, dict[Anchored, Item]] = WeakKeyDictionary()


def _settled(mapper: Anchored, item: Item, place: Callable[[Input], Tensor]) -> Item:
    """Return `mapper.settle`, computed once per item."""
    found = _SETTLED.get(item, {}).get(mapper)
    if found is None:
        found = mapper.settle(item, place)
        # An item that is its own result would keep itself alive.
        if found is not item:
            _SETTLED.setdefault(item, {})[mapper] = found
    return found


def features_of(learned: Learned) -> Callable[[Input], Tensor]:
    """Return the function from x [B, ...] to the features that all tasks have in common, [B, d]."""
    return lambda x: learned.model.features(learned.params, learned.buffers, x, None)


def sketch(scores: Tensor) -> Tensor:
    """Return scores [V] in ascending order, or 256 of them, evenly spaced, with the least and the greatest.

    The i-th is of rank floor(i (V - 1) / 255), so that no more than the share i / 255 is below it.

    >>> sketch(torch.tensor([3.0, 1.0, 2.0])).tolist(), len(sketch(torch.arange(9999.0)))
    ([1.0, 2.0, 3.0], 256)
    """
    ordered = scores.double().sort().values
    if len(ordered) <= KEPT:
        return ordered
    return ordered[torch.arange(KEPT) * (len(ordered) - 1) // (KEPT - 1)]


def separation(known: Tensor, unknown: Tensor) -> float:
    """Return P(known > unknown) + P(equal) / 2 over all pairs of values [N] and [M]."""
    if not len(known) or not len(unknown):
        raise ConsilienceError(
            "the area under a curve needs values of both kinds, "
            f"got {len(known)} known and {len(unknown)} unknown."
        )
    other = unknown.sort().values
    below, upto = torch.searchsorted(other, known), torch.searchsorted(other, known, right=True)
    return float((below + upto).double().sum()) / (2 * len(known) * len(other))


def misshapen(anchor: Item, form: Mapping[str, str], sizes: dict[str, int]) -> str | None:
    """Return why the tensors of an anchor do not have these shapes, or None; sizes by letter are filled in.

    >>> sizes = {}
    >>> misshapen(Statistics({"first": torch.ones(3, 2)}), {"first": "dC"}, sizes), sizes
    (None, {'d': 3, 'C': 2})
    """
    for name, letters in form.items():
        tensor = anchor.tensors.get(name)
        if tensor is None:
            return f"an anchor must have `{name}`, got {', '.join(anchor.tensors) or 'no tensors'}"
        shape = tuple(tensor.shape)
        alike = len(shape) == len(letters) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(letters, shape, strict=True)
        )
        if not alike or not tensor.numel() or tensor.is_complex():
            return f"`{name}` of an anchor must be [{', '.join(letters)}], got {shape}"
    return None


def impossible(positive: Tensor, centres: Tensor) -> str | None:
    """Return why an anchor's counts or variances, or its means [.., d], cannot be those of data, or None."""
    if not bool((positive >= 0).all()) or not bool((positive > 0).any()):
        return f"counts and variances of an anchor must be positive, got {float(positive.min()):g}"
    # Distances are screened in float32, where squares beyond 3.4e38 are infinite.
    if not fits_float32(centres.double().square().sum(-1)):
        return f"means of an anchor must have finite squares, got {float(centres.abs().max()):g}"
    return None


def sums(learned: Learned, psi: Callable[[Input], Tensor], second: bool = True) -> dict[str, Tensor]:
    """Return `Learned.sums` of the source's own classes only: an anchor says nothing about others."""
    found, own = learned.sums(psi, second), list(learned.source.classes)
    return {**found, "first": found["first"][:, own], "count": found["count"][own]}


def means(item: Item) -> Tensor:
    """Return the means of an anchor's classes that have examples [classes, d]."""
    count = item.tensors["count"]
    return item.tensors["first"].T[count > 0] / count[count > 0][:, None]


def grouped(parts: Sequence[Tensor]) -> Tensor:
    """Return to which part each row of all parts together belongs."""
    return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))


class Points(Screened):
    """-min_j ||x - mu_j||^2 over the points [.., d] of each expert, in float64."""

    def __init__(self, points: Sequence[Tensor], own: Sequence[Tensor | None]) -> None:
        self.own, self.group, every = own, grouped(points), torch.cat(list(points))
        self.centre = every.mean(0).float()
        self.points = every - self.centre
        self.screen = Screen.of(self.points, -0.5 * self.points.square().sum(1), self.group)

    def scores(self, psi: Tensor) -> Tensor:
        # Without products of matrices, whose rounding could change which point is nearest.
        away = torch.cdist(
            psi.double() - self.centre, self.points, compute_mode="donot_use_mm_for_euclid_dist"
        ).square()
        return torch.stack([-away[:, self.group == k].amin(1) for k in range(len(self.own))], 1)

    def columns(self, x: Tensor) -> Tensor:
        return (x - self.centre).float()

    def exact(self, psi: Tensor, rows: Tensor, j: Tensor) -> Tensor:
        return -(psi[rows].double() - self.centre - self.points[j]).square().sum(1)


@dataclass(frozen=True)
class NearestMean(Anchored):
    """score = -min_c ||psi - mu_c||^2 over the classes of the source.

    Anchors are class sums and counts: those of the same classes add. With `reject` > 0 an anchor also has the
    sorted scores of at most 256 validation examples, which do not add. An input is unknown where its score by
    the nearest task is below the `reject` quantile of that task's scores: at most this fraction of a task's
    own validation examples is rejected, where no other task is nearer.
    """

    on: Literal["features", "inputs"] = "features"
    reject: float = 0.0
    clip: float = 0.0

    def misfit(self, anchor: Item) -> str | None:
        form = {"first": "dC", "count": "C"} | ({"validation": "V"} if self.rejects else {})
        return misshapen(anchor, form, {}) or impossible(anchor.tensors["count"], means(anchor))

    def width(self, anchor: Item) -> int:
        return len(anchor.tensors["first"])

    def summarise(self, learned: Learned, ctx: Context) -> Statistics | Module:
        item = Statistics(sums(learned, self.limited(learned), second=False))
        if not self.rejects:
            return item
        own = Points([means(item)], [None]).scores(self.held(learned))[:, 0]
        return Module({**item.tensors, "validation": sketch(own)})

    def ready(self, items: tuple[Item, ...], every: tuple[Item, ...]) -> Anchors:
        return Points([means(item) for item in items], [item.tensors.get("validation") for item in items])


class Mixtures(Screened):
    """max_j log(w_j N(x; mu_j, diag s_j)) + (d/2) log(2 pi) over each expert's components, plus its prior."""

    def __init__(self, items: Sequence[Item], prior: Sequence[float]) -> None:
        own = [item.tensors.get("validation") for item in items]
        self.own = [o if o is None else o + p for o, p in zip(own, prior, strict=True)]
        self.group = grouped([item.tensors["weight"] for item in items])
        self.mean, self.variance, weight = (
            torch.cat([item.tensors[name] for item in items]) for name in ("mean", "variance", "weight")
        )
        tiny = torch.finfo(torch.float64).tiny
        log_weight = weight.double().clamp_min(tiny).log()
        precision = 1 / self.variance.double()
        constant = log_weight + torch.tensor(prior, dtype=torch.float64)[self.group]
        self.constant = constant + 0.5 * precision.log().sum(1)

        # Around the components' average, in units of their width, products and their errors are small.
        total = precision.sum(0)
        self.centre = ((precision * self.mean).sum(0) / total).float()
        self.width = (len(precision) / total).sqrt().float()
        off = (self.mean.double() - self.centre) / self.width
        precision *= self.width.double().square()
        base = self.constant - 0.5 * (precision * off.square()).sum(1)
        factors = torch.cat([(precision * off).float(), (0.5 - 0.5 * precision).float()], 1)
        self.screen = Screen.of(factors, base, self.group, parts=2)

    def scores(self, psi: Tensor) -> Tensor:
        psi = psi.double() - self.centre
        found, square = [], psi.square()
        for k in range(len(self.own)):
            own = self.group == k
            mean, precision = self.mean[own].double() - self.centre, 1 / self.variance[own].double()
            distance = (
                square @ precision.T - 2 * psi @ (mean * precision).T + (mean.square() * precision).sum(1)
            )
            found.append((self.constant[own] - 0.5 * distance).max(1).values)
        return torch.stack(found, 1)

    def columns(self, x: Tensor) -> Tensor:
        scaled = ((x - self.centre) / self.width).float()
        return torch.cat([scaled, scaled.square()], 1)

    def exact(self, psi: Tensor, rows: Tensor, j: Tensor) -> Tensor:
        off = psi[rows].double().sub_(self.mean[j])
        return self.constant[j] - 0.5 * off.square_().div_(self.variance[j]).sum(1)


@dataclass(frozen=True)
class GaussianMixture(Anchored):
    """score = max_j log(phi_j N(psi; mu_j, diag sigma_j^2)) over the k components of the source (GMMC).

    k is `components`, or one per `least` examples where these are fewer: a component of a handful of examples
    is so narrow that no other example of its source falls to it. `floor` x (mean variance of the features) is
    added to all variances. On 15 real tasks (benchmarks/results/skill.md) .1 finds the task of 84 % of
    validation images, .001 of 77 %. `floor=1e-6, least=1` is the paper's. `prior="uniform"` pools the
    mixtures as the paper does; "size" weighs each by its source's share of the examples. Mixtures are fitted
    on one source's features only, so the order in which sources arrive changes nothing. `fit="torch"` is our
    own expectation maximisation (products in float32, on the device of the data), "sklearn" is
    scikit-learn's: same start, stop and log-likelihood. With `reject` > 0 an anchor also has the sorted
    scores of at most 256 validation examples, and an input is unknown where its score by the best task is
    below that task's own `reject` quantile of them. Ge et al. 2023 (SKILL).
    """

    components: int = 25
    prior: Literal["size", "uniform"] = "uniform"
    floor: float = 0.1
    """Added to the variances, as a share of the mean variance of the features."""
    on: Literal["features", "inputs"] = "features"
    fit: Literal["torch", "sklearn"] = "torch"
    reject: float = 0.0
    least: int = 20
    """Examples per component: a mixture of fewer examples has fewer components."""
    clip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("components", "least"):
            if getattr(self, name) < 1:
                raise ConsilienceError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name, words in (("prior", ("size", "uniform")), ("fit", ("torch", "sklearn"))):
            if getattr(self, name) not in words:
                raise ConsilienceError(f"`{name}` must be {' or '.join(words)}, got {getattr(self, name)!r}.")
        if not 0 < self.floor < float("inf"):
            raise ConsilienceError(f"`floor` must be positive and finite, got {self.floor}.")

    def misfit(self, anchor: Item) -> str | None:
        form = {"mean": "kd", "variance": "kd", "weight": "k", "count": "n"}
        form |= {"validation": "V"} if self.rejects else {}
        if (reason := misshapen(anchor, form, {"n": 1})) is not None:
            return reason
        parts = [anchor.tensors[name].flatten().double() for name in ("weight", "count")]
        # A variance of 0 would give every density of one place.
        least = float(anchor.tensors["variance"].min())
        if not least > 0:
            return f"variances of an anchor must be positive, got {least:g}"
        return impossible(torch.cat(parts), anchor.tensors["mean"])

    def width(self, anchor: Item) -> int:
        return anchor.tensors["mean"].shape[1]

    def summarise(self, learned: Learned, ctx: Context) -> Module:
        # Places stay on the device of the data, unlike those of `places`: the mixture is fitted there.
        features = features_of(learned)
        psi = torch.cat([self.place(x, features) for x, _ in learned.source.train.chunks(1024)])
        if self.clip:
            psi = Clip.of(psi, self.clip)(psi)
        check_features(psi, range(len(psi)), learned.source.name)
        spread = float(psi.var(0, unbiased=False).mean()) or 1.0
        make = _em.fit if self.fit == "torch" else by_sklearn
        components = min(self.components, max(1, len(psi) // self.least))
        fit = make(psi, components, learned.generator, self.floor * spread)

        names = ("mean", "variance", "weight")
        tensors = {name: getattr(fit, name).to("cpu", torch.float32) for name in names}
        # Anchors are sent to every agent, so that they are in float32.
        item = Module({**tensors, "count": torch.tensor([float(len(psi))])})
        if not self.rejects:
            return item
        _, own = Mixtures([item], [0.0]).best(self.held(learned), True)
        return replace(item, tensors={**item.tensors, "validation": sketch(own)})

    def ready(self, items: tuple[Item, ...], every: tuple[Item, ...]) -> Anchors:
        sizes = torch.stack([item.tensors["count"].double().sum() for item in items])
        # Only experts count, since anchors without an expert cannot win.
        prior = (sizes / sizes.sum()).log().tolist() if self.prior == "size" else [0.0] * len(items)
        return Mixtures(items, prior)


def by_sklearn(x: Tensor, k: int, generator: torch.Generator, floor: float) -> _em.Fit:
    """Fit as `_em.fit` does, by scikit-learn."""
    # One component needs no search, and scikit-learn refuses a single example.
    if min(k, len(x)) == 1:
        return _em.fit(x, k, generator, floor)
    import warnings

    from sklearn.mixture import GaussianMixture as Mixture

    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    fit = Mixture(
        min(k, len(x)), covariance_type="diag", reg_covar=floor, random_state=seed, init_params="k-means++"
    )
    # It warns where it did not converge, which `Fit` reports.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(x.double().cpu().numpy())
    mean, variance, weight = (torch.from_numpy(t) for t in (fit.means_, fit.covariances_, fit.weights_))
    return _em.Fit(mean, variance, weight, float(fit.lower_bound_), int(fit.n_iter_), bool(fit.converged_))
