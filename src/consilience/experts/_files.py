"""Files of experts: written whole with a card, and read from safetensors, torch, torch.export and ONNX."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consilience import models, report
from consilience.core.errors import ConsilienceError
from consilience.core.model import Model
from consilience.core.params import Params, content_hash, finite, write_json
from consilience.core.params import load as load_tensors
from consilience.core.params import save as save_tensors
from consilience.core.schedule import Expert
from consilience.core.source import Label, Source, Tensors
from consilience.experts._architecture import FROM_FILE, Normalised, built, normalised, text_of
from consilience.experts._card import KEY, SUFFIX, Card, Origin, card_of
from consilience.experts._graph import Graph, graph_of, sample_inputs
from consilience.loop.session import saved_agents
from consilience.merging._files import TORCH, loaded, stem
from consilience.models.module import ModuleModel

GRAPHS = (".pt2", ".onnx")
"""Formats that have their architecture in them."""


# Writing.


def save(expert: Expert, path: Path, card: Card, model: Model) -> Path:
    """Write a file of safetensors with its card, or the card of a file of another format next to it."""
    if path.suffix in GRAPHS:
        if not path.is_file():
            raise ConsilienceError(
                f"a {path.suffix} file must be exported by torch, got none at {path}; its card is then "
                "written next to it."
            )
        write_json(path.with_name(path.name + SUFFIX), replace(card, model=FROM_FILE).to_json())
        return path
    if path.suffix != ".safetensors":
        raise ConsilienceError(f"an expert must be saved as .safetensors, got {path.name!r}.")
    tensors = entries_of(expert, model)
    finite(tensors, f"the expert {expert.name!r}")
    card = replace(card, content=content_hash(tensors))
    save_tensors(path, tensors, {KEY: json.dumps(card.to_json()), "format": "pt"})
    return path


def card_for(
    expert: Expert, model: Model, text: str | None, arguments: Mapping[str, Any], **facts: Any
) -> Card:
    """Return the card of an expert; `text` names an architecture that is not of the catalogue."""
    source = expert.source
    own = tuple(source.labels[target] for target in source.classes)
    labels = expert.labels
    # A model with as many outputs as its source has classes answers with these, in their order.
    if labels == source.labels and len(own) == model.outputs < len(labels):
        labels = own
    if len(labels) > model.outputs:
        raise ConsilienceError(
            f"an expert's labels must be as many as its model's outputs, got {len(labels)} and "
            f"{model.outputs} in {expert.name!r}; say what its outputs mean with `labels=`."
        )
    lacking = [label for label in own if label not in labels]
    if lacking:
        raise ConsilienceError(
            f"an expert must have an output for each class of its source, got none for {lacking[0]} in "
            f"{expert.name!r}."
        )

    # One sample says what all are like.
    x, _ = source.train.first()
    shape = tuple(x.shape[1:]) if isinstance(x, Tensor) else None
    inner, mean, std = model, (), ()  # type: tuple[Model, tuple[float, ...], tuple[float, ...]]
    if isinstance(model, Normalised):
        inner, mean, std = model.inner, model.prepare.mean, model.prepare.std
    of_file = isinstance(getattr(inner, "module", None), Graph)
    return Card(
        name=expert.name,
        model=FROM_FILE if of_file else text or text_of(inner, expert.name),
        labels=labels,
        classes=tuple(labels.index(label) for label in own),
        task=source.task,
        shape=shape,
        dtype=str(x.dtype).removeprefix("torch."),
        mean=mean,
        std=std,
        arguments=dict(arguments),
        **facts,
    )


def entries_of(expert: Expert, model: Model) -> Params:
    """Return all entries of an expert under the names that its model has for them.

    Raises ConsilienceError, by the expert's name, where one is missing, has another shape, or is unknown.
    """
    given = model.entries_of({**expert.params, **expert.buffers})
    params, buffers = model.init(torch.Generator().manual_seed(0))
    found: Params = {}
    for name, like in {**params, **buffers}.items():
        # What the model makes by itself need not be in a file.
        if name not in given and (model.derived(name) or model.frozen(name)):
            continue
        if name not in given:
            raise ConsilienceError(
                f"expert {expert.name!r} must have all entries of its model, got none called {name!r}."
            )
        found[name] = torch.as_tensor(given[name]).detach()
        if found[name].shape != like.shape:
            raise ConsilienceError(
                f"expert {expert.name!r} must have the shapes of its model, got {tuple(found[name].shape)} "
                f"for {name!r}, where the model has {tuple(like.shape)}."
            )
    for name in given.keys() - found.keys():
        # Heads come with their tasks, so that a new model has none.
        if model.task_of(name) is None and not (name in params or name in buffers):
            raise ConsilienceError(
                f"expert {expert.name!r} must have no entries but its model's, got {name!r}."
            )
        found[name] = torch.as_tensor(given[name]).detach()
    return found


def origins(made_from: Sequence[Any]) -> tuple[Origin, ...]:
    """Return what an expert was made from, from cards or origins."""
    return tuple(
        Origin(one.name, one.content, one.data, one.licence) if isinstance(one, Card) else Origin(*one)
        for one in made_from
    )


# Reading.


def load(
    path: Path,
    model: Any,
    labels: Sequence[Label] | Source | None,
    shape: Sequence[int] | None,
    source: Source | None,
    trust: bool,
    name: str | None,
) -> Expert:
    """Read an expert; see `consilience.experts.load`."""
    if not path.exists():
        raise ConsilienceError(f"an expert must be a file, or the folder of a run, got nothing at {path}.")
    # As the Hugging Face hub has a model: named by its folder.
    inner = path / "model.safetensors"
    path = inner if inner.is_file() else path
    card = _card(path, model, labels, name)
    name = card.name
    if shape is not None:
        card = replace(card, shape=tuple(shape))
    made: Any
    if path.suffix in GRAPHS:
        made, card = _of_graph(path, card, model)
        tensors = dict(made.module.state_dict())
    else:
        made = models.wrap(model) if isinstance(model, nn.Module) else model
        if not isinstance(made, Model):
            made = built(model or card.model, card.arguments, name, trust)
        tensors = _tensors(path, card)
    if len(card.labels) > made.outputs:
        raise ConsilienceError(
            f"expert {name!r} must have an output for each label, got {made.outputs} outputs and "
            f"{len(card.labels)} labels."
        )

    finite(tensors, f"the expert {name!r}")
    made = normalised(made, card.mean, card.std, name)
    # The columns of a head are no parameters, and no model without heads has them.
    buffers = {*made.init(torch.Generator().manual_seed(0))[1]}
    own = made.entries_of(tensors)
    held = {entry for entry in own if entry in buffers or entry.endswith(".columns")}
    expert = Expert(
        name,
        {entry: own[entry] for entry in own if entry not in held},
        source or blank(card),
        {entry: own[entry] for entry in held},
        card.labels,
        made,
    )
    entries_of(expert, made)
    return expert


def _card(path: Path, model: Any, labels: Sequence[Label] | Source | None, name: str | None) -> Card:
    """Return the card of a file or of a run's folder, with what was given in the place of what it says."""
    card = card_of(path) if path.is_file() else _card_of_run(path)
    name = name or (card.name if card is not None else stem(path).partition(".")[0])
    own = path.suffix in GRAPHS

    # Only what the file does not say must be given.
    missing = ["labels"] * (labels is None and card is None)
    missing += ["model"] * (model is None and not own and (card is None or not card.model))
    if missing:
        listed = " and ".join(f"`{one}`" for one in missing)
        words = {
            "labels": "what its outputs mean (--classes)",
            "model": "its architecture (--model)",
        }
        hint = ", ".join(words[one] for one in missing)
        raise ConsilienceError(
            f"expert {name!r} must have a card, got {path} without one; give {listed}: {hint}."
        )

    if isinstance(labels, Source):
        source, labels = labels, labels.labels
        classes = source.classes
    else:
        classes = () if card is None or labels is not None else card.classes
    if card is None:
        assert labels is not None
        return Card(name, FROM_FILE if own else str(model), tuple(labels), classes)
    if labels is None:
        return replace(card, name=name)
    return replace(card, name=name, labels=tuple(labels), classes=classes)


def _card_of_run(folder: Path) -> Card | None:
    """Return what the result of a run says of its agent; it does not say the arguments of its model."""
    if not (folder / "result.json").is_file():
        return None
    result = report.load(folder)
    if not result.labels:
        return None
    name = folder.resolve().name
    return Card(name, "", result.labels, data=result.data)


def _tensors(path: Path, card: Card) -> Params:
    """Read the entries of an expert, and check them against its card."""
    if path.is_dir():
        # A run of several agents would need a choice among them.
        agents = saved_agents(path)
        if len(agents) != 1:
            got = ", ".join(agents) or "none"
            raise ConsilienceError(
                f"the folder of a run must hold the weights of one agent, but {path} has {got}."
            )
        (state,) = agents.values()
        return {**state.params, **state.buffers}

    if path.suffix in TORCH:
        return dict(loaded(path))
    if path.suffix != ".safetensors":
        raise ConsilienceError(
            f"an expert must be .safetensors, {', '.join((*GRAPHS, *TORCH))} or the folder of a run, got "
            f"{path.name!r}."
        )

    tensors, _ = load_tensors(path)
    if card.content and content_hash(tensors) != card.content:
        raise ConsilienceError(
            f"the entries of expert {card.name!r} must be those of its card, got others in {path}: it was "
            "damaged, or changed by another program; give the `model` and `labels` of a copy without a card."
        )
    return tensors


def _of_graph(path: Path, card: Card, model: Any) -> tuple[ModuleModel, Card]:
    """Return the model that is in a file of another format, and its card with the shape of a sample."""
    if model is not None:
        raise ConsilienceError(
            f"`model` has no effect on {path.name}, which has its architecture in it; leave it out."
        )
    if path.suffix == ".pt2":
        from consilience.experts._exported import program_of
    else:
        from consilience.experts._onnx import program_of
    program = program_of(path, card.name)
    if program.shape is not None and card.shape not in (None, program.shape):
        raise ConsilienceError(
            f"the card of expert {card.name!r} must have the shape of its file, got {card.shape} and "
            f"{program.shape}."
        )

    shape = program.shape or card.shape
    graph = graph_of(replace(program, shape=shape), card.name)
    outputs = len(card.labels)
    if shape is not None:
        with torch.no_grad():
            outputs = graph(sample_inputs(replace(program, shape=shape), 1)).shape[1]
    made = ModuleModel(graph, outputs, name=f"{FROM_FILE}({path.name})")
    return made, replace(card, shape=shape, dtype=str(program.dtype).removeprefix("torch."))


def blank(card: Card) -> Source:
    """Return a source without data for an expert: one sample of zeros, on which nobody trains.

    Raises ConsilienceError where nothing says which shape a sample has.
    """
    if card.shape is None:
        raise ConsilienceError(
            f"what expert {card.name!r} takes must be known, got no shape of a sample in its card; give "
            "`shape`, or a `source`."
        )
    dtype = getattr(torch, card.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConsilienceError(f"the type of samples of {card.name!r} must be torch's, got {card.dtype!r}.")
    # A source must have a training example with a target.
    x, y = torch.zeros(1, *card.shape, dtype=dtype), torch.tensor([card.classes[0]])
    one, none = Tensors(x, y), Tensors(x[:0], y[:0])
    return Source(card.name, one, none, none, card.labels, card.classes, task=card.task)
