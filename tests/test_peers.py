"""Against avalanche-lib, where it is installed: the same seeds, data, initial weights and (where it can be
said) batches.

    python -m venv VENV && VENV/bin/pip install avalanche-lib quadprog -e '.[dev]' && VENV/bin/python -m
    pytest -m peers

Made with avalanche-lib 0.6.0. It does not install quadprog, which its GEM needs (qpsolvers dropped the extra
that it names).

What is compared. (1) Final accuracy of every task, five seeds, each method in a scenario where it does
something. (2) All
parameters after the stream, to 1e-6 in float64, where a method draws nothing of its own (plain training,
EWC, LwF, SI) and, given what
we drew from memory, of A-GEM and DER++. (3) GEM's projection, alone.

Translations (ours -> theirs), with B the batch size, K the tasks; what differs from the papers is said where
it is corrected.
  EWC   strength -> lambda = strength / 2 (no half there); labels="data" (the empirical Fisher). Theirs
  squares the gradient of a
        *batch*, which is the Fisher's diagonal for batches of one only: `SampleEWC` asks for those.
  SI    strength -> lambda = 2 strength (they halve), xi -> eps. See `PaperSI` for three corrections.
  LwF   strength T^2 -> alpha (no T^2 there; Li & Hoiem have none either, Hinton et al. do).
  ER    their one mean over B new and B old is our (L_new + L_buffer) / 2. Their buffer is balanced over
  experiences, ours a reservoir
        over all: the same in expectation, as tasks have the same size. They walk through it, we draw with
        replacement.
  A-GEM size -> patterns_per_experience = size / (K - 1): theirs grows by task, ours is full from the first.
  Group-balanced batches.
  GEM   margin -> memory_strength, size -> patterns_per_experience. Theirs adds 1e-3 to the diagonal of the
  program (as the authors').
  DER++ alpha, beta as they are, both libraries average the squared distance over outputs and store logits at
  the *end* of a task (the
        paper while training). They take one draw for both terms, we (and the paper) two. Theirs is balanced
        over classes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import consilience as cs
from consilience.core.batch import Batch
from consilience.core.params import key
from consilience.core.sampler import Shuffle
from consilience.corrections.projection import AverageConstraint
from consilience.corrections.rehearsal import DER as OurDER

pytestmark = pytest.mark.peers
pytest.importorskip(
    "avalanche", reason="peers: avalanche-lib is not installed (pip install avalanche-lib quadprog)"
)

from avalanche.benchmarks import benchmark_from_datasets  # noqa: E402
from avalanche.benchmarks.scenarios.supervised import with_classes_timeline  # noqa: E402
from avalanche.benchmarks.scenarios.task_aware import with_task_labels  # noqa: E402
from avalanche.benchmarks.utils.classification_dataset import (  # noqa: E402
    _make_taskaware_tensor_classification_dataset as dataset,
)
from avalanche.models import MultiTaskModule  # noqa: E402
from avalanche.training import plugins as their  # noqa: E402
from avalanche.training.supervised import DER, Naive  # noqa: E402

SEEDS, TASKS, BATCH, T = 5, 5, 32, 2.0
EPOCHS = {"class": 5, "task": 5, "domain": 5}
LR = 0.1


# ---------------------------------------------------------------------------------------------------- the
# same data


@functools.cache
def sources(scenario: str) -> tuple[cs.Source, ...]:
    """Scikit-learn's digits, 128 a class to train on (whole batches only): five pairs of classes, or five
    permutations of the pixels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order] / 16, y[order]
    train = np.concatenate([np.flatnonzero(y == c)[:128] for c in range(10)])
    test = np.setdiff1d(np.arange(len(y)), train)
    digits = cs.data.arrays(
        x[train], y[train], (x[test], y[test]), [str(c) for c in range(10)], "digits", validation=0
    )
    return tuple(
        cs.data.permute(digits, TASKS) if scenario == "domain" else cs.data.split_classes(digits, TASKS)
    )


def net(seed: int) -> nn.Sequential:
    """The initial weights of a seed."""
    torch.manual_seed(seed)
    like = {"dtype": torch.float64}
    return nn.Sequential(nn.Linear(64, 64, **like), nn.ReLU(), nn.Linear(64, 10, **like))


# ---------------------------------------------------------------------------------------------------- ours


def ours(method: cs.Method, scenario: str, seed: int, tasks: int = TASKS) -> cs.Result:
    schedule = cs.settings.continual(sources(scenario)[:tasks], scenario)
    training = cs.Training(epochs=EPOCHS[scenario], batch_size=BATCH, lr=LR, precision="fp64")
    return cs.run(schedule, method, net(seed), training, seed=seed)


# ---------------------------------------------------------------------------------------------------- theirs


class Plan(their.SupervisedPlugin):
    """Gives a strategy the very batches of this library: keyed by seed, source and epoch."""

    def __init__(self, scenario: str, seed: int):
        super().__init__()
        self.scenario, self.seed = scenario, seed

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        strategy.dataloader = Batches(self.scenario, self.seed, strategy.clock.train_exp_counter)


class Batches:
    def __init__(self, scenario: str, seed: int, at: int):
        self.source, self.seed, self.epoch = sources(scenario)[at], seed, 0
        self.task = at if scenario == "task" else 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        x, y = self.source.train.whole()
        for i in Shuffle().plan(
            y, BATCH, self.epoch, key(self.seed, self.source.name, 0, self.epoch, 0, "shuffle")
        ):
            yield [x[i].double(), y[i], torch.full((len(i),), self.task)]
        self.epoch += 1


class Masked(MultiTaskModule):
    """One head whose outputs of other tasks are -inf: how this library reads a task label on a plain
    model."""

    def __init__(self, module: nn.Module, scenario: str):
        super().__init__()
        self.module = module
        keep = torch.zeros(TASKS, 10, dtype=torch.bool)
        for t, s in enumerate(sources(scenario)):
            keep[t, list(s.classes)] = True
        self.register_buffer("keep", keep)

    def forward(self, x: Tensor, task_labels: Any) -> Any:
        if task_labels is None:
            return self.forward_all_tasks(x)
        return self.module(x).masked_fill(~self.keep[task_labels], -torch.inf)

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        return self.forward(x, torch.full((len(x),), task_label))


class SampleEWC(their.EWCPlugin):
    """Their EWC with the Fisher of single samples."""

    def compute_importances(
        self, model: Any, criterion: Any, optimizer: Any, data: Any, device: Any, batch_size: int, **k: Any
    ) -> Any:
        return super().compute_importances(model, criterion, optimizer, data, device, 1, **k)


class PaperSI(their.SynapticIntelligencePlugin):
    """Their SI, made to act, and as Zenke et al. 2017 and their code have it.

    As it is, on a CPU it is plain training for any lambda (a test below): what it keeps of old weights are
    views of the live ones. So
    they are copied here. Importances are cut at 1e-3 from above and not from below: here their sum is cut at
    0 from below. The path
    takes the gradient with the penalty's: here the task's own.
    """

    raw: ClassVar[dict[str, torch.Tensor]] = {}

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        self.copy(self.ewc_data[0])

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_iteration(strategy, **kwargs)
        self.copy(self.syn_data["old_theta"])

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        own = torch.autograd.grad(strategy.loss, list(strategy.model.parameters()), retain_graph=True)
        self.own = {n: g.flatten() for (n, _), g in zip(strategy.model.named_parameters(), own, strict=True)}
        super().before_backward(strategy, **kwargs)

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        for n, p in strategy.model.named_parameters():
            self.syn_data["trajectory"][n].data += self.own[n] * (
                p.detach().flatten() - self.syn_data["old_theta"][n].data
            )

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        for n, importance in self.ewc_data[1].items():
            importance.data = self.raw.get(n, importance.data)
        self.update_ewc_data(
            strategy.model, self.ewc_data, self.syn_data, torch.inf, self.excluded_parameters, 1, eps=self.eps
        )
        self.raw = {n: importance.data.clone() for n, importance in self.ewc_data[1].items()}
        for importance in self.ewc_data[1].values():
            importance.data = importance.data.clamp(min=0)

    @staticmethod
    def copy(kept: Any) -> None:
        for item in kept.values():
            item.data = item.data.clone()


def theirs(made: Any, scenario: str, seed: int, tasks: int = TASKS) -> tuple[nn.Module, list[float]]:
    """A model trained by Avalanche on the same stream, and its accuracy on every task. `made`: their plugin,
    or their DER and its arguments."""
    torch.set_default_dtype(torch.float64)
    try:
        module = net(seed)
        model = Masked(module, scenario) if scenario == "task" else module
        torch.manual_seed(1000 + seed)
        np.random.seed(1000 + seed)
        experiences = []
        for t, s in enumerate(sources(scenario)[:tasks]):
            x, y = s.train.whole()
            experiences.append(dataset(x.double(), y, task_labels=t if scenario == "task" else 0))
        common: dict[str, Any] = dict(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), LR),
            train_mb_size=BATCH,
            train_epochs=EPOCHS[scenario],
            evaluator=None,
        )
        plan = Plan(scenario, seed)
        if isinstance(made, functools.partial):
            strategy = made(plugins=[plan], **common)
        else:
            strategy = Naive(plugins=[plan, copy.deepcopy(made)] if made else [plan], **common)
        for experience in with_classes_timeline(
            with_task_labels(benchmark_from_datasets(train=experiences))
        ).train_stream:
            strategy.train(experience)
        accuracy = []
        with torch.no_grad():
            for t, s in enumerate(sources(scenario)[:tasks]):
                x, y = s.test.whole()
                out = model(x.double(), torch.full((len(y),), t)) if scenario == "task" else model(x.double())
                accuracy.append(float((out.argmax(1) == y).double().mean()))
        return module, accuracy
    finally:
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------------- (1)
# accuracies

m = cs.methods
PAIRS: dict[str, tuple[str, Any, Any]] = {
    "naive": ("domain", m.finetune(), None),
    "ewc": ("domain", m.ewc(10.0, labels="data"), SampleEWC(5.0)),
    "si": ("domain", m.si(0.1, 0.1), PaperSI(0.2, 0.1)),
    "lwf": ("domain", m.lwf(0.5, T), their.LwFPlugin(0.5 * T**2, T)),
    "er": ("class", m.er(160, BATCH), their.ReplayPlugin(160, batch_size_mem=BATCH)),
    "agem": ("domain", m.agem(256, BATCH), their.AGEMPlugin(64, BATCH)),
    "gem": ("class", m.gem(64, None, 0.5), their.GEMPlugin(64, 0.5)),
    "derpp": (
        "class",
        m.derpp(160, BATCH, 0.5, 0.5),
        functools.partial(DER, mem_size=160, batch_size_mem=BATCH, alpha=0.5, beta=0.5),
    ),
}


@functools.cache
def our_accuracy(name: str, scenario: str) -> np.ndarray:
    """[seeds, tasks]."""
    return np.array([ours(PAIRS[name][1], scenario, seed).matrix[-1] for seed in range(SEEDS)])


@functools.cache
def their_accuracy(name: str, scenario: str) -> np.ndarray:
    """[seeds, tasks]."""
    return np.array([theirs(PAIRS[name][2], scenario, seed)[1] for seed in range(SEEDS)])


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By how much the means over seeds differ beyond noise, for every task and for their mean: negative
    where they agree.

    |mean a - mean b| - (4 sqrt((var a + var b) / seeds) + .02): with 5 seeds, t(8) = 4 has p = .004 per
    comparison, and there are 48; .02 is two test examples of a pair.
    """
    a, b = (np.column_stack([v, v.mean(1)]) for v in (a, b))
    error = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / len(a))
    return np.abs(a.mean(0) - b.mean(0)) - (4 * error + 0.02)


@pytest.mark.parametrize("name", list(PAIRS))
def test_final_accuracies_agree_within_noise(name: str) -> None:
    scenario = PAIRS[name][0]
    a, b = our_accuracy(name, scenario), their_accuracy(name, scenario)
    with np.printoptions(precision=3):
        assert (apart(a, b) <= 0).all(), f"{name}, {scenario}: ours {a.mean(0)}, theirs {b.mean(0)}"


@pytest.mark.parametrize("name", [n for n in PAIRS if n != "naive"])
def test_the_comparison_could_fail(name: str) -> None:
    """The same comparison tells both libraries' method from the other library's plain training, which is
    worse."""
    scenario = PAIRS[name][0]
    a, b = our_accuracy(name, scenario), their_accuracy(name, scenario)
    naive = our_accuracy("naive", scenario), their_accuracy("naive", scenario)
    assert apart(a, naive[1]).max() > 0 and apart(b, naive[0]).max() > 0
    assert min(a.mean(), b.mean()) > naive[0].mean() + 0.02


# ---------------------------------------------------------------------------------------------------- (2)
# parameters


def distance(module: nn.Module, result: cs.Result) -> float:
    return max(float((p.detach() - result.params[n]).abs().max()) for n, p in module.named_parameters())


EXACT: dict[str, tuple[str, int, Any, Any]] = {
    "naive, class": ("class", 5, m.finetune(), None),
    "naive, task": ("task", 5, m.finetune(), None),
    "naive, domain": ("domain", 5, m.finetune(), None),
    "ewc": ("domain", 5, m.ewc(10.0, labels="data"), SampleEWC(5.0)),
    "lwf, class": ("class", 5, m.lwf(1.0, T), their.LwFPlugin(T**2, T)),
    "lwf, task": ("task", 5, m.lwf(1.0, T), their.LwFPlugin(T**2, T)),
    "si": ("domain", 5, m.si(0.1, 0.1), PaperSI(0.2, 0.1)),
}


@pytest.mark.parametrize("name", list(EXACT))
def test_parameters_are_equal(name: str) -> None:
    scenario, tasks, method, made = EXACT[name]
    result = ours(method, scenario, 0, tasks)
    module, _ = theirs(made, scenario, 0, tasks)
    assert distance(module, result) < 1e-6
    if made is not None:
        assert distance(module, ours(m.finetune(), scenario, 0, tasks)) > 1e-2


class DrawnAGEM(AverageConstraint):
    """Ours, which tells what it drew."""

    drawn: ClassVar[list[Batch]] = []

    def sample(self, *given: Any) -> list[Batch]:
        self.drawn += (parts := super().sample(*given))
        return parts


class GivenAGEM(their.AGEMPlugin):
    """Theirs, with our memory's batches."""

    def sample_from_memory(self) -> list[Tensor]:
        batch = DrawnAGEM.drawn.pop(0)
        return [batch.x, batch.y, torch.zeros_like(batch.y)]


def test_agem_is_theirs_on_the_same_memory() -> None:
    method = cs.Method("agem", (DrawnAGEM(256, BATCH),), step_aggregator=cs.aggregators.agem())
    DrawnAGEM.drawn.clear()
    result = ours(method, "class", 0)
    module, _ = theirs(GivenAGEM(64, BATCH), "class", 0)
    assert not DrawnAGEM.drawn
    assert distance(module, result) < 1e-6


class DrawnDER(OurDER):
    """Ours, with one draw for both terms, as theirs; it tells what it drew."""

    drawn: ClassVar[list[Batch]] = []

    def sample(self, *given: Any) -> list[Batch]:
        logits, labels = super().sample(*given)
        self.drawn.append(logits)
        return [logits, replace(logits, weight=labels.weight, extra={})]


class GivenDER(DER):
    """Theirs, with our memory's batches."""

    def _before_training_exp(self, **kwargs: Any) -> None:
        super()._before_training_exp(**kwargs)
        self.replay_loader = self.given() if self.clock.train_exp_counter else None

    @staticmethod
    def given() -> Iterator[list[Tensor]]:
        while True:
            batch = DrawnDER.drawn.pop(0)
            yield [batch.x, batch.y, torch.zeros_like(batch.y), batch.extra["logits"]]


def test_derpp_is_theirs_on_the_same_memory() -> None:
    DrawnDER.drawn.clear()
    result = ours(cs.Method("derpp", (DrawnDER(160, BATCH, 0.5, 0.7),)), "class", 0)
    module, _ = theirs(
        functools.partial(GivenDER, mem_size=160, batch_size_mem=BATCH, alpha=0.5, beta=0.7), "class", 0
    )
    assert not DrawnDER.drawn
    assert distance(module, result) < 1e-6


@pytest.mark.parametrize("strength", [1.0, 1e6])
def test_their_si_as_it_is_does_nothing_on_a_cpu(strength: float) -> None:
    """Why `PaperSI` copies: if this fails they have mended it."""
    module, _ = theirs(their.SynapticIntelligencePlugin(strength, 0.1), "domain", 0, 2)
    assert distance(module, ours(m.finetune(), "domain", 0, 2)) == 0


# ---------------------------------------------------------------------------------------------------- (3)
# the projection


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_gem_projects_alike(k: int, margin: float) -> None:
    """With gradients of length 300, next to which the 1e-3 that they add is nothing."""
    g = torch.Generator().manual_seed(k)
    rows, direction = (
        torch.randn(*shape, 900, generator=g, dtype=torch.float64) * 10 for shape in ((k,), ())
    )
    direction = direction - rows.mean(0)
    assert (rows @ direction < 0).any()
    plugin = their.GEMPlugin(1, margin)
    plugin.G = rows
    mine = cs.aggregators.gem(margin).project(direction, rows)
    torch.testing.assert_close(mine, plugin.solve_quadprog(direction).double(), rtol=1e-5, atol=1e-4)
