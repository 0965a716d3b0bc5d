"""Augmentations: what is drawn depends on a key alone, training and rehearsal see it, nothing else does."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import consilience as cs
from consilience.core.augment import Mixed, as_views, isolated, normal, sample_seeds, uniform
from consilience.core.params import key
from consilience.core.source import Source, Stream
from consilience.core.tree import Tree
from consilience.loop.step import Step
from restate import A, B, D, entries, fit, mlp, near, plain, stopped, training

aug, m = cs.data.augment, cs.methods
SHIFT = 1000.0


def moved(x: Tensor) -> Tensor:
    """Draws from all three global states."""
    return x + torch.rand(()) + random.random() + float(np.random.rand())


def keyed(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.rand((), generator=generator, dtype=torch.float64).to(x)


def shifted(x: Tensor) -> Tensor:
    """Marks a view: samples themselves are far below."""
    return x + SHIFT + torch.rand(())


class Noisy(Dataset):
    """A dataset with a random transform inside it."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return moved(self.x[i]), int(self.y[i])


class Still(Noisy):
    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], int(self.y[i])


@pytest.fixture
def seen(monkeypatch):
    """What every step of the serial engine sees: (clock, parts)."""
    steps: list = []
    plain_call = Step.__call__

    def spy(self, parts, clock, generator):
        steps.append((clock, parts))
        return plain_call(self, parts, clock, generator)

    monkeypatch.setattr(Step, "__call__", spy)
    return steps


def data(name: str = "d", n: int = 60, augment=None, classes: int = 3, **options) -> Source:
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    x, y = torch.randn(n, D, generator=g), torch.arange(n) % classes
    return cs.data.arrays(x, y, name=name, augment=augment, **options)


def net(outputs: int = 3, inputs: int = D) -> nn.Module:
    with isolated():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 5), nn.ReLU(), nn.Linear(5, outputs))


def run(source, method=None, **options):
    given = {"epochs": 2, "batch_size": 8, **options.pop("train", {})}
    schedule = source if isinstance(source, cs.core.schedule.Schedule) else cs.settings.continual([source])
    return cs.run(
        schedule, method or m.finetune(), net(len(schedule.frame.labels)), cs.Training(**given), **options
    )


def equal(a, b) -> bool:
    return all(torch.equal(p, b.params[n]) for n, p in a.params.items())


# The numbers.


def mixed(z: int) -> int:
    """SplitMix64 in whole numbers of Python."""
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
    return z ^ z >> 31


def test_seeds_are_splitmix64():
    g = torch.Generator().manual_seed(2**62 + 5)
    golden = 0x9E3779B97F4A7C15
    for index, turn in ((0, 0), (1, 0), (10**9, 3)):
        z = mixed((index * golden + 2**62 + 5) % 2**64)
        want = mixed((z + turn * golden) % 2**64) % 2**63
        assert int(sample_seeds(g, torch.tensor([index]), torch.tensor([turn]))) == want
    want = [(mixed((9 + (i + 1) * golden) % 2**64) >> 40) / 2**24 for i in range(5)]
    assert uniform(torch.tensor([9]), 5)[0].tolist() == want


def test_numbers_are_spread():
    seeds = sample_seeds(key(0, "d"), torch.arange(20_000))
    assert len(seeds.unique()) == 20_000
    u = uniform(seeds, 3)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert (u.mean(0) - 0.5).abs().max() < 0.01 and (u.std(0) - 12**-0.5).abs().max() < 0.01
    z = normal(seeds, 5)
    assert z.shape == (20_000, 5) and z.mean(0).abs().max() < 0.03 and (z.std(0) - 1).abs().max() < 0.03
    assert torch.corrcoef(z.T).triu(1).abs().max() < 0.03
    assert torch.isfinite(z).all()


def test_flip_crop_and_noise_by_hand():
    seeds = sample_seeds(key(1), torch.arange(200))
    x = torch.rand(200, 2, 4, 5)
    y = torch.zeros(200)
    flipped = aug.flip()(x, y, seeds)[0]
    chosen = uniform(seeds, 1)[:, 0] < 0.5
    assert 70 < int(chosen.sum()) < 130
    for i in range(200):
        assert torch.equal(flipped[i], x[i].flip(-1) if chosen[i] else x[i])

    cropped, places = aug.crop(2)(x, y, seeds)[0], (uniform(seeds, 2) * 5).long()
    assert {tuple(p) for p in places.tolist()} == {(r, c) for r in range(5) for c in range(5)}
    for i, (row, column) in enumerate(places.tolist()):
        assert torch.equal(cropped[i], F.pad(x[i], [2] * 4)[:, row : row + 4, column : column + 5])

    assert torch.equal(aug.noise(0.5)(x, y, seeds)[0], x + normal(seeds, 40).view_as(x) * 0.5)
    # A view does not depend on the batch.
    for views in (aug.flip(), aug.crop(2), aug.noise(), as_views(moved), as_views([aug.crop(1), moved])):
        together = views(x, y, seeds)[0]
        apart = [views(x[i : i + 7], y[i : i + 7], seeds[i : i + 7])[0] for i in range(0, 200, 7)]
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("function", [moved, keyed])
def test_training_with_views_restated(function):
    """The plain loop in torch, with numbers that are seeded by hand."""
    r = cs.run(
        cs.settings.continual([A.map(augment=function)], "domain"), m.finetune(), mlp(), training(epochs=3)
    )
    golden, turn = 0x9E3779B97F4A7C15, 0

    def loss(net, x, y, epoch, step):
        views = []
        base = key(0, "a", 0, epoch, "augment").initial_seed()
        for sample in x:
            (index,) = (A.train.x == sample).all(1).nonzero()[:, 0].tolist()
            seed = mixed((mixed((index * golden + base) % 2**64) + turn * golden) % 2**64) % 2**63
            if function is keyed:
                views.append(keyed(sample, torch.Generator().manual_seed(seed)))
                continue
            torch.manual_seed(seed), random.seed(seed), np.random.seed(seed % 2**32)
            views.append(moved(sample))
        return F.cross_entropy(net(torch.stack(views)), y)

    with isolated():
        net = fit(plain(), A, loss, epochs=3)
    near(r.params, entries(net))


def test_a_list_draws_other_numbers_in_each_step():
    seeds, x, y = torch.arange(50), torch.zeros(50, 3), torch.zeros(50)
    once, twice = as_views(moved)(x, y, seeds)[0], as_views([moved, moved])(x, y, seeds)[0]
    assert not torch.allclose(twice, 2 * once)


def test_random_states_stay_as_they_were():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    want = (float(torch.rand(())), random.random(), float(np.random.rand()))
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    run(data(augment=moved))
    assert (float(torch.rand(())), random.random(), float(np.random.rand())) == want


# What decides what is drawn.


def test_views_differ_between_epochs_visits_seeds_and_samples(seen):
    s = data(augment=shifted, n=30)
    run(cs.settings.continual([s]), train={"epochs": 2})
    run(cs.settings.continual([s]), train={"epochs": 1}, seed=1)
    run(cs.settings.federated([s], rounds=2), train={"epochs": 1})
    draws: dict = defaultdict(list)
    for _, (part,) in seen:
        for x in part.x:
            gap = x[None] - s.train.x
            i = int(gap.std(1).argmin())
            draws[i].append(round(float(gap[i].mean()) - SHIFT, 4))
    assert sorted(draws) == list(range(len(s.train)))
    for values in draws.values():
        assert len(values) == 5
        # The first round of clients is the first epoch of the same seed and source: the agent is in no key.
        first, second, other_seed, round_0, round_1 = values
        assert first == round_0
        assert len({first, second, other_seed, round_1}) == 4
    assert len({values[0] for values in draws.values()}) > 0.9 * len(draws)


def test_a_sample_that_comes_twice_in_an_epoch_has_two_views(seen):
    s = data(augment=shifted, n=40, classes=2)
    few = s.select(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8]))
    # The shorter part of a step starts over.
    run(
        cs.settings.multitask([data("long", 40), few.map(name="short")]), train={"epochs": 1, "batch_size": 4}
    )
    views = torch.cat([parts[1].x for _, parts in seen])
    assert len(views) > 2 * len(few.train)
    gaps = views[:, None] - few.train.x[None]
    nearest = gaps.std(2).argmin(1)
    drawn = [round(float(gaps[i, n].mean()), 4) for i, n in enumerate(nearest)]
    assert len(set(drawn)) == len(drawn)


def test_batch_size_does_not_matter(seen):
    s = data(augment=shifted, n=40)
    run(s, train={"epochs": 1, "batch_size": 8})
    run(s, train={"epochs": 1, "batch_size": 5})
    eight, five = [], []
    for _, (part,) in seen:
        (eight if len(eight) < len(s.train) else five).extend(map(tuple, part.x.tolist()))
    assert sorted(eight) == sorted(five)


def test_clients_differ_and_names_of_agents_do_not_matter():
    x = torch.zeros(20, 4)
    seeds = [sample_seeds(key(0, name, 0, 0, "augment"), torch.arange(20)) for name in ("a", "b")]
    a, b = (as_views(moved)(x, torch.zeros(20), own)[0] for own in seeds)
    assert not torch.isclose(a, b).any()


@pytest.mark.parametrize("augment", [moved, keyed, [aug.noise(0.2), moved]])
def test_engines_agree(augment):
    def schedule(augment):
        clients = cs.data.iid(data(n=120, classes=4, augment=augment), 3)
        return cs.settings.federated_continual([cs.data.split_classes(own, 2) for own in clients], rounds=2)

    method = m.er(size=20, batch_size=4) + m.fedavg()
    serial, batched = (
        run(schedule(augment), method, train={"batch_size": 7, "momentum": 0.9}, engine=engine)
        for engine in ("serial", "batched")
    )
    gap = max(float((p - batched.params[n]).abs().max()) for n, p in serial.params.items())
    assert gap < 1e-5 and not equal(serial, run(schedule(None), method))


def test_stacks_see_views():
    """Clients without rehearsal are stacked, and gather their samples step by step."""
    notes: list = []
    clients = cs.data.iid(data(n=120, augment=moved), 3)
    schedule = cs.settings.federated(clients, rounds=3)
    results = [
        run(schedule, m.fedavg(), engine=engine, progress=notes.append) for engine in ("serial", "batched")
    ]
    gap = max(float((p - results[1].params[n]).abs().max()) for n, p in results[0].params.items())
    assert gap < 1e-5 and any("batched: 3 agents a step" in str(note) for note in notes)
    bare = cs.settings.federated([client.map(augment=None) for client in clients], rounds=3)
    assert not equal(results[0], run(bare, m.fedavg()))


@pytest.mark.parametrize("method", [m.finetune(), m.er(size=12, batch_size=4), m.gdumb(size=12)])
def test_a_resumed_run_is_bit_equal(method, tmp_path):
    sources = [A.map(augment=moved), B.map(augment=[keyed, moved])]

    def go(**more):
        return cs.run(cs.settings.continual(sources, "domain"), method, mlp(), training(), **more)

    stopped(go, tmp_path, at=3)
    assert equal(go(), go(out=tmp_path, resume=True))


def test_another_augmentation_is_not_resumed(tmp_path):
    def go(augment, **more):
        s = A.map(augment=augment)
        return cs.run(cs.settings.continual([s], "domain"), m.finetune(), mlp(), training(), **more)

    stopped(lambda **more: go(aug.noise(0.1), **more), tmp_path, at=2)
    with pytest.raises(cs.ConsilienceError, match="augment"):
        go(aug.noise(0.2), out=tmp_path, resume=True)
    go(aug.noise(0.1), out=tmp_path, resume=True)


# What sees views, and what does not.


def test_only_training_sees_views(seen):
    s = data(augment=shifted)
    before = [part.whole()[0].clone() for part in (s.train, s.validation, s.test)]
    r = run(s)
    assert all(float(part.x.min()) > SHIFT / 2 for _, (part,) in seen)
    for part, x in zip((s.train, s.validation, s.test), before, strict=True):
        assert torch.equal(part.whole()[0], x) and float(x.max()) < SHIFT / 2
    # The test is judged as it is.
    x, y = s.test.whole()
    assert r.matrix[-1, 0] == (r.predict(x).argmax(1) == y).float().mean()


@pytest.mark.parametrize(
    "method",
    [
        m.er(size=20, batch_size=8),
        m.er_ace(size=20, batch_size=8),
        m.der(size=20, batch_size=8),
        m.derpp(size=20, batch_size=8),
        m.gss(size=20, batch_size=8),
        m.agem(size=20, batch_size=8),
        m.gem(size=20),
        m.icarl(size=20),
        m.gdumb(size=20),
        m.cumulative(),
    ],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("scenario", ["class", "task"])
def test_buffers_keep_samples_and_replay_views(method, scenario, seen):
    tasks = cs.data.split_classes(data(n=80, classes=4, augment=shifted), 2)
    r = cs.run(
        cs.settings.continual(tasks, scenario),
        method,
        net(4),
        cs.Training(epochs=2, batch_size=8),
    )
    raw = torch.cat([task.train.x for task in tasks])
    replayed = []
    for _, parts in seen:
        for part in parts:
            assert float(part.x.min()) > SHIFT / 2
            if part.drawn_by:
                replayed.append(part.x)
    for held in r.agent.state.memory.values():
        for item in held.values():
            if "x" in item.tensors:
                assert all(bool((raw == x).all(1).any()) for x in item.tensors["x"])

    # A sample that comes again, in this step or in another, is seen otherwise.
    drawn: dict = defaultdict(list)
    for x in replayed:
        gaps = x[:, None] - raw[None]
        for i, n in enumerate(gaps.std(2).argmin(1).tolist()):
            drawn[n].append(float(gaps[i, n].mean()))
    assert all(len(set(values)) == len(values) for values in drawn.values())
    pools = "icarl", "gdumb", "cumulative"
    assert bool(replayed) != (method.name in pools)
    assert method.name in pools or max(map(len, drawn.values())) > 2


@pytest.mark.parametrize("method", [m.er(size=30), m.er_ace(size=30), m.gdumb(size=30), m.cumulative()])
def test_every_sample_has_the_augmentation_of_its_own_source(method, seen):
    """Three sources in one buffer: moved far up, far down, and not at all."""
    a, b, c, d = (data(name, 40) for name in "abcd")
    sources = [a.map(augment=shifted), b.map(augment=lambda x: x - SHIFT), c, d]
    cs.run(cs.settings.continual(sources, "domain"), method, net(), cs.Training(batch_size=8, lr=1e-9))
    signs = {0: (a, 1), 1: (b, -1), 2: (c, 0)}
    counts: dict = defaultdict(int)
    for _, parts in seen:
        for part in parts:
            assert part.origins is None
            for x in part.x:
                sign = 0 if x.abs().max() < SHIFT / 2 else int(x.mean().sign())
                found = [
                    n for n, (s, _) in signs.items() if ((x - sign * SHIFT - s.train.x).std(1) < 1e-3).any()
                ]
                if found:
                    assert signs[found[0]][1] == sign
                    counts[found[0], bool(part.drawn_by)] += 1
    assert {n for n, _ in counts} == {0, 1, 2}
    if method.name in ("er", "er_ace"):
        assert {n for n, drawn in counts if drawn} == {0, 1, 2}


def test_generated_samples_are_not_augmented(seen):
    tasks = cs.data.split_classes(data(n=60, classes=2, augment=shifted), 2)
    cs.run(
        cs.settings.continual(tasks),
        m.generative_replay(epochs=1, hidden=8, latent=2),
        net(2),
        cs.Training(epochs=1, batch_size=8),
    )
    generated = [part.x for _, parts in seen for part in parts if part.drawn_by]
    assert generated and all(float(x.max()) < SHIFT / 2 for x in generated)


def test_mixed_views_by_hand():
    x, y = torch.zeros(6, 2), torch.arange(6)
    up, both = as_views(lambda x: x + 1), aug.joint(lambda x, y: (x - 1, y + 10))
    views = Mixed([up, None, both, up], torch.tensor([0, 1, 2, 3, 2, 0]))
    new_x, new_y = views(x, y, torch.arange(6))
    assert new_x[:, 0].tolist() == [1, 0, -1, 1, -1, 1]
    assert new_y.tolist() == [0, 1, 12, 3, 14, 5] and y.tolist() == list(range(6))
    assert views.of(torch.tensor([2, 1]))(x[:2], y[:2], torch.arange(2))[0][:, 0].tolist() == [-1, 0]


def test_without_an_augmentation_nothing_changes(seen):
    s = data()
    r = run(s)
    identical = run(s.map(augment=lambda x: x))
    assert equal(r, identical)
    stream = cs.data.stream(Still(s.train.x, s.train.y), name="d")
    augmented = run(stream.map(augment=lambda x: x))
    assert equal(run(stream), augmented)


# Streams: the case learn/stream_augment.py, and what is near to it.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_random_dataset_is_seeded_by_epoch_and_sample(workers, seen):
    x, y = cs.data.digits().train.whole()
    s = cs.data.stream(Noisy(x[:120], y[:120]), workers=workers, validation=0)
    plan, base = [torch.arange(4)], x[s.train.index[:4]]
    passes = [next(iter(s.train.batches(plan)))[0] - base for _ in range(2)]
    # Outside of training a sample is the same each time, and samples differ.
    assert torch.equal(*passes) and len(set(passes[0][:, 0].tolist())) == 4
    assert torch.equal(next(s.test.chunks(40))[0], next(s.test.chunks(40))[0])

    results = [
        cs.run(cs.settings.continual([s]), m.finetune(), net(10, 64), cs.Training(epochs=2, batch_size=16))
        for _ in range(2)
    ]
    assert equal(*results)
    draws: dict = defaultdict(list)
    own = x[s.train.index]
    for _, (part,) in seen[: len(seen) // 2]:
        gaps = part.x[:, None] - own[None]
        for i, n in enumerate(gaps.std(2).argmin(1).tolist()):
            draws[n].append(round(float(gaps[i, n].mean()), 4))
    assert len(draws) == len(own) and all(len(set(two)) == 2 for two in draws.values())


@pytest.mark.parametrize("dataset", [Noisy, Still])
@pytest.mark.parametrize(
    "augment", [None, moved, [aug.noise(0.1), keyed], aug.joint(lambda x, y: (x + 1, y))]
)
def test_workers_change_no_bit(dataset, augment):
    s = data(n=60)
    results = []
    for workers in (0, 2):
        stream = cs.data.stream(dataset(s.train.x, s.train.y), workers=workers, name="w", augment=augment)
        tasks = cs.data.split_classes(stream.map(x=lambda x: x * 2), 2)
        results.append(run(cs.settings.continual(tasks), m.er(size=10)))
    assert equal(*results)


def test_a_stream_sees_the_views_of_tensors():
    s = data(n=50)
    tensors = cs.data.arrays(s.train.x, s.train.y, name="d", augment=[moved, aug.noise()])
    stream = cs.data.stream(Still(s.train.x, s.train.y), name="d", augment=[moved, aug.noise()], workers=1)
    assert isinstance(stream.train, Stream)
    both = [one.map(x=lambda x: x + 1) for one in (tensors, stream)]
    assert equal(run(both[0]), run(both[1]))


def test_a_stream_that_draws_late_is_seeded_from_the_start():
    class Late(Noisy):
        def __getitem__(self, i):
            return (moved(self.x[i]) if i % 7 == 6 else self.x[i]), int(self.y[i])

    s = data(n=60)
    stream = cs.data.stream(Late(s.train.x, s.train.y), validation=0)
    plan = list(torch.arange(len(stream.train)).split(3))
    a, b = ([x for x, _ in stream.train.batches(plan)] for _ in range(2))
    assert all(torch.equal(x, z) for x, z in zip(a, b, strict=True))
    backwards = [x for x, _ in stream.train.batches(plan[::-1])]
    assert all(torch.equal(x, z) for x, z in zip(a, backwards[::-1], strict=True))


# Trees, targets with places, and what users give.


def test_parts_of_trees_are_changed_alone_and_alike():
    x = {"image": torch.rand(30, 1, 4, 4), "depth": torch.rand(30, 1, 4, 4), "n": torch.arange(30)[:, None]}
    s = cs.data.arrays(
        x, torch.arange(30) % 2, augment={"image": [aug.crop(1), shifted], "depth": aug.crop(1)}
    )
    raw = s.train.x
    views, _ = s.augment(raw, s.train.y, torch.arange(len(raw)))
    places = (uniform(torch.arange(len(raw)), 2) * 3).long().tolist()
    for i, (row, column) in enumerate(places):
        window = [
            F.pad(raw.parts[p][i], [1] * 4)[:, row : row + 4, column : column + 4] for p in ("image", "depth")
        ]
        assert torch.equal(views.parts["depth"][i], window[1])
        gap = views.parts["image"][i] - window[0]
        assert float(gap.min()) > SHIFT / 2 and float(gap.std()) < 1e-3
    assert torch.equal(views.parts["n"], raw.parts["n"])


def test_a_function_of_a_tree_gets_one_sample_without_padding():
    sizes = []

    def masked(sample: Tree) -> dict[str, Tensor]:
        ids = sample.parts["ids"]
        sizes.append(len(ids))
        return {"ids": torch.where(torch.rand(len(ids)) < 0.5, 1, ids)}

    rows = [[5 + i] * (1 + i % 4) for i in range(40)]
    s = cs.data.arrays({"ids": rows}, torch.arange(40) % 2, augment=masked)
    x, y, seeds = s.train.x, s.train.y, torch.arange(len(s.train))
    views, _ = s.augment(x, y, seeds)
    assert sizes == x.lengths.tolist() and views.ragged == x.ragged
    short, _ = s.augment(x[:5].trim(), y[:5], seeds[:5])
    assert torch.equal(short.parts["ids"], views.parts["ids"][:5, : short.places])
    past = torch.arange(x.places) >= x.lengths[:, None]
    assert (views.parts["ids"][past] == 0).all() and (views.parts["ids"] == 1).any()


class Two(nn.Module):
    """A linear layer over two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 2)

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        return self.head(torch.cat([image, other], 1))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def pixels() -> cs.core.model.Model:
    with isolated():
        torch.manual_seed(0)
        return cs.models.wrap(Pixels(), outputs=2)


@pytest.mark.parametrize("batch", [False, True])
def test_images_and_masks_are_changed_together(batch, seen):
    """The mask is where the image is 1: the two fit in every view."""
    x = (torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    y = x[:, 0].long()

    def turned(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        quarter = int(torch.randint(4, (1,), generator=generator))
        x, y = x.rot90(quarter, (-2, -1)), y.rot90(quarter, (-2, -1)).clone()
        y[..., 0] = -100
        return x, y

    s = cs.data.arrays(x, y, augment=aug.joint(turned, batch=batch))
    schedule = cs.settings.continual([s])
    assert not schedule.frame.targets[schedule.sources[0].target].complete
    cs.run(schedule, m.finetune(), pixels(), cs.Training(epochs=2, batch_size=5))
    for _, (part,) in seen:
        there = part.y != -100
        assert torch.equal(part.x[:, 0].long()[there], part.y[there]) and not there[..., 0].any()
    assert any(not torch.equal(seen[0][1][0].x[0], x) for x in s.train.x)


def test_labels_can_be_mixed():
    """Mixup as a batch function of (x, y), where targets may be fractions."""

    def mixup(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        share, other = float(torch.rand((), generator=generator)), torch.randperm(len(x), generator=generator)
        return torch.lerp(x[other], x, share), torch.lerp(y[other], y, share)

    x, y = torch.randn(40, D), F.one_hot(torch.arange(40) % 3, 3)
    s = cs.data.arrays(x, y, kind="labels", augment=aug.joint(mixup, batch=True))
    assert run(s).matrix.shape == (2, 1)


def test_sources_keep_their_augmentation():
    s = data(n=90, classes=3, augment=moved)
    parts = [
        *cs.data.split_classes(s, 3),
        *cs.data.iid(s, 2),
        *cs.data.permute(s, 2),
        s.map(x=lambda x: x + 1),
        s.select(torch.arange(5)),
        Source.union("u", [s, s.map(name="e")]),
    ]
    assert all(part.augment is s.augment for part in parts)
    assert s.map(augment=None).augment is None
    with pytest.raises(cs.ConsilienceError, match="must share their augmentation"):
        Source.union("u", [s, s.map(augment=None)])


# What is refused.


def wrong_shape(x):
    return x[..., :-1]


def unseeded(x):
    return x + float(np.random.default_rng().random())


SHAPES = r"\(6,\) of torch.float32"

REFUSED = {
    "shape": (
        wrong_shape,
        rf"in 'd': an augmentation must keep the shape and type of a sample, {SHAPES}, "
        r"got \(5,\) of torch.float32 of wrong_shape\.",
    ),
    "type": (lambda x: x.double(), rf"{SHAPES}, got \(6,\) of torch.float64 of <lambda>"),
    "array": (lambda x: x.numpy(), "got a ndarray of <lambda>"),
    "none": (lambda x: None, "got None of <lambda>"),
    "nan": (lambda x: x / 0, "in 'd': an augmentation must be finite, got NaN or infinity of <lambda>"),
    "error": (lambda x: x[9], r"<lambda> fails on samples of 'd', \(6,\): IndexError: index 9 is out of"),
    "unseeded": (unseeded, "must be the same for the same random state, and unseeded of 'd' is not"),
    "batch": (aug.batch(lambda x: x[:1]), r"\(2, 6\) of torch.float32, got \(1, 6\)"),
    "alone": (aug.joint(lambda x, y: x), r"in 'd': a joint augmentation must return \(x, y\), got a Tensor"),
    "classes": (aug.joint(lambda x, y: (x, y + 7)), "must return class numbers of its source"),
    "target": (aug.joint(lambda x, y: (x, y[None])), "the shape and type of the target"),
    "part": ({"image": moved}, "in 'd': augmented inputs must have a part 'image', got one tensor"),
    "flat": (aug.flip(), r"in 'd': images to augment must be \[B, C, H, W\], got shape \(2, 6\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_work_is_refused_before_training(name, seen):
    augment, message = REFUSED[name]
    with pytest.raises(cs.ConsilienceError, match=message) as error:
        run(data(augment=augment))
    assert not seen and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [3, "flip", [moved, 3], {"image": None}, {"image": 3}, [], {}])
def test_what_is_no_function_is_refused_at_once(value):
    with pytest.raises(cs.ConsilienceError, match=r"in 'd': `augment` must"):
        data(augment=value)


def test_parts_that_trees_lack_are_refused():
    x = {"image": torch.rand(20, 3), "other": torch.rand(20, 2)}
    for augment, message in (
        ({"depth": moved}, "must have a part 'depth', got parts image, other"),
        (lambda tree: {"image": tree.parts["image"]}, "must return the parts image, other, got image"),
        (lambda tree: 3, "must return the parts image, other, got"),
    ):
        s = cs.data.arrays(x, torch.arange(20) % 2, augment=augment)
        with pytest.raises(cs.ConsilienceError, match=message):
            cs.run(cs.settings.continual([s]), m.finetune(), Two())


def test_features_are_not_augmented():
    s = cs.data.digits(image=True).map(augment=aug.crop(1))
    with pytest.raises(cs.ConsilienceError, match="cannot be augmented, got .*Crop.* in 'digits'"):
        cs.data.embed(s, cs.models.backbone(cs.models.conv(10, 1, 8, 4)))


def test_transforms_of_torchvision():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    transform = v2.Compose([v2.RandomCrop(8, padding=1), v2.RandomHorizontalFlip()])
    s = cs.data.digits(image=True).map(augment=transform)
    assert "RandomCrop" in repr(s.augment)
    x, y = s.train.x[:16], s.train.y[:16]
    a, b = (s.augment(x, y, torch.arange(16))[0] for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, x)
