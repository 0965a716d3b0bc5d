"""Models of several modules, shared ones and one per task, with a head per task on top."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward, ForwardEach, for_one
from consilience.core.params import Params, computing, key, matches
from consilience.core.source import LabelFrame, Source, trimmed
from consilience.core.traits import Traits, traits_of
from consilience.core.tree import Input, Tree, cast_to
from consilience.models.heads import Head, Heads, deepened, escape, tasks
from consilience.models.module import Factory, ModuleModel, no_such_entry

SEED = "seed"
"""The buffer from which the first weights of tasks are drawn, so that all agents draw the same."""

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
"""Layers that belong to the layer before them."""

Run = Callable[[ModuleModel, str | None, Input], Tensor]
"""(module, prefix of its entries, x) -> outputs; without a prefix the module has its first weights."""


class Piece(NamedTuple):
    """A module, and the prefix of the entries that it runs with."""

    prefix: str
    module: ModuleModel


class Composed(Heads):
    """outputs[:, columns_t] = psi_t W_t^T + b_t, where psi_t [B, (*places,) d] are made by several modules.

    Subclasses say which modules there are (`pieces`), how they make the features of a task (`task_features`)
    and which entries a new task brings (`own_entries`). Entries of a module are `<prefix><name>`. The buffer
    `seed` is drawn by the run; what a task brings is drawn from it and from the task alone, so that all
    agents begin with the same, whatever source they train on. With task None the columns of all heads are
    written, each from the features of its task; before there is a head all outputs are zero. Features
    without a task are the mean over tasks.
    """

    _patterns: tuple[str, ...] = ()

    # For subclasses.

    @property
    @abstractmethod
    def name(self) -> str:
        """The catalogue's name, with that of a module."""

    @abstractmethod
    def pieces(self, present: Sequence[str]) -> list[Piece]:
        """Return all modules with the prefixes of their entries, where these tasks are there."""

    @abstractmethod
    def task_features(
        self, run: Run, params: Params, x: Input, wanted: Sequence[str], present: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return psi_t for the tasks `wanted`, of those that are `present`."""

    @abstractmethod
    def stages(self, run: Run, x: Input) -> list[Tensor]:
        """Return what the layers give without any task: the last are features."""

    @abstractmethod
    def own_entries(self, task: str, stages: Sequence[Tensor], generator: torch.Generator) -> Params:
        """Return the first values of the entries that a task brings, but for those of its modules."""

    def joined(self, params: Params) -> Params:
        """Return the parameters with entries between tasks that are there by now; these depend on no draw."""
        return params

    @abstractmethod
    def common_modules(self, generator: torch.Generator) -> tuple[Params, Params]:
        """Return the first parameters and buffers of the modules that are there without any task."""

    def own_modules(self, task: str, generator: torch.Generator) -> tuple[Params, Params]:
        """Return the first parameters and buffers of the modules that a task brings."""
        return {}, {}

    # What a model must have.

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = self.common_modules(generator)
        return params, {**buffers, SEED: torch.randint(2**62, (), generator=generator)}

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Add a head and the entries of the source's task, if it has none."""
        if self._has_head(params, buffers, source):
            return self.joined(params), buffers
        task = self.head_key(source)
        like = computing(params)
        x = cast_to(trimmed(*source.train.first(1))[0], like.device, like.dtype)
        with torch.no_grad():
            stages = self.stages(self._functional(params, buffers, False, {}), x)

        # The head first: with one expert, or without entries of tasks, it is that of `multi_head`.
        params, buffers = self._add_head(params, buffers, source, stages[-1].shape[-1], like, generator)
        own = key(int(buffers.get(SEED, torch.zeros(()))), task)
        fresh, statistics = self.own_modules(task, own)
        fresh |= self.own_entries(task, stages, own)
        # What an earlier task brought for all stays as it is.
        for held, new in ((params, fresh), (buffers, statistics)):
            for name in new.keys() - held.keys():
                held[name] = cast_to(new[name], like.device, like.dtype)
        return self.joined(params), buffers

    def __call__(
        self, params: Params, buffers: Params, x: Input, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        # This class's own rule: a subclass may make several tasks out of one.
        (out,), buffers = Composed.each(self, params, buffers, x, (task,), train)
        return out, buffers

    def each(
        self, params: Params, buffers: Params, x: Input, tasks: Sequence[str | None], train: bool
    ) -> tuple[list[Tensor], Params]:
        updated: Params = {}
        run, heads = self._functional(params, buffers, train, updated), self.heads
        found = self._answers(run, params, x, [heads(params, buffers, task) for task in tasks])
        return found, {**buffers, **updated} if train else buffers

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        return for_one(Composed.bind_each(self, params, buffers, train))

    def bind_each(
        self, params: Params, buffers: Params, train: bool, through: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[ForwardEach, Params]:
        held, bound = {name: tensor.clone() for name, tensor in buffers.items()}, {}
        for prefix, module in self.pieces(tasks(params)):
            forward, own = module.bind(entries(params, prefix), entries(held, prefix), train)
            bound[prefix, id(module)] = forward
            held |= {prefix + name: tensor for name, tensor in own.items()}
        spare = self._functional(params, buffers, train, {})
        # To find heads reads the values of columns, which is too slow for every step.
        heads: dict[str | None, list[Head]] = {}

        def run(module: ModuleModel, prefix: str | None, x: Input) -> Tensor:
            return spare(module, None, x) if prefix is None else bound[prefix, id(module)](x, None)

        def answer(x: Input, asked: tuple[str | None, ...]) -> list[Tensor]:
            for task in asked:
                if task not in heads:
                    heads[task] = self.heads(params, held, task)
            return self._answers(run, params, x, [heads[task] for task in asked])

        return answer, held

    def features(self, params: Params, buffers: Params, x: Input, task: str | None = None) -> Tensor:
        run, present = self._functional(params, buffers, False, {}), tasks(params)
        if task is not None and escape(task) not in present:
            raise ConsilienceError(
                f"features need a task that has entries, got {task!r} and {len(present)} tasks."
            )
        wanted = present if task is None else [escape(task)]
        if not wanted:
            return pooled(self.stages(run, x)[-1], x)

        psis = self.task_features(run, params, x, wanted, present)
        if task is not None:
            (head,) = self.heads(params, buffers, task)
            return pooled(deepened(psis[head.task], head), x)
        # Tasks may end in features that are made for places and for samples alike.
        return torch.stack([pooled(psi, x) for psi in psis.values()]).mean(0)

    def _answers(self, run: Run, params: Params, x: Input, asked: Sequence[Sequence[Head]]) -> list[Tensor]:
        """Return the outputs [B, C] of several lists of heads, each head on the features of its task.

        What tasks have in common runs once for all of them.
        """
        wanted = list(dict.fromkeys(head.task for heads in asked for head in heads))
        psis = self.task_features(run, params, x, wanted, tasks(params)) if wanted else {}
        if all(asked):
            return [self._outputs([psis[head.task] for head in heads], heads) for heads in asked]
        plain = self.stages(run, x)[-1]
        return [
            self._outputs([psis[head.task] for head in heads], heads) if heads else self._no_outputs(plain)
            for heads in asked
        ]

    def _functional(self, params: Params, buffers: Params, train: bool, updated: Params) -> Run:
        """Return how modules run with these entries; new buffers are put into `updated`."""

        def run(module: ModuleModel, prefix: str | None, x: Input) -> Tensor:
            if prefix is None:
                return module(*self._first_weights(module, x), x, None, train)[0]
            own = {**entries(buffers, prefix), **entries(updated, prefix)}
            out, moved = module(entries(params, prefix), own, x, None, train)
            if train:
                updated.update({prefix + name: tensor for name, tensor in moved.items()})
            return out

        return run

    def _first_weights(self, module: ModuleModel, x: Input) -> tuple[Params, Params]:
        """Return weights of a module that no task has yet: only the shapes of what they give are used."""
        params, buffers = module.init(torch.Generator().manual_seed(0))
        # Whole numbers, such as tokens, say nothing of the type to compute with.
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return tuple(  # type: ignore[return-value]
            {name: cast_to(tensor, x.device, dtype) for name, tensor in held.items()}
            for held in (params, buffers)
        )

    # What its entries are.

    def _owner(self, entry: str) -> tuple[ModuleModel, str] | None:
        """Return the module that an entry or buffer is of, and its name there; None for entries of ours."""
        task = self.task_of(entry)
        for prefix, module in self.pieces([] if task is None else [task]):
            name = entry.removeprefix(prefix)
            if name != entry and (name in module.entries or name in module.buffer_names):
                return module, name
        return None

    def frozen(self, entry: str) -> bool:
        owner = self._owner(entry)
        return matches(entry, self._patterns) or (owner is not None and owner[0].frozen(owner[1]))

    def derived(self, buffer: str) -> bool:
        owner = self._owner(buffer)
        return owner is not None and owner[0].derived(owner[1])

    def freeze(self, patterns: Sequence[str]) -> Self:
        """Return the same model with the entries that match these patterns frozen too.

        Raises ConsilienceError for a pattern that no entry can match, and for modules that act differently in
        training: freeze their entries in the module that is given.
        """
        other = copy.copy(self)
        example = "x"
        for pattern in patterns:
            matched = False
            for prefix, module in self.pieces([example]):
                found = [name for name in module.entries if matches(prefix + name, [pattern])]
                matched |= bool(found)
                if found and (module.draws or module.moves_buffers):
                    raise ConsilienceError(
                        f"modules with dropout or running statistics cannot be frozen by patterns in "
                        f"{self.name}, got {pattern!r}; set requires_grad=False in the module that is given."
                    )
            # Entries of tasks may come later.
            if not (matched or pattern == "*" or pattern.startswith(self.task_prefixes)):
                raise no_such_entry(pattern, repr(self))
        other._patterns = (*self._patterns, *patterns)
        return other

    @property
    def modules(self) -> list[ModuleModel]:
        """All modules, once each."""
        return list({id(module): module for _, module in self.pieces(["x"])}.values())

    @property
    def has_batch_norm(self) -> bool:
        return self.traits.mixes or any(module.has_batch_norm for module in self.modules)

    @property
    def moves_buffers(self) -> bool:
        return self.traits.moves or any(module.moves_buffers for module in self.modules)

    @property
    def draws(self) -> bool:
        return self.traits.draws or any(module.draws for module in self.modules)

    # The trial before a run.

    def check(self, frame: LabelFrame, sample: Input, aware: bool, places: tuple[int, ...] = ()) -> None:
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(module.watched())
            super().check(frame, sample, aware, places)

    def check_outputs(self, out: object, samples: int, places: tuple[int, ...]) -> None:
        for module in self.modules:
            module.check_head()
        super().check_outputs(out, samples, places)

    def probe(self, params: Params, buffers: Params, x: Input) -> None:
        # Without heads all outputs are zero, and show nothing: features do.
        def forward(batch: Input) -> tuple[Tensor, Params]:
            updated: Params = {}
            psi = self.stages(self._functional(params, buffers, True, updated), batch)[-1]
            return psi, {**buffers, **updated}

        self.traits = Traits() | self.traits | traits_of(forward, buffers, x)


# Modules that users give.


def module_of(given: ModuleModel | nn.Module | Factory, what: str) -> ModuleModel:
    """Return a headless model of a module, a function that makes one, or a model without its head.

    The outputs of a module are its features; of a model the head is taken off.
    """
    if isinstance(given, ModuleModel):
        return given.body()
    if isinstance(given, nn.Module) or callable(given):
        return ModuleModel(given, headless=True)
    raise ConsilienceError(
        f"{what} must be a torch module, a function that makes one, or a model of one, got "
        f"{type(given).__name__}."
    )


class Layers(nn.Sequential):
    """Layers one after another, of which the first may have several inputs."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        first, *rest = self
        out: Tensor = first(*args, **kwargs)
        for layer in rest:
            out = layer(out)
        return out


class Cut(NamedTuple):
    """A trunk, and the same as layers one after another."""

    trunk: ModuleModel
    layers: list[ModuleModel]


def cut(given: ModuleModel | nn.Module | Factory) -> Cut:
    """Cut a trunk into its layers: the children of an nn.Sequential that have entries.

    Children without entries, such as activations, and norms belong to the layer before them; those before the
    first layer belong to it. Anything but an nn.Sequential is one layer, and so is a sequence whose head is
    inside one of its children. A head that ends the sequence is taken off.

    Raises ConsilienceError for layers that share entries.
    """
    trunk = module_of(given, "`trunk`")
    # A body keeps the place of its head, which a sequence can do without.
    whole = given.module if isinstance(given, ModuleModel) else trunk.module
    head = given.head_layer if isinstance(given, ModuleModel) else None
    if type(whole) is not nn.Sequential or whole._forward_hooks or "." in (head or ""):
        return Cut(trunk, [trunk])

    groups: list[dict[str, nn.Module]] = [{}]
    # With children that stand in several places, such as one activation for all layers.
    for name, child in whole._modules.items():
        assert child is not None
        if name == head:
            break
        if is_layer(child) and any(map(is_layer, groups[-1].values())):
            groups.append({})
        groups[-1][name] = child
    layers = [_layer(trunk, group) for group in groups]

    # A tied entry has its name from the first of its places.
    if sorted(name for layer in layers for name in layer.entries) != sorted(trunk.entries):
        raise ConsilienceError(
            "the layers of a trunk must not share entries where tasks share some of them, got "
            f"{trunk.description}; untie them, or give the trunk as one module that is no nn.Sequential."
        )
    return Cut(trunk, layers)


def halves(trunk: ModuleModel, layer: ModuleModel) -> tuple[ModuleModel, ModuleModel | None]:
    """Return a layer up to its norms, and what follows, such as its activation; None for nothing."""
    groups: tuple[dict[str, nn.Module], dict[str, nn.Module]] = {}, {}
    if not isinstance(layer.module, Layers):
        return layer, None
    for name, child in layer.module._modules.items():
        assert child is not None
        begun = any(map(is_layer, groups[0].values()))
        follows = bool(groups[1]) or (begun and not isinstance(child, NORMS))
        groups[follows][name] = child
    return _layer(trunk, groups[0]), _layer(trunk, groups[1]) if groups[1] else None


def is_layer(child: nn.Module) -> bool:
    """Whether a child of a sequence is a layer: it has entries, and is no norm."""
    return any(True for _ in child.parameters()) and not isinstance(child, NORMS)


def _layer(trunk: ModuleModel, group: dict[str, nn.Module]) -> ModuleModel:
    """Return some children of a trunk as a model, with their names and frozen entries."""
    module = Layers()
    for name, child in group.items():
        module.add_module(name, child)
    frozen = [name for name, _ in module.named_parameters() if trunk.frozen(name)]
    return ModuleModel(module, frozen=frozen, headless=True, name=trunk.description)


def drawn_modules(pieces: Sequence[Piece], generator: torch.Generator) -> tuple[Params, Params]:
    """Return the first parameters and buffers of modules, drawn one after another."""
    params, buffers = Params(), Params()
    for prefix, module in pieces:
        for mine, theirs in zip((params, buffers), module.init(generator), strict=True):
            mine.update({prefix + name: tensor for name, tensor in theirs.items()})
    return params, buffers


def entries(tensors: Params, prefix: str) -> Params:
    """Return the entries with a prefix, under their names without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def pooled(psi: Tensor, x: Input) -> Tensor:
    """Return features [B, d]: the mean over the places of [B, *places, d], without padding."""
    if psi.dim() <= 2:
        return psi
    there = x.there() if isinstance(x, Tree) else None
    if there is None or there.shape != psi.shape[:-1]:
        return psi.flatten(1, -2).mean(1)
    return (psi * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp_min(1)
