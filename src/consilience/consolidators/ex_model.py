"""Ex-model distillation: one model learns from a stream of experts, without their data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.consolidators._asking import WEIGHTS, Asking, is_trained
from consilience.consolidators._distil import Steps, descend, is_rounding
from consilience.consolidators.teachers import PROJECTOR
from consilience.core.augment import Views, as_views, isolated, sample_seeds, seed_all
from consilience.core.buffer import equal_shares, ranks
from consilience.core.checks import positive, whole_number
from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.message import Message
from consilience.core.model import Model
from consilience.core.params import Layout, Params, all_finite
from consilience.core.schedule import ScheduleFacts, SenderFacts
from consilience.core.source import Source, Tensors
from consilience.core.state import State
from consilience.core.synthetic import CHUNK, Maker, Wanted, answers
from consilience.core.teacher import Teacher
from consilience.core.tree import Input, cast_to, concat, named, tensors_of, unnamed
from consilience.core.weight_space import with_weights


class Samples(NamedTuple):
    """Samples of the memory."""

    x: Input
    y: Tensor
    """The class that each stands for [N]."""
    expert: Tensor
    """The number of the expert that each was made from [N], from 0."""
    task: Tensor
    """The number of the task of each [N]; 0 where tasks are not labelled."""

    def select(self, index: Tensor) -> Samples:
        """Return the samples at these indices."""
        return Samples(self.x[index], self.y[index], self.expert[index], self.task[index])


class Asked(NamedTuple):
    """A model that is asked: an expert, or the ex-model before it."""

    answer: Callable[[Input, Tensor], Tensor]
    """(inputs, tasks [n]) -> logits [n, C]; what it does not know may be any finite number."""
    knows: Tensor
    """The classes that it knows in each task [T, C]."""
    latents: Callable[[Input], Tensor] | None = None
    """inputs -> the inputs of its head [n, d]."""
    scale: Scale | None = None
    """What its logits are calibrated by; None: by nothing."""
    calibrated: bool = False
    """Whether it learned calibrated logits, which are then taken as they are."""


class Scale(NamedTuple):
    """What logits [n, C] are calibrated by: (z - mean) / deviation."""

    mean: Tensor
    """Of each unit over samples [C]."""
    deviation: Tensor
    """Their standard deviation [C]; 1 where it is 0."""


class Arrived(NamedTuple):
    """The experts that came so far, in their order, with those of an exchange."""

    names: list[str]
    others: list[str]
    """Those that are not in this exchange."""
    renewed: Tensor
    """The numbers of those in this exchange that came before, with an older version."""

    @staticmethod
    def of(outer: Mapping[str, Tensor], senders: Sequence[str], names: Sequence[str]) -> Arrived:
        """Return the experts of a state, which has their places among the senders, and new ones by name."""
        before = [senders[place] for place in outer["arrived"].tolist()] if "arrived" in outer else []
        others = [name for name in before if name not in names]
        renewed = torch.tensor([before.index(name) for name in names if name in before], dtype=torch.long)
        return Arrived([*before, *(name for name in names if name not in before)], others, renewed)


class Latents(NamedTuple):
    """What a teacher says of the latents of samples."""

    target: Tensor
    """Its latents [N, d]; 0 for samples that it does not teach."""
    taught: Tensor
    """Which samples it teaches: bool [N]."""


@dataclass(frozen=True)
class ExModelDistillation(Asking):
    """Ex-model distillation: an expert's logits and the former ex-model's are learned on synthetic samples.

    `maker` makes floor(N / i) samples (x, y) for expert i, as many of each of its classes. Of the memory
    N - floor(N / i) samples stay, as many of each class. Then the ex-model f takes steps in training mode on

        weight_logits ||f(x) - t||^2 + weight_ce CE(f(x), y)
        + weight_latents sum over teachers k of mean over units of (P_k psi(x) - psi_k(x))^2

    over batches of the memory; the norm is a sum over the units of t, the CE over the classes seen so far.
    psi are the inputs of heads, in eval mode; the matrices P_k [d_k, d] start as the identity, are trained
    with f, and dropped after the exchange; without `project` they stay the identity.
    Logits of teachers are normalised over the classes that each knows: "mean" subtracts their mean, which
    removes an offset; "standard" also divides by their standard deviation, which removes the scale. With
    "samples" each logit of an expert, after the mean, is standardised over the samples of the memory, (z -
    mean over samples) / standard deviation, so that experts of other confidence compare; the former ex-model
    learned such logits, which are taken as they are.

    With `targets` "document" (Eq. 9) t has the units of the teacher that knows y: the former ex-model f', or
    the expert; where both know y, those of both, and the mean of the two where they overlap. With "both" t
    has the units of both teachers for all samples, as in the public code of the paper. Latents are taught by
    the same teachers: those that know y, or all.

    With task labels "document" trains only the columns of a sample's task; with "both" every sample is asked
    under all tasks seen so far, so that the former ex-model teaches its heads on new samples too. Experts
    received at once are all taught together, and share the new samples. They may be of any architecture. A
    newer version of one takes the place of the older one: its samples go, and of its classes the former
    ex-model teaches only what others know. An ex-model that answers as its teachers do takes no steps if
    weight_ce is 0. The memory is a part of `State.outer`, and is never sent.
    Carta et al. 2022, arXiv:2112.06511, Algorithm 1, whose line 10 has f(x) in the place of its y^k; latents:
    Carta et al. 2023, arXiv:2303.15888.
    """

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    takes_mixed: ClassVar[bool] = False
    instead: ClassVar[str] = "use average_ensemble or parameter_average"

    maker: Maker | None = None
    size: int = 5000
    """N, the number of samples in the memory."""
    steps: int = 1000
    """The number of steps per exchange."""
    lr: float = 0.001
    batch_size: int = 64
    optimiser: Literal["adam", "sgd"] = "adam"
    weight_ce: float = 1.0
    """lambda_CE, the weight of the cross-entropy."""
    weight_logits: float = 1.0
    weight_latents: float = 0.0
    """The weight of the squared distance of projected latents to those of each teacher."""
    project: bool = True
    """Whether latents pass a linear map for each teacher; without, all widths must be equal."""
    normalise: Literal["mean", "standard", "samples"] | None = "mean"
    targets: Literal["document", "both"] = "document"
    augment: Any = None
    """Random views of samples in training, for the ex-model and its teachers, as `augment` of a source."""

    def __post_init__(self) -> None:
        if not isinstance(self.maker, Maker):
            raise ConsilienceError(
                f"`maker` must make samples, such as memory.auxiliary(data), got {kind_of(self.maker)}."
            )
        whole_number(size=self.size, batch_size=self.batch_size)
        whole_number(0, steps=self.steps)
        positive(lr=self.lr)
        weights = ("weight_ce", "weight_logits", "weight_latents")
        for name in weights:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConsilienceError(f"`{name}` must be >= 0 and finite, got {getattr(self, name)}.")
        if not any(getattr(self, name) for name in weights):
            raise ConsilienceError(f"one of {', '.join(weights)} must be positive, got 0 for all.")
        if not self.project and not self.weight_latents:
            raise ConsilienceError(
                "`project` is about latents, and must be True where `weight_latents` is 0, got False; give a "
                "weight."
            )
        for name, choices in (
            ("optimiser", ("adam", "sgd")),
            ("normalise", ("mean", "standard", "samples", None)),
            ("targets", ("document", "both")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConsilienceError(f"`{name}` must be {' or '.join(map(str, choices))}, got {value!r}.")

        # The class is frozen, so that consolidators can be shared.
        object.__setattr__(self, "augment", as_views(self.augment))
        if self.augment is not None and self.augment.joint:
            raise ConsilienceError(
                f"`augment` must be of inputs alone, got a joint one, {self.augment!r}: the samples of the "
                "memory stay what they stand for."
            )

    # What it may know before a run.

    def refuse(self, facts: ScheduleFacts) -> str | None:
        assert self.maker is not None
        if not facts.receives_others:
            return (
                "it learns from experts that others send, and no agent receives from another here; use lwf, "
                "or an exmodel or merging setting"
            )
        # Else nothing says which classes a received model knows.
        if facts.shared_history or not facts.star:
            return (
                "it learns from experts that each know their own sources alone, and here agents train on "
                "after they received, or relay; use feddf, or an exmodel or merging setting"
            )
        grows = facts.model is not None and type(facts.model).grow is not Model.grow
        if (facts.labelled or grows) and any(sender.task is None for sender in facts.senders.values()):
            return (
                "with task labels, or heads of tasks, each expert must have one task, and here some have "
                "several; use feddf, or a model with one head"
            )
        if len(facts.senders) > self.size:
            return (
                f"each expert needs a sample of the memory, and {len(facts.senders)} experts come to a "
                f"`size` of {self.size}; use a larger one"
            )
        return (
            _unfit_student(facts.model, self.batch_size)
            or self._unfit_latents(facts)
            or self.maker.unfit(facts)
            or self.maker.refuse(facts, self.size)
        )

    def _unfit_latents(self, facts: ScheduleFacts) -> str | None:
        """Return why latents cannot be taught in such a schedule, and what to do; None if they can."""
        model: Model | None = facts.model
        if not self.weight_latents or model is None:
            return None
        own = {name: sender.model for name, sender in facts.senders.items() if sender.model is not None}
        for name, one in {"": model, **own}.items():
            whose = f"the model of {name!r}" if name else "the model"
            if not one.passes_features:
                return f"{whose} has no head whose inputs are latents to teach; use exmodel_distillation"
            if not self.project and _width(one) != _width(model):
                return (
                    f"latents are compared as they are, and those of {whose} have another width; use a "
                    "projector (`project`)"
                )

        # Latents that no trained entry moves would be taught in vain.
        params = model.init(torch.Generator().manual_seed(0))[0]
        # Heads of tasks come with the tasks.
        head = {name for name in params if model.task_of(name) is not None}
        if type(model).grow is Model.grow:
            head |= {name for name in model.head(params, None) if name is not None}
        if not any(is_trained(model, name, entry) for name, entry in params.items() if name not in head):
            return (
                "all before the head is frozen, or empty, and latents cannot move; use exmodel_distillation"
            )
        return None

    # Tasks and classes.

    @property
    def _tasks(self) -> tuple[str | None, ...]:
        """The tasks that samples may have; (None,) where they are not labelled."""
        if self.facts is None or not self.facts.labelled:
            return (None,)
        return tuple(dict.fromkeys(sender.task for sender in self.facts.senders.values()))

    def _task(self, sender: SenderFacts) -> int:
        """Return the number of a sender's task."""
        tasks = self._tasks
        return tasks.index(sender.task) if tasks != (None,) else 0

    @property
    def _senders(self) -> Mapping[str, SenderFacts]:
        """What the schedule says of all who send."""
        return {} if self.facts is None else self.facts.senders

    def _knows(self, names: Iterable[str], outputs: int, device: torch.device) -> Tensor:
        """Return which classes some experts know together in each task: bool [T, C]."""
        known = torch.zeros(len(self._tasks), outputs, dtype=torch.bool, device=device)
        for name in names:
            sender = self.sender(name)
            known[self._task(sender), list(sender.classes)] = True
        return known

    # Receiving.

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        experts = [m for m in with_weights(fresh) if m.trained]
        # A broadcast holds no new expert.
        if not experts:
            return WEIGHTS.receive(model, state, fresh, by_size, generator)

        like = Layout.of({n: p for n, p in state.params.items() if is_trained(model, n, p)})
        arrived = Arrived.of(state.outer, list(self._senders), [message.sender for message in experts])
        before, known = _memory(state.outer), self._knows(arrived.names, model.outputs, like.device)
        former = None
        if before is not None:
            # A newer version of an expert takes the place of all that the older one left.
            before = before.select(
                (~torch.isin(before.expert, arrived.renewed.to(like.device))).nonzero()[:, 0]
            )
            answer = self._student(model, state.params, state.buffers)
            latents = _latents_by(self._former(model, state))
            former = Asked(
                answer,
                self._knows(arrived.others, model.outputs, like.device),
                latents,
                calibrated=self.normalise == "samples",
            )

        # One expert after another, so that no two of them are in memory.
        share, pieces = self.size // len(arrived.names), list[Samples]()
        for message in experts:
            sender, number = self.sender(message.sender), arrived.names.index(message.sender)
            if not share:
                raise ConsilienceError(
                    f"each expert needs a sample of the memory, got a `size` of {self.size} for expert "
                    f"{number + 1}; use a larger one."
                )
            # A head for the expert's task comes first, if samples show what goes into it.
            wanted = self._wanted(sender, share, like)
            if wanted.shape is not None:
                blank = torch.zeros(1, *wanted.shape, dtype=wanted.dtype, device=wanted.device)
                state = self._grown(model, state, sender, blank, generator)
                wanted = replace(wanted, student=_pupil(model, state, sender))
            teacher = self.teacher(model, state, message, like.device)
            pieces.append(self._made(teacher, wanted, number, like, generator))
            state = self._grown(model, state, sender, pieces[-1].x, generator)
            del teacher

        # What is left of the memory has room for the others.
        if before is not None and len(before.y):
            kept = self._kept(before, self.size - share * len(experts), model.outputs, generator)
            pieces.insert(0, before.select(kept))
        memory = _joined(pieces)
        outer = {
            **named("x", memory.x),
            **{name: getattr(memory, name) for name in ("y", "expert", "task")},
            "seen": known,
            "arrived": torch.tensor([list(self._senders).index(name) for name in arrived.names]),
        }

        def asked() -> Iterator[Asked]:
            # Where all were renewed, it has nothing to teach.
            if former is not None and bool(former.knows.any()):
                yield former
            for message in experts:
                yield self._asked(model, state, message, known, memory)

        params, buffers = self._distilled(model, state, memory, known, asked, generator)
        size = int(sum(m.size for m in experts))
        return state.change(params=params, buffers=buffers, outer=outer, size=size)

    def _former(
        self, model: Model, state: State, classes: tuple[int, ...] = (), task: str | None = None
    ) -> Teacher:
        """Return the ex-model before this expert as a teacher."""
        return Teacher("ex-model", model, state.params, state.buffers, classes, classes, task)

    def _asked(self, model: Model, state: State, message: Message, like: Tensor, memory: Samples) -> Asked:
        """Return an expert as one who is asked over the columns of the frame; `like` is [T, C]."""
        sender, teacher = self.sender(message.sender), self.teacher(model, state, message, like.device)
        knows = self._knows([message.sender], like.shape[1], like.device)

        def answer(x: Input, task: Tensor) -> Tensor:
            found = answers(teacher, x)
            return found.new_zeros(len(found), like.shape[1]).index_copy_(
                1, torch.tensor(sender.classes, device=found.device), found
            )

        asked = Asked(answer, knows, _latents_by(teacher))
        if self.normalise != "samples":
            return asked
        units = knows[self._task(sender)].expand(len(memory.y), -1)
        logits = self.normalised(answer(memory.x, memory.task), units)
        deviation = logits.std(0, unbiased=False)
        # A unit that is always equal has no scale, and its distance to the mean is 0.
        scale = Scale(logits.mean(0), torch.where(deviation > 0, deviation, 1))
        return asked._replace(scale=scale)

    # The memory.

    def _wanted(self, sender: SenderFacts, count: int, like: Layout) -> Wanted:
        """Return what a maker is asked for: so many samples, as many of each class of an expert."""
        assert self.facts is not None
        classes = sender.classes
        counts = {c: count // len(classes) + (i < count % len(classes)) for i, c in enumerate(classes)}
        return Wanted(
            counts={c: n for c, n in counts.items() if n},
            shape=_shape(self.facts),
            dtype=_dtype(self.facts, like.dtype),
            device=like.device,
        )

    def _made(
        self, teacher: Teacher, wanted: Wanted, number: int, like: Layout, generator: torch.Generator
    ) -> Samples:
        """Return new samples of an expert."""
        assert self.maker is not None
        x, y = self.maker.make(teacher, wanted, generator)
        x, y = cast_to(x, like.device, like.dtype), y.to(like.device)
        count, there = wanted.total, torch.isin(y, torch.tensor(teacher.classes, device=y.device))
        finite = all(all_finite(part) for part in tensors_of(x).values())
        if not (len(x) == len(y) == count and bool(there.all()) and finite):
            raise ConsilienceError(
                f"{type(self.maker).__name__} must make {count} finite samples of the classes of "
                f"{teacher.name!r}, got {len(x)} with {len(y)} classes, or others."
            )
        task = self._task(self.sender(teacher.name))
        return Samples(x, y, torch.full_like(y, number), torch.full_like(y, task))

    def _kept(self, memory: Samples, size: int, width: int, generator: torch.Generator) -> Tensor:
        """Return which samples stay: as many of each class of each task, and within it of each expert."""
        keys = torch.rand(len(memory.y), generator=generator, dtype=torch.float64)
        group = (memory.task * width + memory.y).cpu()
        # The first of each expert come before the second of any.
        turn = ranks(keys, memory.expert.cpu() * width * len(self._tasks) + group)
        kept = equal_shares(turn + keys, group, size)
        return kept.nonzero()[:, 0].to(memory.y.device)

    def _grown(
        self, model: Model, state: State, sender: SenderFacts, x: Input, generator: torch.Generator
    ) -> State:
        """Return the state with the entries that an expert's task needs, such as a head."""
        if sender.task is None or type(model).grow is Model.grow:
            return state
        # Sources are how models know a task; this one has synthetic samples alone.
        examples = Tensors(x[:1], torch.zeros(1, dtype=torch.long, device=x.device))
        labels = tuple(("", str(column)) for column in range(model.outputs))
        blank = Source(sender.task, examples, examples, examples, labels, sender.columns, task=sender.task)
        params, buffers = model.grow(dict(state.params), dict(state.buffers), blank, generator)
        return state.change(params=params, buffers=buffers)

    # Distillation.

    def _distilled(
        self,
        model: Model,
        state: State,
        memory: Samples,
        known: Tensor,
        asked: Callable[[], Iterable[Asked]],
        generator: torch.Generator,
    ) -> tuple[Params, Params]:
        """Return parameters and buffers after the steps; `known` [T, C] are the classes seen by now."""
        trained = {n: p for n, p in state.params.items() if is_trained(model, n, p)}
        if not self.steps or not trained:
            return state.params, state.buffers

        # Targets of samples that stay as they are, are computed once.
        under = self._under(known)
        target, units = self._aims(asked, memory, under)
        latents = self.latents_of(asked(), memory) if self.weight_latents else []
        projectors = self._projectors(model, state, memory, latents)
        if self._is_taught(model, state, memory, under, (target, units), latents):
            return state.params, state.buffers

        teachers = list(asked()) if self.augment is not None else []
        seeds = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        held = {"buffers": state.buffers}

        def loss(given: Params, batch: Tensor, step: int) -> Tensor:
            # The model knows no projectors.
            params = {name: p for name, p in given.items() if name not in projectors}
            some = memory.select(batch)
            if not isinstance(some.x, Tensor):
                some = some._replace(x=some.x.trim())
            aim, there = target[batch], units[batch]
            hidden = [Latents(one.target[batch], one.taught[batch]) for one in latents]
            if self.augment is not None:
                views: Views = self.augment.of(batch)
                some = some._replace(
                    x=views(some.x, some.y, sample_seeds(seeds, batch, torch.tensor(step)))[0]
                )
                aim, there = self._aims(lambda: teachers, some, under)
                hidden = self.latents_of(teachers, some) if self.weight_latents else []

            if model.draws:
                seed_all((seeds.initial_seed() + step) & ((1 << 62) - 1), batch.device)
            buffers = held["buffers"]
            out, held["buffers"] = self._outputs(model, params, buffers, some.x, some.task, True, under)
            value = self.weight_logits * torch.where(there, out - aim, 0).square().sum(1).mean()
            if self.weight_ce:
                out = _own(out, some.task, under, model.outputs).masked_fill(~known[some.task], -torch.inf)
                value = value + self.weight_ce * F.cross_entropy(out, some.y)
            if hidden:
                maps = [given.get(f"{PROJECTOR}{k}") for k in range(len(hidden))]
                psi = model.features(params, buffers, some.x)
                value = value + self.weight_latents * distance_of(psi, hidden, maps)
            return value

        layout = Layout.of({**trained, **projectors})
        steps = Steps(self.steps, self.lr, self.batch_size, self.optimiser, 1 + model.has_batch_norm)
        with isolated(layout.device) if model.draws else nullcontext():
            start = {**state.params, **projectors}
            theta = descend(loss, start, layout, len(memory.y), steps, generator)
        found = {name: p for name, p in layout.split(theta).items() if name not in projectors}
        return {**state.params, **found}, held["buffers"]

    def _is_taught(
        self,
        model: Model,
        state: State,
        memory: Samples,
        under: Tensor | None,
        aims: tuple[Tensor, Tensor],
        latents: Sequence[Latents],
    ) -> bool:
        """Whether the ex-model answers as its teachers do, but for rounding, so that it takes no steps."""
        # Labels may ask for more than the teachers' answers.
        if self.weight_ce:
            return False
        if self.weight_logits:
            target, units = aims
            now = self._student(model, state.params, state.buffers, under)(memory.x, memory.task)
            if not is_rounding(now[units], target[units]):
                return False
        if not latents:
            return True
        # Projectors start as the identity.
        psi = answers(self._former(model, state), memory.x, Teacher.features)
        return all(
            psi.shape == one.target.shape and is_rounding(psi[one.taught], one.target[one.taught])
            for one in latents
        )

    def _projectors(
        self, model: Model, state: State, memory: Samples, latents: Sequence[Latents]
    ) -> dict[str, Tensor]:
        """Return the linear maps [d_k, d] of the latents for each teacher, at their start."""
        if not latents or not self.project:
            return {}
        width = answers(self._former(model, state), memory.x[:1], Teacher.features).shape[1]
        # No random numbers, and no loss where the latents agree already.
        return {
            f"{PROJECTOR}{k}": torch.eye(
                one.target.shape[1], width, dtype=one.target.dtype, device=one.target.device
            )
            for k, one in enumerate(latents)
        }

    def _under(self, known: Tensor) -> Tensor | None:
        """Return the numbers of the tasks that all samples are asked under; None: each under its own."""
        # Under the task of a new sample the former ex-model has nothing to teach, unlike under its own.
        if self.targets != "both" or self._tasks == (None,):
            return None
        return known.any(1).nonzero()[:, 0]

    def _aims(
        self, asked: Callable[[], Iterable[Asked]], samples: Samples, under: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what `targets_of` does, the columns of each task behind those of the one before it."""
        if under is None:
            return self.targets_of(asked(), samples)
        found = [
            self.targets_of(asked(), samples._replace(task=torch.full_like(samples.task, number)))
            for number in under.tolist()
        ]
        return torch.cat([target for target, _ in found], 1), torch.cat([units for _, units in found], 1)

    def latents_of(self, asked: Iterable[Asked], samples: Samples) -> list[Latents]:
        """Return the latents of each teacher for the samples that it teaches: of classes it knows, or all."""
        found = []
        for one in asked:
            assert one.latents is not None
            taught = one.knows[samples.task].gather(1, samples.y[:, None])[:, 0]
            # Latents belong to no class, so that any sample may teach them.
            taught = taught | (self.targets == "both")
            index = taught.nonzero()[:, 0]
            # A teacher of none, as of an augmented batch, still says its width.
            psi = one.latents(samples.x[index] if len(index) else samples.x[:1])
            target = psi.new_zeros(len(taught), psi.shape[1])
            found.append(Latents(target.index_copy(0, index, psi) if len(index) else target, taught))
        return found

    def targets_of(self, asked: Iterable[Asked], samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the target [N, C] of each sample, and which units it has: bool [N, C]."""
        total: Tensor | None = None
        times: Tensor | None = None
        for one in asked:
            units = one.knows[samples.task]
            taught = units.gather(1, samples.y[:, None])[:, 0] if self.targets == "document" else units.any(1)
            index = taught.nonzero()[:, 0]
            if total is None or times is None:
                total = times = torch.zeros(units.shape, device=units.device)
            if not len(index):
                continue
            units = units[index]
            logits = self._compared(one, one.answer(samples.x[index], samples.task[index]), units)
            total = total.to(logits.dtype).index_add(0, index, logits)
            times = times.to(logits.dtype).index_add(0, index, units.to(logits.dtype))
        assert total is not None and times is not None
        return total / times.clamp_min(1), times > 0

    def _compared(self, one: Asked, logits: Tensor, units: Tensor) -> Tensor:
        """Return logits [n, C] as those of several teachers compare, on some units [n, C]; 0 elsewhere."""
        if one.calibrated:
            return torch.where(units, logits, 0)
        logits = self.normalised(logits, units)
        if one.scale is None:
            return logits
        return torch.where(units, (logits - one.scale.mean) / one.scale.deviation, 0)

    def normalised(self, logits: Tensor, units: Tensor) -> Tensor:
        """Return logits [n, C] normalised over some units [n, C] of each sample; 0 elsewhere.

        >>> from consilience.core.synthetic import Maker
        >>> class Own(Maker):
        ...     def make(self, teacher, wanted, generator): ...
        >>> units = torch.tensor([[True, True, False]])
        >>> ExModelDistillation(Own()).normalised(torch.tensor([[1.0, 3.0, 9.0]]), units).tolist()
        [[-1.0, 1.0, 0.0]]
        """
        logits = torch.where(units, logits, 0)
        if self.normalise is None:
            return logits
        count = units.sum(1, keepdim=True).clamp_min(1)
        logits = torch.where(units, logits - logits.sum(1, keepdim=True) / count, 0)
        if self.normalise == "standard":
            spread = (logits.square().sum(1, keepdim=True) / count).sqrt()
            # Equal logits have no scale and stay 0.
            logits = logits / torch.where(spread > 0, spread, 1)
        return logits

    def _outputs(
        self,
        model: Model,
        params: Params,
        buffers: Params,
        x: Input,
        task: Tensor,
        train: bool,
        under: Tensor | None = None,
    ) -> tuple[Tensor, Params]:
        """Return the outputs [n, C] of the ex-model, each sample's for its task, and the new buffers.

        With `under` they are [n, R C], for all samples those for R tasks.
        """
        if self._tasks == (None,):
            return model(params, buffers, x, None, train)
        # What tasks share is computed once for all of them.
        if under is not None:
            names = [self._tasks[number] for number in under.tolist()]
            outs, buffers = model.each(params, buffers, x, names, train)
            return torch.cat(outs, 1), buffers
        # All samples go through what tasks share at once, as batch norm needs.
        present, place = task.unique(return_inverse=True)
        names = [self._tasks[number] for number in present.tolist()]
        outs, buffers = model.each(params, buffers, x, names, train)
        return torch.stack(outs)[place, torch.arange(len(place), device=place.device)], buffers

    def _student(
        self, model: Model, params: Params, buffers: Params, under: Tensor | None = None
    ) -> Callable[[Input, Tensor], Tensor]:
        """Return (inputs, tasks) -> what `_outputs` does of an ex-model in eval mode, without gradients."""

        def answer(x: Input, task: Tensor) -> Tensor:
            found = []
            with torch.no_grad():
                for piece, own in zip(x.split(CHUNK), task.split(CHUNK), strict=True):
                    some = piece if isinstance(piece, Tensor) else piece.trim()
                    found.append(self._outputs(model, params, buffers, some, own, False, under)[0])
            return torch.cat(found)

        return answer


def _unfit_student(model: Model | None, batch_size: int) -> str | None:
    """Return why a model cannot be taught, and what to do; None if it can."""
    if model is None:
        return None
    if model.has_batch_norm and batch_size < 2:
        return "batch norm needs two samples per step, and `batch_size` is 1; use a larger one"
    # A model that grows gets its heads with the experts.
    params, _ = model.init(torch.Generator().manual_seed(0))
    if type(model).grow is Model.grow and not any(is_trained(model, n, p) for n, p in params.items()):
        return "all entries of the model are frozen, so that it cannot be taught; leave a head trainable"
    return None


def _pupil(model: Model, state: State, sender: SenderFacts) -> Teacher:
    """Return the ex-model as a maker may ask it about an expert's classes."""
    return Teacher(
        name="ex-model",
        model=model,
        params=state.params,
        buffers=state.buffers,
        classes=sender.classes,
        outputs=sender.classes,
        task=sender.task,
    )


def distance_of(psi: Tensor, latents: Sequence[Latents], maps: Sequence[Tensor | None]) -> Tensor:
    """Return sum_k of the mean over samples and units of (P_k psi - psi_k)^2, of latents psi [B, d].

    Samples that a teacher does not teach count as 0; a map of None is the identity.

    >>> own = Latents(torch.tensor([[1.0, 5.0], [9.0, 9.0]]), torch.tensor([True, False]))
    >>> float(distance_of(torch.ones(2, 2), [own], [torch.eye(2)]))  # (5 - 1)^2 / 2 units / 2 samples
    4.0
    """
    total = psi.new_zeros(())
    for one, own in zip(latents, maps, strict=True):
        apart = (psi if own is None else F.linear(psi, own)) - one.target
        total = total + torch.where(one.taught[:, None], apart, 0).square().mean()
    return total


def _latents_by(teacher: Teacher) -> Callable[[Input], Tensor]:
    """Return inputs -> the latents [n, d] of a teacher, without gradients."""
    return lambda x: answers(teacher, x, Teacher.features)


def _own(out: Tensor, task: Tensor, under: Tensor | None, width: int) -> Tensor:
    """Return of outputs [n, R C] under several tasks those [n, C] under each sample's own."""
    if under is None:
        return out
    # The numbers of tasks are sorted, and each sample's own is among them.
    place = torch.searchsorted(under, task)
    return out.view(len(out), -1, width)[torch.arange(len(out), device=out.device), place]


def _width(model: Model) -> int | None:
    """Return how many latents a model has; None where it does not say."""
    # A model with heads has the features of its trunk.
    return getattr(getattr(model, "trunk", model), "width", None)


def _memory(outer: Mapping[str, Tensor]) -> Samples | None:
    """Return the memory that a state has, or None."""
    if "y" not in outer:
        return None
    return Samples(unnamed("x", outer), outer["y"], outer["expert"], outer["task"])


def _joined(pieces: Sequence[Samples]) -> Samples:
    """Return all samples of several pieces, one piece after another."""
    rest = (torch.cat(tensors) for tensors in zip(*(piece[1:] for piece in pieces), strict=True))
    return Samples(concat([piece.x for piece in pieces]), *rest)


def _shape(facts: ScheduleFacts) -> tuple[int, ...] | None:
    """Return the shape of a sample; None for several parts, and where sources differ."""
    shapes = list(facts.inputs)
    if facts.trees or len(shapes) != 1:
        return None
    return shapes[0]  # type: ignore[return-value]


def _dtype(facts: ScheduleFacts, fractions: torch.dtype) -> torch.dtype:
    """Return the type of samples: `fractions` where they are fractions."""
    every: list[torch.dtype] = [one for some in facts.types for one in some]  # type: ignore[attr-defined]
    whole = [one for one in every if not one.is_floating_point]
    return whole[0] if whole and not facts.trees else fractions
