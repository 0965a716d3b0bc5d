"""A language model of characters: the next character at every place of a text.

Texts are roles of Tiny Shakespeare if `shakespeare_roles.json.xz` is in the folder that the environment
variable CONSILIENCE_DATA names, else chapters of Python's manual. Run it with
`python examples/language_model.py`.
"""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs

FILE = Path(os.environ.get("CONSILIENCE_DATA", "")) / "shakespeare_roles.json.xz"
CHARACTERS = 80


class LanguageModel(nn.Module):
    """Embeddings of characters, and two convolutions that look at no later place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, 32)
        self.near, self.far = nn.Conv1d(32, 64, 3), nn.Conv1d(64, 64, 3, dilation=2)
        self.head = nn.Linear(64, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(1, 2)
        # Zeros before the first place, so that each output sees its own character and earlier ones.
        h = F.relu(self.near(F.pad(h, (2, 0))))
        h = F.relu(self.far(F.pad(h, (4, 0))))
        return self.head(h.transpose(1, 2)).transpose(1, 2)


def sources() -> list[cs.Source]:
    """One source per text: windows, and the character after each place."""
    texts = {name: topics[name] for name in ("compound", "string-methods", "debugger", "formatstrings")}
    if FILE.is_file():
        roles = json.loads(lzma.decompress(FILE.read_bytes()))
        texts = {name: roles[name]["train"] for name in list(roles)[:4]}

    # All sources must number the characters alike.
    characters = cs.data.Vocabulary.of(texts.values(), "chars", size=CHARACTERS)
    return [
        cs.data.text(
            text[:8000], None, characters, "next", block=40, mask=False, name=name, space="characters"
        )
        for name, text in texts.items()
    ]


def main() -> None:
    """Run one model in four settings."""
    texts = sources()
    training = cs.Training(epochs=4, batch_size=16, lr=0.02, optimiser="adam")
    runs = [
        (cs.settings.continual(texts, "domain"), cs.methods.er(size=60)),
        (cs.settings.federated(texts, rounds=4, scenario="domain"), cs.methods.fedavg()),
        (cs.settings.multitask(texts, "domain"), cs.methods.finetune()),
        (cs.settings.merging(texts, scenario="domain"), cs.methods.average()),
    ]
    results = [
        cs.run(schedule, method, LanguageModel, training, metric=["accuracy", "perplexity"])
        for schedule, method in runs
    ]
    print(cs.report.table(results))


if __name__ == "__main__":
    main()
