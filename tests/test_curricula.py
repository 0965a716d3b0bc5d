"""Curricula, and what may be kept of each example: against hand-written loops in plain torch."""

from __future__ import annotations

import math
import os
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import consilience as cs
from consilience.core.contexts import Context, StepView
from consilience.core.params import key
from consilience.data.samplers import Curriculum, SelfPaced
from consilience.loop.fingerprint import identity
from restate import A, B, E, batches, entries, final, mlp, near, plain, sgd, source, stopped, training

# The index of each example


@dataclass(frozen=True)
class Tired(cs.Correction):
    """An example that was seen n times counts 1 / (1 + n); of each, its last loss and n are kept."""

    needs_index: ClassVar[bool] = True
    shared_items: ClassVar[bool] = False

    def trace_init(self, ctx: Context) -> dict[str, torch.Tensor]:
        zeros = [ctx.theta.new_zeros(size) for size in ctx.sizes]
        return {f"{what}/{i}": tensor for i, tensor in enumerate(zeros) for what in ("seen", "loss")}

    def losses(self, losses, step: StepView, ctx: Context):
        own = [i for i, part in enumerate(step.parts) if not part.drawn_by]
        seen = {i: ctx.trace[f"seen/{i}"][step.parts[i].index] for i in own}
        return losses | {i: losses[i] / (1 + seen[i]) for i in own}

    def trace(self, step: StepView, ctx: Context, grad, delta):
        new = dict(ctx.trace)
        for i, part in enumerate(step.parts):
            seen = f"seen/{i}"
            loss = step.targets[i].losses(step.outputs[i].detach(), part.y).values
            new |= {seen: part.kept(new[seen], new[seen][part.index] + 1)}
            new |= {f"loss/{i}": part.kept(new[f"loss/{i}"], loss)}
        return new

    def summarise(self, learned, ctx):
        return cs.Private(dict(ctx.trace))

    def recall(self, memory, sources):
        return None


TIRED = cs.Method("tired", (Tired(),))


def tired(s=A, steps=None, **more):
    """The plain loop: parameters, how often each example was seen, and its last loss."""
    net, n = plain(), len(s.train)
    step, seen, last = sgd(net), torch.zeros(n).double(), torch.zeros(n).double()
    order = torch.arange(n)
    numbered = replace(s, train=replace(s.train, y=order))
    pairs = zip(batches(s, **more), batches(numbered, **more), strict=True)
    for taken, ((_, _, x, y), (*_, index)) in enumerate(pairs):
        if taken == steps:
            break
        each = F.cross_entropy(net(x), y, reduction="none")
        step.zero_grad()
        (each / (1 + seen[index])).mean().backward()
        step.step()
        seen[index] += 1
        last[index] = each.detach()
    return entries(net), seen, last


def kept(agent, name):
    return agent.state.memory["Tired"][name].tensors


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_correction_keeps_something_of_each_example(accumulate):
    # Micro-batches of 2, or steps of 8 at once: the mean over a step is the same.
    more = {"batch_size": 8 // accumulate, "accumulate": accumulate}
    run = cs.run(cs.settings.continual([A]), TIRED, mlp(), training(**more))
    params, seen, last = tired()
    near(run.agent.state.params, params)
    assert torch.equal(kept(run.agent, "a")["seen/0"], seen) and (seen == 2).all()
    near({"loss": kept(run.agent, "a")["loss/0"]}, {"loss": last})


def test_two_sources_of_one_step_have_indices_of_their_own():
    run = cs.run(cs.settings.multitask([A, B]), TIRED, mlp(), training(epochs=1))
    found = kept(run.agent, "a")
    # The shorter source begins again, so that some of its examples are seen twice.
    assert (found["seen/0"] == 1).all() and len(found["seen/1"]) == 21
    assert found["seen/1"].sum() == 21 + 8 and found["seen/1"].min() == 1


def test_batches_that_corrections_draw_have_no_index():
    seen = []

    @dataclass(frozen=True)
    class Look(cs.Correction):
        needs_index: ClassVar[bool] = True

        def rows(self, step, ctx):
            seen.append([(part.drawn_by, part.index is None) for part in step.parts])
            return []

    def parts(*more):
        seen.clear()
        final(cs.settings.continual([A, B]), cs.Method("look", more))
        return seen[-1]

    buffer = cs.methods.er(8).corrections
    assert parts(Look(), *buffer) == [("", False), ("ER", True)]
    # Nobody else pays for it.
    Look.needs_index = False
    assert parts(Look(), *buffer) == [("", True), ("ER", True)]


def test_a_resumed_run_keeps_the_same_of_each_example(tmp_path):
    def run(**more):
        more = {"progress": None, **more}
        schedule = cs.settings.multitask([A, B], rounds=2)
        return cs.run(schedule, TIRED, mlp(), training(epochs=3), **more)

    whole = run()
    stopped(run, tmp_path, 7)
    again = run(out=tmp_path, resume=True)
    for name, tensor in kept(whole.agent, "b").items():
        assert torch.equal(tensor, kept(again.agent, "b")[name]), name
    assert all(torch.equal(p, again.params[name]) for name, p in whole.params.items())


def test_a_straggler_has_seen_what_its_steps_saw():
    schedule = cs.settings.federated([A, B], rounds=1, clients_per_round=2, stragglers=1.0)
    run = cs.run(schedule, TIRED + cs.methods.fedavg(), mlp(), training(epochs=5), judge_clients=True)
    fractions = next(phase.fractions for phase in schedule.plan(0) if hasattr(phase, "fractions"))
    # Of 5 epochs of 4 steps and of 3.
    for agent, own, total in (("client-0", A, 20), ("client-1", B, 15)):
        steps = max(1, round(fractions[agent] * total))
        assert 0 < steps < total
        assert torch.equal(kept(run.agents[agent], own.name)["seen/0"], tired(own, steps, epochs=5)[1])


@pytest.mark.parametrize("sources", [[A, replace(A, name="c")], [A, B]], ids=["equal", "unequal"])
@pytest.mark.parametrize("drawn", [False, True])
def test_stacked_agents_keep_the_same_of_each_example(sources, drawn):
    # Of one size they share a program, in batches that are padded; of two sizes they run one after another.
    same = Same() if drawn else None
    method = cs.Method("tired", (Tired(), *([same] if same else [])))
    notes = []

    def run(engine):
        return cs.run(
            cs.settings.federated(sources, rounds=2, clients_per_round=2),
            method + cs.methods.fedavg(),
            mlp(),
            training(momentum=0.0),
            engine=engine,
            judge_clients=True,
            progress=lambda line: notes.append(line.get("note", "")),
        )

    serial, stacked = run("serial"), run("batched")
    near(stacked.params, serial.params)
    for name in serial.agents:
        if "Tired" in serial.agents[name].state.memory:
            source = serial.agents[name].state.memory["Tired"]
            for key in source:
                near(dict(kept(stacked.agents[name], key)), dict(kept(serial.agents[name], key)))
    alone = "one after another: the trace of Tired differs in shape between agents"
    assert (alone if sources[1] is B else "batched: 2 agents a step, 59 numbers each") in notes


@dataclass(frozen=True)
class Same(cs.Correction):
    """It draws nothing, so that batches are drawn step by step."""

    def sample(self, ctx, sources, generator):
        return []


# Curricula


def loop(s, share, difficulty=None, rescore=None, anti=False, known=None, epochs=6):
    """The plain loop: parameters, and how many examples each epoch chose from."""
    net = plain()
    (x, y), n, step, counts = s.train.whole(), len(s.train), sgd(net), []
    for epoch in range(epochs):
        if known is None or (rescore and epoch % rescore == 0):
            with torch.no_grad():
                known = difficulty(net(x), y)
        g = key(0, s.name, 0, epoch, 0, "shuffle")
        count = max(1, int(round(share(epoch) * n, 9)))
        order = torch.randperm(n, generator=g)
        if count < n:
            ranked = order[known[order].argsort(stable=True, descending=anti)][:count]
            order = ranked[torch.randperm(count, generator=g)]
        counts.append(count)
        for i in order.split(8):
            step.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            step.step()
    return net, counts


def cross_entropies(out, y):
    return F.cross_entropy(out, y, reduction="none")


def doubts(out, y):
    return 1 - out.softmax(1).max(1).values


def visits(schedule, sampler, method=None, epochs=6, **more):
    """A run, and the lines of its visits."""
    lines = []
    given = training(epochs=epochs, sampler=sampler, **more)
    run = cs.run(schedule, method or cs.methods.finetune(), mlp(), given, progress=lines.append)
    return run, [line for line in lines if line["event"] == "visit"]


def document(strategy, start):
    """The share of the document's CurriculumSampler, `_get_fraction`, over 6 epochs."""

    def share(epoch):
        t = epoch / 5
        return {
            "linear": start + (1.0 - start) * t,
            "sqrt": start + (1.0 - start) * math.sqrt(t),
            # In the last epoch, which sees all here, the document's has 1 - (1 - start) e^-3.
            "exponential": 1.0 - (1.0 - start) * math.exp(-3.0 * t) if t < 1 else 1.0,
            "step": start + (1.0 - start) * min(int(t * 5), 4) / 4,
            "competence": min(1.0, math.sqrt(t * (1 - start**2) + start**2)),
        }[strategy]

    return share


@pytest.mark.parametrize("pacing", ["linear", "sqrt", "exponential", "step", "competence"])
@pytest.mark.parametrize("rescore", [None, 2])
def test_a_curriculum_is_the_hand_written_loop(pacing, rescore):
    sampler = Curriculum(pacing=pacing, start=0.3, rescore=rescore)
    run, lines = visits(cs.settings.continual([A]), sampler)
    net, counts = loop(A, document(pacing, 0.3), cross_entropies, rescore)
    near(run.params, entries(net))
    # The log says how many examples each epoch chose from, and the share of the last.
    assert lines[0]["examples"] == {"a": counts} and lines[0]["pace"] == {"a": 1.0}
    assert counts[0] == 9 and counts[-1] == 30 and counts == sorted(counts)


def test_difficulties_and_the_hardest_first():
    share, x = document("linear", 0.5), A.train.x
    hard = torch.randn(30, generator=torch.Generator().manual_seed(4)).double()
    teacher = torch.nn.Linear(6, 4).double()
    with torch.no_grad():
        p = teacher(x).softmax(1)
        unsure = -(p * p.log()).sum(1)
    drawn = torch.rand(30, generator=key(0, "a", "difficulty"), dtype=torch.float64)
    given = {
        "confidence": (Curriculum("confidence", start=0.5), {"difficulty": doubts}),
        "anti": (Curriculum(start=0.5, anti=True), {"difficulty": cross_entropies, "anti": True}),
        "numbers": (Curriculum(hard.tolist(), start=0.5), {"known": hard}),
        "by source": (Curriculum({"a": hard.numpy()}, start=0.5), {"known": hard}),
        "function": (Curriculum(lambda x: x[:, 2], start=0.5), {"known": x[:, 2]}),
        "module": (Curriculum(teacher, start=0.5), {"known": unsure}),
        "probabilities": (Curriculum(lambda x: teacher(x).softmax(1), start=0.5), {"known": unsure}),
        "random": (Curriculum("random", start=0.5), {"known": drawn}),
    }
    found = {}
    for name, (sampler, expected) in given.items():
        run, _ = visits(cs.settings.continual([A]), sampler)
        near(run.params, entries(loop(A, share, **expected)[0]))
        found[name] = tuple(torch.cat([p.flatten() for p in run.params.values()]).tolist())
    # Each of these orders is another one.
    others = ("confidence", "anti", "numbers", "function", "module", "random")
    assert len({found[name] for name in others}) == len(others)
    assert teacher.training


class Words(torch.nn.Module):
    """The mean of the vectors of the words."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.EmbeddingBag(9, 4)

    def forward(self, input_ids, attention_mask):
        return self.words(input_ids)


def test_length_is_that_of_sequences():
    s = cs.data.text(["a b c d e f", "a", "a b", "a b c"] * 6, [0, 1, 2, 3] * 6, name="t", validation=0)
    taken = []

    @dataclass(frozen=True)
    class Look(cs.Correction):
        def rows(self, step, ctx):
            taken.append(step.parts[0].x.lengths)
            return []

    sampler = Curriculum("length", start=0.5, over=2)
    training = cs.Training(epochs=2, batch_size=100, sampler=sampler)
    model = cs.models.wrap(Words(), outputs=4)
    cs.run(cs.settings.continual([s]), cs.Method("look", (Look(),)), model, training)
    lengths = s.train.lengths().sort().values
    # One step is tried before, to count its cost.
    assert taken[-2].sort().values.equal(lengths[: len(lengths) // 2])
    assert taken[-1].sort().values.equal(lengths)
    with pytest.raises(cs.Refusal, match="inputs of 'a' have no lengths, so difficulty='length'"):
        visits(cs.settings.continual([A]), sampler)


def test_ties_are_broken_by_chance_and_examples_without_a_target_come_last():
    state = {"difficulty": torch.tensor([1.0] * 8 + [torch.nan, 0.0]), "count": torch.tensor(5)}
    seen = [
        torch.cat(Curriculum(anti=anti).plan(torch.zeros(10), 2, 0, torch.Generator().manual_seed(i), state))
        for i in range(40)
        for anti in (False, True)
    ]
    # Each of the equal ones comes at some time; the easiest always, or never.
    assert {*torch.cat(seen).tolist()} == {0, 1, 2, 3, 4, 5, 6, 7, 9}
    assert all(len(plan.unique()) == 5 and (9 in plan) == (i % 2 == 0) for i, plan in enumerate(seen))


def test_baby_steps_wait_for_convergence():
    # Five buckets of six examples; the next one where an epoch lowered the mean loss by less than a tenth.
    sampler = Curriculum(pacing="baby-step", rescore=20, least=0.1, over=12)
    run, lines = visits(cs.settings.continual([A]), sampler, epochs=12)
    net, (x, y), known, stage, before, counts = plain(), A.train.whole(), None, 0, None, []
    step = sgd(net)
    for epoch in range(12):
        with torch.no_grad():
            losses = cross_entropies(net(x), y)
        known = losses if known is None else known
        if stage < 5:
            stage += before is None or before - losses[known.argsort()[: 6 * stage]].mean() < 0.1 * before
            # At the latest after its share of the curriculum.
            stage = max(int(stage), 5 if epoch == 11 else 1 + int(epoch / 11 * 5))
            before = losses[known.argsort()[: 6 * stage]].mean()
        g = key(0, "a", 0, epoch, 0, "shuffle")
        order = torch.randperm(30, generator=g)
        if stage < 5:
            order = order[known[order].argsort(stable=True)][: 6 * stage]
            order = order[torch.randperm(len(order), generator=g)]
        counts.append(len(order))
        for i in order.split(8):
            step.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            step.step()
    near(run.params, entries(net))
    assert lines[0]["examples"]["a"] == counts
    # It went on before its time, and not in every epoch.
    late = [6 * min(5, 1 + int(epoch / 11 * 5)) for epoch in range(12)]
    assert counts != late and counts[0] == 6 and counts[-1] == 30 and len(counts) > len(set(counts)) > 3


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_self_paced_learning_takes_losses_below_a_threshold(soft, accumulate):
    more = {"batch_size": 8 // accumulate, "accumulate": accumulate}
    run, lines = visits(cs.settings.continual([A]), SelfPaced(threshold=1.45, growth=1.4, soft=soft), **more)
    net, (x, y), threshold, counts = plain(), A.train.whole(), 1.45, []
    step = sgd(net)
    for epoch in range(6):
        with torch.no_grad():
            losses = cross_entropies(net(x), y)
        # In closed form, v minimises sum v l - threshold v, one example at a time.
        v = torch.stack([losses * 0, losses - threshold]).argmin(0).double()
        weights = (1 - losses / threshold).clamp(min=0) if soft else v
        chosen = v.nonzero().flatten()
        order = chosen[torch.randperm(len(chosen), generator=key(0, "a", 0, epoch, 0, "shuffle"))]
        counts.append(len(chosen))
        for i in order.split(8):
            step.zero_grad()
            each = cross_entropies(net(x[i]), y[i])
            ((each * weights[i]).sum() / weights[i].sum()).backward()
            step.step()
        threshold *= 1.4
    near(run.params, entries(net), 1e-10)
    assert lines[0]["examples"] == {"a": counts} and counts[0] < counts[-1] == 30


def test_self_paced_learning_begins_with_a_share_and_has_one_batch_at_least():
    _, lines = visits(cs.settings.continual([A]), SelfPaced(start=0.3, growth=1.0), epochs=2)
    assert lines[0]["examples"]["a"][0] == 9
    state = {"loss": torch.tensor([3.0, 1.0, 2.0]), "threshold": torch.tensor(0.5)}
    plan = SelfPaced(soft=True).plan(torch.zeros(3), 2, 0, torch.Generator(), state)
    assert sorted(torch.cat(plan).tolist()) == [1, 2]
    assert SelfPaced(soft=True).weights(state).tolist() == [1, 1, 1]


SAMPLERS = {
    "linear": Curriculum(start=0.3, rescore=2),
    "anti": Curriculum(start=0.3, anti=True),
    "baby-step": Curriculum(pacing="baby-step", least=0.2, rescore=3),
    "hard": SelfPaced(start=0.4, rescore=2),
    "soft": SelfPaced(start=0.4, soft=True),
}


def compared(lines):
    """The visits, without their times; sums over steps are rounded where a run stopped."""
    visits = [line for line in lines if line["event"] == "visit"]
    rounded = [{name: round(line[name], 9) for name in ("loss", "grad_norm")} for line in visits]
    return [line | {"seconds_per_step": 0} | own for line, own in zip(visits, rounded, strict=True)]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("setting", ["continual", "multitask", "federated", "joint"])
def test_a_resumed_curriculum_is_the_whole_one_in_every_setting(sampler, setting, tmp_path):
    schedule = {
        "continual": lambda: cs.settings.continual([A, B]),
        "joint": lambda: cs.settings.continual([A, B]),
        "multitask": lambda: cs.settings.multitask([A, B]),
        "federated": lambda: cs.settings.federated([A, B], rounds=3, clients_per_round=2, stragglers=0.5),
    }[setting]()
    methods = {"joint": cs.methods.joint, "federated": cs.methods.fedavg}
    given = training(epochs=3 if setting == "federated" else 4, sampler=sampler)
    lines = []

    def run(**more):
        method = methods.get(setting, cs.methods.finetune)()
        return cs.run(schedule, method, mlp(), given, **{"progress": lines.append, **more})

    whole = run()
    said = compared(lines)
    stopped(run, tmp_path, whole.costs["steps"] // 2)
    lines.clear()
    again = run(out=tmp_path, resume=True)
    assert all(torch.equal(p, again.params[name]) for name, p in whole.params.items())
    rest = compared(lines)
    assert rest and said[-len(rest) :] == rest
    assert whole.costs["macs"] == again.costs["macs"]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_stacked_agents_have_curricula_of_their_own(sampler):
    sources = [A, replace(E, name="e"), B]
    schedule = cs.settings.federated(sources, rounds=2, clients_per_round=3, stragglers=0.4)
    given, found, notes = training(epochs=4, sampler=sampler), {}, []
    for engine in ("serial", "batched"):
        lines = []
        run = cs.run(schedule, cs.methods.fedavg(), mlp(), given, engine=engine, progress=lines.append)
        notes = [line["note"] for line in lines if "note" in line]
        found[engine] = run, [line["examples"] for line in lines if line["event"] == "visit"]
    assert "batched: 3 agents a step, 59 numbers each" in notes
    (serial, counts), (stacked, others) = found["serial"], found["batched"]
    near(stacked.params, serial.params, 1e-10)
    assert counts == others and serial.costs["macs"] == stacked.costs["macs"]


def test_a_client_goes_on_where_its_last_visit_ended():
    schedule = cs.settings.federated([A], rounds=4, clients_per_round=1)
    run, lines = visits(schedule, Curriculum(start=0.3, rescore=3), cs.methods.fedavg(), epochs=2)
    # One client is one learner whose optimiser restarts: eight epochs in four visits.
    net, (x, y), counts, known = plain(), A.train.whole(), [], None
    for at in range(8):
        if at % 3 == 0:
            with torch.no_grad():
                known = cross_entropies(net(x), y)
        if at % 2 == 0:
            step = sgd(net)
        count = int(round((0.3 + 0.7 * at / 7) * 30, 9))
        g = key(0, "a", at // 2, at % 2, 0, "shuffle")
        order = torch.randperm(30, generator=g)
        if count < 30:
            order = order[known[order].argsort()][:count][torch.randperm(count, generator=g)]
        counts.append(count)
        for i in order.split(8):
            step.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            step.step()
    near(run.params, entries(net))
    assert [line["examples"]["a"] for line in lines] == [counts[i : i + 2] for i in (0, 2, 4, 6)]


def test_a_client_that_is_asked_once_sees_all():
    schedule = cs.settings.federated([A, B, replace(E, name="e")], rounds=4, clients_per_round=1)
    _, lines = visits(schedule, Curriculum(start=0.5), cs.methods.fedavg(), epochs=1)
    found = {}
    for line in lines:
        ((name, (count,)),) = line["examples"].items()
        found.setdefault(name, []).append(count / {"a": 30, "b": 21, "e": 26}[name])
    # Others begin with a half of their examples.
    assert [1.0] in found.values()
    assert all(shares[-1] == 1 and (len(shares) == 1 or shares[0] <= 0.5) for shares in found.values())


def test_every_source_of_a_continual_learner_has_a_curriculum():
    _, lines = visits(cs.settings.continual([A, B]), Curriculum(start=0.5), cs.methods.er(8), epochs=3)
    assert [line["examples"] for line in lines] == [{"a": [15, 22, 30]}, {"b": [10, 15, 21]}]
    _, (line,) = visits(cs.settings.multitask([A, B]), Curriculum(start=0.5), epochs=3)
    assert line["examples"] == {"a": [15, 22, 30], "b": [10, 15, 21]} and line["steps"] == 2 + 3 + 4


def test_trackers_get_the_share_of_the_examples():
    found = {}
    given = training(epochs=3, sampler=Curriculum(start=0.5, over=5))
    trackers = [lambda scalars, step: found.update(scalars)]
    with pytest.warns(UserWarning, match="never sees all"):
        cs.run(cs.settings.multitask([A, B]), cs.methods.finetune(), mlp(), given, trackers=trackers)
    assert found["train/pace/a"] == 22 / 30 and found["train/pace/b"] == 15 / 21


def test_early_stopping_goes_back_to_the_curriculum_of_the_best_epoch(tmp_path):
    def run(**more):
        given = training(epochs=8, lr=0.5, sampler=SAMPLERS["linear"], stopping=2)
        return cs.run(cs.settings.continual([A, B]), cs.methods.finetune(), mlp(), given, **more)

    whole = run()
    stopped(run, tmp_path, whole.costs["steps"] // 2)
    again = run(out=tmp_path, resume=True)
    assert all(torch.equal(p, again.params[name]) for name, p in whole.params.items())


def test_a_straggler_stops_inside_the_same_curriculum():
    def run(fraction):
        lines = []
        given = training(epochs=4, sampler=Curriculum(start=0.5, rescore=1))
        schedule = cs.settings.merging([A], fraction=fraction)
        cs.run(schedule, cs.methods.parameter_average(), mlp(), given, progress=lines.append)
        return next(line for line in lines if line["event"] == "visit")

    # 15, 20, 25 and 30 examples are 2, 3, 4 and 4 steps.
    assert [run(fraction)["steps"] for fraction in (1, 0.5, 0.7, 0.01)] == [13, 5, 8, 1]
    assert run(0.5)["examples"] == {"a": [15, 20]}


def test_what_a_curriculum_cannot_do_is_refused():
    def refused(match, make, sources=(A,), epochs=6):
        with pytest.raises(cs.ConsilienceError, match=match):
            visits(cs.settings.continual(list(sources)), make(), epochs=epochs)

    refused(r"`start` must be a fraction in \(0, 1\), got 1.5", lambda: Curriculum(start=1.5))
    refused("`over` must be a whole number >= 2, got 1", lambda: Curriculum(over=1))
    refused("`pacing` must be .* got 'sqr'; nearest: sqrt", lambda: Curriculum(pacing="sqr"))
    refused("`difficulty` must be .* got 'los'; nearest: loss", lambda: Curriculum("los"))
    refused("`rescore` has no effect", lambda: Curriculum("length", rescore=2))
    refused("`anti` has no effect", lambda: Curriculum("random", anti=True))
    refused("`steps` has no effect with pacing='linear'", lambda: Curriculum(steps=3))
    refused("`start` has no effect with pacing='b", lambda: Curriculum(pacing="baby-step", start=0.1))
    refused("`least` has no effect", lambda: Curriculum(least=0.1))
    refused("`start` has no effect with a `threshold`", lambda: SelfPaced(1.0, start=0.5))
    refused("`growth` must be >= 1", lambda: SelfPaced(growth=0.5))
    refused("two epochs or more", lambda: Curriculum(), epochs=1)
    refused("two epochs or more", lambda: SelfPaced(), epochs=1)
    refused("each of the 30 training examples of 'a', got 29", lambda: Curriculum(torch.zeros(29)))
    refused("by source where there are several", lambda: Curriculum(torch.zeros(30)), (A, B))
    refused("got 'b'", lambda: Curriculum({"a": torch.zeros(30)}), (A, B))
    refused("finite numbers", lambda: Curriculum([0.0, math.nan]))
    refused(r"shares in \(0, 1\], got 0.0", lambda: Curriculum(pacing=lambda t: t))
    refused(r"must return difficulties \[B\].* got \(30, 1, 6\)", lambda: Curriculum(lambda x: x[:, None]))
    refused("must be numbers, got NaN", lambda: Curriculum(lambda x: x[:, 0] * math.nan))
    refused("above some losses, got 0.01 where those of 'a' begin at", lambda: SelfPaced(0.01))
    refused("needs targets that are classes", lambda: Curriculum("confidence"), (source("v", kind="value"),))
    with pytest.raises(cs.Refusal, match="the method trains on pools of several sources"):
        given = Curriculum({"a": torch.zeros(30), "b": torch.zeros(21)})
        visits(cs.settings.continual([A, B]), given, cs.methods.joint())
    with pytest.warns(UserWarning, match="never sees all examples: it takes over=9 epochs"):
        visits(cs.settings.continual([A]), Curriculum(over=9))


def test_given_difficulties_and_teachers_tell_runs_apart():
    def text(difficulty):
        return identity(Curriculum(difficulty))

    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    many = torch.arange(2000.0)
    other = many.clone()
    other[1000] = 0
    assert text(first) == text(first) != text(second)
    assert text(many) == text(many.clone()) != text(other)


def test_focal_loss_at_gamma_zero_is_cross_entropy():
    found = [
        cs.run(cs.settings.continual([A]), cs.methods.finetune(), mlp(), training(loss=loss)).params
        for loss in (None, cs.losses.focal(gamma=0.0))
    ]
    near(*found, 1e-14)


# What users and documents do


def test_the_example_is_the_documents_curriculum_in_a_tenth_of_its_lines(capsys):
    file = Path(__file__).parents[1] / "examples" / "curriculum.py"
    runpy.run_path(str(file), run_name="__main__")
    *epochs, last = capsys.readouterr().out.splitlines()
    size = len(cs.data.digits().train)
    # The last epoch of the document has all, too: its share is .2 + .8 t.
    counts = [int(round((0.2 + 0.8 * epoch / 14) * size, 9)) for epoch in range(15)]
    assert [int(line.split("(")[1].split()[0]) for line in epochs] == counts
    assert float(last.split()[1]) > 0.9

    # Of its code block of 217 lines, 185 are not empty.
    block = 185
    seeds = sorted((Path(os.environ.get("CONSILIENCE_DATA", "")).parent / "seeds").glob("001_*.txt"))
    if seeds:
        chapter = seeds[0].read_text().split("### Code: Curriculum Learning Scheduler")[1]
        code = chapter.split("```python\n")[1].split("```")[0]
        assert block == sum(bool(line.strip()) for line in code.splitlines())
    assert 10 * sum(bool(line.strip()) for line in file.read_text().splitlines()) <= block


@dataclass(frozen=True, eq=False)
class Paced(cs.Sampler):
    """A sampler as users write it, by a difficulty that is known beforehand."""

    difficulty: torch.Tensor
    epochs: int
    how: str = "linear"
    first: float = 0.2
    anti: bool = False

    def plan(self, targets, batch_size, epoch, generator):
        t, f = epoch / max(self.epochs - 1, 1), self.first
        grow = {
            "linear": t,
            "sqrt": math.sqrt(t),
            "exponential": 1 - math.exp(-3 * t),
            "step": min(int(5 * t), 4) / 4,
        }
        competence = math.sqrt(t * (1 - f * f) + f * f)
        c = min(1.0, competence if self.how == "competence" else f + (1 - f) * grow[self.how])
        count = int(round(c * len(targets), 9))
        kept = self.difficulty.argsort(descending=self.anti)[:count]
        return list(kept[torch.randperm(len(kept), generator=generator)].split(batch_size))


@pytest.mark.parametrize("how", ["linear", "sqrt", "exponential", "step", "competence"])
@pytest.mark.parametrize("anti", [False, True])
def test_a_curriculum_takes_what_a_sampler_of_ones_own_takes(how, anti):
    hard = torch.randn(30, generator=torch.Generator().manual_seed(1)).double()
    seen = {}

    def watched(kind):
        class Watched(kind):
            def plan(self, targets, batch_size, epoch, generator, **state):
                found = kind.plan(self, targets, batch_size, epoch, generator, **state)
                seen.setdefault(kind, {})[epoch] = {*torch.cat(found).tolist()}
                return found

        return Watched

    for sampler in (
        watched(Paced)(hard, 15, how, anti=anti),
        watched(Curriculum)(hard, how, anti=anti),
    ):
        visits(cs.settings.continual([A]), sampler, epochs=15)
    own, ours = seen[Paced], seen[Curriculum]
    # Only an exponential of one's own never sees all.
    assert {epoch for epoch in range(15) if own[epoch] != ours[epoch]} == (
        {14} if how == "exponential" else set()
    )
    assert len(ours[0]) == 6 and len(ours[14]) == 30


def test_the_hardest_first_are_wrong_labels():
    digits = cs.data.digits()
    (x, y), g = digits.train.whole(), torch.Generator().manual_seed(0)
    bad = torch.rand(len(y), generator=g) < 0.3
    wrong = torch.where(bad, torch.randint(0, 10, y.shape, generator=g), y)
    classes = [str(i) for i in range(10)]
    noisy = cs.data.arrays(x, wrong, test=digits.test.whole(), classes=classes, name="noisy", validation=0.0)
    schedule = cs.settings.continual([noisy])

    # A ridge head of the same labels says how unlikely each is.
    x, y = noisy.train.whole()
    teacher = cs.run(schedule, cs.methods.fed3r())
    unlikely = -teacher.predict(x)[torch.arange(len(y)), y].clamp(min=1e-9).log()

    def trained(sampler):
        given = cs.Training(epochs=8, lr=0.1, sampler=sampler)
        return cs.run(schedule, cs.methods.finetune(), training=given).score

    with pytest.warns(UserWarning, match="never sees all examples"):
        easy, hard = (trained(Curriculum(unlikely, over=80, start=0.6, anti=anti)) for anti in (False, True))
    assert hard + 0.05 < min(easy, trained(None))
