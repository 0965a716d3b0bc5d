"""Methods known from federated learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilience.core.method import Method


OUTER = ("sgd", "adam", "adagrad", "yogi", "averaging")


def fedavg(outer: str = "sgd", outer_lr: float = 1.0, outer_momentum: float = 0.0) -> Method:
    """Average what is heard by the number of examples, then take an outer step.

    Paper: McMahan et al. 2017; Reddi et al. 2021 for outer optimisers (FedAvgM with momentum, FedAdam without bias correction).

    Args:
        outer: outer optimiser: sgd, adam, adagrad, yogi, averaging, or the name of a class of torch.optim, such as RAdam.
        outer_lr: its learning rate; 1 with plain sgd takes the average as it is.
        outer_momentum: of sgd.
    """
    import torch

    from consilience.core.errors import ConsilienceError
    from consilience.core.optimiser import SGD, Adagrad, Adam, Averaging, Torch, Yogi

    if outer in OUTER:
        adam = Adam(0.9, 0.99, 1e-3, corrected=False)
        optimiser = dict(
            zip(OUTER, (SGD(outer_momentum), adam, Adagrad(), Yogi(), Averaging()), strict=True)
        )[outer]
    elif isinstance(outer, str) and isinstance(getattr(torch.optim, outer, None), type):
        optimiser = Torch(outer)
    else:
        raise ConsilienceError(
            f"`outer` should be {', '.join(OUTER)} or a class of torch.optim. Found `outer = {outer!r}`."
        )
    return _outer("fedavg", optimiser, outer_lr)


def _outer(name: str, optimiser: Any, lr: float, *corrections: Any) -> Method:
    """The mean of what is heard, and an outer step."""
    from consilience.aggregators import mean
    from consilience.core.method import Method
    from consilience.core.weight_space import WeightSpace

    return Method(
        name, corrections, exchange_aggregator=mean(), consolidator=WeightSpace(None, optimiser, lr)
    )


def fedavgm(momentum: float = 0.9, lr: float = 1.0) -> Method:
    """FedAvgM: the average with momentum of the server: v = momentum v + (theta - average), theta = theta - lr v.

    Paper: Hsu, Qi & Brown 2019.

    Args:
        momentum: of the server; 0 with lr 1 is fedavg.
        lr: of the server.
    """
    from consilience.core.optimiser import SGD

    return _outer("fedavgm", SGD(momentum), lr)


def fedadam(lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Method:
    """FedAdam: the server takes Adam's step, without bias correction, along the average of the changes.

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
    """Stay near the parameters that this learn began with.

    Paper: Li et al. 2020.

    Args:
        mu: of the term (mu / 2) ||theta - theta_start||^2; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.quadratic import Proximal

    return Method("fedprox", (Proximal(mu),))


def scaffold(clients: int | None = None) -> Method:
    """SCAFFOLD: control variates take each client's own drift out of its gradients and put the mean drift of all in. For plain SGD.

    Paper: Karimireddy et al. 2020.

    Args:
        clients: how many there are; None counts those heard of so far.
    """
    from consilience.core.method import Method
    from consilience.corrections.client_drift import Scaffold

    return Method("scaffold", (Scaffold(clients),))


def feddyn(alpha: float = 0.1, participation: float = 1.0) -> Method:
    """FedDyn: each client's loss gains a linear and a proximal term, so that at the end all agree on the optimum of the whole.

    Paper: Acar et al. 2021.

    Args:
        alpha: of both terms; 0 is fedavg.
        participation: the fraction of all clients that a round hears.
    """
    from consilience.core.optimiser import SGD, Dynamic
    from consilience.corrections.client_drift import FedDyn

    server = Dynamic(participation)
    return _outer("feddyn", server if alpha else SGD(), 1.0, FedDyn(alpha))


def fednova(lr: float = 1.0) -> Method:
    """FedNova: each client's change is divided by how many steps it took, so that those that take more do not count more.

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
    """FedCM: clients step along alpha times their gradient plus 1 - alpha times the server's last step. For plain SGD.

    Paper: Xu et al. 2021.

    Args:
        alpha: the share of the own gradient; 1 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.client_drift import FedCM

    return Method("fedcm", (FedCM(alpha),))


def ghbm(beta: float = 0.9, tau: int = 1) -> Method:
    """Generalised heavy-ball momentum: clients add beta times the mean of the last tau rounds' steps while they train. For plain SGD.

    Paper: Zaccone et al. 2023.

    Args:
        beta: of the momentum; 0 is plain training.
        tau: over how many rounds; best is how many it takes to hear all clients. 1 is the classical heavy ball.
    """
    from consilience.core.method import Method
    from consilience.corrections.client_drift import GHBM

    return Method("ghbm", (GHBM(beta, tau),))


def local_ghbm(beta: float = 0.9) -> Method:
    """GHBM from what each client was told when it last took part, over the rounds since: no parameters more are told. For plain SGD.

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
    """Re-weighted softmax: the logits of the loss gain the log of the client's class shares, so that absent classes are left alone.

    Paper: Legate, Caccia & Belilovsky 2023.
    """
    from consilience.core.method import Method
    from consilience.corrections.outputs import WSM

    return Method("wsm", (WSM(),))


def fed3r(
    strength: float = 0.01, average: bool = False, normalise: bool = False, temperature: float = 1.0
) -> Method:
    """A ridge head in closed form from everybody's sums of features: exact for any split, order and schedule.

    On `models.fourier_features(model)` it is Fed3R with random features. It is where any other run may begin: with
    `first = run(schedule, fed3r(temperature=0.1))`, `run(federated(clients, base=first.params), fedavg())` goes on from it; and
    SCROLL's second part is `run(continual([kept], base=first.params), finetune(), training=Training(sampler=Balanced()))` on
    the examples that may be kept.

    Paper: Fanì et al. 2024; Wang et al. 2022 (SCROLL).

    Args:
        strength: lambda of the ridge, entered once.
        average: whether the objective is the mean loss (lambda then counts as lambda x samples).
        normalise: divide each class's column by its norm; it changes the argmax.
        temperature: divides the head, which leaves the argmax; .1 suits a softmax that is trained on.
    """
    from consilience.consolidators.statistics import ClosedForm
    from consilience.core.method import Method
    from consilience.corrections.moments import Moments

    return Method(
        "fed3r",
        (Moments(),),
        consolidator=ClosedForm(strength, average, normalise, temperature),
        fixed={"epochs": 0},
    )
