"""Tasks of different kinds and places in one joint run: against restatements in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs

PIXELS, IMAGES = {"seg": 2, "depth": 1, "normals": 3}, {"scene": 2, "facts": 2, "angle": 2}
LOSSES = {"normals": "cosine", "depth": "l1"}
METRICS = {"normals": "mean_angle", "depth": "mae", "seg": "iou"}


class Net(nn.Module):
    """One convolution, and a head for each task: per pixel, and per image."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(1, 4, 3, padding=1)
        self.pixels = nn.ModuleDict({task: nn.Conv2d(4, k, 1) for task, k in PIXELS.items()})
        self.images = nn.ModuleDict({task: nn.Linear(4 * 36, k) for task, k in IMAGES.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x).relu()
        found = {task: head(h) for task, head in self.pixels.items()}
        return found | {task: head(h.flatten(1)) for task, head in self.images.items()}


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def model() -> cs.Model:
    return cs.models.joint(net(), {**PIXELS, **IMAGES})


def data(count: int = 40) -> tuple[Tensor, dict[str, Tensor]]:
    """Images, and targets of six kinds, of which some are missing."""
    x = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    seg = (x[:, 0] > 0.5).long()
    seg[:, 0] = -100
    depth = x.clone()
    depth[::3] = torch.nan
    normals = torch.cat([x - 0.5, x.flip(2) - 0.5, torch.ones_like(x)], 1)
    normals[:, :, 0] = 0
    normals[:, 1, 1] = torch.nan
    facts = torch.stack([x[:, 0, 0, 0] > 0.5, x[:, 0, 5, 5] > 0.5], 1).float()
    facts[::4, 0] = torch.nan
    scene = (x.mean((1, 2, 3)) > 0.5).long()
    targets = {"scene": scene, "facts": facts, "angle": x[:, 0, 0, :2].clone()}
    return x, {**targets, "seg": seg, "depth": depth, "normals": normals}


def sources(count: int = 40) -> list[cs.Source]:
    x, targets = data(count)
    kinds = {"facts": "labels", "angle": "value", "depth": "value", "normals": "value"}
    return cs.data.tasks(x, targets, kinds, {"scene": ["dark", "light"], "seg": ["off", "on"]})


def plain_losses(out: dict[str, Tensor], y: dict[str, Tensor]) -> dict[str, Tensor]:
    """What torch says of each task."""
    known = y["normals"].isfinite().all(1) & (y["normals"].nan_to_num().norm(dim=1) > 0)
    apart = 1 - F.cosine_similarity(out["normals"], y["normals"].nan_to_num(), dim=1)
    labels = y["facts"].isfinite()
    depth = y["depth"].isfinite()
    return {
        "scene": F.cross_entropy(out["scene"], y["scene"]),
        "facts": F.binary_cross_entropy_with_logits(out["facts"][labels], y["facts"][labels]),
        "angle": F.mse_loss(out["angle"], y["angle"]),
        "seg": F.cross_entropy(out["seg"], y["seg"]),
        "depth": F.l1_loss(out["depth"][depth], y["depth"][depth]),
        "normals": apart[known].mean(),
    }


def run(method: cs.Method, tasks: list[cs.Source] | None = None, **training: object) -> cs.Result:
    given = {"epochs": 1, "lr": 0.1, "batch_size": 100, "precision": "fp64", "loss": LOSSES, **training}
    schedule = cs.settings.multitask(tasks or sources(), "task")
    return cs.run(schedule, method, model(), cs.Training(**given), metric=METRICS)  # type: ignore[arg-type]


def test_a_step_over_six_kinds_of_targets_is_the_weighted_sum_of_their_losses() -> None:
    tasks, plain = sources(), net().double()
    x = tasks[0].train.whole()[0].double()
    y = {s.task: s.train.whole()[1] for s in tasks}
    y = {task: own.double() if own.is_floating_point() else own for task, own in y.items()}
    losses = plain_losses(plain(x), y)
    weights = {"seg": 2.0, "normals": 3.0}
    total = sum(weights.get(task, 1.0) * loss for task, loss in losses.items()) / (4 + 5)
    grads = torch.autograd.grad(total, list(plain.parameters()))

    method = cs.methods.task_weights({f"data/{task}": weight for task, weight in weights.items()})
    # In micro-batches too, whose shares count the targets that are there.
    for more in ({}, {"batch_size": 5, "accumulate": 20}):
        result = run(method, tasks, **more)
        for (name, p), grad in zip(plain.named_parameters(), grads, strict=True):
            assert (result.params[name] - (p - 0.1 * grad)).abs().max() < 1e-12, name


def test_every_task_has_its_metric_and_is_learned() -> None:
    result = run(cs.methods.pcgrad(), sources(60), epochs=40, lr=0.02, batch_size=21, optimiser="adam")
    measured = dict(zip(result.sources, result.measured_by, strict=True))
    assert measured["data/normals"] == "mean_angle" and measured["data/scene"] == "accuracy"
    # Less is better: depth in units of the image, normals in degrees.
    assert result.of_metric("mae").score < 0.15 and result.of_metric("mean_angle").score < 16
    assert result.of_metric("iou").score > 0.8


def test_predictions_have_the_places_of_their_task() -> None:
    result = run(cs.methods.finetune())
    x = data()[0][:2]
    labels = [name for _, name in result.labels]
    normals = result.predict(x, task="normals")
    assert normals.shape == (2, len(labels), 6, 6)
    lengths = normals.norm(dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths)) and result.predict(x, task="scene").dim() == 2
    # Classes of one task are probabilities.
    assert torch.allclose(result.predict(x, task="seg").sum(1), torch.ones(2, 6, 6).double())


def test_entries_that_one_task_reaches_are_no_conflict() -> None:
    """The aggregator sees the trunk; each head has the gradient of its task, by weight 1/m."""
    tasks, plain = sources(), net().double()
    x = tasks[0].train.whole()[0].double()
    y = {s.task: s.train.whole()[1] for s in tasks}
    y = {task: own.double() if own.is_floating_point() else own for task, own in y.items()}
    losses = plain_losses(plain(x), y)
    trunk = list(plain.trunk.parameters())
    rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses.values()]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    wanted = cs.aggregators.mgda()(flat)

    result = run(cs.methods.mgda(), tasks)
    moved = torch.cat(
        [(result.params[f"trunk.{n}"] - p).flatten() for n, p in plain.trunk.named_parameters()]
    )
    assert (moved + 0.1 * wanted).abs().max() < 1e-9
    (head,) = torch.autograd.grad(losses["seg"], [plain.pixels["seg"].weight])
    assert (
        result.params["pixels.seg.weight"] - plain.pixels["seg"].weight + 0.1 * head / 6
    ).abs().max() < 1e-12


def test_an_interrupted_run_ends_at_the_same_bits(tmp_path) -> None:
    from restate import stopped

    one = run(cs.methods.pcgrad(), epochs=2, batch_size=8)
    schedule = cs.settings.multitask(sources(), "task")
    training = cs.Training(epochs=2, lr=0.1, batch_size=8, precision="fp64", loss=LOSSES)
    given = (schedule, cs.methods.pcgrad(), model(), training)
    stopped(lambda **more: cs.run(*given, **more), tmp_path, 3)
    again = cs.run(*given, out=tmp_path, resume=True)
    for name, p in one.params.items():
        assert torch.equal(p, again.params[name])


# Directions.


def test_the_cosine_loss_and_the_mean_angle_leave_out_what_has_no_direction() -> None:
    g = torch.Generator().manual_seed(0)
    out, y = torch.randn(3, 3, 4, generator=g), torch.randn(3, 3, 4, generator=g)
    y[0, :, 0], y[1, 2, 1], y[2] = 0, torch.nan, torch.nan
    loss = cs.losses.cosine()(out, y).mean()
    known = [(i, j) for i in range(2) for j in range(4) if (i, j) not in ((0, 0), (1, 1))]
    cosines = torch.stack([F.cosine_similarity(out[i, :, j], y[i, :, j], dim=0) for i, j in known])
    assert abs(loss - (1 - cosines).mean()) < 1e-6
    angle = cs.metrics.mean_angle()(out, y)
    assert abs(angle - torch.rad2deg(cosines.double().acos()).mean()) < 1e-4
    # Neither depends on lengths, and small angles keep their digits.
    assert abs(cs.losses.cosine()(out, 7 * y).mean() - loss) < 1e-6
    tiny = cs.metrics.mean_angle()(torch.tensor([[1.0, 1e-6]]).double(), torch.tensor([[2.0, 0.0]]).double())
    assert abs(tiny - 5.729577951e-5) < 1e-12


def test_the_cosine_loss_needs_vectors() -> None:
    tasks = sources()
    with pytest.raises(cs.ConsilienceError, match="needs vectors of two components or more, got value alone"):
        cs.run(
            cs.settings.multitask(tasks, "task"),
            cs.methods.finetune(),
            model(),
            cs.Training(loss={"depth": "cosine"}),
        )


# What cannot be trained is named before it is, with the task.


def refused(match: str, tasks: list[cs.Source] | None = None, **training: object) -> None:
    with pytest.raises(cs.ConsilienceError, match=match):
        run(cs.methods.finetune(), tasks, **training)


def test_a_task_without_data_or_loss_is_named() -> None:
    x, targets = data()
    with pytest.raises(
        cs.ConsilienceError, match="a source must have training examples, got none in 'data/seg'"
    ):
        empty = sources()[3]
        empty.map(train=empty.train.select(torch.arange(0)))
    targets["angle"] = torch.full_like(targets["angle"], torch.nan)
    kinds = {"facts": "labels", "angle": "value", "depth": "value", "normals": "value"}
    lacking = cs.data.tasks(x, targets, kinds, {"scene": ["dark", "light"], "seg": ["off", "on"]})
    refused("must have training targets, and all of 'data/angle' are missing", lacking)
    refused("unknown loss 'dept'.*did you mean 'depth'|'dept'", loss={"dept": "l1"})
    refused(
        "the loss of targets of kind 'labels' must be bce or a function, got Cosine", loss={"facts": "cosine"}
    )


def test_a_model_without_a_task_is_refused() -> None:
    def asked(widths: dict[str, int], match: str, scenario: str = "task") -> None:
        made = cs.models.joint(net(), widths)
        schedule = cs.settings.multitask(sources(), scenario)
        with pytest.raises(cs.ConsilienceError, match=match):
            cs.run(schedule, cs.methods.finetune(), made, cs.Training(epochs=1, loss=LOSSES))

    every = {**PIXELS, **IMAGES}
    asked(
        {t: k for t, k in every.items() if t != "seg"}, "has no outputs for 'seg'; it answers depth, normals"
    )
    asked({**every, "seg": 3}, "one output for each of the 2 labels of 'seg', got 3")
    asked(every, "needs to know the task; use scenario='task'", "class")
    asked({**every, "nose": 1}, "the module must answer 'nose', got answers for seg, depth")
    with pytest.raises(
        cs.ConsilienceError, match="must return a mapping from tasks to outputs, got a Tensor"
    ):
        single = cs.models.joint(nn.Conv2d(1, 12, 3, padding=1), every)
        cs.run(cs.settings.multitask(sources(), "task"), cs.methods.finetune(), single)
    with pytest.raises(cs.ConsilienceError, match="or with models.joint if these are the answers of tasks"):
        cs.run(cs.settings.multitask(sources(), "task"), cs.methods.finetune(), net())


def test_targets_of_the_wrong_kind_are_named_with_their_task() -> None:
    x, targets = data()
    for task, kind, wrong in (
        ("depth", "class", "must be class numbers of an integer type"),
        ("angle", "labels", "must be 0 or 1 for each label"),
        ("scene", "class", "must be equally long, got 40 and 39"),
    ):
        own = {task: targets[task][:39] if task == "scene" else targets[task]}
        with pytest.raises(cs.ConsilienceError, match=f"in task '{task}': .*{wrong}"):
            cs.data.tasks(x, own, {task: kind})


class Order(cs.Sampler):
    """Examples in their order."""

    def plan(self, targets, batch_size, epoch, generator):
        return list(torch.arange(len(targets)).split(batch_size))


@pytest.mark.parametrize("name", ["finetune", "pcgrad"])
def test_a_loss_that_is_not_finite_names_its_task_and_step_and_keeps_the_last_good_state(
    name, tmp_path
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g)
    y = x[:, 0].clone()
    # A target so large that its square overflows, in the sixth batch.
    y[21] = 1e25
    tasks = cs.data.tasks(
        x, {"big": y, "small": x[:, 1].clone()}, {"big": "value", "small": "value"}, test=0.1
    )
    parts = (y[:, None], x[:, 1:2].clone())
    tasks = [s.map(train=type(s.train)(x, own)) for s, own in zip(tasks, parts, strict=True)]
    training = cs.Training(epochs=2, batch_size=4, lr=0.01, sampler=Order())

    def go(**more: object) -> cs.Result:
        torch.manual_seed(0)
        schedule = cs.settings.multitask(tasks, "task")
        return cs.run(schedule, getattr(cs.methods, name)(), nn.Linear(3, 2), training, **more)

    said = "the training loss of 'data/big' is NaN or infinite in 'agent' .*, at step 6 of 20"
    with pytest.raises(cs.ConsilienceError, match=said):
        go(out=tmp_path / "run", checkpoint_steps=1)
    # A checkpoint holds no step that was bad: what is resumed is finite, and says the same again.
    files = [*(tmp_path / "run").rglob("*.safetensors")]
    from safetensors.torch import load_file

    assert files
    for file in files:
        assert all(torch.isfinite(t).all() for t in load_file(file).values() if t.is_floating_point()), file
    with pytest.raises(cs.ConsilienceError, match=said):
        go(out=tmp_path / "run", resume=True)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(cs.ConsilienceError, match=r"needs torchjd .*pip install 'consilience\[torchjd\]'"):
        cs.methods.imtl_g()


def test_what_torchjd_itself_lacks_is_named_with_its_extra() -> None:
    pytest.importorskip("torchjd")
    import importlib.util

    if importlib.util.find_spec("cvxpy") is not None:
        pytest.skip("cvxpy is installed")
    with pytest.raises(cs.ConsilienceError, match=r"not installed: .*torchjd\[nash_mtl\]"):
        cs.aggregators.torchjd("NashMTL", n_tasks=2)
