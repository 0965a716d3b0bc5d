"""A new task made of the heads of old ones: their rows side by side as one head, before any training of it.

Digits in five tasks of two classes, one agent, 512 random features that stay as they are. The heads are
trained (20 epochs), trained through the infinity norm of their rows (`multi_head(norm="inf")`), or solved.
The new tasks: "one class of each" (0, 2, 4, 6, 8 and 1, 3, 5, 7, 9; their mean), and "all ten". Accuracy on
test images of rows as the heads use them, and of rows over their infinity norms, which is what
`skill.combine` makes (the same for heads that were trained with it). "Old tasks": the heads, each on its
own task.

Mean and standard deviation over SEEDS seeds of features and training. The learning rate of trained heads is
chosen from five by the validation images of the old tasks (another seed). STRENGTHS Solved heads have their
defaults.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
from dataclasses import replace
from typing import Any

import torch

import consilience as cs
from common import PROTOCOL, save, spread, tune

SEEDS = 5
HEADS: dict[str, tuple[str, str | None]] = {
    "trained with norm='inf'": ("trained", "inf"),
    "trained": ("trained", None),
    "ridge": ("ridge", None),
    "logistic": ("logistic", None),
    "prototypes": ("prototype", None),
}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


def learned(name: str, tasks: list[cs.Source], rate: float, seed: int) -> Any:
    """The result of an agent that learned the tasks."""
    head, norm = HEADS[name]
    model = cs.models.multi_head(cs.models.random_features(64, 512, seed=seed), 10, norm=norm)
    training = cs.Training(epochs=20, lr=rate)
    return cs.run(
        cs.settings.skill([tasks]), cs.methods.skill("oracle", head=head), model, training, seed=seed
    )


def stored_rows(agent: Any, combined: Any) -> Any:
    """The combined module with the rows as the agent stored them."""
    at = f"entries/heads.{combined.task}"
    weight, bias = combined.tensors[f"{at}.weight"].clone(), combined.tensors[f"{at}.bias"].clone()
    wanted = [tuple(label) for label in combined.labels]
    for module in agent.state.experts.values():
        entries = module.group("entries")
        for name, columns in module.group("buffers").items():
            head = name.removesuffix(".columns")
            for row, column in enumerate(columns.tolist()):
                label = tuple(module.labels[column])
                if label in wanted:
                    weight[wanted.index(label)] = entries[f"{head}.weight"][row]
                    bias[wanted.index(label)] = entries[f"{head}.bias"][row]
    return replace(combined, tensors={**combined.tensors, f"{at}.weight": weight, f"{at}.bias": bias})


def measured(name: str, rate: float, seed: int) -> dict[str, float]:
    """Accuracies of one run: on the old tasks, and of both kinds of rows on the new ones."""
    tasks = cs.data.split_classes(cs.data.digits(), 5)
    result = learned(name, tasks, rate, seed)
    agent = result.agent
    x, y = (torch.cat([t.test.whole()[i] for t in tasks]) for i in (0, 1))

    def accuracy(classes: list[int], stored: bool) -> float:
        some, labels = torch.isin(y, torch.tensor(classes)), [agent.frame.labels[c] for c in classes]
        module = cs.skill.combine(agent.state.experts, labels, "new")
        learner = copy.deepcopy(agent)
        cs.skill.give(learner, cs.skill.offer(learner, stored_rows(agent, module) if stored else module))
        return float((learner.predict(x[some], task="new").argmax(1) == y[some]).double().mean())

    found = {"old tasks": float(result.score)}
    for stored, rows in ((True, "as they are"), (False, "over their norm")):
        halves = [accuracy(list(range(first, 10, 2)), stored) for first in (0, 1)]
        found |= {
            f"one class of each, {rows}": sum(halves) / 2,
            f"all ten, {rows}": accuracy([*range(10)], stored),
        }
    return found


def main() -> None:
    tasks = [replace(t, test=t.validation) for t in cs.data.split_classes(cs.data.digits(), 5)]
    rates = tune(
        {name: RATES for name, (head, _) in HEADS.items() if head == "trained"},
        lambda trials: [learned(name, tasks, rate, 1000).score for name, rate in trials],
    )
    rows = {n: [measured(n, rates[n].value if n in rates else 0.1, s) for s in range(SEEDS)] for n in HEADS}
    columns = list(rows["trained"][0])
    lines = [f"| heads | lr | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, found in rows.items():
        cells = " | ".join(spread([f[c] for f in found]) for c in columns)
        lines.append(f"| {name} | {rates.get(name, '')} | {cells} |")
    about = (__doc__ or "").replace("SEEDS", str(SEEDS)).replace("STRENGTHS", PROTOCOL)
    facts = {"seeds": SEEDS, "rates": {n: c._asdict() for n, c in rates.items()}, "rows": rows}
    save("heads", about, facts, "\n".join(lines))


if __name__ == "__main__":
    main()
