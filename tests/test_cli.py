"""The command line, mostly in this process."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from consilience import engines, memory, methods, report
from consilience.cli.build import method_of, training_of
from consilience.cli.defaults import FITTING
from consilience.cli.main import main
from consilience.cli.options import flat, read, understand

QUICK = ["--training.epochs", "1"]
KEYS = {
    "setting",
    "data",
    "method",
    "model",
    "repeats",
    "seed",
    "metric",
    "score",
    "score_std",
    "matrix",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "macs",
    "bytes",
    "seconds",
    "versions",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small models on busy cores: threads that wait for each other take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def same(a: Path, b: Path) -> bool:
    return result(a)["matrices"] == result(b)["matrices"] and result(a)["config"] == result(b)["config"]


def test_a_run_leaves_its_folder_and_its_own_configuration_repeats_it(tmp_path, capsys):
    out, again = tmp_path / "ewc", tmp_path / "again"
    choices = "--setting continual --data digits --split classes --split.n 5 --method ewc"
    argv = ["run", *choices.split(), "--method.strength", "30", "--repeats", "2"]
    assert main([*argv, *QUICK, "--out", str(out)]) == 0
    text = capsys.readouterr()
    assert "ewc  10/10" in text.out
    assert text.err == ""
    assert set(result(out)) >= KEYS
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["method"]["ewc"]["strength"] == 30.0
    assert config["split"] == {"classes": {"n": 5, "order": None, "seed": None}}
    assert main(["run", "--config", str(out / "config.yaml"), "--out", str(again)]) == 0
    assert same(out, again)
    assert (out / "config.yaml").read_text() == (again / "config.yaml").read_text()
    third = tmp_path / "third"
    assert (
        main(
            [
                "run",
                "--config",
                str(out / "config.yaml"),
                "--method.strength",
                "0",
                "--repeats",
                "1",
                "--out",
                str(third),
            ]
        )
        == 0
    )
    assert result(third)["config"]["method"]["ewc"]["strength"] == 0.0
    assert result(third)["repeats"] == 1


@pytest.mark.parametrize("setting", FITTING)
def test_every_setting_runs_with_its_defaults_and_learns(setting, tmp_path):
    assert main(["run", "--setting", setting, "--out", str(tmp_path / "out")]) == 0
    found = result(tmp_path / "out")
    assert found["score"] > sum(found["matrix"][0]) / len(found["matrix"][0]) + 0.2


@pytest.mark.parametrize("setting", FITTING)
def test_fitting_options_are_options(setting):
    order = understand("run", ["--setting", setting])
    chosen = {**order.values, **order.names}
    assert {key: chosen[key] for key in FITTING[setting]} == FITTING[setting]


@pytest.mark.parametrize("data", ["breast_cancer", "wine", "diabetes"])
def test_tables_have_a_split_that_fits(data, tmp_path):
    assert main(["run", "--data", data, *QUICK, "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("setting", ["continual", "federated_continual"])
def test_compositions_take_options_by_their_parts(setting, tmp_path):
    argv = [
        "run",
        "--setting",
        setting,
        "--method",
        "ewc+er",
        "--method.ewc.strength",
        "3",
        "--method.er.size",
        "50",
        *QUICK,
    ]
    order = understand("run", argv[1:])
    assert order is not None
    assert order.config["method"]["ewc"]["strength"] == 3.0
    assert order.config["method"]["er"]["size"] == 50
    assert flat(order.config)["method"] == "ewc+er"
    assert flat(order.config)["method.er.size"] == "50"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(order.config))
    assert understand("run", ["--config", str(file)]).config == order.config


def test_a_yaml_file_says_what_options_say(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "setting: federated\nsplit: {dirichlet: {alpha: 0.1, clients: 4}}\n"
        "method: fedprox\nmethod.mu: 1e-2\ntraining: {lr: 0.1}\n"
    )
    options = (
        "--setting federated --split dirichlet --split.alpha 0.1 --split.clients 4 "
        "--method fedprox --method.mu 1e-2 --training.lr 0.1"
    )
    assert understand("run", ["--config", str(file)]).config == understand("run", options.split()).config
    changed = understand("run", ["--config", str(file), "--method", "fedavg", "--split.clients", "6"]).config
    assert "fedavg" in changed["method"]
    assert changed["split"]["dirichlet"]["clients"] == 6
    assert changed["split"]["dirichlet"]["alpha"] == 0.1


def test_models_and_splits_come_one_after_another(tmp_path):
    argv = (
        "--setting skill --split iid+classes --split.iid.clients 2 "
        "--model random_features+multi_head --model.random_features.width 256"
    )
    assert main(["run", *argv.split(), *QUICK, "--out", str(tmp_path / "out")]) == 0
    found = result(tmp_path / "out")
    assert len(found["sources"]) == 10
    assert found["config"]["model"] == {
        "random_features": {"width": 256, "seed": 0},
        "multi_head": {"norm": None, "hidden": [], "shared": None},
    }


def test_a_trunk_or_an_expert_comes_before_what_tasks_share(tmp_path):
    argv = (
        "--setting multitask --setting.scenario task --split classes --model mlp+mmoe --model.mmoe.experts 2"
    )
    assert main(["run", *argv.split(), *QUICK, "--out", str(tmp_path / "out")]) == 0
    found = result(tmp_path / "out")
    assert found["model"] == "mmoe(mlp)"
    parts = [places["layer 0"]["parts"] for places in found["sharing"].values()]
    assert parts == [["expert 0.0", "expert 0.1"]] * len(found["sources"])


def test_a_module_of_ones_own_is_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "import torch\n\nclass Net(torch.nn.Sequential):\n"
        "    def __init__(self, inputs, outputs, width: int = 8):\n"
        "        first, second = torch.nn.Linear(inputs, width), torch.nn.Linear(width, outputs)\n"
        "        super().__init__(first, torch.nn.ReLU(), second)\n"
    )
    assert (
        main(
            ["run", "--model", "my_nets.Net", "--model.width", "9", "--repeats", "2", *QUICK, "--out", "out"]
        )
        == 0
    )
    first, second = result(tmp_path / "out")["matrices"]
    assert first[0] != second[0]  # new weights for each seed


POLICY = '''
from dataclasses import dataclass

from consilience.memory.policies import Ring


@dataclass(frozen=True)
class Recent(Ring):
    """The last examples.

    Args:
        every: which of them.
    """

    every: int = 1
'''


def policies(*argv: str):
    order = understand("run", argv)
    return order, [part.policy for part in method_of(order, order.names["method"]).corrections]


def test_a_policy_is_a_name_or_a_dotted_path_with_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_policies.py").write_text(POLICY)
    assert policies("--method.policy", "herding")[1] == [memory.herding()]
    assert policies("--method.policy", "consilience.memory.herding")[1] == [memory.herding()]
    assert policies("--method.policy", "null")[1] == [memory.reservoir()]
    own = ["--method.policy", "my_policies.Recent"]
    order, made = policies(*own, "--method.policy.every", "3")
    assert made[0].every == 3
    assert order.config["method"]["er"]["policy"] == {"my_policies.Recent": {"every": 3}}
    assert policies(*own)[0].config["method"]["er"]["policy"] == "my_policies.Recent"

    # A file says the same, nested or by options; another policy on the command line drops the arguments.
    for text in (yaml.safe_dump(order.config), "method.policy: my_policies.Recent\nmethod.policy.every: 3"):
        (tmp_path / "config.yaml").write_text(text)
        assert policies("--config", "config.yaml", "--trust")[1] == made
        assert policies("--config", "config.yaml", "--method.policy", "ring")[1] == [memory.ring()]
    both = [
        "--method",
        "er+der",
        "--method.der.policy",
        "my_policies.Recent",
        "--method.der.policy.every",
        "2",
    ]
    assert [getattr(policy, "every", None) for policy in policies(*both)[1]] == [None, 2]


def test_policies_of_a_comparison_are_those_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_policies.py").write_text(POLICY)
    own = ["--methods.er.policy", "my_policies.Recent", "--methods.er.policy.every", "2"]
    assert main(["compare", "--methods", "finetune,er", *own, *QUICK, "--out", "cmp"]) == 0
    assert result(tmp_path / "cmp" / "er")["config"]["method"]["er"]["policy"] == {
        "my_policies.Recent": {"every": 2}
    }
    assert main(["run", "--config", "cmp/er/config.yaml", "--trust", "--out", "alone"]) == 0
    assert same(tmp_path / "cmp" / "er", tmp_path / "alone")
    assert main(["compare", "--resume", "--trust", "--out", "cmp"]) == 0


def test_scenario_and_dtype_have_one_spelling_over_all_commands(tmp_path, capsys):
    order = understand("run", ["--setting.scenario", "task", "--dtype", "float64"])
    assert order.config["setting"]["continual"]["scenario"] == "task"
    assert training_of(order).precision == order.config["training"]["precision"] == "fp64"
    assert understand("compare", ["--dtype", "bfloat16"]).values["training.precision"] == "bf16"
    (tmp_path / "config.yaml").write_text("dtype: float64\nsetting: {continual: {scenario: task}}")
    assert understand("run", ["--config", str(tmp_path / "config.yaml")]).config == order.config
    for command, old, new in (
        ("run", "scenario", "setting.scenario"),
        ("compare", "scenario", "setting.scenario"),
        ("choose", "scenario", "setting.scenario"),
        ("run", "training.precision", "dtype"),
        ("compare", "training.precision", "dtype"),
        ("merge", "training.precision", "dtype"),
    ):
        words = ["--data", "digits"] if command == "choose" else []
        assert main([command, *words, f"--{old}", "x"]) == 2
        assert f"`--{old}`; it is called `--{new}` in all commands." in capsys.readouterr().err


def test_names_of_splits_have_their_short_form():
    assert (
        understand("run", ["--split", "split_classes"]).config
        == understand("run", ["--split", "classes"]).config
    )


BAD = {
    "command": (["runn"], "nearest: run"),
    "setting": (["run", "--setting", "continul"], "nearest: continual"),
    "data": (["run", "--data", "digit"], "nearest: digits"),
    "split": (["run", "--split", "clases"], "nearest: classes"),
    "method": (["run", "--method", "ewcc"], "nearest: ewc"),
    "a part of a composition": (["run", "--method", "ewc+err"], "nearest: er"),
    "model": (["run", "--model", "mlpp"], "nearest: mlp"),
    "option": (["run", "--method", "ewc", "--method.strenght", "1"], "nearest: --method.strength"),
    "option of another method": (["run", "--method", "er", "--method.strength", "1"], "'--method.strength'"),
    "option of the run": (["run", "--repeat", "2"], "--repeats"),
    "option of the training": (["run", "--training.epoch", "2"], "nearest: --training.epochs"),
    "option without a value": (["run", "--method.size"], "`--method.size` needs a value"),
    "word": (["run", "continual"], "takes options only"),
    "type": (["run", "--split.n", "five"], "must be a whole number, got 'five'"),
    "fraction for a whole number": (
        ["run", "--training.epochs", "1.5"],
        "`--training.epochs` must be a whole number",
    ),
    "literal": (["run", "--method", "ewc", "--method.labels", "modle"], "nearest: model"),
    "missing argument": (["run", "--data", "npz"], "`--data.name` must be given"),
    "value of a split": (["run", "--split.n", "11"], "11"),
    "value of the training": (["run", "--training.lr", "-1"], "`lr`"),
    "metric": (["run", "--metric", "acuracy"], "nearest: accuracy"),
    "engine": (["run", "--engine", "seriall"], "nearest: serial"),
    "refusal": (["run", "--setting", "merging", "--method", "ewc"], "ewc"),
    "aggregator": (
        ["run", "--setting", "merging", "--method", "aggregate", "--method.aggregator", "tie"],
        "nearest: ties",
    ),
    "aggregator with arguments": (
        ["run", "--setting", "merging", "--method", "aggregate", "--method.aggregator", "torchjd"],
        "torchjd",
    ),
    "head without a trunk": (["run", "--model", "multi_head"], "random_features+multi_head"),
    "number that is none": (["run", "--training.lr", "nan"], "`--training.lr` must be a number"),
    "list": (["run", "--model", "mlp", "--model.hidden", "32,32"], "a list such as [1, 2]"),
    "dots": (["run", "--method", "..x"], "dotted path"),
    "unwritable folder": (["run", "--out", "/proc/no/such"], "/proc/no"),
    "dotted module": (["run", "--method", "no_such_module.method"], "no_such_module"),
    "dotted name": (["run", "--method", "consilience.methods.ewcc"], "nearest: consilience.methods.ewc"),
    "a switch that is no truth": (["run", "--judge_clients", "maybe"], "takes options only, got 'maybe'"),
    "resume without a folder": (["run", "--resume"], "`--out`"),
    "resume of nothing": (["run", "--resume", "--out", "/no/such/run"], "/no/such/run"),
    "report of nothing": (["report"], "folders of runs"),
    "report of no run": (["report", "/no/such/run"], "/no/such/run"),
    "option of report": (["report", "--ou", "x"], "nearest: --out"),
    "option of methods": (["methods", "--x"], "'--x'"),
    "family of methods": (["methods", "--family", "rehersal"], "nearest: rehearsal"),
    "setting of methods": (["methods", "--setting", "continuous"], "nearest: continual"),
    "method of compare": (["compare", "--methods", "finetune,ewcc"], "nearest: ewc"),
    "option of compare": (
        ["compare", "--methods", "finetune,ewc", "--methods.ewc.strenght", "1"],
        "nearest: --methods.ewc.strength",
    ),
    "option of demo": (["demo", "--outt", "x"], "nearest: --out"),
    "policy": (["run", "--method.policy", "herdin"], "nearest: herding"),
    "dotted policy": (
        ["run", "--method.policy", "consilience.memory.herdin"],
        "nearest: consilience.memory.herd",
    ),
    "option of a policy": (
        ["run", "--method.policy", "ring", "--method.policy.x", "1"],
        "'--method.policy.x'",
    ),
    "dtype": (["run", "--dtype", "float31"], "nearest: float32"),
    "dtype without a value": (["run", "--dtype"], "`--dtype` needs a value"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_the_nearest_name(case, capsys):
    argv, says = BAD[case]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert says in err


YAML = {
    "malformed": ("method: {ewc: [", "must be YAML"),
    "a list": ("- method", "must be a mapping"),
    "unknown key": ("methd: ewc", "nearest: method"),
    "unknown option": ("method: {ewc: {strenght: 1}}", "nearest: method.strength"),
    "unknown name": ("method: {ewcc: {strength: 1}}", "nearest: ewc"),
    "options that are none": ("method: {ewc: 1}", "must be a mapping of its options"),
    "wrong type": ("method: {ewc: {strength: much}}", "`--method.strength` must be a number, got 'much'"),
    "wrong nested type": ("split: {classes: {n: [1, 2]}}", "must be a whole number"),
    "not text": (b"\xff\xfe\x00", "must be YAML"),
}


@pytest.mark.parametrize("case", YAML)
def test_bad_yaml_is_one_line(case, tmp_path, capsys):
    content, says = YAML[case]
    file = tmp_path / "config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["run", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err


def test_a_missing_configuration_names_the_nearest_file(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert main(["run", "--config", str(tmp_path / "confg.yaml")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nearest: " + str(tmp_path / "config.yaml") in err


def test_a_folder_with_a_run_is_not_overwritten_but_resumed(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["run", *QUICK, "--checkpoint_steps", "50", "--out", str(out)]
    assert main(argv) == 0
    before = (out / "result.json").read_bytes()
    capsys.readouterr()
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "`out` must be a new folder" in err
    assert (out / "result.json").read_bytes() == before
    assert main(["run", "--resume", "--out", str(out)]) == 0
    assert json.loads(before)["matrices"] == result(out)["matrices"]
    assert main(["run", "--resume", "--training.lr", "0.3", "--out", str(out)]) == 2
    assert "resumes with the configuration it began with" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    import os
    import signal

    import consilience.api as command

    out, whole = tmp_path / "out", tmp_path / "whole"
    real = command.watched

    class Stop:
        def __init__(self, *a):
            self.inner = real(*a)

        def __enter__(self):
            ((label, write),) = self.inner.__enter__().items()

            def then(line):
                write(line)
                if line["event"] == "stage" and line["stage"] == 2:
                    os.kill(os.getpid(), signal.SIGINT)

            return {label: then}

        def __exit__(self, *a):
            return self.inner.__exit__(*a)

    assert main(["run", *QUICK, "--out", str(whole)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(command, "watched", Stop)
    assert main(["run", *QUICK, "--out", str(out)]) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--resume --out {out}" in err
    monkeypatch.setattr(command, "watched", real)
    assert main(["run", "--resume", "--out", str(out)]) == 0
    assert same(out, whole)


OWN = '''
from consilience import data, methods


def half(strength: float = 7.0, deep: int = 2):
    """Half of it.

    Args:
        strength: of the half.
    """
    return methods.ewc(strength / 2)


def few(n: int = 200):
    """The first digits."""
    import numpy as np
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    return data.arrays((x[:n] / 16).astype("float32"), y[:n], name="few")


def line(sources, both: bool = False):
    """A setting."""
    from consilience import settings
    return settings.continual(sources)


def broken(:
'''


def test_a_dotted_path_uses_ones_own_function(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_parts.py").write_text(OWN.replace("def broken(:", ""))
    (tmp_path / "my_broken_parts.py").write_text(OWN)
    argv = (
        "run --setting my_own_parts.line --setting.both true --data my_own_parts.few --data.n 150 "
        "--method my_own_parts.half --method.strength 4"
    )
    assert main([*argv.split(), *QUICK, "--out", "out"]) == 0
    found = result(tmp_path / "out")
    assert found["method"] == "ewc"
    assert found["data"] == "few"
    assert found["config"]["method"] == {"my_own_parts.half": {"strength": 4.0, "deep": 2}}
    assert main(["run", "--config", "out/config.yaml", "--trust", "--out", "again"]) == 0
    assert same(tmp_path / "out", tmp_path / "again")
    order = understand("run", ["--method", "my_own_parts.half+er", "--method.half.strength", "5"])
    assert order.config["method"]["my_own_parts.half"]["strength"] == 5.0
    capsys.readouterr()
    assert main(["run", "--method", "my_own_parts.hallf"]) == 2
    assert "nearest: my_own_parts.half" in capsys.readouterr().err
    assert main(["run", "--method", "my_broken_parts.half"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_shows_options_from_docstrings_and_imports_no_torch():
    code = (
        "import sys; from consilience.cli.main import main; "
        "assert main({!r}) == 0; assert 'torch' not in sys.modules, 'torch'"
    )
    for argv, says in (
        (["--help"], "compare"),
        (["run", "--help"], "--checkpoint_seconds"),
        (["run", "--method", "ewc", "--help"], "of the penalty"),
        (["run", "--setting", "federated", "--method", "ewc+er", "--help"], "--method.er.size"),
        (["compare", "--methods", "ewc,er", "--help"], "--methods.er.size"),
        (["run", "--help"], "--engine {" + ",".join(engines.NAMES) + "}"),
        (
            ["run", "--method", "aggregate", "--method.aggregator", "ties", "--help"],
            "--method.aggregator.density",
        ),
        (["compare", "--help"], "--dtype {float32,float64,bfloat16,float16}"),
        (["merge", "--help"], "--allow-non-finite"),
        (["choose", "--help"], "--setting.scenario {task,domain,class}"),
        (["methods", "--help"], "--help"),
        (["report", "--help"], "--out OUT"),
        (["demo", "--help"], "--out OUT"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argv)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert says in done.stdout


def test_methods_lists_all(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for name in methods.__all__:
        assert f"\n{name}: " in "\n" + text
    assert text.count("    paper: ") == len(methods.__all__)
    assert "pcgrad: " in text
    where = dict(
        zip(
            methods.__all__,
            [line[14:] for line in text.splitlines() if line.startswith("    settings: ")],
            strict=True,
        )
    )
    assert where["pcgrad"] == "multitask"
    assert where["finetune"] == "all"
    # Models with earlier answers are made in Python.
    assert [name for name, settings in where.items() if settings == "none"] == ["deep_supervision"]


def test_compare_runs_each_and_report_reads_them(tmp_path, capsys, monkeypatch):
    out = tmp_path / "cmp"
    argv = [
        "compare",
        "--methods",
        "finetune,ewc,er,ewc+er,pcgrad",
        "--methods.ewc.strength",
        "9",
        *QUICK,
        "--out",
        str(out),
    ]
    assert main(argv) == 0
    text = capsys.readouterr().out
    rows = [line.split()[0] for line in text.splitlines() if line[:1].isalpha()]
    assert {"finetune", "ewc", "er", "ewc+er"} <= set(rows)
    assert "pcgrad  refused: " in text
    found = json.loads((out / "compare.json").read_text())
    assert list(found["results"]) == ["finetune", "ewc", "er", "ewc+er"]
    assert list(found["refused"]) == ["pcgrad"]
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert result(out / "ewc+er")["config"]["method"]["ewc"]["strength"] == 9.0
    alone = tmp_path / "alone"
    assert main(["run", "--config", str(out / "ewc+er" / "config.yaml"), "--out", str(alone)]) == 0
    assert same(out / "ewc+er", alone)
    capsys.readouterr()
    assert main(argv) == 2
    assert "`out` must be a new folder" in capsys.readouterr().err
    assert main(["compare", "--resume", "--methods", "finetune,ewc", "--out", str(out)]) == 2
    assert "resumes with the configuration it began with" in capsys.readouterr().err
    (out / "er" / "result.json").unlink()
    stamp = (out / "ewc" / "result.json").stat().st_mtime_ns
    assert main(["compare", "--resume", "--out", str(out)]) == 0
    assert (out / "ewc" / "result.json").stat().st_mtime_ns == stamp
    assert (out / "er" / "result.json").exists()
    assert (
        json.loads((out / "compare.json").read_text())["results"]["er"]["score"]
        == found["results"]["er"]["score"]
    )
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["report", "cmp", "alone", "-o", "all.html"]) == 0
    before = Path("all.html").read_text()
    assert main(["report", "alone", "-o", "all.html"]) == 2  # another report is not lost
    assert Path("all.html").read_text() == before
    assert main(["report", "alone", "-o", "all.html", "--overwrite"]) == 0
    assert Path("all.html").read_text() != before
    assert "ewc+er" in capsys.readouterr().out
    assert (tmp_path / "all.html").exists()
    assert report.load(out / "ewc").method == "ewc"


def test_a_comparison_where_all_refuse_fails_before_it_writes(tmp_path, capsys):
    out = tmp_path / "cmp"
    assert main(["compare", "--methods", "pcgrad", "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def test_switches_take_what_help_shows():
    assert read(["--judge_clients", "true", "--resume", "--out", "x"]) == (
        {"judge_clients": "true", "resume": "true", "out": "x"},
        [],
    )
    assert read(["--judge_clients", "false"]) == ({"judge_clients": "false"}, [])
    assert read(["--judge_clients=false", "word"]) == ({"judge_clients": "false"}, ["word"])


def test_a_loss_is_a_name_with_arguments_or_a_dotted_path(tmp_path, monkeypatch):
    from consilience.cli.build import loss_of
    from consilience.core.errors import ConsilienceError
    from consilience.core.losses import Focal, Huber

    monkeypatch.chdir(tmp_path)
    Path("a_loss_of_mine.py").write_text("def cubed(out, y):\n    return (out - y).abs() ** 3\n")
    assert loss_of("focal(gamma=1)") == Focal(gamma=1)
    assert loss_of({"ink": "huber", "class": None}) == {"ink": Huber(), "class": None}
    read(["--training.loss", "a_loss_of_mine.cubed"])  # typed, and so it may be imported
    assert loss_of("a_loss_of_mine.cubed").__name__ == "cubed"
    with pytest.raises(ConsilienceError, match="`loss` must be one of the catalogue's, got 'focl'"):
        loss_of("focl")


def test_methods_by_family_and_setting(capsys):
    assert main(["methods", "--family", "rehearsal", "--setting", "continual"]) == 0
    names = {line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "}
    assert {"er", "der", "icarl"} <= names and "ewc" not in names
    assert main(["methods", "--setting", "multitask", "--family", "rehearsal"]) == 0
    assert "er:" not in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda cs: cs.Training(optimizer="adam"),
            "`Training` has no argument `optimizer`; nearest: optimiser",
        ),
        (lambda cs: cs.run(None, None, repeat=3), "`run` has no argument `repeat`; nearest: repeats"),
        # What belongs to the training is said to belong there.
        (
            lambda cs: cs.run(None, None, optimizer="adam"),
            r"`run` has no argument `optimizer`; nearest: training=Training\(optimiser=...\)",
        ),
        (lambda cs: cs.sweep(None, None, epoch=3), r"nearest: training=Training\(epochs=...\)"),
        (lambda cs: cs.methods.ewc(strenght=3), "`ewc` has no argument `strenght`; nearest: strength"),
        (lambda cs: cs.data.digits(images=True), "`digits` has no argument `images`; nearest: image"),
        (lambda cs: cs.models.mlp(3, (2,), 2, hiden=3), "`mlp` has no argument `hiden`; nearest: hidden"),
        (lambda cs: cs.settings.continual([], scenaro="task"), "nearest: scenario"),
        (lambda cs: cs.aggregators.ties(densty=0.4), "nearest: density"),
        (lambda cs: cs.losses.focal(gama=2), "nearest: gamma"),
        (lambda cs: cs.metrics.f1(averge="micro"), "nearest: average"),
        (lambda cs: cs.memory.ring(size=3), "`ring` has no argument `size`; it has none"),
        (lambda cs: cs.engines.ray(worker=3), "nearest: workers"),
        (lambda cs: cs.data.augment.crop(pad=3), "nearest: padding"),
        (lambda cs: cs.merge([], [], agregator="ties"), "nearest: aggregator"),
        (lambda cs: cs.merging.choose([], bas=3), "nearest: base"),
        (lambda cs: cs.report.write([], "x", titel="x"), "nearest: title"),
        (lambda cs: cs.methods.erpp, "no attribute 'erpp'; nearest: derpp"),
        (lambda cs: cs.settings.continuous, "nearest: continual"),
    ],
)
def test_misspelt_names_and_arguments_get_the_nearest(call, says):
    import consilience as cs

    with pytest.raises((ValueError, AttributeError), match=says):
        call(cs)


def test_functions_that_suggest_arguments_are_still_themselves():
    import consilience as cs

    assert pickle.loads(pickle.dumps(cs.methods.ewc)) is cs.methods.ewc
    assert list(inspect.signature(cs.methods.er).parameters)[:1] == ["size"]
    # One that hands on any arguments takes them.
    with pytest.raises(ValueError, match="torchjd"):
        cs.aggregators.torchjd("UPGrad", no_such=0.1)
