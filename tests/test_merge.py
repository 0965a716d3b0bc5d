"""Merging files of any size: identities, the same bits in and out of core, what is carried along, and what
is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import consilience as cs
from consilience import aggregators
from consilience.aggregators import _select
from consilience.cli.main import main
from consilience.core.aggregator import Aggregator, Blockwise
from consilience.core.errors import ConsilienceError
from consilience.core.params import key
from consilience.merging._files import opened

State = dict[str, Tensor]
AGGREGATORS: dict[str, Callable[[], Aggregator]] = {
    "mean": aggregators.mean,
    "arithmetic": lambda: aggregators.arithmetic(1.5),
    "ties": lambda: aggregators.ties(0.3),
    "dare": lambda: aggregators.dare(0.5),
    "median": aggregators.median,
    "trimmed_mean": lambda: aggregators.trimmed_mean(0.2),
    "pcgrad": aggregators.pcgrad,
    "mgda": aggregators.mgda,
    "geometric_median": aggregators.geometric_median,
    "krum": lambda: aggregators.krum(0),
}
SHAPES = {
    "a.weight": (5, 7),
    "a.bias": (5,),
    "b.weight": (3, 2, 2, 2),
    "scalar": (),
    "empty": (0, 4),
    "z": (101,),
}


def model(
    seed: int,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    step: float = 0.0,
) -> State:
    g = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    return {n: ((t / step).round() * step if step else t).to(dtype) for n, t in made.items()}


def near(base: State, seed: int, size: float = 0.1, step: float = 0.0) -> State:
    moved = model(seed, {n: tuple(t.shape) for n, t in base.items()}, torch.float64, step)
    return {
        n: (t.double() + size * moved[n]).to(t.dtype) if t.is_floating_point() else t.clone()
        for n, t in base.items()
    }


def keep(folder: Path, **models: State) -> list[Path]:
    paths = [folder / f"{n}.safetensors" for n in models]
    for path, m in zip(paths, models.values(), strict=True):
        save_file(m, path)
    return paths


def flat(m: State) -> Tensor:
    return torch.cat([m[n].reshape(-1) for n in sorted(m)])


@pytest.fixture
def three(tmp_path: Path) -> tuple[State, list[State], Path, list[Path]]:
    base = model(0)
    experts = [near(base, i) for i in (1, 2, 3)]
    path, *paths = keep(tmp_path, base=base, **{f"e{i}": e for i, e in enumerate(experts)})
    return base, experts, path, paths


# Identities


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("per", ["model", "tensor"])
def test_files_and_memory_give_the_same_bits_and_what_the_aggregator_says(three, tmp_path, name, per):
    base, experts, path, paths = three
    a = AGGREGATORS[name]()
    inside = cs.merge(base, experts, a, per=per, seed=3)
    outside = load_file(cs.merge(path, paths, a, tmp_path / "out.safetensors", per=per, seed=3))
    turned = cs.merge(base, experts[::-1], a, per=per, seed=3)
    assert inside.keys() == base.keys()
    for n in base:
        assert torch.equal(inside[n], outside[n]) and torch.equal(inside[n], turned[n]), n
        assert inside[n].dtype == base[n].dtype and inside[n].shape == base[n].shape
    if per == "model":
        rows = torch.stack([flat(e) - flat(base) for e in experts])
        whole = flat(base) + a(rows, generator=torch.Generator().manual_seed(3))
        assert torch.allclose(flat(inside), whole, atol=2e-6)
    else:
        n = "a.weight"
        rows = torch.stack([(e[n] - base[n]).flatten() for e in experts])
        found = a(rows, generator=key(3, n))
        assert torch.allclose(inside[n].flatten(), base[n].flatten() + found, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_coefficient_one_is_the_expert_and_zero_the_base_to_the_bit(tmp_path, dtype):
    base = model(0, dtype=dtype)
    expert = near(base, 1)
    path, e = keep(tmp_path, base=base, e=expert)
    for b, x in ((base, expert), (path, e)):
        one, none = (
            cs.merge(b, [x], aggregators.arithmetic(1.0)),
            cs.merge(b, [x], aggregators.arithmetic(0.0)),
        )
        assert all(torch.equal(one[n], expert[n]) and torch.equal(none[n], base[n]) for n in base)


def test_mean_is_base_and_the_mean_of_changes_and_opposites_give_the_base(three):
    base, experts, *_ = three
    merged = cs.merge(base, experts)
    for n in base:
        assert torch.allclose(merged[n], base[n] + sum(e[n] - base[n] for e in experts) / 3, atol=1e-6)
    there = {n: t.double() for n, t in base.items()}
    plus, minus = ({n: t + s * 0.125 for n, t in there.items()} for s in (1, -1))
    for a in (aggregators.arithmetic(2.0), aggregators.ties(1.0), aggregators.ties(0.2)):
        back = cs.merge(there, [plus, minus], a)
        assert all(torch.allclose(back[n], there[n], atol=1e-15) for n in there)


def test_negation_forgets_and_analogies_add(three):
    base, (a, b, c), *_ = three
    negated = cs.merge(base, [a], aggregators.arithmetic(1.0), weights=[-1.0])
    analogy = cs.merge(base, [a, b, c], aggregators.arithmetic(1.0), weights=[1.0, 1.0, -1.0])
    for n in base:
        assert torch.allclose(negated[n], 2 * base[n] - a[n], atol=1e-5)
        assert torch.allclose(analogy[n], a[n] + b[n] - c[n], atol=1e-5)


def test_sums_of_many_small_changes_keep_their_digits():
    """sum of eight task vectors: eight parameters minus seven bases would lose most of what changed."""
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(4000, generator=g)}
    experts = [{"w": base["w"] + 1e-4 * torch.randn(4000, generator=g)} for _ in range(8)]
    wanted = sum((e["w"].double() - base["w"].double() for e in experts), base["w"].double())
    found = cs.merge(base, experts, aggregators.arithmetic(8.0))["w"].double()
    assert float((found - wanted).abs().max()) < 4e-7


def test_without_a_base_parameters_are_combined(three):
    _, experts, _, paths = three
    for given_ in (experts, paths):
        found = cs.merge(None, given_)
        assert all(torch.allclose(found[n], sum(e[n] for e in experts) / 3, atol=1e-6) for n in found)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    m=st.integers(1, 4),
    density=st.floats(0.02, 1.0),
    step=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    block=st.sampled_from([1, 7, 64]),
)
def test_ties_over_entries_of_any_size(sizes, m, density, step, dtype, block):
    """However entries and blocks cut the vector, the trim keeps exactly ceil(density n) of each change."""
    shapes = {f"{i}.{n}": (n,) for i, n in enumerate(sizes)}
    if not sum(sizes):
        return
    base = model(0, shapes, dtype, step)
    experts = [near(base, i + 1, 1.0, step) for i in range(m)]
    small = type("Small", (type(aggregators.ties()),), {"block": block})
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    merged = cs.merge(base, experts, small(density))
    rows = torch.stack([flat(e).to(wide) - flat(base).to(wide) for e in experts])
    wanted = (flat(base).to(wide) + aggregators.ties(density)(rows)).to(dtype)
    assert torch.equal(flat(merged), wanted)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]),
        min_size=5,
        max_size=5,
    ),
    m=st.integers(1, 4),
    a=st.sampled_from(["mean", "arithmetic", "ties", "dare", "median", "mgda"]),
    per=st.sampled_from(["model", "tensor"]),
    threads=st.integers(1, 2),
)
def test_any_shapes_and_dtypes_in_files_and_in_memory(tmp_path_factory, shapes, dtypes, m, a, per, threads):
    """Names, shapes and dtypes stay; files and memory give the same bits; a merge of copies of one expert is
    that expert, but for trims."""
    named_ = {f"{i}": tuple(s) for i, s in enumerate(shapes)}
    kinds = dict(zip(named_, dtypes, strict=False))
    base = {n: t.to(kinds[n]) for n, t in model(0, named_, torch.float64, 0.25).items()}
    if not any(t.is_floating_point() for t in base.values()):
        return
    experts = [near(base, i + 1) for i in range(m)]
    folder = tmp_path_factory.mktemp("any")
    path, *paths = keep(folder, base=base, **{f"e{i}": e for i, e in enumerate(experts)})
    made = AGGREGATORS[a]()
    inside = cs.merge(base, experts, made, per=per, seed=1, threads=threads)
    outside = load_file(cs.merge(path, paths, made, folder / "out.safetensors", per=per, seed=1))
    for n, t in base.items():
        assert (
            inside[n].dtype == t.dtype and inside[n].shape == t.shape and torch.equal(inside[n], outside[n])
        )
        assert t.is_floating_point() or torch.equal(inside[n], t)
    if a in ("mean", "median", "mgda"):
        same = cs.merge(base, [experts[0]] * m, made, per=per)
        for n, t in experts[0].items():
            assert torch.allclose(
                same[n].double(),
                t.double(),
                rtol=4 * (torch.finfo(t.dtype).eps if t.is_floating_point() else 1),
                atol=1e-6,
            )


# Exact selection


def restated(row: Tensor, k: int) -> Tensor:
    order = torch.argsort(-row.abs(), stable=True)[:k]
    kept = torch.zeros_like(row)
    kept[order] = row[order]
    return kept


@pytest.mark.parametrize("kind", ["normal", "ties", "mostly zeros", "one value", "misled", "halves"])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.93])
def test_selection_is_exact_wherever_the_sample_leads(kind, density, monkeypatch):
    """A sample of the heads of blocks brackets the threshold, or is misled: the count is exact and ties fall
    by index."""
    monkeypatch.setattr(_select, "SAMPLE", 400)
    block, n = 512, 512 * 23 + 77
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(3, n, generator=g)
    if kind == "ties":
        rows = (rows * 3).round()
    if kind == "mostly zeros":
        rows *= torch.rand(3, n, generator=g) < 0.05
    if kind == "one value":
        rows = rows.sign() * 0.25
    if kind == "misled":
        rows *= torch.where(torch.arange(n) % block < 64, 1e-3, 1.0)
    if kind == "halves":
        rows = rows.half().float()
    taken: list[str] = []
    begin = _select.Digits.begin
    monkeypatch.setattr(_select.Digits, "begin", staticmethod(lambda *a: taken.append("digits") or begin(*a)))
    small = type("Small", (type(aggregators.ties()),), {"block": block})
    for row in rows:
        a = small(density)
        assert torch.equal(a(row[None], [1.0]), restated(row, a.kept(n)))
    assert kind != "misled" or density in (0.001, 0.93) or taken, "the exact fallback was not reached"
    assert kind != "normal" or not taken, "the bracket was missed on ordinary rows"


def test_selection_holds_few_candidates(monkeypatch):
    monkeypatch.setattr(_select, "MOST", 100)
    row = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    a = aggregators.ties(0.2)
    assert torch.equal(a(row[None], [1.0]), restated(row, a.kept(len(row))))


# What is merged and what is not


def test_integers_and_tied_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("flags", torch.tensor([True, False]))

    torch.manual_seed(0)
    base, a, b = Tied(), Tied(), Tied()
    b.norm.num_batches_tracked += 7
    merged = cs.merge(base, {"a": a, "b": b}, aggregators.arithmetic(1.0))
    assert torch.allclose(merged["embed.weight"], (a.embed.weight + b.embed.weight) / 2, atol=1e-6)
    assert merged["head.weight"].data_ptr() == merged["embed.weight"].data_ptr()
    assert merged["norm.num_batches_tracked"] == 0 and torch.equal(merged["flags"], base.flags)
    fresh = Tied()
    fresh.load_state_dict(merged)
    out = cs.merge(base, [a, b], None, tmp_path / "tied.safetensors")
    kept = load_file(out)
    assert torch.equal(kept["head.weight"], kept["embed.weight"]) and torch.equal(
        kept["embed.weight"], merged["embed.weight"]
    )
    once = cs.merge(base, [a, b], aggregators.ties(0.5))  # a tied weight counts once
    rows = [
        torch.cat(
            [(e[n] - base.state_dict()[n]).flatten() for n in ("embed.weight", "norm.bias", "norm.weight")]
        )
        for e in (a.state_dict(), b.state_dict())
    ]
    change = aggregators.ties(0.5)(torch.stack(rows))
    assert torch.allclose(
        once["embed.weight"].flatten(), base.embed.weight.flatten() + change[:24], atol=1e-6
    )


class Normed(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.inner = nn.InstanceNorm1d(6, track_running_stats=True)
        for layer in (self.norm, self.inner):
            layer.running_mean = torch.randn(6)
            layer.running_var = torch.rand(6) * (1 + 5 * seed)


EXTRAPOLATE = {
    "arithmetic": aggregators.arithmetic(2.0),
    "dare": aggregators.dare(0.3),
    "dare ties": aggregators.dare(0.2, aggregators.ties(1.0)),
    "ties": aggregators.ties(0.5),
    "mean": aggregators.mean(),
    "median": aggregators.median(),
}


@pytest.mark.parametrize("name", EXTRAPOLATE)
@pytest.mark.parametrize("per", ["model", "tensor"])
def test_running_statistics_are_averaged(name, per, tmp_path):
    """Of batch norm and instance norm, in memory and on disk; none is negative, and what is else stays."""
    base, *experts = [Normed(i).state_dict() for i in range(4)]
    save_file(base, tmp_path / "base.safetensors")
    for i, e in enumerate(experts):
        save_file(e, tmp_path / f"{i}.safetensors")
    files = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    a, allowed = EXTRAPOLATE[name], {"allow": ["other_base"], "per": per}
    made = cs.merge(base, experts, a, **allowed)
    written = load_file(
        cs.merge(str(tmp_path / "base.safetensors"), files, a, tmp_path / "out.safetensors", **allowed)
    )
    statistics = [n for n in made if "running" in n]
    assert len(statistics) == 4 and all(torch.equal(made[n], written[n]) for n in made)
    for n in statistics:
        assert torch.allclose(made[n], sum(e[n] for e in experts) / 3, atol=1e-6)

    # All else is what it is without statistics.
    def rest(entries):
        return {n: t for n, t in entries.items() if n not in statistics}

    alone = cs.merge(rest(base), [rest(e) for e in experts], a, **allowed)
    assert all(torch.allclose(alone[n], made[n], atol=1e-6) for n in alone)


def test_running_statistics_have_shares_that_are_not_negative():
    base, *experts = [Normed(i).state_dict() for i in range(3)]
    n = "norm.running_var"
    for weights, shares in (([2.0, -1.0], [1, 0]), ([3.0, 1.0], [0.75, 0.25]), ([0.2, 0.3], [0.2, 0.3])):
        for a in (aggregators.mean(), aggregators.arithmetic()):
            made = cs.merge(base, experts, a, weights=weights)[n]
            mean = sum(w * e[n] for w, e in zip(shares, experts, strict=True)) + (1 - sum(shares)) * base[n]
            assert torch.allclose(made, mean, atol=1e-6)
    far = cs.merge(base, experts, scales={"norm.*": 9.0})[n]
    assert torch.allclose(far, (experts[0][n] + experts[1][n]) / 2, atol=1e-6)
    plain = cs.merge(None, experts, weights=[-1.0, -1.0])[n]
    assert torch.allclose(plain, (experts[0][n] + experts[1][n]) / 2, atol=1e-6)


def test_scales_by_pattern(three):
    base, experts, *_ = three
    for a in (aggregators.mean(), aggregators.ties(0.5)):
        whole, half = cs.merge(base, experts, a), cs.merge(base, experts, a, scales={"a.*": 0.5, "z": 0.0})
        assert torch.allclose(half["a.weight"], (base["a.weight"] + whole["a.weight"]) / 2, atol=1e-6)
        assert torch.allclose(half["z"], base["z"], atol=1e-7) and torch.equal(
            half["b.weight"], whole["b.weight"]
        )
    with pytest.raises(ConsilienceError, match=r"must fit some entry, got 'c\.\*'"):
        cs.merge(base, experts, scales={"c.*": 1.0})


def test_heads_are_kept(three, tmp_path):
    base, experts, *_ = three
    heads = [{**e, "head.weight": torch.full((i + 2, 3), float(i))} for i, e in enumerate(experts)]
    base = {**base, "head.weight": torch.zeros(1, 3)}
    paths = keep(tmp_path, **{f"m{i}": e for i, e in enumerate([base, *heads])})
    with pytest.raises(ConsilienceError, match="'head.weight' has shape"):
        cs.merge(paths[0], paths[1:])
    out = cs.merge(paths[0], paths[1:], None, tmp_path / "out", keep=["head.*"])
    assert torch.equal(load_file(out / "model.safetensors")["head.weight"], base["head.weight"])
    assert torch.equal(load_file(out / "kept" / "m2.safetensors")["head.weight"], heads[1]["head.weight"])


def test_vocabularies(three):
    base, experts, *_ = three
    base = {**base, "embed": torch.zeros(5, 2)}
    grown = [{**e, "embed": torch.full((4 + i, 2), 1.0 + i)} for i, e in enumerate(experts)]
    with pytest.raises(ConsilienceError, match=r"'embed' has shape \[4, 2\]"):
        cs.merge(base, grown)
    merged = cs.merge(base, grown, allow=["vocabulary"])
    assert merged["embed"].tolist() == [[2.0, 2.0]] * 4 + [[0.0, 0.0]]


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_adapters_are_merged_as_products(tmp_path, rslora):
    g = torch.Generator().manual_seed(0)
    base = {
        "model.q.weight": torch.randn(6, 5, generator=g),
        "model.v.weight": torch.randn(4, 6, generator=g),
        "model.norm": torch.ones(6),
    }
    (path,) = keep(tmp_path, base=base)
    folders, products = [], []
    for i, rank in enumerate((2, 3)):
        a, b = torch.randn(rank, 5, generator=g), torch.randn(6, rank, generator=g)
        folder = tmp_path / f"adapter{i}"
        folder.mkdir()
        save_file(
            {"base_model.model.model.q.lora_A.weight": a, "base_model.model.model.q.lora_B.weight": b},
            folder / "adapter_model.safetensors",
        )
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4, "use_rslora": rslora})
        )
        folders.append(folder)
        products.append(b @ a * 4 / (rank**0.5 if rslora else rank))
    merged = load_file(cs.merge(path, folders, aggregators.arithmetic(2.0), tmp_path / "out.safetensors"))
    assert torch.allclose(merged["model.q.weight"], base["model.q.weight"] + sum(products), atol=1e-5)
    assert torch.equal(merged["model.v.weight"], base["model.v.weight"])
    entries = opened(folders[0], opened(path))
    whole = entries.read("model.q.weight", 0, 30)
    assert torch.equal(
        torch.cat([entries.read("model.q.weight", i, min(30, i + 4)) for i in range(0, 30, 4)]), whole
    )
    (folders[0] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    with pytest.raises(ConsilienceError, match="must be LoRA, got DoRA"):
        cs.merge(path, folders)


def test_normalisation_is_folded():
    g = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(3, 4, 3).double()
    x = torch.rand(2, 3, 8, 8, generator=g, dtype=torch.float64)
    norm = lambda m, s: (x - torch.tensor(m)[:, None, None]) / torch.tensor(s)[:, None, None]  # noqa: E731
    m1, s1, m2, s2 = [0.5, 0.4, 0.3], [0.2, 0.3, 0.1], [0.0, 0.1, 0.2], [1.0, 0.5, 0.25]
    params = {f"conv.{n}": p.detach() for n, p in layer.named_parameters()}
    folded = cs.merging.fold_normalisation(params, "conv", m1, s1, m2, s2)
    wanted = layer(norm(m1, s1).double())
    found = torch.func.functional_call(
        layer, {n.removeprefix("conv."): p for n, p in folded.items()}, (norm(m2, s2).double(),)
    )
    assert torch.allclose(wanted, found, atol=1e-12)


# Folders as on the hub


@pytest.fixture
def hub(tmp_path: Path, three) -> tuple[Path, list[Path]]:
    """A sharded base and an expert a file, with what lies next to weights."""
    base, experts, *_ = three
    folder = tmp_path / "hub"
    folder.mkdir()
    names = sorted(base)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, part in shards.items():
        save_file({n: base[n] for n in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in shards.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "tiny", "hidden_size": 5}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    others = []
    for i, e in enumerate(experts):
        other = tmp_path / f"expert{i}"
        other.mkdir()
        save_file(e, other / "model.safetensors")
        (other / "config.json").write_text('{"model_type": "tiny", "hidden_size": 5}')
        others.append(other)
    return folder, others


def test_shards_and_what_lies_beside(hub, three, tmp_path):
    folder, others = hub
    base, experts, *_ = three
    wanted = cs.merge(base, experts, aggregators.ties(0.4))
    out = cs.merge(folder, others, aggregators.ties(0.4), tmp_path / "deep" / "out")
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "merge.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for n in base:
        assert torch.equal(load_file(out / index["weight_map"][n])[n], wanted[n])
    again = opened(out)
    assert all(torch.equal(again.read(n, 0, again.size(n)), wanted[n].flatten()) for n in base)
    recipe = json.loads((out / "merge.json").read_text())
    assert recipe["aggregator"] == "Ties(density=0.4)" and len(recipe["experts"]) == 3
    small = cs.merge(folder, others, None, tmp_path / "small", shard=300, out_dtype=torch.bfloat16)
    files = sorted(small.glob("*.safetensors"))
    assert len(files) > 1 and all(t.dtype == torch.bfloat16 for f in files for t in load_file(f).values())
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 300 for f in files)


def test_other_configurations_are_refused(hub):
    folder, others = hub
    (others[1] / "config.json").write_text('{"model_type": "tiny", "hidden_size": 6}')
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    (others[2] / "preprocessor_config.json").write_text('{"image_mean": [0.4]}')
    with pytest.raises(ConsilienceError) as e:
        cs.merge(folder, others)
    assert (
        "hidden_size = 6" in str(e.value)
        and "image_mean = [0.4]" in str(e.value)
        and "fold_normalisation" in str(e.value)
    )
    cs.merge(folder, others, allow=["configuration"])


# What is refused


def test_every_problem_is_told_and_nothing_written(three, tmp_path):
    base, experts, path, paths = three
    bad = dict(experts[0])
    del bad["a.bias"]
    bad["b.weight"], bad["more"] = torch.zeros(3), torch.zeros(2)
    save_file(bad, paths[0])
    save_file({**experts[1], "z": torch.zeros(101, dtype=torch.int32)}, paths[1])
    with pytest.raises(ConsilienceError) as e:
        cs.merge(path, paths, None, tmp_path / "out.safetensors")
    for said in (
        "e0.safetensors: 'a.bias' is missing",
        "'b.weight' has shape [3], in",
        "'more' is not in",
        "e1.safetensors: 'z' is torch.int32",
    ):
        assert said in str(e.value), str(e.value)
    assert not list(tmp_path.glob("out*"))
    fine = {n: t for n, t in experts[0].items() if n != "a.bias"} | {"more": torch.zeros(2)}
    merged = cs.merge(base, [fine, experts[1]], allow=["missing", "extra"])
    assert (
        torch.allclose(merged["a.bias"], (base["a.bias"] + experts[1]["a.bias"]) / 2, atol=1e-6)
        and "more" not in merged
    )


@pytest.mark.parametrize("name", ["mean", "ties", "median", "pcgrad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_by_tensor_and_file(three, tmp_path, name, value):
    base, experts, path, paths = three
    a = AGGREGATORS[name]()
    bad = {n: t.clone() for n, t in experts[2].items()}
    bad["b.weight"][1, 0, 0, 0] = value
    save_file(bad, paths[2])
    with pytest.raises(ConsilienceError, match=r"NaN or infinity in 'b.weight' of .*e2.safetensors"):
        cs.merge(path, paths, a, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))
    merged = cs.merge(path, paths, a, allow=["non_finite"])
    assert torch.equal(merged["b.weight"], base["b.weight"]) and not torch.equal(merged["z"], base["z"])


def test_what_does_not_fit_its_dtype_is_refused():
    base = {"w": torch.zeros(3, dtype=torch.float16)}
    expert = {"w": torch.tensor([1.0, 60000.0, 2.0], dtype=torch.float16)}
    with pytest.raises(ConsilienceError, match=r"fit in torch.float16 .* larger ones in 'w'"):
        cs.merge(base, [expert], aggregators.arithmetic(2.0))
    assert cs.merge(base, [expert], aggregators.arithmetic(2.0), out_dtype=torch.float32)["w"][1] == 120000


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-7])


def lie(path: Path) -> None:
    data = path.read_bytes().replace(b'"shape":[101]', b'"shape":[100]')
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, r"e1.safetensors is truncated: its header promises \d+ bytes, got \d+"),
        (lie, r"must give 'z' 400 bytes, got 404"),
        (
            lambda p: p.write_bytes(b"PK\x03\x04" + b"0" * 50),
            "got a pickle at .*e1.safetensors: a pickle can run code and is not read",
        ),
        (lambda p: p.write_bytes(b"\x80\x02" + b"0" * 50), "a pickle can run code"),
        (lambda p: p.write_bytes(b""), "ends within its safetensors header, after 0 bytes"),
        (
            lambda p: p.write_bytes((20).to_bytes(8, "little") + b"not json at all....."),
            "has no JSON header",
        ),
        (lambda p: p.unlink(), "a file or a folder of safetensors, got nothing at"),
    ],
)
def test_broken_files(three, tmp_path, harm, said):
    _, _, path, paths = three
    harm(paths[1])
    with pytest.raises(ConsilienceError, match=said):
        cs.merge(path, paths, None, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("length", [640, 1152, 19280])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    head = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + head + torch.ones(2).numpy().tobytes())
    assert cs.merge(path, [path])["w"].tolist() == [1.0, 1.0]


def test_pickles_and_lost_shards(hub, tmp_path):
    folder, others = hub
    with pytest.raises(ConsilienceError, match="a pickle can run code"):
        cs.merge(folder / "pytorch_model.bin", others)
    (others[0] / "model.safetensors").rename(others[0] / "pytorch_model.bin")
    with pytest.raises(ConsilienceError, match="a pickle can run code"):
        cs.merge(folder, others)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConsilienceError, match="lacks model-00002-of-00002.safetensors"):
        cs.merge(folder, others[1:])


def test_another_base_is_refused(tmp_path):
    base, stranger = model(0), model(9)
    paths = keep(tmp_path, base=base, near=near(base, 1), stranger=stranger)
    with pytest.raises(
        ConsilienceError, match=r"must come from the base .*stranger.safetensors, whose distance is"
    ):
        cs.merge(paths[0], paths[1:])
    cs.merge(paths[0], paths[1:], allow=["other_base"])


def test_bad_arguments(three, tmp_path):
    base, experts, *_ = three
    for call, said in (
        (lambda: cs.merge(base, []), "needs experts, got none"),
        (lambda: cs.merge(base, experts, "ties"), "made by consilience.aggregators, such as ties"),
        (
            lambda: cs.merge(base, experts, weights=[1.0]),
            r"`weights` must be 3 numbers, finite, got \[1.0\]",
        ),
        (
            lambda: cs.merge(base, experts, aggregators.ties(), weights=[1.0, 1.0, -1.0]),
            "finite and not negative",
        ),
        (lambda: cs.merge(base, experts, per="layer"), "`per` must be"),
        (lambda: cs.merge(base, experts, allow=["all"]), "`allow` must be some of missing, extra"),
        (lambda: cs.merge(base, experts, importances=[base] * 3), r"an aggregator that weighs entries"),
        (lambda: cs.merge(base, [3]), "a path, a state dict or a module, got 3"),
        (lambda: cs.merge(base, experts, None, tmp_path), "`out` must be new"),
    ):
        with pytest.raises(ConsilienceError, match=said):
            call()


def test_an_interrupted_merge_leaves_nothing(three, tmp_path):
    _, _, path, paths = three

    def stop(done: int, whole: int) -> None:
        raise KeyboardInterrupt

    for out in ("out", "out.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            cs.merge(path, paths, aggregators.ties(), tmp_path / out, progress=stop)
    assert not list(tmp_path.glob("out*"))


def test_memory_stays_within_blocks(three, monkeypatch):
    """No aggregator that streams ever asks for more than a block of a tensor; one that does not is refused
    over its budget."""
    base, experts, *_ = three
    read, asked = opened(base).__class__.read, []
    monkeypatch.setattr(
        opened(base).__class__, "read", lambda self, n, a, b: asked.append(b - a) or read(self, n, a, b)
    )
    for a in (aggregators.ties(0.3), aggregators.median(), aggregators.dare(0.5)):
        small = type("Small", (type(a),), {"block": 16})(*vars(a).values())
        asked.clear()
        cs.merge(base, experts, small, threads=1)
        assert max(asked) <= 16
    whole = type("Whole", (Aggregator,), {"combine": lambda self, rows, weights, generator: rows.sum(0)})()
    assert not isinstance(whole, Blockwise)
    found = cs.merge(base, experts, whole)
    assert torch.allclose(found["z"], base["z"] + sum(e["z"] - base["z"] for e in experts), atol=1e-5)
    with pytest.raises(ConsilienceError, match="reads all rows at once: `memory` must be"):
        cs.merge(base, experts, whole, memory=100)


def test_threads_give_the_same_bits(three):
    base, experts, *_ = three
    small = type("Small", (type(aggregators.ties()),), {"block": 16})(0.3)
    for a in (small, aggregators.mean(), aggregators.mgda()):
        one, two = (cs.merge(base, experts, a, threads=t) for t in (1, 3))
        assert all(torch.equal(one[n], two[n]) for n in one)


# The command


def test_command(hub, tmp_path, capsys):
    folder, others = hub
    words = ["merge", str(folder), *map(str, others)]
    assert main([*words, "--aggregator", "ties", "--aggregator.density", "0.3", "--dry-run"]) == 0
    assert (
        "Ties(density=0.3)" in (said := capsys.readouterr().out)
        and "6 entries" in said
        and not (tmp_path / "o").exists()
    )
    assert (
        main(
            [
                *words,
                "--aggregator",
                "ties",
                "--aggregator.density=0.3",
                "-o",
                str(tmp_path / "o"),
                "--memory",
                "64MB",
            ]
        )
        == 0
    )
    assert "merged 3 experts" in capsys.readouterr().out
    (tmp_path / "merge.yaml").write_text(
        json.dumps(
            {
                "base": str(folder),
                "experts": list(map(str, others)),
                "aggregator": {"ties": {"density": 0.3}},
                "out": str(tmp_path / "p"),
            }
        )
    )
    assert main(["merge", "--config", str(tmp_path / "merge.yaml")]) == 0
    a, b = opened(tmp_path / "o"), opened(tmp_path / "p")
    assert all(torch.equal(a.read(n, 0, a.size(n)), b.read(n, 0, b.size(n))) for n in a.shapes)
    assert main([*words, "--aggregator", "dare", "--aggregator.then", "ties(1.0)", "--dry-run"]) == 0
    assert "then=Ties(density=1.0)" in capsys.readouterr().out
    assert (
        main([*words, "--weights", "0.5,0.25,0.25", "--scales", '{"a.*": 0.5}', "-o", str(tmp_path / "q")])
        == 0
    )
    assert json.loads((tmp_path / "q" / "merge.json").read_text())["weights"] == [0.5, 0.25, 0.25]
    capsys.readouterr()
    assert main(["merge", "--help"]) == 0
    assert "--allow-vocabulary" in (said := capsys.readouterr().out) and "--weights" in said
    assert "--dtype" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--agregator", "ties"], "nearest: --aggregator"),
        (["--aggregator", "tise"], "nearest: ties"),
        (
            ["--aggregator", "ties", "--aggregator.density", "2"],
            "`density` must be in (0, 1], got 2.0.",
        ),
        ([], "`--out` must be a new file or folder"),
        (["--memory", "much", "-o", "x"], "`--memory` must be bytes, such as 512MB, got 'much'"),
        (["--dtype", "float31", "-o", "x"], "nearest: float32"),
    ],
)
def test_command_says_what_is_wrong(hub, capsys, monkeypatch, tmp_path, more, said):
    monkeypatch.chdir(tmp_path)
    folder, others = hub
    assert main(["merge", str(folder), *map(str, others), *more]) == 2
    assert said in capsys.readouterr().err
    assert not os.path.exists("x")


def test_command_wants_experts(capsys):
    assert main(["merge", "one"]) == 2
    assert "needs a base (or none) and experts, got one." in capsys.readouterr().err


# What a careful reader found


def test_kept_entries_of_experts_of_one_name(three, tmp_path):
    base, experts, path, _ = three
    folders = [tmp_path / f"llama-3.{i}" for i in (1, 2)] + [tmp_path / "x" / "llama-3.1"]
    for i, (folder, e) in enumerate(zip(folders, experts, strict=True)):
        folder.mkdir(parents=True)
        save_file({**e, "z": torch.full((101,), float(i))}, folder / "model.safetensors")
    out = cs.merge(path, folders, None, tmp_path / "out", keep=["z"])
    found = {p.name: float(load_file(p)["z"][0]) for p in (out / "kept").iterdir()}
    assert found == {
        "llama-3.1.safetensors": 0.0,
        "llama-3.2.safetensors": 1.0,
        "llama-3.1-2.safetensors": 2.0,
    }
    for more, said in (({"keep": ["z"]}, "experts' own entries"), ({"shard": 100}, "several files")):
        with pytest.raises(ConsilienceError, match=f"`out` must be a folder to hold {said}"):
            cs.merge(path, folders, None, tmp_path / "one.safetensors", **more)
    with pytest.raises(ConsilienceError, match=r"`keep` has 'nix\.\*', which fits no entry"):
        cs.merge(base, experts, keep=["nix.*"])


def test_importances_fit_what_they_weigh(three, tmp_path):
    base, experts, *_ = three
    ones = {n: torch.ones_like(t) for n, t in base.items()}
    halves = [ones, {n: t * 3 for n, t in ones.items()}, ones]
    found = cs.merge(base, experts, aggregators.fisher(), importances=halves)
    assert torch.allclose(
        found["z"], (experts[0]["z"] + 3 * experts[1]["z"] + experts[2]["z"]) / 5, atol=1e-6
    )
    short = {n: t for n, t in ones.items() if n != "z"} | {"a.bias": torch.ones(2)}
    paths = keep(tmp_path, i=short, j=ones, k={**ones, "z": -ones["z"]})
    with pytest.raises(
        ConsilienceError, match=r"i.safetensors: 'a.bias' has shape \[2\]; .*i.safetensors: 'z' is missing"
    ):
        cs.merge(base, experts, aggregators.fisher(), importances=[paths[0], paths[1], paths[1]])
    with pytest.raises(
        ConsilienceError, match=r"finite and not negative, got others in 'z' of .*k.safetensors"
    ):
        cs.merge(base, experts, aggregators.fisher(), importances=[paths[1], paths[1], paths[2]])
    frozen = [
        {**e, "a.bias": base["a.bias"], "a.weight": base["a.weight"]} for e in experts
    ]  # the first changes are alike
    g = torch.Generator().manual_seed(5)
    drawn = [{n: torch.rand(t.shape, generator=g) for n, t in base.items()} for _ in range(3)]
    streamed = cs.merge(base, frozen, aggregators.fisher(), importances=drawn)
    rows = torch.stack([flat(e) - flat(base) for e in frozen])
    weights = torch.stack([flat(f) for f in drawn]) * torch.full((3, 1), 1 / 3)
    assert torch.equal(flat(streamed), flat(base) + aggregators.fisher()(rows, weights))


def test_a_tie_of_the_base_is_one_of_the_experts(tmp_path):
    e = torch.ones(4, 3)
    base = {"emb": e, "lm": e}
    tied = {"emb": e + 1, "lm": e + 1}
    assert torch.equal(cs.merge(base, [tied])["lm"], e + 1)
    with pytest.raises(ConsilienceError, match="'lm' is not 'emb', to which the base ties it"):
        cs.merge(base, [{"emb": e + 1, "lm": e + 5}])
    with pytest.raises(ConsilienceError, match="`keep` has one of 'emb' and 'lm', which are tied"):
        cs.merge(base, [tied], keep=["lm"])
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(
        {
            "base_model.model.lm.lora_A.weight": torch.ones(1, 3),
            "base_model.model.lm.lora_B.weight": torch.ones(4, 1),
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    base = {"emb.weight": e, "lm.weight": e}
    with pytest.raises(ConsilienceError, match="'lm.weight' is not 'emb.weight'"):
        cs.merge(base, [folder])
    whole = {"emb.weight": e.clone(), "lm.weight": torch.ones(4, 3, dtype=torch.int8)}
    with pytest.raises(ConsilienceError, match=r"lora changes 'lm.weight', which is torch.int8"):
        cs.merge(whole, [folder])


def test_places_that_are_taken_stay_as_they_are(three, tmp_path):
    _, _, path, paths = three
    out = tmp_path / "out.safetensors"
    with pytest.raises(ConsilienceError, match="was created during the merge"):
        cs.merge(path, paths, None, out, progress=lambda *_: out.write_text("precious"))
    assert out.read_text() == "precious" and not list(tmp_path.glob("out*part*"))
    for i in range(2):  # another merge's unfinished folder is not touched
        (tmp_path / f"deep.part-{os.getpid()}").mkdir(exist_ok=True)
        made = cs.merge(path, paths, None, tmp_path / f"deep{i}")
        assert (made / "model.safetensors").is_file() and (tmp_path / f"deep.part-{os.getpid()}").is_dir()
    with pytest.raises(KeyboardInterrupt):
        cs.merge(
            path,
            paths,
            None,
            tmp_path / "new" / "far" / "out",
            progress=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
    assert not (tmp_path / "new").exists()


def test_entries_draw_masks_of_their_own():
    base = {"a": torch.zeros(64), "b": torch.zeros(64)}
    found = cs.merge(base, [{"a": torch.ones(64), "b": torch.ones(64)}], aggregators.dare(0.5), per="tensor")
    assert not torch.equal(found["a"], found["b"])


@pytest.mark.parametrize("a", [aggregators.mean(), aggregators.arithmetic(2.0), aggregators.ties(1.0)])
def test_what_the_arithmetic_cannot_hold_is_refused(a):
    wide = {"w": torch.tensor([1e300, 1.0], dtype=torch.float64)}
    zero = {"w": torch.zeros(2, dtype=torch.float64)}
    for base, more in (
        ({"w": torch.zeros(2)}, {}),
        (zero, {"dtype": torch.float32}),
        (zero, {"out_dtype": torch.float32}),
    ):
        with pytest.raises(ConsilienceError, match="must fit in"):
            cs.merge(base, [wide, wide], a, **more)
    for bad in (torch.bfloat16, torch.float16):
        with pytest.raises(ConsilienceError, match="`dtype` of the arithmetic must be float32 or float64"):
            cs.merge(zero, [wide], a, dtype=bad)


def test_eight_bits():
    base = {"w": torch.zeros(4).to(torch.float8_e4m3fn)}
    one = {"w": torch.tensor([1.0, 2.0, 4.0, -1.0]).to(torch.float8_e4m3fn)}
    assert cs.merge(base, [one])["w"].float().tolist() == [1.0, 2.0, 4.0, -1.0]
    assert cs.merge(base, [one, one], aggregators.ties(0.5))["w"].float().tolist() == [0.0, 2.0, 4.0, 0.0]


def test_all_broken_files_and_numbers_are_told_at_once(three, tmp_path):
    base, experts, path, paths = three
    cut(paths[0])
    paths[1].write_bytes(b"PK\x03\x04" + b"0" * 50)
    with pytest.raises(ConsilienceError) as e:
        cs.merge(path, [*paths, tmp_path / "nix"])
    assert all(said in str(e.value) for said in ("cut in", "a pickle can run code", "got nothing at"))
    bad = [{n: t.clone() for n, t in x.items()} for x in experts]
    bad[0]["a.bias"][0] = bad[1]["z"][3] = bad[2]["z"][5] = torch.nan
    with pytest.raises(ConsilienceError, match=r"'a.bias' of a; 'z' of b, c"):
        cs.merge(base, dict(zip("abc", bad, strict=True)))
    asked = []
    found = cs.merge(base, bad, allow=["non_finite"], progress=lambda done, _: asked.append(done))
    assert torch.equal(found["z"], base["z"]) and torch.equal(found["a.bias"], base["a.bias"])
    assert len(asked) <= 2, "once more for all of them, not once for each"


def test_strangers_with_a_row_in_common_and_far_travellers(tmp_path):
    g = torch.Generator().manual_seed(0)
    base, stranger = ({"embed": torch.randn(400, 32, generator=g)} for _ in "ab")
    stranger["embed"][0] = base["embed"][0]
    small = {"embed": base["embed"] * 0.01}
    paths = keep(tmp_path, base=base, stranger=stranger, small=small)
    with pytest.raises(ConsilienceError, match="must come from the base"):
        cs.merge(paths[0], [paths[1]])
    cs.merge(paths[2], [paths[1]])


def test_what_needs_a_base_says_so(three):
    _, experts, *_ = three
    with pytest.raises(ConsilienceError, match="Ties combines changes and needs a base, got none."):
        cs.merge(None, experts, aggregators.ties())
    assert cs.merge(None, experts[:2], aggregators.slerp()).keys() == experts[0].keys()
    with pytest.raises(ConsilienceError, match="`threads` must be at least 1, got -1"):
        cs.merge(None, experts, threads=-1)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": ["0", 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"shape": [2]},
        3,
    ],
)
def test_headers_that_lie_about_anything(tmp_path, entry):
    head = json.dumps({"w": entry}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + torch.ones(2).numpy().tobytes())
    with pytest.raises(ConsilienceError, match=r"w\.safetensors"):
        cs.merge(path, [path])


def test_configurations_that_are_no_objects(hub):
    folder, others = hub
    (others[0] / "config.json").write_text("[]")
    with pytest.raises(ConsilienceError, match="a JSON object, got a list"):
        cs.merge(folder, others)
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ConsilienceError, match="a JSON object, got a list"):
        cs.merge(folder, [adapter])
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(
        ConsilienceError, match="got a pickle at .*adapter_model.bin: a pickle can run code and is not read"
    ):
        cs.merge(folder, [adapter])


def test_the_configuration_tells_the_dtype_written(hub, tmp_path):
    folder, others = hub
    for f in (folder, *others):
        (f / "config.json").write_text('{"model_type": "tiny", "torch_dtype": "float32"}')
    out = cs.merge(folder, others, None, tmp_path / "out", out_dtype=torch.bfloat16)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ({"aggregator": {"ties": {"densty": 0.5}}}, "nearest: --aggregator.density"),
        ({"aggregator": {"ties": 0.2}}, "must be a name, or one with a mapping of its options"),
        ({"experts": 3}, "`experts` must be a list of text, got 3"),
        ({"allow": {"missing": 1}}, "`allow` must be a list of text"),
    ],
)
def test_yaml_says_what_is_wrong(hub, tmp_path, capsys, lines, said):
    folder, others = hub
    config = {"base": str(folder), "experts": list(map(str, others)), "out": str(tmp_path / "o"), **lines}
    (tmp_path / "m.yaml").write_text(json.dumps(config))
    assert main(["merge", "--config", str(tmp_path / "m.yaml")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_yaml_takes_what_the_command_line_takes(hub, tmp_path, capsys):
    folder, others = hub
    config = {
        "base": str(folder),
        "experts": str(others[0]),
        "aggregator": {"ties": {"density": 0.2}},
        "weights": None,
        "dry-run": True,
        "allow": "missing",
        "out-dtype": "float16",
    }
    (tmp_path / "m.yaml").write_text(json.dumps(config))
    assert main(["merge", "--config", str(tmp_path / "m.yaml")]) == 0
    assert "Ties(density=0.2)" in capsys.readouterr().out
    assert main(["merge", "--config", str(tmp_path / "m.yaml"), "--aggregator", "dare"]) == 0
    assert "Dare(density=0.1" in capsys.readouterr().out, "options of another aggregator do not stay"


def test_diagnosis_of_an_adapter(tmp_path, capsys):
    (path,) = keep(tmp_path, base={"q.weight": torch.randn(3, 2, generator=torch.Generator().manual_seed(0))})
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(
        {
            "base_model.model.q.lora_A.weight": torch.ones(1, 2),
            "base_model.model.q.lora_B.weight": torch.ones(3, 1),
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 2}')
    assert main(["merge", str(path), str(folder), "--diagnose"]) == 0
    assert "4.899" in capsys.readouterr().out  # |2 ones [3, 2]|
