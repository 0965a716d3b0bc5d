"""Engines agree: every method, in every setting with several agents, learns the same when stacked."""

from __future__ import annotations

import warnings

import kit
import pytest

import consilience as cs
from consilience import testing

WHERE = testing.SEVERAL
ROWS = pytest.mark.parametrize("row", list(kit.ROWS))

WHY = (
    "an aggregator combines the objectives of a step",
    "something that a step reads differs between agents",
    "the parts of a step differ between agents",
    "outputs depend on the other samples",
    "a step depends on the numbers in its tensors",
)
"""Why a method is run one after another."""


@ROWS
@pytest.mark.parametrize("setting", WHERE)
def test_stacked_agents_learn_the_same(row: str, setting: str) -> None:
    if kit.read("methods")[row][setting] != "runs":
        pytest.skip("refused here")
    serial = kit.cell(row, setting, "fp64")
    notes: list[str] = []

    def progress(line: dict[str, object]) -> None:
        if line.get("event") == "engine":
            notes.append(str(line["note"]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batched = cs.run(
            testing.SETTINGS[setting](),
            kit.ROWS[row](),
            kit.model_of(row, setting),
            testing.FP64,
            engine="batched",
            progress=progress,
        )
    assert not isinstance(serial, str)
    testing.check_engines(serial, batched)
    for note in notes:
        assert note.startswith("batched:") or any(why in note for why in WHY), note
