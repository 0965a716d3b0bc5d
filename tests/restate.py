"""What restatements share: tiny sources, the batches as a run plans them, the plain loop in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience.core.params import key
from consilience.core.schedule import build
from consilience.core.source import Source, Tensors

D, C, LR, BATCH, EPOCHS = 6, 4, 0.05, 8, 2


def source(name, n=30, classes=tuple(range(C)), seed=0, d=D, task=None, kind="class", dtype=torch.float64):
    g = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    if kind == "value":
        y = torch.stack([x.sin().sum(1), x[:, 0]], 1)
    else:
        y = torch.tensor(classes)[torch.randint(len(classes), (n,), generator=g)]
    t = Tensors(x, y)
    labels = tuple(("space", str(c)) for c in range(C if kind == "class" else 2))
    return Source(name, t, t, t, labels, tuple(classes) if kind == "class" else (0, 1), task, kind)


def training(**more):
    given = {"epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "momentum": 0.9, "precision": "fp64", **more}
    return cs.Training(**acting(given))


def acting(given):
    """The arguments of Training without those that the optimiser would refuse."""
    optimiser = given.get("optimiser", "sgd")
    inert = () if optimiser in ("sgd", "SGD", "RMSprop") else ("momentum",)
    inert += () if isinstance(optimiser, str) else ("weight_decay",)
    return {name: value for name, value in given.items() if name not in inert}


def mlp(outputs=C):
    return cs.models.mlp(D, (5,), outputs)


def plain(model=None, seed=0, params=None):
    """A torch module with the parameters that a run begins with."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, C)).double()
    params = params if params is not None else (model or mlp()).init(key(seed, "init"))[0]
    net.load_state_dict({n: p.double() for n, p in params.items()})
    return net


def batches(s, visit=0, epochs=EPOCHS, batch=BATCH, seed=0, steps=None):
    """(epoch, step, x, y) as Shuffle plans them; a shorter part begins again."""
    x, y = s.train.whole()
    most = steps or -(-len(y) // batch)
    for epoch in range(epochs):
        plan, turn = [], 0
        while len(plan) < most:
            plan += torch.randperm(len(y), generator=key(seed, s.name, visit, epoch, turn, "shuffle")).split(
                batch
            )
            turn += 1
        for step, i in enumerate(plan[:most]):
            yield epoch, step, x[i], y[i]


def sgd(net, lr=LR, momentum=0.9, **more):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, **more)


def fit(net, s, loss=None, visit=0, optimiser=None, **more):
    """The plain loop; `loss(net, x, y, epoch, step)`."""
    optimiser = optimiser or sgd(net)
    for epoch, step, x, y in batches(s, visit, **more):
        value = loss(net, x, y, epoch, step) if loss else F.cross_entropy(net(x), y)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return net


def entries(net):
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def near(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for n in a:
        assert a[n].shape == b[n].shape
        gap = float((a[n] - b[n]).abs().max() / max(1.0, float(b[n].abs().max())))
        assert gap <= tolerance, (n, gap)


def final(schedule, method, model=None, **more):
    return cs.run(schedule, method, model or mlp(), training(**more)).agent.state.params


def phases(sources, plan, scenario="domain"):
    return build("custom", sources, scenario, lambda seed: iter(plan), "agent")


ME = {"agent": ("agent",)}
A, B, E = source("a", 30, seed=1), source("b", 21, seed=2), source("c", 26, seed=3)


class Stop(Exception):
    pass


def stopped(run, out, at, every=1):
    """`run` into the folder `out`, stopped at its first checkpoint after `at` steps; run(out=out,
    resume=True) goes on."""

    def stop(line):
        if line["event"] == "checkpoint" and line["ran"] >= at:
            raise Stop

    with pytest.raises(Stop):
        run(out=out, checkpoint_steps=every, progress=stop)
