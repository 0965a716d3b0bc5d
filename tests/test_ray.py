"""The Ray engine learns what the serial one learns, to the bit, also when a worker dies or the run stops."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import consilience as cs
from consilience.core.errors import ConsilienceError
from consilience.core.params import load, same
from consilience.core.schedule import Evaluate, Exchange, Train, build
from consilience.core.source import Tensors
from consilience.loop.engine import Visit

needed = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'consilience[ray]'"
)
TRAINING = cs.Training(epochs=2, batch_size=32, lr=0.05)
MODEL = cs.models.mlp(64, (24,), 10)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A local Ray of two workers, with a GPU that need not exist, which outlives every run here."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'consilience[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import cloudpickle

    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, logging_level=logging.ERROR)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray
    ray.shutdown()
    for n, handler in old.items():
        signal.signal(n, handler)


@pytest.fixture(scope="module")
def clients() -> list[cs.Source]:
    return cs.data.dirichlet(cs.data.digits(), 5, 0.5)


def kept(out: Path) -> tuple[dict[str, Tensor], Any]:
    """All that a run kept of every agent, but its seconds."""
    index = json.loads((out / "checkpoint" / "index.json").read_text())
    facts = index["facts"]
    for trial in facts["trials"].values():
        trial["ledger"].pop("seconds")
        result = trial["result"]
        ended = [result["costs"], *result["curve"]] if result else []
        for costs in (*trial["judge"]["curve"], *ended):
            costs.pop("seconds", None)
    return load(out / "checkpoint" / index["file"])[0], facts


@dataclass(frozen=True, eq=False)
class Probe(Tensors):
    """Examples that do something before they are read: in a worker, at the start of each visit."""

    folder: Path
    what: str

    def map(self, x: Any = None, y: Any = None) -> Probe:
        plain = super().map(x, y)
        return Probe(plain.x, plain.y, self.folder, self.what)

    def batches(self, plan: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        with open(self.folder / "pids", "a") as f:
            f.write(f"{os.getpid()}\n")
        first = len((self.folder / "pids").read_text().split()) == 1
        if self.what == "killed" and first:
            time.sleep(60)
        if self.what == "waits" and first:
            while not (self.folder / "go").exists():
                time.sleep(0.02)
        if self.what == "raises":
            raise OSError("the disk of this client is gone")
        if self.what == "speaks":
            logging.getLogger("client").warning("reads %d examples", len(self))
        if self.what == "gpus":
            import ray

            (self.folder / "gpus").write_text(json.dumps(ray.get_gpu_ids()))
        yield from super().batches(plan)


def when_begun(folder: Path, do: Any) -> threading.Thread:
    """Do something with the process of a probed client's first visit, once that began."""

    def wait() -> None:
        for _ in range(3000):
            if (folder / "pids").exists() and (text := (folder / "pids").read_text()).endswith("\n"):
                do(int(text.split()[0]))
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def probed(sources: list[cs.Source], i: int, folder: Path, what: str) -> list[cs.Source]:
    x, y = sources[i].train.whole()
    return [*sources[:i], replace(sources[i], train=Probe(x, y, folder, what)), *sources[i + 1 :]]


def rounds(sources: list[cs.Source], n: int, least: int | None = None) -> cs.Schedule:
    """Full participation, with what a round needs."""
    names = [f"client-{i}" for i in range(len(sources))]

    def plan(seed: int) -> Iterator[Any]:
        for r in range(n):
            yield Exchange({c: ("server",) for c in names})
            yield Train({c: (s.name,) for c, s in zip(names, sources, strict=True)}, {"client-0": 0.5}, least)
            yield Exchange({"server": tuple(names)})
            yield Evaluate(f"round {r + 1}")

    return build("federated", sources, "class", plan, "server")


def streams(clients: list[cs.Source]) -> cs.Schedule:
    return cs.settings.federated_continual([clients[:2], clients[2:4]], rounds=2)


@pytest.mark.parametrize(
    ("setting", "method"),
    [
        (lambda c: cs.settings.federated(c, 3, 3), cs.methods.fedavg(outer_momentum=0.9)),
        (lambda c: cs.settings.federated(c, 2), replace(cs.methods.fedprox(0.1), personal=("3.*",))),
        (streams, cs.methods.ewc(5.0)),
        (streams, cs.methods.er(50) + cs.methods.lwf()),
    ],
    ids=["momentum, some a round", "personal", "ewc", "er+lwf"],
)
def test_every_agent_ends_with_the_bits_and_the_costs_of_the_serial_engine(
    ray, clients, tmp_path, setting, method
):
    assert not method.personal or any(n.startswith("3.") for n in MODEL.init(torch.Generator())[0])
    for engine in ("serial", "ray"):
        cs.run(setting(clients), method, MODEL, TRAINING, repeats=2, out=tmp_path / engine, engine=engine)
    (serial, facts), (tasks, theirs) = kept(tmp_path / "serial"), kept(tmp_path / "ray")
    assert same(serial, tasks) and any("client" in name for name in facts["trials"]["1"]["agents"])
    assert facts == theirs
    logs = {
        engine: [json.loads(line) for line in (tmp_path / engine / "log.jsonl").read_text().splitlines()]
        for engine in ("serial", "ray")
    }
    assert any(line["event"] == "engine" for line in logs["ray"])

    # The log says the same of every visit, but how long it took.
    visits = [
        [{**line, "seconds_per_step": 0} for line in lines if line["event"] == "visit"]
        for lines in logs.values()
    ]
    assert visits[0] == visits[1] and all(line["loss"] and line["grad_norm"] for line in visits[0])
    assert ray.is_initialized()  # who started it stops it


def test_models_that_draw_and_have_buffers_are_the_same(ray, clients):
    def net() -> torch.nn.Module:
        n = torch.nn
        return n.Sequential(n.Linear(64, 16), n.BatchNorm1d(16), n.ReLU(), n.Dropout(0.3), n.Linear(16, 10))

    schedule = cs.settings.federated(clients[:3], 2)
    serial, tasks = (
        cs.run(schedule, cs.methods.finetune(), net, TRAINING, engine=e) for e in ("serial", "ray")
    )
    assert same(serial.params, tasks.params) and same(serial.agent.state.buffers, tasks.agent.state.buffers)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(ray, clients, tmp_path):
    sources = probed(clients, 3, tmp_path, "killed")
    killed: list[int] = []
    thread = when_begun(tmp_path, lambda pid: (killed.append(pid), os.kill(pid, signal.SIGKILL)))
    training = replace(TRAINING, epochs=1)
    tasks = cs.run(rounds(sources, 2), cs.methods.ewc(1.0), MODEL, training, engine=cs.engines.ray(workers=2))
    thread.join()
    pids = [int(p) for p in (tmp_path / "pids").read_text().split()]
    assert killed[0] != os.getpid() and killed[0] not in pids[1:] and os.getpid() not in pids
    serial = cs.run(rounds(clients, 2), cs.methods.ewc(1.0), MODEL, training)
    assert same(serial.params, tasks.params)
    assert (
        serial.costs["by_agent"] == tasks.costs["by_agent"] and serial.costs["steps"] == tasks.costs["steps"]
    )


def test_a_worker_that_dies_too_often_fails_its_client_by_name(ray, clients, tmp_path):
    sources = probed(clients[:2], 1, tmp_path, "killed")
    when_begun(tmp_path, lambda pid: os.kill(pid, signal.SIGKILL))
    with pytest.raises(
        ConsilienceError,
        match=r"the Ray worker of 'client-1' died once: WorkerCrashedError",
    ):
        cs.run(rounds(sources, 1), cs.methods.finetune(), MODEL, TRAINING, engine=cs.engines.ray(retries=0))


def test_a_client_that_raises_is_not_tried_again_and_left_out(ray, clients, tmp_path):
    found = []
    for engine in ("serial", "ray"):
        folder = tmp_path / engine
        folder.mkdir()
        schedule = rounds(probed(clients[:3], 1, folder, "raises"), 2, least=2)
        with pytest.warns(
            UserWarning, match="'client-1' failed and is left out: the disk of this client is gone"
        ):
            found.append(
                cs.run(schedule, cs.methods.fedavg(), MODEL, TRAINING, engine=engine, out=folder / "out")
            )
        assert len((folder / "pids").read_text().split()) == 2  # once a round
        lines = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
        why = "OSError: the disk of this client is gone"
        assert [line["why"] for line in lines if line["event"] == "failed"] == [why] * 2
    assert same(found[0].params, found[1].params) and found[0].costs["by_agent"] == found[1].costs["by_agent"]
    with pytest.raises(OSError, match="the disk of this client is gone") as e:
        cs.run(
            rounds(probed(clients[:3], 1, tmp_path, "raises"), 1),
            cs.methods.fedavg(),
            MODEL,
            TRAINING,
            engine="ray",
        )
    assert "in a Ray worker" in e.value.__notes__[0] and "in batches" in e.value.__notes__[0]


def test_warnings_and_log_lines_of_workers_reach_the_driver(ray, clients, tmp_path, caplog):
    texts = []
    sources = probed(clients[:2], 0, tmp_path, "speaks")
    for engine in ("serial", "ray"):
        caplog.clear()
        with pytest.warns(UserWarning, match="(?i)ewc") as warned:
            cs.run(rounds(sources, 3), cs.methods.ewc(1e5), MODEL, replace(TRAINING, epochs=1), engine=engine)
        assert [r.getMessage() for r in caplog.records if r.name == "client"] == [
            f"reads {len(sources[0].train)} examples"
        ] * 3
        texts.append({str(w.message) for w in warned if "ewc" in str(w.message).lower()})
    assert texts[0] and texts[0] == texts[1]


def test_what_all_received_goes_into_the_store_once_a_round_and_data_once_a_run(ray, clients, monkeypatch):
    sizes: list[int] = []
    put = ray.put

    def counting(value: Any) -> Any:
        sizes.append(len(value) if isinstance(value, bytes) else 0)
        return put(value)

    monkeypatch.setattr(ray, "put", counting)
    wide = cs.models.mlp(64, (2000,), 10)
    params = sum(p.nbytes for p in wide.init(torch.Generator())[0].values())
    cs.run(rounds(clients[:4], 3), cs.methods.finetune(), wide, replace(TRAINING, epochs=1), engine="ray")
    data = sum(s.train.whole()[0].nbytes + s.validation.whole()[0].nbytes for s in clients[:4])
    assert (
        sum(params <= size < params + 6000 for size in sizes) == 3 + 1
    )  # the server's, each round; the model that is trained, once
    assert 4 * params < sum(sizes) < 4 * params + 1.2 * data + 50_000


def test_equal_content_is_found_and_other_content_is_not():
    from consilience.engines._ray import Pool

    pool, big = Pool(), torch.randn(100, 50)
    other = big.clone()
    other[99, 48] += 1
    zero = torch.zeros(())
    nan = torch.full((3,), torch.nan)
    several = [
        big,
        big.clone(),
        other,
        big.T,
        big.view(50, 100),
        zero,
        -zero,
        torch.zeros(1),
        nan,
        nan.clone(),
        big.bool(),
        big,
    ]
    assert [pool.place(t) for t in several] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 0]


def test_a_view_of_much_is_sent_as_little():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'consilience[ray]'")
    from consilience.engines._ray_task import dumped, loaded

    x = torch.randn(10_000, 64)[5:9]
    data = dumped(Tensors(x, torch.arange(4)), "some data")
    assert len(data) < 10_000 and torch.equal(loaded(data).x, x)


@pytest.mark.parametrize("again", ["ray", "serial"])
def test_a_run_interrupted_between_clients_resumes_to_the_same_bits(ray, clients, tmp_path, again):
    sources = probed(clients[:3], 1, tmp_path, "waits")
    when_begun(tmp_path, lambda pid: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(cs.core.errors.Interrupted, match="continue with `resume=True`"):
        cs.run(rounds(sources, 2), cs.methods.ewc(1.0), MODEL, TRAINING, engine="ray", out=tmp_path / "run")
    trial = kept(tmp_path / "run")[1]["trials"]["0"]
    assert trial["phase"] == 1 and trial["finished"] in (0, 1) and trial["job"] is None
    (tmp_path / "go").write_text("")
    resumed = cs.run(
        rounds(sources, 2),
        cs.methods.ewc(1.0),
        MODEL,
        TRAINING,
        engine=again,
        out=tmp_path / "run",
        resume=True,
    )
    whole = cs.run(rounds(clients[:3], 2), cs.methods.ewc(1.0), MODEL, TRAINING)
    assert same(whole.params, resumed.params) and whole.costs["by_agent"] == resumed.costs["by_agent"]


def test_a_task_goes_on_where_a_serial_run_stopped_inside_it(ray, clients, tmp_path):
    class Stop(BaseException):
        pass

    def stop(line: Any) -> None:
        if line["event"] == "checkpoint" and line.get("agent") == "client-1":
            raise Stop

    run = dict(
        schedule=rounds(clients[:3], 1),
        method=cs.methods.fedprox(0.1),
        model=MODEL,
        training=replace(TRAINING, momentum=0.9),
    )
    with pytest.raises(Stop):
        cs.run(**run, out=tmp_path, checkpoint_steps=5, progress=stop)
    assert kept(tmp_path)[1]["trials"]["0"]["job"] is not None
    resumed, whole = cs.run(**run, out=tmp_path, resume=True, engine="ray"), cs.run(**run)
    assert same(whole.params, resumed.params)
    assert (
        whole.costs["steps"] == resumed.costs["steps"]
        and whole.costs["by_agent"] == resumed.costs["by_agent"]
    )


def test_fractions_and_retries_are_asked_of_ray(ray, clients, monkeypatch):
    asked: list[dict[str, Any]] = []
    remote = ray.remote

    def recording(**options: Any) -> Any:
        asked.append(options)
        return remote(**{**options, "num_gpus": 0})

    monkeypatch.setattr(ray, "remote", recording)
    engine = cs.engines.ray(gpus=0.25, cpus=0.5, retries=7)
    cs.run(rounds(clients[:2], 1), cs.methods.finetune(), MODEL, TRAINING, engine=engine)
    assert asked == [{"num_cpus": 0.5, "num_gpus": 0.25, "max_retries": 7, "max_calls": 0}]
    agent = SimpleNamespace(training=replace(TRAINING, device="cuda:0"))
    events = SimpleNamespace(note=lambda text: None)
    with pytest.raises(ConsilienceError, match=r"`gpus` must be above 0 for device='cuda:0', got 0"):
        cs.engines.ray().train([Visit(agent, (), 1.0)], events)
    with pytest.warns(
        UserWarning,
        match=r"agents wait until Ray has 1 CPUs and 2 GPUs for one; now Ray has 2 CPUs and 1 GPUs",
    ):
        cs.engines.ray(gpus=2).open(events)


@pytest.mark.slow
def test_a_worker_is_given_its_gpu(ray, clients, tmp_path):
    sources = probed(clients[:1], 0, tmp_path, "gpus")
    cs.run(rounds(sources, 1), cs.methods.finetune(), MODEL, TRAINING, engine=cs.engines.ray(gpus=0.5))
    assert [int(i) for i in json.loads((tmp_path / "gpus").read_text())] == [0]


SCRIPT = """
import json, os, signal, sys, threading, time
from dataclasses import dataclass
from pathlib import Path
import consilience as cs
from consilience.core.source import Tensors
from dataclasses import replace

folder = Path(sys.argv[1])

@dataclass(frozen=True, eq=False)
class Slow(Tensors):
    def map(self, x=None, y=None):
        plain = super().map(x, y)
        return Slow(plain.x, plain.y)
    def batches(self, plan):
        if not (folder / "began").exists():
            (folder / "began").write_text("")
            time.sleep(60)
        yield from super().batches(plan)

def interrupt():
    while not (folder / "began").exists():
        time.sleep(.02)
    os.kill(os.getpid(), signal.SIGTERM)

clients = cs.data.iid(cs.data.digits(), 3)
slow = [replace(clients[0], train=Slow(*clients[0].train.whole())), *clients[1:]]
model = cs.models.mlp(64, (16,), 10)
run = lambda sources, **more: cs.run(cs.settings.federated(sources, 2), cs.methods.fedavg(), model, **more)
threading.Thread(target=interrupt).start()
try:
    run(slow, out=folder / "run", engine=cs.engines.ray(workers=2))
except cs.core.errors.Interrupted as e:
    print("Interrupted:", e)
import ray
print("still there:", ray.is_initialized())
serial = run(clients)
resumed = run(slow, out=folder / "run", resume=True, engine="serial")
print("same:", cs.core.params.same(resumed.params, serial.params))
"""


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.rand((), generator=generator)


@needed
def test_workers_augment_what_buffers_kept_of_other_sources(ray):
    """A worker is sent the sources of a visit, and the augmentations of all."""
    sources = [part.map(augment=moved) for part in cs.data.iid(cs.data.digits(), 2)]
    schedule = cs.settings.federated_continual([cs.data.split_classes(own, 2) for own in sources])
    method = cs.methods.er(size=40) + cs.methods.fedavg()
    serial, workers = (
        cs.run(schedule, method, MODEL, TRAINING, engine=engine)
        for engine in ("serial", cs.engines.ray(workers=2))
    )
    assert same(serial.params, workers.params)


@needed
def test_a_ray_that_a_run_starts_ends_with_it_and_sigterm_still_interrupts(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    args = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    p = subprocess.run(args, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert p.returncode == 0, p.stderr
    assert "Interrupted: interrupted; continue with `resume=True`" in p.stdout
    assert "still there: False" in p.stdout and "same: True" in p.stdout
    assert "Traceback" not in p.stderr


CLUSTER = """
import consilience as cs, ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
clients = cs.data.iid(cs.data.digits(), 4)
model = cs.models.mlp(64, (16,), 10)
run = lambda **more: cs.run(cs.settings.federated(clients, 2), cs.methods.fedavg(), model, **more)
there = run(engine=cs.engines.ray(workers=1, address=cluster.address))
print("same:", cs.core.params.same(run().params, there.params), "nodes:", len(cluster.list_all_nodes()))
cluster.shutdown()
"""


@needed
@pytest.mark.slow
def test_a_cluster_of_two_machines_by_its_address():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    p = subprocess.run(
        [sys.executable, "-c", CLUSTER], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert p.returncode == 0, p.stderr
    assert "same: True nodes: 2" in p.stdout


def test_ray_is_imported_only_when_used():
    code = "import sys, consilience as cs; cs.engines.ray(workers=2); print('ray' in sys.modules)"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert p.stdout == "False\n"


def test_without_ray_the_error_says_how_to_get_it(clients, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConsilienceError, match=r"the engine 'ray' needs Ray: pip install 'consilience\[ray\]'"
    ):
        cs.run(rounds(clients[:2], 1), cs.methods.finetune(), MODEL, TRAINING, engine="ray")


def test_what_cannot_be_pickled_is_named(ray, clients):
    x, y = clients[0].train.whole()
    lock = SimpleNamespace(held=threading.Lock())
    source = replace(clients[0], train=Probe(x, y, lock, "nothing"))  # type: ignore[arg-type]
    with pytest.raises(
        ConsilienceError, match=r"Ray needs everything pickled, but the source '.*' cannot be: .*lock"
    ):
        cs.run(rounds([source, clients[1]], 1), cs.methods.finetune(), MODEL, TRAINING, engine="ray")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"workers": 0}, "`workers` must be a whole number >= 1, got 0"),
        ({"cpus": 0}, "`cpus` must be positive, got 0"),
        ({"gpus": -1}, "`gpus` must be a fraction of one or a whole number, got -1"),
        ({"gpus": 1.5}, "`gpus` must be a fraction of one or a whole number, got 1.5"),
        ({"retries": -1}, "`retries` must be a whole number >= 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    with pytest.raises(ConsilienceError, match=text):
        cs.engines.ray(**arguments)


OPEN = """
import json, os, sys, threading, time
import consilience as cs

def listening():
    found = set()
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
            place, state = line.split()[1], line.split()[3]
            # 127.0.0.1 in bytes of this machine's order, alone or in an address of version 6.
            if state == "0A" and not place.partition(":")[0].endswith("0100007F"):
                found.add(place)
    return found

def descendants(pid):
    children = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = open(f"/proc/{entry}/stat").read().rpartition(")")[2].split()[1]
        except OSError:
            continue
        children.setdefault(int(parent), []).append(int(entry))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found

before, engine = listening(), cs.engines.ray(workers=1)
class Events:
    def note(self, text): pass
engine.open(Events())
print(json.dumps({"open": sorted(listening() - before), "processes": descendants(os.getpid())}), flush=True)
time.sleep(60)
"""


@needed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_ray_of_one_machine_is_closed_to_others_and_dies_with_its_driver():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    driver = subprocess.Popen([sys.executable, "-c", OPEN], stdout=subprocess.PIPE, text=True, env=env)
    assert driver.stdout is not None
    found = json.loads(driver.stdout.readline())
    driver.kill()
    driver.wait()
    assert found["open"] == [] and len(found["processes"]) > 2

    def alive() -> list[int]:
        return [pid for pid in found["processes"] if Path(f"/proc/{pid}/cmdline").exists()]

    deadline = time.monotonic() + 90  # two agents of Ray look for their parent now and then
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive() == []


def test_an_old_ray_and_an_address_without_one_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__="2.51.2"))
    with pytest.raises(ConsilienceError, match=r"needs Ray 2.52 or newer, got 2.51.2"):
        cs.engines.ray().open(SimpleNamespace())  # type: ignore[arg-type]

    # A port that was just free.
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    newer = SimpleNamespace(__version__="2.52.0", is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", newer)
    with pytest.raises(ConsilienceError, match=rf"Ray that answers, got '127.0.0.1:{port}'"):
        cs.engines.ray(address=f"127.0.0.1:{port}").open(SimpleNamespace())  # type: ignore[arg-type]
