"""Parts of speech, named entities and sentiment on one encoder: a tag per word, and an answer per text.

The tags come from `ewt_pos_ner.json.xz` (English Web Treebank and Universal NER) and the sentiment from
`fdu_mtl16.json.xz` (reviews), in the folder that CONSILIENCE_DATA names; without them, sentences are made up.
Run it with `python examples/joint_nlp.py`.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import consilience as cs

FOLDER = Path(os.environ.get("CONSILIENCE_DATA", "."))
TAGGED, REVIEWS = "ewt_pos_ner.json.xz", "fdu_mtl16.json.xz"
NUMBERS, LONGEST = 4000, 60
DOMAINS = ("books", "dvd", "music")


class Encoder(nn.Module):
    """Embeddings of words and endings, and a convolution over neighbours; heads per word and per text."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.word, self.ending = nn.Embedding(NUMBERS, 24), nn.Embedding(NUMBERS, 24)
        self.mix = nn.Conv1d(48, 64, 3, padding=1)
        self.heads = nn.ModuleDict({task: nn.Linear(64, width) for task, width in widths.items()})

    def forward(self, words: Tensor, endings: Tensor) -> dict[str, Tensor]:
        embedded = torch.cat([self.word(words), self.ending(endings)], -1)
        mixed = torch.relu(self.mix(embedded.transpose(1, 2))).transpose(1, 2)
        # Padding has the number 0, and no part in the mean of a text.
        there = (words > 0).unsqueeze(-1)
        text = (mixed * there).sum(1) / there.sum(1).clamp_min(1)
        found = {task: self.heads[task](mixed).transpose(1, 2) for task in ("upos", "ner")}
        return found | {"sentiment": self.heads["sentiment"](text)}


def inputs(texts: list[list[str]]) -> dict[str, list[list[int]]]:
    """Number words and their endings by their hashes."""

    def number(text: str) -> int:
        return 1 + zlib.crc32(text.encode()) % (NUMBERS - 1)

    words = [[number(word.lower()) for word in text[:LONGEST]] for text in texts]
    return {"words": words, "endings": [[number(word[-3:]) for word in text[:LONGEST]] for text in texts]}


def read() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tagged sentences, and reviews, from the files."""
    load = lambda name: json.loads(lzma.decompress((FOLDER / name).read_bytes()))  # noqa: E731
    reviews = [
        {"tokens": text.split(), "label": int(label), "part": part}
        for domain, parts in load(REVIEWS).items()
        if domain in DOMAINS
        for part in ("train", "test")
        for label, text in zip(parts[part]["label"], parts[part]["text"], strict=True)
    ]
    return load(TAGGED)["sentences"], reviews


def made(count: int = 300) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Made-up sentences and reviews; the same words have the same tags, and adjectives a sentiment."""
    draw = random.Random(0)
    words = {
        "PROPN": ["Ann", "Bob", "Paris", "Oslo"],
        "VERB": ["likes", "sees", "wants", "calls"],
        "ADJ": ["good", "great", "bad", "awful"],
        "NOUN": ["film", "book", "song", "meal"],
    }
    kinds = {"Ann": "B-PER", "Bob": "B-PER", "Paris": "B-LOC", "Oslo": "B-LOC"}
    tagged, reviews = [], []
    for i in range(count):
        order = ["PROPN", "VERB", *(["ADJ"] if draw.random() < 0.7 else []), draw.choice(["NOUN", "PROPN"])]
        tokens, part = [draw.choice(words[tag]) for tag in order], "test" if i % 4 == 0 else "train"
        ner = ["O" if tag != "PROPN" else kinds[token] for token, tag in zip(tokens, order, strict=True)]
        tagged.append({"tokens": tokens, "upos": order, "ner": ner, "part": part})
        mood = draw.choice(words["ADJ"])
        text = [draw.choice(words["PROPN"]), "sees", mood, draw.choice(words["NOUN"])]
        reviews.append({"tokens": text, "label": words["ADJ"].index(mood) // 2, "part": part})
    return tagged, reviews


def sources(tagged: list[dict[str, Any]], reviews: list[dict[str, Any]]) -> list[cs.Source]:
    """One source per task: two of the same sentences, and one of reviews."""
    found = []
    for task in ("upos", "ner"):
        tags = sorted({tag for sentence in tagged for tag in sentence[task]})
        pairs = []
        for part in ("train", "test"):
            own = [sentence for sentence in tagged if sentence["part"] == part]
            y = [[tags.index(tag) for tag in sentence[task][:LONGEST]] for sentence in own]
            pairs.append((inputs([sentence["tokens"] for sentence in own]), y))
        # Most words are in no entity, so that accuracy would say little.
        metric = "accuracy" if task == "upos" else "f1"
        source = cs.data.arrays(*pairs[0], pairs[1], tags, name=f"text/{task}", space=task, metric=metric)
        found.append(source.map(task=task))

    pairs = []
    for part in ("train", "test"):
        own = [review for review in reviews if review["part"] == part]
        pairs.append((inputs([review["tokens"] for review in own]), [review["label"] for review in own]))
    moods = cs.data.arrays(*pairs[0], pairs[1], ["0", "1"], name="text/sentiment", metric="accuracy")
    return [*found, moods.map(task="sentiment")]


def main() -> None:
    """Train the three tasks together, and each alone."""
    there = all((FOLDER / name).is_file() for name in (TAGGED, REVIEWS))
    tasks = sources(*(read() if there else made()))
    widths = {str(source.task): len(source.labels) for source in tasks}
    training = cs.Training(epochs=3, batch_size=32, lr=0.005, optimiser="adam")

    def trained(own: list[cs.Source], method: cs.Method) -> cs.Result:
        model = cs.models.joint(lambda: Encoder(widths), widths)
        return cs.run(cs.settings.multitask(own, "task"), method, model, training, progress=False)

    results = [trained(tasks, cs.methods.uncertainty())]
    alone = [trained([source], cs.methods.finetune()) for source in tasks]
    for place, source in enumerate(tasks):
        together = results[0].of_source(source.name)[-1]
        print(f"{source.task}: together {together:.3f}, alone {alone[place].score:.3f}")


if __name__ == "__main__":
    main()
