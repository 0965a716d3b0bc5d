"""Curricula, and what may be kept of each example: against hand-written loops in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import consilience as cs
from consilience.core.contexts import Context, StepView
from restate import A, B, batches, entries, final, mlp, near, plain, sgd, stopped, training

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
    for agent, source, total in (("client-0", A, 20), ("client-1", B, 15)):
        steps = max(1, round(fractions[agent] * total))
        assert 0 < steps < total
        assert torch.equal(kept(run.agents[agent], source.name)["seen/0"], tired(source, steps, epochs=5)[1])


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
