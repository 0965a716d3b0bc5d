"""Frozen backbones: one hash for all that outputs depend on; features kept on disk; unreadable images."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import consilience as cs
from consilience import models
from consilience.core.errors import ConsilienceError
from consilience.core.params import key, save
from consilience.core.source import Examples, Source, Stream, Tensors
from consilience.data import features

WEIGHTS = Path(os.environ.get("CONSILIENCE_DATA", "")) / "timm_mobilenetv2_100_same.safetensors"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Linear(4, 5)

    def forward(self, x):
        return self.classifier(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))


def net(seed=0):
    torch.manual_seed(seed)
    made = Net()
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    return made


def image_hashes(model):
    return model.backbone(model.init(key(0))[0])


def psi(model, x, train=False):
    return model(*model.init(key(0)), x, None, train)[0]


def images(n=20, channels=3, side=8, seed=0):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def source(name="s", n=20, seed=0, x=None):
    x = images(n, seed=seed) if x is None else x
    t = Tensors(x, torch.arange(len(x)) % 2)
    return Source(
        name,
        t.select(torch.arange(n - 8)),
        t.select(torch.arange(n - 8, n - 4)),
        t.select(torch.arange(n - 4, n)),
        (("c", "0"), ("c", "1")),
        (0, 1),
        "t",
    )


class Counting(nn.Module):
    """Its features are means of channels; the rows that passed are counted."""

    seen = 0

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x):
        Counting.seen += len(x)
        return x.mean((2, 3)) * self.scale


@pytest.fixture
def counting():
    model = models.backbone(models.wrap(Counting(), 3, headless=True))
    Counting.seen = 0
    return model


# the module


def test_images_are_prepared_as_said_and_never_in_training_mode():
    module, (mean, std) = net(), ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    model = models.backbone(module, size=(6, 10), mean=mean, std=std)
    x = images(channels=1, side=5)
    module.eval().classifier = nn.Identity()
    up = F.interpolate(x, (6, 10), mode="bilinear").repeat(1, 3, 1, 1)
    prepared = (up - torch.tensor(mean)[None, :, None, None]) / torch.tensor(std)[None, :, None, None]
    with torch.no_grad():
        assert torch.allclose(psi(model, x), module(prepared), atol=1e-6)
    params, buffers = model.init(key(0))
    assert (
        torch.equal(psi(model, x, train=True), psi(model, x)) and not model.has_batch_norm and not model.draws
    )
    assert torch.equal(model.bind(params, buffers, True)[0](x, None), psi(model, x))
    assert torch.equal(psi(model, psi(model, x)), psi(model, x)), "features pass as they are"
    smaller = models.backbone(net(), size=4)
    shrunk = F.interpolate(images(), (4, 4), mode="bilinear", antialias=True)
    assert torch.equal(psi(smaller, images()), psi(models.backbone(net()), shrunk))
    assert (
        all(model.frozen(n) for n in params)
        and not buffers
        and not any(n.startswith("body.classifier") for n in params)
    )


def test_everything_that_outputs_depend_on_is_in_the_hash():
    def padded():
        other = net()
        other.conv = nn.Conv2d(3, 4, 3, padding=0, bias=False)
        other.conv.weight = net().conv.weight
        return other

    def changed(what):
        other = net()
        with torch.no_grad():
            {"statistic": other.bn.running_var, "weight": other.conv.weight}[what].view(-1)[0] += 1e-3
        return other

    def eps():
        other = net()
        other.bn.eps = 1e-3
        return other

    variants = {
        "same": models.backbone(net()),
        "own size": models.backbone(net(), size=8),
        "wide": models.backbone(net(), size=(8, 9)),
        "mean": models.backbone(net(), mean=0.5),
        "std": models.backbone(net(), std=0.5),
        "statistic": models.backbone(changed("statistic")),
        "weight": models.backbone(changed("weight")),
        "padding": models.backbone(padded()),
        "eps": models.backbone(eps()),
    }
    hashes = {n: image_hashes(m) for n, m in variants.items()}
    assert len(set(hashes.values())) == len(hashes)
    assert image_hashes(models.backbone(net())) == hashes["same"]
    assert image_hashes(models.backbone(models.wrap(net()))) == hashes["same"]
    other_head = net()
    other_head.classifier = nn.Linear(4, 5)
    assert image_hashes(models.backbone(other_head)) == hashes["same"], "the head is none of it"
    assert len({repr(m) for m in variants.values()}) == len(variants) - 2, (
        "what is said differs with all but the numbers"
    )


def test_what_torch_does_not_print_is_in_the_hash_too():
    def layer(heads=2, seed=0, **more):
        torch.manual_seed(seed)
        return nn.TransformerEncoderLayer(8, heads, 16, batch_first=True, **more)

    def backbone(module):
        class Rows(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = module

            def forward(self, x):
                return self.inner(x.mean(1))

        return models.backbone(models.wrap(Rows(), 64, headless=True))

    class Scaled(nn.Module):
        def __init__(self, **own):
            super().__init__()
            self.inner, self._private = layer(), object()
            self.__dict__.update(own)

        def forward(self, x):
            return self.inner(x)

    variants = {
        "same": layer(),
        "heads": layer(4),
        "activation": layer(activation=F.gelu),
        "another function": layer(activation=F.silu),
        "norm first": layer(norm_first=True),
        "scale": Scaled(scale=0.1),
        "scale 2": Scaled(scale=0.1 + 1e-12),
        "window": Scaled(window=(2, 3)),
        "window 2": Scaled(window=(2, 4)),
        "none": Scaled(window=None),
    }
    printed = {str(m) for n, m in variants.items() if not isinstance(m, Scaled)}
    assert len(printed) == 1, "torch prints them alike"
    entries = {n: tuple(m.state_dict().values()) for n, m in variants.items()}
    assert all(torch.equal(a, b) for e in entries.values() for a, b in zip(e, entries["same"], strict=True))
    hashes = {n: image_hashes(backbone(m)) for n, m in variants.items()}
    assert len(set(hashes.values())) == len(hashes)
    assert image_hashes(backbone(layer())) == hashes["same"]
    assert (
        image_hashes(backbone(layer().train())) == image_hashes(backbone(layer().eval())) == hashes["same"]
    ), "its mode is none of it"
    assert image_hashes(backbone(Scaled(scale=0.1))) == hashes["scale"], "what is private is not seen"
    wider = net()
    wider.classifier = nn.Linear(4, 7)
    assert image_hashes(models.backbone(wider)) == image_hashes(models.backbone(net())), (
        "nor are the outputs of the head"
    )


def test_a_frozen_model_s_cache_tells_what_torch_does_not_print(tmp_path):
    def model(first):
        torch.manual_seed(0)
        made = nn.Sequential(
            nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 8, norm_first=first, batch_first=True)
        )
        return models.frozen(models.wrap(nn.Sequential(made, nn.Flatten()), 192, headless=True))

    for first in (False, True):
        kept = cs.data.embed(source(), model(first), tmp_path)
        assert torch.allclose(kept.test.x, psi(model(first), source().test.x), atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_backbone_of_other_floats_computes_in_float32():
    double = models.backbone(net().double())
    assert {p.dtype for n, p in double.init(key(0))[0].items() if p.is_floating_point()} == {torch.float32}
    assert torch.equal(psi(double, images()), psi(models.backbone(net()), images()))
    assert image_hashes(double) == image_hashes(models.backbone(net()))
    assert net().double().conv.weight.dtype == torch.float64


def test_a_checkpoint_is_read_by_name(tmp_path):
    own = net(1).state_dict()
    save(tmp_path / "all.safetensors", {n: t.half() if t.is_floating_point() else t for n, t in own.items()})
    model = models.backbone(net(0), tmp_path / "all.safetensors")
    params = model.init(key(0))[0]
    assert torch.equal(params["body.bn.running_var"], own["bn.running_var"].half().float())
    assert params["body.conv.weight"].dtype == torch.float32
    bare = {n: t for n, t in own.items() if not n.startswith("classifier")}
    save(tmp_path / "bare.safetensors", bare)
    assert image_hashes(models.backbone(net(0), tmp_path / "bare.safetensors")) == image_hashes(
        models.backbone(net(1))
    )
    for name, tensors, said in (
        (
            "less",
            {n: t for n, t in bare.items() if n != "bn.running_mean"},
            "all entries of the backbone, got no bn.running_mean",
        ),
        (
            "more",
            {**bare, "stem.weight": torch.zeros(1)},
            "no entries but the backbone's, got also stem.weight",
        ),
        (
            "shape",
            {**bare, "bn.weight": torch.zeros(3)},
            r"shapes, got \(3,\), not \(4,\), for 'bn.weight'",
        ),
        ("nan", {**bare, "bn.weight": torch.full((4,), torch.nan)}, "'bn.weight'"),
    ):
        save(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(ConsilienceError, match=said):
            models.backbone(net(0), tmp_path / f"{name}.safetensors")


def test_what_does_not_fit_is_refused():
    model = models.backbone(net())
    for x, said in (
        (torch.rand(2, 5), "width 4, got 5"),
        (
            torch.rand(2, 2, 8, 8),
            r"\[B, 1 or 3, H, W\] in \[0, 1\], or its features \[B, 4\], got float32 \(2, 2, 8, 8\)",
        ),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "got uint8"),
    ):
        with pytest.raises(ConsilienceError, match=said):
            psi(model, x)
    for more, said in (
        ({"std": 0}, "`std` must be positive"),
        ({"mean": (0.1, 0.2)}, "each of 3 channels, got 2"),
        ({"size": 0}, "`size` must be"),
        ({"size": "big"}, "`size` must be"),
        ({"pad_type": "same"}, "only a timm model by name takes more options, got pad_type"),
    ):
        with pytest.raises(ConsilienceError, match=said):
            models.backbone(net(), **more)
    with pytest.raises(ConsilienceError, match="a timm model's name, a torch module or a model of one"):
        models.backbone(models.multi_head(models.linear(4), 3))


def test_a_module_without_a_linear_layer_gives_its_outputs():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()).eval()
    model = models.backbone(module, mean=0.5)
    with torch.no_grad():
        assert model.width == model.outputs == 16 and torch.allclose(
            psi(model, images()), module(images() - 0.5), atol=1e-6
        )
    for other in (
        models.wrap(module, headless=True),
        models.wrap(module, 16, headless=True),
        models.wrap(lambda: module, 16, headless=True),
    ):
        assert image_hashes(models.backbone(other, mean=0.5)) == image_hashes(model)
    vectors = models.backbone(
        models.wrap(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 7)), headless=True), size=4
    )
    assert vectors.width == 7, "headless: its last layer is kept"
    assert models.multi_head(model, 2).grow(*models.multi_head(model, 2).init(key(0)), source(), key(0))[0][
        "heads.t.weight"
    ].shape == (2, 16)
    uncounted = models.wrap(module, headless=True)
    for ask in (lambda: models.wrap(module), lambda: uncounted.outputs, lambda: uncounted.width):
        with pytest.raises(
            ConsilienceError,
            match="`outputs` must be given for a module without a linear head, got none; use models.wrap",
        ):
            ask()
    with pytest.raises(ConsilienceError, match="`outputs` must be a whole number >= 1, got 0"):
        models.wrap(module, 0, headless=True)


@pytest.mark.parametrize("error", [AssertionError, TypeError, RuntimeError, ValueError])
def test_a_body_that_does_not_take_its_images_is_refused_with_its_reason(error):
    class Picky(nn.Module):
        def forward(self, x):
            raise error("it wants 7.\nand more")

    said = rf"images \[1, 3, 5, 6\], got {error.__name__}: it wants 7.$"
    with pytest.raises(ConsilienceError, match=said):
        models.backbone(Picky(), size=(5, 6))
    with pytest.raises(ConsilienceError, match=r"\[1, 3, 32, 32\] \(if it needs others, give `size`\), got"):
        models.backbone(Picky())
    with pytest.raises(ConsilienceError, match="backbone must give features .* got RuntimeError"):
        models.backbone(nn.Conv2d(3, 4, 7), size=5)


def test_a_buffer_that_the_module_makes_itself_is_made_once():
    class Grid(nn.Module):
        def __init__(self, times=1.0):
            super().__init__()
            self.register_buffer("kept", torch.tensor(times))
            self.register_buffer("grid", torch.zeros(1, 1), persistent=False)

        def forward(self, x):
            if self.grid.shape != x.shape[-2:]:
                self.grid = torch.arange(x.shape[-2] * x.shape[-1]).view(x.shape[-2:]).float()
            return (x * self.grid * self.kept).mean((2, 3))

    model, x = models.backbone(Grid(), size=4), images(side=4)
    params, buffers = model.init(key(0))
    assert params["body.grid"].shape == (4, 4) and not buffers
    for out in (psi(model, x), model.bind(params, buffers, False)[0](x, None)):
        assert torch.allclose(out, Grid()(x), atol=1e-5)
    assert (
        image_hashes(model)
        == image_hashes(models.backbone(Grid(), size=4))
        != image_hashes(models.backbone(Grid(2.0), size=4))
    )

    class Always(Grid):
        def forward(self, x):
            self.grid = x
            return x.mean((2, 3))

    with pytest.raises(ConsilienceError, match="got TypeError: cannot assign"):
        models.backbone(Always(), size=4)


def test_agents_with_images_and_agents_with_features_share_a_bank():
    model = models.multi_head(models.backbone(net()), 2)
    ours, theirs = source("a"), source("b", seed=1)
    kept = cs.data.embed(theirs, model)
    schedule = cs.settings.skill([[ours], [kept]])
    r = cs.run(schedule, cs.methods.skill(), model, cs.Training(epochs=2, batch_size=4))
    assert {m.meta["backbone"] for m in r.agent.state.experts.values()} == {model.backbone(r.params)}
    both = cs.run(
        cs.settings.skill([[ours], [theirs]]), cs.methods.skill(), model, cs.Training(epochs=2, batch_size=4)
    )
    bank, other = r.agent.state.bank, both.agent.state.bank
    assert set(bank) == set(other) == {("agent-0", "a"), ("agent-1", "b")}
    for at, message in bank.items():
        assert set(message.items) == set(other[at].items) and len(message.items) == 2, (
            "a module and an anchor"
        )
        for kind, item in message.items.items():
            theirs_too = other[at].items[kind].tensors
            assert set(item.tensors) == set(theirs_too) and item.tensors
            for n, t in item.tensors.items():
                assert torch.allclose(t.double(), theirs_too[n].double(), rtol=1e-4, atol=1e-5), (at, kind, n)
    for s in (ours, theirs):
        on = {"images": s.test.x, "features": cs.data.embed(s, model).test.x}
        want = both.agent.predict(s.test.x)
        assert all(
            torch.allclose(run.agent.predict(x), want, atol=1e-4) for run in (r, both) for x in on.values()
        ), s.name
    for n, p in r.params.items():
        assert torch.allclose(p.float(), both.params[n].float(), atol=1e-5)


def test_macs():
    assert models.macs(models.conv(10, 3, 8, 4), (3, 8, 8)) == 3 * 4 * 9 * 64 + 4 * 8 * 9 * 16 + 32 * 10
    grouped = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(128, 3)
    )
    assert models.macs(grouped, torch.rand(5, 4, 8, 8)) == 16 * 8 * 2 * 9 + 128 * 3


def test_macs_move_nothing():
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model, before = models.wrap(module), {n: t.clone() for n, t in module.state_dict().items()}
    for counted in (module, model):
        assert models.macs(counted, (6,)) == 6 * 4 + 4 * 2, "one sample has no variance"
    assert module.training and all(m.training for m in module)
    assert (
        all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
        and int(module[1].num_batches_tracked) == 0
    )
    assert model(*model.init(key(0)), torch.rand(3, 6), None, True)[0].shape == (3, 2)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_macs_of_attention(fast, train):
    t, d, hidden, heads = 5, 8, 16, 2
    layer = nn.TransformerEncoderLayer(d, heads, hidden, batch_first=True).train(train)
    own = (
        4 * t * d * d + 2 * t * t * d + 2 * t * d * hidden
    )  # q, k, v and out; scores and their sum; the two layers
    given = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(fast)
        assert models.macs(layer, (t, d)) == own
        assert (
            models.macs(models.wrap(nn.Sequential(layer, nn.Flatten(), nn.Linear(t * d, 3))), (t, d))
            == own + t * d * 3
        )
        assert torch.backends.mha.get_fastpath_enabled() is fast
        with pytest.raises((AssertionError, RuntimeError)):  # torch's own
            models.macs(layer, (t, d + 1))
        assert torch.backends.mha.get_fastpath_enabled() is fast, "also where it fails"
    finally:
        torch.backends.mha.set_fastpath_enabled(given)


# features


def test_features_stand_where_images_stood():
    model, s = models.backbone(net()), source()
    shared = [s, Source("o", s.validation, s.validation, s.test, s.labels, (0,))]
    a, b = cs.data.embed(shared, model, batch=3)
    for part in ("train", "validation", "test"):
        assert torch.allclose(getattr(a, part).x, psi(model, getattr(s, part).x), atol=1e-6)
        assert torch.equal(getattr(a, part).y, getattr(s, part).y)
    assert (a.name, a.labels, a.classes, a.task, a.kind) == (s.name, s.labels, s.classes, s.task, s.kind)
    assert a.test is b.test and b.train is a.validation, "parts that are shared stay so"
    empty = Source("e", s.train, s.train.select(torch.arange(0)), s.test, s.labels, (0, 1))
    assert cs.data.embed(empty, model).validation.x.shape == (0, 4)


def test_an_image_passes_once_in_any_order_or_source(tmp_path, counting):
    s = source()
    first = cs.data.embed(s, counting, tmp_path, batch=5)
    assert Counting.seen == 20
    again = cs.data.embed(s, counting, tmp_path)
    assert Counting.seen == 20
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part).x, getattr(again, part).x)
        assert torch.allclose(getattr(first, part).x, psi(counting, getattr(s, part).x), atol=1e-6)
    Counting.seen = 0
    x = torch.cat([s.test.x.flip(0), s.train.x[3:7], images(2, seed=9), s.train.x[:1], images(2, seed=9)])
    mixed = cs.data.embed(source("mixed", len(x), x=x), counting, tmp_path)
    assert Counting.seen == 2, "two images are new, and each of them comes twice"
    got = torch.cat([mixed.train.x, mixed.validation.x, mixed.test.x])
    assert torch.allclose(got, psi(counting, x), atol=1e-6)
    Counting.seen = 0
    cs.data.embed(s, models.multi_head(counting, 2), tmp_path)
    assert Counting.seen == 0, "heads on a backbone have its features"
    brighter = models.backbone(models.wrap(Counting(), 3, headless=True), std=0.5)
    Counting.seen = 0
    other = cs.data.embed(s, brighter, tmp_path)
    assert Counting.seen == 20 and torch.allclose(other.test.x, 2 * first.test.x, atol=1e-6)
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2


def test_kept_features_are_mapped_and_can_be_trained_on(tmp_path, counting):
    s = source()
    cs.data.embed(s, counting, tmp_path)
    again = cs.data.embed(s, counting, tmp_path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        where = again.train.x.data_ptr()
        spans = [line.split() for line in maps.read_text().splitlines() if ".safetensors" in line]
        assert any(int(a, 16) <= where < int(b, 16) for a, b in (span[0].split("-") for span in spans))
    w = torch.zeros(3, requires_grad=True)
    (again.train.x @ w).sum().backward()
    assert torch.allclose(w.grad, again.train.x.sum(0))
    r = cs.run(
        cs.settings.continual([again]), cs.methods.finetune(), models.linear(3, 2), cs.Training(epochs=1)
    )
    assert r.score >= 0


def test_a_stream_is_read_in_chunks(tmp_path, counting, monkeypatch):
    read = []

    class Files:
        def __len__(self):
            return 20

        def __getitem__(self, i):
            read.append(i)
            return images()[i], i % 2

    monkeypatch.setattr(Stream, "whole", lambda self: pytest.fail("a stream is never whole"))
    s = cs.data.stream(Files(), name="files")
    read.clear()
    got = cs.data.embed(s, counting, tmp_path, batch=4)
    assert sorted(read) == list(range(20)) and isinstance(got.train, Tensors)
    order = s.train.index
    assert torch.allclose(got.train.x, psi(counting, images()[order]), atol=1e-6)
    Counting.seen = 0
    cs.data.embed(cs.data.stream(Files(), name="files", seed=3), counting, tmp_path)
    assert Counting.seen == 0


@pytest.mark.parametrize("batch", [3, 4, 5, 11])
def test_files_hold_no_more_rows_than_said(tmp_path, counting, monkeypatch, batch):
    monkeypatch.setattr(features, "ROWS", 4)
    first = cs.data.embed(source(), counting, tmp_path, batch=batch)
    rows = [len(load_file(p)["images"]) for p in tmp_path.glob("*/*.safetensors")]
    assert rows == [4] * 5 and not list(tmp_path.glob("*/*.part"))
    Counting.seen = 0
    again = cs.data.embed(source(), counting, tmp_path)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(again, part).x, getattr(first, part).x)
        assert Counting.seen == 0 and torch.allclose(
            getattr(again, part).x, psi(counting, getattr(source(), part).x), atol=1e-6
        )
        Counting.seen = 0


def test_features_that_were_flipped_on_disk_are_refused(tmp_path, counting, monkeypatch):
    s, plain, read = source(), features.content_hash, []
    cs.data.embed(s, counting, tmp_path)
    (folder,) = tmp_path.iterdir()
    path = max(folder.iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start + json.loads(data[8:start])["features"]["data_offsets"][0] + 5] ^= 1
    path.write_bytes(data)
    Counting.seen = 0
    for _ in range(2):
        with pytest.raises(ConsilienceError, match=rf"changed on disk in {path}; delete that file"):
            cs.data.embed(s, counting, tmp_path)
    assert Counting.seen == 0

    def counted(tensors):
        read.extend(len(t) for n, t in tensors.items() if n == "features")
        return plain(tensors)

    monkeypatch.setattr(features, "content_hash", counted)
    few = Source("few", s.test, s.validation, s.test, s.labels, s.classes)
    kept = cs.data.embed(few, counting, tmp_path)
    assert read == [4, 4] and Counting.seen == 0, "what is not used is not read, and what is, once"
    assert torch.allclose(kept.test.x, psi(counting, s.test.x), atol=1e-6)
    path.unlink()
    whole = cs.data.embed(s, counting, tmp_path)
    assert torch.allclose(whole.train.x, psi(counting, s.train.x), atol=1e-6)


def test_files_without_a_digest_are_foreign(tmp_path, counting):
    s = source()
    cs.data.embed(s, counting, tmp_path)
    (folder,) = tmp_path.iterdir()
    path = max(folder.iterdir(), key=lambda p: p.stat().st_size)
    save(path, load_file(path))
    Counting.seen = 0
    with pytest.warns(UserWarning, match=rf"{path} is not read \(no digest of its features\)"):
        cs.data.embed(s, counting, tmp_path)
    assert Counting.seen == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cs.data.embed(s, counting, tmp_path)


def test_broken_and_foreign_files_are_named_and_made_anew(tmp_path, counting):
    s = source()
    whole = cs.data.embed(s, counting, tmp_path)
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir(), key=lambda p: p.stat().st_size)
    files[-1].write_bytes(files[-1].read_bytes()[:-40])
    Counting.seen = 0
    with pytest.warns(UserWarning, match=f"{files[-1].name} is not read"):
        again = cs.data.embed(s, counting, tmp_path)
    assert Counting.seen == 12 and torch.equal(again.train.x, whole.train.x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cs.data.embed(s, counting, tmp_path)
    save(
        folder / "foreign.safetensors",
        {"features": torch.zeros(2, 3), "images": torch.zeros(2, 16, dtype=torch.uint8)},
    )
    (folder / "text.safetensors").write_text("no")
    save(
        folder / "narrow.safetensors",
        {"features": torch.zeros(2, 1), "images": torch.zeros(2, 16, dtype=torch.uint8)},
    )
    (folder / "notes.txt").write_text("not ours, not looked at")
    with pytest.warns(UserWarning, match="is not read") as said:
        cs.data.embed(s, counting, tmp_path)
    assert {w.message.args[0].partition(" is not read")[0].rpartition("/")[2] for w in said} == {
        "foreign.safetensors",
        "text.safetensors",
        "narrow.safetensors",
    }
    assert Counting.seen == 12
    (tmp_path / "file").write_text("")
    with pytest.raises(ConsilienceError, match="`cache` must be a folder that can be written"):
        cs.data.embed(s, counting, tmp_path / "file")


def test_what_was_made_before_an_interruption_is_kept(tmp_path, counting):
    class Stops(Exception):
        pass

    class Broken(Examples):
        def __len__(self):
            return 20

        def batches(self, plan):
            for i, index in enumerate(plan):
                if i == 3:
                    raise Stops
                yield images()[index], index

        def targets(self):
            return torch.arange(20) % 2

        def select(self, index):
            raise NotImplementedError

        def map(self, x=None, y=None):
            raise NotImplementedError

    s = source()
    with pytest.raises(Stops):
        cs.data.embed(Source("b", Broken(), s.test, s.test, s.labels, (0, 1)), counting, tmp_path, batch=4)
    assert Counting.seen == 12
    cs.data.embed(s, counting, tmp_path, batch=4)
    assert Counting.seen == 20


def test_what_dead_processes_left_half_written_is_removed(tmp_path, counting):
    assert features.ROWS <= 1 << 13, "a process that is killed loses at most so many"
    cs.data.embed(source(), counting, tmp_path)
    (folder,) = tmp_path.iterdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        "old": f"a.safetensors.{dead.pid}.part",
        "young": f"b.safetensors.{dead.pid}.part",
        "ours": f"c.safetensors.{os.getpid()}.part",
        "foreign": "notes.part",
        "huge": f"d.{10**30}.part",
    }
    for n, name in names.items():
        (folder / name).write_text("")
        if n != "young":
            os.utime(folder / name, (time.time() - 90000,) * 2)
    Counting.seen = 0
    cs.data.embed(source(), counting, tmp_path)
    left = {n for n, name in names.items() if (folder / name).exists()}
    assert (
        left == ({"young", "ours", "foreign", "huge"} if os.name == "posix" else set(names))
        and Counting.seen == 0
    )


def test_progress_and_refusals(tmp_path, counting):
    calls = []
    cs.data.embed(
        source(), counting, tmp_path, batch=5, progress=lambda done, whole: calls.append((done, whole))
    )
    assert calls == [(5, 20), (10, 20), (12, 20), (16, 20), (20, 20)]
    s = source()
    for model, said in (
        (models.conv(2, 3, 8, 4), "a backbone without a head"),
        (models.multi_head(models.conv(2, 3, 8, 4), 2), "got one that is not frozen"),
        (models.multi_head(models.frozen(models.conv(2, 3, 8, 4)), 2), "each seed draws again"),
    ):
        with pytest.raises(ConsilienceError, match=said):
            cs.data.embed(s, model)
    with pytest.raises(ConsilienceError, match="`batch` must be"):
        cs.data.embed(s, counting, batch=0)
    with pytest.raises(ConsilienceError, match="features must be finite"):
        cs.data.embed(source(x=torch.full((20, 3, 8, 8), torch.nan)), counting)


def test_hashes_tell_type_shape_and_bytes():
    x = images(3)
    assert features.input_hashes(x) == [features.input_hashes(x[i : i + 1])[0] for i in range(3)]
    variants = [x, x.double(), x.view(3, 3, 4, 16), x + 1e-6, x.transpose(2, 3)]
    assert len({h for v in variants for h in features.input_hashes(v)}) == 15
    assert features.input_hashes(x.to(memory_format=torch.channels_last)) == features.input_hashes(x)


# unreadable images


def pictures(path, broken=()):
    from PIL import Image

    for c in ("cat", "dog"):
        (path / c).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                path / c / f"{i}.png"
            )
    for name in broken:
        (path / name).write_bytes((path / name).read_bytes()[:60])
    return path


@pytest.mark.parametrize("in_memory", [False, True])
def test_unreadable_images_are_named_and_refused_or_skipped(tmp_path, counting, in_memory):
    pytest.importorskip("PIL", reason="reading images needs pillow")
    path = pictures(tmp_path / "pets", ["cat/2.png", "dog/5.png"])
    with pytest.warns(
        UserWarning, match=r"2 of 12 images cannot be read and are left out: .*cat/2.png, .*dog/5.png"
    ):
        s = cs.data.folder(path, unreadable="skip", in_memory=in_memory)
    assert len(s.train) + len(s.validation) + len(s.test) == 10
    assert len(cs.data.embed(s, counting).train) == len(s.train)
    with pytest.raises(ConsilienceError, match=r"cannot read the image .*(cat/2|dog/5).png"):
        cs.data.embed(cs.data.folder(path, in_memory=in_memory), counting)
    with pytest.raises(ConsilienceError, match="`unreadable` must be"):
        cs.data.folder(path, unreadable="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cs.data.folder(pictures(tmp_path / "fine"), unreadable="skip").train) > 0
    none = pictures(tmp_path / "none", [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(6)])
    with pytest.raises(ConsilienceError, match="cannot read any of 12 images"):
        cs.data.folder(none, unreadable="skip")


# timm


@pytest.fixture
def timm():
    return pytest.importorskip(
        "timm", reason="backbones by name need timm: pip install 'consilience[vision]'"
    )


def test_timm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConsilienceError, match=r"consilience\[vision\]"):
        models.backbone("resnet18")


def test_a_timm_model_by_name(timm):
    model = models.backbone("resnet10t", pretrained=False)
    assert (
        model.width == 512
        and model.name == "backbone"
        and "size=(176, 176)" in repr(model)
        and len(repr(model)) < 200
    )
    other = models.backbone("resnet10t", pretrained=False, size=48)
    assert (
        image_hashes(other)
        != image_hashes(model)
        == image_hashes(models.backbone("resnet10t", pretrained=False))
    )
    params = other.init(key(0))[0]
    assert torch.equal(params["body.conv1.0.weight"], model.init(key(1))[0]["body.conv1.0.weight"])
    plain = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval()
    with torch.no_grad():
        for n, p in (*plain.named_parameters(), *plain.named_buffers()):
            p.copy_(params[f"body.{n}"])
        x = images(2, side=48)
        own = timm.data.resolve_data_config(plain.pretrained_cfg)
        mean, std = (torch.tensor(own[k]).view(-1, 1, 1) for k in ("mean", "std"))
        assert torch.allclose(psi(other, x), plain((x - mean) / std), atol=1e-5)
    for args, more, said in (
        (("resnet10",), {}, "nearest: resnet10t"),
        (("resnet10t", WEIGHTS), {"pretrained": True}, "got both"),
        (("resnet10t",), {"num_classes": 3}, "gives features"),
        (("resnet10t",), {"pretrained": False, "nothing": 3}, "TypeError"),
    ):
        with pytest.raises(ConsilienceError, match=said):
            models.backbone(*args, **more)


def test_a_prefix_and_a_tag_change_no_hash(timm, tmp_path):
    body = timm.create_model("mobilenetv2_100", pretrained=False)
    path = tmp_path / "weights.safetensors"
    save(path, body.state_dict())
    names = (
        "mobilenetv2_100",
        "timm/mobilenetv2_100",
        "mobilenetv2_100.ra_in1k",
        "timm/mobilenetv2_100.ra_in1k",
    )
    assert len({image_hashes(models.backbone(n, path, size=32)) for n in names}) == 1
    half = models.backbone("mobilenetv2_100.ra_in1k", path, size=32, mean=0.5)
    assert image_hashes(half) != image_hashes(models.backbone("mobilenetv2_100", path, size=32)), (
        "other preparations stay apart"
    )


def named(model):
    """What stands for what a backbone is and for its size."""
    return bytes(model.init(key(0))[0]["identity"].tolist())


def test_the_identity_of_a_plain_name_stays(timm):
    for name, more, said in (
        ("mobilenetv2_100", {}, "timm mobilenetv2_100"),
        ("timm/mobilenetv2_100.ra_in1k", {"pad_type": "same"}, "timm mobilenetv2_100, pad_type='same'"),
    ):
        digest = hashlib.blake2b(json.dumps([said, [32, 48]]).encode(), digest_size=16).digest()
        assert named(models.backbone(name, size=(32, 48), pretrained=False, **more)) == digest


def folder_of(body, path, **args):
    """A folder as timm's `local-dir:` and the hub have it."""
    path.mkdir(parents=True)
    cfg = {
        n: v
        for n, v in body.pretrained_cfg.items()
        if n in ("input_size", "mean", "std", "classifier", "first_conv")
    }
    config = {
        "architecture": body.pretrained_cfg["architecture"],
        "num_classes": 1000,
        "pretrained_cfg": cfg,
        "model_args": args,
    }
    (path / "config.json").write_text(json.dumps(config))
    save(path / "model.safetensors", body.state_dict())
    return path


def test_the_same_weights_in_folders_have_one_hash(timm, tmp_path):
    torch.manual_seed(0)
    body = timm.create_model("mobilenetv2_100")
    one, two = (folder_of(body, tmp_path / n) for n in "ab")
    said = folder_of(body, tmp_path / "said", num_classes=1000, in_chans=3, bn_eps=1e-5)
    other = folder_of(body, tmp_path / "other", bn_eps=1e-3)
    before = torch.get_rng_state()
    hashes = {p: image_hashes(models.backbone(f"local-dir:{p}", size=32)) for p in (one, two, said, other)}
    assert torch.equal(torch.get_rng_state(), before)
    assert (
        hashes[one]
        == hashes[two]
        == hashes[said]
        == image_hashes(models.backbone("mobilenetv2_100", one / "model.safetensors", size=32))
    )
    assert hashes[other] != hashes[one], "what its folder says of it makes it another"
    same = {"size": 32, "pad_type": "same"}
    assert image_hashes(models.backbone(f"local-dir:{one}", **same)) == image_hashes(
        models.backbone("mobilenetv2_100", one / "model.safetensors", **same)
    )


def test_weights_of_the_hub_are_those_of_their_file(timm, tmp_path):
    torch.manual_seed(0)
    body, commit = timm.create_model("mobilenetv2_100"), "0" * 40
    repository = tmp_path / "hub" / ("models--" + body.pretrained_cfg["hf_hub_id"].replace("/", "--"))
    snapshot = folder_of(body, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for p in [*snapshot.iterdir()]:  # a snapshot has links to blobs
        p.rename(repository / "blobs" / p.name)
        p.symlink_to(Path("..", "..", "blobs", p.name))
    program = """
import sys
from consilience import models
from consilience.core.params import key
for m in (models.backbone("mobilenetv2_100"), models.backbone("hf-hub:timm/mobilenetv2_100.ra_in1k"),
          models.backbone("mobilenetv2_100", checkpoint=sys.argv[1])):
    print(m.backbone(m.init(key(0))[0]))
try:
    models.backbone("resnet10t")
except models.ConsilienceError as e:
    print(e)
"""
    env = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TORCH_HOME": str(tmp_path / "torch"),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(snapshot / "model.safetensors")],
        env=env,
        capture_output=True,
        text=True,
    )
    *hashes, missing = done.stdout.splitlines()
    assert len(hashes) == 3 and len({*hashes}) == 1, done.stderr
    assert "timm cannot make 'resnet10t', got" in missing and "without the hub, give `checkpoint`" in missing


def test_timm_s_own_size_is_named_where_it_is_fixed(timm):
    small = {"pretrained": False, "depth": 1}
    with pytest.raises(
        ConsilienceError,
        match=r"images \[1, 3, 64, 64\] .* with `img_size=64`\), got AssertionError: Input height",
    ):
        models.backbone("vit_tiny_patch16_224", size=64, **small)
    with pytest.raises(ConsilienceError, match=r"with `img_size=\(64, 48\)`\), got"):
        models.backbone("vit_tiny_patch16_224", size=(64, 48), **small)
    assert models.backbone("vit_tiny_patch16_224", size=(64, 48), img_size=(64, 48), **small).width == 192


def test_a_timm_model_that_makes_a_buffer_itself(timm):
    model = models.backbone(
        "convit_tiny", pretrained=False, depth=1, local_up_to_layer=1, img_size=32, size=32
    )
    params, buffers = model.init(key(0))
    plain = timm.create_model("convit_tiny", num_classes=0, depth=1, local_up_to_layer=1, img_size=32).eval()
    with torch.no_grad():
        for n, p in plain.named_parameters():
            p.copy_(params[f"body.{n}"])
        x = images(2, side=32)
        assert not buffers and torch.allclose(
            psi(model, x), plain((x - params["mean"]) / params["std"]), atol=1e-5
        )


def test_a_timm_module_without_classes(timm):
    torch.manual_seed(0)
    body = timm.create_model("resnet10t", num_classes=0).eval()
    with torch.no_grad():
        assert torch.allclose(psi(models.backbone(body), images(side=32)), body(images(side=32)), atol=1e-5)


def test_layers_of_timm_whose_weights_another_reads_have_nothing_inserted(timm):
    model = models.backbone("eva02_tiny_patch14_224", pretrained=False, depth=1, img_size=28, size=28)
    biased = models.beneficial_biases(model, 2)
    assert len(biased.layers) == 4 and not any("qkv" in n for n in biased.layers)
    toes = models.head2toe(
        biased, *biased.grow(*biased.init(key(0)), source(), key(0)), source(), 0.1, epochs=1
    )[0]
    assert toes.layers == biased.layers


@pytest.mark.skipif(
    not WEIGHTS.is_file(),
    reason=f"wants timm_mobilenetv2_100_same.safetensors in CONSILIENCE_DATA ({WEIGHTS})",
)
def test_mobilenet_with_the_shared_weights(timm, tmp_path):
    more = {"mean": 0.5, "std": 0.5, "pad_type": "same", "bn_eps": 1e-3}
    model = models.backbone("mobilenetv2_100", WEIGHTS, size=64, **more)
    assert model.width == 1280
    with open(WEIGHTS, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    assert header["conv_stem.weight"]["dtype"] == "F16"
    x = images(2, side=64)
    plain = timm.create_model("mobilenetv2_100", pad_type="same", bn_eps=1e-3)
    plain.load_state_dict(
        {n: t.float() if t.is_floating_point() else t for n, t in load_file(WEIGHTS).items()}
    )
    plain.eval().double()
    params = {n: p.double() if p.is_floating_point() else p for n, p in model.init(key(0))[0].items()}
    with torch.no_grad():
        want = plain.forward_head(plain.forward_features(2 * x.double() - 1), pre_logits=True)
    got = model(params, {}, x.double(), None, False)[0]
    assert got.dtype == torch.float64 and torch.allclose(got, want, atol=1e-10)
    assert torch.allclose(psi(model, x).double(), want, atol=1e-3), (
        "52 layers of float32: 7.5e-5 from float64 on one machine"
    )
    for other in ({"pad_type": ""}, {"bn_eps": 1e-5}):
        assert image_hashes(
            models.backbone("mobilenetv2_100", WEIGHTS, size=64, **{**more, **other})
        ) != image_hashes(model)
    assert (
        models.macs(models.backbone("mobilenetv2_100", WEIGHTS, size=None, **more), (3, 224, 224))
        == 299_494_272
    )
    biased = models.beneficial_biases(model, 4)
    assert len(biased.layers) == 52 and sum(biased.widths) == 17056


@pytest.mark.parametrize(
    "make",
    [
        lambda s: cs.settings.federated([s[0], s[1]], rounds=2),
        lambda s: cs.settings.gossip(s, rounds=2),
        cs.settings.merging,
    ],
)
def test_nothing_averages_a_backbone(make):
    model = models.multi_head(models.backbone(net()), 2)
    three = [source(n, seed=i) for i, n in enumerate("abc")]
    begun = model.init(key(0))[0]
    r = cs.run(
        make(three),
        cs.methods.fedavg() if make is not cs.settings.merging else cs.methods.average(),
        model,
        cs.Training(epochs=1),
    )
    assert model.backbone(r.params) == model.backbone(begun)
    assert not torch.equal(
        r.params["heads.t.weight"], model.grow(*model.init(key(0)), three[0], key(0))[0]["heads.t.weight"]
    )
