"""What the conformance suite shares: a tiny problem, everything that can be discovered, runs by name; and
the pinned files.

`python tests/conformance/kit.py --pin` writes tests/pinned/*.json and docs/methods.md again: review the
difference by eye.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import consilience as cs
from consilience.core.aggregator import Aggregator
from consilience.core.consolidator import Consolidator
from consilience.core.correction import Correction, Mapper
from consilience.core.model import Model
from consilience.core.weight_space import WeightSpace
from consilience.loop.result import Result
from consilience.testing import (
    CLASSES,
    FP64,
    INPUTS,
    SETTINGS,
    TRAINING,
    quiet,
    sources,
    state_of,
)
from consilience.testing import plain_model as plain

ROOT = Path(__file__).resolve().parents[2]
PINNED = ROOT / "tests" / "pinned"
TABLE = ROOT / "docs" / "methods.md"


def method_of(name: str, correction: Correction) -> cs.Method:
    """A method of one correction; one that makes constraints gets the cone that it needs."""
    return cs.Method(
        name, (correction,), step_aggregator=cs.aggregators.gem(0.0) if correction.adds_constraints else None
    )


def frozen_trunk() -> Model:
    """A trainable perceptron on frozen features, which are what anchors see: every class shares its hidden
    layer."""

    def module() -> nn.Module:
        return nn.Sequential(
            nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES)
        )

    return cs.models.wrap(module, outputs=CLASSES, head="2", frozen=("0.*",))


def frozen_features() -> Model:
    """One linear head on frozen features: for what predicts by the mean features of classes."""
    return cs.models.wrap(
        lambda: nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, CLASSES)), frozen=("0.*",)
    )


def heads(outputs: int = CLASSES) -> Model:
    return cs.models.multi_head(cs.models.random_features(INPUTS, 32), outputs)


# ----------------------------------------------------------------------------------------------------
# discovery


BASES = {
    "Running": "its subclasses say what the precision is",
    "Quadratic": "its subclasses say what the precision is",
    "Anchored": "its subclasses say what an anchor is",
    "Balancing": "its subclasses say what the weights are",
    "Buffer": "its subclasses say what the buffer is for",
}
"""Classes that only others extend, and what they lack; all verbs being optional, Python does not call them
abstract."""


def modules(room: str) -> Iterator[Any]:
    """All modules of a room."""
    package = importlib.import_module(f"consilience.{room}")
    yield package
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        yield importlib.import_module(info.name)


def concrete(room: str, kind: type) -> dict[str, type]:
    """The concrete public classes of a kind that a room defines."""
    found: dict[str, type] = {}
    for m in modules(room):
        for name, c in vars(m).items():
            own = (
                inspect.isclass(c)
                and c.__module__ == m.__name__
                and issubclass(c, kind)
                and not name.startswith("_")
            )
            if own and not inspect.isabstract(c) and name not in BASES:
                found[name] = c
    return dict(sorted(found.items()))


AGGREGATORS = concrete("aggregators", Aggregator)
CONSOLIDATORS = {"WeightSpace": WeightSpace, **concrete("consolidators", Consolidator)}
MAPPERS = concrete("mappers", Mapper)
CORRECTIONS = concrete("corrections", Correction)
EVERY = {**AGGREGATORS, **CONSOLIDATORS, **MAPPERS, **CORRECTIONS}

UNLABELLED = torch.rand(24, INPUTS, generator=torch.Generator().manual_seed(2))
ARGUMENTS: dict[str, dict[str, Any]] = {
    "TorchJD": {"name": "IMTLG"},
    "TorchJDLinear": {"name": "IMTLG"},
    "TorchJDStateful": {"name": "ExcessMTL"},
    "Distillation": {"unlabelled": UNLABELLED},
    "TeacherDistillation": {"unlabelled": UNLABELLED},
    "ExModelDistillation": {"maker": cs.memory.auxiliary(UNLABELLED)},
    **{n: {"byzantine": 0} for n in ("Bulyan", "Krum", "MultiKrum")},
    "TaLoS": {"density": 0.5, "reached": True},
}
"""Of classes that cannot be made without; and of TaLoS, for which most of the tiny problem's units are off
and so the first to be trained."""


def make(name: str, **arguments: Any) -> Any:
    """An object of a discovered class."""
    return EVERY[name](**{**ARGUMENTS.get(name, {}), **arguments})


METHODS: dict[str, Callable[[], cs.Method]] = {
    n: getattr(cs.methods, n)
    for n in cs.methods.__all__
    if all(p.default is not p.empty for p in inspect.signature(getattr(cs.methods, n)).parameters.values())
}
"""The catalogue's methods that need no argument."""

WANT_TASKS = {
    "Columns": "its columns are a task's own",
    "DEN": "its stages are tasks",
    "FedWeIt": "its masks and what it adds are a task's own",
    "HAT": "its masks are a task's own",
    "PSP": "its keys are a task's own",
    "PackNet": "its weights are a task's own",
    "SupSup": "its masks are a task's own",
    "XdG": "its gates are a task's own",
}
"""Corrections that refuse where tasks have no label (nor a mapper finds them), and why: they are checked
where they have."""

WANT_VIEWS = {
    "Superposition": "it superposes the views of another correction: checked with each in test_mappers.py"
}
"""Mappers that refuse alone, and why."""


def stream_for(*names: str) -> str:
    """The setting in which corrections, one or together, are checked one source after another."""
    return "continual (task)" if WANT_TASKS.keys() & set(names) else "continual (class)"


def model_for(*names: str) -> Model:
    """The model on which corrections, one or together, are checked: iCaRL's means want one head on what
    anchors see, and
    less-forgetting and the stability loss features that move."""
    from consilience.mappers.mixture import Anchored

    if any(issubclass(EVERY[n], Anchored) for n in names):
        return frozen_features() if "ICaRL" in names else frozen_trunk()
    return plain() if {"ICaRL", "LessForgetting", "Stability"} & set(names) else frozen_trunk()


THROW_AWAY = {
    "FromScratch": "it begins anew, whatever was heard",
    "GDumb": "it begins anew, whatever was heard",
    "StreamHead": "it begins again, whatever was received",
    "SolvedHead": "it writes the head anew at each visit, whatever was heard",
}
"""Corrections that refuse where others are received and trained with again, and why."""

WANT_OTHERS = {"FedHBM": "its momentum is what others made of its own result"}
"""Corrections that refuse where an agent receives only from itself, and why: no pairs of theirs run here,
where all
learn one source after
another; tests/test_drift.py checks them."""

WANT_TOGETHER = {
    n: "it weighs the tasks of a step, which has one where they come in turn"
    for n in ("DWA", "FAMO", "GradNorm", "ScaleInvariant", "TaskWeights", "Uncertainty", "WorstTask")
} | {"Conflicts": "it compares the tasks of a step, which has one where they come in turn"}
"""Corrections that refuse where a step has one task, and why: no pairs of theirs run here, but in
tests/test_balancing.py."""


def staged(outputs: int) -> Model:
    """A perceptron with one earlier answer behind the last one."""
    model = cs.models.mlp(INPUTS, (16,), 2 * outputs)
    model.earlier = 1
    return model


OWN_MODEL: dict[str, Callable[[int], Model]] = {
    "Columns": lambda outputs: cs.models.progressive(INPUTS, (16, 12), outputs),
    "DeepSupervision": staged,
    "HeadReuse": heads,
    "SoftSharing": lambda outputs: cs.models.multi_head(plain(outputs), outputs, shared=0),
}
"""Corrections that refuse any other kind of model: no pairs of theirs run here, where all stand on one
model; their own tests
compose them (tests/test_progressive.py, tests/test_synergy.py)."""

TOGETHER = (
    *(
        "aligned_mtl",
        "cagrad",
        "conflicts",
        "fairgrad",
        "gradvac",
        "imtl_g",
        "mgda",
        "nash_mtl",
        "rlw",
        "sdmgrad",
        "upgrad",
    ),
    *("dwa", "famo", "gradnorm", "scale_invariant", "task_weights", "uncertainty", "worst_task"),
)
"""Methods that reconcile the gradients, or balance the losses, of the tasks of a step."""

NEED_ARGUMENTS = {
    "aggregate",
    "batch_model_consolidation",
    "dac",
    "deep_model_consolidation",
    "distil",
    "exmodel_distillation",
    "feddf",
    "infer",
}
"""Those that need one; their rows are written out below."""

ROWS: dict[str, Callable[[], cs.Method]] = dict(
    sorted(
        {
            **METHODS,
            "aggregate(mean)": lambda: cs.methods.aggregate(cs.aggregators.mean()),
            "aggregate(ties)": lambda: cs.methods.aggregate(cs.aggregators.ties(0.5)),
            "aggregate(pcgrad)": lambda: cs.methods.aggregate(cs.aggregators.pcgrad()),
            "distil(unlabelled)": lambda: cs.methods.distil(UNLABELLED, steps=5),
            "batch_model_consolidation(sources)": lambda: cs.methods.batch_model_consolidation(
                sources(), size=24, steps=5
            ),
            "dac(auxiliary)": lambda: cs.methods.dac(cs.memory.auxiliary(UNLABELLED), size=24, steps=5),
            "deep_model_consolidation(unlabelled)": lambda: cs.methods.deep_model_consolidation(
                UNLABELLED, size=24, steps=5
            ),
            "exmodel_distillation(auxiliary)": lambda: cs.methods.exmodel_distillation(
                cs.memory.auxiliary(UNLABELLED), size=24, steps=5
            ),
            "feddf(unlabelled)": lambda: cs.methods.feddf(UNLABELLED, steps=5),
            "er+pcgrad": lambda: cs.methods.er() + cs.methods.pcgrad(),
            "hat+infer(expert_gate)": lambda: (
                cs.methods.hat() + cs.methods.infer(cs.mappers.expert_gate(epochs=2))
            ),
            "packnet+infer(mahalanobis)": lambda: (
                cs.methods.packnet() + cs.methods.infer(cs.mappers.mahalanobis(on="inputs"))
            ),
            "supsup+infer(superposition)": lambda: (
                cs.methods.supsup() + cs.methods.infer(cs.mappers.superposition())
            ),
        }.items()
    )
)
"""The rows of the table method x setting."""


def model_of(row: str, setting: str) -> Model:
    """Methods with anchors want heads on a frozen backbone, some a kind of model of their own, and those that
    divide a head want one per task where tasks share classes; all others run on a perceptron."""
    from consilience.mappers.mixture import Anchored

    outputs = 2 if "domain" in setting else CLASSES
    for c in ROWS[row]().corrections:
        if c.name in OWN_MODEL:
            return OWN_MODEL[c.name](outputs)
        if c.name in ("HAT", "PackNet") and "domain" in setting:
            return cs.models.multi_head(plain(outputs), outputs)
    mapper = ROWS[row]().mapper
    return heads(outputs) if isinstance(mapper, Anchored) and mapper.on == "features" else plain(outputs)


# ---------------------------------------------------------------------------------------------------- runs


@cache
def cell(row: str, setting: str, precision: str = "fp32", seed: int = 0) -> Result | str:
    """The result of a method in a setting, or the reason of its refusal."""
    try:
        return quiet(
            SETTINGS[setting](),
            ROWS[row](),
            model_of(row, setting),
            FP64 if precision == "fp64" else TRAINING,
            seed=seed,
        )
    except cs.Refusal as e:
        return str(e)


# ---------------------------------------------------------------------------------------------------- pinned
# files


def table() -> dict[str, dict[str, str]]:
    """{method: {setting: "runs" or the refusal}}."""
    found: dict[str, dict[str, str]] = {}
    for row in ROWS:
        found[row] = {}
        for setting in SETTINGS:
            c = cell(row, setting)
            found[row][setting] = c if isinstance(c, str) else "runs"
    return found


def pinned_settings(cells: Mapping[str, str]) -> list[str]:
    """Class-incremental where the method runs there, and one more setting where it runs."""
    running = [s for s in SETTINGS if cells[s] == "runs"]
    wanted = ["continual (class)", "federated_continual", "merging", "multitask", *SETTINGS]
    return [s for s in dict.fromkeys(wanted) if s in running][:2]


def values(row: str, setting: str) -> dict[str, float]:
    """The final score, and the sum and the sum of magnitudes of the parameters (with those of the experts)
    in float64."""
    result = cell(row, setting, "fp64")
    assert not isinstance(result, str), result
    tensors = [t for t in result.params.values()]
    for m in state_of(result).experts.values():
        tensors += list(m.tensors.values())
    double = [t.double() for t in tensors if t.is_floating_point()]
    return {
        "score": result.score,
        "sum": float(sum(t.sum() for t in double)),
        "magnitude": float(sum(t.abs().sum() for t in double)),
    }


def summary(function: Any) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0]


def paper(function: Any) -> str:
    """What a method's docstring says after "Paper:", on one line."""
    doc = inspect.getdoc(function) or ""
    if "Paper:" not in doc:
        return ""
    return " ".join(doc.split("Paper:")[1].split("\n\n")[0].split())


def render(cells: Mapping[str, Mapping[str, str]]) -> str:
    """docs/methods.md."""
    notes: dict[str, int] = {}

    def mark(reason: str) -> str:
        if reason == "runs":
            return "yes"
        short = re.sub(
            r"^.* would do nothing or do wrong here: |^\S+: |^\S+ (?=combines|aggregates|has)", "", reason
        )
        short = (
            f"It {short}"
            if reason.endswith(f" {short}") and short.startswith(("combines", "aggregates", "has"))
            else short
        )
        return f"[{notes.setdefault(short[0].upper() + short[1:], len(notes) + 1)}]"

    lines = [
        "# Methods and settings",
        "",
        "Which method runs in which setting. *yes*: it runs, checked on a tiny problem at every change.",
        "A number: it refuses before any work is done, for the reason below.",
        "`python tests/conformance/kit.py --pin` writes this page; do not edit it.",
        "",
        "| method | " + " | ".join(SETTINGS) + " |",
        "|---" * (len(SETTINGS) + 1) + "|",
        *["| " + " | ".join([f"`{row}`", *[mark(cells[row][s]) for s in SETTINGS]]) + " |" for row in cells],
        "",
        "`exmodel` trains the experts first, from one base; in `exmodel (given)` they have no data or base.",
        "",
        "## Why a method refuses",
        "",
        *[f"{n}. {reason}" for reason, n in notes.items()],
        "",
        "## The methods",
        "",
        "| method | what it does | paper |",
        "|---|---|---|",
        *[
            f"| `{n}` | {summary(f)} | {paper(f)} |"
            for n, f in ((n, getattr(cs.methods, n)) for n in cs.methods.__all__)
        ],
        "",
    ]
    return "\n".join(lines)


@cache
def read(name: str) -> Any:
    """A pinned file. A row that is not pinned yet skips its test: one test fails for it, and says how to
    pin."""
    return Rows(json.loads((PINNED / f"{name}.json").read_text(encoding="utf-8")))


class Rows(dict[str, Any]):
    """The rows of a pinned file, by method."""

    def __missing__(self, row: str) -> Any:
        import pytest

        pytest.skip(f"{row} is not pinned yet")


def pin() -> None:
    """Write all pinned files again."""
    cells = table()
    PINNED.mkdir(exist_ok=True)
    found = {row: {s: values(row, s) for s in pinned_settings(cells[row])} for row in ROWS}
    for name, content in (("methods", cells), ("values", found)):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (PINNED / f"{name}.json").write_text(text, encoding="utf-8")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(render(cells), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--pin"]:
        sys.exit(f"usage: python {Path(__file__).name} --pin")
    pin()
