"""Searches for hyperparameters: on validation data alone, seeded, resumed, and refused where they mislead."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import consilience as cs
from consilience.core.errors import ConsilienceError
from consilience.core.source import Tensors
from restate import mlp, source, training

SOURCES = [replace(source(f"s/{i}", seed=i), validation=source("v", 12, seed=9 + i).train) for i in range(2)]
STREAM = cs.settings.continual(SOURCES, "domain")
LR = {"lr": [0.001, 0.1, 0.3]}


NONE = SOURCES[0].train.select(torch.arange(0))
UNCHECKED = cs.settings.continual([replace(SOURCES[0], validation=NONE)])


def plain(lr: float) -> tuple[cs.Method, cs.Training]:
    return cs.methods.finetune(), training(lr=lr)


class Untouched(Tensors):
    """Test data that must not be read."""

    def select(self, rows: Tensor) -> Tensors:
        raise AssertionError("test data were read")

    whole = targets = chunks = select  # type: ignore[assignment]


def test_a_grid_finds_what_runs_find_on_validation_data():
    found = cs.search(STREAM, plain, LR, model=mlp())
    wanted = {}
    for lr in LR["lr"]:
        swapped = [replace(part, test=part.validation) for part in SOURCES]
        schedule = cs.settings.continual(swapped, "domain")
        wanted[lr] = cs.run(schedule, cs.methods.finetune(), mlp(), training(lr=lr)).score
    assert {c.values["lr"]: c.score for c in found.candidates} == wanted
    best = max(wanted, key=lambda lr: wanted[lr])
    assert found.best.values == {"lr": best} and found.metric == "accuracy" and found.higher
    lines = found.table().splitlines()
    assert lines[0] == "candidate  validation accuracy"
    assert lines[1] == f"{f'lr={best}':9}  {wanted[best]:.4f}"


def test_test_data_are_never_read():
    x, y = SOURCES[0].test.whole()
    hidden = tuple(replace(part, test=Untouched(x, y)) for part in SOURCES)
    schedule = replace(STREAM, sources=hidden, judged=hidden)
    assert len(cs.search(schedule, plain, LR, model=mlp()).candidates) == 3


def test_less_is_better_for_a_loss_and_a_failed_candidate_is_last():
    found = cs.search(STREAM, plain, {"lr": [0.1, 1e30, 0.001]}, model=mlp(), metric="loss")
    scores = [candidate.score for candidate in found.candidates]
    assert math.isnan(scores[1]) and "lr" in found.candidates[1].error and not found.higher
    assert found.best.score == min(scores[0], scores[2])
    assert found.table().splitlines()[-1].startswith("lr=1e+30")


def test_random_draws_are_seeded_and_lie_in_their_ranges():
    space = {"lr": (1e-3, 1e-1), "size": (1, 3), "flag": [True, False]}
    drawn: list[dict[str, object]] = []

    def make(lr: float, size: int, flag: bool) -> tuple[cs.Method, cs.Training]:
        drawn.append({"lr": lr, "size": size, "flag": flag})
        return plain(lr)

    for _ in range(2):
        cs.search(STREAM, make, space, budget=25, model=mlp(), training=training(epochs=1))
    assert drawn[:25] == drawn[25:]
    assert {draw["size"] for draw in drawn} == {1, 2, 3} and {draw["flag"] for draw in drawn} == {True, False}
    rates = torch.tensor([draw["lr"] for draw in drawn[:25]])
    assert rates.min() >= 1e-3 and rates.max() <= 1e-1
    # Uniform in the logarithm: half lie below .01, where a uniform draw has 9 %.
    assert 5 <= int((rates < 1e-2).sum()) <= 20


def test_a_search_resumes_with_what_is_finished(tmp_path):
    whole = cs.search(STREAM, plain, LR, model=mlp(), out=tmp_path / "whole")
    calls: list[str] = []

    def stop(candidate: object) -> None:
        calls.append("")
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cs.search(STREAM, plain, LR, model=mlp(), out=tmp_path / "cut", progress=stop)
    again = cs.search(STREAM, plain, LR, model=mlp(), out=tmp_path / "cut", resume=True)
    assert [c.score for c in again.candidates] == [c.score for c in whole.candidates]


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs consilience[search]")
def test_optuna_proposes_by_what_it_was_told():
    """The estimator comes to try most the value of a list that is best."""

    def make(lr: float, rate: float) -> tuple[cs.Method, cs.Training]:
        return plain(lr)

    space = {"lr": [0.2, 0.1, 0.001], "rate": (0.1, 1.0)}
    found, again = (
        cs.search(STREAM, make, space, budget=25, sampler="optuna", model=mlp()) for _ in range(2)
    )
    tried = [candidate.values["lr"] for candidate in found.candidates]
    scores = {candidate.values["lr"]: candidate.score for candidate in found.candidates}
    best = max(scores, key=lambda lr: scores[lr])
    assert len(set(scores.values())) == 3
    assert found.best.values["lr"] == best and tried[10:].count(best) > 8
    assert [c.values for c in again.candidates] == [c.values for c in found.candidates]


@pytest.mark.filterwarnings("ignore:.*has no direction")
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"space": {}}, "`space` must be a mapping"),
        ({"space": {"lr": 0.1}}, "list of values or a pair"),
        ({"space": {"lr": (0.1, 0.01)}}, "low < high"),
        ({"space": {"lr": (0.1, 0.2, 0.3)}}, "write other values as a list"),
        ({"space": {"lrr": [0.1]}}, "`make` must take the names of `space`"),
        ({"space": {"lr": (0.1, 0.2)}, "sampler": "grid"}, "a grid must have lists"),
        ({"sampler": "bayes"}, "`sampler`"),
        ({"budget": 0}, "`budget` must be a whole number >= 1"),
        ({"on": "test"}, "what is chosen on test data is not tested by them"),
        ({"metric": lambda p, y: 0.5}, "needs a metric with a direction"),
        ({"schedule": UNCHECKED}, "has none; give `validation=0.1`"),
    ],
)
def test_what_would_mislead_is_refused(more, says):
    with pytest.raises(ConsilienceError, match=says):
        cs.search(**{"schedule": STREAM, "make": plain, "space": LR, "model": mlp(), **more})


def test_values_that_are_nearly_equal_and_equal_ones_have_names_of_their_own(tmp_path):
    """A sampler may come back to a value, and a folder must not be taken for that of another candidate."""
    close = [0.1000001, 0.1000002, 0.1000001]
    found = cs.search(STREAM, plain, {"lr": close}, model=mlp(), out=tmp_path)
    assert [c.name for c in found.candidates] == ["lr=0.1000001", "lr=0.1000002", "lr=0.1000001 (2)"]
    assert not any(c.error for c in found.candidates)


def test_a_metric_without_a_direction_is_refused_before_any_candidate():
    made = []

    def make(lr: float) -> tuple[cs.Method, cs.Training]:
        made.append(lr)
        return plain(lr)

    with pytest.raises(ConsilienceError, match="needs a metric with a direction"):
        cs.search(STREAM, make, LR, model=mlp(), metric=lambda p, y: 0.5)
    assert not made


def test_all_failed_says_why():
    with pytest.raises(ConsilienceError, match=r"all candidates failed, the first with: .*lr"):
        cs.search(STREAM, plain, {"lr": [1e30]}, model=mlp())
