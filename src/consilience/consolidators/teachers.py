"""Distilling several teachers of any architecture into one student, on inputs that need no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from consilience.consolidators._asking import WEIGHTS, Asking, is_trained
from consilience.consolidators._distil import Steps, descend, is_rounding
from consilience.core.augment import Views, as_views, isolated, sample_seeds, seed_all
from consilience.core.checks import positive, whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.message import Message
from consilience.core.model import MISFITS, Model
from consilience.core.params import Layout, Params, computing, content_hash, key
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import checked_inputs
from consilience.core.state import State
from consilience.core.synthetic import CHUNK, answers
from consilience.core.teacher import Teacher
from consilience.core.tree import Input, cast_to, named
from consilience.core.weight_space import with_weights

PROJECTOR = "<projector>."
"""Begins the names of the projectors among what is trained; a model has no such entries."""


@dataclass(frozen=True)
class TeacherDistillation(Asking):
    """theta <- steps on D(f(theta, x), t(x)) + features sum_k ||P_k psi(theta, x) - psi_k(x)||^2 / d_k.

    t_c(x) is the mean over the teachers k that know class c of their logits z_kc(x) / T_k; classes that no
    teacher knows are not trained. D is T^2 KL(softmax(t / T) || softmax(f / T)), or with `of` "logits"
    the mean square of f - t. psi are features (the inputs of a head, in eval mode) and P_k [d_k, d] linear
    projectors that are learned with the student, identities where the sizes are equal.

    Teacher and student see the same view of a sample (`augment`). The student is trained in training mode
    from the receiver's parameters, and no step is taken if it already answers as its teachers do, up to
    rounding. Hinton et al. 2015, arXiv:1503.02531; Beyer et al. 2022, arXiv:2106.05237 (same views, long
    schedules); Romero et al. 2015, arXiv:1412.6550 (projected features).
    """

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    takes_mixed: ClassVar[bool] = False
    instead: ClassVar[str] = "use average_ensemble or parameter_average"

    unlabelled: Input | None = field(default=None, compare=False, repr=False)
    steps: int = 2000
    lr: float = 0.003
    batch_size: int = 64
    temperature: float = 2.0
    of: Literal["probabilities", "logits"] = "probabilities"
    features: float = 0.0
    """The weight of the loss of features."""
    calibrate: Literal["scale"] | None = None
    """"scale": T_k are such that the centred logits of all teachers have one root mean square."""
    temperatures: Mapping[str, float] | None = field(default=None, hash=False)
    """T_k by the name of the teacher, where it is not 1."""
    augment: Any = None
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    optimiser: Literal["adam", "sgd"] = "adam"
    content: str = field(default="", init=False)
    """The hash of the inputs."""

    def __post_init__(self) -> None:
        unlabelled = checked_inputs(self.unlabelled, "unlabelled")
        whole_number(batch_size=self.batch_size)
        whole_number(0, steps=self.steps)
        positive(lr=self.lr, temperature=self.temperature, **dict(self.temperatures or {}))
        if not 0 <= self.features < float("inf"):
            raise ConsilienceError(f"`features` must be >= 0 and finite, got {self.features}.")
        for name, choices in (
            ("of", ("probabilities", "logits")),
            ("calibrate", ("scale", None)),
            ("lr_schedule", ("constant", "cosine")),
            ("optimiser", ("adam", "sgd")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConsilienceError(f"`{name}` must be {' or '.join(map(str, choices))}, got {value!r}.")
        if self.calibrate and self.temperatures:
            raise ConsilienceError("`temperatures` have no effect with `calibrate`; leave one out.")

        # The class is frozen, so that consolidators can be shared.
        object.__setattr__(self, "augment", as_views(self.augment))
        if self.augment is not None and self.augment.joint:
            raise ConsilienceError(
                "`augment` must be of inputs alone, got a joint one: there are no targets."
            )
        object.__setattr__(self, "content", content_hash(named("u", unlabelled)))

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.receives_others:
            return "it learns from models that others send, and no agent receives from another here; use lwf"
        one_by_one = facts.most_received < len(facts.senders)
        if one_by_one or facts.shared_history or not facts.star:
            return (
                "it learns from all teachers at once, and here they come one after another, or train on; use "
                "exmodel_distillation, feddf, or the setting merging"
            )
        if facts.labelled or (facts.model is not None and facts.model.uses_task):
            return (
                "the student answers over the classes of all teachers, without task labels; use mlp or conv"
            )
        unknown = sorted(set(self.temperatures or {}) - facts.senders.keys())
        if unknown:
            return f"`temperatures` name teachers that are not there ({', '.join(unknown)}); name the others"
        if facts.model is not None and facts.model.has_batch_norm and self.batch_size < 2:
            return "batch norm needs two samples per step, and `batch_size` is 1; use a larger one"
        return None if facts.model is None else self._misfit(facts)

    def _misfit(self, facts: ScheduleFacts) -> str | None:
        """Return who does not take the inputs, or has no features, or None."""
        # Experts without a model of their own have the student's.
        models = {f"the expert {name!r}": sender.model for name, sender in facts.senders.items()}
        models = {"the student": facts.model} | {name: own for name, own in models.items() if own is not None}
        assert self.unlabelled is not None
        for whose, model in models.items():
            params, buffers = model.init(torch.Generator().manual_seed(0))
            like = computing(params)
            x = cast_to(self.unlabelled[:2], like.device, like.dtype)
            try:
                with torch.no_grad():
                    model(params, buffers, x, None, False)
                    if self.features:
                        model.features(params, buffers, x, None)
            except ConsilienceError as error:
                return f"{whose} has no features to compare ({error}); use features=0"
            except MISFITS as error:
                reason = str(error).partition("\n")[0][:120]
                return f"`unlabelled` must fit {whose}, got inputs {tuple(x.shape[1:])} ({reason})"
        return None

    # Receiving.

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        sent = [message for message in with_weights(fresh) if message.trained]
        like = Layout.of({name: p for name, p in state.params.items() if is_trained(model, name, p)})
        # A broadcast holds no new models to learn from.
        if not sent or not self.steps or not like.names:
            return WEIGHTS.receive(model, state, fresh, by_size, generator)

        assert self.unlabelled is not None
        x = cast_to(self.unlabelled, like.device, like.dtype)
        teachers = [self.teacher(model, state, message, like.device) for message in sent]
        joint = Joint.of(teachers, self._scales(teachers, x))
        params, buffers = self._distilled(model, state, joint, x, generator)
        return state.change(params=params, buffers=buffers, size=int(sum(message.size for message in sent)))

    def _scales(self, teachers: Sequence[Teacher], x: Input) -> list[float]:
        """Return T_k of each teacher."""
        if self.calibrate is None:
            given = self.temperatures or {}
            return [given.get(teacher.name, 1.0) for teacher in teachers]
        found = []
        # A constant in all logits of a sample is no scale.
        for teacher in teachers:
            logits = answers(teacher, x)
            found.append(float((logits - logits.mean(1, keepdim=True)).square().mean().sqrt()))
        mean = sum(found) / len(found)
        # A teacher of one class has no scale.
        return [scale / mean if scale > 0 and mean > 0 else 1.0 for scale in found]

    def _distilled(
        self, model: Model, state: State, joint: Joint, x: Input, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Return parameters and buffers of the student after the steps."""
        # Projectors are trained with the student, and dropped after.
        projectors = self._projectors(model, state, joint, x) if self.features else {}
        fixed = None if self.augment is not None else joint.answer(x)
        target = joint.answer(x) if fixed is None else fixed
        if self._agrees(model, state, joint, x, target, projectors):
            return state.params, state.buffers

        own = {name: p for name, p in state.params.items() if is_trained(model, name, p)}
        seeds = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        held = {"buffers": state.buffers}

        def loss(params: Params, batch: Tensor, step: int) -> Tensor:
            some, aim = x[batch], fixed
            some = some if isinstance(some, Tensor) else some.trim()
            # Teachers see the view that the student sees.
            if self.augment is not None:
                views: Views = self.augment.of(batch)
                blank = torch.zeros(len(batch), dtype=torch.long, device=batch.device)
                some = views(some, blank, sample_seeds(seeds, batch, step))[0]
                aim = joint.answer(some)
            else:
                assert aim is not None
                aim = aim[batch]

            if model.draws:
                seed_all((seeds.initial_seed() + step) & ((1 << 62) - 1), batch.device)
            out, held["buffers"] = model(params, held["buffers"], some, None, True)
            value = self.divergence(out[:, joint.columns], aim)
            if self.features:
                value = value + self.features * self._feature_loss(
                    model, params, held["buffers"], joint, some
                )
            return value

        layout = Layout.of({**own, **projectors})
        steps = Steps(
            self.steps,
            self.lr,
            self.batch_size,
            self.optimiser,
            1 + model.has_batch_norm,
            self.lr_schedule,
        )
        with isolated(layout.device) if model.draws else nullcontext():
            theta = descend(loss, {**state.params, **projectors}, layout, len(x), steps, generator)
        found = layout.split(theta)
        return {**state.params, **{name: found[name] for name in own}}, held["buffers"]

    def divergence(self, out: Tensor, aim: Tensor) -> Tensor:
        """Return D of outputs [B, K] from their aims [B, K].

        >>> zero = TeacherDistillation(torch.zeros(1, 2)).divergence(torch.ones(1, 3), torch.zeros(1, 3))
        >>> float(zero)
        0.0
        """
        # The squared error also teaches the constant that a softmax does not see.
        if self.of == "logits":
            return (out - aim).square().mean()
        log = (out / self.temperature).log_softmax(1)
        wanted = (aim / self.temperature).log_softmax(1)
        return self.temperature**2 * (wanted.exp() * (wanted - log)).sum(1).mean()

    def _agrees(
        self, model: Model, state: State, joint: Joint, x: Input, target: Tensor, projectors: Params
    ) -> bool:
        """Whether the student answers as its teachers do, up to rounding."""
        pieces = []
        with torch.no_grad():
            for piece in x.split(CHUNK):
                some = piece if isinstance(piece, Tensor) else piece.trim()
                pieces.append(model(state.params, state.buffers, some, None, False)[0][:, joint.columns])
                if (
                    projectors
                    and float(
                        self._feature_loss(model, {**state.params, **projectors}, state.buffers, joint, some)
                    )
                    > torch.finfo(target.dtype).eps
                ):
                    return False
        out = torch.cat(pieces)
        if self.of == "logits":
            return is_rounding(out, target)
        # Probabilities do not change with a constant in all logits of a sample.
        return is_rounding((out / self.temperature).softmax(1), (target / self.temperature).softmax(1))

    # Features.

    def _projectors(self, model: Model, state: State, joint: Joint, x: Input) -> Params:
        """Return the first P_k [d_k, d]: identities, or uniform in +-1 / sqrt(d)."""
        some = x[:2] if isinstance(x, Tensor) else x[:2].trim()
        with torch.no_grad():
            own = model.features(state.params, state.buffers, some, None)
            sizes = [features_of(teacher, some).shape[1] for teacher in joint.teachers]
        found, width = {}, own.shape[1]
        for number, size in enumerate(sizes):
            drawn = 2 * torch.rand(size, width, generator=key("projector", number)) - 1
            weight = torch.eye(size) if size == width else drawn * width**-0.5
            found[f"{PROJECTOR}{number}"] = weight.to(own)
        return found

    def _feature_loss(self, model: Model, params: Params, buffers: Params, joint: Joint, x: Input) -> Tensor:
        """Return sum_k ||P_k psi(x) - psi_k(x)||^2 / d_k, as a mean over the samples."""
        psi, total = model.features(params, buffers, x, None), torch.zeros(())
        for number, teacher in enumerate(joint.teachers):
            with torch.no_grad():
                aim = features_of(teacher, x)
            total = total.to(psi) + (psi @ params[f"{PROJECTOR}{number}"].T - aim).square().mean()
        return total


def features_of(teacher: Teacher, x: Input) -> Tensor:
    """Return the features [B, d] of a teacher."""
    return teacher.model.features(teacher.params, teacher.buffers, x, teacher.task)


@dataclass(frozen=True, eq=False)
class Joint:
    """Several teachers over the classes of all of them."""

    teachers: tuple[Teacher, ...]
    scales: tuple[float, ...]
    columns: Tensor
    """The receiver's column [K] of each class that some teacher knows."""
    places: tuple[Tensor, ...]
    """For each teacher, the place in `columns` of each of its classes."""
    times: Tensor
    """How many teachers know each class [K]."""

    @staticmethod
    def of(teachers: Sequence[Teacher], scales: Sequence[float]) -> Joint:
        """Return the joint teacher; T_k divide the logits of each."""
        # In the order of the receiver's columns, so that the order of teachers does not matter.
        known = sorted({column for teacher in teachers for column in teacher.classes})
        device = next(iter(teachers[0].params.values())).device if teachers[0].params else None
        place = {column: number for number, column in enumerate(known)}
        places = tuple(
            torch.tensor([place[column] for column in teacher.classes], device=device) for teacher in teachers
        )
        times = torch.zeros(len(known), device=device)
        for own in places:
            times = times.index_add(0, own, torch.ones(len(own), device=device))
        columns = torch.tensor(known, device=device)
        return Joint(tuple(teachers), tuple(scales), columns, places, times)

    def answer(self, x: Input) -> Tensor:
        """Return t(x) [B, K] without gradients. Refuses NaN and infinity by the teacher's name."""
        total: Tensor | None = None
        for teacher, scale, own in zip(self.teachers, self.scales, self.places, strict=True):
            logits = answers(teacher, x)
            logits = logits if scale == 1 else logits / scale
            if total is None:
                total = logits.new_zeros(len(logits), len(self.columns))
            total = total.index_add(1, own, logits.to(total.dtype))
        assert total is not None
        return total / self.times.to(total.dtype)
