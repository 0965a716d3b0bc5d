"""The command `consilience distil`: one model of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from consilience.cli.build import as_list, model_of
from consilience.cli.catalogue import resolve
from consilience.cli.choose import progress_line
from consilience.cli.options import (
    NONE,
    Order,
    Part,
    check_options,
    order_of,
    parts_of,
    read,
    take_choice,
)
from consilience.core.errors import ConsilienceError

if TYPE_CHECKING:
    from consilience.api import Result
    from consilience.core.model import Model
    from consilience.core.schedule import Expert
    from consilience.core.source import Source


@dataclass(frozen=True)
class TeacherOptions:
    """Options for files of experts without a card; one with a card needs none of these.

    Args:
        model: the architecture, as in "mlp(64, (16,), 10)".
        classes: the names of the outputs, as in cat,dog.
        space: the label space of these names; files share a class only where their label space is the same.
        shape: of one sample, as in [1, 28, 28].
        trust: import architectures that cards name as code.
    """

    model: str | None = None
    classes: str | None = None
    space: str | None = None
    shape: list[int] | None = None
    trust: bool = False

    def load(self, word: str) -> Expert:
        """Read one expert."""
        from consilience import experts

        # A card says more than the options, which are for files without one.
        known = Path(word).is_file() and experts.card(word) is not None
        labels = None
        if self.classes is not None and not known:
            if self.space is None:
                raise ConsilienceError("`--classes` need their label space; give `--space` too.")
            labels = [(self.space, name.strip()) for name in self.classes.split(",")]
        # These formats have their architecture in them.
        own = Path(word).suffix in (".pt2", ".onnx")
        return experts.load(
            word,
            model=None if known or own else self.model,
            labels=labels,
            shape=None if known else self.shape,
            trust=self.trust,
        )


@dataclass(frozen=True)
class DistilOptions:
    """Options of the student's run.

    Args:
        out: a new folder for student.safetensors with its card, report.json, report.md, and the run.
        name: what the student is called in its card.
        licence: of the student's weights, for its card.
        calibrate: scale gives the logits of all teachers one scale; labels divides those of each by the
            temperature of least cross-entropy on the validation part of --data.
        device: where to train, such as cpu or cuda:0.
        seed: of all random draws.
        resume: continue the run in --out, with its options and files; if there is none, begin it.
    """

    out: str | None = None
    name: str = "student"
    licence: str = ""
    calibrate: Literal["scale", "labels"] | None = None
    device: str = "cpu"
    seed: int = 0
    resume: bool = False


NOT_OPTIONS = ("unlabelled", "temperatures", "augment", "calibrate")
"""What the command fills in, or what is no text."""


def distil(argv: Sequence[str]) -> int:
    """Distil teachers into a student; print and keep what both are worth."""
    order, words = understand_distil(argv)
    if order is None:
        return 0
    options = DistilOptions(**options_of(order, DistilOptions))
    if not words:
        raise ConsilienceError("`consilience distil` needs teachers: files of experts, or folders of runs.")
    out = new_folder(options.out, options.resume)

    # Teachers are read before the data, so that a wrong path costs no time.
    asked = TeacherOptions(**options_of(order, TeacherOptions))
    teachers = [asked.load(word) for word in words]
    with progress_line() as progress:
        say = progress or (lambda _: None)
        say("reading data")
        data, test = data_of(order, "data"), data_of(order, "test")
        made = Distilled(order, options, teachers, data, test)
        made.origins = origins_of(words, made.teachers)
        say(f"distilling {len(teachers)} teachers")
        made.run(out)
    print(made.table)
    print(f"kept in {out}")
    return 0


def understand_distil(argv: Sequence[str]) -> tuple[Order | None, list[str]]:
    """Check the options, and read the paths of the teachers; None where help was printed."""
    given, words = read(argv)
    helping = given.pop("help", None) is not None
    if not given.get("data") and not helping:
        raise ConsilienceError("`--data` must be a folder or file of inputs, or a name of the catalogue.")
    names = {
        key: take_choice(given, key, usual, helping)
        for key, usual in (("data", "digits"), ("test", "none"), ("student", "auto"))
    }
    parts = [
        *data_parts("data", names["data"]),
        *data_parts("test", names["test"]),
        *student_parts(names["student"]),
        Part("", "", "distil", resolve("method", "distil"), NOT_OPTIONS),
        Part("", "", "distil", DistilOptions),
        Part("", "", "distil", TeacherOptions),
    ]
    return order_for("distil", parts, given, names, helping), words


def order_for(
    command: str,
    parts: Sequence[Part],
    given: Mapping[str, str | None],
    names: Mapping[str, str],
    helping: bool,
) -> Order | None:
    """Check and parse the options of some parts; None where help was printed."""
    options = {key: parameter for part in parts for key, parameter in part.options().items()}
    check_options(command, given, [*options, *names], helping)
    # What is shown of choices is their catalogue; paths and dotted names are allowed too.
    return order_of(command, parts, options, given, {key: names[key] for key in names}, helping)


def options_of(order: Order, kind: type) -> dict[str, Any]:
    """Return the values of the options of a dataclass."""
    # Each command has one part per dataclass of options.
    (part,) = (part for part in order.parts if part.call is kind)
    return order.options(part)


def new_folder(out: str | None, resume: bool = False) -> Path:
    """Return a folder that does not exist yet, or is empty; with `resume` also one that has a run."""
    if not out:
        raise ConsilienceError("`--out` must be a new folder.")
    place = Path(out)
    if resume and (place / "run").is_dir():
        return place
    # Files of two students in one folder could be taken for each other.
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConsilienceError(f"`--out` must be a new folder, and {out} exists.")
    return place


def student_parts(name: str) -> list[Part]:
    """List the functions that make a student."""
    return [replace(part, key=part.key.replace("model", "student", 1)) for part in parts_of("model", name)]


def data_parts(key: str, name: str) -> list[Part]:
    """List the function that reads data: of the catalogue, of an .npz file, or of a folder of images."""
    if name in NONE:
        return []
    # A folder or file is read by the function that fits it, whose options are checked as those of a data set.
    path = Path(name)
    if path.is_dir():
        return [Part(key, key, path.name, images_in(path))]
    if path.suffix == ".npz" and path.is_file():
        return [Part(key, key, path.name, arrays_in(path))]
    return [replace(part, choice=key, key=key) for part in parts_of("data", name)]


def data_of(order: Order, key: str) -> Any:
    """Read data, or return None."""
    parts = order.of(key)
    return as_list(parts[0].call(**order.options(parts[0])))[0] if parts else None


def arrays_in(path: Path) -> Callable[..., Source]:
    """Make a function that reads an .npz file, with the options of `--data`."""

    def arrays(flat: bool = False, limit: int | None = None, space: str | None = None) -> Source:
        """Read an .npz file of images.

        Args:
            flat: inputs are vectors.
            limit: number of training examples; none is all.
            space: the label space of its classes.
        """
        from consilience import data

        return data.npz(path, flat=flat, limit=limit, space=space)

    return arrays


def images_in(folder: Path) -> Callable[..., Any]:
    """Make a function that reads a folder of images, with the options of `--data`."""

    def images(
        size: int | None = None, grey: bool = False, flat: bool = False, space: str | None = None
    ) -> Any:
        """Read a folder of images: its subfolders are classes; without any, images are unlabelled.

        Args:
            size: height and width that images are resized to.
            grey: one channel.
            flat: inputs are vectors.
            space: the label space of the classes.
        """
        from consilience import data
        from consilience.data._sources import Reading, is_image, pictures, subfolders

        def shaped(x: Any) -> Any:
            return x.flatten(1) if flat else x

        if subfolders(folder):
            return data.folder(folder, size=size, grey=grey, space=space).map(x=shaped)
        import torch

        # Without classes there is nothing to judge by, and the inputs are all that there is.
        files = sorted(file for file in folder.iterdir() if is_image(file))
        if not files:
            raise ConsilienceError(f"`--data` must hold images, or a subfolder per class, got {folder}.")
        blank = torch.zeros(len(files), dtype=torch.long)
        return shaped(pictures(files, blank, Reading(size, grey, True, 0, "refuse")).whole()[0])

    return images


class Distilled:
    """A student before and after its run."""

    def __init__(
        self, order: Order, options: DistilOptions, teachers: Sequence[Expert], data: Any, test: Any
    ) -> None:
        from consilience.api import default_model
        from consilience.experts import _distil as work
        from consilience.methods import average

        self.options, self.data, self.test = options, data, test
        self.origins: list[Any] = []
        # Sizes of the student come from the inputs of the teachers and the classes of all.
        self.teachers = work.experts_of(teachers)
        schedule = work.schedule_of(self.teachers, None, stream=False)
        self.student = model_of(order, schedule) or default_model(schedule, average())
        self.text, self.arguments = architecture_of(order, self.student, options.name)
        (method,) = (part for part in order.parts if part.call is resolve("method", "distil"))
        self.method = order.options(method)
        self.table = ""

    def run(self, out: Path) -> Result:
        """Distil, and write the student with its card and a report."""
        import consilience as cs
        from consilience import experts
        from consilience.core.params import write_bytes, write_json
        from consilience.experts import _distil as work
        from consilience.loop.folder import Log

        result = cs.distil(
            self.teachers,
            self.student,
            self.data,
            test=self.test,
            calibrate=self.options.calibrate,
            training=cs.Training(device=self.options.device),
            seed=self.options.seed,
            out=out / "run",
            resume=self.options.resume and Log(out / "run").begun,
            **self.method,
        )
        labels = work.union(self.teachers)
        test = work.test_of(self.data, self.test, labels)
        student = work.student_of(result, self.teachers, self.student, self.options.name)
        rows = [work.row_of(teacher, test, labels) for teacher in self.teachers]
        rows += [work.ensemble_row(self.teachers, test, labels), work.row_of(student, test, labels)]

        # The student is the last row.
        score = rows[-1].accuracy
        experts.save(
            student,
            out / "student.safetensors",
            self.text,
            self.arguments,
            licence=self.options.licence,
            accuracy={} if test is None or score is None else {f"{test.name}, test": score},
            made_from=self.origins,
        )
        self.table = work.table_of(rows)
        write_json(out / "report.json", {"models": [row._asdict() for row in rows], "labels": list(labels)})
        write_bytes(out / "report.md", f"# One model of several\n\n```\n{self.table}\n```\n".encode())
        return result


def origins_of(words: Sequence[str], teachers: Sequence[Expert]) -> list[Any]:
    """Return the cards of teachers, and the origins of those without one."""
    from consilience import experts
    from consilience.experts._distil import origin_of

    cards = [experts.card(word) if Path(word).is_file() else None for word in words]
    return [card or origin_of(teacher) for card, teacher in zip(cards, teachers, strict=True)]


def architecture_of(order: Order, model: Model, name: str) -> tuple[str | None, dict[str, Any]]:
    """Return how a card names the student where it is code of the user, with its arguments.

    Raises ConsilienceError before any work for a model that no card can name.
    """
    from consilience.experts._architecture import text_of

    # Names of the catalogue have no dots.
    code = [part for part in order.of("model") if "." in part.name]
    if not code:
        text_of(model, name)
        return None, {}
    part = code[-1]
    module, _, function = part.name.rpartition(".")
    return f"{module}:{function}", order.options(part)
