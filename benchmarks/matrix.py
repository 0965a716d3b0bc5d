"""The cross-setting matrix: every aggregator of the catalogue on gradients of tasks, on updates of clients
and on task vectors of experts, from the same data and the same net.

Data: USPS (CONSILIENCE_DATA) in SOURCES equal parts, each turned by its own multiple of 30 degrees, so that a
6 of the first is a 9 of the last; TRAIN training images per part. TEST test images, drawn once, are turned by
all angles. Net: MLP 256-64-10. One score: the mean accuracy over the angles.

- task gradients: one agent, SOURCES objectives per step, 16 epochs of batches of 32.
- client updates: SOURCES clients and a server, 10 rounds of one epoch each. "One client with wrong labels":
  the same, but all training labels of the first client are off by one.
- task vectors: SOURCES experts are fine-tuned for 3 epochs (lr .1) from one base, which was trained for 4
  epochs on other images of all angles (BASE per angle), and are merged once.

Mean and standard deviation over SEEDS seeds, which draw parts, nets and batches. Arguments of aggregators are
their defaults, and tuned for none; Krum's kin expect one bad row. For task gradients the learning rate (SGD)
is chosen for each aggregator by the validation parts (another seed). STRENGTHS Clients have one rate, which
is chosen in the same way for the mean, and experts are the same for all. Fisher merging is
`methods.fisher_merging`; all else is `methods.aggregate`. GEM and A-GEM are refused: nothing sets constraints
here.

`python benchmarks/matrix.py` writes the results and the table in docs/aggregators.md; `--page` only the
table, from the results. With `--keep FOLDER` a stopped run goes on.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import consilience as cs
from common import PROTOCOL, RESULTS, folder_for, kept, save, spread, tune
from consilience import aggregators
from consilience.core.params import write_bytes
from consilience.core.source import Source, Tensors

SEEDS, SOURCES, TRAIN, BASE, TEST = 3, 7, 128, 60, 400
RATES = (0.05, 0.15, 0.5, 1.5, 5.0)
COLUMNS = {
    "gradients": "task gradients",
    "updates": "client updates",
    "bad client": "client updates, one client with wrong labels",
    "experts": "task vectors",
}
GIVEN: dict[str, dict[str, Any]] = {
    "krum": {"byzantine": 1},
    "multi_krum": {"byzantine": 1},
    "bulyan": {"byzantine": 1},
}
"""Arguments of aggregators that have no default for one."""
TORCHJD = ("ConFIG", "DualProj")
"""Others of torchjd, by the adapter."""
PAGE = Path(__file__).parents[1] / "docs" / "aggregators.md"
BEGIN, END = "<!-- begin: made by benchmarks/matrix.py -->\n", "<!-- end -->"


class Cell(NamedTuple):
    """A run: an aggregator in a column, at a learning rate, with a seed."""

    column: str
    name: str
    rate: float
    seed: int
    tuning: bool = False


def names() -> list[str]:
    """Every aggregator of the catalogue, in its order of the alphabet; the adapter stands for some."""
    return [n for n in aggregators.__all__ if n != "torchjd"] + [f"torchjd: {n}" for n in TORCHJD]


def method(name: str, column: str) -> cs.Method:
    """The method that puts an aggregator where a setting combines."""
    if name == "fisher" and column != "gradients":
        return cs.methods.fisher_merging()
    if name.startswith("torchjd: "):
        return cs.methods.aggregate(aggregators.torchjd(name.removeprefix("torchjd: ")))
    return cs.methods.aggregate(getattr(aggregators, name)(**GIVEN.get(name, {})))


@lru_cache(maxsize=2)
def sources(seed: int) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """The turned parts, and others to train a base on."""
    whole = cs.data.npz("usps", seed=seed)
    some = torch.randperm(len(whole.test), generator=torch.Generator().manual_seed(0))[:TEST]
    whole = replace(whole, test=whole.test.select(some))
    found: list[list[Source]] = [[], []]
    for i, part in enumerate(cs.data.iid(whole, SOURCES, seed=seed)):
        turned = cs.data.rotate(part, [30 * i])[0]
        rest = {what: scaled(getattr(turned, what)) for what in ("validation", "test")}
        cuts = (range(TRAIN), range(TRAIN, TRAIN + BASE))
        for own, cut in zip(found, cuts, strict=True):
            train = scaled(turned.train.select(torch.tensor([*cut])))
            own.append(replace(turned, name=f"angle-{30 * i}", train=train, **rest))
    return tuple(found[0]), tuple(found[1])


def scaled(tensors: Any) -> Tensors:
    """Images in [0, 1] with a mean near 0 and a deviation near 1."""
    x, y = tensors.whole()
    return Tensors((x - 0.25) / 0.38, y)


def off_by_one(source: Source) -> Source:
    """The source with every training label one too large, and the last one 0."""
    x, y = source.train.whole()
    return replace(source, train=Tensors(x, (y + 1) % 10))


@lru_cache(maxsize=2)
def base(seed: int) -> Any:
    """What the experts start from."""
    schedule = cs.settings.multitask(sources(seed)[1], "domain")
    training = cs.Training(epochs=4, batch_size=32, lr=0.1)
    return cs.run(schedule, cs.methods.finetune(), net(), training, seed=seed).params


def net() -> Any:
    return cs.models.mlp(256, (64,), 10)


def measured(cell: Cell) -> dict[str, Any]:
    """The score of a run, or why there is none."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts = list(sources(cell.seed)[0])
    if cell.tuning:
        parts = [replace(part, test=part.validation) for part in parts]
    if cell.column == "bad client":
        parts = [off_by_one(parts[0]), *parts[1:]]
    training = cs.Training(epochs=1, batch_size=32, lr=cell.rate)
    try:
        used = method(cell.name, cell.column)
        schedule: Any
        if cell.column == "gradients":
            schedule, training = cs.settings.multitask(parts, "domain"), replace(training, epochs=16)
        elif cell.column == "experts":
            schedule = cs.settings.merging(parts, base=base(cell.seed), scenario="domain")
            training = replace(training, epochs=3)
        else:
            schedule = cs.settings.federated(parts, rounds=10, scenario="domain", evaluate_every=10)
        return {"score": cs.run(schedule, used, net(), training, seed=cell.seed).score}
    except cs.ConsilienceError as error:
        kind = "diverged" if "iverged" in type(error).__name__ or "finite" in str(error) else "refused"
        return {kind: str(error)}


def kept_cell(work: tuple[Path | None, Cell]) -> dict[str, Any]:
    """`measured`, once per folder."""
    folder, cell = work
    return kept(folder, list(cell), lambda: measured(cell))


def run(pool: ProcessPoolExecutor, keep: Path | None) -> dict[str, Any]:
    """Tune and measure all cells: {aggregator: {column: what came of it}}."""

    def scored(cells: Sequence[Cell]) -> list[dict[str, Any]]:
        return list(pool.map(kept_cell, [(keep, cell) for cell in cells]))

    # A refusal does not depend on the rate, and is found before any is tried.
    tuned = [(n, "gradients") for n in names()]
    first = scored([Cell(c, n, RATES[2], 1000, True) for n, c in tuned])
    refused = {key: found for key, found in zip(tuned, first, strict=True) if "refused" in found}
    tuned = [*(key for key in tuned if key not in refused), ("mean", "updates")]
    chosen = tune(
        {key: RATES for key in tuned},
        lambda trials: [
            found.get("score", -1.0)
            for found in scored([Cell(c, n, rate, 1000, True) for (n, c), rate in trials])
        ],
    )
    clients = chosen["mean", "updates"].value

    rows: dict[str, Any] = {name: {} for name in names()}
    for name in rows:
        for column in COLUMNS:
            if (name, column) in refused:
                rows[name][column] = refused[name, column]
                continue
            choice = chosen.get((name, column))
            rate = choice.value if choice else {"experts": 0.1}.get(column, clients)
            found = scored([Cell(column, name, rate, seed) for seed in range(SEEDS)])
            without = [f for f in found if "score" not in f]
            row = without[0] if without else {"scores": [f["score"] for f in found]}
            rows[name][column] = {"rate": rate, **row} | ({"tuned": choice._asdict()} if choice else {})
        print(name, rows[name], flush=True)
    return rows


def short(reason: str) -> str:
    """The first sentence of a reason, and of many messages' reasons the first.

    >>> short("2 of 3 messages were refused: the model of 'a': Slerp needs 2 rows, got 3. And so on.")
    'Slerp needs 2 rows, got 3.'
    """
    reason = re.sub(r"^.* messages were refused.*?: the model of '[^']*': ", "", reason)
    return re.split(r"(?<=\.)\s", reason, maxsplit=1)[0]


def table(rows: Mapping[str, Any]) -> str:
    """The table of results, and the reasons of what refuses."""
    reasons: list[str] = []

    def shown(found: Mapping[str, Any]) -> str:
        if "scores" in found:
            return spread(found["scores"])
        kind = "refused" if "refused" in found else "diverged"
        if kind == "diverged":
            return kind
        reason = short(found[kind])
        if reason not in reasons:
            reasons.append(reason)
        return f"[{reasons.index(reason) + 1}]"

    lines = [f"| aggregator | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, found in rows.items():
        lines.append(f"| `{name}` | {' | '.join(shown(found[column]) for column in COLUMNS)} |")
    lines += ["", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    return "\n".join(lines)


def write_page(rows: Mapping[str, Any]) -> None:
    """Put the table into the page of the documentation."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    write_bytes(PAGE, f"{before}{BEGIN}\n{table(rows)}\n\n{END}{rest.partition(END)[2]}".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--page", action="store_true", help="only write the page, from the results")
    parser.add_argument("--keep", type=Path, help="a folder for what is done, so that a stopped run goes on")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    if not chosen.page:
        with ProcessPoolExecutor(chosen.workers) as pool:
            rows = run(pool, folder_for(chosen.keep))
        about = (__doc__ or "").replace("SEEDS", str(SEEDS)).replace("SOURCES", str(SOURCES))
        about = about.replace("TRAIN", str(TRAIN)).replace("BASE", str(BASE)).replace("TEST", str(TEST))
        about = about.replace("STRENGTHS", PROTOCOL)
        save("matrix", about, {"seeds": SEEDS, "rates": RATES, "rows": rows}, table(rows))
    write_page(json.loads((RESULTS / "matrix.json").read_text())["rows"])


if __name__ == "__main__":
    main()
