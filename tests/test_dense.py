"""Dense tasks: distillation between tasks, earlier answers, one encoder for images, pixels and boxes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import consilience as cs
from consilience.models import dense

WIDTHS = {"seg": 2, "depth": 1}


def scenes(count: int = 48, side: int = 16) -> tuple[Tensor, list[Tensor], Tensor]:
    """Images [N, 1, side, side] of one bright box on noise, the boxes, and whether each is wide."""
    g = torch.Generator().manual_seed(0)
    x = 0.1 * torch.rand(count, 1, side, side, generator=g)
    boxes, wide = [], torch.zeros(count, dtype=torch.long)
    for i in range(count):
        wide[i] = int(torch.randint(2, (), generator=g))
        w, h = (8, 4) if wide[i] else (4, 8)
        left = int(torch.randint(side - w + 1, (), generator=g))
        top = int(torch.randint(side - h + 1, (), generator=g))
        x[i, 0, top : top + h, left : left + w] += 0.9
        boxes.append(torch.tensor([[left, top, left + w, top + h]]).float())
    return x, boxes, wide


def dense_sources() -> list[cs.Source]:
    x, _, _ = scenes(24)
    seg = (x[:, 0] > 0.5).long()
    seg[:, 0, 0] = -100
    return cs.data.tasks(x, {"seg": seg, "depth": 2 * x - 1}, {"depth": "value"}, {"seg": ["off", "on"]})


def test_distillation_adds_what_attention_lets_through() -> None:
    torch.manual_seed(0)
    layer = dense.Distillation(3, 4)
    own = [torch.randn(2, 4, 5, 5) for _ in range(3)]
    found = layer(own)
    for k in range(3):
        gate = torch.sigmoid(F.conv2d(own[k], layer.gates[k].weight, layer.gates[k].bias, padding=1))
        wanted = own[k].clone()
        others = [t for t in range(3) if t != k]
        for place, t in enumerate(others):
            wanted = wanted + gate * F.conv2d(own[t], layer.maps[2 * k + place].weight, padding=1)
        assert torch.allclose(found[k], wanted, atol=1e-6)
    # One task alone has nobody to learn from.
    assert torch.equal(dense.Distillation(1, 4)(own[:1])[0], own[0])


@pytest.mark.parametrize(("name", "earlier"), [("pad_net", 1), ("mti_net", 3)])
def test_earlier_answers_have_the_size_of_the_last(name: str, earlier: int) -> None:
    model = getattr(cs.models, name)(WIDTHS, channels=1, width=4)
    out = model.module(torch.rand(2, 1, 18, 14))
    for task, k in WIDTHS.items():
        assert [tuple(answer.shape) for answer in out[task]] == [(2, k, 18, 14)] * (1 + earlier)
    # Each task's answer depends on the maps of the other.
    maps = [p for n, p in model.module.named_parameters() if n.startswith(f"own.{earlier - 1}.1")]
    grads = torch.autograd.grad(out["seg"][0].sum(), maps, allow_unused=True)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("name", ["pad_net", "mti_net"])
def test_a_step_with_deep_supervision_is_the_sum_of_all_losses(name: str) -> None:
    tasks = dense_sources()
    given = getattr(cs.models, name)(WIDTHS, channels=1, width=4)
    module = given.factory()
    model = cs.models.joint(module, WIDTHS, given.earlier)
    training = cs.Training(epochs=1, batch_size=100, lr=0.1, precision="fp64")
    method = cs.methods.deep_supervision(0.5) + cs.methods.task_weights({"data/depth": 3.0})
    result = cs.run(cs.settings.multitask(tasks, "task"), method, model, training)

    plain = module.double()
    x = tasks[0].train.whole()[0].double()
    y = {s.task: s.train.targets() for s in tasks}
    out = plain(x)
    seg = [F.cross_entropy(answer, y["seg"]) for answer in out["seg"]]
    depth = [F.mse_loss(answer, y["depth"].double()) for answer in out["depth"]]
    # Earlier answers are a part of the loss of their task, and weigh as it does.
    total = sum(
        weight * (each[0] + 0.5 * torch.stack(each[1:]).sum()) / 4
        for each, weight in ((seg, 1.0), (depth, 3.0))
    )
    grads = torch.autograd.grad(total, list(plain.parameters()))
    for (entry, p), grad in zip(plain.named_parameters(), grads, strict=True):
        assert (result.params[entry] - (p - 0.1 * grad)).abs().max() < 1e-11, entry


def test_without_deep_supervision_first_answers_stay_as_they_are() -> None:
    model = cs.models.pad_net(WIDTHS, channels=1, width=4)
    training = cs.Training(epochs=1, batch_size=100, lr=0.1)
    result = cs.run(cs.settings.multitask(dense_sources(), "task"), cs.methods.finetune(), model, training)
    # They end at the answer: the layers before are trained through the distillation.
    again = cs.run(
        cs.settings.multitask(dense_sources(), "task"), cs.methods.deep_supervision(0.0), model, training
    )
    for entry, p in result.params.items():
        assert torch.equal(p, again.params[entry])
    with pytest.raises(cs.Refusal, match="the model has no earlier answers; use models.pad_net"):
        cs.run(cs.settings.multitask(dense_sources(), "task"), cs.methods.deep_supervision(), None)


def test_tasks_of_pad_net_are_learned() -> None:
    model = cs.models.pad_net(WIDTHS, channels=1, width=4)
    training = cs.Training(epochs=40, batch_size=10, lr=0.02, optimiser="adam")
    schedule = cs.settings.multitask(dense_sources(), "task")
    result = cs.run(schedule, cs.methods.deep_supervision(), model, training, metric={"seg": "iou"})
    assert result.of_metric("iou").score > 0.9 and result.of_metric("r2").score > 0.8


# One encoder for images, pixels and cells.


def test_cells_of_boxes_and_back() -> None:
    boxes = [torch.tensor([[1.0, 0, 9, 4], [8, 8, 16, 16]]), torch.zeros(0, 4)]
    found = cs.data.cell_targets(boxes, (16, 16), 4)
    assert found.object.shape == (2, 1, 4, 4) and float(found.object.sum()) == 2
    # The centre (5, 2) lies in row 0, column 1, a quarter from its left edge and half from its top.
    assert found.box[0, :, 0, 1].tolist() == [0.25, 0.5, 0.5, 0.25]
    assert torch.isnan(found.box[1]).all()
    again = cs.data.cell_boxes(found.object, found.box, 4)
    assert torch.allclose(again[0].float(), boxes[0]) and len(again[1]) == 0
    # Of two boxes in one cell the larger stays, in any order.
    two = torch.tensor([[4.0, 4, 8, 8], [0, 0, 12, 12]])
    for own in (two, two.flip(0)):
        kept = cs.data.cell_boxes(*cs.data.cell_targets([own], (16, 16), 4), 4)[0]
        assert kept.tolist() == [[0, 0, 12, 12]]
    with pytest.raises(cs.ConsilienceError, match=r"image, got \(4.0, 0.0, 20.0, 4.0\) in image 0"):
        cs.data.cell_targets([torch.tensor([[4.0, 0, 20, 4]])], (16, 16), 4)
    with pytest.raises(cs.ConsilienceError, match="must be a multiple of `cell`, got 15 x 16 and 4"):
        cs.data.cell_targets(boxes, (15, 16), 4)


def test_one_encoder_classifies_segments_and_detects() -> None:
    x, boxes, wide = scenes(80)
    there, box = cs.data.cell_targets(boxes, (16, 16), 4)
    tasks = cs.data.tasks(
        x,
        {"shape": wide, "seg": (x[:, 0] > 0.5).long(), "object": there, "box": box},
        {"object": "labels", "box": "value"},
        {"shape": ["tall", "wide"], "seg": ["off", "on"]},
    )
    model = cs.models.multi_net({"shape": 2}, {"seg": 2}, {"object": 1, "box": 4}, channels=1, width=8)
    training = cs.Training(epochs=30, batch_size=29, lr=0.02, optimiser="adam")
    metric = {"seg": "iou", "box": "mae"}
    result = cs.run(
        cs.settings.multitask(tasks, "task"), cs.methods.finetune(), model, training, metric=metric
    )
    assert result.of_metric("accuracy").score > 0.8 and result.of_metric("iou").score > 0.9
    assert result.of_metric("auroc").score > 0.9

    # Boxes of the likeliest cell overlap those that are there.
    held = tasks[2].test.whole()[0]
    columns = {name: i for i, (_, name) in enumerate(result.labels)}
    objects = result.predict(held, task="object")[:, [columns["label"]]]
    places = result.predict(held, task="box")[:, [columns[f"value{i}"] for i in range(4)]]
    best = objects.flatten(1).amax(1).view(-1, 1, 1, 1)
    found = cs.data.cell_boxes((objects == best).float(), places, 4)
    wanted = cs.data.cell_boxes(tasks[2].test.targets(), tasks[3].test.targets(), 4)
    overlaps = torch.stack([overlap(one[0], other[0]) for one, other in zip(found, wanted, strict=True)])
    assert overlaps.mean() > 0.5


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """The intersection over union of two boxes."""
    low, high = torch.maximum(one[:2], other[:2]), torch.minimum(one[2:], other[2:])
    shared = (high - low).clamp_min(0).prod()
    return shared / ((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared)
