"""The names that a user meets: all resolve, have docstrings, load late, and are known to type checkers."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import consilience as cs
from consilience.cli.main import main

PARTS = ("aggregators", "consolidators", "corrections", "mappers")
"""Rooms whose concrete classes are reachable by name."""

SCRIPT = """
from dataclasses import dataclass
import torch
import consilience as cs
from consilience.cli.main import main

@dataclass(frozen=True)
class Stay(cs.Correction):
    strength: float = 0.1

    def penalty(self, step: cs.StepView, ctx: cs.Context) -> torch.Tensor:
        return self.strength * (step.theta - step.start).square().sum()

schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 5))
method = cs.Method("stay", (Stay(), cs.corrections.EWC(2.0))) + cs.methods.er(100)
result: cs.Result = cs.run(schedule, method, torch.nn.Linear(64, 10), cs.Training(epochs=1))
print(result.score + 1, result.table(), result.report("report.html").name)
"""


def python(code: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    return found.stdout


def type_checked(script: Path, code: str) -> subprocess.CompletedProcess[str]:
    script.write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", str(script)]
    return subprocess.run(command, timeout=600, capture_output=True, text=True)


def test_importing_is_quick_and_imports_no_torch():
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "import consilience\n"
        "seconds = time.process_time() - start\n"
        "assert dir(consilience) and not {'torch', 'numpy', 'sklearn'} & sys.modules.keys()\n"
        "print(seconds)\n"
    )
    assert min(float(python(code)) for _ in range(3)) < 0.2


def test_every_name_resolves_and_has_a_docstring():
    assert set(cs.__all__) == set(dir(cs))
    for name in cs.__all__:
        assert inspect.getdoc(getattr(cs, name)), name


@pytest.mark.parametrize("room", PARTS)
def test_every_concrete_class_is_reachable(room):
    """All public classes of the room's files that are parts of methods."""
    base = {"aggregators": cs.Aggregator, "consolidators": cs.Consolidator, "mappers": cs.Mapper}.get(
        room, cs.Correction
    )
    package = getattr(cs, room)
    folder = Path(package.__file__).parent
    modules = [f"{package.__name__}.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"]
    classes = {
        name: value
        for module in map(importlib.import_module, modules)
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    }
    public = [n for n, c in classes.items() if not n.startswith("_") and not inspect.isabstract(c)]
    assert public
    for name in public:
        assert getattr(package, name) is classes[name]
        assert name in dir(package)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(AttributeError, match="no attribute 'Corection'; nearest: Correction"):
        _ = cs.Corection
    with pytest.raises(AttributeError, match="nearest: EWC"):
        _ = cs.corrections.EWc
    assert not hasattr(cs, "__wrapped__")


def test_a_users_script_type_checks(tmp_path):
    good = type_checked(tmp_path / "good.py", SCRIPT)
    assert good.returncode == 0, good.stdout
    wrong = SCRIPT.replace("cs.Correction", "cs.Corection").replace("result.score + 1", "result.scor")
    found = type_checked(tmp_path / "wrong.py", wrong).stdout
    assert '"cs.Corection" is not defined' in found
    assert '"Result" has no attribute "scor"' in found


def test_star_imports_work():
    assert python("from consilience import *; print(run.__name__, Correction.__name__)") == "run Correction\n"


# Warnings point at the line of the user.

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
PARTS_OF_DATA = cs.data.split_classes(
    cs.data.arrays(X, torch.arange(60) % 4, name="own", classes=["a", "b", "c", "d"]), 2
)
QUICK = cs.Training(epochs=1)


def error_rate(predictions, targets):
    return float((predictions.argmax(1) != targets).float().mean())


def runs(tmp_path):
    cs.run(cs.settings.continual(PARTS_OF_DATA), cs.methods.finetune(), training=QUICK, metric=error_rate)


def sweeps(tmp_path):
    schedule = cs.settings.continual(PARTS_OF_DATA)
    cs.sweep(schedule, [cs.methods.finetune()], training=QUICK, metric=error_rate, engine="batched")


def trains(tmp_path):
    cs.run(cs.settings.continual(PARTS_OF_DATA, "task"), cs.methods.ewc(1e9), training=QUICK)


def predicts(tmp_path):
    schedule = cs.settings.continual(PARTS_OF_DATA, "task")
    cs.run(schedule, cs.methods.finetune(), training=QUICK).predict(X)


def schedules(tmp_path):
    other = cs.data.arrays(X, torch.arange(60) % 2, name="other", classes=["a", "b"])
    cs.settings.continual([*PARTS_OF_DATA, other])


def reads_a_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for i in range(5):
            image.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "x" / "bad.png").write_bytes(b"no image")
    cs.data.folder(tmp_path, unreadable="skip")


def merges(tmp_path):
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"auto_map": {"AutoModel": "own.Model"}}')
        save_file({"w": torch.ones(2)}, tmp_path / name / "model.safetensors")
    cs.merge(tmp_path / "base", [tmp_path / "expert"], cs.aggregators.mean(), out=tmp_path / "merged")


def compares(tmp_path):
    argv = "compare --methods ewc --methods.ewc.strength 1e9 --training.epochs 1 --training.batch_size 512"
    assert main([*argv.split(), "--setting.scenario", "task"]) == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (runs, "has no direction"),
        (sweeps, "has no direction"),
        (trains, "EWC on"),
        (predicts, "this run has task labels"),
        (schedules, "classes of one name in different label spaces"),
        (reads_a_folder, "cannot be read"),
        (merges, "code of its own"),
        pytest.param(compares, "EWC on", marks=pytest.mark.slow),
    ],
)
def test_warnings_point_at_the_users_line(tmp_path, call, says):
    with pytest.warns(UserWarning, match=says) as found:
        call(tmp_path)
    lines, first = inspect.getsourcelines(call)
    for warning in found:
        assert warning.filename == __file__
        assert first < warning.lineno < first + len(lines)


def test_every_warning_of_the_package_points_at_the_user():
    package = Path(inspect.getfile(cs)).parent
    direct = [path.name for path in package.rglob("*.py") if "warnings.warn(" in path.read_text()]
    assert direct == ["warning.py"]
