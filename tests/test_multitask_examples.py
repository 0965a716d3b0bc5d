"""Examples of multi-task learning: short recipes, and three tasks of texts on one encoder."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

import consilience as cs

EXAMPLES = Path(__file__).parents[1] / "examples"

LINES = {"uncertainty_weighting": 94, "projected_gradients": 138, "accumulation_per_task": 11}
"""The lines of the same in plain PyTorch (document 001, 37.3 and 37.5)."""


def body(name: str) -> int:
    """The lines of a recipe without its docstring."""
    tree = ast.parse((EXAMPLES / "multitask.py").read_text())
    found = next(f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == name)
    first, last = found.body[1], found.body[-1]
    return int(last.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("name", LINES)
def test_a_recipe_has_a_tenth_of_the_lines_of_plain_pytorch(name: str) -> None:
    assert body(name) <= LINES[name] // 10


def test_recipes_train_both_tasks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = runpy.run_path(str(EXAMPLES / "multitask.py"))
    schedule = cs.settings.multitask(recipes["tasks"](), "task")
    results = [recipes[name](schedule) for name in LINES] + recipes["sampling_strategies"]()
    said = capsys.readouterr().out
    assert "uncertainty/digits%2Fink: log_var" in said and "conflict ratio" in said
    # The ink has one batch per step as before, and so an epoch the same steps.
    assert results[2].costs["steps"] == results[0].costs["steps"]
    # Tasks of different sizes are drawn differently by each way of sampling.
    sums = {float(sum(p.double().sum() for p in result.params.values())) for result in results[3:]}
    assert len(sums) == 4
    for result in results:
        assert result.of_metric("accuracy").score > 0.6, result.method
        assert result.of_metric("r2").score > 0.6, result.method


def test_tags_and_sentiment_are_learned_on_one_encoder(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path
) -> None:
    example = runpy.run_path(str(EXAMPLES / "joint_nlp.py"))
    tasks = example["sources"](*example["made"](120))
    # Two tasks read the same sentences, and tags have places of their own.
    assert [source.places for source in tasks] == [1, 1, 0]
    widths = {source.task: len(source.labels) for source in tasks}
    model = cs.models.joint(lambda: example["Encoder"](widths), widths)
    training = cs.Training(epochs=6, batch_size=24, lr=0.01, optimiser="adam")
    schedule = cs.settings.multitask(tasks, "task")
    result = cs.run(schedule, cs.methods.uncertainty() + cs.methods.pcgrad(), model, training)
    found = dict(zip(result.sources, result.matrix[-1], strict=True))
    assert result.of_metric("f1").score > 0.9 and found["text/upos"] > 0.95, found
    assert found["text/sentiment"] > 0.95
    # Tags answer each word, and sentiment the text.
    x = {"words": [[3, 4, 5]], "endings": [[3, 4, 5]]}
    assert result.predict(x, task="upos").shape[2:] == (3,)
    assert result.predict(x, task="sentiment").dim() == 2
