"""How much padding texts need: places in padded batches over the words that there are.

The 1,600 training reviews of books in fdu_mtl16.json.xz (CONSILIENCE_DATA), split at spaces and cut at 512
words; batches of 32, five epochs with other shuffles, mean and standard deviation. "One batch": all padded
to the longest.
"""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

import numpy as np
import torch

from common import save
from consilience.data.samplers import ByLength, Shuffle

BATCH, MOST, EPOCHS = 32, 512, 5


def padding(plan: list[torch.Tensor], lengths: torch.Tensor) -> float:
    """Places of all batches, each padded to its longest, over words."""
    return sum(len(own) * int(lengths[own].max()) for own in plan) / int(lengths.sum())


def main() -> None:
    file = Path(os.environ["CONSILIENCE_DATA"]) / "fdu_mtl16.json.xz"
    texts = json.loads(lzma.decompress(file.read_bytes()))["books"]["train"]["text"]
    lengths = torch.tensor([min(len(text.split()), MOST) for text in texts])
    targets = torch.zeros(len(lengths), dtype=torch.long)
    found = {"one batch": [padding([torch.arange(len(lengths))], lengths)], "shuffled": [], "by length": []}
    for epoch in range(EPOCHS):
        made = [torch.Generator().manual_seed(epoch) for _ in range(2)]
        found["shuffled"].append(padding(Shuffle().plan(targets, BATCH, epoch, made[0]), lengths))
        found["by length"].append(padding(ByLength().plan(targets, BATCH, epoch, made[1], lengths), lengths))
    lines = ["| batches | places over words |", "|---|---|"]
    for name, ratios in found.items():
        more = f" ± {np.std(ratios, ddof=1):.3f}" if len(ratios) > 1 else ""
        lines.append(f"| {name} | {np.mean(ratios):.3f}{more} |")
    lines += ["", f"{len(lengths)} texts, {int(lengths.sum())} words."]
    save(
        "lengths",
        __doc__,
        {"texts": len(lengths), "words": int(lengths.sum()), "ratios": found},
        "\n".join(lines),
    )


if __name__ == "__main__":
    main()
