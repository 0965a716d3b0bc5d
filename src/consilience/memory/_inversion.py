"""Samples made by gradients of a teacher with respect to its inputs: model inversion and data impression."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.augment import normal, sample_seeds, uniform
from consilience.core.checks import positive, whole_number
from consilience.core.errors import ConsilienceError, Diverged, kind_of
from consilience.core.model import MISFITS
from consilience.core.params import all_finite, computing, content_hash, keep_memory
from consilience.core.synthetic import Maker, Wanted
from consilience.core.teacher import Teacher
from consilience.memory._priors import L2, Blur, Prior, Seen, at_step

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

EVERY = 10
"""Steps from one look at the probabilities of samples to the next."""

INSTEAD = "use memory.auxiliary"
"""What makes samples where gradients cannot."""


@dataclass(frozen=True, eq=False)
class Objective:
    """What samples x [B, ...] are optimised for: B x (mean CE(target, softmax(z / temperature)) + penalties).

    z [B, k] are the teacher's answers for its classes. The factor B makes a sample's gradient independent of
    the size of its batch.
    """

    maker: str
    """Who asks, for errors."""
    teacher: Teacher
    wanted: Wanted
    priors: tuple[Prior, ...]
    temperature: float
    bf16: bool

    def check(self) -> None:
        """Refuse what cannot be made, by the teacher's name, before any work."""
        check_counts(self.teacher, self.wanted)
        for prior in self.priors:
            if prior.needs_student and self.wanted.student is None:
                raise ConsilienceError(
                    f"{type(prior).__name__} needs a student to compare the expert {self.teacher.name!r} "
                    "with, got none; leave it out."
                )
        self._check_answers(self.place().new_zeros(2, *self.shape).requires_grad_())

    def _check_answers(self, x: Tensor) -> None:
        """Refuse a teacher whose answers, on these samples, no gradient can use."""
        name, seen = repr(self.teacher.name), self.look(x)
        if seen.logits.dim() != 2:
            raise ConsilienceError(
                f"{self.maker} needs one answer per sample, got outputs {tuple(seen.logits.shape)} of the "
                f"expert {name}; {INSTEAD}."
            )
        if not all_finite(seen.logits):
            raise ConsilienceError(
                f"answers of an expert must be finite, got NaN or infinity of {name}; leave it out."
            )

        # A graph that has the parameters of the teacher may still not reach its inputs.
        with torch.enable_grad():
            total = seen.logits.sum()
        if not total.requires_grad or torch.autograd.grad(total, x, allow_unused=True)[0] is None:
            raise ConsilienceError(
                f"{self.maker} needs gradients of an expert's answers with respect to its inputs, and {name} "
                f"gives none; {INSTEAD}."
            )
        if any(prior.needs_norms for prior in self.priors) and not seen.norms:
            raise ConsilienceError(
                f"BatchNormStatistics needs batch norms with running statistics, and the expert {name} has "
                "none; leave it out."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        assert self.wanted.shape is not None
        return self.wanted.shape

    def place(self) -> Tensor:
        """Return zeros [0] of the type and on the device in which samples are optimised."""
        return torch.zeros(0, dtype=computing(self.teacher.params).dtype, device=self.wanted.device)

    def look(self, x: Tensor) -> Seen:
        """Return the teacher's answers on x [B, ...], and all that the priors need."""
        # Of the teacher alone: statistics, penalties and samples need full precision.
        half = torch.autocast(x.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()
        student = self.wanted.student if any(prior.needs_student for prior in self.priors) else None
        try:
            with torch.enable_grad(), half:
                if any(prior.needs_norms for prior in self.priors):
                    logits, norms = self.teacher.watched(x)
                else:
                    logits, norms = self.teacher(x), []
                other = None if student is None else student(x)
        except MISFITS as error:
            if isinstance(error, ConsilienceError):
                raise
            raise ConsilienceError(
                f"samples {tuple(x.shape[1:])} must fit the expert {self.teacher.name!r}, got "
                f"{(str(error) or type(error).__name__).splitlines()[0]:.200}."
            ) from error
        # Losses are computed in full precision.
        exact = x.dtype
        return Seen(logits.to(exact), norms, None if other is None else other.to(exact))

    def view(self, x: Tensor, seeds: Tensor, step: int) -> Tensor:
        """Return what the teacher sees of samples at a step."""
        now = at_step(seeds, step)
        for prior in self.priors:
            x = prior.view(x, now)
        return x

    def loss(self, x: Tensor, seen: Seen, target: Tensor) -> Tensor:
        """Return the loss of samples that the teacher saw, for classes [B] or probabilities [B, k]."""
        total = F.cross_entropy(seen.logits / self.temperature, target, reduction="sum")
        # Of the samples themselves, and not of what the teacher saw.
        for prior in self.priors:
            penalty = prior.penalty(x, seen)
            if penalty is not None:
                total = total + len(x) * penalty
        return total

    def checked(self, x: Tensor) -> Tensor:
        """Return samples in the type that is wanted; refuse others than finite ones."""
        if not all_finite(x):
            raise Diverged(
                f"samples of the expert {self.teacher.name!r} must be finite, got NaN or infinity; a smaller "
                "`lr` or weaker priors may help."
            )
        return x.to(self.wanted.dtype)


@dataclass(frozen=True)
class Gradients(Maker):
    """What all makers by gradients have in common: an `Objective`, and how long it is followed."""

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    takes_trees: ClassVar[bool] = False
    instead: ClassVar[str] = INSTEAD
    needs_gradients: ClassVar[bool] = True

    priors: Sequence[Prior] | None = None
    """What is minimised too; None: the paper's public values, L2(1e-4), and Blur(.01) for images."""
    steps: int = 500
    lr: float = 0.1
    temperature: float = 2.0
    clip: float = 3.0
    """Inputs stay in +-clip."""
    batch: int = 1024
    """Samples that are optimised at once, at most; it bounds the memory."""
    bf16: bool = False
    """Whether the teacher computes in bfloat16 (autocast); samples stay in full precision."""

    def __post_init__(self) -> None:
        whole_number(steps=self.steps, batch=self.batch)
        positive(lr=self.lr, temperature=self.temperature, clip=self.clip)
        if self.priors is None:
            return
        if not isinstance(self.priors, Sequence) or not all(isinstance(part, Prior) for part in self.priors):
            raise ConsilienceError(
                f"`priors` must be a list of those of memory.priors, got {kind_of(self.priors)}."
            )
        # Hashable, and no longer the caller's list.
        object.__setattr__(self, "priors", tuple(self.priors))

    def objective(self, teacher: Teacher, wanted: Wanted) -> Objective:
        """Return what samples of a teacher are optimised for; refuse, by its name, what cannot be made."""
        reason = self.misfit(wanted.shape, wanted.dtype)
        if reason:
            raise ConsilienceError(f"{reason}, of the expert {teacher.name!r}.")
        keep_memory()
        priors = self.acting(wanted.shape)
        made = Objective(type(self).__name__, teacher, wanted, priors, self.temperature, self.bf16)
        made.check()
        return made

    def acting(self, shape: tuple[int, ...] | None) -> tuple[Prior, ...]:
        """Return the priors for samples of a shape: the given ones, or the usual ones."""
        if self.priors is not None:
            return tuple(self.priors)
        return (L2(), Blur()) if are_images(shape) else (L2(),)

    def misfit(self, shape: tuple[int, ...] | None, dtype: torch.dtype) -> str | None:
        """Return why it cannot make samples of a shape (None: of several) and type; None where it can."""
        name = type(self).__name__
        if shape is None:
            return f"{name} needs inputs of one tensor and one shape ({INSTEAD} for others), got several"
        if not dtype.is_floating_point:
            return f"{name} needs inputs that are real numbers ({INSTEAD} for others), got {dtype}"
        images = [type(prior).__name__ for prior in self.acting(shape) if prior.needs_images]
        if images and not are_images(shape):
            return (
                f"{images[0]} needs images [C, H, W] of at least 2 x 2 pixels (leave it out for others), got "
                f"samples {shape}"
            )
        return None

    def refuse(self, facts: ScheduleFacts, size: int) -> str | None:
        # Inputs of one tensor: others were refused before.
        shapes: list[Any] = list(facts.inputs)
        types: list[Any] = list(facts.types)
        whole = [one for some in types for one in some if not one.is_floating_point]
        return self.misfit(shapes[0] if len(shapes) == 1 else None, (whole or [torch.float32])[0])


@dataclass(frozen=True)
class Pixelwise(Gradients):
    """Makers that move the samples themselves: x <- clip(x - lr Adam(d loss / dx), -clip, clip)."""

    start: Tensor | None = field(default=None, compare=False, repr=False)
    """Images [N, ...]: each sample begins as one of them, drawn at random; None: x ~ N(0, 1)."""
    content: str = field(default="", init=False)
    """The hash of the first images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is None:
            return
        if not isinstance(self.start, Tensor) or self.start.dim() < 2 or not len(self.start):
            raise ConsilienceError(
                f"`start` must be samples [N, ...], at least one, got {kind_of(self.start)}."
            )
        if not self.start.is_floating_point() or not all_finite(self.start):
            raise ConsilienceError(f"`start` must be finite real numbers, got others in {self.start.dtype}.")
        # Two makers are equal, and a run may be resumed, if their images have one hash.
        object.__setattr__(self, "content", content_hash({"start": self.start}))

    @abstractmethod
    def targets(self, goal: Objective, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Return what is asked of each sample: its class [n], or probabilities [n, k] of all.

        `classes` [n] are places in `teacher.classes`.
        """

    def is_done(self, logits: Tensor, target: Tensor) -> Tensor | None:
        """Whether each sample [B] is good enough to stay as it is; None where all take all steps."""
        return None

    def make(self, teacher: Teacher, wanted: Wanted, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        goal = self.objective(teacher, wanted)
        # All is drawn by sample, so that it does not depend on `batch`.
        classes = in_turn(teacher, wanted.counts)
        seeds = seeds_of(len(classes), generator)
        targets = self.targets(goal, classes, generator)
        made = [
            self._optimised(goal, targets[rows].to(wanted.device), seeds[rows])
            for rows in batches(len(classes), self.batch)
        ]
        return torch.cat(made), columns_of(teacher, targets, wanted.device)

    def misfit(self, shape: tuple[int, ...] | None, dtype: torch.dtype) -> str | None:
        if shape is not None and self.start is not None and tuple(self.start.shape[1:]) != shape:
            return f"`start` must have samples {shape}, got {tuple(self.start.shape[1:])}"
        return super().misfit(shape, dtype)

    def first(self, seeds: Tensor, shape: tuple[int, ...], place: Tensor) -> Tensor:
        """Return the samples [B, *shape] before the first step, with the type and device of `place`."""
        if self.start is None:
            x = normal(seeds, math.prod(shape)).view(-1, *shape)
        else:
            drawn = (uniform(seeds, 1)[:, 0].double() * len(self.start)).long()
            x = self.start[drawn.to(self.start.device)]
        return x.to(place, copy=True).clamp_(-self.clip, self.clip)

    def _optimised(self, goal: Objective, target: Tensor, seeds: Tensor) -> Tensor:
        """Return a batch of samples for these targets."""
        x = self.first(seeds, goal.shape, goal.place()).requires_grad_()
        adam = adam_of([x], self.lr)
        found, rows = x.detach().clone(), torch.arange(len(x), device=x.device)
        moving = torch.ones_like(rows, dtype=torch.bool)
        # Statistics of a batch are of all its samples, so that these stay together.
        together = any(prior.needs_norms for prior in goal.priors)

        for step in range(self.steps):
            with torch.enable_grad():
                seen = goal.look(goal.view(x, seeds, step))
                loss = goal.loss(x, seen, target)
            (x.grad,) = torch.autograd.grad(loss, x)

            done = self.is_done(seen.logits.detach(), target) if step % EVERY == 0 else None
            # As it was when the teacher saw it: the step below would move it on.
            if done is not None:
                now = moving & done
                found[rows[now]] = x.detach()[now]
                moving &= ~done
                if not bool(moving.any()):
                    return goal.checked(found)
            adam.step()
            with torch.no_grad():
                x.clamp_(-self.clip, self.clip)

            # Samples that are done leave the batch, many at a time because each time copies the others.
            if done is not None and not together and int(moving.sum()) <= 0.75 * len(x):
                x, adam = _kept(x, adam, moving)
                rows, target, seeds = rows[moving], target[moving], seeds[moving.cpu()]
                moving = moving[moving]
        found[rows[moving]] = x.detach()[moving]
        return goal.checked(found)


@dataclass(frozen=True)
class Inversion(Pixelwise):
    """Samples to which a teacher gives a class: x = argmin CE(y, softmax(f(x) / temperature)) + penalties.

    From x ~ N(0, 1), or from images, by Adam, with inputs clipped to +-clip. There are as many of each class
    as were asked for. With `until` a sample stays as it is once the probability of its class (at temperature
    1, over the teacher's classes, of what the teacher sees) is that high; this is looked at every 10 steps.
    Carta et al. 2022 (Ex-Model, 4).
    """

    until: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until is not None and not 0 < self.until < 1:
            raise ConsilienceError(f"`until` must be in (0, 1) or None, got {self.until!r}.")

    def targets(self, goal: Objective, classes: Tensor, generator: torch.Generator) -> Tensor:
        return classes

    def is_done(self, logits: Tensor, target: Tensor) -> Tensor | None:
        if self.until is None:
            return None
        return logits.softmax(1).gather(1, target[:, None])[:, 0] >= self.until


@dataclass(frozen=True)
class Impression(Pixelwise):
    """Samples for soft targets t: x = argmin KL(t || softmax(f(x) / temperature)) + penalties.

    t ~ Dir(alpha_y) with alpha_y = beta max(s(C_y), floor), and C_kj the cosine of the classifier's rows w_k
    and w_j. s scales row y to [0, 1] ("minmax"), or is (1 + C) / 2 ("shift"): with two classes the least of a
    row is the only other one, so that "minmax" leaves it the floor. The class of a sample is argmax t. With
    `balanced` t is drawn until that is y, so that each class has as many as were asked for. Otherwise, as in
    the paper, E[t] = alpha / sum alpha. Nayak et al. 2019; Carta et al. 2022 (Ex-Model, 4).
    """

    beta: float = 1.0
    scaling: Literal["minmax", "shift"] = "minmax"
    floor: float = 0.01
    balanced: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(beta=self.beta, floor=self.floor)
        if self.floor >= 1:
            raise ConsilienceError(f"`floor` must be in (0, 1), got {self.floor!r}.")
        if self.scaling not in ("minmax", "shift"):
            raise ConsilienceError(f"`scaling` must be 'minmax' or 'shift', got {self.scaling!r}.")
        if not isinstance(self.balanced, bool):
            raise ConsilienceError(f"`balanced` must be true or false, got {self.balanced!r}.")

    def alpha(self, rows: Tensor) -> Tensor:
        """Return the parameters [k, k] of a Dirichlet distribution per class, for a classifier's rows [k, d].

        >>> Impression(beta=10.0, floor=0.1).alpha(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
        [[10.0, 1.0], [1.0, 10.0]]
        """
        unit = F.normalize(rows.double(), dim=1)
        cosines = unit @ unit.T
        if self.scaling == "minmax":
            least, most = cosines.aminmax(dim=1, keepdim=True)
            # Rows that are all equal have no spread.
            scaled = (cosines - least) / (most - least).clamp_min(1e-12)
        else:
            scaled = (1 + cosines) / 2
        # Scaled first: a factor before the min-max would cancel.
        return self.beta * scaled.clamp_min(self.floor)

    def targets(self, goal: Objective, classes: Tensor, generator: torch.Generator) -> Tensor:
        teacher, place = goal.teacher, goal.place()
        if len(teacher.classes) < 2:
            raise ConsilienceError(
                f"Impression needs similarities of classes, and the expert {teacher.name!r} has one class; "
                "use memory.inversion."
            )
        alpha = self.alpha(teacher.rows(place.new_zeros(1, *goal.shape)).cpu())
        drawn = dirichlet(alpha, classes, generator)
        missed = drawn.argmax(1) != classes
        # The class itself has the largest parameter, so that few draws are needed.
        while self.balanced and bool(missed.any()):
            drawn[missed] = dirichlet(alpha, classes[missed], generator)
            missed = drawn.argmax(1) != classes
        return drawn.to(place.dtype)


# What makers share.


def dirichlet(alpha: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """Draw probabilities [n, k] from Dir(alpha_c), c the class of each [n]; in float64.

    >>> classes, generator = torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(0)
    >>> t = dirichlet(torch.tensor([[8.0, 1.0, 1.0]]), classes, generator)
    >>> bool((t.mean(0) - torch.tensor([0.8, 0.1, 0.1])).abs().max() < 0.02)
    True
    """
    # By numpy: torch's distributions draw from the global random state, and lose small parameters to 0.
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    drawn = torch.zeros(len(classes), alpha.shape[1], dtype=torch.float64)
    for own in classes.unique().tolist():
        rows = (classes == own).nonzero()[:, 0]
        drawn[rows] = torch.from_numpy(rng.dirichlet(alpha[own].double().numpy(), len(rows)))
    return drawn


def are_images(shape: tuple[int, ...] | None) -> bool:
    """Whether samples of this shape are images [C, H, W] whose pixels have neighbours."""
    return shape is not None and len(shape) == 3 and min(shape[1:]) >= 2


def check_counts(teacher: Teacher, wanted: Wanted) -> None:
    """Refuse numbers of samples that are not whole, none at all, or of classes that the teacher lacks."""
    lacking = sorted(set(wanted.counts) - set(teacher.classes))
    if lacking:
        raise ConsilienceError(
            f"samples must be of classes of the expert {teacher.name!r}, {list(teacher.classes)}, got "
            f"{lacking[0]}."
        )
    for column, count in wanted.counts.items():
        if count < 0:
            raise ConsilienceError(f"the number of samples must be >= 0, got {count} of class {column}.")
    if not wanted.total:
        raise ConsilienceError(
            f"at least one sample of the expert {teacher.name!r} must be wanted, got none."
        )


def in_turn(teacher: Teacher, counts: Mapping[int, int]) -> Tensor:
    """Return the class [n] of each sample, as its place in `teacher.classes`: classes take turns.

    So every batch has all classes, as its statistics need.
    """
    place = {column: i for i, column in enumerate(teacher.classes)}
    left = sorted((turn, place[column]) for column, count in counts.items() for turn in range(count))
    return torch.tensor([own for _, own in left])


def seeds_of(count: int, generator: torch.Generator) -> Tensor:
    """Return a seed [count] for each sample."""
    once = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    return sample_seeds(once, torch.arange(count))


def batches(count: int, size: int) -> tuple[Tensor, ...]:
    """Return the samples of each batch: at most `size`, and nearly as many in all, so that none has only one.

    >>> [len(rows) for rows in batches(9, 4)]
    [3, 3, 3]
    """
    return torch.arange(count).tensor_split(-(-count // size))


def columns_of(teacher: Teacher, targets: Tensor, device: torch.device) -> Tensor:
    """Return the receiver's column [n] of targets, which are classes [n] or probabilities [n, k]."""
    chosen = targets if targets.dim() == 1 else targets.argmax(1)
    return torch.tensor(teacher.classes)[chosen.cpu()].to(device)


def adam_of(leaves: Sequence[Tensor], lr: float) -> torch.optim.Adam:
    """Return Adam over these tensors, in one pass over memory per step where torch has it."""
    return torch.optim.Adam(leaves, lr=lr, fused=leaves[0].device.type in ("cpu", "cuda"))


def _kept(x: Tensor, adam: torch.optim.Adam, chosen: Tensor) -> tuple[Tensor, torch.optim.Adam]:
    """Return some samples of a batch, and Adam with what it holds of them."""
    kept = x.detach()[chosen].requires_grad_()
    smaller, held = adam_of([kept], adam.defaults["lr"]), adam.state[x]
    smaller.state[kept] = {
        "step": held["step"],
        **{name: held[name][chosen] for name in ("exp_avg", "exp_avg_sq")},
    }
    return kept, smaller
