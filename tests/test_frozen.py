"""Frozen entries and derived buffers are common ground: shared, never trained, sent, saved or cast."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import consilience as cs
from consilience.core.errors import Interrupted
from consilience.core.message import Message, Weights
from consilience.core.params import Layout, content_hash, placed, same
from consilience.core.state import Frozen, decode_state, encode_state
from consilience.loop.checks import RunOptions
from consilience.loop.run import begin, drive

TRAINING = cs.Training(epochs=1, lr=0.1, batch_size=32)
FROZEN_BYTES, OWN_BYTES = 2000 * 16 * 4, (16 * 8 * 4 + 4) * 4


class Marked(nn.Module):
    """A frozen embedding that is far larger than the rest, position ids, and a norm in the frozen part."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.words = nn.Sequential(nn.Embedding(2000, 16), nn.BatchNorm1d(8)).to(dtype)
        self.head = nn.Linear(16 * 8, 4)
        self.words.requires_grad_(False)
        self.register_buffer("places", torch.arange(8), persistent=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.head(self.words(x).flatten(1).to(self.head.weight.dtype))


def module(dtype: torch.dtype = torch.float32, seed: int = 0) -> Marked:
    torch.manual_seed(seed)
    return Marked(dtype)


def data(clients: int = 4) -> list[Any]:
    r = np.random.default_rng(0)
    source = cs.data.arrays(r.integers(0, 2000, (200, 8)), r.integers(0, 4, 200), name="ids")
    return cs.data.iid(source, clients)


def heads(net: nn.Module | None = None) -> Any:
    body = nn.Sequential((net or module()).words, nn.Flatten())
    return cs.models.multi_head(cs.models.wrap(body, outputs=128, headless=True), 4)


def tasks() -> list[Any]:
    parts = cs.data.split_classes(data(1)[0], 2)
    return [part.map(task=f"t{i}") for i, part in enumerate(parts)]


def kept_bytes(folder: Any) -> int:
    # The last two checkpoints are kept.
    return max(file.stat().st_size for file in (folder / "checkpoint").glob("state-*"))


def trials(schedule: Any, method: Any, model: Any, training: Any = TRAINING, **options: Any) -> Any:
    session = begin(schedule, method, model, training, cs.engines.serial(), RunOptions(**options))
    drive([session], session.engine)
    return session.trials


# What is frozen.


def test_entries_without_gradient_are_frozen_in_every_form():
    net = module()
    names = {"words.0.weight", "words.1.weight", "words.1.bias"}
    for model in (
        cs.models.wrap(net),
        cs.models.wrap(module),
        cs.models.frozen(cs.models.wrap(net), "words.0.*"),
    ):
        assert {n for n in model.entries if model.frozen(n)} == names
        derived = {n for n in model.init(torch.Generator())[1] if model.derived(n)}
        assert derived == {
            "places",
            *(f"words.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")),
        }
    on_heads = heads(net)
    assert all(on_heads.frozen(n) for n in on_heads.init(torch.Generator())[0])
    assert on_heads.derived("trunk.0.1.running_mean") and not on_heads.derived("heads.a.columns")
    assert cs.models.adapters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), 3).trunk.frozen("0.weight")
    half = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    half[0].requires_grad_(False)
    line = cs.models.linearised(cs.models.wrap(half))
    start = line.init(torch.Generator())[0]
    assert [n for n in start if not line.frozen(n)] == [
        "1.weight",
        "1.bias",
    ] and "origin.0.weight" not in start
    wide = cs.models.fourier_features(cs.models.wrap(half), 8)
    assert wide.frozen("body.0.weight") and not wide.frozen("head.weight")


@pytest.mark.parametrize("form", ["module", "wrap", "function"])
@pytest.mark.parametrize("setting", ["continual", "federated", "multitask"])
def test_what_is_frozen_is_not_trained(form, setting):
    net = module()
    before = copy.deepcopy(net.state_dict())
    parts = data(2)
    schedule = {
        "continual": lambda: cs.settings.continual(parts),
        "federated": lambda: cs.settings.federated(parts, rounds=2),
        "multitask": lambda: cs.settings.multitask(parts),
    }[setting]()
    model = {"module": net, "wrap": cs.models.wrap(net), "function": cs.models.wrap(module)}[form]
    run = cs.run(schedule, cs.methods.finetune(), model, TRAINING)
    params = run.params
    assert not torch.equal(params["head.weight"], before["head.weight"])
    if form != "function":
        for name in ("words.0.weight", "words.1.weight", "words.1.bias"):
            assert torch.equal(params[name], before[name]), name
    # A norm of a frozen part keeps its statistics; another buffer is counted on.
    assert torch.equal(run.agent.state.buffers["words.1.running_mean"], torch.zeros(8))
    assert run.agent.state.buffers["seen"] > 0
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items()), "the user's module moved"


def test_flags_and_patterns_give_the_same_bits():
    flagged, plain = module(), module()
    for p in plain.parameters():
        p.requires_grad_(True)
    runs = [
        cs.run(cs.settings.federated(data(), rounds=2), cs.methods.fedavg(), model, TRAINING)
        for model in (cs.models.wrap(flagged), cs.models.wrap(plain, frozen=("words.*",)))
    ]
    assert runs[0].agent.state.origin == runs[1].agent.state.origin
    assert all(torch.equal(p, runs[1].params[n]) for n, p in runs[0].params.items())


def test_a_model_without_anything_to_train_is_refused():
    net = module().requires_grad_(False)
    with pytest.raises(cs.Refusal, match="nothing of the model can be trained: all 5 entries are frozen"):
        cs.run(cs.settings.continual(data(2)), cs.methods.finetune(), net, TRAINING)
    run = cs.run(cs.settings.continual(tasks(), "task"), cs.methods.finetune(), heads(), TRAINING)
    assert sum(n.startswith("heads.") for n in run.agent.state.params) == 2 * len(tasks())


# Held once.


def test_agents_and_seeds_hold_the_same_tensors():
    model = cs.models.wrap(module())
    method, schedule = cs.methods.fedavg(), cs.settings.federated(data(), rounds=1)
    found = trials(schedule, method, model, repeats=2)
    session = begin(schedule, method, model, TRAINING, cs.engines.serial(), RunOptions(seed=5))
    drive([session], session.engine)
    agents = [*session.trials[0].agents.values(), *found[0].agents.values()]
    assert len(agents) > 5
    own = agents[0].state
    for agent in agents:
        state = agent.state
        for name in ("words.0.weight", "words.1.bias"):
            assert state.params[name] is own.params[name]
            assert not state.base or state.base[name] is own.params[name]
        assert state.buffers["places"] is own.buffers["places"]
    memory = {t.data_ptr() for a in agents for t in a.state.params.values() if t.numel() == 32000}
    assert memory == {model.module.words[0].weight.data_ptr()}


def test_a_given_module_is_one_for_all_seeds_and_a_functions_is_one_per_seed():
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    given, made = cs.models.wrap(module()), cs.models.wrap(Marked)
    a, b = (given.init(g)[0] for g in generators)
    assert a["words.0.weight"] is b["words.0.weight"] and a["head.weight"] is not b["head.weight"]
    assert (
        cs.models.frozen(given, "head.bias").init(generators[0])[0]["words.0.weight"] is a["words.0.weight"]
    )
    trunk = cs.models.multi_head(given, 4)
    assert trunk.init(generators[0])[0]["trunk.words.0.weight"] is a["words.0.weight"]
    c, d = (made.init(g)[0] for g in generators)
    assert not torch.equal(c["words.0.weight"], d["words.0.weight"])


def test_a_given_module_lends_its_frozen_entries_and_nothing_else():
    """A model of 7 GB needs no second copy; what is trained is the model's own, and so are places."""
    net = module()
    model = cs.models.wrap(net)
    own = model.init(torch.Generator())[0]
    assert own["words.0.weight"].data_ptr() == net.words[0].weight.data_ptr()
    assert own["head.weight"].data_ptr() != net.head.weight.data_ptr()
    with torch.no_grad():
        net.head.weight.zero_()
        net.words[1].running_mean.add_(1)
    net.double()
    again, buffers = model.init(torch.Generator())
    assert again["words.0.weight"].dtype == torch.float32 and again["head.weight"].any()
    assert not buffers["words.1.running_mean"].any()

    # A pattern freezes entries that their owner may still train: they are copied.
    net = module()
    pattern = cs.models.wrap(net.requires_grad_(True), frozen=("words.*",))
    assert pattern.init(torch.Generator())[0]["words.0.weight"].data_ptr() != net.words[0].weight.data_ptr()


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_a_copy_of_a_model_is_as_good_as_the_model(copied):
    """Copies count the changes of their tensors from 0, as in `models.macs`, which runs on one."""
    net = module()
    model = cs.models.wrap(net)
    # What a state dict was loaded into has changed before, and its copy has not.
    net.load_state_dict(net.state_dict())
    model = cs.models.wrap(net)
    assert net.words[0].weight._version > 0
    for whole in (model, cs.models.multi_head(model, 4), cs.models.frozen(model, "head.bias")):
        again = copied(whole).init(torch.Generator().manual_seed(0))[0]
        assert same(again, whole.init(torch.Generator().manual_seed(0))[0])
    assert cs.models.macs(model, torch.zeros(1, 8, dtype=torch.long)) > 0

    # A copy of one that was changed would hide the change.
    twin = copied(model)
    with torch.no_grad():
        twin.module.words[0].weight.add_(1)
    with pytest.raises(cs.ConsilienceError, match="was changed there"):
        twin.init(torch.Generator())
    with pytest.raises(cs.ConsilienceError, match="was changed there"):
        copied(twin).init(torch.Generator())


def test_frozen_entries_that_their_owner_changes_are_refused():
    net = module()
    model = cs.models.wrap(net)
    with torch.no_grad():
        net.words[0].weight.add_(1)
    others = (cs.models.multi_head(model, 4), cs.models.frozen(model, "head.bias"))
    for changed in (model, *others):
        with pytest.raises(cs.ConsilienceError, match=r"and '.*words\.0\.weight' was changed there"):
            changed.init(torch.Generator())
    cs.models.wrap(net).init(torch.Generator())


def test_what_must_be_cast_is_cast_once():
    half, full = torch.ones(3, dtype=torch.bfloat16), torch.ones(3)
    cpu = torch.device("cpu")
    assert placed(half, cpu, torch.float64) is half and placed(full, cpu, torch.float32) is full
    wide = placed(full, cpu, torch.float64)
    assert wide.dtype == torch.float64 and placed(full, cpu, torch.float64) is wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_short_types_stay_and_only_what_moves_is_in_theta(dtype, precision):
    training = cs.Training(epochs=1, lr=0.1, batch_size=32, precision=precision, optimiser="adam")
    net = module(dtype)
    net.register_parameter("code", nn.Parameter(torch.arange(5, dtype=torch.int8), requires_grad=False))
    (trial,) = trials(cs.settings.continual(data(2)), cs.methods.finetune(), cs.models.wrap(net), training)
    state = trial.agent.state
    assert state.params["words.0.weight"].dtype == dtype and state.params["code"].dtype == torch.int8
    assert state.params["head.weight"].dtype == training.dtype
    job = trial.agent.prepare([data(2)[0].name])
    assert job.layout.names == ("head.bias", "head.weight") and job.layout.dtype == training.dtype
    assert job.carry.theta.nbytes == OWN_BYTES * training.dtype.itemsize // 4
    assert sum(t.numel() for t in job.carry.optimiser.values()) <= 2 * job.layout.size + 2
    assert job.fixed["words.0.weight"] is state.frozen.params["words.0.weight"]
    # The first entry of all is of the short type, and only those that move make a layout.
    assert Layout.of(state.frozen.without(state.params)).dtype == training.dtype


@pytest.mark.parametrize("kind", ["multi_head", "adapters", "beneficial_biases"])
def test_heads_and_adapters_on_a_short_backbone_are_trained_in_the_runs_precision(kind):
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(128, 16).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.bfloat16()).relu()

    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.short = module(torch.bfloat16).words, Short()

        def forward(self, x: Tensor) -> Tensor:
            return self.short(self.words(x).flatten(1))

    trunk = cs.models.wrap(Ids().requires_grad_(False), outputs=16, headless=True)
    model = getattr(cs.models, kind)(trunk, 4)
    run = cs.run(cs.settings.continual(tasks(), "task"), cs.methods.finetune(), model, TRAINING)
    held = run.agent.state.params
    assert {p.dtype for n, p in held.items() if n.startswith("trunk.")} == {torch.bfloat16}
    assert {p.dtype for n, p in held.items() if not n.startswith("trunk.")} == {torch.float32}
    start = model.grow(*model.init(torch.Generator()), tasks()[0], torch.Generator().manual_seed(0))[0]
    assert any(not torch.equal(p, run.params[n]) for n, p in start.items() if n.startswith("heads."))


# In no message and no checkpoint.


def test_a_round_sends_and_keeps_what_moves(tmp_path):
    """8 messages of what is trained, each with a header; a checkpoint has what is trained once."""
    run = cs.run(
        cs.settings.federated(data(), rounds=1), cs.methods.fedavg(), module(), TRAINING, out=tmp_path
    )
    assert 8 * OWN_BYTES < run.costs["bytes"] < 8 * (OWN_BYTES + 1000)
    assert OWN_BYTES < kept_bytes(tmp_path) < OWN_BYTES + 1500 < FROZEN_BYTES
    frozen = content_hash(run.agent.state.frozen.params | run.agent.state.frozen.buffers)
    assert run.agent.state.frozen.hash == frozen
    index = json.loads((tmp_path / "checkpoint" / "index.json").read_text())
    assert {a["frozen"] for a in index["facts"]["trials"]["0"]["agents"].values()} == {frozen}


def test_seeds_of_one_module_keep_what_moves(tmp_path):
    cs.run(cs.settings.continual(data(2)), cs.methods.finetune(), module(), TRAINING, repeats=3, out=tmp_path)
    assert kept_bytes(tmp_path) < 3 * (2 * OWN_BYTES + 1500) < FROZEN_BYTES


def test_agents_that_share_modules_send_heads(tmp_path):
    parts = tasks()
    schedule = cs.settings.skill([[part] for part in parts], share="task")
    run = cs.run(schedule, cs.methods.skill("nearest_mean"), heads(), TRAINING, out=tmp_path)
    module_ = next(iter(run.agent.state.experts.values()))
    assert not any("trunk" in name for name in module_.tensors)
    assert module_.meta["backbone"] == run.agent.state.frozen.hash
    assert kept_bytes(tmp_path) < FROZEN_BYTES


def test_methods_that_keep_rounds_keep_what_moves():
    schedule = cs.settings.federated(data(), rounds=3, participation=0.5)
    for method in (cs.methods.ghbm(), cs.methods.scaffold(), cs.methods.feddyn()):
        (trial,) = trials(schedule, method, cs.models.wrap(module()))
        for agent in trial.agents.values():
            tensors, _ = encode_state(agent.state)
            assert all(t.numel() < 2000 * 16 for t in tensors.values()), method.name


def test_personal_and_frozen_entries_stay_apart():
    """A released client keeps what is frozen and its own; what it receives is put over them."""
    model = cs.models.wrap(module())
    method = cs.Method("personal", personal=("head.bias",))
    (trial,) = trials(cs.settings.federated(data(), rounds=2), method, model)
    clients = [a for name, a in trial.agents.items() if name != trial.agent.name]
    assert clients and all(c.state.params.keys() >= c.state.frozen.params.keys() for c in clients)
    sent = {name for m in trial.agent.send({}) for name in m.items["model"].tensors}
    assert sent == {"params/head.weight", "buffers/seen"}


def test_a_state_is_read_over_the_same_frozen_entries_only():
    (trial,) = trials(cs.settings.federated(data(), rounds=1), cs.methods.fedavg(), cs.models.wrap(module()))
    state = trial.agent.state
    tensors, facts = encode_state(state)
    facts = json.loads(json.dumps(facts))
    back = decode_state(tensors, facts, state.frozen)
    assert back.params.keys() == state.params.keys() and back.base.keys() == state.base.keys()
    assert all(back.base[n] is back.params[n] for n in back.base)
    assert back.params["words.0.weight"] is state.params["words.0.weight"]
    other = {**state.frozen.params, "words.1.bias": torch.ones(8)}
    for frozen in (None, Frozen(other, state.frozen.buffers)):
        with pytest.raises(
            cs.ConsilienceError, match="must be read with the frozen entries that it was kept"
        ):
            decode_state(tensors, facts, frozen)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_an_interrupted_run_resumes_over_what_is_frozen(tmp_path, optimiser):
    schedule, method = cs.settings.federated(data(), rounds=2), cs.methods.fedavg()
    training = cs.Training(epochs=2, lr=0.05, batch_size=16, optimiser=optimiser)
    whole = cs.run(schedule, method, module(), training)

    options = {"out": tmp_path, "checkpoint_steps": 1}
    session = begin(
        schedule, method, cs.models.wrap(module()), training, cs.engines.serial(), RunOptions(**options)
    )
    trial, count = session.trials[0], 0
    tick = trial.tick

    def stop(trial: Any, job: Any) -> None:
        nonlocal count
        count += job is not None
        tick(trial, job)
        if count == 9:
            raise Interrupted("in the middle of a visit")

    trial.tick = stop
    with pytest.raises(Interrupted):
        drive([session], session.engine)
    session.close()
    assert kept_bytes(tmp_path) < 12 * OWN_BYTES < FROZEN_BYTES

    again = cs.run(schedule, method, module(), training, out=tmp_path, resume=True)
    assert all(torch.equal(p, again.params[n]) for n, p in whole.params.items())
    assert torch.equal(whole.agent.state.buffers["seen"], again.agent.state.buffers["seen"])
    with pytest.raises(
        cs.ConsilienceError, match="resumes with the configuration it began with, and `model` was"
    ):
        cs.run(schedule, method, module(seed=1), training, out=tmp_path, resume=True)


def test_another_base_is_found_on_resume(tmp_path):
    parts, model = data(2), cs.models.wrap(module())
    base = module().state_dict()
    other = {**base, "words.1.bias": torch.ones(8)}

    def run(base: Any, **more: Any) -> None:
        cs.run(cs.settings.merging(parts, base=base), cs.methods.average(), model, TRAINING, **more)

    run(base, out=tmp_path)
    with pytest.raises(cs.ConsilienceError, match="`base` was"):
        run(other, out=tmp_path, resume=True)


def test_the_folder_of_a_run_is_read_with_the_frozen_entries_of_its_base(tmp_path):
    from consilience.cli.choose import checkpoint_of
    from consilience.loop.session import saved_agents

    run = cs.run(cs.settings.continual(data(2)), cs.methods.finetune(), module(), TRAINING, out=tmp_path)
    base = {**module().state_dict(), "places": torch.arange(8)}
    found = checkpoint_of(str(tmp_path), base)
    assert all(torch.equal(found[name], p) for name, p in run.params.items())
    for wrong in (None, {n: t for n, t in base.items() if n != "words.0.weight"}):
        with pytest.raises(
            cs.ConsilienceError, match="has only what was trained.*got no 'words.0.weight' there"
        ):
            checkpoint_of(str(tmp_path), wrong)
    with pytest.raises(cs.ConsilienceError, match="a state must be read with the frozen entries"):
        saved_agents(tmp_path, {**base, "words.1.bias": torch.ones(8)}.__getitem__)


def test_weights_over_other_frozen_entries_are_refused():
    schedule, method = cs.settings.federated(data(), rounds=1), cs.methods.fedavg()
    (trial,) = trials(schedule, method, cs.models.wrap(module()))
    server = trial.agent
    (message,) = server.send({})
    tensors = message.items["model"].tensors
    for meta, got in (({}, r"\(none\)"), ({"backbone": "0" * 32}, "00000000")):
        strange = Message("x", "", 99, 1, message.origin, "", {"model": Weights(tensors, meta)})
        with pytest.raises(cs.ConsilienceError, match=f"the receiver's frozen entries .* got {got} from 'x'"):
            server.receive([strange])


def test_heads_alone_may_be_received_by_one_that_has_others():
    """Only heads travel where the trunk is frozen, and two agents may have none in common."""
    parts = tasks()
    schedule = cs.settings.merging(parts, scenario="task")
    run = cs.run(schedule, cs.methods.average(), heads(), TRAINING)
    assert {n.split(".")[1] for n in run.params if n.startswith("heads.")} == {"t0", "t1"}

    server = run.agent
    new = {"params/heads.t9.weight": torch.ones(2, 128), "params/heads.t9.bias": torch.zeros(2)}
    meta = {"backbone": server.state.frozen.hash}
    server.receive([Message("x", "", 99, 1, server.state.origin, "", {"model": Weights(new, meta)}, False)])
    assert torch.equal(server.state.params["heads.t9.weight"], torch.ones(2, 128))
    stranger = {"params/other.weight": torch.ones(2)}
    with pytest.raises(cs.ConsilienceError, match="must have the receiver's names"):
        server.receive([Message("y", "", 99, 1, server.state.origin, "", {"model": Weights(stranger, meta)})])


# Given experts and bases.


def experts(change: dict[str, Any]) -> list[Any]:
    """Two experts: one that repeats what is frozen, and one whose state_dict lacks or changes it."""
    parts, found = data(2), []
    for i, part in enumerate(parts):
        state = dict(module().state_dict())
        state["head.weight"] = state["head.weight"] + i
        for name, value in change.items() if i else ():
            if value is None:
                del state[name]
            else:
                state[name] = value
        found.append(cs.Expert(f"e{i}", state, part))
    return found


@pytest.mark.parametrize("base", [True, False])
def test_experts_may_leave_out_or_repeat_what_is_frozen(base):
    given = module().state_dict() if base else None
    lacking = {"words.0.weight": None, "words.1.running_mean": None}
    merged = [
        cs.run(
            cs.settings.merging(experts=experts(change), base=given), cs.methods.average(), module(), TRAINING
        )
        for change in ({}, lacking)
    ]
    expected = module().state_dict()["head.weight"] + 0.5
    for run in merged:
        assert torch.allclose(run.params["head.weight"], expected)
        assert torch.equal(run.params["words.0.weight"], module().state_dict()["words.0.weight"])


@pytest.mark.parametrize("name", ["words.0.weight", "words.1.running_mean"])
def test_experts_over_other_frozen_entries_are_refused_by_name(name):
    other = experts({name: module().state_dict()[name] + 1})
    with pytest.raises(cs.ConsilienceError, match=rf"'e1' has another '{name}'"):
        cs.run(cs.settings.merging(experts=other), cs.methods.average(), module(), TRAINING)


def test_a_base_may_leave_out_what_no_seed_changes():
    parts = data(2)
    base = {n: t for n, t in module().state_dict().items() if not n.startswith("words.")}
    run = cs.run(cs.settings.merging(parts, base=base), cs.methods.average(), module(), TRAINING)
    assert torch.equal(run.params["words.0.weight"], module().state_dict()["words.0.weight"])
    with pytest.raises(
        cs.ConsilienceError, match="must have all entries of the model, got none called 'words.0"
    ):
        cs.run(cs.settings.merging(parts, base=base), cs.methods.average(), Marked, TRAINING)
    codes = {**module().state_dict(), "words.0.weight": torch.ones(2000, 16, dtype=torch.int8)}
    with pytest.raises(cs.ConsilienceError, match="types of the model's frozen entries, got torch.int8"):
        cs.run(cs.settings.merging(parts, base=codes), cs.methods.average(), module(), TRAINING)


# Engines.


def test_stacked_agents_hold_what_is_frozen_once():
    from consilience.engines._stack import Cache, Stack

    schedule, model = cs.settings.federated(data(), rounds=1), cs.models.wrap(module())
    (trial,) = begin(schedule, cs.methods.fedavg(), model, TRAINING, cs.engines.serial(), RunOptions()).trials
    jobs = [trial.agents[f"client-{i}"].prepare([part.name]) for i, part in enumerate(data())]
    stack = Stack(jobs, [trial.ledger] * 4, Cache(False), print)
    big = [
        dim
        for tensor, dim in zip(stack.slots.tensors, stack.slots.dims, strict=True)
        if tensor.numel() >= 32000
    ]
    assert big == [None]
    assert {key.name for key in stack.state if key.kind == "buffer"} == {"seen"}


def test_the_batched_engine_agrees():
    schedule = cs.settings.federated(data(), rounds=2)
    one, two = (
        cs.run(schedule, cs.methods.fedavg(), module(), TRAINING, engine=engine)
        for engine in ("serial", "batched")
    )
    assert torch.allclose(one.params["head.weight"], two.params["head.weight"], atol=1e-6)
    assert one.agent.state.origin == two.agent.state.origin
    assert one.costs["bytes"] == two.costs["bytes"]


def test_ray_puts_what_is_frozen_into_the_store_once(monkeypatch):
    ray = pytest.importorskip("ray")
    sizes: list[int] = []
    put = ray.put

    def counting(value: Any) -> Any:
        held = value if isinstance(value, list) else []
        sizes.append(
            sum(part[-1].nbytes for part in held) or len(value) if isinstance(value, bytes | list) else 0
        )
        return put(value)

    monkeypatch.setattr(ray, "put", counting)
    schedule = cs.settings.federated(data(), rounds=3)
    one = cs.run(schedule, cs.methods.fedavg(), module(), TRAINING)
    two = cs.run(
        schedule, cs.methods.fedavg(), module(), TRAINING, engine=cs.engines.ray(workers=1), repeats=2
    )
    assert sum(size >= FROZEN_BYTES for size in sizes) == 1
    assert all(torch.equal(p, two.params[n]) for n, p in one.params.items())


# LoRA.


class LoRA(nn.Module):
    """A layer with factors under the names that peft gives them; with `embedding`, those of an embedding."""

    def __init__(self, seed: int, embedding: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(8, 3).requires_grad_(False)
        kind = "lora_embedding_" if embedding else "lora_"
        self.names = (f"{kind}A", f"{kind}B")
        for name, shape in zip(self.names, ((2, 8), (3, 2)), strict=True):
            setattr(self, name, nn.ParameterDict({"default": nn.Parameter(torch.randn(shape))}))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (getattr(self, name)["default"] for name in self.names)
        return self.layer(x) + x @ a.T @ b.T


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("setting", ["given", "merging", "federated", "gossip", "hierarchical", "one by one"])
def test_factors_are_not_combined_one_by_one(setting, embedding):
    """(B1 + B2)(A1 + A2) / 4 is not (B1 A1 + B2 A2) / 2."""
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    source = cs.data.arrays(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long(), name="d")
    base, clients = LoRA(0, embedding).state_dict(), cs.data.iid(source, 2)
    given = [cs.Expert(name, base, source.map(name=name)) for name in ("one", "two")]
    method = cs.methods.running_average() if setting == "one by one" else cs.methods.average()
    schedule = {
        "given": lambda: cs.settings.merging(experts=given, base=base),
        "merging": lambda: cs.settings.merging(clients),
        "federated": lambda: cs.settings.federated(clients, rounds=2),
        "gossip": lambda: cs.settings.gossip(clients, rounds=2),
        "hierarchical": lambda: cs.settings.hierarchical(clients, 2, rounds=2),
        "one by one": lambda: cs.settings.exmodel(clients),
    }[setting]()
    with pytest.raises(cs.Refusal, match="lora_.*one by one, and the model uses their product.*freeze every"):
        cs.run(schedule, method, LoRA(0, embedding), TRAINING)


def test_one_common_factor_makes_averages_exact():
    """A frozen A is that of all, so the mean of B is exact; so is an A that is personal, or one client."""
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    source = cs.data.arrays(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long(), name="d")
    clients, net = cs.data.iid(source, 2), LoRA(0)
    net.lora_A.requires_grad_(False)
    a, b = net.lora_A["default"].detach().clone(), "lora_B.default"
    run = cs.run(cs.settings.federated(clients, rounds=1), cs.methods.fedavg(), net, TRAINING)
    own = []
    for client in clients:
        alone = cs.settings.federated([client], rounds=1)
        own.append(cs.run(alone, cs.methods.fedavg(), net, TRAINING).params[b])
    mean = sum(len(c.train) * p @ a for c, p in zip(clients, own, strict=True))
    mean = mean / sum(len(c.train) for c in clients)
    assert torch.allclose(run.params[b] @ a, mean, atol=1e-6)
    assert not torch.allclose(own[0], own[1], atol=1e-3)

    cs.run(cs.settings.federated(clients, rounds=1), cs.methods.personal("lora_A.*"), LoRA(0), TRAINING)
    cs.run(cs.settings.federated(clients[:1], rounds=1), cs.methods.fedavg(), LoRA(0), TRAINING)
