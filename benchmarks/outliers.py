"""One outlier: a sentinel in one pixel of one training example, with and without `clip=`.

SKILL on digits in five tasks of two classes, two agents, ridge heads on 256 random features; accuracy of
each task at the end. The first pixel of the first example of the first task has the given value; "refused"
means that the run refuses it by the example's name. Three seeds (of features and mixtures): mean and
standard deviation in %, and the least of a task over seeds.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np

import consilience as cs
from common import save, spread
from consilience.core.source import Source, Tensors

VALUES, CLIPS, SEEDS = (None, 1e3, 1e6, 1e30), (0.0, 3.0), 3


def with_value(source: Source, value: float | None) -> Source:
    if value is None:
        return source
    x = source.train.whole()[0].clone()
    x[0, 0] = value
    return replace(source, train=Tensors(x, source.train.targets()))


def measured(mapper: Any, value: float | None, clip: float) -> dict[str, Any]:
    parts = cs.data.split_classes(cs.data.digits(), 5)
    data = [with_value(parts[0], value), *parts[1:]]
    method = cs.methods.skill(mapper, head="ridge", clip=clip)
    row: dict[str, Any] = {"mapper": mapper, "value": value, "clip": clip}
    scores = []
    for seed in range(SEEDS):
        model = cs.models.multi_head(cs.models.random_features(64, 256, seed=seed), 10)
        try:
            result = cs.run(cs.settings.skill([data[:2], data[2:]]), method, model, seed=seed)
        except cs.ConsilienceError as error:
            return {**row, "refused": str(error)}
        scores.append(result.matrix[-1].tolist())
    return {**row, "scores": scores, "least": float(np.min(scores))}


def main() -> None:
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mapper in ("gaussian_mixture", "mahalanobis", "nearest_mean"):
            rows += [measured(mapper, value, clip) for clip in CLIPS for value in VALUES]
    lines = ["| mapper | clip | value | accuracy by task | least |", "|---|---|---|---|---|"]
    for row in rows:
        by_task = zip(*row["scores"], strict=True) if "scores" in row else ()
        scores = ", ".join(spread(list(task)) for task in by_task) or "refused"
        least = f"{100 * row['least']:.1f}" if "scores" in row else ""
        shown = "none" if row["value"] is None else f"{row['value']:g}"
        lines.append(f"| {row['mapper']} | {row['clip']:g} | {shown} | {scores} | {least} |")
    save("outliers", __doc__, {"rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
