"""Experts as files: trained models with a card that says what they are, what they know and how to run them.

Nothing here imports torch before it is called, so that the command line answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from consilience import lazy
from consilience.core.errors import suggest_arguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from consilience.api import Result
    from consilience.core.schedule import Expert
    from consilience.core.source import Label, Source
    from consilience.core.training import Training
    from consilience.experts._card import Card as Card
    from consilience.experts._suggest import Suggestion as Suggestion
else:
    __getattr__, __dir__ = lazy.attach(__name__)

__all__ = ["card", "distil", "load", "save", "suggest", "train"]


def save(
    expert: Expert,
    path: str | Path,
    model: Any = None,
    arguments: Mapping[str, Any] | None = None,
    data: str = "",
    licence: str = "",
    accuracy: Mapping[str, float] | None = None,
    made_from: Sequence[Any] = (),
) -> Path:
    """Write an expert as safetensors with its card, completely or not at all.

    The card (JSON in the metadata) has the architecture, what each output means, which classes it was trained
    on, shape and type of a sample, and the normalisation of inputs. For a `path` that is an ONNX file or an
    archive of torch.export, the card is written next to it. Nothing is pickled.

    Args:
        expert: with its `model`, or give the latter here.
        path: a file of safetensors.
        model: the expert's model, or the name of an architecture that no call of `consilience.models` makes:
            "timm:NAME", "transformers:CLASS", or "module:function", which readers must trust.
        arguments: of such a name, as JSON has them; for transformers the configuration.
        data: the name of the training data; "": that of the expert's source.
        licence: of the weights.
        accuracy: scores in [0, 1], by what they were measured on.
        made_from: cards of the experts that it was merged or distilled from.

    Raises:
        ConsilienceError: no architecture; entries that do not fit it or are not finite; a file that cannot be
            written.

    >>> import tempfile
    >>> import consilience as cs
    >>> result = cs.run(cs.settings.continual([cs.data.digits()]), cs.methods.finetune(),
    ...                 cs.models.mlp(64, (16,)), cs.Training(epochs=1))
    >>> expert = cs.Expert("digits", result.params, cs.data.digits(), model=cs.models.mlp(64, (16,)))
    >>> path = save(expert, f"{tempfile.mkdtemp()}/digits.safetensors", accuracy={"test": result.score})
    >>> card(path).model, load(path).name
    ('mlp(64, (16,), 10)', 'digits')
    """
    from dataclasses import replace

    from consilience import models
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.core.model import Model
    from consilience.core.schedule import Expert
    from consilience.experts._architecture import built
    from consilience.experts._files import card_for, origins
    from consilience.experts._files import save as write

    if not isinstance(expert, Expert):
        raise ConsilienceError(f"`expert` must be Expert(name, params, source), got {kind_of(expert)}.")
    # A text may name an architecture that the expert's model was made by.
    given = expert.model if expert.model is not None else model
    text = model if isinstance(model, str) else None
    if isinstance(given, str):
        # Who types the name of code means it; the file cannot be read without it either.
        given = built(given, arguments or {}, expert.name, trust=True)
    if given is None:
        raise ConsilienceError(f"the `model` of expert {expert.name!r} must be given, got none.")
    made = given if isinstance(given, Model) else models.wrap(given)
    facts = {
        "data": data or expert.source.name,
        "licence": licence,
        "accuracy": dict(accuracy or {}),
        "made_from": origins(made_from),
    }
    # The source's name is that of the data, where nothing else is said.
    one = replace(expert, model=made)
    return write(one, Path(path), card_for(one, made, text, arguments or {}, **facts), made)


def load(
    path: str | Path,
    model: Any = None,
    labels: Sequence[Label] | Source | None = None,
    shape: Sequence[int] | None = None,
    source: Source | None = None,
    trust: bool = False,
    name: str | None = None,
) -> Expert:
    """Read an expert with its model from a file, or from the folder of a run. No code and no pickle is read.

    Files are safetensors, torch's (.pth, .pt, .ckpt, .bin: tensors by name, by `weights_only`), archives of
    torch.export (.pt2) and ONNX. The last two are read without `torch.export.load` and without a runtime:
    operators of a list are computed by torch, so that answers have gradients. What a file or its card
    (`FILE.card.json` next to it) does not say must be given.

    Args:
        path: the file or folder.
        model: the architecture, for a file without a card: a model, a torch module, or a call such as
            "mlp(64, (16,), 10)".
        labels: what its outputs mean, in the place of what the card says: (label space, class) each, or a
            source that has them.
        shape: the shape of one sample, where nothing says it.
        source: data to judge it on; None: a source without data.
        trust: import an architecture that the card names as code.
        name: what to call it; None: as its card, or its file.

    Raises:
        ConsilienceError: by the expert's name: no card and nothing given; entries that do not fit, are not
            finite or not those of the card; an operator that is not in the list; anything that needs a
            pickle or code.
    """
    from consilience.experts._files import load as read

    return read(Path(path), model, labels, shape, source, trust, name)


def card(path: str | Path) -> Card | None:
    """Return the card of an expert's file, without its weights; None where it has none."""
    from consilience.experts._card import card_of

    return card_of(path)


def distil(
    teachers: Sequence[Expert | str | Path],
    student: Any,
    data: Any,
    test: Source | None = None,
    calibrate: Literal["scale", "labels"] | None = None,
    base: Mapping[str, Any] | None = None,
    training: Training | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Any = None,
    **options: Any,
) -> Result:
    """Make one model of several: distil teachers, of any architecture and classes, into a student.

    The student answers over the classes of all teachers, `result.labels`. For a class that several know, the
    mean of their logits is learned. It is a run of `methods.distil` in the setting `merging`.

    Args:
        teachers: experts with models, or paths of their files.
        student: a model, a torch module, a function that makes one; None: one that fits the data.
        data: inputs to learn on [N, ...], whose labels are not read: a source, a tensor, an array, ...
        test: a source of classes to judge the student by; None: the test part of `data`, if it has classes
            that a teacher knows.
        calibrate: "scale" gives the logits of all teachers one scale; "labels" divides those of each by the
            temperature of least cross-entropy on the validation part of `data`.
        base: entries that the student begins from, such as those of a teacher; None draws them.
        training: for its `device` and `precision`.
        seed, out, resume, progress: as in `run`.
        options: of `methods.distil`, such as `steps`, `temperature`, `of`, `features` and `augment`.

    Raises:
        ConsilienceError: by the teacher's name: without a model, of other inputs, answers that are not
            finite.

    >>> import consilience as cs
    >>> digits = cs.data.digits()
    >>> teachers = []
    >>> for part in cs.data.split_classes(digits, 2):
    ...     model, one = cs.models.mlp(64, (32,)), cs.settings.continual([part])
    ...     result = cs.run(one, cs.methods.finetune(), model)
    ...     teachers.append(cs.Expert(part.name, result.params, part, model=model))
    >>> result = cs.distil(teachers, cs.models.mlp(64, (16,)), digits, steps=300, lr=0.01)
    >>> result.score > 0.6, len(result.labels)
    (True, 10)
    """
    # What `run` takes passes through as it is.
    from consilience.experts._distil import distil as run_it

    running = {"training": training, "seed": seed, "out": out, "resume": resume, "progress": progress}
    return run_it(teachers, student, data, test, calibrate, base, running, **options)


def train(
    data: Source | Sequence[Source],
    out: str | Path,
    model: Any = None,
    training: Training | None = None,
    scenario: Literal["joint", "nc", "mt", "ni", "nic"] = "nc",
    experts: int = 5,
    seeds: int = 1,
    licence: str = "",
    resume: bool = False,
    progress: Callable[[str], object] | None = None,
) -> list[Path]:
    """Train streams of experts as in the ex-model paper, and save each with its card: OUT/seed-0/expert-0.

    All experts of a stream begin from the same weights. Carta et al. 2022.

    Args:
        data: a source of classes, which the scenario splits; or the sources of the experts.
        out: a folder, with a folder for each seed.
        model: as in `run`; None: one that fits the data.
        training: as in `run`.
        scenario: "joint": one expert for all classes; "nc": new classes, in an order of the seed; "mt": the
            same with task labels; "ni": new instances, dealt at random; "nic": some classes of some of the
            instances.
        experts: how many.
        seeds: how many streams, with seeds from 0.
        licence: of the weights, for the cards.
        resume: keep the experts that are there, and train the others.
        progress: called with a line before each expert.

    Raises ConsilienceError as `run` does, and for a folder that has experts already.
    """
    from consilience.core.checks import whole_number
    from consilience.experts._train import train as one_stream

    # Each seed draws an order of classes, first weights and batches of its own.
    whole_number(seeds=seeds)
    found = []
    for seed in range(seeds):
        place, chosen = Path(out) / f"seed-{seed}", (scenario, experts, seed)
        found += one_stream(data, place, model, training, chosen, licence, resume, progress)
    return found


def suggest(
    folder: str | Path,
    wanted: Sequence[str | Label],
    data: Any = None,
    budget: int | None = None,
    trust: bool = False,
) -> Suggestion:
    """Say which experts in a folder to use for some classes, each with the reason: a `Suggestion`.

    Experts are taken one after another, each time the one with the largest expected gain: the sum over wanted
    classes of how much better it is expected to know them than those before it do. A class is known by the
    similarity of its name x the accuracy of the card (a half without one) x the agreement, which is 1 without
    data. Only cards are read, and with `data` the experts too.

    Args:
        folder: with files of experts, also in subfolders.
        wanted: names of classes, or (label space, name) for exactly that class.
        data: unlabelled inputs, to see how often an expert answers as others do about their common classes.
        budget: the most experts to suggest; None: all that add something.
        trust: import architectures that cards name as code; only with `data`.

    Raises ConsilienceError for a folder without cards.
    """
    from consilience.experts._suggest import suggest as choose

    return choose(Path(folder), wanted, data, budget, trust)


suggest_arguments(__name__)
