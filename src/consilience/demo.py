"""The demonstration: every setting on scikit-learn's handwritten digits, two or three methods each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from consilience.core.errors import Interrupted

if TYPE_CHECKING:
    from consilience.api import Result
    from consilience.core.method import Method
    from consilience.core.schedule import Schedule
    from consilience.core.training import Training


class Scene(NamedTuple):
    """One setting with the methods to compare in it."""

    title: str
    schedule: Schedule
    training: Training
    methods: tuple[Method, ...]


def scenes() -> list[Scene]:
    """Make one scene per setting, and two for continual learning."""
    from consilience import data, methods, settings
    from consilience.core.training import Training

    # All scenes take parts of the same 1,797 images, so that the whole demonstration lasts a minute.
    digits = data.digits()
    tasks = data.split_classes(digits, 5)
    skewed = data.dirichlet(digits, 10, alpha=0.1, seed=1)
    thirds = data.iid(digits, 3)
    return [
        Scene(
            "multi-task: three permutations of the pixels, all in every step",
            settings.multitask(data.permute(digits, 3), scenario="domain", rounds=4),
            Training(epochs=5, lr=0.1),
            (methods.finetune(), methods.pcgrad()),
        ),
        Scene(
            "continual: five pairs of digits one after another, no task label",
            settings.continual(tasks, scenario="class"),
            Training(epochs=10, lr=0.05),
            (methods.finetune(), methods.ewc(), methods.er(), methods.joint()),
        ),
        # New classes need rehearsal; where only the inputs change, a penalty such as EWC is enough.
        Scene(
            "continual: five permutations of the pixels one after another, no task label",
            settings.continual(data.permute(digits, 5), scenario="domain"),
            Training(epochs=10, lr=0.1),
            (methods.finetune(), methods.ewc(strength=30.0), methods.er()),
        ),
        Scene(
            "federated: ten clients with few classes each (Dirichlet 0.1)",
            settings.federated(skewed, rounds=20),
            Training(epochs=5, lr=0.1),
            (methods.fedavg(), methods.fedprox(), methods.fed3r()),
        ),
        Scene(
            "federated continual: three clients meet five pairs of digits one after another",
            settings.federated_continual([data.split_classes(third, 5) for third in thirds], rounds=3),
            Training(epochs=5, lr=0.05),
            (methods.finetune(), methods.ewc(), methods.er()),
        ),
        # A coefficient above 1 makes up for what experts of different data cancel in each other.
        Scene(
            "merging: three models trained apart from one start, merged once",
            settings.merging(data.dirichlet(digits, 3, alpha=0.5)),
            Training(epochs=20, lr=0.1),
            (methods.average(), methods.task_arithmetic(1.5), methods.ties()),
        ),
        Scene(
            "ex-model: trained models come one at a time, their data is gone",
            settings.exmodel(sources=tasks),
            Training(epochs=5, lr=0.05),
            (methods.parameter_average(), methods.entropy_ensemble(), methods.oracle_ensemble()),
        ),
        Scene(
            "SKILL: five agents learn a pair of digits each, share small heads, and map inputs to tasks",
            settings.skill(tasks),
            Training(epochs=10, lr=0.1),
            (
                replace(methods.skill("nearest_mean"), name="skill, nearest mean"),
                replace(methods.skill("gaussian_mixture"), name="skill, Gaussian mixture"),
            ),
        ),
    ]


def stopped(scenes_done: int, results: int, out: Path) -> str:
    """Say what an interrupted demonstration leaves, and how to go on."""
    # Scenes last seconds, so that they are run again, and not resumed.
    again = f"`consilience demo --out {out}` begins again (it takes a minute)"
    if not results:
        return f"interrupted in the first scene, nothing was written; {again}."
    kept = f"{results} result{'s' * (results > 1)} of {scenes_done} finished scene{'s' * (scenes_done > 1)}"
    return (
        f"interrupted; {kept} are in {out}: `consilience report {out}` makes a report of them, and {again}."
    )


def demo(out: str | Path = "demo", say: Callable[[str], object] = print) -> list[Result]:
    """Run all scenes, print one table per scene, and write `out`/report.html in place of an older one."""
    from consilience import report
    from consilience.api import run
    from consilience.core.params import write_json

    results: list[Result] = []
    for number, scene in enumerate(scenes(), 1):
        say(f"\n{scene.title}")
        try:
            found = [run(scene.schedule, method, training=scene.training) for method in scene.methods]
        except (KeyboardInterrupt, Interrupted) as error:
            raise Interrupted(stopped(number - 1, len(results), Path(out))) from error
        for method, result in zip(scene.methods, found, strict=True):
            # A name such as "skill, nearest mean" is awkward to type as a folder.
            folder = f"{number}-{scene.schedule.setting}/{method.name.replace(',', '').replace(' ', '_')}"
            write_json(Path(out) / folder / "result.json", result.to_json())
        say(report.table(found))
        results += found

    title = "Consilience: every setting on handwritten digits"
    say(f"\nwrote {report.write(results, Path(out) / 'report.html', title)}")
    return results
