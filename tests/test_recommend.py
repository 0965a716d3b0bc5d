"""Recommendation: ids, ESMM's chain, and rates of purchase against known propensities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import consilience as cs
from consilience.models.recommend import chained

CLICK = torch.tensor([0.8, 0.4, 0.1, 0.6])
"""How often an item of each kind is clicked."""
BUY = torch.tensor([0.7, 0.5, 0.1, 0.3])
"""How often it is bought after a click."""


def test_the_chain_is_the_logit_of_a_product() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (6 * torch.randn(200, 1, generator=g, dtype=torch.float64) for _ in range(2))
    p = torch.sigmoid(a) * torch.sigmoid(b)
    assert torch.allclose(chained(a, b), torch.logit(p), atol=1e-9)
    # Where a float32 probability would be 0 or 1, the loss and its gradient are still right.
    far = torch.tensor([[60.0], [-60.0]], requires_grad=True)
    loss = F.binary_cross_entropy_with_logits(chained(far, far), torch.tensor([[0.0], [1.0]]))
    (grad,) = torch.autograd.grad(loss, far)
    assert abs(loss - (60 - torch.log(torch.tensor(2.0)) + 120) / 2) < 1e-3 and torch.isfinite(grad).all()


def impressions(count: int = 12000) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [N, 1] of items, clicks [N, 1], and purchases after a click [N, 1]; half of a kind each."""
    g = torch.Generator().manual_seed(0)
    kind = torch.randint(4, (count,), generator=g)
    click = (torch.rand(count, generator=g) < CLICK[kind]).float()
    buy = click * (torch.rand(count, generator=g) < BUY[kind]).float()
    return kind[:, None] + 1, click[:, None], buy[:, None]


@pytest.fixture(scope="module")
def rates() -> Tensor:
    """The rate of purchases after a click that ESMM predicts for each kind of item [4]."""
    kind, click, buy = impressions()
    tasks = cs.data.tasks(
        {"ids": kind}, {"click": click, "buy": buy}, {"click": "labels", "buy": "labels"}, test=0.05
    )
    model = cs.models.recommender([5], {"click": 1, "buy": 1}, chain=("click", "buy"), hidden=(16,))
    training = cs.Training(epochs=12, batch_size=256, lr=0.02, optimiser="adam", lr_schedule="cosine")
    result = cs.run(cs.settings.multitask(tasks, "task"), cs.methods.finetune(), model, training)
    every = {"ids": torch.arange(1, 5)[:, None]}
    columns = {space.rpartition("/")[2]: i for i, (space, _) in enumerate(result.labels)}
    found = {task: result.predict(every, task=task)[:, columns[task]] for task in ("click", "buy")}
    assert (found["click"] - CLICK).abs().max() < 0.04
    return found["buy"] / found["click"]


def test_rates_of_purchase_over_all_impressions_are_unbiased(rates: Tensor) -> None:
    """The mean over all impressions is that of the truth; among clicks alone it is another."""
    kind, click, buy = impressions()
    number = kind[:, 0] - 1
    truth = float(BUY[number].mean())
    esmm = float(rates[number].mean())
    assert (rates - BUY).abs().max() < 0.1 and abs(esmm - truth) < 0.03

    # A rate learned from clicks alone is the mean over those who click.
    clicked = float(buy[click == 1].mean())
    expected = float((CLICK * BUY)[number].mean() / CLICK[number].mean())
    assert abs(clicked - expected) < 0.02 and abs(clicked - truth) > 0.04
    # By the inverse of the known propensities, it is the truth again.
    weighted = float((buy[:, 0] / CLICK[number]).mean())
    assert abs(weighted - truth) < 0.03
    # And purchases over all impressions, with no click as no purchase, are no rate after a click.
    assert abs(float(buy.mean()) - truth) > 0.15


def test_a_purchase_is_trained_through_both_towers() -> None:
    """One step on impressions without any click moves the tower of purchases too."""
    kind, click, buy = (part[:64] for part in impressions())
    targets = {"click": torch.zeros_like(click), "buy": torch.zeros_like(buy)}
    tasks = cs.data.tasks({"ids": kind}, targets, {"click": "labels", "buy": "labels"})
    given = cs.models.recommender([5], {"click": 1, "buy": 1}, chain=("click", "buy"), hidden=(8,))
    module = given.factory()
    model = cs.models.joint(module, {"click": 1, "buy": 1})
    training = cs.Training(epochs=1, batch_size=100, lr=0.1, precision="fp64")
    result = cs.run(cs.settings.multitask(tasks, "task"), cs.methods.finetune(), model, training)
    plain = module.double()
    x = tasks[0].train.whole()[0].parts["ids"]
    out = plain(x)
    total = (F.softplus(out["click"]).mean() + F.softplus(out["buy"]).mean()) / 2
    grads = torch.autograd.grad(total, list(plain.parameters()))
    for (entry, p), grad in zip(plain.named_parameters(), grads, strict=True):
        assert (result.params[entry] - (p - 0.1 * grad)).abs().max() < 1e-12, entry
    assert (result.params["towers.1.2.weight"] - dict(plain.named_parameters())["towers.1.2.weight"]).any()


def test_engagement_of_other_kinds_stands_next_to_clicks() -> None:
    """Clicks, the time spent, and one of three ratings: each with its loss, on ids of names and numbers."""
    g = torch.Generator().manual_seed(0)
    users = [f"user {int(i)}" for i in torch.randint(50, (200,), generator=g)]
    items = [["tea", "rum", "ale", None][int(i)] for i in torch.randint(4, (200,), generator=g)]
    numbers = torch.randn(200, 2, generator=g)
    x = {"ids": cs.data.ids([users, items], [64, 16]), "numbers": numbers}
    liked = torch.tensor([item == "tea" for item in items])
    targets = {
        "click": liked.float()[:, None],
        "dwell": (numbers[:, :1] + 2 * liked[:, None]).clamp_min(-3),
        "rating": liked.long() + (numbers[:, 1] > 0),
    }
    tasks = cs.data.tasks(x, targets, {"click": "labels", "dwell": "value"})
    widths = {"click": 1, "dwell": 1, "rating": 3}
    model = cs.models.recommender([64, 16], widths, numbers=2, hidden=(16,))
    training = cs.Training(epochs=20, batch_size=36, lr=0.02, optimiser="adam", loss={"dwell": "huber"})
    schedule = cs.settings.multitask(tasks, "task")
    result = cs.run(schedule, cs.methods.pcgrad(), model, training)
    assert result.of_metric("auroc").score > 0.9
    assert result.of_metric("r2").score > 0.4 and result.of_metric("accuracy").score > 0.6


def test_ids_are_the_same_everywhere_and_missing_names_are_zero() -> None:
    one = cs.data.ids([["ann", "", 3.0]], [100])
    assert one[1, 0] == 0 and one[2, 0] == cs.data.ids([[3]], [100])[0, 0]
    assert cs.data.ids([["ann"]], [100])[0, 0] == one[0, 0] == 64
    assert int(cs.data.ids([[str(i) for i in range(500)]], [7]).max()) == 6
    with pytest.raises(cs.ConsilienceError, match="columns must be equally long, got 2, 1"):
        cs.data.ids([["a", "b"], ["c"]], [5, 5])
    with pytest.raises(cs.ConsilienceError, match="one number per column, got 1 of 2"):
        cs.data.ids([["a"], ["c"]], [5])


def test_a_chain_needs_two_tasks() -> None:
    with pytest.raises(cs.ConsilienceError, match="`chain` must be two tasks of one output each"):
        cs.models.recommender([5], {"click": 1}, chain=("click", "buy"))
    with pytest.raises(cs.ConsilienceError, match="needs `ids` or `numbers`, got neither"):
        cs.models.recommender([], {"click": 1})
