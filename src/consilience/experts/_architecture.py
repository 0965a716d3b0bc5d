"""Architectures of cards: from a text to a model, and back. No code of a file runs unless it is trusted."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from consilience import models
from consilience.core.errors import ConsilienceError, reading, unknown
from consilience.core.model import Model
from consilience.models.module import ModuleModel, same_tensors

# `wrap` and `macs` are no architectures; `backbone` may ask a hub for weights.
CATALOGUE = frozenset(models.__all__) - {"backbone", "macs", "wrap"}
FROM_FILE = "file"
MAY_NAME_CODE = ("attn_implementation", "auto_map", "custom_pipelines", "quantization_config")
"""What a configuration of transformers may name code by: attention, too, may come from a hub."""


class Normalise:
    """(module, args) -> args with (x - mean) / std in the place of x: what runs before a module."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Made at each call, since inputs may be on any device and of any precision.
        x, *rest = args
        mean, std = (
            torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 2))
            for values in (self.mean, self.std)
        )
        return ((x - mean) / std, *rest)


class Normalised(ModuleModel):
    """A model of one module that normalises its inputs: x -> f((x - mean) / std), with the entries of f.

    Channels are the second dimension of x, and one number is for all of them.

    >>> one = Normalised(models.linear(2, 3), (0.5,), (0.25,))
    >>> params, buffers = one.init(torch.Generator().manual_seed(0))
    >>> x, plain = torch.rand(4, 2), one.inner
    >>> again = plain(params, buffers, (x - 0.5) / 0.25, None, False)[0]
    >>> out = one(params, buffers, x, None, False)[0]
    >>> torch.allclose(out, again), sorted(params) == sorted(plain.entries)
    (True, True)
    """

    def __init__(self, inner: ModuleModel, mean: Sequence[float], std: Sequence[float]) -> None:
        self.inner, self.prepare = inner, Normalise(mean, std)
        frozen = [entry for entry in inner.entries if inner.frozen(entry)]
        given: nn.Module | Callable[[], nn.Module] = self._made
        # A given module has its weights, which a copy of its structure keeps.
        if inner.factory is None:
            given = self._hooked(same_tensors(inner.module))
        super().__init__(
            given, inner.given_outputs, inner.head_layer, frozen, inner.headless, inner.description
        )

    def _made(self) -> nn.Module:
        assert self.inner.factory is not None
        return self._hooked(self.inner.factory())

    def _hooked(self, module: nn.Module) -> nn.Module:
        # Before hooks that read features: these are registered later, and run later.
        module.register_forward_pre_hook(self.prepare)
        return module


def normalised(model: Model, mean: Sequence[float], std: Sequence[float], name: str) -> Model:
    """Return a model that normalises its inputs; the model itself without numbers."""
    if not mean:
        return model
    if not isinstance(model, ModuleModel):
        raise ConsilienceError(
            f"`mean` and `std` need a model of one module, got {type(model).__name__} in {name!r}; normalise "
            "inside its trunk."
        )
    return Normalised(model, mean, std)


def built(text: str, arguments: Mapping[str, Any], name: str, trust: bool = False) -> Model:
    """Build the architecture of a card.

    Raises ConsilienceError, with the expert's name, for one that does not exist, whose package is not
    installed, or that is code and is not trusted.
    """
    # A call may have a colon in its arguments, but not before its parenthesis.
    kind, colon, rest = text.partition(":")
    if colon and "(" not in kind:
        if kind == "timm":
            return _of_timm(rest, arguments, name)
        if kind == "transformers":
            return _of_transformers(rest, arguments, name)
        return _of_code(kind, rest, arguments, name, trust)

    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConsilienceError(
            f"the model of expert {name!r} must be a call such as 'mlp(4, (8,), 2)', got {text!r}."
        ) from error
    made = _called(node, text, name)
    if not isinstance(made, Model):
        raise ConsilienceError(f"the model of expert {name!r} must be a call of a model, got {text!r}.")
    return made


def _called(node: ast.expr, text: str, name: str) -> Any:
    """Return the value of a literal, a plain word, or a call of the catalogue, which may have calls in it."""
    if isinstance(node, ast.Name):
        return node.id
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            raise ConsilienceError(
                f"the model of expert {name!r} must have plain arguments, got {ast.unparse(node)!r} in "
                f"{text!r}."
            ) from error

    called = ast.unparse(node.func)
    if called not in CATALOGUE:
        raise unknown("model", called, CATALOGUE, f"those of consilience.models in the card of {name!r}")
    # Calls in it, such as the trunk of a model with heads, are of the catalogue too.
    given = [_called(argument, text, name) for argument in node.args]
    named = {word.arg: _called(word.value, text, name) for word in node.keywords if word.arg}
    with reading(f"the model of expert {name!r} must have arguments that fit", f"got {text!r}"):
        return getattr(models, called)(*given, **named)


def _of_timm(model: str, arguments: Mapping[str, Any], name: str) -> Model:
    """Build a model of timm without weights."""
    try:
        import timm
    except ImportError as error:
        raise ConsilienceError(
            f"expert {name!r} is a model of timm, which is not installed; pip install consilience[vision]."
        ) from error
    # A name may say where weights lie ("hf-hub:...", a URL), and nothing is fetched here.
    if model not in timm.list_models():
        raise ConsilienceError(f"the model of expert {name!r} must be one of timm's, got {model!r}.")
    more = {key: value for key, value in arguments.items() if key not in ("pretrained", "checkpoint_path")}
    with reading(f"the model of expert {name!r} must have arguments that fit", "correct its card"):
        return models.wrap(timm.create_model(model, pretrained=False, **more))


def _of_transformers(kind: str, arguments: Mapping[str, Any], name: str) -> Model:
    """Build a model of transformers from its configuration, without weights and without code of a hub."""
    try:
        import transformers
    except ImportError as error:
        raise ConsilienceError(
            f"expert {name!r} is a model of transformers, which is not installed; pip install transformers."
        ) from error
    if not kind.startswith("AutoModelFor") or not hasattr(transformers, kind):
        raise ConsilienceError(
            f"the model of expert {name!r} must be a class such as AutoModelForImageClassification, got "
            f"{kind!r}."
        )

    # What a card says is built, and never fetched.
    for key in _keys(arguments):
        if key.startswith("_") or key in MAY_NAME_CODE:
            raise ConsilienceError(
                f"the configuration of expert {name!r} must name no code, got {key!r}; leave it out."
            )
    plain = {key: value for key, value in arguments.items() if key != "model_type"}
    with reading(f"the configuration of expert {name!r} must be of transformers", "correct its card"):
        config = transformers.AutoConfig.for_model(arguments["model_type"], **plain)
        module = getattr(transformers, kind).from_config(config, trust_remote_code=False)
        return models.wrap(module, outputs=config.num_labels)


def _keys(arguments: Any) -> Iterator[str]:
    """Yield the names in a configuration, also in the configurations of its parts."""
    if isinstance(arguments, Mapping):
        for key, value in arguments.items():
            yield str(key)
            yield from _keys(value)
    elif isinstance(arguments, list | tuple):
        for value in arguments:
            yield from _keys(value)


def _of_code(module: str, function: str, arguments: Mapping[str, Any], name: str, trust: bool) -> Model:
    """Call a function of a module of the user."""
    if not trust:
        raise ConsilienceError(
            f"the card of expert {name!r} names code, {module}:{function}, which would run as you; give "
            "`trust=True` (--trust) if you know who wrote it, or give the `model`."
        )
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConsilienceError(
            f"the model of expert {name!r} must be a function of an installed module, got {module}:{function}"
            f" ({error})."
        ) from error
    # It may return a torch module, or a model.
    made = call(**arguments)
    return made if isinstance(made, Model) else models.wrap(made)


def text_of(model: Model, name: str) -> str:
    """Return the call that builds a model of the catalogue again.

    Raises ConsilienceError, with the expert's name, for a model that no call of the catalogue makes.

    >>> text_of(models.mlp(4, (8,), 2), "a")
    'mlp(4, (8,), 2)'
    """
    # Built again and compared: not all arguments of all models are in their names.
    text = _written(model)
    try:
        same = _written(built(text, {}, name)) == text
    except ConsilienceError:
        same = False
    if not same:
        raise ConsilienceError(
            f"the model of expert {name!r} must have a name that builds it again, got {text:.80}; give "
            'model="timm:NAME", "transformers:CLASS" or "module:function" with its arguments.'
        )
    return text


def _written(model: Model) -> str:
    """Return what a model is, without which of its entries are frozen."""
    return model.description if isinstance(model, ModuleModel) else repr(model)
