"""Methods known from federated learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilience.core.method import Method


OUTER = ("sgd", "adam", "adagrad", "yogi", "averaging")

GENTLE = 0.003
"""The largest learning rate of an adaptive server that a solved head bears."""


def fedavg(outer: str = "sgd", outer_lr: float = 1.0, outer_momentum: float = 0.0) -> Method:
    """Average the clients' parameters by their number of examples, then take an outer step.

    Paper: McMahan et al. 2017; Reddi et al. 2021 for outer optimisers (FedAvgM with momentum, FedAdam without
    bias correction).

    Args:
        outer: outer optimiser: sgd, adam, adagrad, yogi, averaging, or a class of torch.optim such as RAdam.
        outer_lr: its learning rate; 1 with plain sgd takes the average as it is.
        outer_momentum: of sgd.
    """
    import torch

    from consilience.core.errors import ConsilienceError
    from consilience.core.optimiser import SGD, Adagrad, Adam, Averaging, Torch, Yogi

    if outer_momentum and outer != "sgd":
        raise ConsilienceError(f"`outer_momentum` has no effect on {outer!r}, got {outer_momentum}.")
    if outer in OUTER:
        # The paper's FedAdam has no bias correction: its start is damped by tau alone.
        adam = Adam(0.9, 0.99, 1e-3, corrected=False)
        optimiser = dict(
            zip(OUTER, (SGD(outer_momentum), adam, Adagrad(), Yogi(), Averaging()), strict=True)
        )[outer]
    elif isinstance(outer, str) and isinstance(getattr(torch.optim, outer, None), type):
        optimiser = Torch(outer)
    else:
        raise ConsilienceError(
            f"`outer` must be one of {', '.join(OUTER)} or a class of torch.optim, got `outer = {outer!r}`."
        )
    return _outer("fedavg", optimiser, outer_lr)


def _outer(name: str, optimiser: Any, lr: float) -> Method:
    """Average the received parameters and take an outer step."""
    from consilience.aggregators import mean
    from consilience.core.method import Method
    from consilience.core.weight_space import WeightSpace

    return Method(name, (), exchange_aggregator=mean(), consolidator=WeightSpace(None, optimiser, lr))


def fedavgm(momentum: float = 0.9, lr: float = 1.0) -> Method:
    """FedAvgM: the server has momentum: v = momentum v + (theta - average), theta = theta - lr v.

    Paper: Hsu, Qi & Brown 2019.

    Args:
        momentum: of the server; 0 with lr 1 is fedavg.
        lr: of the server.
    """
    from consilience.core.optimiser import SGD

    return _outer("fedavgm", SGD(momentum), lr)


def fedadam(lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Method:
    """FedAdam: the server takes Adam's step, without bias correction, along the average of the changes.

    Both means begin at 0; in the paper that of squares begins at tau^2 or more.

    Paper: Reddi et al. 2021.

    Args:
        lr: of the server.
        beta1: decay of the mean of changes.
        beta2: decay of the mean of their squares.
        tau: added to the root of that mean: how adaptive it is.
    """
    from consilience.core.optimiser import Adam

    return _outer("fedadam", Adam(beta1, beta2, tau, corrected=False), lr)


def fedadagrad(lr: float = 0.1, tau: float = 1e-3) -> Method:
    """FedAdagrad: the server divides the average of the changes by the root of the sum of its squares so far.

    Paper: Reddi et al. 2021.

    Args:
        lr: of the server.
        tau: added to that root: how adaptive it is.
    """
    from consilience.core.optimiser import Adagrad

    return _outer("fedadagrad", Adagrad(tau), lr)


def fedyogi(lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Method:
    """FedYogi: as fedadam, with a mean of squares that moves by the size of the change and its sign.

    Both means begin at 0; in the paper that of squares begins at tau^2 or more.

    Paper: Reddi et al. 2021.

    Args:
        lr: of the server.
        beta1: decay of the mean of changes.
        beta2: of the squares.
        tau: added to the root of their mean: how adaptive it is.
    """
    from consilience.core.optimiser import Yogi

    return _outer("fedyogi", Yogi(beta1, beta2, tau), lr)


def fedprox(mu: float = 0.1) -> Method:
    """Stay near the parameters at the start of the visit.

    Paper: Li et al. 2020.

    Args:
        mu: of the term (mu / 2) ||theta - theta_start||^2; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.quadratic import Proximal

    return Method("fedprox", (Proximal(mu),))


def scaffold(clients: int | None = None) -> Method:
    """SCAFFOLD: control variates replace each client's own drift by the mean drift of all. For plain SGD.

    Clients weigh the same in the control variates, as in the paper, even where parameters are averaged by
    size: it ends at the optimum of the unweighted mean of the clients' losses.

    Paper: Karimireddy et al. 2020.

    Args:
        clients: how many there are; None counts those that were received so far.
    """
    from consilience.core.method import Method
    from consilience.corrections.client_drift import Scaffold

    return Method("scaffold", (Scaffold(clients),))


def feddyn(alpha: float = 0.1) -> Method:
    """FedDyn: a linear and a proximal term make every client's optimum that of the whole federation.

    The schedule says which part of the clients takes part in a round. Clients weigh as in the average: by
    their examples, or equally with `by_size=False`, as in the paper.

    Paper: Acar et al. 2021.

    Args:
        alpha: of both terms; 0 is fedavg.
    """
    from consilience.aggregators import mean
    from consilience.consolidators.dynamic import Dynamic
    from consilience.core.method import Method
    from consilience.core.weight_space import WeightSpace
    from consilience.corrections.client_drift import FedDyn

    # Without the term there is nothing for the server to undo, so alpha = 0 is FedAvg bit for bit.
    server = Dynamic() if alpha else WeightSpace()
    return Method("feddyn", (FedDyn(alpha),), exchange_aggregator=mean(), consolidator=server)


def fednova(lr: float = 1.0) -> Method:
    """FedNova: each client's change is divided by its number of steps, so that more steps do not count more.

    Paper: Wang et al. 2020.

    Args:
        lr: of the server; 1 with equal steps is fedavg.
    """
    from consilience.aggregators import mean
    from consilience.consolidators.normalised import Normalised
    from consilience.core.method import Method
    from consilience.corrections.client_drift import LocalSteps

    return Method(
        "fednova", (LocalSteps(),), exchange_aggregator=mean(), consolidator=Normalised(None, None, lr)
    )


def fedcm(alpha: float = 0.1) -> Method:
    """FedCM: clients step along alpha g + (1 - alpha) times the server's last step. For plain SGD.

    Paper: Xu et al. 2021.

    Args:
        alpha: the share of the own gradient; 1 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.client_drift import FedCM

    return Method("fedcm", (FedCM(alpha),))


def ghbm(beta: float = 0.9, tau: int = 1) -> Method:
    """GHBM: clients add beta times the mean step of the last tau rounds to each of theirs. For plain SGD.

    Paper: Zaccone et al. 2023.

    Args:
        beta: of the momentum; 0 is plain training.
        tau: over how many rounds; best is how many it takes until all clients took part. 1 is the classical
            heavy ball.
    """
    from consilience.core.method import Method
    from consilience.corrections.client_drift import GHBM

    return Method("ghbm", (GHBM(beta, tau),))


def local_ghbm(beta: float = 0.9) -> Method:
    """GHBM from what each client received at its last participation; nothing more is sent. For plain SGD.

    Paper: Zaccone et al. 2023.

    Args:
        beta: of the momentum; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.client_drift import LocalGHBM

    return Method("local_ghbm", (LocalGHBM(beta),))


def fedhbm(beta: float = 0.9) -> Method:
    """As local_ghbm, from each client's own parameters at the end of its last participation. For plain SGD.

    Paper: Zaccone et al. 2023.

    Args:
        beta: of the momentum; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.client_drift import FedHBM

    return Method("fedhbm", (FedHBM(beta),))


def wsm() -> Method:
    """Re-weighted softmax: add the log of the client's class shares to the logits, so absent classes stay.

    Paper: Legate, Caccia & Belilovsky 2023.
    """
    from consilience.core.method import Method
    from consilience.corrections.outputs import WSM

    return Method("wsm", (WSM(),))


def fed3r(
    strength: float = 0.01,
    average: bool = False,
    normalise: bool = False,
    temperature: float | None = None,
    clip: float = 0.0,
    then: Method | None = None,
    lr: float | None = 0.001,
) -> Method:
    """Solve a ridge head in closed form from all agents' sums of features: exact for any split and order.

    On `models.fourier_features(model)` it is Fed3R with random features. With `then`, such as
    `fed3r(then=fedavg())`, it is Fed3R with fine-tuning: the first visit to a source only sends its sums, and
    from the second on `then` trains from the solved head. The head of a client that comes later is exact
    where features are frozen; else its sums are of the features at that time. To train after all sums have
    arrived, run `first = run(schedule, fed3r(temperature=0.1))`, and then from `base=first.params`.

    The learning rate must be one to two orders below that of a cold start: 0.05 destroys the head in a round
    (digits: .30 to .50 instead of .94). So does the server's of an adaptive `then`, which moves each entry by
    up to it in a round: warns of more than .003 (`fedadam()`, at .1, falls from .96 to .30 in four rounds).

    Paper: Fanì et al. 2024.

    Args:
        strength: lambda of the ridge, entered once.
        average: whether the objective is the mean loss (lambda then counts as lambda x samples).
        normalise: divide each class's column by its norm; it changes the argmax.
        temperature: divides the head, which leaves the argmax; None: 1, with `then` .1, which suits a
            softmax that is trained on.
        clip: largest distance of an example's features from their source's median, in median distances, so
            that outliers change little; 0: no limit, and the head is exact for any split.
        then: the method of the rounds that follow, such as `fedavg()`; None: nothing is trained.
        lr: learning rate of `then`, in the place of `Training.lr`; None: that one.
    """
    from dataclasses import replace

    from consilience.consolidators.statistics import ClosedForm
    from consilience.core.method import Method
    from consilience.core.optimiser import Adagrad, Adam, Yogi
    from consilience.core.warning import warn
    from consilience.core.weight_space import WeightSpace
    from consilience.corrections.moments import Moments
    from consilience.methods.continual import fixed_rate

    rate = fixed_rate(lr)
    sharp = temperature if temperature is not None else 1.0 if then is None else 0.1
    head = ClosedForm(strength, average, normalise, sharp)
    if then is None:
        # No gradient step: the head is solved for where the sums meet.
        return Method("fed3r", (Moments(clip),), consolidator=head, fixed={"epochs": 0})

    # What combines parameters acts inside the closed form, so that the head is solved after it.
    then = Method.of(then)
    combines = replace(then, exchange_aggregator=then.exchange_aggregator or then.aggregator).receiver()
    server = combines if isinstance(combines, WeightSpace) else WeightSpace()
    if isinstance(server.outer, Adam | Adagrad | Yogi) and server.lr > GENTLE:
        warn(
            f"{then.name} moves entries by up to {server.lr:g} in a round, which destroys a solved head; "
            f"give its server at most {GENTLE:g}, such as `{then.name}(lr={GENTLE:g})`."
        )
    first = Method(
        "fed3r",
        (Moments(clip, gathers=True),),
        consolidator=replace(head, then=combines),
        fixed=rate,
    )
    return first + replace(then, consolidator=None, exchange_aggregator=None, aggregator=None)
