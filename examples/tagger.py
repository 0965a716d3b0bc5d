"""A tagger: the part of speech of every word, and named entities, in English from five places of the web.

Targets have places: one class per word. The genres are domains, or clients; the two kinds of tags are tasks
of one trunk. It needs `ewt_pos_ner.json.xz` (Universal Dependencies EWT and Universal NER) in the folder that
the environment variable CONSILIENCE_DATA names. Run it with `python examples/tagger.py`.
"""

from __future__ import annotations

import json
import lzma
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

import consilience as cs

FILE = Path(os.environ.get("CONSILIENCE_DATA", "")) / "ewt_pos_ner.json.xz"
GENRES = ("answers", "email", "newsgroup", "reviews", "weblog")
NUMBERS = 2000


class Tagger(nn.Module):
    """Embeddings of words and of their endings, a convolution over neighbours, and outputs for all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.ending = nn.Embedding(NUMBERS, 16), nn.Embedding(NUMBERS, 16)
        # There are 17 parts of speech, and 7 tags of entities.
        self.mix, self.head = nn.Conv1d(32, 48, 3, padding=1), nn.Linear(48, 17 + 7)

    def forward(self, words: Tensor, endings: Tensor) -> Tensor:
        embedded = torch.cat([self.word(words), self.ending(endings)], -1)
        mixed = torch.relu(self.mix(embedded.transpose(1, 2))).transpose(1, 2)
        # Outputs are [B, tags, words]: classes come before places.
        return self.head(mixed).transpose(1, 2)


def number(text: str) -> int:
    """Return a number from 1 for a text, by its hash; 0 pads."""
    return 1 + zlib.crc32(text.encode()) % (NUMBERS - 1)


def source(layer: str, *genres: str) -> cs.Source:
    """Sentences of some genres, with their parts of speech ("upos") or entities ("ner")."""
    sentences = json.loads(lzma.decompress(FILE.read_bytes()))["sentences"]
    tags = sorted({tag for sentence in sentences for tag in sentence[layer]})
    pairs = {}
    for part in ("train", "test"):
        own = [s for s in sentences if s["part"] == part and s["genre"] in genres]
        words = [[number(word.lower()) for word in s["tokens"]] for s in own]
        endings = [[number(word[-3:]) for word in s["tokens"]] for s in own]
        pairs[part] = {"words": words, "endings": endings}, [[tags.index(t) for t in s[layer]] for s in own]

    # Most words are in no entity, so that accuracy would say little.
    metric = "accuracy" if layer == "upos" else "f1"
    name = f"ewt/{layer}-{'+'.join(genres)}"
    found = cs.data.arrays(*pairs["train"], pairs["test"], tags, name=name, space=layer, metric=metric)
    return found.map(task=layer)


def main() -> None:
    """Run one model in four settings."""
    genres = [source("upos", genre) for genre in GENRES]
    tasks = [source("upos", *GENRES), source("ner", *GENRES)]
    training = cs.Training(epochs=2, batch_size=16, lr=0.02, optimiser="adam")
    runs = [
        (cs.settings.continual(genres, "domain"), cs.methods.er(size=100, batch_size=16)),
        (cs.settings.federated(genres, rounds=2, scenario="domain"), cs.methods.fedavg()),
        (cs.settings.multitask(tasks, "task"), cs.methods.finetune()),
        (cs.settings.merging(genres, scenario="domain"), cs.methods.average()),
    ]
    results = [cs.run(schedule, method, Tagger, training) for schedule, method in runs]
    print(cs.report.table(results))


if __name__ == "__main__":
    main()
