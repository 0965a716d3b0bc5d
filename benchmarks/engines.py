"""Client updates per second of the batched engine and of a plain PyTorch loop, as ratios of wall time.

100 clients, 10 per round, 100 samples of 28x28 each (unequal: 20 to 100), 5 local epochs, batch 10, 2
threads for both, ROUNDS rounds per measurement after a warm-up; both are timed in turns, and the median of
REPEATS is shown, with the least and the most (the serial engine: once). The loop does the same work by
hand: it trains one client after another (FedProx and GHBM: what they add to the gradient; ER: a batch of 10
from the client's buffer next to each new one) and averages. Ours also serialises messages, hashes them, and
counts costs. Times are those of a run, divided by its rounds: they include preparing it, but its programs
were traced in the warm-up, since engine and model are used again. Scaling: CROWDS clients of 20 images (all
from one bank, so that data take no memory), 100 rounds of 100, each in a process of its own, with its peak
memory. `make results` writes results/engines.{json,md}. On a GPU: --device cuda:0.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
from common import save
from consilience.core.model import Model
from consilience.core.source import Source, Tensors
from consilience.engines import batched, serial

CROWDS = (100, 1_000, 10_000)
ROUNDS, REPEATS, CLIENTS, SAMPLED, EPOCHS, BATCH, LR = 40, 3, 100, 10, 5, 10, 0.05
LIMITS = {"fedavg": 3.0, "fedprox": 2.0, "ghbm": 2.0, "er": 1.5, "unequal": 2.0, "conv": 1.4}
LABELS = tuple(("noise", str(i)) for i in range(10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def sources(n: int, unequal: bool, device: str, tasks: int = 1) -> list[list[Source]]:
    """Random images: the time is the same as with real ones. `tasks` sources a client."""
    g = torch.Generator().manual_seed(0)
    test = Tensors(torch.rand(10, 1, 28, 28, generator=g), torch.randint(10, (10,), generator=g))
    made = []
    for i in range(n):
        size = int(torch.randint(20, 101, (), generator=g)) if unequal else 100
        own = []
        for t in range(tasks):
            x, y = torch.rand(size, 1, 28, 28, generator=g), torch.randint(10, (size,), generator=g)
            own.append(
                Source(
                    f"c{i:05d}/{t}", Tensors(x.to(device), y.to(device)), test, test, LABELS, tuple(range(10))
                )
            )
        made.append(own)
    return made


def loop(
    make: Callable[[], nn.Module], data: list[list[Source]], rounds: int, kind: str, device: str
) -> None:
    """The plain loop: one client after another."""
    torch.manual_seed(0)
    net = make().to(device)
    names = [n for n, _ in net.named_parameters()]
    server = [p.detach().clone() for p in net.parameters()]
    history = [server]
    optimiser = torch.optim.SGD(net.parameters(), lr=LR)
    turns = [kind == "er" and r >= rounds // 2 for r in range(rounds)]
    for task in turns:
        ends, sizes = [], []
        for k in torch.randperm(len(data))[:SAMPLED].tolist():
            with torch.no_grad():
                for p, s in zip(net.parameters(), server, strict=True):
                    p.copy_(s)
            x, y = data[k][int(task)].train.whole()
            old = data[k][0].train.whole() if kind == "er" and task else None
            add: list[Tensor] | None = None
            if kind == "ghbm" and len(history) > 2:
                steps = EPOCHS * -(-len(y) // BATCH)
                add = [0.9 / (LR * 2 * steps) * (a - b) for a, b in zip(history[-3], server, strict=True)]
            for _ in range(EPOCHS):
                order = torch.randperm(len(y), device=device)
                for i in range(0, len(y), BATCH):
                    index = order[i : i + BATCH]
                    optimiser.zero_grad()
                    if old is not None:
                        again = torch.randint(len(old[1]), (BATCH,), device=device)
                        out = net(torch.cat([x[index], old[0][again]]))
                        loss = (
                            F.cross_entropy(out[: len(index)], y[index])
                            + F.cross_entropy(out[len(index) :], old[1][again])
                        ) / 2
                    else:
                        loss = F.cross_entropy(net(x[index]), y[index])
                    loss.backward()
                    if kind == "fedprox":
                        for p, s in zip(net.parameters(), server, strict=True):
                            p.grad.add_(p.detach() - s, alpha=0.1)  # type: ignore[union-attr]
                    if add is not None:
                        for p, a in zip(net.parameters(), add, strict=True):
                            p.grad.add_(a)  # type: ignore[union-attr]
                    optimiser.step()
            ends.append([p.detach().clone() for p in net.parameters()])
            sizes.append(len(y))
        total = sum(sizes)
        server = [
            sum((e[i] * (n / total) for e, n in zip(ends, sizes, strict=True)), torch.zeros_like(server[i]))
            for i in range(len(names))
        ]
        history = [*history[-3:], server]


def ours(model: Model, data: list[list[Source]], rounds: int, kind: str, engine: object, device: str) -> None:
    m = cs.methods
    method = {"fedprox": m.fedprox(0.1), "ghbm": m.ghbm(0.9, 2), "er": m.er(100, BATCH)}.get(kind, m.fedavg())
    training = cs.Training(epochs=EPOCHS, batch_size=BATCH, lr=LR, device=device)
    if kind == "er":
        schedule = cs.settings.federated_continual(
            data, rounds=rounds // 2, clients_per_round=SAMPLED, evaluate_every=rounds
        )
    else:
        schedule = cs.settings.federated(
            [s for (s,) in data], rounds=rounds, clients_per_round=SAMPLED, evaluate_every=rounds
        )
    cs.run(schedule, method, model, training, engine=engine)  # type: ignore[arg-type]


def crowd(n: int) -> dict[str, float]:
    """Peak memory and time of a federation of n clients, in a process of its own."""
    out = subprocess.run(
        [sys.executable, __file__, "--crowd", str(n)], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def crowded(n: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2000, 1, 28, 28, generator=g), torch.randint(10, (2000,), generator=g)
    test = Tensors(x[:10], y[:10])
    sources = [
        Source(
            f"c{i:05d}",
            Tensors(x[20 * (i % 100) :][:20], y[20 * (i % 100) :][:20]),
            test,
            test,
            LABELS,
            tuple(range(10)),
        )
        for i in range(n)
    ]
    start = time.perf_counter()
    schedule = cs.settings.federated(sources, 100, 100, evaluate_every=100)
    training = cs.Training(epochs=1, batch_size=10, lr=LR)
    cs.run(schedule, cs.methods.fedavg(), cs.models.wrap(mlp), training, engine="batched")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps({"clients": n, "peak_mib": round(peak), "seconds": round(time.perf_counter() - start, 1)})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="1,000 clients, 100 a round, and more repeats")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", nargs="*", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--crowd", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.crowd:
        crowded(arguments.crowd)
        return
    global SAMPLED, CLIENTS
    if arguments.full:
        CLIENTS, SAMPLED = 1000, 100
    d, rows = arguments.device, []
    load = os.getloadavg()[0]
    for case in arguments.cases:
        make = conv if case == "conv" else mlp
        model = cs.models.wrap(make)
        data = sources(CLIENTS, case == "unequal", d, 2 if case == "er" else 1)
        engines = {"batched": batched(), "serial": serial()}
        rounds = ROUNDS // 4 if case == "conv" else ROUNDS
        for e in engines.values():
            ours(model, data, 4, case, e, d)
        loop(make, data, 2, case, d)
        times: dict[str, list[float]] = {"loop": [], **{n: [] for n in engines}}
        for _ in range(REPEATS + 2 * arguments.full):
            start = time.perf_counter()
            loop(make, data, rounds, case, d)
            if d != "cpu":
                torch.cuda.synchronize()
            times["loop"].append(time.perf_counter() - start)
            for name, e in engines.items():
                if name == "serial" and times[name]:
                    continue  # no ratio needs it, and it takes half of the time
                start = time.perf_counter()
                ours(model, data, rounds, case, e, d)
                times[name].append(time.perf_counter() - start)
        per = {n: statistics.median(t) / rounds for n, t in times.items()}
        ratios = [a / b for a, b in zip(times["loop"], times["batched"], strict=True)]
        rows.append(
            {
                "case": case,
                "loop_ms": 1e3 * per["loop"],
                "serial_ms": 1e3 * per["serial"],
                "batched_ms": 1e3 * per["batched"],
                "updates": SAMPLED / per["batched"],
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "limit": LIMITS[case],
            }
        )
        print(rows[-1], flush=True)
    table = [
        "| case | loop, ms a round | serial | batched | client updates a second "
        "| batched over loop | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        table.append(
            f"| {r['case']} | {r['loop_ms']:.0f} | {r['serial_ms']:.0f} | {r['batched_ms']:.0f} "
            f"| {r['updates']:.0f} | {r['ratio']:.2f} ({min(r['ratios']):.2f} to {max(r['ratios']):.2f}) "
            f"| {r['limit']} |"
        )
    crowds = [crowd(n) for n in CROWDS]
    table += ["", "| clients | peak memory, MiB | seconds |", "|---|---|---|"]
    table += [f"| {c['clients']:,.0f} | {c['peak_mib']:.0f} | {c['seconds']:.1f} |" for c in crowds]
    facts = {
        "crowds": crowds,
        "rows": rows,
        "load before": load,
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
        "clients": CLIENTS,
        "a round": SAMPLED,
    }
    about = (
        (__doc__ or "")
        .replace("ROUNDS", str(ROUNDS))
        .replace("REPEATS", str(REPEATS))
        .replace("CROWDS", "100, 1,000 and 10,000")
    )
    stem = Path(__file__).stem + ("_full" if arguments.full else "") + ("" if d == "cpu" else "_gpu")
    save(
        stem,
        about,
        facts,
        "\n".join([*table, "", f"- load before: {load:.2f}", f"- threads: {torch.get_num_threads()}"]),
    )


if __name__ == "__main__":
    main()
