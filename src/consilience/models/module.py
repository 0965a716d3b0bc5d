"""A torch module as a Model: parameters and buffers are passed in each call, or bound once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward, ForwardEach, Model, for_one, stay
from consilience.core.params import Params, alias, changes, content_hash, matches, same
from consilience.core.source import LabelFrame
from consilience.core.traits import Traits
from consilience.core.tree import Input, Tree, as_input, tensors_of

Factory = Callable[[], nn.Module]


class ModuleModel(Model):
    """A module x [B, ...] -> outputs [B, C] as a pure function of its parameters and buffers.

    Entries are the named parameters; a tied weight is one entry, under its first name. A given module keeps
    its weights at every `init`. A factory makes new ones from the generator and leaves torch's random state
    alone; what it draws from other generators than torch's on the CPU is not seeded. The features are the
    input of `head`, by default the last nn.Linear in module order, or the outputs of a headless module;
    their number may be left to `models.backbone` to count.

    Entries with `requires_grad=False` are frozen, and so are those that match the patterns `frozen`. A part
    whose entries are all frozen runs in eval mode, also in training. A given module is copied, but for the
    entries with `requires_grad=False`: these stay in its memory, at every `init`, and must not change there.
    Inputs stay as they are, also where the module changes its own in place. Buffers that torch does not save,
    and those of a frozen part, are derived: every visit begins with them as the module made them.

    >>> model = ModuleModel(lambda: nn.Linear(4, 3))
    >>> params, buffers = model.init(torch.Generator().manual_seed(0))
    >>> forward, _ = model.bind(params, buffers, train=False)
    >>> x = torch.ones(2, 4)
    >>> torch.equal(forward(x, None), model(params, buffers, x, None, False)[0])
    True
    >>> layer = nn.Linear(4, 3)
    >>> _ = layer.weight.requires_grad_(False)
    >>> ModuleModel(layer).frozen("weight"), ModuleModel(layer).frozen("bias")
    (True, False)
    """

    factory: Factory | None
    """The function that makes the module; None if the module was given."""

    module: nn.Module
    """The structure that runs; its weights are those of a given module, else of no use."""

    entries: tuple[str, ...]
    """The names of the parameters."""

    head_layer: str | None
    """The name of the head's layer; None without a head."""

    guessed_head: str | None
    """The place of a head that nobody named, also where it was taken off; None for a named one."""

    given_outputs: int | None
    """C; None where nothing says it. Then `outputs` raises."""

    def __init__(
        self,
        module: nn.Module | Factory,
        outputs: int | None = None,
        head: str | None = None,
        frozen: Sequence[str] = (),
        headless: bool = False,
        name: str | None = None,
    ) -> None:
        self.factory = None if isinstance(module, nn.Module) else module
        first = module if isinstance(module, nn.Module) else self._make(0)
        if not isinstance(first, nn.Module):
            raise ConsilienceError(
                f"a model must be a torch module or a function that makes one, got {type(first).__name__}."
            )
        _check_plain(first)
        self.module = first if self.factory else _over_frozen(first)
        self.description = name or type(self.module).__name__
        self._computed = [(place, name) for place, part in first.named_modules() for name in _results(part)]
        self._detach()

        self.headless = headless
        self.head_layer = None if headless else _find_head(self.module, head)
        self.expect_head(self.head_layer if head is None else None)
        self._counts = outputs is None and self.head_layer is not None
        self.given_outputs = self._head().out_features if self._counts else outputs
        # A headless module may leave the number to `backbone`; for others `self.outputs` raises without it.
        if self.given_outputs is not None or not headless:
            whole_number(outputs=self.outputs)

        self._list_entries()
        given = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        self._frozen = frozenset(given)
        self._versions = {name: changes(p) for name, p in given.items()}
        self.at_places = False
        """Whether the last features were means over places."""
        # What calls have shown, by training mode: whether the module changes its inputs; until then they are
        # copied. And the buffers to which it assigns other tensors.
        self._spoils: dict[bool, bool] = {}
        self._assigned: set[str] = set()
        self._called: list[str] = []
        self._freeze(frozen)

    # What it is.

    @property
    def name(self) -> str:
        """The catalogue's name, or that of the module's class."""
        return self.description.partition("(")[0]

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """The number C of output columns."""
        if self.given_outputs is None:
            raise ConsilienceError(
                "`outputs` must be given for a module without a linear head, got none; "
                "use models.wrap(module, outputs=...)."
            )
        return self.given_outputs

    @property
    def width(self) -> int:
        """The number d of features."""
        return self.outputs if self.headless else self._head().in_features

    @property
    def structure(self) -> str:
        """What the module is, without its weights; see the function `structure`."""
        return structure(self.module)

    @property
    def feature_space(self) -> str:
        params, buffers = self.init(torch.Generator().manual_seed(0))
        if not self.headless or not all(self.frozen(name) for name in params):
            return ""
        # Frozen weights that depend on the seed differ between runs.
        if not same(params, self.init(torch.Generator().manual_seed(1))[0]):
            return ""

        # Empty entries are only the places of the entries of tasks.
        hashed = {name: tensor for name, tensor in {**params, **buffers}.items() if tensor.numel()}
        # A backbone has its structure among its entries.
        if "identity" not in hashed:
            digest = hashlib.blake2b(self.structure.encode(), digest_size=16).digest()
            hashed["identity"] = torch.tensor([*digest], dtype=torch.uint8)
        return content_hash(hashed)

    # What a structure shows is known before a probe.

    @property
    def has_batch_norm(self) -> bool:
        return self.traits.mixes or any(isinstance(norm, _BatchNorm) for norm in self._norms())

    @property
    def moves_buffers(self) -> bool:
        return self.traits.moves or any(norm.track_running_stats for norm in self._norms())

    @property
    def tried(self) -> tuple[object, ...]:
        return (self.moves_buffers, self.head_layer, self.given_outputs)

    @property
    def draws(self) -> bool:
        self._set_mode(True)
        dropouts = [part for part in self.module.modules() if isinstance(part, _DropoutNd)]
        return self.traits.draws or any(part.training and part.p > 0 for part in dropouts)

    def _norms(self) -> list[_NormBase]:
        """Return the norms with statistics that are in training mode in training."""
        self._set_mode(True)
        return [part for part in self.module.modules() if isinstance(part, _NormBase) and part.training]

    def __repr__(self) -> str:
        if not self._frozen:
            return self.description
        # A long list of names would hide what the model is.
        all_of_many = len(self._frozen) == len(self.entries) > 9
        return f"{self.description}, frozen: {'*' if all_of_many else ', '.join(sorted(self._frozen))}"

    # What it computes.

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        module = self.module
        if self.factory is not None:
            module = self._make(int(torch.randint(2**62, (), generator=generator)))

        else:
            self._check_unchanged()

        # What never changes is not copied: all who begin from one module hold the same tensors.
        params = {
            name: alias(tensor) if name in self._frozen else tensor.detach().clone()
            for name, tensor in module.named_parameters()
        }
        buffers = {
            name: alias(tensor) if name in self._derived else tensor.detach().clone()
            for name, tensor in module.named_buffers()
        }
        return params, buffers

    def __call__(
        self, params: Params, buffers: Params, x: Input, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        out, new = self.called(params, buffers, x, train)
        return self.read(out, task, buffers), new

    def called(self, params: Params, buffers: Params, x: Input, train: bool) -> tuple[Any, Params]:
        """Return what the module returns, and the new buffers."""
        self._set_mode(train)
        statistics = _pick(buffers, self.buffer_names)
        # The module updates its buffers in place, and the caller's must stay as they are.
        if train:
            statistics = {name: tensor.clone() for name, tensor in statistics.items()}
        kept = self._spoils.get(train, True)
        x = x.clone() if kept else x
        args, kwargs = called_with(x)
        state = {**_pick(params, self.entries), **statistics}
        out = functional_call(self.module, state, args, kwargs, tie_weights=True)
        self._detach()

        # Transforms of torch.func hide whether a tensor was changed. They are called with gradients.
        if train not in self._spoils and not torch.is_grad_enabled():
            self._spoils[train] = any(changes(part) for part in tensors_of(x).values())
        if not train or not statistics:
            return out, buffers

        # torch puts what the module assigned to its buffers into the dictionary that it was given.
        new = {name: state[name] for name in statistics}
        self._assigned |= {name for name, tensor in new.items() if tensor is not statistics[name]}
        moved = {name: tensor.detach() for name, tensor in new.items() if name not in self._derived}
        return out, {**buffers, **moved}

    def read(self, out: Any, task: str | None, buffers: Params) -> Tensor:
        """Return the outputs [B, C, *places] for a task from what the module returned."""
        return out if isinstance(out, Tensor) else tensor_of(out)

    def features(self, params: Params, buffers: Params, x: Input, task: str | None = None) -> Tensor:
        self.find_head(params, buffers, x)
        if self.headless:
            return self._pooled(self(params, buffers, x, task, False)[0], x)

        seen: list[Tensor] = []
        handle = self._head().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self(params, buffers, x, task, False)
        finally:
            handle.remove()
        if not seen:
            raise _head_not_called(self.head_layer)
        return self._pooled(seen[-1], x)

    def _pooled(self, psi: Tensor, x: Input) -> Tensor:
        """Return features [B, d] from the head's inputs; of inputs [B, *places, d] the mean over places."""
        self.at_places = psi.dim() > 2 and psi.shape[-1] == self.width
        if not self.at_places:
            return psi.flatten(1)
        there = None if isinstance(x, Tensor) else x.there()
        if there is None or there.shape != psi.shape[:-1]:
            return psi.flatten(1, -2).mean(1)
        # Padding has no part in the mean of a sequence.
        return (psi * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp_min(1)

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        # This class's own rule: a subclass may make several tasks out of one.
        return for_one(ModuleModel.bind_each(self, params, buffers, train))

    @property
    def passes_features(self) -> bool:
        # A module that is its own head has nothing before it.
        return bool(self.head_layer) and not self.headless

    def bind_each(
        self, params: Params, buffers: Params, train: bool, through: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[ForwardEach, Params]:
        module, held = self.bind_module(params, buffers, train, through)

        def forward(x: Input, tasks: tuple[str | None, ...]) -> list[Tensor]:
            return [self.read(module(x), task, buffers) for task in tasks]

        return forward, held

    def bind_module(
        self, params: Params, buffers: Params, train: bool, through: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Callable[[Input], Any], Params]:
        """Return x -> what the module returns over these tensors, and the buffers that it updates."""
        self._set_mode(train)
        statistics = {
            name: tensor.detach().clone() for name, tensor in _pick(buffers, self.buffer_names).items()
        }
        module = self._over({**_pick(params, self.entries), **statistics})
        if through is not None:
            head = module.get_submodule(self.head_layer or "")
            head.register_forward_pre_hook(lambda _, args: (through(args[0]), *args[1:]))
        spoils = self._spoils.get(train, True)

        def forward(x: Input) -> Any:
            x = x.clone() if spoils else x
            # Most inputs are one tensor, which costs nothing here.
            return module(x) if isinstance(x, Tensor) else module(*(called := x.arguments())[0], **called[1])

        if not train or not self._assigned:
            return forward, statistics

        def assigning(x: Input) -> Any:
            out = forward(x)
            # The statistics that were returned are the ones that others read.
            for name in self._assigned:
                owner, _, own = name.rpartition(".")
                part, held = module.get_submodule(owner), statistics[name]
                held.copy_(getattr(part, own).detach())
                setattr(part, own, held)
            return out

        return assigning, statistics

    def _over(self, given: Params) -> nn.Module:
        """Return a copy of the module's structure over these parameters and buffers."""
        # deepcopy takes each given tensor for the copy of the module's, at every place and for every alias.
        originals = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return copy.deepcopy(self.module, {id(tensor): given[name] for name, tensor in originals.items()})

    def _detach(self) -> None:
        """Detach what a forward pass computed as attributes: a graph can neither be copied nor kept."""
        for place, name in self._computed:
            part = self.module.get_submodule(place)
            # Made new, because inside of vmap it is a tensor of vmap.
            setattr(part, name, torch.zeros(()))

    # State dicts.

    def state_dict(self, params: Params, buffers: Params) -> Params:
        # Only the module knows which buffers it saves, and what else.
        own = self._over({**_pick(params, self.entries), **_pick(buffers, self.buffer_names)}).state_dict()
        # Entries that a method added stay, so that a module without the method refuses to load them.
        added = {name: p for name, p in {**params, **buffers}.items() if name not in self._known}
        own.update(added)
        return own

    def entries_of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(state)
        for twin, name in self._twins.items():
            if twin not in found:
                continue
            other = found.pop(twin)
            held = found.setdefault(name, other)
            if held is not other and not torch.equal(torch.as_tensor(held), torch.as_tensor(other)):
                raise ConsilienceError(
                    f"{name!r} and {twin!r} are one entry of the model, got two different ones in a state "
                    "dict; tie them there too, or untie them in the model."
                )
        return found

    def moved(
        self, params: Params, buffers: Params, columns: Sequence[int | None], width: int
    ) -> tuple[Params, Params]:
        if stay(columns, width):
            return params, buffers
        if self.head_layer is None:
            return super().moved(params, buffers, columns, width)

        # A tied weight is no head's alone, and a frozen one is common ground.
        names = [name for name in self.head(params, None) if name is not None]
        fixed = [name for name in names if name in self._frozen or name in self._twins.values()]
        if fixed:
            raise ConsilienceError(
                f"outputs cannot be put into other columns, because {fixed[0]!r} is "
                f"{'frozen' if fixed[0] in self._frozen else 'tied'}; train in the schedule's columns."
            )
        order = _permutation(columns, width, self.outputs).to(params[names[0]].device)
        rows = {name: torch.empty_like(params[name]).index_copy(0, order, params[name]) for name in names}
        return {**params, **rows}, buffers

    # The trial before a run.

    def check(self, frame: LabelFrame, sample: Input, aware: bool, places: tuple[int, ...] = ()) -> None:
        with self.watched():
            super().check(frame, sample, aware, places)

    def check_outputs(self, out: object, samples: int, places: tuple[int, ...]) -> None:
        self.check_head()
        super().check_outputs(out, samples, places)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the order in which parts with entries are called, for `check_head`."""
        self._called, handles = [], []
        for place, part in self.module.named_modules() if self.guessed_head is not None else ():
            if part._parameters or isinstance(part, _Taken):
                note = lambda *_, place=place: self._called.append(place)  # noqa: E731
                handles.append(part.register_forward_pre_hook(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check_head(self) -> None:
        """Put the linear layer that the module calls last in the place of a head that was guessed.

        A module that ends in something else has no head: no layer inside is one. Raises ConsilienceError
        where the guessed head was taken off already.
        """
        guess, last = self.guessed_head, self._called[-1] if self._called else None
        if guess is not None and last not in (guess, None):
            layer = self.module.get_submodule(last)
            named = last if isinstance(layer, nn.Linear) else None
            if self.headless:
                remedy = f"models.wrap(module, head={'...' if named is None else repr(named)})"
                raise ConsilienceError(
                    f"the head was taken to be {guess!r}, the last nn.Linear, but the module ends in "
                    f"{last!r}; name the layer of the features: {remedy}."
                )
            self.head_layer = named
            if self._counts and isinstance(layer, nn.Linear):
                self.given_outputs = layer.out_features
        self._head_is_known = True

    def expect_head(self, guess: str | None) -> None:
        """Take the place where a head was taken off, if it was guessed; None for a named one."""
        self.guessed_head, self._head_is_known = guess, guess is None

    def find_head(self, params: Params, buffers: Params, x: Input) -> None:
        """Do what `check_head` does for a model that no run has tried; it costs one forward pass, once."""
        if not self._head_is_known:
            with self.watched(), torch.no_grad():
                self(params, buffers, x[:1], None, False)
            self.check_head()

    # The head, and what is frozen.

    def head(self, params: Params, task: str | None) -> tuple[str, str | None]:
        if self.headless:
            return super().head(params, task)
        layer = self._head()
        # By identity, because a tied weight is an entry under another name.
        names = {id(tensor): name for name, tensor in self.module.named_parameters()}
        if id(layer.weight) not in names:
            raise ConsilienceError(
                f"the weight of the head must be a parameter, got {self.head_layer!r}, where it is computed "
                "from others (weight_norm); use a plain nn.Linear as head."
            )
        return names[id(layer.weight)], names[id(layer.bias)] if layer.bias is not None else None

    def frozen(self, entry: str) -> bool:
        return entry in self._frozen

    def derived(self, buffer: str) -> bool:
        return buffer in self._derived

    def freeze(self, patterns: Sequence[str]) -> ModuleModel:
        """Return the same model with the entries that match these patterns frozen too."""
        other = copy.copy(self)
        other.module = same_tensors(self.module)
        other._freeze(patterns)
        return other

    def body(self) -> ModuleModel:
        """Return the headless model of this one's features [B, width], without the head's entries.

        A layer that keeps its input replaces the head, so that what the module does after it changes nothing.
        Of a head that answers every place, such as every token, these are [B, *places, width].
        """
        if self.headless:
            return self
        width, name, factory = self._head().in_features, self.head_layer or "", self.factory
        body = copy.copy(self)
        body.module = _without_head(same_tensors(self.module), name)
        body.factory = (lambda: _without_head(factory(), name)) if factory else None
        body.headless, body.head_layer, body.given_outputs = True, None, width
        # A module that is its own head stands in a sequence now.
        body.expect_head(None if self.guessed_head is None else name or "0")

        # A tied entry may have had its name from the head.
        body._list_entries()
        body._frozen &= frozenset(body.entries)
        body._freeze(())
        return body

    def _head(self) -> nn.Linear:
        """Return the layer of the head."""
        if self.head_layer is None:
            raise ConsilienceError(
                "features need a linear head or a headless module, "
                f"got neither in {self.description}; pass headless=True."
            )
        layer = self.module.get_submodule(self.head_layer)
        assert isinstance(layer, nn.Linear)
        return layer

    def _make(self, seed: int) -> nn.Module:
        """Return a module with the weights of this seed."""
        if not callable(self.factory):
            raise ConsilienceError(
                f"a model must be a torch module or a function that makes one, got {self.factory!r}."
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.factory()

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields of a copy, with by how much frozen entries have changed since they were given."""
        given = dict(self.module.named_parameters())
        since = {name: changes(given[name]) - before for name, before in self._versions.items()}
        return {**self.__dict__, "_versions": since}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, whose tensors count their changes from 0; what was changed stays so."""
        self.__dict__.update(state)
        given = dict(self.module.named_parameters())
        self._versions = {name: changes(given[name]) - since for name, since in self._versions.items()}

    def _check_unchanged(self) -> None:
        """Refuse frozen entries that were changed in the module that was given."""
        for name, p in self.module.named_parameters():
            if changes(p) != self._versions.get(name, changes(p)):
                raise ConsilienceError(
                    "frozen entries are in the memory of the module that was given, "
                    f"and {name!r} was changed there; make a new model of the module."
                )

    def _list_entries(self) -> None:
        """List the names of the module's parameters and buffers."""
        self.entries = tuple(name for name, _ in self.module.named_parameters())
        self.buffer_names = tuple(name for name, _ in self.module.named_buffers())
        # Further names of tied entries, and the entry of each: a state dict has all of them.
        first = {id(p): name for name, p in (*self.module.named_parameters(), *self.module.named_buffers())}
        every = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        self._twins = {name: first[id(p)] for name, p in every if first[id(p)] != name}
        self._known = frozenset((*self.entries, *self.buffer_names))

    def _freeze(self, patterns: Sequence[str]) -> None:
        """Freeze the entries that match, and find the buffers that are then derived."""
        for pattern in patterns:
            if not any(matches(entry, [pattern]) for entry in self.entries):
                raise no_such_entry(pattern, self.description)
        self._frozen |= {entry for entry in self.entries if matches(entry, patterns)}
        self._mode: bool | None = None
        # Frozen parts run in eval mode, so that others may draw and mix than before.
        self.traits = Traits()

        # Buffers that torch does not save are no state of a module. The norms of a frozen part run in eval
        # mode, and leave their statistics as they are.
        derived = {
            f"{place}.{name}" if place else name
            for place, part in self.module.named_modules()
            for name in part._non_persistent_buffers_set
        }
        for place, part in self._frozen_parts():
            derived |= {name for name, _ in part.named_buffers(place)}
        self._derived = frozenset(derived.intersection(self.buffer_names))

    def _frozen_parts(self) -> list[tuple[str, nn.Module]]:
        """Return the parts that have entries, all of them frozen, with their places in the module."""
        if not self._frozen:
            return []
        names = {id(tensor): name for name, tensor in self.module.named_parameters()}
        found = []
        for place, part in self.module.named_modules():
            held = [names[id(tensor)] for tensor in part.parameters()]
            if held and all(name in self._frozen for name in held):
                found.append((place, part))
        return found

    def _set_mode(self, train: bool) -> None:
        """Set the modes of all parts; frozen ones are always in eval mode."""
        if self._mode is train:
            return
        self.module.train(train)
        for _, part in self._frozen_parts() if train else ():
            part.eval()
        self._mode = train


def _over_frozen(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose entries with `requires_grad=False` are in the memory of its own."""
    # A parameter of ours, because `to` of the given module puts other memory into its parameters.
    plain = [p for p in module.parameters() if not p.requires_grad and type(p) is nn.Parameter]
    held: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in plain}
    # torch copies no tensors that are results, as the weights of the old weight_norm are.
    for part in module.modules():
        held |= {id(tensor): tensor.detach() for tensor in _results(part).values()}
    try:
        return copy.deepcopy(module, held)
    except RuntimeError as error:
        raise ConsilienceError(
            f"`model` must be a module that can be copied, got: {str(error).splitlines()[0]}"
        ) from error


def _results(part: nn.Module) -> dict[str, Tensor]:
    """Return the attributes that a forward pass computes from parameters, such as the old weight_norm's."""
    return {name: value for name, value in vars(part).items() if isinstance(value, Tensor) and value.grad_fn}


def same_tensors(module: nn.Module) -> nn.Module:
    """Return a copy of a module's structure, over the same parameters and buffers."""
    # deepcopy takes what stands in its memory for the copy, at every place and for every alias.
    held = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, held)


def _check_plain(module: nn.Module) -> None:
    """Refuse modules whose entries are not those of their parts, or not there yet."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ConsilienceError(
            f"`model` must be a plain module, got {type(module).__name__}; give its `.module`."
        )
    # Neither a call with other parameters nor a copy of the structure works on compiled TorchScript.
    scripted = [part for part in module.modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        raise ConsilienceError(
            f"`model` must be a plain module, got {type(scripted[0]).__name__}; give the module that was "
            "scripted or traced."
        )
    lazy = (*module.parameters(), *module.buffers())
    if any(nn.parameter.is_lazy(tensor) for tensor in lazy):
        raise ConsilienceError(
            "`model` must have all its parameters, got lazy ones; call it once on a batch before."
        )


def called_with(x: Input) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return what a module is called with: inputs by place, and parts of a tree by name."""
    return ((x,), {}) if isinstance(x, Tensor) else x.arguments()


def tensor_of(out: Any) -> Tensor:
    """Return the outputs [B, C, *places] from what a module returns: a tensor, or something with `logits`.

    Logits [B, T, C] of transformers have their classes last, and get them first.

    Raises ConsilienceError for anything else.
    """
    if isinstance(out, Tensor):
        return out
    logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        found, remedy = f"a {type(out).__name__}", "wrap it in a module that returns the outputs"
        if isinstance(out, Mapping):
            found += f" of {', '.join(map(str, out))}"
            remedy += ", or with models.joint if these are the answers of tasks"
        raise ConsilienceError(
            f"a module must return a tensor [B, C, *places], or have it in `logits`, got {found}; {remedy}."
        )
    return logits.movedim(-1, 1) if logits.dim() == 3 else logits


def _permutation(columns: Sequence[int | None], width: int, outputs: int) -> Tensor:
    """Return the place [outputs] of each output: its column; behind `width` for None; else what is left."""
    places: list[int | None] = [*columns[:outputs], *[None] * (outputs - len(columns))]
    taken = set(places)
    free = [place for place in range(outputs) if place not in taken]
    behind = [place for place in free if place >= width]
    for i, column in enumerate(columns[:outputs]):
        if column is None:
            if not behind:
                raise ConsilienceError(
                    f"outputs without a column of their own need room behind the {width} columns, got a "
                    f"model of {outputs} outputs; give it more, or sources that declare all its labels."
                )
            places[i] = behind.pop(0)

    # Outputs without labels were never trained as any class.
    taken = set(places)
    left = iter([place for place in free if place not in taken])
    return torch.tensor([next(left) if place is None else place for place in places])


def no_such_entry(pattern: str, model: str) -> ConsilienceError:
    """Return the error for a pattern of frozen entries that no entry of the model matches."""
    return ConsilienceError(f"frozen patterns must match an entry of {model}, got {pattern!r}.")


def _head_not_called(name: str | None) -> ConsilienceError:
    """Return the error for a module that runs without its head."""
    return ConsilienceError(
        f"the head must be called by the module, got {name!r}, which is not; name another `head`."
    )


# `structure` has the name of this class, and hashes of feature spaces have it from there.
class _Taken(nn.Module):
    """A layer in the place of a head: keeps its input [B, ..., d] and returns zeros [B, ..., C]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.inputs:
            raise ValueError(f"the head must have {self.inputs} inputs, got {x.shape[-1]}.")
        # Past `nn.Module.__setattr__`, which would register a parameter as the layer's own.
        self.__dict__["seen"] = x
        return x.new_zeros(*x.shape[:-1], self.outputs)


def _without_head(module: nn.Module, name: str) -> nn.Module:
    """Change a module so that it returns its head's input [B, d], or [B, *places, d]."""
    # A module that is the head itself has no parent where the head could be replaced.
    if not name:
        module, name = nn.Sequential(module), "0"
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)

    places = [place for place, part in module.named_modules(remove_duplicate=False) if part is layer]
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, _Taken(layer.in_features, layer.out_features))
    tensors = {id(tensor) for tensor in layer.parameters()}
    if len(places) > 1 or any(id(tensor) in tensors for tensor in module.parameters()):
        raise ConsilienceError(
            f"a trunk must not share entries with its head, but {name!r} does; "
            "untie them, or pass headless=True."
        )

    def replace_output(root: nn.Module, args: object, out: object) -> Tensor:
        seen: Tensor | None = root.get_submodule(name).__dict__.pop("seen", None)
        if seen is None:
            raise _head_not_called(name)
        return seen

    module.register_forward_hook(replace_output)
    return module


def structure(module: nn.Module) -> str:
    """Describe a module without its weights, so that two that compute different things differ.

    It is what torch prints of the module, and of each part the class and the public attributes that are
    numbers, text, None, functions (by name) or sequences of these: torch prints neither the heads of an
    attention nor `norm_first`. Private attributes are not seen.

    >>> layers = [nn.MultiheadAttention(4, heads) for heads in (1, 2, 2)]
    >>> [str(layers[0]) == str(layer) for layer in layers]
    [True, True, True]
    >>> [structure(layers[1]) == structure(layer) for layer in layers]
    [False, True, True]
    """
    lines = [str(module)]
    for name, part in module.named_modules():
        # The size of a head that was taken off changes no feature.
        attributes = {} if isinstance(part, _Taken) else vars(part)
        plain = {
            key: _plain(value)
            for key, value in sorted(attributes.items())
            if not key.startswith("_") and key != "training"
        }
        listed = ", ".join(f"{key}={value}" for key, value in plain.items() if value is not None)
        lines.append(f"{name}: {_plain(type(part))}({listed})")
    return "\n".join(lines)


def _plain(value: object) -> str | None:
    """Return a plain value in words; None for anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple | list):
        parts = [_plain(part) for part in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    # Without the module where it is defined: `__main__` on one machine is a package on another.
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else None


def _find_head(module: nn.Module, name: str | None) -> str | None:
    """Return the name of the head: the given one, else the last nn.Linear in module order, else None."""
    layers = [place for place, part in module.named_modules() if isinstance(part, nn.Linear)]
    if name is None:
        return layers[-1] if layers else None
    if name not in layers:
        raise ConsilienceError(
            f"`head` must name an nn.Linear of the module, got {name!r}; those are: {', '.join(layers)}."
        )
    return name


def _pick(tensors: Params, names: Sequence[str]) -> Params:
    """Return the entries of these names alone."""
    try:
        return {name: tensors[name] for name in names}
    except KeyError as error:
        raise ConsilienceError(
            f"parameters and buffers must have the model's entries, got none called {error.args[0]!r}."
        ) from error


def count_macs(model: Model | nn.Module, sample: Any, task: str | None) -> int:
    """See `consilience.models.macs`."""
    # Imported here, since it takes a tenth of a second.
    from consilience.loop.flops import Flops

    # A copy, so that neither its mode nor its statistics change.
    model = copy.deepcopy(model)
    x: Input
    if isinstance(sample, Tensor | Tree | Mapping):
        x = as_input(sample, "`sample`")[:1]
    else:
        x = torch.zeros(1, *sample)
    if isinstance(model, Model):
        start = model.init(torch.Generator().manual_seed(0))

    counter = Flops()
    with torch.no_grad(), counter:
        if isinstance(model, Model):
            model(*start, x, task, False)
        else:
            args, kwargs = called_with(x)
            model.eval()(*args, **kwargs)
    return counter.total // 2
