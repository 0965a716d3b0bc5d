"""A run's folder: nothing is lost when a process dies, and nothing that is damaged is taken."""

import builtins
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import consilience as cs
from consilience.cli.main import main
from consilience.core.params import same
from consilience.loop import checks, fingerprint
from consilience.loop.folder import Log
from consilience.loop.lock import FolderLock

PARTS = cs.data.split_classes(cs.data.digits(), 5)[:2]
PARTS = [
    replace(part, train=part.train.select(torch.arange(48)), test=part.test.select(torch.arange(20)))
    for part in PARTS
]
SCHEDULE = cs.settings.continual(PARTS)


def go(out: Path | None = None, *, schedule=SCHEDULE, method=None, model=None, training=None, **options):
    return cs.run(
        schedule,
        method or cs.methods.er(size=8),
        model or cs.models.mlp(64, (4,), 10),
        training or cs.Training(epochs=1, batch_size=16),
        out=out,
        **({"checkpoint_steps": 2} if out else {}),
        **options,
    )


def facts(result):
    """All that a run found, but its seconds."""
    costs = {name: value for name, value in result.costs.items() if name != "seconds"}
    params = {name: tensor.tolist() for name, tensor in result.params.items()}
    return repr((result.matrices.tolist(), result.stages, costs, params))


class Stop(BaseException):
    """The end of a process, as far as a test in it can tell."""


def cut(out: Path, steps: int = 3, **options) -> Path:
    """Leave the folder of a run that was interrupted after some steps."""

    def stop(line):
        if line["event"] == "checkpoint" and line["steps"] >= steps:
            raise Stop

    with pytest.raises(Stop):
        go(out, progress=stop, **options)
    return out


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# Every file operation of a run is a point at which it may be killed, and every write may fail.


class Disk:
    """Counts the operations of files below a folder; one of them kills the process, or fails.

    Killed, all later operations do nothing, and files that were not synced have lost their ends.
    """

    def __init__(self, monkeypatch, folder: Path, at: int, fails: bool = False) -> None:
        self.folder, self.at, self.fails, self.count = folder, at, fails, 0
        self.dead = False
        self.unsynced: dict[str, int] = {}
        """Files that were written since their last sync, with how much of them is safe."""
        self.real_open, self.real_fsync = builtins.open, os.fsync
        monkeypatch.setattr(builtins, "open", self._open)
        monkeypatch.setattr(os, "fsync", self._fsync)
        for name in ("replace", "unlink", "mkdir", "ftruncate"):
            monkeypatch.setattr(os, name, partial(self._call, getattr(os, name)))

    def _step(self, writes: bool = True) -> None:
        if self.dead:
            raise Stop
        self.count += 1
        if self.count != self.at or (self.fails and not writes):
            return
        if self.fails:
            raise OSError(28, "No space left on device")
        self.dead = True
        for path, safe in self.unsynced.items():
            if os.path.exists(path):
                half = safe + (os.path.getsize(path) - safe) // 2
                os.truncate(path, half)
        raise Stop

    def _is_ours(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and str(path).startswith(str(self.folder))

    def _call(self, real, *args, **options):
        if any(self._is_ours(arg) for arg in args):
            self._step(writes=real.__name__ != "unlink")
            if real.__name__ == "replace":
                self.unsynced.pop(str(args[0]), None)
        return real(*args, **options)

    def _open(self, file, mode="r", *args, **options):
        if not self._is_ours(file) or mode in ("r", "rb"):
            return self.real_open(file, mode, *args, **options)
        self._step()
        path = str(file)
        size = os.path.getsize(path) if os.path.exists(path) and "w" not in mode else 0
        self.unsynced.setdefault(path, size)
        return self.real_open(file, mode, *args, **options)

    def _fsync(self, handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if self._is_ours(path):
            self._step()
            self.real_fsync(handle)
            self.unsynced.pop(path, None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the run finds when nothing happens, and the number of its file operations."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, out, at=0)
        found = facts(go(out))
    assert found == facts(go())
    return found, disk.count


def survives(tmp_path: Path, whole, at: int, fails: bool) -> None:
    """Let the run be killed, or its disk be full, at one operation; it must go on to the same bits."""
    out = tmp_path / f"{at}-{fails}"
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        Disk(patch, out, at, fails)
        if not fails:
            go(out)
        # A disk that is full costs a run, with one sentence, or nothing where a file is only deleted.
        else:
            with contextlib.suppress(cs.ConsilienceError):
                go(out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume = out.exists() and Log(out).begun
        assert facts(go(out, resume=resume)) == whole[0], (at, fails)
    assert [line["event"] for line in log(out)].count("stage") == 3
    assert Log(out).check() == ("finished", [])
    shutil.rmtree(out)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_survives_at_a_sample_of_its_file_operations(tmp_path, whole, fails):
    count = whole[1]
    chosen = random.Random(f"{count}{fails}").sample(range(1, count + 1), 8)
    for at in sorted({1, 2, 3, *chosen, count}):
        survives(tmp_path, whole, at, fails)


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_survives_at_each_of_its_file_operations(tmp_path, whole, fails):
    assert whole[1] > 100
    for at in range(1, whole[1] + 1):
        survives(tmp_path, whole, at, fails)


# Damage: every file is hashed, and the checkpoint before is still there.


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The folder of an interrupted run, which has two checkpoints."""
    return cut(tmp_path_factory.mktemp("half") / "run", 5)


def flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["checkpoint/index.json", "log.jsonl", "config.yaml", "checkpoint/state-*"])
def test_a_flipped_bit_is_found_wherever_it_is(half, tmp_path, name):
    """A resumed run begins from a checkpoint as it was saved, or not at all."""
    known = []
    for index in ("index.json", "previous.json"):
        known.append(Log(half)._read(half / "checkpoint" / index))
    assert known[0].written > known[1].written

    rng, taken = random.Random(name), set()
    for _ in range(60):
        out = Path(shutil.copytree(half, tmp_path / "x"))
        (path,) = sorted(out.glob(name))[-1:]
        flipped(path, rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = Log(out).last(complete=True)
            (number,) = (i for i, one in enumerate(known) if found.file == one.file)
            assert found.facts == known[number].facts
            assert same(found.tensors, known[number].tensors)
            taken.add(number)
        except cs.ConsilienceError:
            taken.add(None)
        shutil.rmtree(out)
    assert None in taken or 1 in taken, "some flip must be found"


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(half, tmp_path, whole):
    out = Path(shutil.copytree(half, tmp_path / "x"))
    index = json.loads((out / "checkpoint" / "index.json").read_text())
    state = out / "checkpoint" / index["file"]
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged.*; the checkpoint before it is used"):
        assert facts(go(out, resume=True)) == whole[0]
    assert Log(out).check() == ("finished", [])


def test_a_damaged_log_or_configuration_is_refused_by_name(half, tmp_path):
    for name in ("log.jsonl", "config.yaml"):
        out = Path(shutil.copytree(half, tmp_path / name))
        (out / name).write_bytes(b"x" + (out / name).read_bytes()[1:])
        with pytest.raises(cs.ConsilienceError, match=f"{name} is .*its content is not what the run wrote"):
            go(out, resume=True)


def test_a_damaged_result_is_refused(tmp_path):
    go(tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    text = path.read_text()
    path.write_text(text.replace('"score": 0.', '"score": 1.', 1))
    with pytest.raises(cs.ConsilienceError, match="damaged or edited"):
        cs.Result.load(tmp_path / "run")
    path.write_text(text)
    assert cs.Result.load(tmp_path / "run").repeats == 1


def test_check_says_whether_a_folder_is_undamaged(half, tmp_path, capsys):
    out = Path(shutil.copytree(half, tmp_path / "runs" / "cut"))
    go(tmp_path / "runs" / "done")
    assert main(["check", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}  can be resumed, undamaged",
        f"{tmp_path / 'runs' / 'done'}  finished, undamaged",
    ]
    flipped(out / "checkpoint" / "previous.json", random.Random(1))
    (out / "checkpoint" / "state.part").write_bytes(b"")
    assert main(["check", str(out)]) == 1
    said = capsys.readouterr().out
    assert "can be resumed, damaged" in said and "previous.json" in said and "state.part" in said
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert "needs the folder of a run" in capsys.readouterr().err


def test_folders_are_synced_after_a_rename(tmp_path, monkeypatch):
    """A rename is on disk once its folder is: so each must be synced between two renames."""
    order, real = [], (os.replace, os.fsync)

    def fsync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        order.append(("sync", path)) if os.path.isdir(path) else None
        real[1](handle)

    def rename(old, new):
        order.append(("rename", str(Path(new).parent)))
        real[0](old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    go(tmp_path / "a" / "run")
    renames = [i for i, (what, _) in enumerate(order) if what == "rename"]
    assert len(renames) > 10
    assert all(order[i + 1] == ("sync", order[i][1]) for i in renames)
    made = [tmp_path, tmp_path / "a", tmp_path / "a" / "run"]
    assert {("sync", str(path)) for path in made} <= set(order)


# Only the run that began goes on.


def other_inputs(part: cs.Source) -> cs.Source:
    """All inputs but every 16th are zero."""
    x = part.train.whole()[0].clone()
    x[[i for i in range(len(x)) if i % 16]] = 0
    return replace(part, train=type(part.train)(x, part.train.targets()))


def other_test(part: cs.Source) -> cs.Source:
    x, y = part.test.whole()
    return replace(part, test=type(part.test)(x, y.flip(0)))


def other_validation(part: cs.Source) -> cs.Source:
    x, y = part.validation.whole()
    return replace(part, validation=type(part.validation)(x * 0.5, y))


@pytest.mark.parametrize("change", [other_inputs, other_test, other_validation])
def test_other_data_are_not_resumed(half, tmp_path, change):
    out = Path(shutil.copytree(half, tmp_path / "x"))
    other = cs.settings.continual([PARTS[0], change(PARTS[1])])
    with pytest.raises(cs.ConsilienceError, match=rf"`data.{PARTS[1].name}` was"):
        go(out, schedule=other, resume=True)


@pytest.mark.parametrize("name", ["consilience", "torch"])
def test_another_version_does_not_resume(half, tmp_path, monkeypatch, name):
    out = Path(shutil.copytree(half, tmp_path / "x"))
    if name == "torch":
        monkeypatch.setattr(fingerprint.torch, "__version__", "9.0")
    else:
        monkeypatch.setattr(fingerprint, "__version__", "9.0")
    with pytest.raises(cs.ConsilienceError, match=rf"`versions.{name}` was .* and is 9.0 now"):
        go(out, resume=True)


def test_a_schedule_that_differs_late_is_not_resumed(tmp_path):
    rounds = partial(cs.settings.federated, PARTS, clients_per_round=1)
    setup = partial(
        checks.check_all,
        method=cs.methods.fedavg(),
        model=cs.models.mlp(64, (4,), 10),
        training=cs.Training(epochs=1),
        options=checks.RunOptions(),
    )
    found = [fingerprint.fingerprint(setup(rounds(rounds=n)), checks.RunOptions()) for n in (334, 400)]
    assert found[0]["schedule"] != found[1]["schedule"]
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"schedule"}


def test_other_parameters_to_start_from_are_not_resumed(tmp_path):
    model = cs.models.mlp(64, (4,), 10)
    start = go().params

    def run(base, **options):
        schedule = cs.settings.merging(PARTS, base=base)
        return cs.run(schedule, cs.methods.average(), model, cs.Training(epochs=1), out=tmp_path, **options)

    first = run(start)
    assert same(run(dict(start), resume=True).params, first.params)
    moved = {name: p + 0.25 * (name == min(start)) for name, p in start.items()}
    with pytest.raises(cs.ConsilienceError, match="`base` was"):
        run(moved, resume=True)


SCALE = 2.0


def scored(scale, power=1):
    def score(p, y):
        return helper(p, y) * scale**power

    return score


def helper(p, y):
    return float((p.argmax(1) == y).double().mean()) * SCALE


def test_code_of_ones_own_is_known_by_what_it_computes(monkeypatch):
    """Another body, constant, default or helper is another metric; another place in the file is not."""
    hashes = fingerprint.code_of
    first = hashes(scored(1.0))
    assert list(first) == [f"{__name__}.helper", f"{__name__}.scored.<locals>.score"]
    assert hashes(scored(1.0)) == first == hashes({"a": [partial(scored(1.0), None)]})
    assert hashes(scored(1.5)) != first != hashes(scored(1.0, 2))
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert hashes(scored(1.0))[f"{__name__}.helper"] != first[f"{__name__}.helper"]
    monkeypatch.setitem(globals(), "helper", lambda p, y: 0.0)
    assert hashes(scored(1.0)).keys() != first.keys()
    assert hashes((cs.methods.ewc(), torch.nn.Linear(2, 2), torch.optim.SGD)) == {}

    class Net(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert list(hashes(torch.nn.Sequential(Net(2, 2)))) == [f"{Net.__module__}.{Net.__qualname__}.forward"]


def test_packages_of_another_environment_are_no_code_of_ones_own(monkeypatch):
    # As with --system-site-packages, or pip install --user.
    monkeypatch.setattr(fingerprint.sysconfig, "get_paths", lambda: dict.fromkeys(PLACES, "/elsewhere"))
    fingerprint._is_library.cache_clear()
    try:
        assert fingerprint.code_of(torch.nn.functional.relu6) == {}
        assert list(fingerprint.code_of(helper)) == [f"{__name__}.helper"]
    finally:
        fingerprint._is_library.cache_clear()


PLACES = ("purelib", "platlib", "stdlib")


@pytest.mark.slow  # two processes import torch
def test_the_code_of_a_function_has_one_hash_in_every_process(tmp_path):
    """Sets of texts have another order in each process, and objects other addresses."""
    (tmp_path / "own.py").write_text(
        "def metric(p, y, places=frozenset('abcdef'), at=object()):\n"
        "    return float('a' in {'a', 'b', 'c', 'd'})\n"
    )
    script = "import own; from consilience.loop.fingerprint import code_of; print(code_of(own.metric))"
    said = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1 and "own.metric" in said.pop()


# One process at a time.


def test_a_folder_in_use_is_refused_with_the_process_that_has_it(half, tmp_path):
    out = Path(shutil.copytree(half, tmp_path / "x"))
    script = "import sys, time; from pathlib import Path; from consilience.loop.lock import FolderLock; "
    script += f"lock = FolderLock(Path({str(out)!r})); print('locked', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(cs.ConsilienceError, match=f"is in use by process {holder.pid}; wait"):
            go(out, resume=True)
    finally:
        holder.kill()
        holder.communicate()
    # The lock has died with its owner, although its file is still there.
    assert (out / "lock").exists()
    go(out, resume=True)
    assert not (out / "lock").exists()


def test_a_run_locks_its_folder_until_it_ends(tmp_path, half):
    def again(line):
        with pytest.raises(cs.ConsilienceError, match=f"is in use by process {os.getpid()}"):
            FolderLock(tmp_path)
        seen.append(line["event"])

    seen: list[str] = []
    go(tmp_path, progress=again)
    assert seen[0] == "begin" and seen[-1] == "end"
    FolderLock(tmp_path).release()
    # An error frees it as well.
    with pytest.raises(cs.ConsilienceError, match="`method.name` was"):
        go(tmp_path, method=cs.methods.finetune(), resume=True)
    FolderLock(tmp_path).release()


def test_a_worker_that_outlives_its_run_holds_no_lock(tmp_path):
    lock = FolderLock(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b"begun")
        time.sleep(30)
        os._exit(0)
    try:
        assert os.read(read, 5) == b"begun"
        os.close(lock.handle)  # as the death of this process does, without unlocking
        lock.handle = None
        FolderLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# Killed early, or asked to end.


def killed(monkeypatch, name: str) -> None:
    """Let the process die where the first checkpoint of a method would be written."""
    real = Log.checkpoint

    def die(self, *args):
        if self.out.name == name:
            raise Stop
        return real(self, *args)

    monkeypatch.setattr(Log, "checkpoint", die)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, whole, resume):
    out = tmp_path / "er"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        killed(patch, "er")
        go(out)
    assert (out / "log.jsonl").exists() and not (out / "checkpoint").exists()
    assert Log(out).check() == ("no checkpoint; it begins again", [])
    assert facts(go(out, resume=resume)) == whole[0]
    assert [line["event"] for line in log(out)].count("begin") == 1


def test_a_lost_checkpoint_is_not_begun_again_over_its_log(half, tmp_path):
    out = Path(shutil.copytree(half, tmp_path / "x"))
    shutil.rmtree(out / "checkpoint")
    with pytest.raises(cs.ConsilienceError, match="`out` must be a new folder"):
        go(out)
    with pytest.raises(cs.ConsilienceError, match="has a run, but its checkpoint is missing"):
        go(out, resume=True)


def test_a_comparison_keeps_what_is_finished(tmp_path, capsys):
    argv = ["compare", "--data", "wine", "--split", "iid", "--split.clients", "2", "--training.epochs", "1"]
    argv += ["--methods", "finetune,er", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        killed(patch, "er")
        main(argv)
    before = (tmp_path / "finetune" / "result.json").stat().st_mtime_ns

    # What remains to be run would be another method without a word.
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("epochs: 1", "epochs: 3"))
    assert main(["compare", "--out", str(tmp_path), "--resume"]) == 2
    assert "config.yaml is damaged or edited" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(config)
    assert main([*argv, "--resume"]) == 0
    assert "finetune  was finished" in capsys.readouterr().out
    assert (tmp_path / "finetune" / "result.json").stat().st_mtime_ns == before
    assert list(json.loads((tmp_path / "compare.json").read_text())["results"]) == ["finetune", "er"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, whole, number):
    def ask(line):
        if line["event"] == "stage" and line["stage"] == 1:
            signal.raise_signal(number)

    with pytest.raises(cs.Interrupted, match="interrupted; continue with"):
        go(tmp_path, progress=ask)
    assert log(tmp_path)[-1]["event"] == "checkpoint"
    assert facts(go(tmp_path, resume=True)) == whole[0]


def test_a_run_under_nohup_goes_on_when_its_terminal_is_closed(whole):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        found = go(progress=lambda line: signal.raise_signal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert facts(found) == whole[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_a_merge_that_is_ended_leaves_no_part(tmp_path, number, name):
    base = {"w": torch.zeros(1000)}

    def ask(done, total):
        signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt, match=f"ended by {number.name}"):
        cs.merge(base, [{"w": torch.ones(1000)}] * 2, out=tmp_path / "new" / name, progress=ask)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_file_that_is_ended_while_it_is_written_leaves_no_part(tmp_path, monkeypatch):
    from consilience.core.params import write_json

    monkeypatch.setattr(os, "fsync", lambda handle: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"a": 1})
    assert not list(tmp_path.iterdir())


def test_a_sweep_killed_at_its_second_method_goes_on(tmp_path):
    methods = {"a": cs.methods.er(size=8), "b": cs.methods.er(size=4)}
    training, model = cs.Training(epochs=1, batch_size=16), cs.models.mlp(64, (4,), 10)
    sweep = partial(cs.sweep, SCHEDULE, methods, model, training, engine="serial")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        killed(patch, "b")
        sweep(out=tmp_path)
    with pytest.raises(cs.ConsilienceError, match=f"{tmp_path / 'a'} has a run"):
        sweep(out=tmp_path)
    again, whole = sweep(out=tmp_path, resume=True), sweep()
    assert {name: facts(again[name]) for name in methods} == {name: facts(whole[name]) for name in methods}


def test_the_last_two_checkpoints_are_kept(half):
    states = {path.name for path in (half / "checkpoint").glob("state-*")}
    indices = [
        json.loads((half / "checkpoint" / name).read_text()) for name in ("previous.json", "index.json")
    ]
    assert states == {index["file"] for index in indices} and len(states) == 2
    assert indices[0]["facts"]["trials"]["0"]["ledger"]["steps"] < 5
    assert indices[1]["facts"]["trials"]["0"]["ledger"]["steps"] >= 5


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_checkpoints_are_readable_by_their_owner_alone(tmp_path):
    go(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint").stat().st_mode & 0o777 == 0o700


# The log says how training goes.


def visits(out: Path) -> list[dict]:
    """The lines of visits, but their times."""
    lines = [line for line in log(out) if line["event"] == "visit"]
    assert all(0 < line.pop("seconds_per_step") < 60 for line in lines)
    return lines


def test_the_log_has_loss_gradient_norm_and_learning_rate_of_each_visit(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.Tanh(), torch.nn.Linear(4, 10))
    mine = copy.deepcopy(net)
    training = cs.Training(epochs=5, batch_size=48, lr=0.5, lr_schedule="linear", clip_norm=0.5)
    go(tmp_path, model=net, method=cs.methods.finetune(), training=training)

    # Full batches, so that order does not matter; the norms are those of steps 1, 2 and 4, before clipping.
    for part, line in zip(PARTS, visits(tmp_path), strict=True):
        losses, norms = [], []
        for step in range(5):
            loss = torch.nn.functional.cross_entropy(mine(part.train.x), part.train.y)
            grads = torch.autograd.grad(loss, list(mine.parameters()))
            norm = torch.cat([grad.flatten() for grad in grads]).norm()
            with torch.no_grad():
                for p, grad in zip(mine.parameters(), grads, strict=True):
                    p -= 0.5 * (1 - step / 5) * grad * min(1.0, 0.5 / float(norm))
            losses.append(loss.item())
            norms.append(float(norm))
        assert line["loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)
        assert line["grad_norm"] == pytest.approx((norms[0] + norms[1] + norms[3]) / 3, rel=1e-4)
        assert line["lr"] == pytest.approx(0.1) and line["steps"] == 5 and line["sources"] == [part.name]
    assert [line["trained"] for line in visits(tmp_path)] == [5, 10]


@pytest.mark.parametrize("stopping", [None, 1])
def test_the_log_of_a_resumed_run_is_that_of_a_whole_one(tmp_path, stopping):
    part = replace(PARTS[0], validation=PARTS[0].test)
    given = {
        "schedule": cs.settings.continual([part, replace(PARTS[1], validation=PARTS[1].test)]),
        "training": cs.Training(epochs=4, batch_size=16, lr=0.3, stopping=stopping),
    }
    go(tmp_path / "whole", **given)
    cut(tmp_path / "cut", 3, **given)
    go(tmp_path / "cut", resume=True, **given)
    assert visits(tmp_path / "cut") == visits(tmp_path / "whole")
    assert all(line["loss"] and line["grad_norm"] for line in visits(tmp_path / "cut"))


def test_stacked_agents_log_what_serial_ones_do_but_loss_and_norm(tmp_path):
    schedule = cs.settings.federated(PARTS, rounds=2)
    given = {
        "schedule": schedule,
        "method": cs.methods.fedavg(),
        "training": cs.Training(lr_schedule="cosine"),
    }
    for engine in ("serial", "batched"):
        go(tmp_path / engine, engine=engine, **given)
    alone, stacked = visits(tmp_path / "serial"), visits(tmp_path / "batched")
    assert len(alone) == 4 and all(line["loss"] > 0 for line in alone)
    assert stacked == [{**line, "loss": None, "grad_norm": None} for line in alone]
