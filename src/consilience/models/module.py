"""A torch module as a Model: parameters and buffers are given at each call, or bound once."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward, Model
from consilience.core.params import Params, content_hash, matches, same


class ModuleModel(Model):
    """A module x [B, ...] -> outputs [B, C] as a pure function of its parameters and buffers.

    Entries are the named parameters, tied weights once, under their first name. A given module keeps its weights at every
    `init`; a factory makes new ones from the generator and leaves torch's random state alone (what it draws outside of torch's
    CPU generator is not seeded). The features are the input of `head`, by default the last nn.Linear in module order;
    of a headless module, its outputs (which `models.backbone` counts, where they are not given). A part all of whose entries are
    frozen runs in eval mode also in training. Buffers follow in-place updates, as batch norm makes them, not those that put a
    new tensor in the place of the old.

    >>> model = ModuleModel(lambda: nn.Linear(4, 3))
    >>> params, buffers = model.init(torch.Generator().manual_seed(0))
    >>> forward, _ = model.bind(params, buffers, train=False)
    >>> x = torch.ones(2, 4)
    >>> torch.equal(forward(x, None), model(params, buffers, x, None, False)[0])
    True
    """

    def __init__(
        self,
        module: nn.Module | Callable[[], nn.Module],
        outputs: int | None = None,
        head: str | None = None,
        frozen: Sequence[str] = (),
        headless: bool = False,
        name: str | None = None,
    ) -> None:
        self._factory = None if isinstance(module, nn.Module) else module
        made = copy.deepcopy(module) if isinstance(module, nn.Module) else self._make(0)
        if not isinstance(made, nn.Module):
            raise ConsilienceError(
                f"a model should be a torch module, or a function that makes one. Found {type(made).__name__}."
            )
        self._module = made
        self._mode: bool | None = None
        self.description = name or type(made).__name__
        self.headless = headless
        self._head = None if headless else _find_head(made, head)
        self._outputs = self._layer().out_features if outputs is None and self._head is not None else outputs
        if (self._outputs is not None or not headless) and self.outputs < 1:
            raise ConsilienceError(f"`outputs` should be at least 1. Found `outputs = {self.outputs}`.")
        self._names = tuple(n for n, _ in made.named_parameters())
        self._buffers = tuple(n for n, _ in made.named_buffers())
        self._frozen: frozenset[str] = frozenset()
        self._freeze(frozen)

    @property
    def name(self) -> str:
        """The catalogue's name, or that of the module's class."""
        return self.description.partition("(")[0]

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """The number C of output columns."""
        if self._outputs is None:
            raise ConsilienceError(
                "`outputs` should be given for a module without a linear head. Found none."
            )
        return self._outputs

    @property
    def width(self) -> int:
        """The number d of features."""
        return self.outputs if self.headless else self._layer().in_features

    @property
    def feature_space(self) -> str:
        params, buffers = self.init(torch.Generator().manual_seed(0))
        if not self.headless or not all(self.frozen(n) for n in params):
            return ""
        if not same(params, self.init(torch.Generator().manual_seed(1))[0]):
            return ""
        of = {
            n: t for n, t in {**params, **buffers}.items() if t.numel()
        }  # empty are the places of tasks' own entries
        if "identity" not in of:
            said = hashlib.blake2b(self.structure.encode(), digest_size=16).digest()
            of["identity"] = torch.tensor([*said], dtype=torch.uint8)
        return content_hash(of)

    @property
    def has_batch_norm(self) -> bool:
        self._set(True)
        return any(isinstance(m, _BatchNorm) and m.training for m in self._module.modules())

    @property
    def draws(self) -> bool:
        self._set(True)
        return any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in self._module.modules())

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        module = self._module
        if self._factory is not None:
            module = self._make(int(torch.randint(2**62, (), generator=generator)))
        params = {n: p.detach().clone() for n, p in module.named_parameters()}
        return params, {n: b.detach().clone() for n, b in module.named_buffers()}

    def __call__(
        self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        self._set(train)
        own = _pick(params, self._names)
        held = _pick(buffers, self._buffers)
        if train:
            held = {n: b.clone() for n, b in held.items()}
        out = functional_call(self._module, {**own, **held}, (x,), tie_weights=True)
        return out, {**buffers, **held} if train and held else buffers

    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        if self.headless:
            return self(params, buffers, x, task, False)[0].flatten(1)
        seen: list[Tensor] = []
        handle = self._layer().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self(params, buffers, x, task, False)
        finally:
            handle.remove()
        if not seen:
            raise ConsilienceError(
                f"the head should be called by the module. Found that {self._head!r} is not."
            )
        return seen[-1].flatten(1)

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        self._set(train)
        held = {n: b.detach().clone() for n, b in _pick(buffers, self._buffers).items()}
        given = {**_pick(params, self._names), **held}
        # a copy of the structure: in every place, and for every alias, deepcopy takes the given tensor as the copy made
        own = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        module = copy.deepcopy(self._module, {id(t): given[n] for n, t in own.items()})
        return lambda x, task: module(x), held

    @property
    def structure(self) -> str:
        """What the module is, without its weights: what torch prints of it, and its parts' classes and plain attributes."""
        return structure(self._module)

    def head(self, params: Params, task: str | None) -> tuple[str, str | None]:
        if self.headless:
            return super().head(params, task)
        layer = self._layer()
        names = {id(p): n for n, p in self._module.named_parameters()}
        return names[id(layer.weight)], names[id(layer.bias)] if layer.bias is not None else None

    def frozen(self, entry: str) -> bool:
        return entry in self._frozen

    def freeze(self, patterns: Sequence[str]) -> ModuleModel:
        """The same model with the entries that match these patterns frozen too."""
        other = copy.deepcopy(self)
        other._freeze(patterns)
        return other

    def body(self) -> ModuleModel:
        """The headless model of this one's features [B, width], without the head's entries.

        The head is replaced by a layer that keeps its input, so that what the module does after it changes nothing.
        """
        if self.headless:
            return self
        width, name, factory = self._layer().in_features, self._head or "", self._factory
        make = (
            (lambda: _without_head(factory(), name))
            if factory
            else _without_head(copy.deepcopy(self._module), name)
        )
        body = ModuleModel(make, width, headless=True, name=self.description)
        body._freeze([n for n in self._frozen if n in body._names])
        return body

    def __repr__(self) -> str:
        if not self._frozen:
            return self.description
        whole = len(self._frozen) == len(self._names) > 9
        return f"{self.description}, frozen: {'*' if whole else ', '.join(sorted(self._frozen))}"

    def _named(self, description: str) -> ModuleModel:
        self.description = description
        return self

    def _layer(self) -> nn.Linear:
        if self._head is None:
            raise ConsilienceError(
                f"features need a linear head, or a headless module. Found neither in {self.description}."
            )
        layer = self._module.get_submodule(self._head)
        assert isinstance(layer, nn.Linear)
        return layer

    def _make(self, seed: int) -> nn.Module:
        if not callable(self._factory):
            raise ConsilienceError(
                f"a model should be a torch module, or a function that makes one. Found {self._factory!r}."
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._factory()

    def _freeze(self, patterns: Sequence[str]) -> None:
        for p in patterns:
            if not any(matches(n, [p]) for n in self._names):
                raise ConsilienceError(
                    f"frozen patterns should match an entry. Found none like {p!r} in {self.description}."
                )
        self._frozen |= {n for n in self._names if matches(n, patterns)}
        self._mode = None

    def _set(self, train: bool) -> None:
        """Set the modes of all parts, frozen ones always to eval."""
        if self._mode is train:
            return
        self._module.train(train)
        if train and self._frozen:
            names = {id(p): n for n, p in self._module.named_parameters()}
            for part in self._module.modules():
                own = [names[id(p)] for p in part.parameters()]
                if own and all(n in self._frozen for n in own):
                    part.eval()
        self._mode = train


class _Taken(nn.Module):
    """Stands where a head was: keeps its input [B, ..., d], gives zeros [B, ..., C]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.inputs:
            raise ValueError(f"the head should have {self.inputs} inputs. Found {x.shape[-1]}.")
        self.__dict__["seen"] = x
        return x.new_zeros(*x.shape[:-1], self.outputs)


def _without_head(module: nn.Module, name: str) -> nn.Module:
    """The module, giving its head's input flattened to [B, d]."""
    if not name:
        module, name = nn.Sequential(module), "0"
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    mine = {id(p) for p in layer.parameters()}
    holder, _, attribute = name.rpartition(".")
    taken = _Taken(layer.in_features, layer.out_features)
    places = [n for n, m in module.named_modules(remove_duplicate=False) if m is layer]
    setattr(module.get_submodule(holder), attribute, taken)
    if len(places) > 1 or any(id(p) in mine for p in module.parameters()):
        raise ConsilienceError(f"a trunk should not share entries with its head. Found that {name!r} does.")

    def give(root: nn.Module, args: object, out: object) -> Tensor:
        seen: Tensor | None = root.get_submodule(name).__dict__.pop("seen", None)
        if seen is None:
            raise ConsilienceError(f"the head should be called by the module. Found that {name!r} is not.")
        return seen.flatten(1)

    module.register_forward_hook(give)
    return module


def structure(module: nn.Module) -> str:
    """What a module is, without its weights: two that compute something else from equal weights have different ones.

    What torch prints of it, and of each part the class and the public attributes that are numbers, text, None, functions (by name)
    or sequences of these: torch prints neither the heads of an attention nor `norm_first`. Private attributes are not seen.

    >>> layers = [nn.MultiheadAttention(4, heads) for heads in (1, 2, 2)]
    >>> [str(layers[0]) == str(m) for m in layers], [structure(layers[1]) == structure(m) for m in layers]
    ([True, True, True], [False, True, True])
    """
    lines = [str(module)]
    for name, part in module.named_modules():
        held = {} if isinstance(part, _Taken) else vars(part)  # the head that was is none of it
        said = {n: _plain(v) for n, v in sorted(held.items()) if not n.startswith("_") and n != "training"}
        own = ", ".join(f"{n}={v}" for n, v in said.items() if v is not None)
        lines.append(f"{name}: {_plain(type(part))}({own})")
    return "\n".join(lines)


def _plain(value: object) -> str | None:
    """A plain value in words; None for anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple | list):
        parts = [_plain(v) for v in value]
        return None if None in parts else f"({', '.join(str(p) for p in parts)})"
    name = getattr(value, "__qualname__", None)
    return (
        name if isinstance(name, str) else None
    )  # not where it is defined: __main__ for one agent is a package for another


def _find_head(module: nn.Module, name: str | None) -> str | None:
    """The name of the head: the given one, else the last nn.Linear in module order, else None."""
    layers = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    if name is None:
        return layers[-1] if layers else None
    if name not in layers:
        raise ConsilienceError(
            f"`head` should name an nn.Linear of the module. Found {name!r}; those are: {', '.join(layers)}."
        )
    return name


def _pick(tensors: Params, names: Sequence[str]) -> Params:
    """The entries of these names, and no other."""
    try:
        return {n: tensors[n] for n in names}
    except KeyError as e:
        raise ConsilienceError(
            f"parameters and buffers should have the model's entries. Found none called {e.args[0]!r}."
        ) from e


def count(model: Model | nn.Module, sample: Tensor | Sequence[int], task: str | None) -> int:
    """See `consilience.models.macs`."""
    with warnings.catch_warnings():  # torch scripts something of its own there
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

    model = copy.deepcopy(model)  # neither its mode nor its statistics move
    x = sample[:1] if isinstance(sample, Tensor) else torch.zeros(1, *sample)
    if isinstance(model, Model):
        given = model.init(torch.Generator().manual_seed(0))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that the counter does not know
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            if isinstance(model, Model):
                model(*given, x, task, False)
            else:
                model.eval()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2
