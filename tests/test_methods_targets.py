"""Every method on every form of inputs and targets: it runs, or refuses by name before any work."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import consilience as cs
from consilience.core.model import Model
from consilience.core.source import Kind, Source, Tensors
from consilience.core.tree import Input, Tree

sys.path.insert(0, str(Path(__file__).parent / "conformance"))

import kit

COUNTS = (40, 8, 12)
"""Examples for training, validation and test."""

CLASSES = tuple(("t", str(i)) for i in range(6))
VALUES = (("v", "a"), ("v", "b"))
LABELS = (("l", "a"), ("l", "b"), ("l", "c"))


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(count: int, seed: int, width: int = 8) -> Tensor:
    return torch.rand(count, width, generator=drawn(seed))


def some(y: Tensor, seed: int) -> Tensor:
    """Take out 3 of 10 targets."""
    gone = torch.rand(y.shape, generator=drawn(seed)) < 0.3
    return y.masked_fill(gone, torch.nan if y.is_floating_point() else -100)


# Inputs and targets of one source: (count, seed, number of the source) -> tensors.


def tree(count: int, seed: int) -> Tree:
    x = flat(count, seed)
    return Tree({"a": x[:, :5], "b": x[:, 5:]})


def ragged(count: int, seed: int) -> Tree:
    lengths = torch.randint(1, 7, (count,), generator=drawn(seed))
    there = torch.arange(6) < lengths[:, None]
    ids = torch.randint(1, 20, (count, 6), generator=drawn(seed + 5)) * there
    return Tree({"ids": ids, "mask": there.long()}, {"ids": 0.0, "mask": 0.0}, lengths)


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(1, 20, (count, 5), generator=drawn(seed))


def maps(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 6, 6, generator=drawn(seed))


def one_class(count: int, seed: int, number: int) -> Tensor:
    return torch.arange(count) % 2 + 2 * number


def classes_at(*places: int) -> Callable[[int, int, int], Tensor]:
    def y(count: int, seed: int, number: int) -> Tensor:
        found = torch.randint(2 * number, 2 * number + 2, (count, *places), generator=drawn(seed + 7))
        return some(found, seed + 3)

    return y


def values_at(*places: int) -> Callable[[int, int, int], Tensor]:
    return lambda count, seed, number: some(torch.rand(count, 2, *places, generator=drawn(seed + 7)), seed)


def labels_at(*places: int) -> Callable[[int, int, int], Tensor]:
    def y(count: int, seed: int, number: int) -> Tensor:
        return some((torch.rand(count, 3, *places, generator=drawn(seed + 7)) > 0.5).float(), seed)

    return y


def complete(y: Callable[[int, int, int], Tensor]) -> Callable[[int, int, int], Tensor]:
    """Put 0 where a target is missing."""
    return lambda *args: torch.nan_to_num(y(*args))


# Networks.


def mlp(outputs: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, outputs))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(torch.cat([a, b], 1))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weight = mask.unsqueeze(-1).to(self.embed.weight)
        mean = (self.embed(ids) * weight).sum(1) / weight.sum(1).clamp_min(1)
        return self.head(self.middle(mean).relu())


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(x)).relu()).movedim(-1, 1)


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1))


# The forms.


class Form:
    """One form of inputs and targets: three sources of it, and a network."""

    def __init__(
        self,
        inputs: Callable[[int, int], Input],
        targets: Callable[[int, int, int], Tensor],
        network: Callable[[], nn.Module],
        kind: Kind = "class",
    ) -> None:
        self.inputs, self.targets, self.network, self.kind = inputs, targets, network, kind

    def sources(self) -> list[Source]:
        return [self.source(f"s{number}", number) for number in range(3)]

    def source(self, name: str, number: int) -> Source:
        parts = [
            Tensors(self.inputs(n, 10 * number + i), self.targets(n, 10 * number + i, number))
            for i, n in enumerate(COUNTS)
        ]
        labels = {"class": CLASSES, "value": VALUES, "labels": LABELS}[self.kind]
        columns = (2 * number, 2 * number + 1) if self.kind == "class" else tuple(range(len(labels)))
        return Source(name, *parts, labels, columns, kind=self.kind)


class Mixed(Form):
    """Classes, values and labels in one schedule, whose samples have some of their targets."""

    def sources(self) -> list[Source]:
        forms = (
            Form(flat, lambda n, seed, _: some(one_class(n, seed, 0), seed), mlp),
            Form(flat, values_at(), mlp, "value"),
            Form(flat, labels_at(), mlp, "labels"),
        )
        return [replace(form.source(form.kind, 0), name=form.kind) for form in forms]


FORMS: dict[str, Form] = {
    "tree": Form(tree, one_class, Parts),
    "ragged": Form(ragged, one_class, Bag),
    "missing": Form(flat, lambda n, seed, i: some(one_class(n, seed, i), seed), mlp),
    "tokens": Form(tokens, classes_at(5), Tagger),
    "pixels": Form(maps, classes_at(6, 6), segmenter),
    "value": Form(flat, complete(values_at()), mlp, "value"),
    "missing values": Form(flat, values_at(), mlp, "value"),
    "values at pixels": Form(maps, values_at(6, 6), segmenter, "value"),
    "labels": Form(flat, complete(labels_at()), mlp, "labels"),
    "labels of tokens": Form(tokens, labels_at(5), Tagger, "labels"),
    "mixed": Mixed(flat, one_class, lambda: mlp(11)),
}

PLACES = {"tokens", "pixels", "values at pixels", "labels of tokens"}
OF_VALUES = {"value", "missing values", "values at pixels", "mixed"}
OF_LABELS = {"labels", "labels of tokens", "mixed"}
TREES = {"tree", "ragged"}
EMBEDDED = {"ragged", "tokens", "labels of tokens"}
CONVOLVED = {"pixels", "values at pixels"}
OTHERS = PLACES | OF_VALUES | OF_LABELS
"""The forms without one class per sample."""

REFUSED: dict[str, set[str]] = {
    **dict.fromkeys(("entropy_ensemble", "er_ace", "gdumb", "icarl", "scroll", "skill", "wsm"), OTHERS),
    **dict.fromkeys(
        (
            "batch_model_consolidation(sources)",
            "dac(auxiliary)",
            "deep_model_consolidation(unlabelled)",
            "distil(unlabelled)",
            "exmodel_distillation(auxiliary)",
        ),
        OTHERS,
    ),
    "feddf(unlabelled)": OTHERS - {"tokens", "pixels"},
    "fed3r": PLACES | OF_LABELS,
    "generative_replay": PLACES | OF_LABELS | TREES,
    "gss": {"mixed"},
    "talos": PLACES | OF_LABELS,
    "supsup+infer(superposition)": OTHERS | TREES,
    "packnet+infer(mahalanobis)": OTHERS | TREES,
    "hat+infer(expert_gate)": OTHERS | TREES,
    # They need a model with earlier answers or with networks of tasks, which no form has: tests/test_dense.py
    # and tests/test_sharing.py train these.
    "deep_supervision": set(FORMS),
    "soft_sharing": set(FORMS),
    # These need layers of a kind, whatever the targets are.
    "den": TREES | EMBEDDED | CONVOLVED,
    "hat": EMBEDDED,
    "xdg": EMBEDDED,
    "less_forgetting": CONVOLVED,
    "personal": CONVOLVED,
    "pnn": TREES | EMBEDDED | CONVOLVED,
}
"""The forms that a method refuses; every other pair runs."""

TRAINING = cs.Training(epochs=1, batch_size=16, lr=0.1)


def model_of(form: str, row: str) -> Any:
    """Return the form's network; what needs heads on a frozen backbone, or columns, gets these."""
    torch.manual_seed(0)
    network = FORMS[form].network()
    model = cs.models.wrap(network, outputs=11 if form == "mixed" else 6)
    if row == "skill" and form not in CONVOLVED:
        return cs.models.multi_head(cs.models.frozen(model, ("*",)), model.outputs)
    # All tasks of values, or of labels, answer with the same outputs, which these two would have to divide.
    if row in ("hat", "packnet") and form in OF_VALUES | OF_LABELS and form not in CONVOLVED | {"mixed"}:
        return cs.models.multi_head(model, model.outputs)
    if row == "pnn" and form not in TREES | EMBEDDED | CONVOLVED:
        return cs.models.progressive(8, (8,), model.outputs)
    return model


@cache
def settings_of(row: str) -> tuple[str, ...]:
    """Return a setting in which a method trains one source after another, and one with exchanges."""
    cells = kit.read("methods")[row]
    wanted = (
        "continual (class)",
        "continual (task)",
        "federated_continual",
        "merging",
        "federated",
        "multitask",
    )
    able = [name for name in wanted if cells[name] == "runs"]
    return tuple(
        dict.fromkeys((able[0], next((name for name in able if "continual (" not in name), able[0])))
    )


def schedule_of(setting: str, sources: list[Source]) -> Any:
    name, _, scenario = setting.partition(" ")
    made = getattr(cs.settings, name)
    if scenario:
        return made(sources, scenario.strip("()"))
    return made([sources[:2], sources[2:]], rounds=1) if name == "federated_continual" else made(sources)


def method_of(row: str, form: str) -> cs.Method:
    if row == "feddf(unlabelled)":
        return cs.methods.feddf(FORMS[form].sources()[0], steps=2)
    if row == "distil(unlabelled)":
        return cs.methods.distil(FORMS[form].sources()[0], steps=2)
    if row in ("exmodel_distillation(auxiliary)", "dac(auxiliary)"):
        auxiliary = cs.memory.auxiliary(FORMS[form].sources()[0])
        return getattr(cs.methods, row.partition("(")[0])(auxiliary, 12, steps=2)
    if row == "deep_model_consolidation(unlabelled)":
        return cs.methods.deep_model_consolidation(FORMS[form].sources()[0], 12, steps=2)
    if row == "batch_model_consolidation(sources)":
        return cs.methods.batch_model_consolidation(FORMS[form].sources(), size=12, steps=2)
    return kit.ROWS[row]()


def finite(p: Tensor, y: Tensor) -> float:
    """A metric for any target: it only refuses predictions that are no numbers."""
    assert bool(torch.isfinite(p).all())
    return float(p.double().mean())


def cells() -> list[Any]:
    """Every method with every form. Half is run by `make test`: each with every second of the other."""
    return [
        pytest.param(row, form, marks=[] if (i + j) % 2 == 0 else pytest.mark.slow)
        for i, row in enumerate(kit.ROWS)
        for j, form in enumerate(FORMS)
    ]


@pytest.mark.parametrize(("row", "form"), cells())
def test_a_method_runs_or_refuses_by_name_before_any_work(row: str, form: str) -> None:
    refused: set[str] = set()
    for setting in settings_of(row):
        sources, method = FORMS[form].sources(), method_of(row, form)
        answer = outcome(schedule_of(setting, sources), method, model_of(form, row))
        if not isinstance(answer, str):
            assert all(bool(torch.isfinite(p).all()) for p in answer.params.values())
            continue
        refused.add(setting)
        assert re.fullmatch(rf"{re.escape(method.name)}: [^\n]+\.", answer)
    expected = form in REFUSED.get(row, set())
    assert refused == (set(settings_of(row)) if expected else set())


def outcome(schedule: Any, method: cs.Method, model: Any) -> Any:
    """Return the result of a run, or the reason of its refusal; no stage may have ended before."""
    events: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return cs.run(
                schedule,
                method,
                model,
                TRAINING,
                metric=finite,
                progress=lambda line: events.append(line["event"]),
            )
        except cs.Refusal as error:
            reason = str(error)
    assert "stage" not in events, "some work was lost"
    return reason


def test_the_table_names_methods_and_forms() -> None:
    assert REFUSED.keys() <= kit.ROWS.keys()
    assert all(forms <= FORMS.keys() for forms in REFUSED.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", ["fedavg", "ewc", "lwf", "derpp", "mas"])
def test_engines_agree_on_every_form(row: str, form: str) -> None:
    """Clients of unequal size, whose batches are filled up; each trains two sources one after another."""
    sources = [
        replace(source, train=source.train.select(torch.arange(40 - 5 * i)))
        for i, source in enumerate(FORMS[form].sources())
    ]
    # Two clients for each of the tasks, so that some can be stacked.
    streams = [
        [source, replace(sources[i - 1], name=f"{sources[i - 1].name} too")]
        for i, source in enumerate(sources)
    ]
    found = []
    for engine in ("serial", "batched"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = cs.run(
                cs.settings.federated_continual(streams, rounds=1),
                method_of(row, form),
                model_of(form, row),
                replace(TRAINING, precision="fp64"),
                metric=finite,
                engine=engine,
            )
        found.append(result.params)
    for name, p in found[0].items():
        assert float((p - found[1][name]).abs().max()) <= 1e-12, name


@pytest.mark.parametrize("room", ["CORRECTIONS", "MAPPERS", "CONSOLIDATORS"])
def test_what_a_part_takes_is_said_in_known_words(room: str) -> None:
    for name, kind in getattr(kit, room).items():
        assert set(kind.kinds) <= {"class", "value", "labels"} and kind.kinds, name
        assert kind.instead.startswith("use "), name
        assert not isinstance(kind, Model)
