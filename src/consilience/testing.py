"""Check a part of your own: the conformance checks that every part of the library passes.

`check(part)` takes a method, a correction, a mapper, an aggregator or a consolidator, runs it on a tiny
problem in every
setting, and returns a `Report`. It raises AssertionError with one line per fault.

>>> import consilience as cs
>>> report = cs.testing.check(cs.corrections.EWC(), settings=["continual (class)", "multitask"])
>>> report.settings["continual (class)"]
'runs'
>>> report.settings["multitask"].startswith("refuses: ")
True
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import json
import math
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import consilience as cs
from consilience.core.aggregator import Aggregator
from consilience.core.batch import Batch
from consilience.core.consolidator import Consolidator
from consilience.core.contexts import Begun, Context, Row, StepView
from consilience.core.correction import Correction, Mapper, overrides
from consilience.core.errors import ConsilienceError, Refusal, kind_of
from consilience.core.message import Message, Module, Private, Samples, Statistics, Weights
from consilience.core.method import Method
from consilience.core.model import Model
from consilience.core.params import pack, unpack
from consilience.core.schedule import Expert, Schedule
from consilience.core.source import Source, Tensors
from consilience.core.state import State, decode_state, encode_state
from consilience.core.takes import Takes
from consilience.core.training import Training
from consilience.loop.agent import Agent
from consilience.loop.result import Result

Part = Method | Correction | Aggregator | Consolidator
"""What can be checked; a Mapper is a Correction."""

# ------------------------------------------------------------------------------------------ a tiny problem

INPUTS, CLASSES, EXAMPLES = 8, 6, 60
"""Inputs [8], six classes, and 60 training examples in each of three sources."""

TRAINING = Training(epochs=2, batch_size=16, lr=0.2)
FP64 = Training(epochs=2, batch_size=16, lr=0.2, precision="fp64")


@cache
def sources() -> tuple[Source, ...]:
    """Three sources of two classes each: x [60, 8] in [0, 1], noisy points around one centre per class."""
    labels = tuple(("tiny", str(c)) for c in range(CLASSES))
    centres = torch.rand(CLASSES, INPUTS, generator=torch.Generator().manual_seed(1))

    def points(classes: tuple[int, ...], count: int, seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        targets = torch.tensor(classes).repeat(count)[:count]
        noise = torch.randn(count, INPUTS, generator=generator)
        return Tensors((centres[targets] + 0.15 * noise).clamp(0, 1), targets)

    made = []
    for i in range(3):
        classes = (2 * i, 2 * i + 1)
        train, validation, test = (points(classes, n, 10 * i + j) for j, n in enumerate((EXAMPLES, 6, 20)))
        made.append(Source(f"tiny/{i}", train, validation, test, labels, classes))
    return tuple(made)


def plain_model(outputs: int = CLASSES) -> Model:
    """A small perceptron for the tiny problem."""
    return cs.models.mlp(INPUTS, (16,), outputs)


@cache
def experts() -> tuple[Expert, ...]:
    """Three models that were trained apart, each on one source, from one start."""
    made = []
    for source in sources():
        result = quiet(cs.settings.continual([source]), cs.methods.finetune(), plain_model())
        made.append(Expert(f"expert of {source.name}", result.params, source))
    return tuple(made)


SETTINGS: dict[str, Callable[[], Schedule]] = {
    "multitask": lambda: cs.settings.multitask(sources()),
    "continual (class)": lambda: cs.settings.continual(sources(), "class"),
    "continual (task)": lambda: cs.settings.continual(sources(), "task"),
    "continual (domain)": lambda: cs.settings.continual(sources(), "domain"),
    "federated": lambda: cs.settings.federated(sources(), rounds=2),
    "federated_continual": lambda: cs.settings.federated_continual([sources()[:2], sources()[2:]], rounds=2),
    "merging": lambda: cs.settings.merging(sources()),
    "exmodel": lambda: cs.settings.exmodel(sources=sources()),
    "exmodel (given)": lambda: cs.settings.exmodel(experts()),
    "skill": lambda: cs.settings.skill([sources()[:2], sources()[2:]]),
}
"""The tiny problem in every setting: {name: makes the schedule}."""

EXCHANGING = ("federated_continual", "skill", "exmodel", "merging")
"""Settings in which agents receive what other agents learned."""

STREAMS = ("continual (class)", "continual (task)", "federated_continual", "skill")
"""Settings in which an agent trains one source after another, so that EWC and ER act."""

SEVERAL = ("federated", "federated_continual", "merging", "skill")
"""Settings in which several agents train, so that an engine can stack them."""


def quiet(
    schedule: Schedule, method: Any, model: Model | None = None, training: Training = TRAINING, **more: Any
) -> Result:
    """Run with warnings ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cs.run(schedule, method, model=model, training=training, **more)


# ------------------------------------------------------------------------------------------ comparing


def bits(value: Any) -> Any:
    """A value as bytes and plain objects that compare; generators, functions and models are left out."""
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous()
        content = held.view(-1).view(torch.uint8).numpy().tobytes() if held.numel() else b""
        return str(held.dtype), tuple(held.shape), content
    if isinstance(value, Mapping):
        return "map", tuple((bits(key), bits(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return "list", tuple(bits(inner) for inner in value)
    if isinstance(value, Model) or callable(value) or isinstance(value, torch.Generator):
        return None
    if hasattr(value, "__dataclass_fields__"):
        return type(value).__name__, tuple((f, bits(getattr(value, f))) for f in value.__dataclass_fields__)
    return repr(value)


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, sorted by name."""
    return dict(sorted(tensors.items()))


def state_of(result: Result) -> State:
    """The state of the agent that was evaluated."""
    assert result.agent is not None
    return result.agent.state


def state_bits(state: State) -> Any:
    """All tensors and facts of a state, as bytes that compare."""
    tensors, facts = encode_state(state)
    return bits(in_order(tensors)), json.dumps(facts, sort_keys=True)


def params_differ(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest absolute difference of two sets of parameters; infinite where their names differ."""
    if a.keys() != b.keys():
        return math.inf
    return max((float((a[n].double() - b[n].double()).abs().max()) for n in a if a[n].numel()), default=0.0)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put another attribute in the place of one of a class, for a while."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        # An inherited attribute must not stay behind as the class's own: `overrides` reads that.
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# ------------------------------------------------------------------------------------------ one check each

VERBS = tuple(
    name
    for name, member in vars(Correction).items()
    if inspect.isfunction(member) and not name.startswith("_") and name not in ("refuse", "default_model")
)
"""The verbs of a correction that a run calls, in the order in which the class lists them."""


def own_verbs(correction: Correction) -> list[str]:
    """The verbs that a correction overrides, with `route` where it is a mapper."""
    verbs = [verb for verb in VERBS if overrides(correction, verb)]
    return [*verbs, "route"] if isinstance(correction, Mapper) else verbs


def check_written(part: Part) -> None:
    """Check that a part is a frozen dataclass that compares, has a docstring, and spells its verbs right."""
    # What an author passes is mostly a method: the classes inside it are what was written.
    if isinstance(part, Method):
        for correction in part.all_corrections:
            check_written(correction)
        return
    kind = type(part)
    made = vars(kind).get("__dataclass_params__")
    assert made is not None, f"{kind.__name__} must be a dataclass: decorate it with @dataclass(frozen=True)"
    assert made.frozen and made.eq, f"{kind.__name__} must be a frozen dataclass that compares by its fields"
    doc = inspect.cleandoc(vars(kind).get("__doc__") or "")
    generated = doc.startswith(f"{kind.__name__}(")
    assert doc and not generated, f"{kind.__name__} must have a docstring of its own"
    assert doc.split("\n\n")[0].endswith("."), (
        f"the docstring of {kind.__name__} must begin with a sentence that ends with a period"
    )
    # Compositions are compared and cached by their fields.
    same = dataclasses.replace(part)  # type: ignore[type-var]
    assert same == part and hash(same) == hash(part), f"equal objects of {kind.__name__} must be equal"
    if isinstance(part, Correction):
        check_spelt(part)


def check_spelt(correction: Correction) -> None:
    """Check that a correction overrides a verb, and that no name nearly spells a verb or class attribute."""
    kind = type(correction)
    # All verbs are optional, so Python takes a misspelt one for a helper method and nothing is ever called.
    fields = {f.name for f in dataclasses.fields(correction)}  # type: ignore[arg-type]
    known = {name for owner in (Correction, Takes) for name in vars(owner) if not name.startswith("_")}
    known |= {"route", "rejects"}
    for name in vars(kind):
        if not name.startswith("_") and name not in known | fields:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            assert not near, (
                f"{kind.__name__}.{name} is no verb or class attribute; did you mean `{near[0]}`?"
            )
    own = own_verbs(correction)
    assert own, f"{kind.__name__} overrides no verb, so it can never act"
    assert "penalty" in own or "penalty_gradient" not in own, (
        f"{kind.__name__} overrides `penalty_gradient`, but not the `penalty` that it is the gradient of"
    )
    strange = sorted(set(correction.neutral) - fields)
    assert not strange, (
        f"`neutral` of {kind.__name__} must name fields of the class, got {', '.join(strange)}"
    )


def check_pure_verbs(correction: Correction, run: Callable[[], object]) -> set[str]:
    """Check that no verb that a run calls changes its arguments; return the verbs that were called."""
    called: set[str] = set()

    def watched(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = bits([*args, kwargs])
            result = function(*args, **kwargs)
            name = f"{type(args[0]).__name__}.{verb}"
            assert bits([*args, kwargs]) == before, f"{name} changes its arguments"
            called.add(verb)
            return result

        return call

    _with_replaced(_changes(correction, watched), run)
    return called


def check_returns(
    correction: Correction,
    run: Callable[[], Any],
    returned: Callable[[str, Any], None] | None = None,
) -> Any:
    """Run, and check that verbs return what they must; a fault in a verb is raised with its name.

    `returned(verb, result)` is called after each verb. Returns what `run` returns.
    """

    def typed(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            name = f"{type(args[0]).__name__}.{verb}"
            try:
                result = function(*args, **kwargs)
            except (ConsilienceError, AssertionError):
                raise
            # The cause is in the author's code: say in which verb, and what most often is wrong there.
            except Exception as error:
                hint = ""
                if any(isinstance(a, Context) and a.recalled is None for a in args):
                    hint = (
                        "; nothing is recalled in this visit: declare `needs_history` or `needs_revisits`, "
                        "or allow for None"
                    )
                raise AssertionError(f"{name} raises {type(error).__name__}: {error}{hint}") from error

            # A wrong type would end in a message from deep inside the step, or in none.
            fits, wanted = RETURNS[verb]
            got = (
                f"{type(result).__name__} {tuple(result.shape)}"
                if isinstance(result, Tensor)
                else kind_of(result)
            )
            assert fits(result, args), f"{name} must return {wanted}, got {got}"
            if verb == "penalty_gradient" and result is not None:
                _check_gradient(name, function, *args)
            if returned is not None:
                returned(verb, result)
            return result

        return call

    found: list[Any] = []
    _with_replaced(_changes(correction, typed), lambda: found.append(run()))
    return found[0]


def _changes(
    correction: Correction, wrapped: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> list[tuple[Any, str, Any]]:
    """Return the verbs to replace, each in the class that defines it: `knows_gradient` reads where."""
    found = []
    for verb in own_verbs(correction):
        owner = next(kind for kind in type(correction).__mro__ if verb in vars(kind))
        found.append((owner, verb, wrapped(verb, vars(owner)[verb])))
    return found


def _check_gradient(
    name: str, function: Callable[..., Any], correction: Correction, step: StepView, ctx: Context
) -> None:
    """Check that `penalty_gradient` is the gradient of `penalty`, by autograd."""
    # Not at theta itself: at the start of a visit a penalty may be flat, and only rounding would be compared.
    noise = torch.randn(step.theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaf = (step.theta + 0.1 * noise.to(step.theta)).detach().requires_grad_()
    moved = dataclasses.replace(step, theta=leaf)
    value = correction.penalty(moved, ctx)
    true = torch.autograd.grad(value, leaf)[0] if value.requires_grad else torch.zeros_like(leaf)
    vector, factor = function(correction, moved, ctx)
    apart, size = float((vector * factor - true).norm()), float(true.norm().clamp_min(1e-6))
    assert apart <= 1e-3 * size, (
        f"{name} differs from the gradient of `penalty` by {apart / size:.2g} of its norm"
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _all_of(value: Any, container: type, kind: type) -> bool:
    entries: Any = value
    return type(value) is container and all(isinstance(entry, kind) for entry in entries)


def _fits_losses(result: Any, args: Sequence[Any]) -> bool:
    """Whether `losses` returned one vector per part, as it was given."""
    given = args[1]
    return isinstance(result, Mapping) and all(
        part in result and isinstance(result[part], Tensor) and result[part].shape == loss.shape
        for part, loss in given.items()
    )


RETURNS: dict[str, tuple[Callable[[Any, Sequence[Any]], bool], str]] = {
    "gather": (lambda r, args: _all_of(r, tuple, Source), "a tuple of sources"),
    "begin": (lambda r, args: isinstance(r, Begun), "Begun(params, private, frozen)"),
    "recall": (lambda r, args: True, "anything"),
    "prepare_step": (
        lambda r, args: isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], Mapping),
        "({name: vector}, warning or None)",
    ),
    "sample": (lambda r, args: _all_of(r, list, Batch), "a list of Batch"),
    "view": (lambda r, args: isinstance(r, Mapping), "a mapping of parameters"),
    "losses": (_fits_losses, "{part: losses [B]} for every part that it was given"),
    "rows": (lambda r, args: _all_of(r, list, Row), "a list of Row"),
    "penalty": (lambda r, args: _is_scalar(r), "a scalar tensor"),
    "penalty_gradient": (
        lambda r, args: r is None or (isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], Tensor)),
        "(vector [n], factor) or None",
    ),
    "mask": (
        lambda r, args: isinstance(r, Tensor) and r.shape == args[1].theta.shape,
        "factors [n], one per entry of `step.theta`",
    ),
    "trace_init": (lambda r, args: isinstance(r, Mapping), "{name: tensor}"),
    "trace": (
        lambda r, args: isinstance(r, Mapping) and r.keys() == args[2].trace.keys(),
        "tensors with the names that `trace_init` gave",
    ),
    "summarise": (
        lambda r, args: r is None or isinstance(r, (Weights, Statistics, Module, Samples, Private)),
        "Statistics, Samples, Module, Weights, Private or None",
    ),
    "after_receive": (lambda r, args: isinstance(r, Mapping), "a memory {source: item}"),
    "trim": (lambda r, args: isinstance(r, Mapping), "a memory {source: item}"),
    "route": (lambda r, args: isinstance(r, Tensor) and r.ndim == 2, "weights [B, experts]"),
}
"""What each verb must return: a test of (result, arguments of the verb with self first), and words."""


AGENT_VERBS = ("prepare", "finish", "send", "receive", "predict")


def check_pure_agents(run: Callable[[], object]) -> set[str]:
    """Agents replace their state and never change one, nor what they receive; returns what was called."""
    called: set[str] = set()

    def watched(verb: str) -> Callable[..., Any]:
        whole = getattr(Agent, verb)

        def call(agent: Agent, *args: Any, **kwargs: Any) -> Any:
            state, received = agent.state, list(args[0]) if verb == "receive" else []
            before = bits(state), bits(received)
            result = whole(agent, *args, **kwargs)
            assert bits(state) == before[0], f"Agent.{verb} changes a state that stood before it"
            assert bits(received) == before[1], f"Agent.{verb} changes the messages that it receives"
            called.add(verb)
            return result

        return call

    _with_replaced([(Agent, verb, watched(verb)) for verb in AGENT_VERBS], run)
    return called


def check_pure_consolidator(consolidator: Consolidator, run: Callable[[], object]) -> int:
    """The same state, messages and generator give the same bits; returns how often it received."""
    kind, received = type(consolidator), 0
    receive = kind.receive

    def call(
        self: Any, model: Model, state: State, fresh: Any, by_size: bool, generator: torch.Generator
    ) -> State:
        nonlocal received
        # Generators may move on; a second call gets one that stands where the first stood.
        twin = torch.Generator()
        twin.set_state(generator.get_state())
        before = bits(state), bits(list(fresh))
        first = receive(self, model, state, fresh, by_size, generator)
        assert (bits(state), bits(list(fresh))) == before, f"{kind.__name__}.receive changes its arguments"
        again = receive(self, model, state, fresh, by_size, twin)
        assert bits(first) == bits(again), f"{kind.__name__}.receive gives other bits the second time"
        received += bool(fresh)
        return first

    _with_replaced([(kind, "receive", call)], run)
    return received


def check_seeded(run: Callable[[int], Result]) -> None:
    """One seed gives the same bits, whatever the global random state; another seed gives others."""
    first = run(0)
    # A part that reads a global generator gives other numbers now.
    torch.manual_seed(12345)
    np.random.seed(12345)
    random.seed(12345)
    before = torch.get_rng_state(), repr(np.random.get_state(legacy=False)), random.getstate()

    again = run(0)
    assert torch.equal(before[0], torch.get_rng_state()), "the global random state of torch moves"
    assert before[1] == repr(np.random.get_state(legacy=False)), "the global random state of numpy moves"
    assert before[2] == random.getstate(), "the global random state of Python moves"
    assert state_bits(state_of(first)) == state_bits(state_of(again)), "one seed gives two results"
    assert np.array_equal(first.matrices, again.matrices, equal_nan=True), "one seed gives two scores"
    other = state_bits(state_of(run(1)))
    assert other[0] != state_bits(state_of(first))[0], "another seed gives the same bits"


def check_state_round_trip(state: State) -> None:
    """A state is the same after safetensors and JSON, and bytes that are cut short are refused."""
    tensors, facts = encode_state(state)
    data = pack(tensors, {"facts": json.dumps(facts)})
    back, meta = unpack(data)
    other = decode_state(back, json.loads(meta["facts"]), state.frozen)

    assert state_bits(other) == state_bits(state), "a state differs after it was stored and read"
    assert [m.key for m in other.bank.values()] == [m.key for m in state.bank.values()]
    memory = {c: list(kept) for c, kept in state.memory.items()}
    assert {c: list(kept) for c, kept in other.memory.items()} == memory
    assert list(other.visits.items()) == list(state.visits.items())
    assert other.received == dict(state.received)
    kinds = {key: type(m) for key, m in state.experts.items()}
    assert {key: type(m) for key, m in other.experts.items()} == kinds
    _refuses_cuts(data, unpack)


def check_messages_round_trip(run: Callable[[], object]) -> int:
    """Every message that is sent is the same after its bytes; returns how many were."""
    sent: list[tuple[Message, bytes]] = []
    to_bytes = Message.to_bytes

    def keep(message: Message) -> bytes:
        data = to_bytes(message)
        sent.append((copy.copy(message), data))
        return data

    _with_replaced([(Message, "to_bytes", keep)], run)
    for message, data in sent:
        other = Message.from_bytes(data)
        assert other.facts() == message.facts(), "the facts of a message differ after its bytes"
        assert {n: type(i) for n, i in other.items.items()} == {n: type(i) for n, i in message.items.items()}
        for name, item in message.items.items():
            arrived = other.items[name]
            assert bits(in_order(arrived.tensors)) == bits(in_order(item.tensors)), (
                f"{name} differs on arrival"
            )
            assert json.dumps(arrived.meta) == json.dumps(dict(item.meta)), f"{name} loses facts on the way"
        digest = Message(**{**vars(other), "digest": ""}).digest
        assert other.digest == digest, "the digest of a message is not that of its content"
    # One message stands for all: the format is the same.
    for _, data in sent[:1]:
        _refuses_cuts(data, Message.from_bytes)
    return len(sent)


def check_resumes(run: Callable[..., Result]) -> None:
    """Stopped inside an epoch and resumed, a run ends in the bits of one that was never stopped.

    `run` takes the arguments of `consilience.run` that it does not set itself: out, resume, progress,
    checkpoint_steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines: list[Mapping[str, Any]] = []
        whole = run(out=Path(folder, "whole"), checkpoint_steps=1, progress=lines.append)
        saved = [line for line in lines if line["event"] == "checkpoint"]
        stops = [line["steps"] for line in saved if 0 < line.get("step", 0) < line.get("of", 0)]
        if not stops:
            assert whole.costs["steps"] == 0, "no checkpoint was made inside an epoch"
            return

        # Late in the run, so that a correction has something to resume with.
        chosen = stops[3 * len(stops) // 4]

        def stop(line: Mapping[str, Any]) -> None:
            if line["event"] == "checkpoint" and line["steps"] == chosen and "step" in line:
                raise KeyboardInterrupt

        try:
            run(out=Path(folder, "cut"), checkpoint_steps=1, progress=stop)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("a run does not stop where it is interrupted")
        again = run(out=Path(folder, "cut"), checkpoint_steps=1, resume=True)
    assert state_bits(state_of(again)) == state_bits(state_of(whole)), "a resumed run ends in other bits"
    assert np.array_equal(again.matrices, whole.matrices, equal_nan=True), "a resumed run has other scores"
    assert again.costs["steps"] == whole.costs["steps"], "a resumed run takes another number of steps"


def check_engines(serial: Result, batched: Result) -> None:
    """Stacked agents learn what agents one after another learn, to 1e-9 in float64, at the same cost."""
    apart = params_differ(state_of(serial).params, state_of(batched).params)
    assert apart < 1e-9, f"parameters differ by {apart:.3g} between the engines"
    assert np.nanmax(np.abs(serial.matrices - batched.matrices), initial=0.0) < 1e-9, (
        "scores differ between engines"
    )
    costs = [{k: v for k, v in r.costs.items() if k != "seconds"} for r in (serial, batched)]
    assert costs[0] == costs[1], f"costs differ between the engines: {costs[0]} and {costs[1]}"


def check_neutral(neutral: Result, plain: Result) -> None:
    """At its `neutral` values a correction is plain training, bit for bit."""
    assert bits(in_order(neutral.params)) == bits(in_order(plain.params)), (
        "at its `neutral` values the parameters differ from plain training"
    )
    assert np.array_equal(neutral.matrices, plain.matrices, equal_nan=True), (
        "at its `neutral` values the scores differ from plain training"
    )


def check_aggregator(aggregator: Aggregator, rows: int = 5) -> None:
    """Check the contract over rows [m, n]: pure, seeded, the same for any order; bad rows are refused."""
    name, size = type(aggregator).__name__, 33
    draw = torch.Generator().manual_seed(0)
    rows = max(rows, aggregator.fewest_rows)
    given = torch.randn(rows, size, generator=draw)
    weights = torch.rand(rows, generator=draw)

    def combined(r: Tensor, w: Tensor | None, seed: int = 3) -> Tensor:
        return aggregator(r, w, torch.Generator().manual_seed(seed))

    before = bits([given, weights])
    first = combined(given, weights)
    assert first.shape == (size,) and first.dtype == given.dtype, (
        f"{name} must return one row [n] of the rows' dtype"
    )
    assert bits([given, weights]) == before, f"{name} changes its rows or weights"
    assert torch.equal(first, combined(given, weights)), f"{name} gives other bits the second time"
    # Messages arrive in any order; the result must not depend on it.
    order = torch.randperm(rows, generator=draw)
    assert torch.equal(first, combined(given[order], weights[order])), f"the order of rows matters to {name}"

    # Equal rows g must give (sum of weights) x T(g), T being the transform of one row: else comparing methods
    # compares learning rates.
    row = torch.randn(size, generator=draw, dtype=torch.float64)
    if not getattr(aggregator, "expectation", False) and aggregator.fewest_rows == 1:
        alone = combined(row[None], torch.ones(1, dtype=torch.float64))
        equal = combined(row.expand(rows, size).contiguous(), weights.double())
        assert torch.allclose(equal, weights.double().sum() * alone, rtol=1e-6, atol=1e-6), (
            f"{rows} equal rows must give {name} the sum of weights times its result for one row"
        )

    # A row that is not finite must be named, or one bad client would spoil everybody's model in silence.
    spoilt, refusal = given.clone(), ""
    spoilt[rows - 1, 3] = torch.nan
    try:
        aggregator(spoilt, names=[f"sender {i}" for i in range(rows)])
    except ConsilienceError as error:
        refusal = str(error)
    assert f"sender {rows - 1}" in refusal, f"{name} must refuse rows that are not finite, by their names"


def _with_replaced(changes: Sequence[tuple[Any, str, Any]], run: Callable[[], object]) -> None:
    if not changes:
        run()
        return
    (owner, name, value), *rest = changes
    with replaced(owner, name, value):
        _with_replaced(rest, run)


def _refuses_cuts(data: bytes, read: Callable[[bytes], object]) -> None:
    for cut in (0, 4, 8, 40, len(data) // 2, len(data) - 1):
        try:
            read(data[:cut])
        except ConsilienceError:
            continue
        raise AssertionError(f"{len(data)} bytes that were cut after {cut} are taken")


# ------------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Report:
    """What `check` found, by setting: "runs", "runs, but never acts" or "refuses: reason"; and notes."""

    name: str
    settings: Mapping[str, str]
    checks: tuple[str, ...] = ()
    """The checks that passed."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(map(len, self.settings), default=0)
        lines = [f"{self.name}: {', '.join(self.checks)}"]
        lines += [f"  {setting:{width}}  {found}" for setting, found in self.settings.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


RUNS, INERT = "runs", "runs, but never acts"


def check(
    part: Part,
    *,
    model: Callable[[int], Model] | None = None,
    settings: Sequence[str] | None = None,
    training: Training = TRAINING,
) -> Report:
    """Run the conformance checks on a method or on a part of one; return what runs where.

    Checked are: how the class is written; that verbs return what they must, and `penalty_gradient` the
    gradient of `penalty`; that each setting runs or refuses with a Refusal; that verbs and consolidators are
    pure; that a seed gives the same bits; that states and messages survive their bytes; that a stopped run
    resumes to the same bits; that `neutral` values are plain training to the bit; that it composes with EWC
    and ER; that engines agree; and for an aggregator its contract.

    A setting in which the result is plain training, bit for bit, is reported as "runs, but never acts". A
    class attribute such as `needs_history` or `needs_revisits`, or a reason that `refuse` returns, says so
    before a run.

    Args:
        part: a Method, Correction, Mapper, Aggregator or Consolidator.
        model: a function that makes the model for a number of outputs; inputs are [8]. None takes the part's
            `default_model`, or a small perceptron.
        settings: names from `consilience.testing.SETTINGS`; None takes all, a few make a quick check.
        training: how the tiny problem is trained.

    Raises AssertionError with one line per fault; ConsilienceError for an unknown setting.
    """
    chosen = list(SETTINGS) if settings is None else list(settings)
    for setting in chosen:
        if setting not in SETTINGS:
            raise ConsilienceError(f"unknown setting {setting!r}; choose from {', '.join(SETTINGS)}.")
    method = method_of(part)
    return _Check(part, method, model or (lambda outputs: model_for(method, outputs)), training).all(chosen)


def model_for(method: Method, outputs: int) -> Model:
    """The model that a part of the method asks for, or a small perceptron."""
    wanted = (c.default_model((INPUTS,), outputs) for c in method.all_corrections)
    return next((model for model in wanted if model is not None), None) or plain_model(outputs)


def method_of(part: Part) -> Method:
    """A method of this part alone; constraints get the cone that they need."""
    name = type(part).__name__
    if isinstance(part, Method):
        return part
    if isinstance(part, Mapper):
        return Method(name, mapper=part)
    if isinstance(part, Correction):
        cone = cs.aggregators.gem(0.0) if part.adds_constraints else None
        return Method(name, (part,), step_aggregator=cone)
    if isinstance(part, Aggregator):
        return Method(name, aggregator=part)
    if isinstance(part, Consolidator):
        return Method(name, consolidator=part)
    raise ConsilienceError(
        f"`part` must be a method, correction, mapper, aggregator or consolidator, got {type(part).__name__}."
    )


@dataclass
class _Check:
    """One call of `check`: the faults and notes that it gathers."""

    part: Part
    method: Method
    model: Callable[[int], Model]
    training: Training
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Each fault once, with the settings in which it was found."""
    passed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inert: dict[str, list[str]] = field(default_factory=dict)
    """Settings in which it never acts, by what would help."""

    def all(self, chosen: Sequence[str]) -> Report:
        self._try("written", lambda: check_written(self.part))
        if self.faults:  # nothing below can be trusted before the class is right
            raise AssertionError(self._lines())
        if isinstance(self.part, Aggregator):
            aggregator = self.part
            self._try("contract of an aggregator", lambda: check_aggregator(aggregator))

        found = {setting: self._setting(setting) for setting in chosen}
        for why, settings in self.inert.items():
            self.notes.append(f"in {', '.join(settings)} it is plain training, bit for bit: {why}")
        running = [s for s, outcome in found.items() if outcome == RUNS]
        if not running and not self.faults:
            reasons = "; ".join(f"{s}: {outcome}" for s, outcome in found.items())
            self._fault(f"it acts in no setting ({reasons})")
        elif running:
            exchanging = next((s for s in (*EXCHANGING, *SEVERAL) if s in running), running[0])
            # Two settings are enough for the slow checks: one as it comes, one in which agents exchange.
            for setting in dict.fromkeys((running[0], exchanging)):
                self._in(setting)
            stream = next((s for s in STREAMS if s in running), None)
            if stream is not None:
                self._try("composes", lambda: self._composes(stream), stream)

        if self.faults:
            raise AssertionError(self._lines())
        notes = tuple(dict.fromkeys(self.notes))
        return Report(self.method.name, found, tuple(dict.fromkeys(self.passed)), notes)

    def _lines(self) -> str:
        """All faults, one line each, with the notes."""
        lines = [f"{self.method.name} fails {len(self.faults)} checks:"]
        for fault, settings in self.faults.items():
            places = ", ".join(dict.fromkeys(filter(None, settings)))
            lines.append(f"- {fault}" + (f" (in {places})" if places else ""))
        return "\n".join([*lines, *(f"  note: {note}" for note in dict.fromkeys(self.notes))])

    def _fault(self, text: str, setting: str = "") -> None:
        self.faults.setdefault(text, []).append(setting)

    def _try(self, what: str, do: Callable[[], object], setting: str = "") -> None:
        """Do one check; keep what it finds and go on."""
        try:
            do()
        except (AssertionError, ConsilienceError) as error:
            self._fault(f"{what}: {error}", setting)
        # A fault in the part's own code, such as a KeyError, is named, and the other checks go on.
        except Exception as error:
            self._fault(f"{what}: {type(error).__name__}: {error}", setting)
        else:
            self.passed.append(what)

    def _run(self, setting: str, method: Any = None, **more: Any) -> Result:
        outputs = 2 if "domain" in setting else CLASSES
        training = more.pop("training", self.training)
        return quiet(SETTINGS[setting](), method or self.method, self.model(outputs), training, **more)

    def _typed(self, setting: str) -> Result:
        """Run with every verb of every correction checked for what it returns."""

        def run(left: Sequence[Correction]) -> Any:
            if not left:
                return self._run(setting)
            note = partial(self._note_dead_memory, left[0])
            return check_returns(left[0], lambda: run(left[1:]), note)

        result: Result = run(self.method.all_corrections)
        return result

    def _setting(self, setting: str) -> str:
        """Whether a setting runs, never acts, or refuses."""
        try:
            result = self._typed(setting)
        except Refusal as refusal:
            text = str(refusal)
            if "\n" in text or not re.search(r"[.!]$", text):
                self._fault(f"a refusal must be one sentence, got {text!r}", setting)
            return f"refuses: {text}"
        except AssertionError as error:
            self._fault(str(error).split("\n")[0], setting)
            return f"fails: {error}"
        except Exception as error:
            self._fault(f"it must run or refuse with a Refusal, got {type(error).__name__}: {error}", setting)
            return f"fails: {error}"

        self._try("finite", lambda: self._finite(setting, result), setting)
        if not self._inert(setting, result):
            return RUNS
        # What helps depends on why: where nobody trains no declaration of history can be right.
        trains = SETTINGS[setting]().survey().trains
        why = (
            "declare what it needs (`needs_history`, `needs_revisits`), or let `refuse(facts)` give a reason"
            if trains
            else "nobody trains there; let `refuse(facts)` return a reason where `not facts.trains`"
        )
        self.inert.setdefault(why, []).append(setting)
        return INERT

    def _note_dead_memory(self, correction: Correction, verb: str, result: Any) -> None:
        """Note Private items that are kept and never read: the default `recall` adds up Statistics only."""
        read = any(overrides(correction, reader) for reader in ("recall", "trim", "after_receive"))
        if verb == "summarise" and isinstance(result, Private) and not read:
            self.notes.append(
                f"{correction.name}.summarise returns Private items, and the default `recall` reads only "
                "Statistics of other sources: override `recall`"
            )

    @staticmethod
    def _finite(setting: str, result: Result) -> None:
        broken = [n for n, p in result.params.items() if not torch.isfinite(p).all()]
        assert not broken, f"{setting}: parameters are not finite: {', '.join(broken)}"

    def _inert(self, setting: str, result: Result) -> bool:
        """Whether a run is that of plain training, bit for bit: parameters, scores and what it keeps."""
        if self.method.consolidator is not None or self.method.mapper is not None:
            return False
        if any(not overrides_training(c) for c in self.method.corrections):
            return False  # it only summarises, for others to use
        try:
            plain = self._run(setting, cs.methods.finetune())
        except Refusal:
            return False
        # The mean is what plain training does, so equal bits are right for it alone.
        mean = isinstance(self.part, Aggregator) and self.part == cs.aggregators.mean()
        same = bits(in_order(result.params)) == bits(in_order(plain.params))
        return same and not mean and np.array_equal(result.matrices, plain.matrices, equal_nan=True)

    def _in(self, setting: str) -> None:
        """The checks that need whole runs, in one setting."""

        inputs = sources()[0].test.whole()[0]

        def run(seed: int = 0, **more: Any) -> Result:
            return self._run(setting, seed=seed, **more)

        for correction in self.method.all_corrections:
            self._try("pure verbs", partial(check_pure_verbs, correction, run), setting)
        receiver = self.method.resolve(SETTINGS[setting]().survey()).receiver()
        self._try("pure agents", lambda: check_pure_agents(lambda: run().predict(inputs)), setting)
        self._try("pure consolidator", lambda: check_pure_consolidator(receiver, run), setting)
        self._try("seeded", lambda: check_seeded(run), setting)
        self._try("state round trip", lambda: check_state_round_trip(state_of(run())), setting)
        self._try("messages round trip", lambda: check_messages_round_trip(run), setting)
        self._try("resumes", lambda: check_resumes(run), setting)
        self._try("neutral", lambda: self._neutral(setting), setting)
        if setting in SEVERAL:
            self._try(
                "engines agree",
                lambda: check_engines(run(training=FP64), run(training=FP64, engine="batched")),
                setting,
            )

    def _neutral(self, setting: str) -> None:
        """Each correction that declares `neutral` values is plain training at them."""
        for correction in self.method.corrections:
            if not correction.neutral:
                self.notes.append(f"{type(correction).__name__} declares no `neutral` value")
                continue
            still = dataclasses.replace(correction, **correction.neutral)  # type: ignore[type-var]
            check_neutral(self._run(setting, method_of(still)), self._run(setting, cs.methods.finetune()))

    def _composes(self, setting: str) -> None:
        """Together with EWC and with ER it runs and differs from either alone."""
        if not self.method.corrections:
            return
        own = {c.name for c in self.method.corrections}
        for other in (cs.methods.ewc(), cs.methods.er()):
            if own & {c.name for c in other.corrections}:
                continue
            try:
                both = self._run(setting, self.method + other)
                alone = self._run(setting, other)
            except Refusal as refusal:
                self.notes.append(f"with {other.name} in {setting}: {refusal}")
                continue
            # Protection on top of protection may add nothing, so this is a note and no fault.
            same = bits(in_order(both.params)) == bits(in_order(alone.params))
            if same and any(overrides_training(c) for c in self.method.corrections):
                self.notes.append(f"it adds nothing to {other.name} in {setting}")


def overrides_training(correction: Correction) -> bool:
    """Whether a correction has a verb that bends training or prediction; without one it only summarises."""
    return any(overrides(correction, verb) for verb in VERBS if verb not in ("recall", "summarise", "trim"))
