"""Makers of synthetic memory: priors by finite differences, targets by their moments, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience import testing
from consilience.core.augment import uniform
from consilience.core.params import key
from consilience.core.synthetic import Wanted
from consilience.core.teacher import Norm, Teacher, _Norms
from consilience.memory import _priors as priors
from consilience.memory._generator import Generator
from consilience.memory._inversion import Impression, Inversion, dirichlet
from consilience.memory._moments import Moments
from restate import source

SHAPE = (2, 5, 6)


def images(count=3, shape=SHAPE, seed=0, dtype=torch.float64):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def teacher_of(model, classes=None, name="expert", seed=0, task=None, dtype=torch.float32):
    """An untrained model as an expert whose class i is the receiver's column 10 + i."""
    params, buffers = model.init(torch.Generator().manual_seed(seed))
    params = {name: p.to(dtype) for name, p in params.items()}
    buffers = {name: b.to(dtype) if b.is_floating_point() else b for name, b in buffers.items()}
    outputs = tuple(range(model.outputs)) if classes is None else classes
    return Teacher(name, model, params, buffers, tuple(10 + i for i in outputs), outputs, task)


def wanted_of(counts, shape, dtype=torch.float32, student=None):
    return Wanted(counts, shape, dtype, torch.device("cpu"), student)


def small(shape=(1, 8, 8), outputs=3):
    return cs.models.conv(outputs, channels=shape[0], size=shape[1], width=4)


# Priors.


def norms_of(x):
    """Two layers: of the samples, and of twice their first channel."""
    variance, mean = torch.var_mean(x, (0, 2, 3))
    kept = torch.tensor([0.3, -0.2], dtype=x.dtype), torch.tensor([0.5, 2.0], dtype=x.dtype)
    first = [part[:1] for part in kept]
    return [Norm(mean, variance, *kept, 1e-5), Norm(2 * mean[:1], 4 * variance[:1], *first, 1e-5)]


EACH = [
    priors.L2(0.7),
    priors.Blur(0.7),
    priors.TotalVariation(0.7),
    priors.TotalVariation(0.7, power=2),
    priors.BatchNormStatistics(0.7),
    priors.BatchNormStatistics(0.7, of="variance"),
    priors.Disagreement(0.7),
]


@pytest.mark.parametrize("prior", EACH, ids=repr)
def test_gradients_are_those_of_finite_differences(prior):
    weights = torch.randn(2, 2 * 5 * 6, 4, generator=key("weights"), dtype=torch.float64)

    def penalty(x):
        flat = x.flatten(1)
        return prior.penalty(x, priors.Seen(flat @ weights[0], norms_of(x), flat @ weights[1]))

    x = images().requires_grad_()
    assert penalty(x).shape == () and torch.autograd.gradcheck(penalty, x)
    assert torch.allclose(
        penalty(x) / 0.7,
        replace(prior, strength=1.0).penalty(
            x, priors.Seen(x.flatten(1) @ weights[0], norms_of(x), x.flatten(1) @ weights[1])
        ),
    )


@pytest.mark.parametrize("flip", [False, True])
def test_gradients_through_augmentations_are_those_of_finite_differences(flip):
    augmented = priors.Augmented(shift=0.2, angle=30, flip=flip)
    x = images().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augmented.view(x, torch.tensor([1, 2, 3])), x)


@pytest.mark.parametrize("prior", [priors.Blur(1.0), priors.TotalVariation(1.0)])
def test_constant_images_have_no_penalty(prior):
    x = torch.full((2, 3, 4, 5), 0.3, dtype=torch.float64)
    assert float(prior.penalty(x, priors.Seen(x))) < 1e-28
    x[0, 1, 2, 3] = 1.0
    assert float(prior.penalty(x, priors.Seen(x))) > 0.1


def test_blur_is_a_convolution_with_reflected_borders():
    x = images()
    side = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype)
    kernel = (side[:, None] * side / 16).expand(2, 1, 3, 3)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=2)
    want = (x - blurred).square().sum((1, 2, 3)).mean()
    assert torch.allclose(priors.Blur(1.0).penalty(x, priors.Seen(x)), want)


def test_total_variation_sums_neighbours_in_both_directions():
    x = images()
    want = (x[:, :, 1:] - x[:, :, :-1]).abs().sum() + (x[..., 1:] - x[..., :-1]).abs().sum()
    assert torch.allclose(priors.TotalVariation(1.0).penalty(x, priors.Seen(x)), want / len(x))


def test_disagreement_is_one_minus_the_divergence():
    seen = priors.Seen(torch.randn(5, 3, generator=key(1)), (), torch.randn(5, 3, generator=key(2)))
    p, q = seen.logits.softmax(1), seen.student.softmax(1)
    m = (p + q) / 2
    js = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2
    assert torch.allclose(priors.Disagreement(2.0).penalty(None, seen), 2 * (1 - js.mean()), atol=1e-6)
    same = replace(seen, student=seen.logits)
    assert float(priors.Disagreement(2.0).penalty(None, same)) == pytest.approx(2.0)
    # Where one is certain of what the other excludes, all is finite.
    far = priors.Seen(torch.tensor([[500.0, -500.0]]), (), torch.tensor([[-500.0, 500.0]]))
    assert float(priors.Disagreement(1.0).penalty(None, far)) == pytest.approx(
        1 - torch.log(torch.tensor(2.0))
    )


def test_augmentations_move_turn_and_mirror():
    x, seeds = images(6, (1, 9, 9)), torch.arange(6)
    nearly = priors.Augmented(shift=0.0, angle=1e-9).view(x, seeds)
    assert torch.allclose(nearly, x)
    mirrored = priors.Augmented(shift=0.0, angle=0.0, flip=True).view(x, seeds)
    chosen = uniform(seeds, 4)[:, 3] < 0.5
    assert 0 < int(chosen.sum()) < 6
    assert torch.allclose(mirrored, torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x))
    # A view depends on its own seed alone.
    views = priors.Augmented(flip=True).view(x, seeds)
    assert torch.equal(views[2:4], priors.Augmented(flip=True).view(x[2:4], seeds[2:4]))
    # One pixel in the middle moves by at most the largest shift, of one side of nine.
    dot = torch.zeros(20, 1, 9, 9)
    dot[:, 0, 4, 4] = 1.0
    moved = priors.Augmented(shift=0.12, angle=0.0).view(dot, torch.arange(20))
    assert float(moved[:, :, 2:7, 2:7].sum()) == pytest.approx(20, rel=1e-5)
    assert float(moved[:, 0, 4, 4].min()) < 0.7


# Batch norms.


def normed():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4)
    )


def norms_by_hooks(module, x):
    """The penalty of all layers, by hooks on the modules."""
    total, handles = [], []

    def hook(norm, args):
        dims = [0, *range(2, args[0].dim())]
        mean, variance = args[0].mean(dims), args[0].var(dims)
        kept = (norm.running_var + norm.eps).sqrt()
        total.append(
            (mean - norm.running_mean).square().sum() + ((variance + norm.eps).sqrt() - kept).square().sum()
        )

    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            handles.append(part.register_forward_pre_hook(hook))
    module.eval()(x)
    for handle in handles:
        handle.remove()
    return total


def test_statistics_of_all_layers_are_summed():
    module = normed()
    x = images(6, (1, 8, 8), dtype=torch.float32)
    module.train()(2 * x + 1)
    teacher = teacher_of(cs.models.wrap(module, outputs=4))
    out, norms = teacher.watched(x)
    assert torch.equal(out, teacher(x)) and len(norms) == 2
    want = norms_by_hooks(module, x)
    assert len(want) == 2 and all(part > 1e-3 for part in want)
    found = priors.BatchNormStatistics(1.0).penalty(x, priors.Seen(out, norms))
    assert torch.allclose(found, sum(want))


def test_gradients_of_moments_are_those_of_finite_differences():
    norm = nn.BatchNorm2d(2).double().eval()
    teacher = teacher_of(cs.models.wrap(nn.Sequential(norm, nn.Flatten()), outputs=60), dtype=torch.float64)
    x = images().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: teacher.watched(x)[1][0][:2], x)
    mean, variance = teacher.watched(x)[1][0][:2]
    assert torch.allclose(mean, x.mean((0, 2, 3))) and torch.allclose(variance, x.var((0, 2, 3)))


def test_data_with_the_running_statistics_have_no_penalty():
    module = normed()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = 1.0
    x = images(7, (1, 8, 8), dtype=torch.float32)
    module.train()(x)
    # The first layer alone: in eval mode the second sees other inputs than in training.
    first = module[:2].eval()
    teacher = teacher_of(cs.models.wrap(first, outputs=3))
    seen = priors.Seen(*teacher.watched(x))
    for of in ("std", "variance"):
        prior = priors.BatchNormStatistics(1.0, of)
        assert float(prior.penalty(x, seen)) < 1e-12
        assert float(prior.penalty(x, priors.Seen(*teacher.watched(1.5 * x)))) > 0.01


def test_norms_of_residual_networks_and_of_exported_programs_are_seen():
    x = images(4, (3, 8, 8), dtype=torch.float32)
    deep = teacher_of(cs.models.resnet(18, outputs=5, norm="batch", width=2))
    assert len(deep.watched(x)[1]) == 20
    # The call of an exported program, whose export would take seconds.
    module = nn.BatchNorm2d(3, eps=0.01).eval()
    with _Norms() as norms:
        module(x)
        torch.ops.aten.batch_norm.default(
            x, None, None, module.running_mean, module.running_var, False, 0.1, 0.01, False
        )
        F.batch_norm(x, None, None, training=True)
    (mine, other) = norms.seen
    assert all(torch.equal(a, b) for a, b in zip(mine[:4], other[:4], strict=True))
    assert mine.eps == other.eps == 0.01


# The head.


def with_heads(norm=None):
    """Two tasks on one trunk: classes 1 and 3, and 0, 2 and 4."""
    model = cs.models.multi_head(cs.models.mlp(12, (8,)), outputs=5, norm=norm)
    params, buffers = model.init(key("trunk"))
    for name, classes in (("a", (1, 3)), ("b", (0, 2, 4))):
        params, buffers = model.grow(params, buffers, source(name, 6, classes, task=name), key(name))
    return model, params, buffers


def test_rows_are_those_of_the_head():
    plain = teacher_of(cs.models.lenet(4, 1, 12), classes=(2, 0))
    x = torch.zeros(1, 1, 12, 12)
    assert torch.allclose(plain.rows(x), plain.params["11.weight"][[2, 0]])

    x = torch.zeros(1, 12)
    model, params, buffers = with_heads()
    one = Teacher("e", model, params, buffers, (7, 8), outputs=(3, 1), task="a")
    assert torch.allclose(one.rows(x), params["heads.a.weight"].flip(0))
    every = Teacher("e", model, params, buffers, (0, 1, 2, 3, 4), outputs=(0, 1, 2, 3, 4))
    a, b = params["heads.a.weight"], params["heads.b.weight"]
    assert torch.allclose(every.rows(x), torch.stack([b[0], a[0], b[1], a[1], b[2]]))
    scaled = Teacher("e", *with_heads("inf"), (1, 3), outputs=(1, 3), task="a").rows(x)
    assert torch.allclose(scaled.abs().amax(1), torch.ones(2))


def test_a_head_that_is_none_is_refused_by_name():
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = teacher_of(cs.models.wrap(module, outputs=3), name="eve")
    with pytest.raises(cs.ConsilienceError, match="linear head.* of 'eve'"):
        Impression(steps=1).make(teacher, wanted_of({10: 1}, (1, 8, 8)), key(0))


# Inversion.


@pytest.fixture(scope="module")
def digits():
    """An expert of digits 0 to 3, in columns 10 to 13, with images [1, 8, 8]."""
    x, y = cs.data.digits(image=True).train.whole()
    x, y = x[y < 4], y[y < 4]
    params, buffers = small(outputs=4).init(key("digits"))
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    adam = torch.optim.Adam(leaves.values(), lr=0.01)
    forward, _ = small(outputs=4).bind(leaves, buffers, False)
    for _ in range(30):
        adam.zero_grad()
        F.cross_entropy(forward(x, None), y).backward()
        adam.step()
    params = {name: p.detach() for name, p in leaves.items()}
    teacher = Teacher("digits", small(outputs=4), params, buffers, (10, 11, 12, 13), (0, 1, 2, 3))
    assert (teacher(x).argmax(1) == y).float().mean() > 0.95
    return teacher, x, y


COUNTS = {10: 3, 13: 5, 11: 0, 12: 1}


def test_inversion_is_gradient_descent_on_the_inputs(digits):
    """Ten lines of torch, on the samples that it begins with."""
    teacher, _, _ = digits
    wanted = wanted_of(COUNTS, (1, 8, 8))
    maker = Inversion([priors.L2(0.01), priors.Blur(0.1)], steps=12, temperature=3.0, clip=1.5)
    made, y = maker.make(teacher, wanted, key(0))
    x = Inversion([], steps=1, lr=1e-30, clip=1.5).make(teacher, wanted, key(0))[0].requires_grad_()
    adam = torch.optim.Adam([x], lr=0.1)
    for _ in range(12):
        seen = priors.Seen(teacher(x))
        loss = F.cross_entropy(seen.logits / 3, y - 10) + priors.L2(0.01).penalty(x, seen)
        x.grad = torch.autograd.grad((loss + priors.Blur(0.1).penalty(x, seen)) * len(x), x)[0]
        adam.step()
        x.data.clamp_(-1.5, 1.5)
    assert torch.allclose(made, x, atol=1e-4)
    assert float(made.abs().max()) == 1.5


def test_each_class_reaches_its_probability_and_has_its_count(digits):
    teacher, _, _ = digits
    for maker in (Inversion(steps=60), Inversion(steps=60, priors=[priors.Augmented(), priors.Blur()])):
        x, y = maker.make(teacher, wanted_of(COUNTS, (1, 8, 8)), key(0))
        assert x.shape == (9, 1, 8, 8) and x.dtype == torch.float32 and not x.requires_grad
        assert {c: int((y == c).sum()) for c in COUNTS} == COUNTS
        p = teacher(x).softmax(1).gather(1, y[:, None] - 10)
        assert float(p.min()) > 0.99


def test_without_priors_images_are_blurred_and_tables_are_not(digits):
    teacher, _, _ = digits
    same = [
        Inversion(given, steps=3).make(teacher, wanted_of(COUNTS, (1, 8, 8)), key(0))[0]
        for given in (None, [priors.L2(), priors.Blur()], [priors.L2()])
    ]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    table = teacher_of(cs.models.mlp(6, (8,), 3))
    both = [
        Inversion(given, steps=3).make(table, wanted_of({10: 4}, (6,)), key(0))[0]
        for given in (None, [priors.L2()])
    ]
    assert torch.equal(*both)


def test_samples_stay_as_they_are_once_they_are_good_enough(digits):
    teacher, _, _ = digits
    wanted = wanted_of({10: 4, 12: 4}, (1, 8, 8))
    x, y = Inversion(until=0.9, lr=0.05, steps=150).make(teacher, wanted, key(0))
    p = teacher(x).softmax(1).gather(1, y[:, None] - 10)
    assert float(p.min()) >= 0.9
    # None went much further: without `until` nearly all are certain.
    longer = Inversion(lr=0.05, steps=150).make(teacher, wanted, key(0))[0]
    assert float(p.mean()) < float(teacher(longer).softmax(1).gather(1, y[:, None] - 10).mean())
    # Leaving the batch changes nothing for the others.
    alone = Inversion(until=0.9, lr=0.05, steps=150, batch=1).make(teacher, wanted, key(0))[0]
    assert torch.allclose(x, alone, atol=1e-3)


@pytest.mark.parametrize(
    "maker", [Inversion(steps=6), Impression(steps=6), Inversion([priors.Augmented()], 6)]
)
def test_equal_generators_give_equal_bits_whatever_was_drawn_elsewhere(digits, maker):
    teacher, _, _ = digits
    wanted, state = wanted_of(COUNTS, (1, 8, 8)), torch.get_rng_state()
    first = maker.make(teacher, wanted, key(0))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    again, other = maker.make(teacher, wanted, key(0)), maker.make(teacher, wanted, key(1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    # A generator that was used gives other samples.
    used = key(0)
    torch.rand(1, generator=used)
    assert not torch.equal(first[0], maker.make(teacher, wanted, used)[0])


@pytest.mark.parametrize("maker", [Inversion(), Impression(), Inversion([priors.Augmented()])])
def test_what_is_drawn_does_not_depend_on_the_batch(digits, maker):
    teacher, _, _ = digits
    wanted = wanted_of({10: 7, 11: 6}, (1, 8, 8))
    split = [replace(maker, steps=4, batch=size).make(teacher, wanted, key(0)) for size in (1, 5, 100)]
    for x, y in split[:2]:
        assert torch.allclose(x, split[2][0], atol=1e-4) and torch.equal(y, split[2][1])


def test_batches_have_all_classes(digits):
    """So that statistics of a batch are of all classes."""
    teacher, _, _ = digits
    _, y = Inversion(steps=1).make(teacher, wanted_of({10: 4, 11: 4, 12: 2}, (1, 8, 8)), key(0))
    assert y.tolist() == [10, 11, 12, 10, 11, 12, 10, 11, 10, 11]


def test_images_to_begin_with(digits):
    teacher, x, _ = digits
    maker = Inversion([], steps=1, lr=1e-30, start=x[:3])
    made, _ = maker.make(teacher, wanted_of({10: 20}, (1, 8, 8)), key(0))
    which = [[torch.allclose(one, image) for image in x[:3]] for one in made]
    assert all(sum(row) == 1 for row in which) and all(any(column) for column in zip(*which, strict=True))
    assert maker == Inversion([], steps=1, lr=1e-30, start=x[:3].clone())
    assert maker != Inversion([], steps=1, lr=1e-30, start=x[3:6])
    with pytest.raises(cs.ConsilienceError, match=r"\(1, 8, 8\), got \(64,\), of the expert 'digits'"):
        Inversion(start=torch.zeros(3, 64)).make(teacher, wanted_of({10: 1}, (1, 8, 8)), key(0))


def test_statistics_of_batch_norms_are_approached():
    module = normed()
    data = images(200, (1, 8, 8), dtype=torch.float32) * 0.3 + 0.5
    module.train()
    for _ in range(30):
        module(data)
    teacher = teacher_of(cs.models.wrap(module, outputs=4))
    wanted = wanted_of({10 + c: 12 for c in range(4)}, (1, 8, 8))
    prior = priors.BatchNormStatistics(10.0)
    made = [
        Inversion(given, steps=60, until=until).make(teacher, wanted, key(0))[0]
        for given, until in (([prior], None), ([], None))
    ]
    penalties = [float(prior.penalty(x, priors.Seen(*teacher.watched(x)))) for x in made]
    assert penalties[0] < 0.1 * penalties[1]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (cs.models.mlp(64, (16,), 3), (1, 8, 8)),
        (cs.models.conv(3, channels=3, size=8, width=4), (3, 8, 8)),
        (cs.models.resnet(20, outputs=3, norm="batch", width=4), (3, 8, 8)),
        (cs.models.resnet(18, outputs=3, norm="group", width=4), (3, 8, 8)),
        (cs.models.lenet(3, channels=1, size=12), (1, 12, 12)),
    ],
    ids=lambda value: str(value)[:10],
)
def test_experts_of_any_architecture(model, shape):
    teacher = teacher_of(model)
    wanted = wanted_of({10: 2, 11: 2, 12: 2}, shape)
    for kind in (Inversion, Impression):
        x, y = kind(steps=30).make(teacher, wanted, key(0))
        before = kind(steps=1, lr=1e-30).make(teacher, wanted, key(0))[0]
        gain = [teacher(z).log_softmax(1).gather(1, y[:, None] - 10).mean() for z in (before, x)]
        assert x.shape == (6, *shape) and y.bincount()[10:].tolist() == [2, 2, 2]
        assert gain[1] > gain[0] + 0.01


def test_experts_with_a_head_per_task():
    model, params, buffers = with_heads()
    teacher = Teacher("e", model, params, buffers, (21, 20), outputs=(3, 1), task="a")
    for kind in (Inversion, Impression):
        x, y = kind(steps=40).make(teacher, wanted_of({20: 3, 21: 4}, (12,)), key(0))
        assert y.bincount()[20:].tolist() == [3, 4]
        out = model(params, buffers, x, "a", False)[0]
        assert ((out[:, 3] > out[:, 1]) == (y == 21)).all()


def test_types_of_numbers(digits):
    teacher, _, _ = digits
    exact = replace(teacher, params={name: p.double() for name, p in teacher.params.items()})
    counts, shape = {10: 2, 12: 2}, (1, 8, 8)
    full = Inversion(steps=8).make(exact, wanted_of(counts, shape, torch.float64), key(0))[0]
    plain = Inversion(steps=8).make(teacher, wanted_of(counts, shape), key(0))[0]
    assert full.dtype == torch.float64 and torch.allclose(full, plain.double(), atol=1e-3)
    short = Inversion(steps=8, bf16=True).make(teacher, wanted_of(counts, shape, torch.bfloat16), key(0))[0]
    assert short.dtype == torch.bfloat16 and 0 < float((short.float() - plain).abs().max()) < 0.5
    student = Inversion([priors.Disagreement(), priors.L2()], steps=8, bf16=True)
    made, _ = student.make(teacher, wanted_of(counts, shape, student=teacher), key(0))
    assert made.dtype == torch.float32


def test_gradients_are_there_where_the_caller_wants_none(digits):
    teacher, _, _ = digits
    wanted = wanted_of(COUNTS, (1, 8, 8))
    with torch.no_grad():
        quiet = Inversion(steps=3).make(teacher, wanted, key(0))
    assert torch.equal(quiet[0], Inversion(steps=3).make(teacher, wanted, key(0))[0])


def test_samples_on_which_a_student_disagrees(digits):
    teacher, _, _ = digits
    student = replace(teacher, params={n: p.flip(0) for n, p in teacher.params.items()}, name="student")
    wanted = wanted_of({10: 6, 11: 6}, (1, 8, 8), student=student)
    made = [
        Inversion([priors.L2(), *more], steps=60).make(teacher, wanted, key(0))[0]
        for more in ([], [priors.Disagreement(5.0)])
    ]
    prior = priors.Disagreement(1.0)
    agreed = [float(prior.penalty(x, priors.Seen(teacher(x), (), student(x)))) for x in made]
    assert agreed[1] < agreed[0]


# Targets of data impression.


def test_parameters_of_targets_are_largest_for_the_class_itself():
    rows = torch.randn(5, 7, generator=key("rows"))
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).double()
    scaled = (cosines - cosines.amin(1, keepdim=True)) / (
        cosines.amax(1, keepdim=True) - cosines.amin(1, keepdim=True)
    )
    for beta in (0.1, 1.0, 10.0):
        alpha = Impression(beta=beta, floor=0.02).alpha(rows)
        assert torch.allclose(alpha, beta * scaled.clamp_min(0.02), atol=1e-6)
        shifted = Impression(beta=beta, scaling="shift").alpha(rows)
        assert torch.allclose(shifted, beta * (1 + cosines) / 2, atol=1e-6)
        for found in (alpha, shifted):
            assert (found.argmax(1) == torch.arange(5)).all() and (found > 0).all()


def test_two_classes_have_positive_parameters():
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    want = torch.tensor([[2.0, 0.02], [0.02, 2.0]], dtype=torch.float64)
    assert torch.allclose(Impression(beta=2.0).alpha(rows), want)
    want = torch.tensor([[2.0, 1.6], [1.6, 2.0]], dtype=torch.float64)
    assert torch.allclose(Impression(beta=2.0, scaling="shift").alpha(rows), want, atol=1e-6)


def test_targets_have_the_moments_of_their_distribution():
    alpha = torch.tensor([[3.0, 1.0, 0.5], [0.2, 0.4, 0.1]], dtype=torch.float64)
    classes = torch.tensor([0, 1]).repeat(20_000)
    drawn = dirichlet(alpha, classes, key("targets"))
    assert torch.allclose(drawn.sum(1), torch.ones(40_000, dtype=torch.float64))
    for c in range(2):
        total, mean = alpha[c].sum(), alpha[c] / alpha[c].sum()
        own = drawn[classes == c]
        assert torch.allclose(own.mean(0), mean, atol=0.01)
        assert torch.allclose(own.var(0), mean * (1 - mean) / (total + 1), atol=0.01)


def test_tiny_parameters_give_one_class():
    drawn = dirichlet(
        torch.full((1, 3), 1e-6, dtype=torch.float64), torch.zeros(300, dtype=torch.long), key(0)
    )
    assert drawn.isfinite().all() and (drawn.amax(1) > 0.999).all()
    assert drawn.argmax(1).bincount().tolist() == pytest.approx([100, 100, 100], abs=40)


def test_classes_of_impressions_are_those_of_their_targets(digits):
    teacher, _, _ = digits
    wanted = wanted_of({10: 40, 11: 40}, (1, 8, 8))
    maker = Impression(steps=60, scaling="shift", priors=[])
    x, y = maker.make(teacher, wanted, key(0))
    assert {c: int((y == c).sum()) for c in wanted.counts} == wanted.counts
    # The paper's: argmax of one draw, so that classes that nobody asked for come too.
    _, free = replace(maker, balanced=False).make(teacher, wanted, key(0))
    assert len(free) == 80 and set(free.tolist()) == {10, 11, 12, 13}
    # Samples come near their soft targets, and do not become certain.
    p = (teacher(x) / maker.temperature).softmax(1)
    assert float((p.argmax(1) == y - 10).float().mean()) > 0.9
    certain = Inversion(steps=60, priors=[]).make(teacher, wanted, key(0))[0]
    assert float(p.amax(1).mean()) < float((teacher(certain) / 2).softmax(1).amax(1).mean()) - 0.1


# A generator network.


def test_a_generator_makes_images_of_each_class(digits):
    teacher, _, _ = digits
    wanted = wanted_of({10: 10, 13: 7, 11: 3}, (1, 8, 8))
    maker = Generator(steps=60, adapt=15, batch=10, latent=8, width=4, clip=2.0, beta=None)
    x, y = maker.make(teacher, wanted, key(0))
    assert {c: int((y == c).sum()) for c in wanted.counts} == wanted.counts
    assert x.shape == (20, 1, 8, 8) and float(x.abs().max()) <= 2.0
    p = teacher(x).softmax(1).gather(1, y[:, None] - 10)
    # The second batch is as good, although it took a quarter of the steps: the network goes on.
    assert float(p.min()) > 0.9
    fresh = replace(maker, steps=15).make(teacher, wanted, key(0))[0]
    early = teacher(fresh).softmax(1).gather(1, y[:, None] - 10)
    assert float(early[:10].mean()) < float(p[10:].mean()) - 0.01
    # Images of one class differ.
    assert float(torch.pdist(x[y == 10].flatten(1)).min()) > 0.1


def test_soft_targets_make_images_of_a_generator_differ(digits):
    teacher, _, _ = digits
    wanted = wanted_of({10: 12, 12: 12}, (1, 8, 8))
    spread = []
    for beta in (1.0, None):
        x, y = Generator(steps=40, latent=8, width=4, beta=beta).make(teacher, wanted, key(0))
        assert y.bincount()[10:].tolist() == [12, 0, 12]
        spread.append(float(torch.pdist(teacher(x[y == 10]).softmax(1)).mean()))
    assert spread[0] > 5 * spread[1]


def test_a_generator_is_pure_and_takes_images_of_any_side():
    shape = (3, 9, 7)
    teacher = teacher_of(cs.models.mlp(189, (8,), 3), name="eve")
    wanted = wanted_of({10: 2, 11: 3}, shape)
    maker, state = Generator(steps=4, adapt=2, batch=3, width=3), torch.get_rng_state()
    x, y = maker.make(teacher, wanted, key(0))
    assert x.shape == (5, *shape) and y.tolist() == [10, 11, 10, 11, 11]
    assert torch.equal(x, maker.make(teacher, wanted, key(0))[0])
    assert not torch.equal(x, maker.make(teacher, wanted, key(1))[0])
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(cs.ConsilienceError, match="Generator needs images .* of the expert 'eve'"):
        maker.make(teacher, wanted_of({10: 2}, (189,)), key(0))


class Counting(nn.Module):
    """A linear layer that notes the sizes of its batches."""

    sizes: ClassVar[list[int]] = []

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x):
        Counting.sizes.append(len(x))
        return self.layer(x.flatten(1))


@pytest.mark.parametrize("kind", [Inversion, Impression, Generator])
def test_batches_bound_what_a_teacher_sees_at_once(kind):
    teacher = teacher_of(cs.models.wrap(Counting()))
    Counting.sizes.clear()
    maker = kind(steps=2, batch=4)
    x, _ = maker.make(teacher, wanted_of({10: 5, 11: 5}, (3, 2, 2)), key(0))
    assert len(x) == 10 and max(Counting.sizes) == 4 and Counting.sizes.count(3) >= 4


# Samples from statistics, and pieces of an image.


def test_samples_from_moments_have_them_and_the_experts_classes():
    mean, std = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 2.0, 0.0])
    teacher = teacher_of(cs.models.linear(3, 2), name="table")
    maker = cs.memory.moments(mean, std, pool=4)
    x, y = maker.make(teacher, wanted_of({10: 2000, 11: 2000}, (3,)), key(0))
    assert torch.equal(y, 10 + teacher(x).argmax(1)) and len(x) == 4000
    everything = replace(maker, pool=1).make(teacher, wanted_of({10: 2000, 11: 2000}, (3,)), key(0))[0]
    assert torch.allclose(everything.mean(0), mean, atol=0.1)
    assert torch.allclose(everything.std(0), std, atol=0.1)
    ranged = cs.memory.moments(mean, std, low=[0.9, -3.0, -1.0], high=[1.2, -1.0, 1.0])
    x, _ = ranged.make(teacher, wanted_of({10: 300}, (3,)), key(0))
    assert x.amin(0).tolist() == pytest.approx([0.9, -3.0, 0.0])
    assert x.amax(0).tolist() == pytest.approx([1.2, -1.0, 0.0])


def test_samples_from_moments_fill_the_classes_as_far_as_the_expert_gives_them():
    layer = nn.Linear(2, 2)
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    teacher = teacher_of(cs.models.wrap(layer))
    wanted = wanted_of({10: 50, 11: 50}, (2,))
    enough = cs.memory.moments([0.0, 0.0], [1.0, 1.0], pool=10).make(teacher, wanted, key(0))[1]
    assert enough.bincount()[10:].tolist() == [50, 50]
    few = cs.memory.moments([0.0, 0.0], [1.0, 1.0], pool=1).make(teacher, wanted, key(0))[1]
    assert len(few) == 100 and 5 < int((few == 10).sum()) < 30


def test_a_description_that_does_not_fit_is_refused():
    teacher = teacher_of(cs.models.linear(3, 2), name="table")
    two = torch.zeros(2)
    for make, message in [
        (lambda: Moments(None, two), "`mean` must be finite numbers"),
        (lambda: Moments(two, torch.ones(3)), r"`std` must have the shape of `mean`, \(2,\), got \(3,\)"),
        (lambda: Moments(two, -torch.ones(2)), "`std` must be >= 0, got -1.0"),
        (lambda: Moments(two, two, torch.ones(2), two), "`low` must be <= `high`"),
        (lambda: Moments(two, two).make(teacher, wanted_of({10: 1}, (2,)), key(0)), "the expert 'table'"),
    ]:
        with pytest.raises(cs.ConsilienceError, match=message):
            make()
    assert Moments(two, two) != Moments(two, torch.ones(2))


def test_strokes_are_thin_dark_and_of_the_seed():
    """Of 5/7 of the height, in the middle; the first pictures do not depend on how many are drawn."""
    x = cs.memory.strokes(300, (28, 20), seed=3)
    assert x.shape == (300, 1, 28, 20) and float(x.min()) == 0 and float(x.max()) == 1
    assert 0.05 < float(x.mean()) < 0.3
    rows = (x > 0.5).any(3).any(1)
    high = 27 - rows.flip(1).int().argmax(1) - rows.int().argmax(1) + 1
    # The longer side, where it is the height, with a pen's breadth and less than a point's distance.
    assert 20 <= int(high.max()) <= 20 + 4
    assert torch.equal(x[:7], cs.memory.strokes(7, (28, 20), seed=3))
    assert not torch.equal(x[:7], cs.memory.strokes(7, (28, 20), seed=4))
    with pytest.raises(cs.ConsilienceError, match="`count` must be a whole number"):
        cs.memory.strokes(0, (28, 28))


def test_pieces_of_an_image_are_windows_of_it():
    """Coordinates as colours: a piece of a linear picture says where it was cut."""
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    image = torch.stack([rows, columns])
    found = cs.memory.pieces(image, 50, (8, 12), seed=3, scale=(0.2, 0.9), angle=0.0, flip=False)
    down, across = found.diff(dim=2), found.diff(dim=3)
    step = down[:, 0, 3, 3]
    assert torch.allclose(across[:, 1, 3, 3], step, atol=1e-3)
    assert float(across[:, 0].abs().max()) < 1e-3 and float(down[:, 1].abs().max()) < 1e-3
    # The largest piece that fits has 40 rows: 5 pixels a step.
    scales = step / 5
    assert 0.2 <= float(scales.min()) < 0.3 and 0.8 < float(scales.max()) <= 0.9 + 1e-3
    assert float(found[:, 0].min()) >= 0 and float(found[:, 1].max()) <= 59
    # With turns and mirrors, which keep angles and sizes.
    turned = cs.memory.pieces(image, 50, (8, 12), seed=3, scale=(0.2, 0.5), angle=90.0)
    lengths = [turned.diff(dim=dim)[:, :, 3, 3].norm(dim=1) for dim in (2, 3)]
    assert torch.allclose(lengths[0], lengths[1], atol=1e-3)
    assert 10 < int((turned.diff(dim=3)[:, 1, 3, 3] < 0).sum()) < 40
    assert torch.equal(turned, cs.memory.pieces(image, 50, (8, 12), seed=3, scale=(0.2, 0.5), angle=90.0))
    for bad, message in [
        (lambda: cs.memory.pieces(image[0], 3, (8, 8)), "`image` must be one image"),
        (lambda: cs.memory.pieces(image, 0, (8, 8)), "`count` must be a whole number"),
        (lambda: cs.memory.pieces(image, 3, (8, 8), scale=(0.5, 0.1)), "`scale` must be"),
    ]:
        with pytest.raises(cs.ConsilienceError, match=message):
            bad()


# In a run.


@pytest.mark.parametrize("maker", [cs.memory.inversion(steps=5), cs.memory.impression(steps=5)])
def test_an_ex_model_is_distilled_on_what_makers_make(maker):
    method = cs.methods.exmodel_distillation(maker, size=24, steps=5)
    schedule = cs.settings.exmodel(testing.sources(), "class")
    results = [testing.quiet(schedule, method, testing.plain_model()) for _ in range(2)]
    assert (results[0].matrix == results[1].matrix).all()


def test_a_schedule_that_a_maker_cannot_serve_is_refused_before_training():
    schedule = cs.settings.exmodel(testing.sources(), "class")
    for maker, message in [
        (cs.memory.inversion([priors.Blur()]), "Blur needs images"),
        (cs.memory.inversion(start=torch.zeros(2, 99)), "`start` must have samples"),
        (cs.memory.generator(), "Generator needs images"),
        (cs.memory.moments(torch.zeros(99), torch.ones(99)), "the description is of samples"),
    ]:
        method = cs.methods.exmodel_distillation(maker, size=24, steps=5)
        with pytest.raises(cs.Refusal, match=message):
            cs.run(schedule, method, testing.plain_model())


# What is refused.


class Cut(nn.Module):
    """Answers whose gradients end at a constant."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer = how, nn.Linear(6, 3)

    def forward(self, x):
        if self.how == "round":
            x = x.detach()
        out = self.layer(x)
        return out * torch.nan if self.how == "nan" else out


def test_experts_without_gradients_are_refused_by_name():
    for trains in (False, True):
        teacher = teacher_of(cs.models.wrap(Cut("round")), name="cut")
        teacher = replace(teacher, params={n: p.requires_grad_(trains) for n, p in teacher.params.items()})
        for maker in (Inversion(), Impression()):
            with pytest.raises(
                cs.ConsilienceError, match="needs gradients .* 'cut' gives none; use memory.aux"
            ):
                maker.make(teacher, wanted_of({10: 1}, (6,)), key(0))


def test_what_does_not_fit_is_refused_by_name():
    teacher = teacher_of(cs.models.mlp(6, (8,), 3), name="eve")
    broken = teacher_of(cs.models.wrap(Cut("nan")), name="nan")
    two = {10: 2}
    batch_norm, disagreement = [priors.BatchNormStatistics()], [priors.Disagreement()]
    cases = [
        (
            teacher,
            None,
            wanted_of(two, None),
            "one tensor and one shape .*, got several, of .* 'eve'",
        ),
        (
            teacher,
            None,
            wanted_of(two, (6,), torch.int64),
            "real numbers .*, got torch.int64, of .* 'eve'",
        ),
        (teacher, None, wanted_of(two, (7,)), r"samples \(7,\) must fit the expert 'eve'"),
        (teacher, None, wanted_of({3: 1}, (6,)), r"classes of the expert 'eve', \[10, 11, 12\], got 3"),
        (teacher, None, wanted_of({10: -1, 11: 4}, (6,)), "must be >= 0, got -1 of class 10"),
        (teacher, None, wanted_of({10: 0}, (6,)), "at least one sample of the expert 'eve'"),
        (teacher, [priors.Blur()], wanted_of(two, (6,)), "Blur needs images .*, of the expert 'eve'"),
        (teacher, [priors.Augmented()], wanted_of(two, (6,)), "Augmented needs images"),
        (teacher, batch_norm, wanted_of(two, (6,)), "batch norms .* the expert 'eve' has none"),
        (teacher, disagreement, wanted_of(two, (6,)), "needs a student to compare the expert 'eve' with"),
        (broken, None, wanted_of(two, (6,)), "must be finite, got NaN or infinity of 'nan'"),
    ]
    for expert, given, wanted, message in cases:
        with pytest.raises(cs.ConsilienceError, match=message):
            Inversion(given, steps=1).make(expert, wanted, key(0))
    tokens = teacher_of(cs.models.wrap(nn.Conv1d(2, 3, 1), outputs=3), name="tagger")
    with pytest.raises(
        cs.ConsilienceError, match="one answer per sample, got outputs .* of the expert 'tagger'"
    ):
        Inversion(steps=1).make(tokens, wanted_of(two, (2, 5)), key(0))
    one = Teacher("one", teacher.model, teacher.params, teacher.buffers, (4,), (0,))
    with pytest.raises(cs.ConsilienceError, match="the expert 'one' has one class; use memory.inversion"):
        Impression(steps=1).make(one, wanted_of({4: 1}, (6,)), key(0))


def test_samples_that_diverge_are_refused_by_name():
    teacher = teacher_of(cs.models.mlp(6, (8,), 3), name="eve")

    class Broken(priors.Prior):
        def penalty(self, x, seen):
            return (x * 0).sum() / 0

    with pytest.raises(cs.ConsilienceError, match="samples of the expert 'eve' must be finite"):
        Inversion([Broken()], steps=2).make(teacher, wanted_of({10: 1}, (6,)), key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Inversion(steps=0), "`steps` must be a whole number >= 1"),
        (lambda: Inversion(batch=0), "`batch` must be a whole number >= 1"),
        (lambda: Inversion(lr=0.0), "`lr` must be positive"),
        (lambda: Inversion(until=1.0), r"`until` must be in \(0, 1\) or None, got 1.0"),
        (lambda: Inversion(priors.L2()), "`priors` must be a list of those of memory.priors"),
        (lambda: Inversion(["l2"]), "`priors` must be a list of those of memory.priors"),
        (lambda: Inversion(start=torch.zeros(0, 3)), "`start` must be samples"),
        (lambda: Inversion(start=torch.tensor([[torch.nan]])), "`start` must be finite"),
        (lambda: Impression(beta=0.0), "`beta` must be positive"),
        (lambda: Impression(floor=1.0), r"`floor` must be in \(0, 1\)"),
        (lambda: Impression(scaling="none"), "`scaling` must be 'minmax' or 'shift'"),
        (lambda: cs.memory.priors.l2(0.0), "`strength` of L2 must be positive and finite, got 0.0"),
        (lambda: cs.memory.priors.batch_norm(of="mean"), "`of` must be 'std' or 'variance'"),
        (lambda: cs.memory.priors.total_variation(power=3), "`power` must be 1 or 2"),
        (lambda: cs.memory.priors.augmented(shift=2.0), r"`shift` must be in \[0, 1\]"),
        (lambda: cs.memory.priors.augmented(0.0, 0.0), "must change something"),
        (lambda: cs.memory.inversion(step=3), "`inversion` has no argument `step`; nearest: steps"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(cs.ConsilienceError, match=message):
        make()


def test_the_catalogue_has_the_defaults_of_the_classes():
    assert cs.memory.inversion() == Inversion() and cs.memory.impression() == Impression()
    some = [cs.memory.priors.l2(), cs.memory.priors.blur(), cs.memory.priors.disagreement()]
    some += [cs.memory.priors.total_variation(), cs.memory.priors.batch_norm(), cs.memory.priors.augmented()]
    assert some == [
        priors.L2(),
        priors.Blur(),
        priors.Disagreement(),
        priors.TotalVariation(),
        priors.BatchNormStatistics(),
        priors.Augmented(),
    ]
    assert cs.memory.generator() == Generator()
    network = cs.memory.generator(some, 9, 8, None, 0.2, 4.0, 2.0, 5, 6, 7, True)
    assert network == Generator(some, 9, 0.2, 4.0, 2.0, 7, True, 8, None, 5, 6)
    made = cs.memory.inversion(some, 3, 0.2, 4.0, 2.0, torch.ones(1, 2), 0.9, 7, True)
    assert made == Inversion(some, 3, 0.2, 4.0, 2.0, 7, True, torch.ones(1, 2), until=0.9)
    shown = cs.memory.impression(0.5, some, 3, 0.2, 4.0, 2.0, torch.ones(1, 2), "shift", 0.1, False, 7, True)
    assert (shown.beta, shown.floor, shown.scaling, shown.balanced) == (0.5, 0.1, "shift", False)
    assert (shown.batch, shown.bf16, shown.clip, len(shown.content)) == (7, True, 2.0, 32)
