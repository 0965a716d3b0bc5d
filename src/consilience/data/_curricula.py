"""Curricula: samplers that begin with some of the examples, and pace how many more they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from consilience.core.checks import fraction, positive, whole_number
from consilience.core.errors import ConsilienceError, Refusal, kind_of, unknown
from consilience.core.losses import Losses
from consilience.core.params import content_hash
from consilience.core.sampler import EpochView, Scored, Shuffle
from consilience.core.source import Source
from consilience.core.warning import warn

DIFFICULTIES = ("loss", "confidence", "length", "random")
BABY_STEP = "baby-step"

State = Mapping[str, Tensor]
NOTHING: State = MappingProxyType({})


# Pacing: the share of the examples at t in [0, 1], from `start`; all of them at t = 1


def linear(t: float, start: float, steps: int) -> float:
    """Return start + (1 - start) t."""
    return start + (1 - start) * t


def sqrt(t: float, start: float, steps: int) -> float:
    """Return start + (1 - start) sqrt(t)."""
    return start + (1 - start) * math.sqrt(t)


def exponential(t: float, start: float, steps: int) -> float:
    """Return 1 - (1 - start) exp(-3 t)."""
    return 1 - (1 - start) * math.exp(-3 * t)


def step(t: float, start: float, steps: int) -> float:
    """Return start + (1 - start) k / (steps - 1), with k = floor(steps t) and at most steps - 1."""
    return start + (1 - start) * min(int(t * steps), steps - 1) / (steps - 1)


def competence(t: float, start: float, steps: int) -> float:
    """Return sqrt(t (1 - start^2) + start^2)."""
    return math.sqrt(t * (1 - start**2) + start**2)


PACINGS: Mapping[str, Callable[[float, float, int], float]] = {
    "linear": linear,
    "sqrt": sqrt,
    "exponential": exponential,
    "step": step,
    "competence": competence,
}


@dataclass(frozen=True)
class Curriculum(Scored):
    """Begin with the easiest examples, and take more from epoch to epoch (Bengio et al. 2009).

    Epoch e sees the c(t) N easiest of N examples once, in a new order, with t = e / (over - 1). From
    t = 1 on it sees all, as `Shuffle` does. Epochs count over all visits to a source, such as the rounds of a
    client. With f = `start`, the share c(t) is

        linear       f + (1 - f) t                          sqrt         f + (1 - f) sqrt(t)
        competence   sqrt(t (1 - f^2) + f^2)                exponential  1 - (1 - f) exp(-3 t)
        step         f + (1 - f) min(floor(steps t), steps - 1) / (steps - 1)

    "competence" is that of Platanios et al. (2019). "baby-step" (Spitkovsky et al. 2010) begins with the
    first of `steps` equal buckets, and adds the next one where an epoch lowered the mean loss of the examples
    so far by less than `least` of it, and at the latest after its share of `over` epochs.

    The log has how many examples each epoch chose from, and the share of the last one.

    Args:
        difficulty: "loss" or "confidence" (1 - the largest class probability) of the present model, "length"
            of sequences, "random" (a control); or numbers [N], in the order of the training examples, or
            such numbers by source; or a module or function of inputs [B, ...] that returns difficulties
            [B], or outputs [B, C], whose entropy counts: a teacher's or a pretrained model's uncertainty.
            Outputs are logits, unless all rows are >= 0 and sum to 1.
        pacing: one of these names, or a function of t with values in (0, 1].
        start: the share of the first epoch, in (0, 1); None: .2.
        over: the epochs of the curriculum, of which the last sees all examples; None: all epochs on a source.
        rescore: measure the difficulty every so many epochs; None: once, before the first, when a model that
            was never trained knows little. Of "loss" and "confidence" only.
        anti: take the hardest examples first.
        steps: of "step" and "baby-step"; None: 5.
        least: of "baby-step"; None: .01.

    Raises ConsilienceError for values out of range or without effect, and Refusal for sources without such
    a difficulty.

    >>> sampler = Curriculum([0.1, 0.9, 0.5, 0.7], start=0.5)
    >>> sampler.share(0, 5), sampler.share(2, 5), sampler.share(4, 5)
    (0.5, 0.75, 1.0)
    """

    difficulty: Any = "loss"
    pacing: str | Callable[[float], float] = "linear"
    start: float | None = None
    over: int | None = None
    rescore: int | None = None
    anti: bool = False
    steps: int | None = None
    least: float | None = None

    def __post_init__(self) -> None:
        # The class is frozen, but difficulties have several forms.
        object.__setattr__(self, "difficulty", difficulty_of(self.difficulty))
        if not callable(self.pacing) and self.pacing not in (*PACINGS, BABY_STEP):
            raise unknown("pacing", self.pacing, (*PACINGS, BABY_STEP))
        if self.start is not None:
            fraction("start", self.start)
        for name, low in (("over", 2), ("rescore", 1), ("steps", 2)):
            value = getattr(self, name)
            if value is not None:
                whole_number(low, **{name: value})
        if self.least is not None:
            fraction("least", self.least)
        if not isinstance(self.anti, bool):
            raise ConsilienceError(f"`anti` must be true or false, got {self.anti!r}.")
        self._check_effect()

    def _check_effect(self) -> None:
        """Refuse values that would change nothing."""
        if self.rescore is not None and self.difficulty not in ("loss", "confidence"):
            raise ConsilienceError(
                "`rescore` has no effect on a difficulty that does not depend on the present model, got "
                f"{self.rescore}; leave it out, or use difficulty='loss'."
            )
        if self.anti and self.difficulty == "random":
            raise ConsilienceError("`anti` has no effect on a random order; leave it out.")
        wanted = {"steps": ("step", BABY_STEP), "least": (BABY_STEP,)}
        wanted["start"] = tuple(PACINGS)
        for name, pacings in wanted.items():
            if getattr(self, name) is not None and self.pacing not in pacings:
                raise ConsilienceError(
                    f"`{name}` has no effect with pacing={self.pacing!r}, got {getattr(self, name)!r}; "
                    "leave it out."
                )

    def check(self, sources: Sequence[Source], epochs: int, pools: bool) -> None:
        """Refuse sources without such a difficulty, and warn of a curriculum that never sees all of one."""
        if self.over is None and epochs < 2:
            raise ConsilienceError(
                "a curriculum needs two epochs or more on a source, got 1; train for more `epochs` or rounds."
            )
        if self.over is not None and self.over > epochs:
            warn(
                f"the curriculum never sees all examples: it takes over={self.over} epochs, and a source is "
                f"trained for {epochs} of them"
            )
        if pools and isinstance(self.difficulty, Given):
            raise Refusal(
                "difficulties were given by source, and the method trains on pools of several sources; use a "
                "difficulty that can be measured, such as 'loss' or a function of the inputs."
            )
        for source in sources:
            self._check_source(source, len(sources))

    def _check_source(self, source: Source, count: int) -> None:
        """Refuse a source without such a difficulty."""
        if isinstance(self.difficulty, Given):
            self.difficulty.of(source.name, len(source.train), count)
        if self.difficulty == "length" and source.train.lengths() is None:
            raise Refusal(
                f"inputs of {source.name!r} have no lengths, so difficulty='length' cannot be measured; use "
                "'loss', or give difficulties."
            )
        if self.difficulty == "confidence" and source.kind != "class":
            raise Refusal(
                f"difficulty='confidence' needs targets that are classes, got {source.kind!r} in "
                f"{source.name!r}; use 'loss'."
            )

    def share(self, epoch: int, epochs: int) -> float:
        """Return the share of the examples at an epoch of a source that is trained for `epochs`."""
        last = (self.over or epochs) - 1
        # A client may be asked for a single epoch, where others have more.
        if epoch >= last:
            return 1.0
        t = epoch / last
        if callable(self.pacing):
            found = float(self.pacing(t))
            if not 0 < found <= 1:
                raise ConsilienceError(f"`pacing` must return shares in (0, 1], got {found} at t = {t:.3g}.")
            return found
        # Of baby steps this is what they must reach, if not earlier.
        if self.pacing == BABY_STEP:
            return (1 + int(t * self._steps)) / self._steps
        return min(1.0, PACINGS[self.pacing](t, 0.2 if self.start is None else self.start, self._steps))

    @property
    def _steps(self) -> int:
        return self.steps or 5

    def advance(self, state: State, view: EpochView) -> dict[str, Tensor]:
        """Return the state for an epoch: the difficulty of each example [N], and the `count` of the easiest.

        Of baby steps also the `step`, and the mean `loss` of the examples so far.
        """
        size = len(view.examples)
        known = state.get("difficulty")
        due = self.rescore is not None and view.epoch % self.rescore == 0
        if known is None or len(known) != size or due:
            known = self._difficulties(view)
        share = self.share(view.epoch, view.epochs)
        new = {"difficulty": known}
        if self.pacing == BABY_STEP:
            more = self._baby_step(state, view, known, share)
            share, new = int(more["step"]) / self._steps, new | more
        return new | {"count": torch.tensor(count_of(share, size))}

    def _difficulties(self, view: EpochView) -> Tensor:
        """Return the difficulty of each example [N]; NaN: not known, which counts as hardest."""
        difficulty, size = self.difficulty, len(view.examples)
        if isinstance(difficulty, Given):
            return difficulty.of(view.source, size)
        if difficulty == "random":
            return torch.rand(size, generator=view.generator, dtype=torch.float64)
        if difficulty == "length":
            lengths = view.examples.lengths()
            assert lengths is not None, "inputs without lengths are refused before a run"
            return lengths.cpu().double()
        if difficulty == "loss":
            return losses_of(view)
        if difficulty == "confidence":
            return view.by_output(doubt)
        found = view.by_input(difficulty)
        if found.isnan().any():
            raise ConsilienceError(f"the difficulty of examples of {view.source!r} must be numbers, got NaN.")
        return found

    def _baby_step(self, state: State, view: EpochView, known: Tensor, share: float) -> dict[str, Tensor]:
        """Return the step and the mean loss of the examples so far, one step on where that converged."""
        last, before = int(state.get("step", 0)), state.get("loss")
        if last == self._steps:
            return {"step": state["step"], "loss": state["loss"]}
        losses = known if self.difficulty == "loss" and self.rescore == 1 else losses_of(view)

        def level(steps: int) -> Tensor:
            so_far = self._ranked(known)[: count_of(steps / self._steps, len(known))]
            return losses[so_far].nanmean()

        # The loss may be negative, as that of counts is.
        least = 0.01 if self.least is None else self.least
        converged = before is None or float(before - level(last)) < least * abs(float(before))
        due = max(last + converged, round(share * self._steps))
        return {"step": torch.tensor(min(self._steps, due)), "loss": level(due)}

    def _ranked(self, known: Tensor) -> Tensor:
        """Return the indices of examples, the first to be taken first."""
        score = -known if self.anti else known
        return torch.where(score.isnan(), torch.inf, score).argsort(stable=True)

    def plan(
        self, targets: Tensor, batch_size: int, epoch: int, generator: torch.Generator, state: State = NOTHING
    ) -> list[Tensor]:
        count = int(state["count"])
        if count >= len(targets):
            return Shuffle().plan(targets, batch_size, epoch, generator)
        # In a random order first: examples of equal difficulty would come in the order of the source.
        order = torch.randperm(len(targets), generator=generator)
        chosen = order[self._ranked(state["difficulty"][order])[:count]]
        return list(chosen[torch.randperm(count, generator=generator)].split(batch_size))


@dataclass(frozen=True)
class SelfPaced(Scored):
    """See the examples whose loss is below a threshold that grows (Kumar, Packer & Koller 2010).

    For min over v of sum_i v_i l_i - lambda v_i the solution is v_i = [l_i < lambda], by the losses l of the
    present model in eval mode. `soft` weights them by v_i = max(0, 1 - l_i / lambda), the linear scheme of
    Jiang et al. (2014); the loss of a batch is then sum_i v_i l_i / sum_i v_i. After each epoch lambda is
    multiplied by `growth`. Where no loss is below it, one batch of the lowest is seen.

    The log has how many examples each epoch chose from, and the share of the last one.

    Args:
        threshold: lambda of the first epoch, > 0; None: as `start` says.
        start: the share of the examples whose losses are below the first lambda, in (0, 1); None: .5.
        growth: of lambda from epoch to epoch, >= 1.
        rescore: measure the losses every so many epochs.
        soft: weight the examples.

    Raises ConsilienceError for values out of range or without effect.

    >>> sampler = SelfPaced(threshold=1.0, soft=True)
    >>> sampler.weights({"loss": torch.tensor([0.25, 2.0]), "threshold": torch.tensor(1.0)})
    tensor([0.7500, 0.0000])
    """

    threshold: float | None = None
    start: float | None = None
    growth: float = 1.3
    rescore: int = 1
    soft: bool = False

    def __post_init__(self) -> None:
        if self.threshold is not None:
            positive(threshold=self.threshold)
        if self.start is not None:
            fraction("start", self.start)
        if self.threshold is not None and self.start is not None:
            raise ConsilienceError(
                f"`start` has no effect with a `threshold`, got {self.start} and {self.threshold}; give one."
            )
        if not 1 <= self.growth < math.inf:
            raise ConsilienceError(f"`growth` must be >= 1 and finite, got {self.growth!r}.")
        whole_number(rescore=self.rescore)

    def check(self, sources: Sequence[Source], epochs: int, pools: bool) -> None:
        """Refuse a single epoch, in which nothing could grow."""
        if epochs < 2:
            raise ConsilienceError(
                "self-paced learning needs two epochs or more on a source, got 1; train for more `epochs` or "
                "rounds."
            )

    def advance(self, state: State, view: EpochView) -> dict[str, Tensor]:
        """Return the state for an epoch: the `loss` of each example [N], and the `threshold`."""
        losses = state.get("loss")
        if losses is None or len(losses) != len(view.examples) or view.epoch % self.rescore == 0:
            losses = losses_of(view)
        if "threshold" in state:
            return {"loss": losses, "threshold": state["threshold"] * self.growth}
        return {"loss": losses, "threshold": self._first(losses, view.source)}

    def _first(self, losses: Tensor, source: str) -> Tensor:
        """Return lambda of the first epoch."""
        known = losses[~losses.isnan()].sort().values
        if self.threshold is None:
            share = 0.5 if self.start is None else self.start
            found = known[min(len(known) - 1, count_of(share, len(known)))]
            if found <= 0:
                raise ConsilienceError(
                    f"self-paced learning needs losses above 0, got {float(found):.3g} in {source!r}; give a "
                    "`threshold`."
                )
            return found
        if not known[0] < self.threshold:
            raise ConsilienceError(
                f"`threshold` must be above some losses, got {self.threshold} where those of {source!r} "
                f"begin at {float(known[0]):.3g}; raise it, or leave it out."
            )
        return torch.tensor(self.threshold, dtype=torch.float64)

    def plan(
        self, targets: Tensor, batch_size: int, epoch: int, generator: torch.Generator, state: State = NOTHING
    ) -> list[Tensor]:
        chosen = (state["loss"] < state["threshold"]).nonzero().flatten()
        if len(chosen) == len(targets):
            return Shuffle().plan(targets, batch_size, epoch, generator)
        if not len(chosen):
            chosen = state["loss"].argsort(stable=True)[:batch_size]
        return list(chosen[torch.randperm(len(chosen), generator=generator)].split(batch_size))

    def weights(self, state: State) -> Tensor | None:
        if not self.soft:
            return None
        weights = (1 - state["loss"] / state["threshold"]).nan_to_num(0).clamp_min(0)
        return weights if bool((weights > 0).any()) else torch.ones_like(weights)


def count_of(share: float, size: int) -> int:
    """Return the whole part of share x size, at least 1; .3 + .7 / 7 of 30 are 12, whatever floats say.

    >>> int((0.3 + 0.7 * (1 / 7)) * 30), count_of(0.3 + 0.7 * (1 / 7), 30)
    (11, 12)
    """
    return max(1, int(round(share * size, 9)))


# Difficulties


@dataclass(frozen=True, eq=False)
class Given:
    """Difficulties that were given, as numbers [N] of the one source, or by source."""

    numbers: Mapping[str, Tensor] = field(repr=False)
    """Under "" where there is one source."""
    digest: str

    def of(self, name: str, size: int, sources: int = 1) -> Tensor:
        """Return the numbers [N] of a source with N examples; raises ConsilienceError where they misfit."""
        if "" in self.numbers and sources > 1:
            raise ConsilienceError(
                f"difficulties must be given by source where there are several, got one list for {sources}; "
                f"give {{{name!r}: [...], ...}}."
            )
        found = self.numbers.get(name, self.numbers.get(""))
        if found is None:
            raise unknown("source", name, self.numbers, "those with a difficulty")
        if len(found) != size:
            raise ConsilienceError(
                f"`difficulty` must have one number for each of the {size} training examples of {name!r}, "
                f"got {len(found)}; what is taken for validation and test has none."
            )
        return found


@dataclass(frozen=True, eq=False)
class Teacher:
    """A function of inputs [B, ...] whose answers say how difficult they are."""

    function: Callable[[Any], Any] = field(repr=False)
    name: str
    """Of the function, or the hash of a module's weights."""

    @torch.no_grad()
    def __call__(self, x: Any) -> Tensor:
        """Return the difficulties [B]: its answers, or the entropy of its outputs [B, C]."""
        module = self.function if isinstance(self.function, nn.Module) else None
        training = module is not None and module.training
        try:
            if module is not None:
                module.eval()
            out = self.function(x)
        finally:
            if module is not None:
                module.train(training)

        out = getattr(out, "logits", out)
        if not isinstance(out, Tensor) or out.dim() not in (1, 2) or len(out) != len(x):
            found = tuple(out.shape) if isinstance(out, Tensor) else kind_of(out)
            raise ConsilienceError(
                f"a `difficulty` of inputs must return difficulties [B], or outputs [B, C], got {found} for "
                f"{len(x)} inputs."
            )
        return out if out.dim() == 1 else entropy(out)


def difficulty_of(given: Any) -> Any:
    """Return a difficulty in the form that `Curriculum` keeps. Raises ConsilienceError for anything else."""
    if isinstance(given, Given | Teacher):
        return given
    if isinstance(given, str):
        if given not in DIFFICULTIES:
            raise unknown("difficulty", given, DIFFICULTIES)
        return given
    if callable(given):
        if isinstance(given, nn.Module):
            return Teacher(given, content_hash({**given.state_dict()}))
        kind = getattr(given, "__qualname__", type(given).__qualname__)
        return Teacher(given, f"{getattr(given, '__module__', '')}.{kind}")

    by_source = given if isinstance(given, Mapping) else {"": given}
    numbers = {name: numbers_of(value) for name, value in by_source.items()}
    return Given(numbers, content_hash(numbers))


def numbers_of(value: Any) -> Tensor:
    """Return difficulties [N] of one source as a tensor."""
    try:
        found = torch.as_tensor(value if isinstance(value, Tensor | list | tuple) else _array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConsilienceError(
            f"`difficulty` must be {', '.join(DIFFICULTIES)}, numbers [N] or a function, got "
            f"{kind_of(value)}."
        ) from error
    if found.dim() != 1 or found.is_complex() or not torch.isfinite(found).all():
        raise ConsilienceError(
            f"`difficulty` must be finite numbers [N], one per training example, got {found.dtype} of shape "
            f"{tuple(found.shape)}."
        )
    return found.detach().cpu().double()


def _array(value: Any) -> Any:
    """Return an array of a column, such as that of a table."""
    import numpy as np

    return np.asarray(value)


def losses_of(view: EpochView) -> Tensor:
    """Return the loss of each example [N] with the present model; NaN of one without a target."""

    def score(out: Tensor, y: Tensor) -> Tensor:
        found: Losses = view.target.losses(out, y)
        if found.counts is None:
            return found.values
        return torch.where(found.counts > 0, found.values, torch.nan)

    return view.by_output(score)


def doubt(out: Tensor, y: Tensor) -> Tensor:
    """Return 1 - the largest probability of each sample [B], a mean over places.

    >>> doubt(torch.zeros(1, 4), torch.zeros(1))
    tensor([0.7500])
    """
    each = 1 - out.softmax(1).amax(1)
    return each if each.dim() == 1 else each.flatten(1).mean(1)


def entropy(out: Tensor) -> Tensor:
    """Return the entropy [B] of logits or probabilities [B, C].

    >>> entropy(torch.tensor([[0.0, 0.0]])), entropy(torch.tensor([[1.0, 0.0]]))
    (tensor([0.6931]), tensor([0.]))
    """
    out = out if out.dtype == torch.float64 else out.float()
    # Logits of a whole batch never look so.
    known = bool((out >= 0).all()) and torch.allclose(out.sum(1), torch.ones_like(out[:, 0]), atol=1e-4)
    found: Tensor = torch.special.entr(out if known else out.softmax(1)).sum(1)
    return found
