"""A bench: a model, experts from one base, and the data that mixtures of them are judged on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator
from consilience.core.errors import ConsilienceError, Refusal, kind_of
from consilience.core.model import Model, in_columns, stay
from consilience.core.params import Layout, Params, finite
from consilience.core.schedule import labels_of, reframe
from consilience.core.source import Examples, LabelFrame, Source
from consilience.core.tree import Input, cast_to, signature
from consilience.merging._diagnose import named
from consilience.merging._files import loaded, opened
from consilience.merging._stream import merge
from consilience.models import wrap

CHUNK = 1024
"""Examples that go through the model at once."""
Part = Literal["validation", "test"]


# Answers.


@dataclass(frozen=True, eq=False)
class Answers:
    """Probabilities p [N, C] of a model on a source, over `width` columns to choose from, and targets y [N].

    A row that is not finite is wrong, agrees with no other, and has the highest entropy.
    """

    p: Tensor
    y: Tensor
    width: int

    @cached_property
    def finite(self) -> Tensor:
        """Whether all probabilities of an example are finite [N]."""
        return self.p.isfinite().all(1)

    @property
    def correct(self) -> Tensor:
        """Whether the most likely class is the right one [N]."""
        return ((self.p.argmax(1) == self.y) & self.finite).double()

    def chance(self, y: Tensor) -> Tensor:
        """Return the probabilities of classes y [N], 0 where they are not finite."""
        return self.p.gather(1, y[:, None])[:, 0].double().where(self.finite, 0.0)

    @property
    def entropy(self) -> Tensor:
        """-sum p log p over the log of the number of classes to choose from [N]."""
        p = self.p.double()
        # The clamp makes 0 log 0 zero; with one class the entropy is 0 over log 2.
        entropy = -(p * p.clamp_min(1e-300).log()).sum(1) / math.log(max(self.width, 2))
        return entropy.where(self.finite, 1.0)

    def agreement(self, other: Answers) -> Tensor:
        """Return whether the most likely class is that of other answers [N]."""
        return ((self.p.argmax(1) == other.p.argmax(1)) & self.finite & other.finite).double()


def mean(answers: Sequence[Answers]) -> Answers:
    """Return the answers of the ensemble: the mean of the probabilities."""
    p = torch.stack([answer.p for answer in answers]).mean(0)
    return Answers(p, answers[0].y, max(answer.width for answer in answers))


# Checkpoints.


@dataclass(frozen=True)
class Checkpoints:
    """The base and the experts of a bench, in one floating-point type, with each tied weight once."""

    base: Params
    experts: Mapping[str, Params]
    mixed: Layout
    """The entries that are mixed: floating-point parameters that are not frozen and have no task."""
    buffers: frozenset[str]
    """Names of the model's buffers."""
    twins: Mapping[str, str]
    """Other names of tied weights, and the name that the model has for each."""
    dtypes: Mapping[str, torch.dtype]
    """The types of the entries as they were read."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic: float32, or float64 where the base has it."""
        return self.mixed.dtype

    def restored(self, made: Params) -> Params:
        """Return entries as the base's checkpoint has them: its types, and all names of tied weights."""
        found = {name: tensor.to(self.dtypes[name]).clone() for name, tensor in made.items()}
        return {**found, **{twin: found[name].clone() for twin, name in self.twins.items()}}


def entries(what: Any, base: Any = None) -> Params:
    """Read all entries of a checkpoint: of a state dict, a module or a path; of an adapter with its base."""
    found = opened(what, None if base is None else opened(base))
    return {name: found.whole(name) for name in found.shapes}


def in_frame(model: Model, checkpoint: Any, frame: LabelFrame, source: Source, whose: str) -> Any:
    """Return a checkpoint with its outputs in the columns of a frame, if it says what they mean."""
    where = frame.column_of
    columns = [where.get(label) for label in labels_of(checkpoint)]
    if not columns or stay(columns, len(frame.labels)):
        return checkpoint

    # Which columns a head has is a buffer that the model makes with the head.
    buffers = model.init(torch.Generator().manual_seed(0))[1]
    state = model.entries_of(checkpoint)
    held = {n: t for n, t in state.items() if n in buffers or not t.is_floating_point()}
    params = {name: tensor for name, tensor in state.items() if name not in held}
    params, held = in_columns(model, (params, held), columns, len(frame.labels), source, whose)
    return {**params, **held}


def checkpoints_of(model: Model, base: Any, experts: Mapping[str, Any], hint: str = "") -> Checkpoints:
    """Read and check the base and the experts.

    Without a base, the first expert takes its place, except for entries of tasks. `hint` is added to the
    error for entries that do not fit the model.
    """
    read = {name: entries(expert, base) for name, expert in experts.items()}
    first = next(iter(read))
    if base is None:
        origin = {name: tensor for name, tensor in read[first].items() if model.task_of(name) is None}
        refuse_ambiguous_heads(model, read)
        every = {repr(name): expert for name, expert in read.items()}
    else:
        origin = entries(base)
        every = {"the base": origin, **{repr(name): expert for name, expert in read.items()}}

    params, buffers = model.init(torch.Generator().manual_seed(0))
    twins = tied_or_refused(model, {**params, **buffers}, every, hint)
    for whose, held in every.items():
        finite(held, whose)
    frozen = [name for name in params if model.frozen(name)]
    refuse_other_frozen(frozen, origin, every, "the base" if base is not None else repr(first))

    # float32 for float16 too, whose sums would round too much.
    wide = torch.float64 if torch.float64 in {tensor.dtype for tensor in origin.values()} else torch.float32

    def ready(held: Params) -> Params:
        return {
            name: tensor.to(wide) if tensor.is_floating_point() else tensor
            for name, tensor in held.items()
            if name not in twins
        }

    start = ready(origin)
    free = [name for name, value in params.items() if value.is_floating_point() and not model.frozen(name)]
    return Checkpoints(
        base=start,
        experts={name: ready(expert) for name, expert in read.items()},
        mixed=Layout.of({name: start[name] for name in free}, wide),
        buffers=frozenset(buffers),
        twins=twins,
        dtypes={name: tensor.dtype for held in (*read.values(), origin) for name, tensor in held.items()},
    )


def refuse_ambiguous_heads(model: Model, read: Mapping[str, Params]) -> None:
    """Refuse entries of a task that differ between experts: only a base shows which expert trained them."""
    owner: dict[str, str] = {}
    for whose, held in read.items():
        for name, tensor in held.items():
            task = model.task_of(name)
            if task is not None and not tensor.equal(read[owner.setdefault(name, whose)][name]):
                raise ConsilienceError(
                    "without a base, entries of a task must be in one expert only or equal in all, got "
                    f"{name!r} of task {task!r} in {owner[name]!r} and another in {whose!r}; give `base`."
                )


def tied_or_refused(model: Model, known: Params, every: Mapping[str, Params], hint: str) -> dict[str, str]:
    """Refuse checkpoints without the model's entries; return the other names of tied weights.

    A name that the model lacks is allowed if it is a second name of one of its entries, or of a task.
    """
    faults: list[str] = []
    twins: dict[str, str] = {}
    for whose, held in every.items():
        faults += [f"no {name!r} in {whose}" for name in known if name not in held]
        faults += [
            f"{tuple(held[name].shape)} for {name!r} of {whose}, where the model has {tuple(tensor.shape)}"
            for name, tensor in known.items()
            if name in held and held[name].shape != tensor.shape
        ]
        for name in sorted(held.keys() - known.keys()):
            if model.task_of(name) is not None:
                continue
            # `named_parameters` lists a tied weight once, a state dict under both names.
            same = (
                other
                for other in known
                if other in held and held[other].shape == held[name].shape and held[other].equal(held[name])
            )
            twin = next(same, None)
            if twin is None:
                faults.append(f"{name!r} in {whose}, which the model does not have")
            twins[name] = twin or name
    if faults:
        raise ConsilienceError(f"checkpoints must have the model's entries, got {'; '.join(faults)}{hint}.")
    return twins


def refuse_other_frozen(
    frozen: Sequence[str], origin: Params, every: Mapping[str, Params], start: str
) -> None:
    """Refuse experts with other frozen entries than the start, up to rounding to the narrower type."""
    faults = [
        f"another {name!r} in {whose} than in {start}"
        for whose, held in every.items()
        for name in frozen
        if not held[name].to(origin[name].dtype).equal(origin[name])
        and not origin[name].to(held[name].dtype).equal(held[name])
    ]
    if faults:
        raise ConsilienceError(f"experts must have the base's frozen entries, got {'; '.join(faults)}.")


# Sources.


class Framed(NamedTuple):
    """Sources in one frame that fits the model, and whether the model receives their tasks."""

    sources: tuple[Source, ...]
    frame: LabelFrame
    labelled: bool


def framed(model: Model, sources: Sequence[Source], scenario: str | None) -> Framed:
    """Put sources into one frame that fits the model, as a schedule of this scenario does.

    None: "task" for a model with heads of tasks, else "class".
    """
    if (
        isinstance(sources, Source)
        or not isinstance(sources, Sequence)
        or not all(isinstance(source, Source) for source in sources)
    ):
        raise ConsilienceError(f"`sources` must be sources in a list, got {kind_of(sources)}.")
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConsilienceError(f"sources must have names of their own, got {', '.join(twice)} twice.")

    scenario = scenario or ("task" if model.uses_task else "class")
    found, frame = reframe(sources, scenario)
    if any(source.kind != "class" or source.places for source in sources):
        raise Refusal("mixtures are judged by one class per sample, got sources with other targets.")
    # Without labels, too, mixtures are compared on both parts.
    for part in ("validation", "test"):
        empty = [source.name for source in found if not len(getattr(source, part))]
        if empty:
            raise ConsilienceError(f"sources must have {part} examples, got none in {', '.join(empty)}.")
    refuse_unfit(model, Framed(found, frame, scenario == "task"), sources, scenario)
    return Framed(found, frame, scenario == "task")


def refuse_unfit(model: Model, data: Framed, sources: Sequence[Source], scenario: str) -> None:
    """Refuse a model that does not fit the inputs and the frame; check one example of each shape."""
    samples = (source.validation.first()[0] for source in data.sources)
    for sample in {signature(sample): sample for sample in samples}.values():
        try:
            model.check(data.frame, sample, data.labelled)
        except ConsilienceError as error:
            # Too many classes are often the same classes in several label spaces.
            too_few = scenario == "class" and model.outputs < len(data.frame.labels)
            hint = label_spaces_hint(sources) if too_few else ""
            if not hint:
                raise
            raise type(error)(f"{str(error).removesuffix('.')}{hint}.") from error


def label_spaces_hint(sources: Sequence[Source]) -> str:
    """Return a hint for sources whose classes are all different because their label spaces differ, or ""."""
    spaces = sorted({space for source in sources for space, _ in source.labels})
    if len(spaces) < 2:
        return ""
    return (
        f"; the sources have {len(spaces)} label spaces ({', '.join(spaces)}), whose classes are all "
        "different: give all one `space` (on the command line `--data.space NAME`) to unite classes with the "
        "same name"
    )


def model_of(model: Any) -> Model:
    """Return a model, or a torch module as one."""
    if isinstance(model, torch.nn.Module):
        return wrap(model)
    if not isinstance(model, Model):
        raise ConsilienceError(f"`model` must be a model or a torch module, got {kind_of(model)}.")
    return model


# The bench.


class Bench:
    """A model, experts from one base, and the data that mixtures of them are judged on.

    Only entries that base and experts share are mixed. Entries of a task (its head) are taken from the expert
    that trained them, and averaged if several did. Floating-point buffers, which must stay variances, are
    averaged; other buffers are the base's. Everything is held in memory, in float32 (float64 where the base
    has it).

    Args:
        model: a Model or a torch module.
        base: what the experts were trained from.
        experts: in a sequence or by name.
        sources: with validation and test parts.
        scenario: None fits the model.
        averages: the coefficients of all mixtures add up to 1, so any base gives the same; without one it is
            the first expert, except for entries of tasks.
    """

    def __init__(
        self,
        model: Any,
        base: Any,
        experts: Any,
        sources: Sequence[Source],
        scenario: str | None = None,
        averages: bool = False,
    ) -> None:
        self.model = model_of(model)
        given = {name: loaded(expert) for name, expert in named(experts).items()}
        base = loaded(base)
        if base is None and not averages:
            raise ConsilienceError(
                "`base` must be a state dict, a module or a path, which the experts were trained from, "
                "got none."
            )
        self.sources, self.frame, self.labelled = framed(self.model, sources, scenario)

        one_head = (scenario or "class") == "class" and not self.model.uses_task
        hint = label_spaces_hint(sources) if one_head else ""
        own = self.sources[0]
        given = {
            name: in_frame(self.model, expert, self.frame, own, f"the expert {name!r}")
            for name, expert in given.items()
        }
        if set(labels_of(base)) & set(self.frame.labels):
            base = in_frame(self.model, base, self.frame, own, "`base`")
        self.checkpoints = checkpoints_of(self.model, base, given, hint)
        self.base, self.experts = self.checkpoints.base, self.checkpoints.experts
        self.mixed, self.dtype = self.checkpoints.mixed, self.checkpoints.dtype
        self._origin = self.mixed.flatten(self.base)
        self._rows = torch.stack([self.mixed.flatten(expert) for expert in self.experts.values()])

        # What is asked more than once: merges, and answers of experts and of their ensemble.
        self._merged: dict[str, Tensor] = {}
        self._alone: dict[tuple[str, str], list[Answers]] = {}
        self._ensembles: dict[str, list[Answers]] = {}

    # Mixtures.

    def mixture(self, coefficients: Sequence[float]) -> Params:
        """Return base + sum_i c_i tau_i.

        All 0 give the base and a single 1 that expert, to the bit, except for the heads of other tasks.
        """
        weights = [float(value) for value in coefficients]
        used = [i for i, weight in enumerate(weights) if weight]
        if not used or (len(used) == 1 and weights[used[0]] == 1):
            flat = self._rows[used[0]] if used else self._origin
        else:
            rest = 1 - math.fsum(weights)
            flat = torch.tensor(weights, dtype=self.dtype) @ self._rows + rest * self._origin

        # Shares of buffers: negative coefficients would make variances negative, a sum above 1 too large.
        positive = [max(weight, 0.0) for weight in weights]
        scale = max(1.0, math.fsum(positive))
        return self._completed(self.mixed.split(flat), [weight / scale for weight in positive])

    def along(self, name: str, coefficient: float) -> Params:
        """Return base + c (merged - base), for the merge that `add` made under this name."""
        merged = self._merged[name]
        flat = merged if coefficient == 1 else self._origin + coefficient * (merged - self._origin)
        return self._completed(self.mixed.split(flat), [1 / len(self.experts)] * len(self.experts))

    def add(self, name: str, aggregator: Aggregator, seed: int) -> None:
        """Merge the experts by an aggregator with equal weights, for `along`."""

        def shared(held: Params) -> Params:
            return {entry: held[entry] for entry in self.mixed.names}

        experts = {expert: shared(held) for expert, held in self.experts.items()}
        self._merged[name] = self.mixed.flatten(merge(shared(self.base), experts, aggregator, seed=seed))

    def _completed(self, mixed: Params, shares: Sequence[float]) -> Params:
        """Return all entries of a model: mixed ones, those of tasks, and buffers by shares (sum <= 1)."""
        made = {**self.base, **mixed}
        every = {name for expert in self.experts.values() for name in expert} | self.base.keys()
        for name in sorted(every):
            if self.model.task_of(name) is not None:
                trained = list(self._trained(name))
                if trained:
                    made[name] = mean_or_first(trained)
            elif name in self.checkpoints.buffers and self.base[name].is_floating_point():
                made[name] = self._buffer(name, shares)
        return made

    def _trained(self, name: str) -> Iterator[Tensor]:
        """Yield an entry of a task as the experts that trained it have it."""
        for expert in self.experts.values():
            if name in expert and (name not in self.base or not torch.equal(expert[name], self.base[name])):
                yield expert[name]

    def _buffer(self, name: str, shares: Sequence[float]) -> Tensor:
        """Return (1 - sum_i s_i) base + sum_i s_i expert_i for a buffer."""
        held = [expert[name] for expert in self.experts.values()]
        # One expert alone is kept to the bit.
        if 1.0 in shares:
            return held[list(shares).index(1.0)]
        if not any(shares):
            return self.base[name]
        made = self.base[name] * (1 - math.fsum(shares))
        for tensor, share in zip(held, shares, strict=True):
            made = made + share * tensor
        return made

    def params(self, made: Params) -> Params:
        """Return the entries of a mixture that the model takes as parameters."""
        return {name: tensor for name, tensor in made.items() if not self._is_buffer(name, tensor)}

    def buffers(self, made: Params) -> Params:
        """Return the entries of a mixture that the model takes as buffers."""
        return {name: tensor for name, tensor in made.items() if self._is_buffer(name, tensor)}

    def _is_buffer(self, name: str, tensor: Tensor) -> bool:
        # Buffers of heads are not among the model's, which begins without heads; they are integers.
        return name in self.checkpoints.buffers or not tensor.is_floating_point()

    # Judging.

    def answers(self, made: Params, part: Part) -> list[Answers]:
        """Return a model's answers on each source, by one forward pass per data set."""
        params, buffers = self.params(made), self.buffers(made)
        return self.ask(lambda x, task: self.model(params, buffers, x, task, False)[0], part)

    @torch.no_grad()
    def ask(self, forward: Callable[[Input, str | None], Tensor], part: Part) -> list[Answers]:
        """Return the answers of forward(x, task) -> outputs on each source."""
        found: dict[tuple[int, str | None], Answers] = {}
        answers = []
        for source in self.sources:
            examples: Examples = getattr(source, part)
            task = source.task if self.labelled else None
            # Clients often share one test set, which is asked once.
            key = (id(examples), task)
            if key not in found:
                columns = self.frame.tasks[str(source.task)] if self.labelled else None
                found[key] = self._ask_once(forward, examples, task, columns)
            answers.append(found[key])
        return answers

    def _ask_once(
        self,
        forward: Callable[[Input, str | None], Tensor],
        examples: Examples,
        task: str | None,
        columns: tuple[int, ...] | None,
    ) -> Answers:
        """Return the answers on some examples, over the given columns (None: all)."""
        chances, targets, width = [], [], 2
        for x, y in examples.chunks(CHUNK):
            outputs = forward(cast_to(x, x.device, self.dtype), task)
            # A model may have more columns than it ever chooses from: those are -inf in all rows.
            within = outputs[:, list(columns)] if columns else outputs
            width = max(width, int(torch.isfinite(within).any(0).sum()))
            chances.append(self.frame.answer(outputs, task))
            targets.append(y)
        return Answers(torch.cat(chances), torch.cat(targets), min(width, len(columns or self.frame.labels)))

    def alone(self, name: str, part: Part) -> list[Answers]:
        """Return one expert's answers; they are computed once."""
        if (name, part) not in self._alone:
            self._alone[name, part] = self.answers(self.experts[name], part)
        return self._alone[name, part]

    def ensemble(self, part: Part) -> list[Answers]:
        """Return the mean of the experts' probabilities; it is computed once."""
        if part not in self._ensembles:
            by_source = zip(*(self.alone(name, part) for name in self.experts), strict=True)
            self._ensembles[part] = [mean(answers) for answers in by_source]
        return self._ensembles[part]

    def scores(self, answers: Sequence[Answers], objective: str, part: Part) -> dict[str, float]:
        """Return the score of each source.

        It is the accuracy; for the objectives without labels 1 - normalised entropy, or the agreement with
        the ensemble of experts.
        """
        if objective == "entropy":
            found = [1 - answer.entropy for answer in answers]
        elif objective == "agreement":
            ensemble = self.ensemble(part)
            found = [answer.agreement(other) for answer, other in zip(answers, ensemble, strict=True)]
        else:
            found = [answer.correct for answer in answers]
        return {source.name: float(values.mean()) for source, values in zip(self.sources, found, strict=True)}

    def likelihood(self, answers: Sequence[Answers], objective: str, part: Part) -> float:
        """Return what breaks ties of scores, and leads an optimiser over their plateaus.

        It is the mean over sources of the mean log p of the right class, or of the ensemble's without labels;
        0 for the entropy, which has no plateaus; -inf where some answer is not finite.
        """
        if objective == "entropy":
            return 0.0
        if not all(answer.finite.all() for answer in answers):
            return -math.inf
        if objective == "agreement":
            right = [answer.p.argmax(1) for answer in self.ensemble(part)]
        else:
            right = [answer.y for answer in answers]
        # The clamp keeps the mean finite where one example has probability 0.
        found = [
            answer.chance(y).clamp_min(1e-12).log().mean() for answer, y in zip(answers, right, strict=True)
        ]
        return float(torch.stack(found).mean())


def mean_or_first(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors, or the first where they are equal, integers, or of several shapes."""
    first = tensors[0]
    fit = first.is_floating_point() and all(tensor.shape == first.shape for tensor in tensors)
    # The mean of equal numbers may round.
    if fit and not all(torch.equal(tensor, first) for tensor in tensors):
        return torch.stack(list(tensors)).mean(0)
    return first
