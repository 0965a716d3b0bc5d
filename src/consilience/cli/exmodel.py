"""The command `consilience exmodel`: a stream of experts' files into one model, without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.cli.build import model_of
from consilience.cli.catalogue import resolve
from consilience.cli.choose import progress_line
from consilience.cli.distil import (
    TeacherOptions,
    architecture_of,
    data_of,
    data_parts,
    new_folder,
    options_of,
    order_for,
    origins_of,
    student_parts,
)
from consilience.cli.options import Order, Part, read, take_choice
from consilience.core.errors import ConsilienceError

if TYPE_CHECKING:
    from consilience.core.schedule import Expert
    from consilience.core.source import Source


@dataclass(frozen=True)
class ExModelOptions:
    """Options of the stream.

    Args:
        out: a new folder for exmodel.safetensors with its card, memory.png, report.json and the run.
        name: what the model is called in its card.
        licence: of its weights, for its card.
        device: where to train, such as cpu or cuda:0.
        seed: of all random draws.
        resume: continue the run in --out, with its options and files; if there is none, begin it.
    """

    out: str | None = None
    name: str = "exmodel"
    licence: str = ""
    device: str = "cpu"
    seed: int = 0
    resume: bool = False


NOT_OPTIONS = ("maker", "augment")
OF_MAKERS = ("priors", "start")
"""Arguments of makers that are objects."""
WITH_DATA = "auxiliary"


def exmodel(argv: Sequence[str]) -> int:
    """Send experts to one learner, in the order of the files, and keep what it is then."""
    order, words, maker = understand_exmodel(argv)
    if order is None:
        return 0
    options = ExModelOptions(**options_of(order, ExModelOptions))
    if not words:
        raise ConsilienceError("`consilience exmodel` needs the files of experts, in their order.")
    out = new_folder(options.out, options.resume)

    asked = TeacherOptions(**options_of(order, TeacherOptions))
    experts = [asked.load(word) for word in words]
    with progress_line() as progress:
        say = progress or (lambda _: None)
        say("reading data")
        test = data_of(order, "test")
        made = maker_of(order, maker)
        say(f"distilling {len(experts)} experts, one by one")
        table = run(order, options, experts, made, test, out, origins_of(words, experts))
    print(table)
    print(f"kept in {out}")
    return 0


def understand_exmodel(argv: Sequence[str]) -> tuple[Order | None, list[str], str]:
    """Check the options, and read the paths of the experts and the maker's name.

    There is no order where help was printed.
    """
    given, words = read(argv)
    helping = given.pop("help", None) is not None
    names = {
        key: take_choice(given, key, usual, helping)
        for key, usual in (
            ("student", "auto"),
            ("maker", "inversion"),
            (WITH_DATA, "none"),
            ("test", "none"),
        )
    }

    # Data for another maker would be read, and never used.
    maker = names["maker"]
    if (maker == WITH_DATA) != (names[WITH_DATA] != "none") and not helping:
        raise ConsilienceError(
            f"`--{WITH_DATA}` is the data of `--maker {WITH_DATA}`, got --maker {maker} and "
            f"--{WITH_DATA} {names[WITH_DATA]}; give both."
        )

    parts = [
        *student_parts(names["student"]),
        Part("maker", "maker", maker, maker_called(maker), (*OF_MAKERS, "data")),
        *data_parts(WITH_DATA, names[WITH_DATA]),
        *data_parts("test", names["test"]),
        Part("", "", "exmodel", resolve("method", "exmodel_distillation"), NOT_OPTIONS),
        Part("", "", "exmodel", ExModelOptions),
        Part("", "", "exmodel", TeacherOptions),
    ]
    return order_for("exmodel", parts, given, names, helping), words, maker


def maker_called(name: str) -> Callable[..., Any]:
    """Find the function of a maker; the one that needs data is not among those that need text alone."""
    if name == WITH_DATA:
        from consilience.memory import auxiliary

        return auxiliary
    return resolve("maker", name)


def maker_of(order: Order, name: str) -> Any:
    """Build the maker of synthetic samples."""
    # Its data is read here, since no text can be it.
    (part,) = order.of("maker")
    options = order.options(part)
    if name == WITH_DATA:
        options["data"] = data_of(order, WITH_DATA)
    return part.call(**options)


def run(
    order: Order,
    options: ExModelOptions,
    experts: Sequence[Expert],
    maker: Any,
    test: Source | None,
    out: Path,
    made_from: Sequence[Any],
) -> str:
    """Run the stream, write the model with its card, the memory and a report; return the table."""
    import consilience as cs
    from consilience import experts as room
    from consilience.api import default_model
    from consilience.core.params import write_json
    from consilience.experts import _distil as work
    from consilience.experts._pictures import write_pictures
    from consilience.loop.folder import Log

    # The model is made before any work, for which its card must have a name.
    taught = work.experts_of(experts)
    labels = work.union(taught)
    judged = work.test_of(None, test, labels)
    schedule = work.schedule_of(taught, judged, stream=True)
    model = model_of(order, schedule) or default_model(schedule, cs.methods.average())
    text, arguments = architecture_of(order, model, options.name)
    (part,) = (part for part in order.parts if part.call is resolve("method", "exmodel_distillation"))
    method = cs.methods.exmodel_distillation(maker, **order.options(part))

    result = work.quietly(
        judged,
        lambda: cs.run(
            schedule,
            method,
            model,
            cs.Training(device=options.device),
            seed=options.seed,
            out=out / "run",
            resume=options.resume and Log(out / "run").begun,
        ),
    )
    learner = work.student_of(result, taught, model, options.name)
    rows = [work.row_of(one, judged, labels) for one in taught]
    rows += [work.ensemble_row(taught, judged, labels), work.row_of(learner, judged, labels)]
    # The learner is the last row.
    score = rows[-1].accuracy
    room.save(
        learner,
        out / f"{options.name}.safetensors",
        text,
        arguments,
        licence=options.licence,
        accuracy={} if judged is None or score is None else {f"{judged.name}, test": score},
        made_from=made_from,
    )

    # The memory has what stands for the data of the experts.
    memory = result.agent.state.outer if result.agent is not None else {}
    if "x" in memory and "y" in memory:
        write_pictures(out / "memory.png", memory["x"], memory["y"])
    stages = {
        stage: row for stage, row in zip(result.stages, result.matrix[1:].mean(1).tolist(), strict=True)
    }
    report = {"models": [row._asdict() for row in rows], "labels": list(labels)}
    write_json(out / "report.json", report if judged is None else {**report, "after each expert": stages})
    return work.table_of(rows)
