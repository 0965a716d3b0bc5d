"""How data comes to clients: label sets, users, random sizes; Shakespeare by role, and models for it."""

from __future__ import annotations

import inspect
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import consilience as cs
from consilience import data
from consilience.core.params import key

TEXT = Path(os.environ.get("CONSILIENCE_DATA", "/nowhere")) / "shakespeare_roles.json.xz"
real = pytest.mark.skipif(
    not TEXT.is_file(), reason="needs shakespeare_roles.json.xz in the folder that CONSILIENCE_DATA names"
)


def refused(match, make, *args, **more):
    with pytest.raises(cs.ConsilienceError) as error:
        make(*args, **more)
    assert match in str(error.value), str(error.value)


@pytest.fixture(scope="module")
def points():
    """400 examples of 8 classes, each with a number of its own; a test of 80."""
    y = torch.arange(400) % 8
    x = torch.arange(400.0)[:, None]
    return data.arrays(
        x, y, test=(torch.arange(80.0)[:, None], torch.arange(80) % 8), validation=0, name="points"
    )


def rows(s, part="train"):
    return getattr(s, part).whole()[0].flatten().tolist()


# Label sets.


@pytest.mark.parametrize(("clients", "classes"), [(4, 2), (10, 2), (10, 3), (3, 8), (5, 7)])
def test_label_sets_deal_classes_evenly(points, clients, classes):
    parts = data.label_sets(points, clients, classes, seed=3, local_test=True)
    assert all(len(s.classes) == classes and set(s.train.targets().tolist()) == set(s.classes) for s in parts)
    dealt = sorted(x for s in parts for x in rows(s))
    assert dealt == rows(points)  # each example to exactly one client
    assert sorted(x for s in parts for x in rows(s, "test")) == rows(points, "test")
    owners = [sum(c in s.classes for s in parts) for c in range(8)]
    assert max(owners) - min(owners) <= 1
    for c in range(8):
        counts = [int((s.train.targets() == c).sum()) for s in parts if c in s.classes]
        assert sum(counts) == 50 and max(counts) - min(counts) <= 1
    assert [s.classes for s in data.label_sets(points, clients, classes, seed=3)] == [
        s.classes for s in parts
    ]
    assert all(
        s.test is points.test and s.task == "points" for s in data.label_sets(points, clients, classes)
    )


def test_sites_have_label_sets_of_their_own(points):
    parts = data.label_sets(points, 3, [[0, 1], ["1", "2"], [2]], local_test=True)
    assert [s.classes for s in parts] == [(0, 1), (1, 2), (2,)]
    assert sum(len(s.train) for s in parts) == 150
    assert sorted(set(parts[1].test.targets().tolist())) == [1, 2]
    result = cs.run(cs.settings.federated(parts, 1), cs.methods.fedavg(), training=cs.Training(epochs=1))
    assert result.agent.frame.labels == parts[0].labels  # every declared class has its column


def test_bad_label_sets_are_refused(points):
    refused("so that every class has a client; got 3 clients with 2.", data.label_sets, points, 3, 2)
    refused("`classes` must be at most 8", data.label_sets, points, 3, 9)
    refused(
        "`classes` must be 2 lists of classes of 'points', one per client, got 1 sets.",
        data.label_sets,
        points,
        2,
        [[1]],
    )
    refused("one per client, got 'x'.", data.label_sets, points, 1, [["x"]])
    refused("got 2 sets, one of them empty.", data.label_sets, points, 2, [[1], []])
    refused("`classes` must be a whole number >= 1, got 0.", data.label_sets, points, 2, 0)
    refused(
        "label_sets needs a source of classes, got 'diabetes', which has values.",
        data.label_sets,
        data.diabetes(),
        2,
    )


# One order of arguments.


@pytest.mark.parametrize("name", ["dirichlet", "iid", "label_sets", "quantity_skew", "shards"])
def test_partitions_take_their_arguments_in_one_order(points, name):
    parameters = inspect.signature(getattr(data, name)).parameters
    assert list(parameters)[:2] == ["source", "clients"]
    keywords = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keywords == ["seed", "local_test", "least"][: len(keywords)] and len(keywords) >= 2
    assert list(parameters)[-len(keywords) :] == keywords

    # A seed by position meant something else in one of them.
    with pytest.raises(TypeError, match="positional"):
        getattr(data, name)(points, 3, 2, None, None, 1)


# Users.


def test_users_are_clients(points):
    users = [f"u{int(i) % 7}" for i in range(390)] + ["rare"] * 10
    parts = data.natural(points, users)
    assert [s.name for s in parts] == [*(f"points/rare",), *(f"points/u{i}" for i in range(7))]  # noqa: F541
    for s in parts:
        assert rows(s) == [i for i, u in enumerate(users) if s.name == f"points/{u}"]
        assert s.test is points.test and s.classes == points.classes and s.task == "points"
    assert len(data.natural(points, users, least=11)) == 7
    own = data.natural(points, torch.arange(400) % 3, test_users=np.arange(80) % 3)
    assert [s.name for s in own] == ["points/0", "points/1", "points/2"]
    assert rows(own[1], "test") == [float(i) for i in range(80) if i % 3 == 1]
    split = data.arrays(torch.arange(20.0)[:, None], torch.arange(20) % 2, validation=0.2, name="split")
    column = [*rows(split), *rows(split, "validation")]
    halves = data.natural(split, [int(v) // 10 for v in column])
    assert all(
        (int(v) // 10) == i for i, s in enumerate(halves) for p in ("train", "validation") for v in rows(s, p)
    )


def test_bad_users_are_refused(points):
    refused(
        "`users` must be a name or a whole number for each training example, "
        "and then for each validation example, 400 in all, got 3 values.",
        data.natural,
        points,
        [1, 2, 3],
    )
    refused("400 in all, got 400 values.", data.natural, points, [0.5] * 400)
    refused(
        "`test_users` must be a name or a whole number for each test example, 80 in all, got 1 values.",
        data.natural,
        points,
        [1] * 400,
        [1],
    )
    refused(
        "a user must have at least 500 training examples, got 400 at most.",
        data.natural,
        points,
        [1] * 400,
        least=500,
    )


# Sizes.


def test_sizes_are_drawn(points):
    for more in ({"sigma": 0.7}, {"alpha": 2.0}):
        parts = data.quantity_skew(points, 8, seed=5, **more)
        assert sorted(x for s in parts for x in rows(s)) == rows(points)
        sizes = [len(s.train) for s in parts]
        assert min(sizes) >= 2 and len(set(sizes)) > 3
        assert sizes == [len(s.train) for s in data.quantity_skew(points, 8, seed=5, **more)]
        assert sizes != [len(s.train) for s in data.quantity_skew(points, 8, seed=6, **more)]


def test_sizes_follow_their_law():
    many = data.arrays(
        torch.zeros(40_000, 1), torch.zeros(40_000, dtype=torch.long), test=0.01, validation=0, name="many"
    )
    n = len(many.train)
    logs = torch.tensor([len(s.train) for s in data.quantity_skew(many, 400, sigma=0.5)]).double().log()
    assert abs(float(logs.std()) - 0.5) < 0.06  # of 400 draws: sigma / sqrt(2 x 400) = .018
    share = torch.tensor([len(s.train) for s in data.quantity_skew(many, 400, alpha=4.0)]).double() / n
    expected = (1 / 400) * (1 - 1 / 400) / (400 * 4 + 1)  # the variance of a share
    assert 0.75 < float(share.var()) / expected < 1.3


def test_bad_sizes_are_refused(points):
    refused(
        "got both `sigma=1.0` and `alpha=1.0`; give one of them.",
        data.quantity_skew,
        points,
        3,
        sigma=1.0,
        alpha=1.0,
    )
    refused("`sigma` must be positive and finite, got 0.", data.quantity_skew, points, 3, sigma=0)
    refused("lower `sigma` or take fewer clients.", data.quantity_skew, points, 40, sigma=9.0)
    refused(
        "at best in 100 draws with `alpha=0.01` and 40 clients; raise `alpha`",
        data.quantity_skew,
        points,
        40,
        alpha=0.01,
    )


# Characters.


@pytest.fixture
def roles(tmp_path):
    path = tmp_path / "roles.json.xz"
    texts = {
        r: {"train": text * 20, "test": text * 5}
        for r, text in (("ANN", "abcd"), ("BOB", "abdc"), ("EVE", "xa b"))
    }
    path.write_bytes(lzma.compress(json.dumps(texts).encode()))
    return path


def test_windows_of_text(roles):
    ann, bob, _ = data.shakespeare(window=6, stride=4, validation=0.25, path=roles)
    assert ann.labels == tuple(("shakespeare", c) for c in " abcdx") and ann.classes == tuple(range(6))
    x, y = ann.train.whole()
    text = "abcd" * 15  # the last quarter is to choose by
    assert x.dtype == torch.long and x.shape == (14, 6) and len(y) == 14
    for i, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        assert "".join(" abcdx"[c] for c in a) == text[4 * i : 4 * i + 6] and " abcdx"[b] == text[4 * i + 6]
    assert len(ann.validation) == 4 and len(ann.test) == 4
    assert ann.name == "shakespeare/ANN" and bob.task == "shakespeare"
    assert len(data.shakespeare(window=6, stride=1, limit=5, path=roles)[0].train) == 5
    assert [s.name for s in data.shakespeare(["EVE", "ANN"], 6, path=roles)] == [
        "shakespeare/EVE",
        "shakespeare/ANN",
    ]
    assert [len(s.labels) for s in data.shakespeare(1, 6, path=roles)] == [6]  # of all roles
    assert len(data.shakespeare(window=6, validation=0.0, path=roles)[0].validation) == 0


def test_bad_text_is_refused(roles, tmp_path, monkeypatch):
    refused(
        "`window` must be shorter than every text, got 20 for 20 characters (test) of 'ANN'.",
        data.shakespeare,
        window=20,
        validation=0.5,
        path=roles,
    )
    refused("`roles` must be at most 3, the roles of the file, got 4.", data.shakespeare, 4, path=roles)
    refused(
        "`roles` must be one of the catalogue's, got 'EVA'; nearest: EVE.",
        data.shakespeare,
        ["EVA"],
        path=roles,
    )
    refused("`window` must be a whole number >= 1, got 0.", data.shakespeare, window=0, path=roles)
    refused(
        "`validation` must be a fraction in [0, 1), got 1.0.", data.shakespeare, validation=1.0, path=roles
    )
    broken = tmp_path / "broken.json.xz"
    for content, match in (
        (b"hello", f"cannot read {broken} as .json.xz: "),
        (roles.read_bytes()[:40], f"cannot read {broken} as .json.xz: "),
        (lzma.compress(b"{"), f"cannot read {broken} as .json.xz: "),
        (
            lzma.compress(b'{"ANN": "text"}'),
            'a file of roles must be {role: {"train": text, "test": text}}, got another form in',
        ),
        (lzma.compress(b"{}"), "a file of roles must be"),
    ):
        broken.write_bytes(content)
        refused(match, data.shakespeare, path=broken)
    monkeypatch.delenv("CONSILIENCE_DATA", raising=False)
    refused(
        "no folder to find shakespeare_roles.json.xz in: CONSILIENCE_DATA is not set; set it",
        data.shakespeare,
    )


MODELS = {
    "lstm": lambda: cs.models.char_lstm(6, 4, 5, 2),
    "transformer": lambda: cs.models.char_transformer(6, 7, 8, 2, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_character_models_run_in_federations(name, roles):
    parts = data.shakespeare(window=6, stride=4, path=roles)
    model = MODELS[name]()
    adam = cs.Training(epochs=12, lr=0.02, optimiser="adam", batch_size=8)
    result = cs.run(cs.settings.federated(parts[:2], 2), cs.methods.fedavg(), model, adam)
    assert (
        result.score > 0.45 > result.matrix[0].mean()
    )  # each role repeats four characters; the majority is a quarter
    x = parts[0].train.whole()[0]
    params, buffers = model.init(key(0, "init"))
    weight, bias = model.head(params, None)
    features = model.features(params, buffers, x)
    torch.testing.assert_close(
        features @ params[weight].T + params[bias], model(params, buffers, x, None, False)[0]
    )
    fed3r = cs.run(cs.settings.federated(parts, 1), cs.methods.fed3r(), model, adam)
    assert fed3r.score > 0.25


@pytest.mark.parametrize("name", MODELS)
def test_character_models_run_for_many_clients_at_once(name):
    """One program over stacked parameters gives what each gives alone: outputs and gradients."""
    model = MODELS[name]()
    x = torch.randint(6, (3, 4, 7), generator=key(1))
    y = torch.randint(6, (3, 4), generator=key(2))
    each = [{n: p.double() for n, p in model.init(key(i))[0].items()} for i in range(3)]

    def loss(params, x, y):
        return nn.functional.cross_entropy(model(params, {}, x, None, True)[0], y)

    together = torch.func.vmap(torch.func.grad(loss))(
        {n: torch.stack([p[n] for p in each]) for n in each[0]}, x, y
    )
    for i, params in enumerate(each):
        alone = torch.func.grad(loss)(params, x[i], y[i])
        for n, g in alone.items():
            torch.testing.assert_close(together[n][i], g, rtol=1e-9, atol=1e-12)


def test_the_lstm_is_torchs():
    model = cs.models.char_lstm(6, 4, 5, 2)
    params, _ = model.init(key(0))
    reference = nn.LSTM(4, 5, 2, batch_first=True)
    with torch.no_grad():
        for i in range(2):
            for ours, theirs in (("input", "weight_ih"), ("state", "weight_hh"), ("bias", "bias_ih")):
                getattr(reference, f"{theirs}_l{i}").copy_(params[f"body.{i}.{ours}"])
            getattr(reference, f"bias_hh_l{i}").zero_()
    x = torch.randint(6, (3, 9), generator=key(1))
    states, _ = reference(params["embedding.weight"][x])
    torch.testing.assert_close(model.features(params, {}, x), states[:, -1])
    assert all(p.abs().max() <= 5**-0.5 for n, p in params.items() if n.startswith("body"))


def test_the_transformer_is_causal_and_torchs():
    from consilience.models.nets import Attention, CharTransformer

    torch.manual_seed(0)
    net = CharTransformer(6, 9, 8, 2, 2)
    x = torch.randint(6, (3, 9), generator=key(1))
    states = net.body(net.embedding(x) + net.places)
    changed = x.clone()
    changed[:, 5:] = (x[:, 5:] + 1) % 6
    other = net.body(net.embedding(changed) + net.places)
    torch.testing.assert_close(states[:, :5], other[:, :5])
    assert not torch.allclose(states[:, 5:], other[:, 5:])

    mine, theirs = (
        Attention(8, 2),
        nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True),
    )
    pairs = {
        "norm1": "norm1",
        "norm2": "norm2",
        "out": "self_attn.out_proj",
        "mlp.0": "linear1",
        "mlp.2": "linear2",
    }
    weights = {
        f"{b}.{k}": mine.state_dict()[f"{a}.{k}"] for a, b in pairs.items() for k in ("weight", "bias")
    }
    weights |= {f"self_attn.in_proj_{k}": mine.state_dict()[f"qkv.{k}"] for k in ("weight", "bias")}
    theirs.load_state_dict(weights)
    z = torch.randn(3, 9, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    torch.testing.assert_close(mine(z), theirs(z, src_mask=mask, is_causal=True), rtol=1e-4, atol=1e-5)


def test_bad_character_models_are_refused(roles):
    refused("`hidden` must be a whole number >= 1, got 0.", cs.models.char_lstm, hidden=0)
    refused(
        "`width` must be a multiple of `heads`, got width=9 and heads=2.",
        cs.models.char_transformer,
        width=9,
        heads=2,
    )
    parts = data.shakespeare(window=6, path=roles)
    for model, match in (
        (
            cs.models.char_lstm(5),
            "the model must have an output for each of the 6 classes, got 5 outputs",
        ),
        (cs.models.char_transformer(6, 4, 8, 2), "samples must fit the model's input, got (6,)"),
        (cs.models.mlp(6, (4,), 6), "samples must fit the model's input, got (6,)"),
    ):
        refused(match, cs.run, cs.settings.federated(parts, 1), cs.methods.fedavg(), model)


@real
def test_shakespeare_has_a_hundred_roles():
    every = data.shakespeare()
    texts = json.loads(lzma.decompress(TEXT.read_bytes()))
    assert len(every) == 100 and all(len(s.labels) == 64 for s in every)
    first = every[1]
    characters = [c for _, c in first.labels]
    x, y = first.test.whole()
    assert "".join(characters[c] for c in x[3].tolist()) == texts["MENENIUS"]["test"][30:110]
    assert characters[int(y[3])] == texts["MENENIUS"]["test"][110]
    assert all(len(s.train) > 100 and len(s.validation) > 5 and len(s.test) > 30 for s in every)
    assert data.shakespeare(stride=1)[1].train.whole()[0].untyped_storage().nbytes() < 10 * len(
        texts["MENENIUS"]["train"]
    )


@real
@pytest.mark.slow
def test_roles_learn_together_to_predict_characters():
    parts = data.shakespeare(5, window=40)
    seen = torch.cat([s.train.targets() for s in parts]).bincount().argmax()
    majority = np.mean([float((s.test.targets() == seen).double().mean()) for s in parts])
    adam = cs.Training(epochs=2, lr=0.005, optimiser="adam")
    result = cs.run(
        cs.settings.federated(parts, 4, evaluate_every=4),
        cs.methods.fedavg(),
        cs.models.char_lstm(64, 8, 64),
        adam,
    )
    assert result.score > majority + 0.05
