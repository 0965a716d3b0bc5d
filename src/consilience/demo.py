"""The demonstration: every setting on scikit-learn's handwritten digits, two or three methods each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.core.method import Method
    from consilience.core.schedule import Schedule
    from consilience.core.training import Training
    from consilience.loop.result import Result

Scene = tuple[str, "Schedule", "Training", tuple["Method", ...]]


def scenes() -> list[Scene]:
    """For every setting: what it shows, the schedule, the training and the methods."""
    from consilience import data, methods, settings
    from consilience.core.training import Training

    digits = data.digits()
    tasks = data.split_classes(digits, 5)
    skewed = data.dirichlet(digits, 10, alpha=0.1, seed=1)
    thirds = data.iid(digits, 3)
    return [
        (
            "multi-task: three permutations of the pixels, all in every step",
            settings.multitask(data.permute(digits, 3), scenario="domain", rounds=4),
            Training(epochs=5, lr=0.1),
            (methods.finetune(), methods.pcgrad()),
        ),
        (
            "continual: five pairs of digits one after another, no task label",
            settings.continual(tasks, scenario="class"),
            Training(epochs=10, lr=0.05),
            (methods.finetune(), methods.ewc(), methods.er(), methods.joint()),
        ),
        (
            "continual: five permutations of the pixels one after another, no task label",
            settings.continual(data.permute(digits, 5), scenario="domain"),
            Training(epochs=10, lr=0.1),
            (methods.finetune(), methods.ewc(strength=30.0), methods.er()),
        ),
        (
            "federated: ten clients with few classes each (Dirichlet 0.1)",
            settings.federated(skewed, rounds=20),
            Training(epochs=5, lr=0.1),
            (methods.fedavg(), methods.fedprox(), methods.fed3r()),
        ),
        (
            "federated continual: three clients meet five pairs of digits one after another",
            settings.federated_continual([data.split_classes(s, 5) for s in thirds], rounds=3),
            Training(epochs=5, lr=0.05),
            (methods.finetune(), methods.ewc(), methods.er()),
        ),
        (
            "merging: three models trained apart from one start, merged once",
            settings.merging(data.dirichlet(digits, 3, alpha=0.5)),
            Training(epochs=20, lr=0.1),
            (methods.average(), methods.task_arithmetic(1.5), methods.ties()),
        ),
        (
            "ex-model: trained models come one at a time, their data is gone",
            settings.exmodel(sources=tasks),
            Training(epochs=5, lr=0.05),
            (methods.parameter_average(), methods.entropy_ensemble(), methods.oracle_ensemble()),
        ),
        (
            "SKILL: five agents learn a pair of digits each, share small heads, and map inputs to tasks",
            settings.skill(tasks),
            Training(epochs=10, lr=0.1),
            (
                replace(methods.skill("nearest_mean"), name="skill, nearest mean"),
                replace(methods.skill("gaussian_mixture"), name="skill, Gaussian mixture"),
            ),
        ),
    ]


def demo(out: str | Path = "demo", say: Callable[[str], object] = print) -> list[Result]:
    """Run all scenes, print a table for each, and write `out`/report.html in place of an older one."""
    from consilience import report
    from consilience.core.params import write_json
    from consilience.loop.run import run

    results: list[Result] = []
    for i, (title, schedule, training, methods) in enumerate(scenes()):
        say(f"\n{title}")
        found = [run(schedule, m, training=training) for m in methods]
        for m, r in zip(methods, found, strict=True):
            folder = m.name.replace(",", "").replace(" ", "_")
            write_json(Path(out) / f"{i + 1}-{schedule.setting}" / folder / "result.json", r.to_json())
        say(report.table(found))
        results += found
    say(
        f"\nwrote {report.write(results, Path(out) / 'report.html', 'Consilience: every setting on handwritten digits')}"
    )
    return results
