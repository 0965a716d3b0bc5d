"""Multi-task learning on real data: tasks alone and together, by how gradients and losses are balanced.

Data from CONSILIENCE_DATA. Each part has a result of its own:

- domains: FDU-MTL, sentiment of reviews in 16 domains, one task each; an eighth of the training texts is to
  validate. Inputs are TF-IDF (words and pairs of words that occur often in the training texts of all
  domains), or the first LENGTH words, of which the net takes the mean embedding. A net has two layers of 32
  units, and a head per domain. All domains share the first layer. The second is shared by hard sharing, is
  one of 4 experts of MMoE, an expert of each of PLE's two layers (2 shared ones, and 1 per domain), or one
  per domain with cross-stitch units. The grid has GRID terms (4 epochs of batches of 128, each balancing);
  "large" is hard sharing of LARGE terms (4 epochs, batches of 64). Also logistic regression (C = 1) on the
  TF-IDF of "large", per domain and on all domains. The bar in the data's README, TF-IDF and logistic
  regression per domain, is .858.
- tokens: parts of speech and entities of English sentences of the web (EWT; two tasks), and sentiment of
  REVIEWS of the reviews above, cut at LENGTH words. One encoder: embeddings of words, of their endings and
  shapes, a convolution over neighbours, next to the mean of the sentence; sentiment is read at the first
  word. 8 epochs of batches of 32. Accuracy, and for entities the F1 of tokens that are one or are said to
  be. The bar is the most frequent tag of a word.
- sentences: seven tasks of sentences (2 to 6 classes), a quarter of the training texts of each, the first
  SENTENCE words. One layer of 32 units on the mean embedding of words, and a head per task; 4 epochs of
  batches of 32. How often a task is drawn (`samplers.Mixed`): in proportion to its size, equally, with
  temperature 2, or from equally to in proportion.
- mixed: IMAGES training images of MNIST, each turned by up to 60 degrees: which digit (accuracy), the angle
  (as sine and cosine; mean error in degrees), and the densities of strokes in 7 x 7 places (R2). A conv net
  of 64 features, 8 epochs of batches of 32.

Mean and standard deviation over SEEDS seeds of nets and batches (of images and angles too in "mixed"). The
learning rate (Adam) is chosen by validation parts (another seed) for all tasks together with equal weights,
in "mixed" also for each task alone. STRENGTHS Everything else takes that rate: balancings, which have their
defaults and are tuned for none, tasks alone (but in "mixed"), and "large". Epochs and sizes are set by hand.
Test parts choose nothing.

`python benchmarks/multitask.py [--parts PART ...] [--full] [--keep FOLDER]`: with a folder, what is done is
not done again. `--full` has five seeds, and 10,000 terms in the grid.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import lzma
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import consilience as cs
from common import PROTOCOL, Choice, folder_for, kept, save, spread, tune
from consilience.core.metrics import Metric
from consilience.core.source import Source
from consilience.data.samplers import Mixed

SEEDS, LENGTH, GRID, LARGE, REVIEWS, IMAGES = 2, 80, 3000, 40000, 2000, 1000
SENTENCE = 40
WIDTH, NUMBERS = 32, 4000
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
BALANCINGS: dict[str, Callable[[], cs.Method]] = {
    "uniform": cs.methods.finetune,
    "uncertainty": cs.methods.uncertainty,
    "DWA": cs.methods.dwa,
    "GradNorm": cs.methods.gradnorm,
    "PCGrad": cs.methods.pcgrad,
    "MGDA": cs.methods.mgda,
    "UPGrad": cs.methods.upgrad,
    "Nash-MTL": cs.methods.nash_mtl,
}
ALONE = "alone"
"""Stands for a balancing where each task has a net of its own."""
INPUTS = ("TF-IDF", "words")
SAMPLINGS = {
    "proportional": Mixed(1.0),
    "equal": Mixed(math.inf),
    "temperature 2": Mixed(2.0),
    "annealed": Mixed(math.inf, final=1.0),
}
NETS = ("hard sharing", "MMoE", "PLE", "cross-stitch")
TOKENS, SENTIMENT = ("upos", "ner"), "sentiment"


class Job(NamedTuple):
    """A run: of what, how, and from which seed. `task` is one of them, or "" for all together."""

    part: str
    balancing: str
    task: str
    rate: float
    seed: int
    tuning: bool = False
    kind: str = ""
    """Of the inputs, in "domains"; of the sampling, in "sentences"."""
    size: int = GRID
    net: str = NETS[0]


def read(name: str) -> Any:
    return json.loads(
        lzma.decompress((Path(os.environ["CONSILIENCE_DATA"]) / f"{name}.json.xz").read_bytes())
    )


# Reviews in 16 domains.


class Reviews(NamedTuple):
    """Texts and labels of a domain, by part."""

    texts: dict[str, list[str]]
    labels: dict[str, list[int]]


@lru_cache(maxsize=1)
def reviews() -> dict[str, Reviews]:
    """The domains; an eighth of the training texts is for validation."""
    found = {}
    for name, parts in sorted(read("fdu_mtl16").items()):
        given, generator = parts["train"], torch.Generator().manual_seed(0)
        order = torch.randperm(len(given["text"]), generator=generator).tolist()
        cut = len(order) // 8
        rows = {"validation": order[:cut], "train": order[cut:]}
        texts = {part: [given["text"][i] for i in own] for part, own in rows.items()}
        labels = {part: [given["label"][i] for i in own] for part, own in rows.items()}
        test = parts["test"]
        found[name] = Reviews({**texts, "test": test["text"]}, {**labels, "test": test["label"]})
    return found


@lru_cache(maxsize=1)
def weights() -> dict[str, dict[str, Any]]:
    """TF-IDF of LARGE words and pairs of words: {domain: {part: sparse matrix}}."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Exclamation and question marks say something of sentiment.
    vectors = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=2, max_features=LARGE, token_pattern=r"(?u)\b\w+\b|[!?]"
    )
    vectors.fit([text for own in reviews().values() for text in own.texts["train"]])
    return {
        name: {part: vectors.transform(texts) for part, texts in own.texts.items()}
        for name, own in reviews().items()
    }


@lru_cache(maxsize=2)
def columns(size: int) -> np.ndarray:
    """The terms that occur in most training texts, of all that there are."""
    counts = sum((own["train"] > 0).sum(0) for own in weights().values())
    return np.sort(np.argsort(-np.asarray(counts).ravel(), kind="stable")[:size])


def terms(matrix: Any, size: int) -> Tensor:
    """Sparse rows as pairs [N, T, 2] of a term (numbered from 1; 0 pads) and its weight, largest first."""
    most = 200 if size == LARGE else 100
    rows = matrix[:, columns(size)].tocsr()
    found = np.zeros((rows.shape[0], most, 2), dtype=np.float32)
    for i in range(rows.shape[0]):
        cut = slice(rows.indptr[i], rows.indptr[i + 1])
        order = np.argsort(-rows.data[cut], kind="stable")[:most]
        found[i, : len(order), 0] = rows.indices[cut][order] + 1
        # Rows that lost their rare terms have length 1 again.
        found[i, : len(order), 1] = rows.data[cut][order] / (np.linalg.norm(rows.data[cut]) or 1.0)
    return torch.from_numpy(found)


def vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """The most frequent words of training texts, numbered from 2; 1 is any other, and 0 pads."""
    words = Counter(word for text in texts for word in text.lower().split())
    return {word: i for i, (word, _) in enumerate(words.most_common(NUMBERS - 2), 2)}


def numbers(texts: Sequence[str], table: Mapping[str, int], length: int) -> Tensor:
    """The first words of texts as numbers [N, length]."""
    found = torch.zeros(len(texts), length, dtype=torch.long)
    for i, text in enumerate(texts):
        words = text.lower().split()[:length] or [""]
        found[i, : len(words)] = torch.tensor([table.get(word, 1) for word in words])
    return found


@lru_cache(maxsize=3)
def domains(kind: str, size: int) -> tuple[Source, ...]:
    """One source per domain, with TF-IDF or words as inputs."""
    found, table = [], vocabulary(text for own in reviews().values() for text in own.texts["train"])
    for name, own in reviews().items():
        given = {
            part: terms(weights()[name][part], size) if kind == "TF-IDF" else numbers(texts, table, LENGTH)
            for part, texts in own.texts.items()
        }
        labels = {part: torch.tensor(values) for part, values in own.labels.items()}
        found.append(made(given, labels, ["negative", "positive"], name, SENTIMENT))
    return tuple(found)


def made(x: Mapping[str, Any], y: Mapping[str, Any], classes: Sequence[str], name: str, space: str) -> Source:
    """A source of three parts that are given."""
    first, second = (
        cs.data.arrays(
            x["train"], y["train"], (x[part], y[part]), list(classes), name=name, space=space, validation=0
        )
        for part in ("test", "validation")
    )
    return replace(first, validation=second.test)


class Terms(nn.Module):
    """Pairs of numbers and weights [B, T, 2] -> relu(W x + b) [B, d], x being the TF-IDF that they are of."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(size + 1, width, padding_idx=0)
        self.bias, self.drop = nn.Parameter(torch.zeros(width)), nn.Dropout(0.5)
        nn.init.normal_(self.table.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        summed = (self.table(x[..., 0].long()) * x[..., 1:]).sum(1)
        return self.drop(torch.relu(summed + self.bias))


class Words(nn.Module):
    """Numbers of words [B, T] -> the mean of their embeddings [B, d]; 0 does not count."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.drop = nn.Embedding(NUMBERS, width, padding_idx=0), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.table(x).sum(1) / (x > 0).sum(1, keepdim=True))


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())


def domain_net(net: str, kind: str, size: int) -> Any:
    """Two layers, of which the first reads the inputs, and a head per domain."""

    def stem() -> nn.Module:
        return Terms(size, WIDTH) if kind == "TF-IDF" else Words(WIDTH)

    def both() -> nn.Module:
        return nn.Sequential(stem(), layer())

    if net == "MMoE":
        return cs.models.mmoe(layer, 2, experts=4, stem=stem)
    if net == "PLE":
        return cs.models.ple([layer, layer], 2, stem=stem)
    if net == "cross-stitch":
        return cs.models.cross_stitch(both, 2, shared=1)
    return cs.models.multi_head(cs.models.wrap(both, outputs=WIDTH, headless=True), 2)


def regressions() -> dict[str, list[float]]:
    """Accuracies by domain of logistic regression, per domain and on all domains."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    given, labels = weights(), {name: own.labels for name, own in reviews().items()}

    def fitted(x: Any, y: Any) -> Any:
        return LogisticRegression(max_iter=300).fit(x, y)

    def tested(models: Mapping[str, Any]) -> list[float]:
        return [models[name].score(x["test"], labels[name]["test"]) for name, x in given.items()]

    every = [y for own in labels.values() for y in own["train"]]
    together = fitted(vstack([x["train"] for x in given.values()]), every)
    return {
        "logistic regression per domain": tested(
            {n: fitted(x["train"], labels[n]["train"]) for n, x in given.items()}
        ),
        "logistic regression on all domains": tested(dict.fromkeys(given, together)),
    }


# Tags of words, and sentiment.


@dataclass(frozen=True)
class EntityF1(Metric):
    """2 TP / (2 TP + FP + FN) of the tokens of all tags but "O", which is by far the commonest."""

    def sums(self, p: Tensor, y: Tensor) -> dict[str, Tensor]:
        there = y >= 0
        said, true = p.argmax(1)[there], y[there]
        each = {"right": said[said == true], "said": said, "true": true}
        return {name: tags.bincount(minlength=p.shape[1]) for name, tags in each.items()}

    def value(self, sums: dict[str, Tensor]) -> float:
        entities = torch.arange(len(sums["true"])) != sums["true"].argmax()
        right, said, true = (int(sums[name][entities].sum()) for name in ("right", "said", "true"))
        return 2 * right / max(said + true, 1)


class Encoding(NamedTuple):
    """The numbers of words, of their endings and of their shapes, from 2; 1 is any other, and 0 pads."""

    words: dict[str, int]
    endings: dict[str, int]
    shapes: dict[str, int]

    def of(self, sentences: Sequence[Sequence[str]]) -> dict[str, list[list[int]]]:
        """The parts of inputs, by name."""
        given = {name: (getattr(self, name), READ[name]) for name in self._fields}
        return {
            name: [[table.get(read(word), 1) for word in words] for words in sentences]
            for name, (table, read) in given.items()
        }


def shape(word: str) -> str:
    """Upper case, lower case and digits of a word, without repeats: "Iraq-1990" is "Aa-0"."""
    kinds = ["A" if c.isupper() else "a" if c.islower() else "0" if c.isdigit() else c for c in word]
    return "".join(c for i, c in enumerate(kinds) if not i or c != kinds[i - 1])[:4]


READ: dict[str, Callable[[str], str]] = {
    "words": str.lower,
    "endings": lambda word: word[-3:].lower(),
    "shapes": shape,
}


@lru_cache(maxsize=1)
def token_tasks() -> tuple[Source, ...]:
    """Parts of speech, entities, and the sentiment of some reviews of every domain."""
    every = [s for s in read("ewt_pos_ner")["sentences"] if s["tokens"]]
    train = [s for s in every if s["part"] == "train"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(train) // 8
    parts = {
        "train": [train[i] for i in order[cut:]],
        "validation": [train[i] for i in order[:cut]],
        "test": [s for s in every if s["part"] == "test"],
    }
    texts, labels = some_reviews()

    # Words that occur once are any others, so that there is something to learn about these.
    corpus = [w for s in parts["train"] for w in s["tokens"]] + [w for words in texts["train"] for w in words]
    tables = {}
    for name, reading in READ.items():
        counts = Counter(map(reading, corpus))
        tables[name] = {w: i for i, w in enumerate((w for w, n in counts.items() if n > 1), 2)}
    encoding = Encoding(**tables)

    x = {part: encoding.of([s["tokens"][:LENGTH] for s in own]) for part, own in parts.items()}
    found = []
    for task in TOKENS:
        tags = sorted({tag for s in every for tag in s[task]})
        y = {part: [[tags.index(t) for t in s[task][:LENGTH]] for s in own] for part, own in parts.items()}
        found.append(replace(made(x, y, tags, task, task), task=task))

    # The target of a review stands at its first word, and the others have none.
    x = {part: encoding.of(own) for part, own in texts.items()}
    y = {
        part: [[label] + [-100] * (len(words) - 1) for words, label in zip(own, labels[part], strict=True)]
        for part, own in texts.items()
    }
    found.append(replace(made(x, y, ["negative", "positive"], SENTIMENT, SENTIMENT), task=SENTIMENT))
    return tuple(found)


def some_reviews() -> tuple[dict[str, list[list[str]]], dict[str, list[int]]]:
    """The first words of some reviews of every domain, and their labels, by part."""
    texts: dict[str, list[list[str]]] = {}
    labels: dict[str, list[int]] = {}
    for part, count in (("train", REVIEWS // 16), ("validation", 25), ("test", 100)):
        texts[part] = [
            text.split()[:LENGTH] or ["?"] for own in reviews().values() for text in own.texts[part][:count]
        ]
        labels[part] = [label for own in reviews().values() for label in own.labels[part][:count]]
    return texts, labels


class Encoder(nn.Module):
    """Words, endings and shapes [B, T] -> features of each word, next to the sentence's mean [B, T, 3 d]."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n + 2, WIDTH, padding_idx=0) for n in sizes.values())
        self.mix, self.drop = nn.Conv1d(3 * WIDTH, 2 * WIDTH, 3, padding=1), nn.Dropout(0.3)
        self.mean = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, words: Tensor, endings: Tensor, shapes: Tensor) -> Tensor:
        given = (words, endings, shapes)
        each = torch.cat([table(x) for table, x in zip(self.tables, given, strict=True)], -1)
        local = torch.relu(self.mix(self.drop(each).transpose(1, 2))).transpose(1, 2)
        there = (words > 0).unsqueeze(-1).to(each)
        mean = (each[..., : 2 * WIDTH] * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        return self.drop(torch.cat([local, torch.relu(self.mean(mean)).expand(-1, words.shape[1], -1)], -1))


def token_net() -> Any:
    """The encoder with a head per task."""
    parts = [s.train.whole()[0].parts for s in token_tasks()]
    sizes = {name: max(int(own[name].max()) for own in parts) for name in READ}
    encoder = cs.models.wrap(lambda: Encoder(sizes), outputs=3 * WIDTH, headless=True)
    return cs.models.multi_head(encoder, outputs=26)


def most_frequent() -> dict[str, float]:
    """What the most frequent tag of a word gets, as the README of the data has it."""
    every = read("ewt_pos_ner")["sentences"]
    found = {}
    for task in TOKENS:
        pairs = {
            part: [p for s in every if s["part"] == part for p in zip(s["tokens"], s[task], strict=True)]
            for part in ("train", "test")
        }
        by: dict[str, Counter[str]] = {}
        for word, tag in pairs["train"]:
            by.setdefault(word, Counter())[tag] += 1
        usual = Counter(tag for _, tag in pairs["train"]).most_common(1)[0][0]
        said = [(by[w].most_common(1)[0][0] if w in by else usual, tag) for w, tag in pairs["test"]]

        if task == "upos":
            found[task] = sum(a == b for a, b in said) / len(said)
        else:
            hits = sum(a == b != "O" for a, b in said)
            found[task] = 2 * hits / sum((a != "O") + (b != "O") for a, b in said)
    return found


# Seven tasks of sentences.


@lru_cache(maxsize=1)
def sentence_tasks() -> tuple[Source, ...]:
    """One source per task; an eighth of its training texts is for validation."""
    chosen: dict[str, dict[str, list[tuple[str, Any]]]] = {}
    for name, parts in read("text_sentence_tasks7").items():
        pairs = list(zip(parts["train"]["text"], parts["train"]["label"], strict=True))
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
        some = [pairs[i] for i in order[: len(pairs) // 4]]
        cut = len(some) // 8
        tested = list(zip(parts["test"]["text"], parts["test"]["label"], strict=True))
        chosen[name] = {"train": some[cut:], "validation": some[:cut], "test": tested}

    table = vocabulary(text for parts in chosen.values() for text, _ in parts["train"])
    found = []
    for name, parts in chosen.items():
        classes = sorted({label for own in parts.values() for _, label in own})
        x = {part: numbers([text for text, _ in own], table, SENTENCE) for part, own in parts.items()}
        y = {part: [classes.index(label) for _, label in own] for part, own in parts.items()}
        found.append(replace(made(x, y, list(map(str, classes)), name, name), task=name))
    return tuple(found)


def sentence_net() -> Any:
    """The mean embedding, one layer, and a head per task."""
    trunk = cs.models.wrap(lambda: nn.Sequential(Words(WIDTH), layer()), outputs=WIDTH, headless=True)
    return cs.models.multi_head(trunk, sum(len(source.labels) for source in sentence_tasks()))


# A class, an angle and a map.


def degrees(p: Tensor, y: Tensor) -> float:
    """The mean error of angles, given by sine and cosine."""
    angle = torch.atan2(p[:, 0], p[:, 1]) - torch.atan2(y[:, 0], y[:, 1])
    return float(torch.rad2deg(torch.atan2(angle.sin(), angle.cos()).abs()).mean())


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """Some images of MNIST [N, 1, 28, 28], and their digits."""
    with np.load(Path(os.environ["CONSILIENCE_DATA"]) / "mnist.npz", allow_pickle=False) as file:
        images, labels = file["train_images"], file["train_labels"]
    order = np.random.default_rng(0).permutation(len(images))[: 8 * IMAGES]
    return torch.from_numpy(images[order])[:, None].float() / 255, torch.from_numpy(labels[order]).long()


def mixed_tasks(seed: int) -> list[Source]:
    """Digit, angle and map of the same images."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    # A third is to test on, and a tenth of the rest to validate.
    some = torch.randperm(len(images), generator=generator)[: round(IMAGES / 0.6)]
    angle = (torch.rand(len(some), generator=generator) * 2 - 1) * math.pi / 3
    turn = torch.stack([angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle], 1)
    grid = nn.functional.affine_grid(turn.view(-1, 2, 3), [len(some), 1, 28, 28], align_corners=False)
    x = nn.functional.grid_sample(images[some], grid, align_corners=False)
    density = nn.functional.avg_pool2d(x, 4).flatten(1)
    targets = {"digit": labels[some], "angle": torch.stack([angle.sin(), angle.cos()], 1), "map": density}
    kinds: Any = {"angle": "value", "map": "value"}
    return cs.data.tasks(x, targets, kinds, test=1 / 3, name="mnist", seed=seed)


def conv_net() -> nn.Module:
    """Images -> 64 features."""
    convolutions = [nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 5, 2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(256, 64), nn.ReLU())


# Runs.


def measured(job: Job) -> dict[str, float]:
    """The score of each task."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    metric: Any = None
    if job.part == "domains":
        sources: Sequence[Source] = domains(job.kind, job.size)
        model = domain_net(job.net, job.kind, job.size)
        training = cs.Training(epochs=4, batch_size=64 if job.size == LARGE else 128)
    elif job.part == "sentences":
        sources, model = sentence_tasks(), sentence_net()
        training = cs.Training(epochs=4, batch_size=32)
        # A task alone has all of a step.
        if not job.task:
            training = replace(training, sampler=SAMPLINGS[job.kind])
    elif job.part == "tokens":
        sources = token_tasks()
        model = token_net()
        training = cs.Training(epochs=8, batch_size=32)
        metric = {"ner": EntityF1()}
    else:
        sources = mixed_tasks(job.seed)
        model = cs.models.multi_head(cs.models.wrap(conv_net, outputs=64, headless=True), outputs=10 + 2 + 49)
        training = cs.Training(epochs=8, batch_size=32)
        metric = {"angle": cs.metrics.own(degrees, higher=False)}
    chosen = [s for s in sources if job.task in ("", s.name)]
    if job.tuning:
        chosen = [replace(s, test=s.validation) for s in chosen]
    training = replace(training, lr=job.rate, optimiser="adam")
    method = BALANCINGS["uniform" if job.balancing == ALONE else job.balancing]()
    if metric and len(chosen) == 1:
        metric = metric.get(chosen[0].task or chosen[0].name)
    run = cs.run(cs.settings.multitask(chosen, "task"), method, model, training, metric=metric, seed=job.seed)
    return dict(zip(run.sources, run.matrix[-1].tolist(), strict=True))


def kept_job(work: tuple[Path | None, Job]) -> dict[str, float]:
    """`measured`, once per folder."""
    folder, job = work
    return kept(folder, list(job), lambda: measured(job))


class Bench(NamedTuple):
    """Where runs are made, and how many."""

    pool: ProcessPoolExecutor
    keep: Path | None
    seeds: int
    grid: int

    def scores(self, jobs: Sequence[Job]) -> list[dict[str, float]]:
        return list(self.pool.map(kept_job, [(self.keep, job) for job in jobs]))

    def chosen(self, jobs: Sequence[Job], goodness: Callable[[dict[str, float]], float]) -> dict[Job, Choice]:
        """Choose the rate of each of these jobs, whose own says nothing."""

        def scores(trials: list[tuple[Job, float]]) -> list[float]:
            found = self.scores([job._replace(rate=r, seed=1000, tuning=True) for job, r in trials])
            return [goodness(each) for each in found]

        return tune({job: RATES for job in jobs}, scores)

    def over_seeds(self, jobs: Mapping[Any, Sequence[Job]]) -> dict[Any, list[dict[str, float]]]:
        """Run jobs with all seeds: the scores by task, per seed, of all jobs of a name together."""
        every = [job._replace(seed=s) for own in jobs.values() for job in own for s in range(self.seeds)]
        done = dict(zip(every, self.scores(every), strict=True))
        return {
            name: [
                {task: v for job in own for task, v in done[job._replace(seed=s)].items()}
                for s in range(self.seeds)
            ]
            for name, own in jobs.items()
        }


def mean_of(scores: Mapping[str, float]) -> float:
    return float(np.mean([*scores.values()]))


def run_domains(bench: Bench) -> tuple[dict[str, Any], str]:
    """Reviews in 16 domains."""
    jobs = {kind: Job("domains", "uniform", "", 0.0, 0, kind=kind, size=bench.grid) for kind in INPUTS}
    chosen = bench.chosen([*jobs.values()], mean_of)
    rates = {kind: chosen[job] for kind, job in jobs.items()}

    wanted: dict[Any, list[Job]] = {}
    for kind, job in jobs.items():
        rated = job._replace(rate=rates[kind].value)
        wanted[kind, ALONE] = [rated._replace(balancing=ALONE, task=name) for name in reviews()]
        wanted |= {
            (kind, balancing, net): [rated._replace(balancing=balancing, net=net)]
            for balancing in BALANCINGS
            for net in NETS
        }
    large = Job("domains", "uniform", "", rates["TF-IDF"].value, 0, kind="TF-IDF", size=LARGE)
    found = bench.over_seeds({**wanted, "large": [large]})

    lines = []
    for kind in INPUTS:
        alone = spread([mean_of(own) for own in found[kind, ALONE]])
        lines += [f"| {kind} (each domain alone: {alone}) | {' | '.join(NETS)} |", "|---" * 5 + "|"]
        for balancing in BALANCINGS:
            cells = [spread([mean_of(own) for own in found[kind, balancing, net]]) for net in NETS]
            lines.append(f"| {balancing} | {' | '.join(cells)} |")
        lines.append("")
    others = {"hard sharing, large": [mean_of(own) for own in found["large"]]}
    others |= {name: [float(np.mean(each))] for name, each in regressions().items()}
    lines += ["| TF-IDF of many terms | accuracy |", "|---|---|"]
    lines += [f"| {name} | {spread(each)} |" for name, each in others.items()]
    facts = {
        "rates": {kind: choice._asdict() for kind, choice in rates.items()},
        "scores": {", ".join(name): own for name, own in found.items() if name != "large"},
        "large": found["large"],
        "many terms": others,
    }
    return facts, "\n".join(["Mean accuracy over the 16 domains, %.", "", *lines])


def run_tokens(bench: Bench) -> tuple[dict[str, Any], str]:
    """Tags of words, and sentiment."""
    job = Job("tokens", "uniform", "", 0.0, 0)
    rate = bench.chosen([job], mean_of)[job]
    rated, tasks = job._replace(rate=rate.value), (*TOKENS, SENTIMENT)
    wanted = {ALONE: [rated._replace(balancing=ALONE, task=task) for task in tasks]}
    wanted |= {name: [rated._replace(balancing=name)] for name in ("uniform", "uncertainty", "PCGrad")}
    found, bar = bench.over_seeds(wanted), most_frequent()

    lines = ["| | POS accuracy | NER token F1 | sentiment accuracy |", "|---" * 4 + "|"]
    lines.append(f"| most frequent tag of the word | {100 * bar['upos']:.1f} | {100 * bar['ner']:.1f} | |")
    for name, own in found.items():
        lines.append(f"| {name} | {' | '.join(spread([s[task] for s in own]) for task in tasks)} |")
    return {"rate": rate._asdict(), "most frequent": bar, "scores": found}, "\n".join(lines)


def run_sentences(bench: Bench) -> tuple[dict[str, Any], str]:
    """Seven tasks of different sizes, by how often each is drawn."""
    job = Job("sentences", "uniform", "", 0.0, 0, kind="proportional")
    rate = bench.chosen([job], mean_of)[job]
    rated, tasks = job._replace(rate=rate.value), [source.name for source in sentence_tasks()]
    wanted = {ALONE: [rated._replace(balancing=ALONE, task=task) for task in tasks]}
    wanted |= {name: [rated._replace(kind=name)] for name in SAMPLINGS}
    found = bench.over_seeds(wanted)

    sizes = [f"{source.name} ({len(source.train)})" for source in sentence_tasks()]
    lines = [f"| sampling | {' | '.join(sizes)} | mean |", "|---" * (len(tasks) + 2) + "|"]
    for name, own in found.items():
        cells = [spread([s[task] for s in own]) for task in tasks] + [spread([mean_of(s) for s in own])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return {"rate": rate._asdict(), "scores": found}, "\n".join(lines)


def run_mixed(bench: Bench) -> tuple[dict[str, Any], str]:
    """A class, an angle and a map."""
    tasks = ("mnist/digit", "mnist/angle", "mnist/map")
    alone = {task: Job("mixed", ALONE, task, 0.0, 0) for task in tasks}
    together = Job("mixed", "uniform", "", 0.0, 0)

    def goodness(scores: dict[str, float]) -> float:
        # An error of 60 degrees is what no knowledge of the angle could have at worst.
        return mean_of({t: 1 - s / 60 if t == "mnist/angle" else s for t, s in scores.items()})

    rates = bench.chosen([*alone.values(), together], goodness)
    wanted = {ALONE: [job._replace(rate=rates[job].value) for job in alone.values()]}
    rated = together._replace(rate=rates[together].value)
    wanted |= {name: [rated._replace(balancing=name)] for name in BALANCINGS}
    found = bench.over_seeds(wanted)

    lines = ["| balancing | digit, accuracy % | angle, degrees of error | map, R2 % |", "|---" * 4 + "|"]
    for name, own in found.items():
        digit, angle, strokes = ([s[task] for s in own] for task in tasks)
        # `spread` gives percents, and degrees are none.
        lines.append(f"| {name} | {spread(digit)} | {spread([a / 100 for a in angle])} | {spread(strokes)} |")
    kept_rates = {job.task or "together": choice._asdict() for job, choice in rates.items()}
    return {"rates": kept_rates, "scores": found}, "\n".join(lines)


PARTS: dict[str, tuple[Callable[[Bench], tuple[dict[str, Any], str]], Callable[[], Any]]] = {
    "domains": (run_domains, weights),
    "tokens": (run_tokens, token_tasks),
    "sentences": (run_sentences, sentence_tasks),
    "mixed": (run_mixed, digits),
}
"""What makes each part, and what it reads before there are processes, which then share it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--full", action="store_true", help="five seeds, and more terms in the grid")
    parser.add_argument("--keep", type=Path, help="a folder for what is done, so that a stopped run goes on")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    seeds, grid = (5, 10000) if chosen.full else (SEEDS, GRID)
    numbers = {"SEEDS": seeds, "GRID": grid, "LARGE": LARGE, "LENGTH": LENGTH, "REVIEWS": REVIEWS}
    about = __doc__ or ""
    for name, value in {**numbers, "SENTENCE": SENTENCE, "IMAGES": IMAGES, "STRENGTHS": PROTOCOL}.items():
        about = about.replace(name, str(value))

    for part in chosen.parts:
        run, prepare = PARTS[part]
        prepare()
        with ProcessPoolExecutor(chosen.workers) as pool:
            facts, table = run(Bench(pool, folder_for(chosen.keep), seeds, grid))
        name = f"multitask_{part}" + "_full" * chosen.full
        save(name, about, {"seeds": seeds, "learning rates": RATES, **facts}, table)


if __name__ == "__main__":
    main()
