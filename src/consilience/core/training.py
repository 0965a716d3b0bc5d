"""How a source is trained on: epochs, batches, the inner optimiser, the sampler, precision and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from consilience.core.errors import ConsilienceError, kind_of, suggests
from consilience.core.shares import exact_share
from consilience.core.stopping import Stopping

# The command line reads this signature to list its options, so nothing here imports torch at module level.
if TYPE_CHECKING:
    import torch

    from consilience.core.params import Layout

OPTIMISERS = ("sgd", "adam", "adamw")
PRECISIONS = ("fp32", "fp64", "bf16", "fp16")
LR_SCHEDULES = ("constant", "linear", "cosine")
SPANS = ("visit", "source", "run", "rounds")

OF_ADAM = ("betas", "eps")
ARGUMENTS: Mapping[str, Collection[str]] = {"sgd": ("nesterov",), "adam": OF_ADAM, "adamw": OF_ADAM}
"""The `arguments` of our optimisers, under torch's names."""


class Place(NamedTuple):
    """Where a visit lies in a run: visit `visit` of `visits` by one agent, round `round` of `rounds`."""

    visit: int = 0
    """Earlier visits of the agent to the same sources."""
    visits: int = 1
    round: int = 0
    """Earlier Train phases of the run."""
    rounds: int = 1


@dataclass(frozen=True)
class Training:
    """Hyperparameters of the inner training, the same in every setting.

    A step takes the aggregated gradient of all objectives, adds the gradients of penalties, clips the sum,
    and gives it to the optimiser. What cannot move in the step (masked entries, heads of other tasks) does
    not count in the norm.

    Args:
        epochs: passes over a source at each visit; 0 trains nothing.
        batch_size: samples of each part of a step.
        lr: learning rate, the highest that `lr_schedule` reaches.
        optimiser: "sgd", "adam", "adamw", a class of torch.optim by its name, such as "RAdam", or any
            `consilience.core.optimiser.Optimiser`. It restarts at each visit.
        momentum: of "sgd", and of classes of torch.optim that take it.
        weight_decay: L2 (decoupled for "adamw").
        sampler: which examples a step sees, such as those of a curriculum; None shuffles
            (`consilience.data.samplers`).
        precision: "fp32", "fp64", "bf16" or "fp16": the last two are autocast, of float32 parameters. "fp16"
            scales the loss by the rule of `consilience.core.scaling.LossScale`, which leaves out up to 20
            steps in a row whose gradient is not finite.
        device: where to train, such as "cpu" or "cuda:0".
        lr_schedule: the factor of the learning rate as a function of t in [0, 1): "constant", "linear" 1 - t,
            "cosine" (1 + cos(pi t)) / 2, or any function of t with values in (0, 1]. An agent that trains for
            a fraction of a visit stops early on the same curve.
        rates: factors of the learning rate for entries that match a shell pattern, as parameter groups do:
            `{"biases.*": 20.0}`. The first pattern that an entry matches counts; each must match a trained
            entry.
        loss: what tasks are trained by: a name, one of `consilience.losses`, a function (outputs, targets) ->
            the loss of each target, or several of these by task or kind of targets. That of a source wins.
            None: cross-entropy of classes, squared error of values, binary cross-entropy of labels.
        lr_over: what t runs over: "visit" (each on its own), "source" (all visits of an agent to the same
            sources), "run" (all Train phases, such as the rounds of a federation), or "rounds", which is
            "run" with one learning rate for the whole of a visit.
        warmup: steps over which the learning rate rises linearly to the curve, (i + 1) / warmup at step i;
            below 1 a fraction of what `lr_over` names; rounds with lr_over="rounds". The curve follows.
        decay: factors of `weight_decay` for entries that match a shell pattern, as in `rates`:
            `{"*.bias": 0.0}`.
        arguments: further arguments of a named optimiser, under torch's names: `{"nesterov": True}` of "sgd",
            `{"betas": (0.9, 0.99), "eps": 1e-6}` of "adam" and "adamw", all but `lr` of torch's own.
        clip_norm: the largest L2 norm of the gradient, which is scaled down to it, as
            `torch.nn.utils.clip_grad_norm_` does; None: any.
        clip_value: the largest size of each number of the gradient, as `clip_grad_value_`; None: any.
        accumulate: micro-batches of `batch_size` samples per step. Their gradients are weighted by how many
            targets each has, so that a step is one of a batch `accumulate` times as large, whatever the
            aggregator. Batch norm, and corrections that read a batch, see each micro-batch alone; `trace`
            sees all of them. A mapping gives single sources their own number, others 1: `{"ner": 4}` takes
            four batches of "ner" to a step, and one of each other task.
        stopping: ends a visit where the validation loss of its sources no longer improves, and takes it back
            to its best parameters, as if it had ended there: a `consilience.Stopping`, or the number of
            epochs to wait. None: all epochs are run.
        compile: compile forward and backward passes with torch.compile: the same numbers, to rounding. Where
            that fails, or a correction changes the parameters that the model sees, a warning says so.

    Raises ConsilienceError for values out of range, and for arguments that would have no effect.

    >>> training = Training(optimiser="sgd", momentum=0.9, arguments={"nesterov": True}, warmup=2)
    >>> training.inner(), [training.rate((0, i), (1, 8)) for i in range(3)]
    (SGD(momentum=0.9, weight_decay=0.0, nesterov=True), [0.025, 0.05, 0.05])
    """

    epochs: int = 5
    batch_size: int = 32
    lr: float = 0.05
    optimiser: Any = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    sampler: Any = None
    precision: Literal["fp32", "fp64", "bf16", "fp16"] = "fp32"
    device: str = "cpu"
    lr_schedule: Literal["constant", "linear", "cosine"] | Callable[[float], float] = "constant"
    rates: Mapping[str, float] | None = field(default=None, hash=False)
    loss: Any = field(default=None, hash=False)
    lr_over: Literal["visit", "source", "run", "rounds"] = "visit"
    warmup: float = 0.0
    decay: Mapping[str, float] | None = field(default=None, hash=False)
    arguments: Mapping[str, Any] | None = field(default=None, hash=False)
    clip_norm: float | None = None
    clip_value: float | None = None
    accumulate: int | Mapping[str, int] = field(default=1, hash=False)
    stopping: Any = None
    compile: bool = False

    def __post_init__(self) -> None:
        counts = [(name, getattr(self, name), low) for name, low in (("epochs", 0), ("batch_size", 1))]
        each = self.accumulate.values() if isinstance(self.accumulate, Mapping) else [self.accumulate]
        counts += [("accumulate", value, 1) for value in each]
        for name, value, low in counts:
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConsilienceError(f"`{name}` must be a whole number >= {low}, got {value!r}.")

        check_number("lr", self.lr, "positive and finite", lambda value: value > 0)
        for name in ("weight_decay", "momentum", "warmup"):
            check_number(name, getattr(self, name), ">= 0 and finite", lambda value: value >= 0)
        if self.momentum >= 1:
            raise ConsilienceError(f"`momentum` must be in [0, 1), got {self.momentum!r}.")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ConsilienceError(
                f"`warmup` must be a whole number of steps, or a fraction below 1, got {self.warmup!r}."
            )

        # A configuration in a file may hold any text.
        for name, choices in (("precision", PRECISIONS), ("lr_schedule", LR_SCHEDULES), ("lr_over", SPANS)):
            value = getattr(self, name)
            if value not in choices and not (name == "lr_schedule" and callable(value)):
                also = " or a function" if name == "lr_schedule" else ""
                raise ConsilienceError(f"`{name}` must be one of {', '.join(choices)}{also}, got {value!r}.")
        if self.lr_over != "visit" and not self.varies:
            raise ConsilienceError(
                f"`lr_over` has no effect on a constant learning rate, got {self.lr_over!r}; "
                "choose an `lr_schedule`, or leave it out."
            )

        # The class is frozen, but these have several forms.
        object.__setattr__(self, "device", device_name(self.device))
        object.__setattr__(self, "stopping", Stopping.of(self.stopping))
        for name in ("rates", "decay"):
            check_factors(name, getattr(self, name))
        if not isinstance(self.compile, bool):
            raise ConsilienceError(f"`compile` must be true or false, got {self.compile!r}.")
        self._check_clipping()
        self._check_optimiser()

    def _check_clipping(self) -> None:
        """Refuse limits of the gradient that are not positive, and two at once."""
        for name in ("clip_norm", "clip_value"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "positive and finite", lambda value: value > 0)
        if self.clip_norm is not None and self.clip_value is not None:
            raise ConsilienceError(
                f"the gradient can be clipped in one way, got clip_norm={self.clip_norm} and "
                f"clip_value={self.clip_value}; leave one out."
            )

    def _check_optimiser(self) -> None:
        """Refuse an unknown optimiser, and arguments that would not reach it."""
        # A class has `update` too, but only an object of it can be used.
        named = isinstance(self.optimiser, str)
        if not named and not (hasattr(self.optimiser, "update") and not isinstance(self.optimiser, type)):
            of_torch = type(self.optimiser).__module__.startswith("torch.optim") or isinstance(
                self.optimiser, type
            )
            remedy = '; write its name, as in optimiser="RAdam", and its arguments in `arguments`'
            raise ConsilienceError(
                "`optimiser` must be sgd, adam, adamw, the name of a class of torch.optim or an Optimiser, "
                f"got {kind_of(self.optimiser)}{remedy if of_torch else ''}."
            )
        if self.decay and not self.weight_decay:
            raise ConsilienceError(
                f"`decay` has no effect without `weight_decay`, got {dict(self.decay)}; give both."
            )

        given = dict(self.arguments or {})
        if "lr" in given or "lr" in dict(getattr(self.optimiser, "arguments", ())):
            raise ConsilienceError(
                f"`lr` must be given once, as Training(lr=...), got it as an argument of {self.optimiser!r} "
                "too."
            )
        # An object has hyperparameters of its own, which these would not change.
        if not named:
            unused = [name for name in ("momentum", "weight_decay", "arguments") if getattr(self, name)]
            if unused:
                raise ConsilienceError(
                    f"`{unused[0]}` has no effect with an Optimiser object, got "
                    f"{getattr(self, unused[0])!r} and {self.optimiser!r}; give it to the object."
                )
            return

        if self.momentum and self.optimiser in ("adam", "adamw"):
            raise ConsilienceError(
                f"`momentum` has no effect on {self.optimiser}, got {self.momentum}; set `betas` in "
                "`arguments`."
            )
        for name in ("momentum", "weight_decay"):
            if name in given:
                raise ConsilienceError(f"`{name}` must be given as Training({name}=...), not in `arguments`.")
        allowed = ARGUMENTS.get(self.optimiser, given)
        for name in given:
            if name not in allowed:
                raise ConsilienceError(
                    f"`arguments` of {self.optimiser} must be among {', '.join(allowed)}, got {name!r}; the "
                    "classes of torch.optim take more, by names such as 'SGD', 'Adam' and 'RAdam'."
                )

        # Only building it shows whether the class takes its arguments.
        if given or self.optimiser not in OPTIMISERS:
            self.inner()

    # Entries with values of their own

    def factors(self, layout: Layout) -> torch.Tensor | None:
        """Return the factor of the learning rate for each trained number [n], or None without `rates`.

        >>> import torch
        >>> from consilience.core.params import Layout
        >>> layout = Layout.of({"body.w": torch.zeros(2), "head.w": torch.zeros(1)})
        >>> Training(rates={"head.*": 0.5}).factors(layout)
        tensor([1.0000, 1.0000, 0.5000])
        """
        return spread("rates", self.rates, layout) if self.rates else None

    def decays(self, layout: Layout) -> torch.Tensor | None:
        """Return the weight decay of each trained number [n]; None without `decay`: the optimiser has it.

        >>> import torch
        >>> from consilience.core.params import Layout
        >>> layout = Layout.of({"bias": torch.zeros(1), "w": torch.zeros(2)})
        >>> Training(weight_decay=0.5, decay={"bias": 0.0}).decays(layout)
        tensor([0.0000, 0.5000, 0.5000])
        """
        return self.weight_decay * spread("decay", self.decay, layout) if self.decay else None

    @property
    def decoupled(self) -> bool:
        """Whether weight decay is a part of the step (AdamW), not of the gradient (L2)."""
        given = dict(self.arguments or {})
        return self.optimiser in ("adamw", "AdamW", "Adafactor") or bool(given.get("decoupled_weight_decay"))

    # The learning rate

    @property
    def varies(self) -> bool:
        """Whether the learning rate is not the same in all steps of a run."""
        return self.lr_schedule != "constant" or self.warmup > 0

    def rate(self, clock: tuple[int, int], horizon: tuple[int, int], place: Place | None = None) -> float:
        """Return the learning rate at a step of a visit.

        `clock` is (epoch, step in the epoch), `horizon` is (epochs, steps per epoch), and `place` is where
        the visit lies in the run.

        >>> [round(Training(lr=1.0, lr_schedule="cosine").rate((0, i), (2, 2)), 2) for i in range(4)]
        [1.0, 0.85, 0.5, 0.15]
        """
        if not self.varies:
            return self.lr

        # Visits to come are taken to have as many steps as this one.
        place = place or Place()
        done, total = clock[0] * horizon[1] + clock[1], horizon[0] * horizon[1]
        if self.lr_over == "source":
            done, total = place.visit * total + done, place.visits * total
        elif self.lr_over == "run":
            done, total = place.round * total + done, place.rounds * total
        elif self.lr_over == "rounds":
            done, total = place.round, place.rounds

        # Step i has (i + 1) / warmup: the first step moves, and the last of the warm-up has the full rate.
        warmup = self.warmup if self.warmup >= 1 else math.ceil(exact_share(self.warmup, total))
        if done < warmup:
            return self.lr * (done + 1) / warmup
        return self.lr * self._factor((done - warmup) / max(1, total - warmup))

    def _factor(self, t: float) -> float:
        """Return the factor of the learning rate at t in [0, 1)."""
        if self.lr_schedule == "constant":
            return 1.0
        if self.lr_schedule == "linear":
            return 1 - t
        if self.lr_schedule == "cosine":
            return (1 + math.cos(math.pi * t)) / 2

        # Corrections cap their strength by `lr`, so no factor may raise it.
        assert callable(self.lr_schedule)
        factor = float(self.lr_schedule(t))
        if not 0 < factor <= 1:
            raise ConsilienceError(
                f"`lr_schedule` must return factors in (0, 1], got {factor} at t = {t:.3g}; `lr` is the "
                "highest learning rate."
            )
        return factor

    def at(self, place: Place) -> Training:
        """Return the training of one visit, with its own constant learning rate if `lr_over` is "rounds".

        >>> Training(lr=1.0, lr_schedule="linear", lr_over="rounds").at(Place(round=1, rounds=4)).lr
        0.75
        """
        if self.lr_over != "rounds" or not self.varies:
            return self
        # Corrections that assume one learning rate, such as SCAFFOLD, need the one of this visit.
        lr = self.rate((0, 0), (1, 1), place)
        return replace(self, lr=lr, lr_schedule="constant", lr_over="visit", warmup=0.0)

    # What runs

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches."""
        each = self.accumulate.values() if isinstance(self.accumulate, Mapping) else [self.accumulate]
        return any(count > 1 for count in each)

    def samples_of(self, source: str) -> int:
        """Return the samples of a source in a step, over all of its micro-batches.

        >>> training = Training(batch_size=8, accumulate={"ner": 4})
        >>> training.samples_of("ner"), training.samples_of("pos")
        (32, 8)
        """
        given = self.accumulate
        return self.batch_size * (given.get(source, 1) if isinstance(given, Mapping) else given)

    @property
    def dtype(self) -> torch.dtype:
        """The type of parameters and inputs; "bf16" and "fp16" keep float32 parameters."""
        import torch

        return torch.float64 if self.precision == "fp64" else torch.float32

    def inner(self) -> Any:
        """Return the inner optimiser."""
        from consilience.core.optimiser import SGD, Adam, Torch

        if not isinstance(self.optimiser, str):
            return self.optimiser

        # With `decay`, the step adds what each entry loses.
        given, decay = dict(self.arguments or {}), 0.0 if self.decay else self.weight_decay
        if self.optimiser == "sgd":
            return SGD(self.momentum, decay, **given)
        if self.optimiser in OPTIMISERS:
            beta1, beta2 = checked_betas(given.get("betas", (Adam.beta1, Adam.beta2)))
            eps = given.get("eps", Adam.eps)
            return Adam(beta1, beta2, eps, weight_decay=decay, decoupled=self.decoupled)

        more = {"momentum": self.momentum, "weight_decay": decay}
        given |= {name: value for name, value in more.items() if value}
        # A class may decay weights by default, which `decay` replaces.
        if self.decay:
            given["weight_decay"] = 0.0
        # Files hold lists where torch takes tuples.
        pairs = ((name, tuple(v) if isinstance(v, list) else v) for name, v in given.items())
        return Torch(self.optimiser, tuple(sorted(pairs)))


def check_number(name: str, value: object, rule: str, fits: Callable[[Any], bool]) -> None:
    """Refuse what is no finite number that fits."""
    # A text would compare with TypeError, and True would pass for 1.
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or not fits(value):
        raise ConsilienceError(f"`{name}` must be {rule}, got {value!r}.")


def check_factors(name: str, patterns: Mapping[str, float] | None) -> None:
    """Refuse factors by pattern that are not numbers >= 0."""
    if not isinstance(patterns, Mapping | None):
        raise ConsilienceError(f"`{name}` must be a mapping of patterns to factors, got {patterns!r}.")
    for pattern, factor in (patterns or {}).items():
        number = isinstance(factor, Real) and not isinstance(factor, bool)
        if not number or not 0 <= factor < float("inf"):
            raise ConsilienceError(
                f"factors of `{name}` must be >= 0 and finite, got {factor!r} for {pattern!r}."
            )


def checked_betas(betas: object) -> Collection[float]:
    """Return the two decay rates of Adam; refuse anything else."""
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ConsilienceError(f"`betas` must be two numbers in [0, 1), got {betas!r}.")
    for beta in betas:
        check_number("betas", beta, "two numbers in [0, 1)", lambda value: 0 <= value < 1)
    return betas


def device_name(device: Any) -> str:
    """Return the name of a device; torch's own objects are accepted too.

    >>> device_name("cpu:0")
    'cpu'
    """
    # Most runs are on "cpu", and need no torch to know it.
    if device == "cpu":
        return "cpu"
    import torch

    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConsilienceError(f"`device` must be a device of torch, got {device!r}.") from error
    return "cpu" if found.type == "cpu" else str(found)


def spread(name: str, patterns: Mapping[str, float] | None, layout: Layout) -> torch.Tensor:
    """Return the factor of each trained number [n]: that of the first pattern that its entry matches, or 1.

    `name` is what the patterns are called in errors.
    """
    import torch

    from consilience.core.params import matches

    found = torch.ones(layout.size, dtype=layout.dtype, device=layout.device)
    # Later writes win, so that the first pattern that matches counts.
    for pattern, factor in reversed(list((patterns or {}).items())):
        names = [entry for entry in layout.names if matches(entry, [pattern])]
        if not names:
            raise ConsilienceError(
                f"each pattern of `{name}` must match a trained entry, got {pattern!r}; "
                f"entries are such as {', '.join(layout.names[:4])}."
            )
        for entry in names:
            found[layout.span(entry)] = factor
    return found


# A misspelt argument gets the nearest name: `optimizer` is spelled with an s here.
Training.__init__ = suggests(Training.__init__)  # type: ignore[method-assign]
