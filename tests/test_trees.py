"""Inputs of several parts: what they are made of, how modules are called, and that nothing else changes."""

from __future__ import annotations

from collections import UserDict
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import consilience as cs
from consilience.core.source import Tensors, joined_targets, trimmed
from consilience.core.tree import Tree, as_input, concat, named, signature, types, unnamed
from consilience.data.features import input_hashes

m = cs.methods


class Named(nn.Module):
    """A net that is called by the names of two parts, of which it reads one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, weight: Tensor) -> Tensor:
        return self.net(image)


class Bag(nn.Module):
    """The mean of the embeddings of tokens that the mask counts, and a linear layer."""

    def __init__(self, outputs: int = 2, tags: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.tags = nn.Embedding(30, 6), nn.Linear(6, outputs), tags
        self.widths: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.widths.append(input_ids.shape[1])
        mask = attention_mask.unsqueeze(-1).to(self.embed.weight)
        if self.tags:
            return self.head(self.embed(input_ids)).transpose(1, 2)
        return self.head((self.embed(input_ids) * mask).sum(1) / mask.sum(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def bag(**options: Any) -> Bag:
    torch.manual_seed(0)
    return Bag(**options)


def in_parts(source: cs.Source) -> cs.Source:
    return source.map(x=lambda x: Tree({"image": x, "weight": torch.ones(len(x), 1)}))


def texts(name: str, seed: int, tags: bool = False, longest: int = 9) -> cs.Source:
    """Return 40 sequences of 2 to `longest` tokens; the target is whether the first is odd, or each is."""
    random = np.random.default_rng(seed)
    ids = [random.integers(1, 30, random.integers(2, longest + 1)).tolist() for _ in range(40)]
    x = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    y = [[token % 2 for token in row] for row in ids] if tags else [row[0] % 2 for row in ids]
    return cs.data.arrays(x, y, classes=["even", "odd"], name=name, space="parity")


# What trees are made from, and what they answer.


class Two(NamedTuple):
    a: Any
    b: Any


def test_inputs_of_every_form_become_trees_with_names():
    a, b = np.arange(6.0).reshape(2, 3), [[1, 2], [3, 4]]
    for value, names in (
        ({"a": a, "b": b}, ("a", "b")),
        (UserDict(a=a, b=b), ("a", "b")),  # what transformers' BatchEncoding is
        (Two(a, b), ("a", "b")),
        ((a, b), ("0", "1")),
    ):
        x = as_input(value)
        assert isinstance(x, Tree) and tuple(x.parts) == names
        assert torch.equal(x.parts[names[0]], torch.tensor(a)) and x.parts[names[1]].tolist() == b
    assert as_input((a, b)).arguments()[0][1].tolist() == b, "parts of a tuple are given by place"
    assert list(as_input({"a": a, "b": b}).arguments()[1]) == ["a", "b"], "named parts by name"


ROWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=2, max_size=5)


@settings(deadline=None, max_examples=40)
@given(ROWS, st.lists(st.integers(0, 1), min_size=1, max_size=4))
def test_ragged_parts_keep_every_number_through_all_operations(rows, chosen):
    x = as_input({"ids": rows, "ones": [[1] * len(row) for row in rows]})
    index = torch.tensor(chosen)
    for taken in (x[index], x.index_select(0, index), concat([x[i : i + 1].trim() for i in index.tolist()])):
        wanted = [rows[i] for i in index.tolist()]
        short = taken.trim()
        assert short.parts["ids"].shape[1] == (
            max(map(len, wanted)) if x.lengths is not None else len(rows[0])
        )
        own = short.parts["ones"].sum(1).tolist()
        assert [r[:n] for r, n in zip(short.parts["ids"].tolist(), own, strict=True)] == wanted
        assert torch.equal(short.parts["ids"] != 0, short.parts["ones"] == 1), "padding is 0 in both parts"
    # Files sort tensors.
    back = unnamed("x", dict(sorted(named("x", x).items(), reverse=True)))
    assert list(back.parts) == list(x.parts) and back.ragged == x.ragged
    assert all(torch.equal(part, x.parts[name]) for name, part in back.parts.items())
    pieces = x.split(2)
    assert sum(map(len, pieces)) == len(x) and torch.equal(concat(pieces).parts["ids"], x.parts["ids"])


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[1, 2, 3], [0.5]], [[1.0, 2.0, 3.0], [0.5, 0.0, 0.0]]),
        ([[0.5], [1, 2]], [[0.5, 0.0], [1.0, 2.0]]),
        ([[True, False], [3]], [[1, 0], [3, 0]]),
        ([torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([300])], [[1, 2], [300, 0]]),
        ([[], [1, 2]], [[0, 0], [1, 2]]),  # an empty list says nothing about the type
    ],
)
def test_sequences_of_several_types_get_one_that_holds_them_all(rows, wanted):
    found = as_input(rows).parts["0"]
    assert found.tolist() == wanted
    assert found.is_floating_point() == isinstance(wanted[0][0], float)


def test_sequences_that_differ_in_more_than_their_length_are_refused():
    rows = [[], [[1, 2]], [[1, 2, 3], [4, 5, 6]]]
    with pytest.raises(
        cs.ConsilienceError, match=r"differ in their length alone, got .*\(2,\) .* sample 2, \(3,\)"
    ):
        as_input(rows)
    y = [[0, 1, 1], [0.5]] * 10
    with pytest.raises(cs.ConsilienceError, match="class numbers of an integer type"):
        cs.data.arrays([[1, 2, 3], [4]] * 10, y, name="tags")


def test_parts_keep_their_places_and_names_when_they_are_stored():
    x = as_input(tuple(torch.full((2, 1), float(i)) for i in range(12)))
    back = unnamed("x", dict(sorted(named("x", x).items())))
    assert [float(part[0]) for part in back.arguments()[0]] == list(range(12))

    # Names of users are free.
    odd = as_input({"a=b": [[1], [2, 3]], "c/d": torch.zeros(2), "=": torch.ones(2)})
    back = unnamed("x", dict(sorted(named("x", odd).items())))
    assert list(back.parts) == ["=", "a=b", "c/d"] and list(back.ragged) == ["a=b"]


def test_parts_by_name_have_one_order_whatever_order_they_came_in():
    one, other = (
        as_input({"ids": [[1, 2], [3]], "mask": [[1, 1], [1]]}),
        as_input({"mask": [[1], [1, 1]], "ids": [[4], [5, 6]]}),
    )
    assert signature(one) == signature(other) and types(one) == types(other)
    assert concat([one, other]).parts["ids"].tolist() == [[1, 2], [3, 0], [4, 0], [5, 6]]

    # A test in another order is of the same form.
    x, y = {"b": np.ones((20, 2)), "a": np.zeros((20, 3), "int64")}, np.arange(20) % 2
    source = cs.data.arrays(x, y, test=(dict(reversed(x.items())), y))
    assert signature(source.train.whole()[0]) == signature(source.test.whole()[0])


def test_test_sequences_of_equal_length_by_chance_are_ragged_too():
    rows, y = [[1, 2, 3], [1], [2, 2]] * 8, [0, 1, 1] * 8
    for x, held in (
        ({"ids": rows}, {"ids": [[1, 2]] * 3}),
        ({"ids": [[1, 2]] * 24}, {"ids": rows[:3]}),
        (rows, [[1, 2]] * 3),
    ):
        source = cs.data.arrays(x, y, test=(held, y[:3]))
        parts = [part.whole()[0] for part in (source.train, source.test)]
        assert [set(part.ragged) for part in parts] == [{"ids"} if isinstance(x, dict) else {"0"}] * 2
    with pytest.raises(cs.ConsilienceError, match="must have the shape of training examples"):
        cs.data.arrays({"ids": rows}, y, test=({"id": [[1, 2]] * 3}, y[:3]))


def test_targets_beyond_the_end_of_a_sequence_are_refused():
    x = {"ids": [[1, 2, 3], [1], [2, 2]] * 4}
    rule = "must be {} beyond the end of a sequence, got a target at place {} of sample {}, which has {}"
    for y, kind, says in (
        ([[0, 1, 1], [1, 0], [1, 1]] * 4, "class", (-100, 1, 1, 1)),
        ([[0, 1], [1], [1, 1, 0]] * 4, "class", (-100, 2, 2, 2)),
        (torch.zeros(12, 3, dtype=torch.long), "class", (-100, 1, 1, 1)),
        (torch.zeros(12, 2, 3), "value", ("NaN", 1, 1, 1)),
    ):
        with pytest.raises(cs.ConsilienceError, match=rule.format(*says)):
            cs.data.arrays(x, y, kind=kind)
    # One label for each of as many labels as places is no target at a place.
    cs.data.arrays(x, torch.zeros(12, 3), kind="labels")


def test_predictions_name_inputs_that_the_model_does_not_take():
    result = cs.run(cs.settings.continual([texts("a", 0)]), m.finetune(), bag())
    ids = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}
    assert result.predict(ids).shape == (1, 2)
    for x, rule in (
        ({"input_ids": [[1, 2]]}, "got input_ids: .* missing 1 required"),
        ({**ids, "kind": [[0, 0]]}, "unexpected keyword argument 'kind'; leave that part out"),
        ({**ids, "input_ids": [[1, 99]]}, "index out of range"),
        (torch.ones(1, 2), r"got \(2,\): .* missing 1 required"),
    ):
        with pytest.raises(cs.ConsilienceError, match=rule) as error:
            result.predict(x)
        assert "\n" not in str(error.value)


def test_targets_at_places_are_cut_and_joined_with_their_inputs():
    x = as_input({"ids": [[1, 2, 3], [4]]})
    y = torch.tensor([[5, 6, 7], [8, -100, -100]])
    short, target = trimmed(x[1:], y[1:])
    assert short.parts["ids"].tolist() == [[4]] and target.tolist() == [[8]]
    assert joined_targets([target, y[:1]]).tolist() == [[8, -100, -100], [5, 6, 7]]
    values = joined_targets([torch.ones(1, 2, 1), torch.zeros(1, 2, 2)])
    assert values[0].isnan().tolist() == [[False, True]] * 2, "values have NaN where they have no target"


def test_bytes_are_pixels_only_where_they_form_images():
    tokens = cs.data.arrays(np.full((10, 4), 200, "uint8"), np.arange(10) % 2).train.whole()[0]
    assert tokens.dtype == torch.long and int(tokens[0, 0]) == 200
    images = cs.data.arrays(np.full((10, 1, 4, 4), 51, "uint8"), np.arange(10) % 2).train.whole()[0]
    assert torch.equal(images, torch.full_like(images, 0.2))
    parts = {"image": np.full((10, 3, 4, 4), 255, "uint8"), "ids": np.full((10, 4), 255, "uint8")}
    both = cs.data.arrays(parts, np.arange(10) % 2).train.whole()[0]
    assert float(both.parts["image"].max()) == 1.0 and int(both.parts["ids"].max()) == 255


# A tree whose module reads one part is that part: the bits of whole runs are equal.

FEDERATED = {"rounds": 2, "scenario": "domain"}
RUNS = {
    "finetune": lambda s: (cs.settings.continual(s, "domain"), m.finetune()),
    "er": lambda s: (cs.settings.continual(s, "domain"), m.er(30, 8)),
    "derpp": lambda s: (cs.settings.continual(s, "domain"), m.derpp(30, 8)),
    "gss": lambda s: (cs.settings.continual(s, "domain"), m.gss(size=20)),
    "gem": lambda s: (cs.settings.continual(s, "domain"), m.gem(10)),
    "agem": lambda s: (cs.settings.continual(s, "domain"), m.agem(20, 8)),
    "ewc": lambda s: (cs.settings.continual(s, "domain"), m.ewc(1.0)),
    "mas": lambda s: (cs.settings.continual(s, "domain"), m.mas(1.0)),
    "lwf": lambda s: (cs.settings.continual(s, "domain"), m.lwf()),
    "cumulative": lambda s: (cs.settings.continual(s, "domain"), m.cumulative()),
    "fedavg": lambda s: (cs.settings.federated(s, **FEDERATED), m.fedavg()),
    "scaffold": lambda s: (cs.settings.federated(s, **FEDERATED), m.scaffold()),
    "pcgrad": lambda s: (cs.settings.multitask(s, "domain"), m.pcgrad()),
    "fisher_merging": lambda s: (cs.settings.merging(s, scenario="domain"), m.fisher_merging()),
    "min_entropy": lambda s: (cs.settings.merging(s, scenario="domain"), m.ties()),
}


@pytest.fixture(scope="module")
def parts() -> list[cs.Source]:
    return cs.data.permute(cs.data.iid(cs.data.digits(), 8)[0], 3)


@pytest.mark.parametrize("name", RUNS)
def test_a_part_of_a_tree_trains_as_the_tensor_does(name, parts):
    training = cs.Training(epochs=1, lr=0.1)
    plain = cs.run(*RUNS[name](parts), model=net(), training=training)
    tree = cs.run(*RUNS[name]([in_parts(s) for s in parts]), model=Named(net()), training=training)
    assert np.array_equal(plain.matrices, tree.matrices)
    for entry, value in plain.params.items():
        assert torch.equal(value, tree.params[f"net.{entry}"]), entry
    assert plain.costs["macs"] == tree.costs["macs"] > 0
    if name == "er":
        x = parts[0].test.whole()[0]
        assert torch.equal(plain.predict(x), tree.predict({"image": x, "weight": torch.ones(len(x), 1)}))


@pytest.mark.parametrize("name", ["er", "ewc", "fedavg", "scaffold"])
def test_engines_agree_on_trees(name, parts):
    training = cs.Training(epochs=1, lr=0.1, precision="fp64")
    sources = [in_parts(s) for s in parts]
    one, many = (
        cs.run(*RUNS[name](sources), model=Named(net()), training=training, engine=engine, repeats=2)
        for engine in ("serial", "batched")
    )
    assert np.allclose(one.matrices, many.matrices)
    assert all((value - many.params[n]).abs().max() < 1e-12 for n, value in one.params.items())


@pytest.mark.parametrize("at", [2, 4, 5, 6])
def test_a_run_on_trees_resumes_to_the_same_bits(at, tmp_path):
    class Stop(Exception): ...

    def stop(line):
        seen.append(line["event"] == "checkpoint")
        if sum(seen) == at:
            raise Stop

    # In the third visit, buffers that were read from the checkpoint meet new ones.
    seen: list[bool] = []
    run = lambda **more: cs.run(  # noqa: E731
        cs.settings.continual([texts("a", 0), texts("b", 1), texts("c", 2, longest=5)], "domain"),
        m.derpp(20, 8),
        model=bag(),
        training=cs.Training(epochs=1, lr=0.1, batch_size=8),
        **more,
    )
    whole = run()
    with pytest.raises(Stop):
        run(out=tmp_path / "a", checkpoint_steps=2, progress=stop)
    again = run(out=tmp_path / "a", resume=True)
    assert np.array_equal(whole.matrices, again.matrices)
    assert all(torch.equal(value, again.params[n]) for n, value in whole.params.items())


# Ragged inputs.


def test_each_batch_is_padded_to_its_own_longest_and_trains_as_a_plain_loop_does():
    source, model, ours = texts("a", 0, longest=25), bag(), bag()
    training = cs.Training(epochs=2, lr=0.1, batch_size=4)
    result = cs.run(cs.settings.continual([source]), m.finetune(), model=ours, training=training)

    # The same plan, restated: the order is keyed by (seed, source, visit, epoch, turn, purpose).
    from consilience.core.params import key

    x, y = source.train.whole()
    widths = []
    for epoch in range(2):
        order = torch.randperm(len(y), generator=key(0, "a", 0, epoch, 0, "shuffle"))
        for index in order.split(4):
            rows = [x.parts["input_ids"][i, : int(x.lengths[i])] for i in index]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            out = model(ids, (ids != 0).long())
            grads = torch.autograd.grad(nn.functional.cross_entropy(out, y[index]), list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= 0.1 * g
            widths.append(ids.shape[1])
    assert len(set(widths)) > 1, "some batches are shorter than others"
    for name, trained in model.named_parameters():
        assert torch.allclose(result.params[name], trained, atol=1e-6), name


def test_ragged_inputs_run_one_after_another_in_the_batched_engine():
    notes = []
    schedule = cs.settings.federated([texts("a", 0), texts("b", 1)], rounds=2, scenario="domain")
    training = cs.Training(epochs=1, lr=0.1)
    one = cs.run(schedule, m.fedavg(), model=bag(), training=training)
    note = lambda line: notes.append(line.get("note", ""))  # noqa: E731
    many = cs.run(schedule, m.fedavg(), model=bag(), training=training, engine="batched", progress=note)
    assert any("batches of ragged inputs are padded to lengths that differ" in note for note in notes)
    assert all(torch.equal(value, many.params[n]) for n, value in one.params.items())


def test_buffers_of_sources_with_other_lengths_are_joined():
    sources = [
        texts(name, seed, tags=True, longest=n) for name, seed, n in (("a", 0, 9), ("b", 1, 4), ("c", 2, 7))
    ]
    for method in (m.er(30, 8), m.derpp(30, 8), m.gem(10), m.gss(size=12), m.lwf()):
        result = cs.run(
            cs.settings.continual(sources, "domain"),
            method,
            model=bag(tags=True),
            training=cs.Training(epochs=3, lr=1.0),
        )
        assert result.score > 0.5 and all(bool(p.isfinite().all()) for p in result.params.values())


def test_features_are_kept_by_samples_and_not_by_their_padding(tmp_path):
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(30, 6)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            mask = attention_mask.unsqueeze(-1).float()
            return (self.embed(input_ids) * mask).sum(1) / mask.sum(1)

    short = as_input({"ids": [[1, 2], [3, 4], [5, 6]]})
    long = as_input({"ids": [[1, 2], [3, 4], [5, 6, 7]]})
    own = [input_hashes(as_input({"ids": [row] * 2}))[0] for row in ([1, 2], [3, 4])]
    assert input_hashes(short)[:2] == input_hashes(long)[:2] == own
    assert len({*input_hashes(short), *input_hashes(long)}) == 4

    body = cs.models.frozen(cs.models.wrap(Text(), outputs=6, headless=True))
    source = texts("a", 0)
    (first,) = cs.data.embed([source], body, cache=tmp_path)
    (again,) = cs.data.embed([source], body, cache=tmp_path, batch=7)
    x, _ = source.train.whole()
    for embedded in (first, again):
        assert torch.allclose(embedded.train.whole()[0], Text()(**x.parts), atol=1e-6)


# What does not fit is refused before any work.


class Out(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.head = form, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        z = self.head(x)
        forms = {"tuple": (z, x), "logits": {"logits": z}, "dict": {"out": z}, "[B, 1, C]": z[:, None]}
        return {**forms, "[B]": z[:, 0], "3 columns": z[:, :3], "[C, B]": z.T}[self.form]


@pytest.mark.parametrize(
    ("form", "rule"),
    [
        ("tuple", "a module must return a tensor [B, C, *places], or have it in `logits`, got a tuple"),
        ("dict", "or have it in `logits`, got a dict of out; wrap it in a module that returns the outputs"),
        ("[B, 1, C]", "a model must return outputs [B, 10], got [B, 1, 10]; say how many with models.wrap"),
        ("[B]", "a model must return outputs [B, 10], got [B]"),
        ("3 columns", "a model must return outputs [B, 10], got [B, 3]"),
        ("[C, B]", "a model must return outputs [B, 10], got [10, 2]"),
    ],
)
def test_outputs_of_another_form_are_refused(form, rule):
    with pytest.raises(cs.ConsilienceError) as e:
        cs.run(cs.settings.continual([cs.data.digits()]), m.finetune(), model=Out(form))
    assert rule in str(e.value)


def test_outputs_in_logits_are_found():
    training = cs.Training(epochs=1)
    assert (
        cs.run(cs.settings.continual([cs.data.digits()]), m.finetune(), Out("logits"), training).score > 0.2
    )


def test_inputs_that_a_module_does_not_take_are_named():
    source = texts("a", 0)
    run = lambda s, model: cs.run(cs.settings.continual([s]), m.finetune(), model=model)  # noqa: E731
    extra = source.map(x=lambda x: Tree({**x.parts, "kind": x.parts["input_ids"]}, x.ragged, x.lengths))
    cases = [
        (
            extra,
            bag(),
            "got attention_mask, input_ids, kind: Bag.forward() got an unexpected keyword argument",
        ),
        (extra, bag(), "leave that part out, or name the parts as `forward` does"),
        (source.map(x=lambda x: Tree({"input_ids": x.parts["input_ids"]})), bag(), "missing 1 required"),
        (source, None, "no default model takes inputs of several parts (attention_mask, input_ids)"),
        (
            cs.data.arrays(np.ones((20, 64), "uint8"), np.arange(20) % 10),
            net(),
            "the inputs are whole numbers",
        ),
        (
            texts("a", 0, tags=True),
            bag(),
            "outputs [B, 2, *places], got [B, 2]; targets have 1 dimensions of places; several labels are",
        ),
        (source, bag(tags=True), "a model must return outputs [B, 2], got [B, 2,"),
        # A net of half the resolution.
        (
            cs.data.arrays(torch.rand(20, 1, 4, 4), torch.zeros(20, 4, 4, dtype=torch.long), classes=["a"]),
            cs.models.wrap(lambda: nn.Conv2d(1, 1, 2, stride=2), outputs=1),
            "outputs [B, 1, *places], got [B, 1, 2, 2]; targets have the places [4, 4].",
        ),
    ]
    for given_source, model, rule in cases:
        with pytest.raises(cs.ConsilienceError) as e:
            run(given_source, model)
        assert rule in str(e.value), str(e.value)


def test_methods_that_need_one_tensor_say_so_before_any_work():
    sources = [texts("a", 0), texts("b", 1)]
    for method in (m.generative_replay(), m.finetune() + m.infer(cs.mappers.nearest_mean(on="inputs"))):
        with pytest.raises(cs.Refusal, match="several parts"):
            cs.run(cs.settings.continual(sources, "class"), method, model=bag(outputs=4))


def test_inputs_that_differ_are_not_joined():
    x, y = as_input({"a": [[1, 2]]}), as_input({"b": [[1, 2]]})
    assert signature(x) != signature(y)
    with pytest.raises(cs.ConsilienceError, match="inputs to join must be alike"):
        concat([x, y])


# What a step costs: ragged inputs have a new shape in almost every step, so that counting must be quick.


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), (5, 6)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.GroupNorm(2, 8)), (2, 4, 9, 9)),
        (nn.Conv2d(8, 2, 3, stride=2), (2, 8, 9, 9)),
        (nn.Conv1d(6, 4, 3, dilation=2), (2, 6, 9)),
        (nn.ConvTranspose2d(3, 5, 3), (2, 3, 6, 6)),
        (nn.GRU(6, 4, batch_first=True), (2, 5, 6)),
    ],
)
def test_flops_are_those_of_torch(layer, shape):
    from torch.utils.flop_counter import FlopCounterMode

    from consilience.loop.flops import Flops

    x = torch.rand(*shape)

    def step() -> None:
        out = layer(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    def answer() -> None:
        with torch.inference_mode():
            layer(x)

    for work in (step, answer):
        with FlopCounterMode(display=False) as theirs:
            work()
        with Flops() as ours:
            work()
        assert ours.total == theirs.get_total_flops() > 0


class Attention(nn.Module):
    """Heads of width 3 over five places of width 6."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in self.q(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v)


def lstm(width: int) -> int:
    return 4 * 4 * (width + 4)


@pytest.mark.parametrize(
    ("layer", "forward", "step"),
    [
        # Every vector meets the matrices of the input and of the state, in the backward pass twice.
        (nn.LSTM(6, 4, batch_first=True), 10 * lstm(6), 30 * lstm(6)),
        (
            nn.LSTM(6, 4, 2, bidirectional=True, batch_first=True),
            20 * (lstm(6) + lstm(8)),
            60 * (lstm(6) + lstm(8)),
        ),
        # Two products forwards; backwards four, and that of the scores again. The input has no gradient.
        (Attention(), 10 * (6 * 18 + 2 * 5 * 6), 10 * (2 * 6 * 18 + 7 * 5 * 6)),
        # In eval mode this is one operation; four projections, two products, two layers.
        (
            nn.TransformerEncoderLayer(6, 2, 12, dropout=0, batch_first=True),
            10 * (4 * 36 + 2 * 5 * 6 + 2 * 72),
            10 * (3 * (4 * 36 + 2 * 72) - 3 * 36 + 7 * 5 * 6),
        ),
    ],
)
def test_flops_of_layers_that_are_one_operation_are_those_of_their_products(layer, forward, step):
    from consilience.loop.flops import Flops

    x = torch.rand(2, 5, 6)
    with Flops() as counted:
        out = layer.train()(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert counted.total == 2 * step
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Flops() as counted:
            layer.eval()(x)
        assert counted.total == 2 * forward
    assert cs.models.macs(layer, (5, 6)) == forward // 2, "of one sample"


def test_flops_of_padded_sequences_count_their_own_lengths():
    from consilience.loop.flops import Flops

    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), Flops() as counted:
        encoder(torch.rand(2, 5, 6), src_key_padding_mask=padding)
    assert counted.total == 2 * sum(t * (4 * 36 + 2 * 72) + 2 * t * t * 6 for t in (5, 3))


class Query(nn.Module):
    """A parameter that passes through a layer before it meets the input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.query, self.layer = nn.Parameter(torch.rand(2, 4)), layer
        self.key, self.fc = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.key(x)) * self.layer(self.query).sum(0))


def two_layers(parametrization=None) -> nn.Module:
    first = nn.Linear(6, 4)
    if parametrization is not None:
        getattr(nn.utils.parametrizations, parametrization)(first)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("net", "more"),
    [
        (Query(nn.LayerNorm(4)), 0),
        # Two queries through a layer, whose input and weight have gradients.
        (Query(nn.Linear(4, 4)), 3 * 2 * 16),
        (two_layers("weight_norm"), 0),
        (two_layers("spectral_norm"), 0),
        (two_layers("orthogonal"), None),
    ],
    ids=["layer norm", "linear", "weight_norm", "spectral_norm", "orthogonal"],
)
def test_parameters_that_pass_through_a_module_are_trained_and_counted(net, more):
    x, y = torch.rand(12, 6), torch.arange(12) % 3
    source = cs.data.arrays(x, y, (x, y), classes=list("abc"), validation=0)
    training = cs.Training(epochs=1, lr=0.1)
    result = cs.run(cs.settings.continual([source]), m.finetune(), model=net, training=training)

    # Three products for each layer, without the gradient of the input. Orthogonal weights are products.
    plain = 12 * (2 * 6 * 4 + 3 * 4 * 3)
    assert result.costs["macs"] == plain + more if more is not None else result.costs["macs"] > plain
    before = dict(net.named_parameters())
    assert all(not torch.equal(result.params[name], p) for name, p in before.items())


class Kept(nn.Linear):
    """A module with a result that is no attribute of its own, where it could be let go."""

    def __init__(self) -> None:
        super().__init__(64, 10)
        self.kept = [self.weight * 2]


def test_modules_that_cannot_be_a_model_are_refused_with_what_helps():
    digits = cs.data.digits()
    for module, rule in (
        (nn.DataParallel(nn.Linear(64, 10)), "must be a plain module, got DataParallel; give its `.module`"),
        (nn.Sequential(nn.LazyLinear(10)), "got lazy ones; call it once on a batch before"),
        (Kept(), "must be a module that can be copied"),
    ):
        with pytest.raises(cs.ConsilienceError) as e:
            cs.run(cs.settings.continual([digits]), m.finetune(), model=module)
        assert rule in str(e.value) and len(str(e.value).splitlines()) == 1


def test_classes_after_places_are_found_also_where_there_are_as_many_of_both():
    class Last(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.embed, self.head, self.first = nn.Embedding(9, 4), nn.Linear(4, 5), first

        def forward(self, x: Tensor) -> Tensor:
            out = self.head(self.embed(x))
            return out.transpose(1, 2) if self.first else out

    for places in (4, 5):
        ids = torch.randint(0, 5, (40, places), generator=torch.Generator().manual_seed(0))
        lengths = torch.full((40,), places)
        for x in (ids, Tree({"x": ids}), Tree({"x": ids}, {"x": 0}, lengths)):
            source = replace(cs.data.arrays(ids, ids, classes=list("abcde")), train=Tensors(x, ids))
            run = lambda model: cs.run(  # noqa: E731
                cs.settings.continual([source]),  # noqa: B023
                m.finetune(),
                model=model,
                training=cs.Training(epochs=1),
            )
            with pytest.raises(cs.ConsilienceError, match="move the classes to dimension 1"):
                run(Last(False))
            assert run(Last(True)).score >= 0
