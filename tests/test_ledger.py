"""The ledger counts the work that is done: its MACs against those of every operation of the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import consilience as cs
from consilience.loop import agent
from consilience.loop.judge import Judge
from consilience.loop.ledger import Cost, Ledger, outline
from consilience.testing import SETTINGS, TRAINING, quiet

sys.path.insert(0, str(Path(__file__).parent / "conformance"))
import kit  # the table of methods and settings

m = cs.methods
JUDGED = ("evaluate", "validation", "add_curve_point", "before_visits", "after_visits", "judge_clients")


def layer(times: int) -> Callable[..., int]:
    """FLOPs of an LSTM layer, which torch does not count on a CPU: two matrices for each vector."""

    def flops(x: Any, first: Any, second: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * times * x[0] * x[1] * (first[0] * first[1] + second[0] * second[1])

    return flops


def attention(products: int) -> Callable[..., int]:
    """FLOPs of attention on a CPU, of heads [B, H, T, d]."""

    def flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        b, h, t, d = shapes[products == 5]  # the backward pass gets a gradient first
        return 2 * products * b * h * t * t * d

    return flops


FORMULAS = {
    torch.ops.aten.mkldnn_rnn_layer: layer(1),
    torch.ops.aten.mkldnn_rnn_layer_backward: layer(2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention(2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention(5),
}


@contextmanager
def every_operation() -> Iterator[Callable[[], float]]:
    """Count each operation of a run but those of its judge and its checks, with torch's own counter."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    left_out, depth, begun = [0], [0], [False]

    def leave_out(whose: Any, name: str) -> Any:
        judged = getattr(whose, name)

        def other(*args: Any, **kwargs: Any) -> Any:
            before = counter.get_total_flops()
            depth[0] += 1
            try:
                return judged(*args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    # What comes before the first evaluation are the checks of a run.
                    left_out[0] += counter.get_total_flops() - (before if begun[0] else left_out[0])
                    begun[0] = True

        return mock.patch.object(whose, name, other)

    with ExitStack() as stack:
        for name in JUDGED:
            stack.enter_context(leave_out(Judge, name))
        # What is received is tried on one example, which is no learning.
        stack.enter_context(leave_out(agent, "check_content"))
        stack.enter_context(counter)
        yield lambda: (counter.get_total_flops() - left_out[0]) / 2


def check(schedule: cs.Schedule, method: cs.Method, model: Any = None, training: Any = TRAINING) -> None:
    with every_operation() as counted:
        result = quiet(schedule, method, model, training)
    assert counted() > 0 and result.costs["macs"] == pytest.approx(counted(), rel=0.01)


CELLS = [
    (row, setting)
    for row, cells in kit.read("methods").items()
    for setting, cell in cells.items()
    if cell == "runs" and not row.startswith("generative_replay") and "given" not in setting
]
SAMPLE = [
    ("icarl", "continual (class)"),
    ("gss", "federated_continual"),
    ("den", "continual (task)"),
    ("feddf(unlabelled)", "federated_continual"),
    ("exmodel_distillation(auxiliary)", "exmodel"),
    ("dac(auxiliary)", "exmodel"),
    ("batch_model_consolidation(sources)", "merging"),
    ("opcm", "exmodel"),
    ("skill", "skill"),
    ("scaffold", "federated"),
    ("gem", "continual (task)"),
]


@pytest.mark.parametrize(("row", "setting"), SAMPLE)
def test_macs_are_those_of_every_operation(row, setting):
    check(SETTINGS[setting](), kit.ROWS[row](), kit.model_of(row, setting))


@pytest.mark.slow
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_macs_are_those_of_every_operation_in_all_cells(setting):
    for row, cell in CELLS:
        if cell != setting:
            continue
        with every_operation() as counted:
            result = quiet(SETTINGS[setting](), kit.ROWS[row](), kit.model_of(row, setting))
        assert result.costs["macs"] == pytest.approx(counted(), rel=0.01), row


def test_macs_of_replay_count_the_generator_and_what_it_draws():
    replay = m.generative_replay(epochs=1, hidden=16, latent=4)
    check(SETTINGS["continual (class)"](), replay, kit.plain())


# Models: each costs something else in a step, forwards and backwards.


class Last(nn.Module):
    """A recurrent net, answered from its last state."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.inner, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0][:, -1])


class Attends(nn.Module):
    """One layer of attention, and the mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.head = nn.Linear(4, 18), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part[:, None] for part in self.q(x).chunk(3, -1))
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 4)),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4)),
    "conv": lambda: nn.Sequential(nn.Conv1d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)),
    "lstm": lambda: Last(nn.LSTM),
    "gru": lambda: Last(nn.GRU),
    "attention": Attends,
}
METHODS: dict[str, Callable[[], cs.Method]] = {
    "finetune": m.finetune,
    "er": lambda: m.er(8),
    "lwf": m.lwf,
    "ewc": m.ewc,
    "si": m.si,
    "derpp": lambda: m.derpp(8),
    "agem": lambda: m.agem(8),
    "joint": m.joint,
}


def sequences() -> list[cs.Source]:
    x = np.random.default_rng(0).normal(size=(72, 5, 4)).astype("float32")
    y = np.arange(72) % 4
    whole = cs.data.arrays(x, y, (x[:8], y[:8]), classes=list("abcd"), validation=0)
    return cs.data.split_classes(whole, 2)


@pytest.mark.parametrize(
    ("method", "model"),
    [
        pytest.param(method, model, marks=() if (i + j) % 8 == 0 else pytest.mark.slow)
        for i, method in enumerate(METHODS)
        for j, model in enumerate(MODELS)
    ],
)
def test_macs_of_a_model_are_those_of_every_operation(method, model):
    training = cs.Training(epochs=2, batch_size=16, lr=0.05)
    check(cs.settings.continual(sequences(), "class"), METHODS[method](), MODELS[model](), training)


# What is measured, and when.


def test_work_that_differs_is_measured_each_time():
    ledger, a = Ledger(), torch.ones(4, 4)
    sizes = [1, 1, 1, 2, 3, 2]
    for size in sizes:
        ledger.charge_work("x", "steady", lambda: a @ a)
        ledger.charge_work("x", "growing", lambda size=size: [a @ a for _ in range(size)])
        ledger.charge_work("x", None, lambda size=size: [a @ a for _ in range(size)])
    # Two equal measures are taken for all that follow, but work of no kind is always measured.
    assert ledger.by_agent["x"]["macs"] == 64 * (6 + 6 + sum(sizes))
    assert ledger.measured == {"steady": Cost(64, "exact"), "growing": Cost(64, "exact")}

    ledger = Ledger()
    for size in (1, 2, 2, 2, 1):
        ledger.charge_work("x", "varies", lambda size=size: [a @ a for _ in range(size)])
    assert ledger.by_agent["x"]["macs"] == 64 * 8 and ledger.measured["varies"].state == "varies"


def test_work_that_nearly_repeats_costs_as_before_also_after_a_checkpoint():
    ledger, a, b = Ledger(), torch.ones(200, 1), torch.ones(1, 201)
    for rows in (200, 199, 200, 199):
        ledger.charge_work("x", ("near", 1), lambda rows=rows: a[:rows] @ b)
    assert ledger.measured["near", 1] == Cost(200 * 201, "near")
    facts = ledger.kept()
    again = Ledger()
    again.resume({**facts, "by_agent": {}})
    again.charge_work("x", ("near", 1), lambda: a[:199] @ b)
    assert again.by_agent["x"]["macs"] == 200 * 201, "not measured again"
    assert again.kept()["measured"] == facts["measured"]


def test_an_outline_is_of_shapes():
    source = SETTINGS["continual (class)"]().sources[0]
    longer = cs.Source(**{**vars(source), "train": source.train.select(torch.arange(5))})
    assert outline(source) == outline(cs.Source(**{**vars(source), "name": "other"})) != outline(longer)
    assert outline(None) != outline({}) and outline(3) == outline(4) and outline(True) != outline(False)


@pytest.mark.parametrize("row", ["icarl", "gss", "gem", "den"])
def test_a_resumed_run_costs_what_a_whole_one_does(tmp_path, row):
    setting = kit.stream_for("DEN" if row in ("den", "gem") else "ICaRL")
    arguments = (SETTINGS[setting](), kit.ROWS[row](), kit.model_of(row, setting))
    whole = quiet(*arguments)

    class Stopped(Exception):
        pass

    def progress(line: Any) -> None:
        if line["event"] == "checkpoint" and line["ran"] == 14:
            raise Stopped

    with pytest.raises(Stopped):
        quiet(*arguments, out=tmp_path, checkpoint_steps=7, progress=progress)
    resumed = quiet(*arguments, out=tmp_path, resume=True)
    for costs in (whole.costs, resumed.costs):
        costs.pop("seconds")
    assert resumed.costs == whole.costs
