"""What differs between experts, against a restatement, over shapes, dtypes and blocks."""

from __future__ import annotations

import json
import math
from xml.dom import minidom

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from consilience import ConsilienceError
from consilience.core.params import save
from consilience.merging import _diagnose
from consilience.merging._diagnose import diagnose, named

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=3)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def made(shapes, dtype, m, seed):
    g = torch.Generator().manual_seed(seed)

    def one():
        return {f"e{i}": torch.randint(-3, 4, s, generator=g).to(dtype) / 2 for i, s in enumerate(shapes)}

    return one(), {f"x{i}": one() for i in range(m)}


def restated(base, experts):
    """Cosines, and norms, conflicts and mass by entry, with loops over elements."""
    tau = {
        x: {n: (e[n].double() - base[n].double()).flatten().tolist() for n in base}
        for x, e in experts.items()
    }
    flat = {x: [v for n in base for v in t[n]] for x, t in tau.items()}
    dot = {
        (a, b): math.fsum(u * v for u, v in zip(flat[a], flat[b], strict=True)) for a in flat for b in flat
    }
    cosines = [
        [dot[a, b] / math.sqrt(dot[a, a] * dot[b, b]) if dot[a, a] * dot[b, b] else math.nan for b in flat]
        for a in flat
    ]
    layers = {}
    for n in base:
        columns = list(zip(*(t[n] for t in tau.values()), strict=True))
        clash = [any(v > 0 for v in c) and any(v < 0 for v in c) for c in columns]
        mass = [sum(map(abs, c)) for c in columns]
        inside = sum(a for a, k in zip(mass, clash, strict=True) if k)
        layers[n] = (
            [math.hypot(*t[n]) for t in tau.values()],
            sum(clash) / len(clash) if clash else 0.0,
            inside / sum(mass) if sum(mass) else 0.0,
        )
    return cosines, layers


@settings(max_examples=60, deadline=None)
@given(SHAPES, DTYPES, st.integers(1, 4), st.integers(0, 99), st.sampled_from([1, 7, 1 << 18]))
def test_it_is_what_loops_over_elements_find_in_blocks_of_any_size(shapes, dtype, m, seed, block):
    base, experts = made(shapes, dtype, m, seed)
    before, _diagnose.BLOCK = _diagnose.BLOCK, block
    try:
        found = diagnose(base, experts)
    finally:
        _diagnose.BLOCK = before
    cosines, layers = restated(base, experts)
    assert torch.allclose(torch.tensor(found.cosines), torch.tensor(cosines), atol=1e-9, equal_nan=True)
    assert [x.name for x in found.layers] == list(base)
    for x in found.layers:
        norms, conflicts, mass = layers[x.name]
        assert x.norms == pytest.approx(norms)
        assert (x.size, x.conflicts, x.mass) == (
            base[x.name].numel(),
            pytest.approx(conflicts),
            pytest.approx(mass),
        )
    assert found.whole.size == sum(x.size for x in found.layers)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["experts"] == list(experts)


def test_limits_have_known_answers():
    tau = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = {"w": torch.zeros(50, dtype=torch.float64)}
    found = diagnose(zero, [{"w": tau}, {"w": -2 * tau}, {"w": tau * 0}])
    assert found.cosines[0][1] == pytest.approx(-1)
    assert math.isnan(found.cosines[2][2])
    assert (found.whole.conflicts, found.whole.mass) == (1.0, 1.0)
    same = diagnose(zero, [{"w": tau}, {"w": 3 * tau}])
    assert (same.whole.conflicts, same.whole.mass) == (0.0, 0.0)
    assert same.whole.norms[1] == pytest.approx(3 * same.whole.norms[0])


def test_files_are_read_in_blocks_and_give_what_memory_gives(tmp_path, monkeypatch):
    from consilience.merging import _files

    base, experts = made([(40, 30), (7,)], torch.bfloat16, 3, 0)
    save(tmp_path / "base.safetensors", base)
    for n, e in experts.items():
        save(tmp_path / f"{n}.safetensors", e)
    asked = []
    monkeypatch.setattr(_diagnose, "BLOCK", 64)
    whole = _files.Files.read
    monkeypatch.setattr(_files.Files, "read", lambda s, n, a, b: asked.append(b - a) or whole(s, n, a, b))
    found = diagnose(tmp_path / "base.safetensors", [tmp_path / f"{n}.safetensors" for n in experts])
    assert max(asked) == 64
    assert sum(asked) == 4 * 1207
    assert found == diagnose(base, experts)


def test_what_not_all_carry_is_named_and_left_out():
    base = {"w": torch.zeros(2), "steps": torch.tensor(1)}
    experts = [{"w": torch.ones(2), "steps": torch.tensor(9), "heads.a": torch.ones(1)}, {"w": torch.ones(2)}]
    found = diagnose(base, experts)
    assert found.apart == ("steps", "heads.a")
    assert "heads.a" in found.table().splitlines()[-1]


def test_tied_weights_count_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    torch.manual_seed(0)
    base, *experts = (Tied() for _ in range(3))
    found = diagnose(base, experts)
    assert [x.name for x in found.layers] == ["a.weight", "a.bias", "b.bias"]
    assert (found.whole.size, found.apart) == (24, ())
    single = [{n: t for n, t in e.state_dict().items() if n != "b.weight"} for e in (base, *experts)]
    assert found.cosines == diagnose(single[0], single[1:]).cosines
    turned = [dict(reversed(e.state_dict().items())) for e in experts]
    assert diagnose(base, turned).whole.size == 24, "whichever name comes first"
    loose = {**experts[1].state_dict(), "b.weight": torch.ones(4, 4)}
    assert diagnose(base, [experts[0], loose]).whole.size == 40, "not tied in all"


def test_tables_of_many_entries_are_cut_and_figures_stand_on_their_own(tmp_path):
    base = {f"layer.{i}": torch.zeros(2) for i in range(90)}
    found = diagnose(base, {"a<b": {n: torch.ones(2) for n in base}, "c": {n: -torch.ones(2) for n in base}})
    assert len(found.table(10).splitlines()) == 4 + 1 + 2 + 10 + 1 + 1
    path = found.write(tmp_path / "diagnosis.svg")
    titles = [
        t.firstChild.data for t in minidom.parse(str(path)).getElementsByTagName("title") if t.firstChild
    ]
    assert "a<b, c: -1.000" in titles
    assert "url(" not in path.read_text()
    assert found.to_json()["cosines"] == [pytest.approx([1.0, -1.0]), pytest.approx([-1.0, 1.0])]


BAD = {
    "shapes": (
        {"w": torch.zeros(2)},
        [{"w": torch.zeros(3)}],
        r"got \(3,\) for 'w' of expert-0, here \(2,\)",
    ),
    "nothing shared": ({"w": torch.zeros(2)}, [{"v": torch.zeros(2)}], "floating-point entries in common"),
    "NaN": (
        {"w": torch.zeros(2)},
        [{"w": torch.tensor([0, math.nan])}],
        "NaN or infinity in 'w' of expert-0",
    ),
    "broken base": ({"w": torch.tensor([math.inf])}, [{"w": torch.zeros(1)}], "'w' of the base"),
    "no experts": ({"w": torch.zeros(2)}, [], "at least one expert, got none"),
    "one state dict": ({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, "a sequence, or by name"),
    "one path": ({"w": torch.zeros(2)}, "expert.safetensors", "a sequence, or by name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    base, experts, says = BAD[case]
    with pytest.raises(ConsilienceError, match=says):
        diagnose(base, experts)


def test_figures_are_svg(tmp_path):
    with pytest.raises(ConsilienceError, match=r"to a .svg file"):
        diagnose({"w": torch.zeros(2)}, [{"w": torch.ones(2)}]).write(tmp_path / "x.png")


def test_experts_have_names_of_their_own():
    assert list(named(["a/model.safetensors", "b/model.safetensors"])) == ["a", "b"]
    assert list(named(["a/x.safetensors", "b/x.safetensors"])) == ["a/x.safetensors", "b/x.safetensors"]
    with pytest.raises(ConsilienceError, match="names of their own"):
        named(["a/x.safetensors", "a/x.safetensors"])
