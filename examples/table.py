"""A CSV file: is a tumour benign? Patients of four clinics, one row each.

The labels are text, some cells are empty, and a column names the clinic, which is a domain, a task or a
client. Run it with `python examples/table.py`.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

import consilience as cs

CLINICS = ("north", "east", "south", "west")


def write(file: Path) -> None:
    """Write scikit-learn's breast cancer data with a column of clinics, and 2 % of the cells empty."""
    data, random = load_breast_cancer(), np.random.default_rng(0)
    with file.open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow([*data.feature_names, "clinic", "diagnosis"])
        for x, y in zip(data.data, data.target, strict=True):
            cells = ["" if random.random() < 0.02 else f"{value:g}" for value in x]
            # Clinics differ in what they see: the first ones have most of the malignant tumours.
            clinic = random.choice(CLINICS, p=(0.1, 0.2, 0.3, 0.4) if y else (0.4, 0.3, 0.2, 0.1))
            rows.writerow([*cells, clinic, data.target_names[y]])


def sources() -> list[cs.Source]:
    """One source per clinic, standardised by statistics that the clinics add up."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tumours.csv"
        write(file)
        return cs.data.table(file, "diagnosis", group="clinic", missing="mean", metric="balanced_accuracy")


def main() -> None:
    """Run one model in four settings."""
    clinics = sources()
    model, training = cs.models.mlp(30, [16], 2), cs.Training(epochs=5, lr=0.1)
    runs = [
        (cs.settings.continual(clinics, "domain"), cs.methods.ewc(strength=10)),
        (cs.settings.federated(clinics, rounds=5, scenario="domain"), cs.methods.scaffold()),
        (cs.settings.multitask(clinics, "domain"), cs.methods.pcgrad()),
        (cs.settings.merging(clinics, scenario="domain"), cs.methods.average()),
    ]
    results = [cs.run(schedule, method, model, training) for schedule, method in runs]
    print(cs.report.table(results))


if __name__ == "__main__":
    main()
