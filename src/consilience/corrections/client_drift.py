"""Corrections against client drift: control variates, dynamic regularisation, and momentum that clients add.

All of them are linear in theta (FedDyn has FedProx's term as well): they add a vector to each gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from consilience.core.contexts import Context, Learned, Memory, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Item, Message, Private, Statistics
from consilience.core.names import PAST, SUM, WHOLE
from consilience.core.optimiser import SGD
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.core.training import Training
from consilience.corrections.baselines import by_source
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts
    from consilience.core.state import State


def plain_steps(training: Training) -> str | None:
    """Return why a step is not the gradient times one learning rate, and what to change; None if it is."""
    if training.varies:
        return f"it assumes a constant learning rate, and {change_of_rate(training)}"
    if training.clip_norm is not None or training.clip_value is not None:
        return "it adds vectors to gradients, and clipping shortens them; train without it"
    if training.rates:
        return "it assumes one learning rate for all entries, and `rates` gives some another; leave it out"

    inner = training.inner()
    if not isinstance(inner, SGD):
        name = type(inner).__name__
        return f"it adds the steps of plain SGD to gradients, and {name} scales gradients; train with sgd"
    if inner.momentum:
        most = 1 / (1 - inner.momentum)
        return (
            f"momentum {inner.momentum:g} multiplies what it adds to each gradient, up to {most:.3g} times; "
            "train with momentum 0"
        )
    return None


def change_of_rate(training: Training) -> str:
    """Return how a learning rate that is not constant changes, and what to do instead."""
    how = training.lr_schedule if isinstance(training.lr_schedule, str) else "a function"
    changes = "rises (warmup)" if how == "constant" else f"decreases ({how})"
    return f"this one {changes}; train with a constant one, or one per round (lr_over='rounds')"


def push(step: StepView, vector: Tensor) -> Tensor:
    """Return the penalty <theta, vector>, whose gradient is `vector` [n]."""
    return torch.dot(step.theta, vector)


# Control variates: vectors that each client keeps between its visits.


@dataclass(frozen=True)
class Scaffold(Correction):
    """SCAFFOLD: the gradient of each step gains c - c_i, so that the mean drift replaces a client's own.

    After K steps c_i+ = c_i - c + (theta_start - theta_end) / (K lr), the paper's option II. c_i stays with
    the client, by source, and c_i+ - c_i is sent with its parameters. The receiver adds these differences up
    and sends the sum: c = sum c_i / `clients`, or, with `clients=None`, divided by the number of clients
    received from so far (only with a number do the other clients count as c_i = 0). Clients weigh the same
    in c, as in the paper, also where parameters are averaged by size: it ends at c = 0, the optimum of the
    unweighted mean of the clients' losses. c_i stays as it was if nobody receives what a visit trained. Every
    entry takes part, personal ones too. SCAFFOLD assumes plain SGD: with momentum m, (theta_start -
    theta_end) / (K lr) is up to 1 / (1 - m) times the mean gradient, and so it warns. Karimireddy et al.
    2020, arXiv:1910.06378.
    """

    clients: int | None = None

    flat: ClassVar[tuple[str, ...]] = ("own", "mean")
    needs_history: ClassVar[bool] = True
    needs_delivery: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clients is not None and (not isinstance(self.clients, int) or self.clients < 1):
            raise ConsilienceError(f"`clients` must be a whole number >= 1 or None, got {self.clients!r}.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        return None if facts.rounds else "no agent trains after it received what others trained; use finetune"

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Statistics | None:
        """Return `own/...` and `count`, the c_i of these sources, and `mean/...`, the received c."""
        visited = {source.name for source in sources}
        # An agent that receives keeps the sum itself; what it sent before is then the only total that counts.
        receivers = {sender for sender, source in memory if source == SUM}
        # Statistics add entry by entry, and a missing entry counts as zero.
        own, total = Statistics({}), Statistics({})
        for (sender, source), item in by_source(memory):
            if source in visited and isinstance(item, Private):
                own = own + Statistics(item.tensors)
            elif source == WHOLE and not item.meta.get("gain") and (not receivers or sender in receivers):
                total = total + Statistics(item.tensors)
        if not own.tensors and not total.tensors:
            return None

        recalled = {f"own/{name}": c for name, c in own.group("c").items()}
        recalled["count"] = own.tensors.get("count", torch.zeros(()))
        if total.tensors:
            clients = self._clients(float(total.tensors["count"]))
            recalled |= {f"mean/{name}": c / clients for name, c in total.group("c").items()}
        return Statistics(recalled)

    def _clients(self, received: float) -> float:
        """Return the number that the sum of all c_i is divided by, given how many clients it holds."""
        # A client may be a sum of shares such as three thirds, which need not be 1 in floating point.
        if self.clients is not None and received > self.clients + 1e-6:
            raise ConsilienceError(
                f"`clients` must be at least {received:g}, as many as were received from, got {self.clients}."
            )
        return self.clients or received

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        """Return `shift` = c - c_i, 0 where no c was received yet; and a warning unless steps are plain."""
        if not ctx.flat:
            return ctx.flat, None
        own = ctx.flat["own"]
        shift = ctx.flat["mean"] - own if ctx.recalled.group("mean") else torch.zeros_like(own)
        return {"own": own, "shift": shift}, plain_steps(training)

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        return push(step, ctx.flat["shift"])

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float]:
        return ctx.flat["shift"], 1.0

    def summarise(self, learned: Learned, ctx: Context) -> Private | None:
        """Return this source's share of c_i+ (`c/...`) and of a client (`count`), and their gains."""
        if not learned.steps or learned.training is None:
            return None
        # The shift is part of every step, so it is taken out of the mean gradient again.
        start, end = learned.layout.flatten(learned.start), learned.layout.flatten(learned.trainable)
        variate = (start - end) / (learned.steps * learned.training.lr) - ctx.flat.get("shift", 0.0)
        gain = learned.share * (variate - ctx.flat.get("own", 0.0))
        tensors = {f"c/{name}": t for name, t in learned.layout.split(learned.share * variate).items()}
        tensors |= {f"gain/c/{name}": t for name, t in learned.layout.split(gain).items()}

        # A client that trains several sources at once counts once: each source holds its share of it.
        before = ctx.recalled.tensors["count"] if ctx.recalled else 0.0
        one = torch.ones((), dtype=torch.float64)
        counts = {"count": learned.share * one, "gain/count": learned.share * (one - before)}
        return Private(tensors | counts)

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Move the gains since this agent last received into the item that is sent with its parameters."""
        sent = memory.get(WHOLE)
        # Several visits may come between two exchanges: their gains add up.
        gained = Statistics(sent.tensors) if sent is not None and sent.meta.get("gain") else Statistics({})
        kept: dict[str, Any] = {}
        for source, item in sorted(memory.items()):
            if source not in (WHOLE, SUM):
                gained = gained + Statistics(item.group("gain"))
            kept[source] = Private({k: t for k, t in item.tensors.items() if not k.startswith("gain/")})
        return {**kept, WHOLE: Statistics(gained.tensors, {"gain": True})}

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]
    ) -> Mapping[str, Any]:
        """Add the received gains to the sum of all c_i, which is sent with the parameters."""
        held = memory.get(SUM)
        total = Statistics(held.tensors if held is not None else {})
        for message in fresh:
            item = message.items.get(self.name)
            if item is not None and item.meta.get("gain"):
                total = total + Statistics(item.tensors)

        # An agent sends its own gains before it receives; kept, they would be sent twice.
        kept = {source: item for source, item in memory.items() if source != WHOLE}
        if not total.tensors:
            return kept
        return {**kept, SUM: Private(total.tensors), WHOLE: Statistics(total.tensors)}


@dataclass(frozen=True)
class FedDyn(Correction):
    """The clients of FedDyn: the loss gains -<h, theta> + (alpha / 2) ||theta - theta_start||^2.

    After training h <- h - alpha (theta - theta_start), unless nobody receives theta. h is private, by
    source, and begins at 0, so that the first visit is FedProx. The server's part is the consolidator
    `consilience.consolidators.Dynamic`; `methods.feddyn` has both. Acar et al. 2021, arXiv:2111.04263.
    """

    alpha: float = 0.1

    shared_items: ClassVar[bool] = False
    needs_delivery: ClassVar[bool] = True
    flat: ClassVar[tuple[str, ...]] = ("h",)
    neutral: ClassVar[dict[str, float]] = {"alpha": 0.0}

    def __post_init__(self) -> None:
        non_negative("FedDyn", alpha=self.alpha)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return None if facts.trains else NO_TRAINING

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Item | None:
        """Return the h of these sources."""
        visited = {source.name for source in sources}
        total = Statistics({})
        for (_, source), item in by_source(memory):
            if source in visited:
                total = total + Statistics(item.tensors)
        return total if total.tensors else None

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        assert ctx.start is not None
        # Zeros at the first visit, so that all visits run the same step.
        return {"h": ctx.flat.get("h", torch.zeros_like(ctx.start))}, None

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        moved = step.theta - step.start
        return 0.5 * self.alpha * torch.dot(moved, moved) - push(step, ctx.flat["h"])

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float]:
        return (step.theta - step.start).mul_(self.alpha).sub_(ctx.flat["h"]), 1.0

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        moved = learned.layout.flatten(learned.trainable) - learned.layout.flatten(learned.start)
        dual = learned.share * (ctx.flat["h"] - self.alpha * moved)
        return Private({f"h/{name}": t for name, t in learned.layout.split(dual).items()})


@dataclass(frozen=True)
class LocalSteps(Correction):
    """Send how many steps of plain SGD a visit was worth, for the consolidator `Normalised`.

    Training is unchanged. K steps of SGD with momentum m move as far as sum_{k=1..K} (1 - m^k) / (1 - m)
    plain steps along one gradient, which is FedNova's ||a||_1; with Nesterov's form k goes from 2 to K + 1;
    any other optimiser counts K steps. Wang et al. 2020, arXiv:2007.07481 (FedNova).
    """

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return None if facts.trains else NO_TRAINING

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        if not training.varies:
            return ctx.flat, None
        return ctx.flat, f"it counts steps of one learning rate, and {change_of_rate(training)}"

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        inner = learned.training.inner() if learned.training is not None else None
        steps = float(learned.steps)
        if isinstance(inner, SGD) and inner.momentum:
            # Momentum restarts at each visit, so its early steps are shorter.
            m, first = inner.momentum, 1 + inner.nesterov
            steps = sum((1 - m**k) / (1 - m) for k in range(first, learned.steps + first))
        return Private({"steps": torch.tensor(learned.share * steps, dtype=torch.float64)})

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Add up the steps since this agent last received; they are sent with its parameters."""
        total = Statistics({})
        for _, item in sorted(memory.items()):
            total = total + Statistics(item.tensors)
        # By source nothing is kept: the consolidator needs the sum only.
        return {WHOLE: total}

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]
    ) -> Mapping[str, Any]:
        return {}


# Momentum: differences of parameters that clients add to each of their steps.


@dataclass(frozen=True)
class _Momentum(Correction):
    """The gradient of each step gains -factor / (lr J) x a difference of parameters.

    J = epochs x steps per epoch: a visit without any other gradient moves by factor x that difference.
    """

    @property
    def factor(self) -> float:
        """How much of the difference is added."""
        raise NotImplementedError

    def difference(self, ctx: Context) -> Tensor | None:
        """Return the difference [n], or None where there is none yet."""
        raise NotImplementedError

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        if not facts.rounds:
            return "no agent trains after a round was received, so there is no momentum; use finetune"
        return None

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        """Return `push`, the vector of a whole visit; and a warning unless steps are plain."""
        assert ctx.start is not None
        moved = self.difference(ctx)
        # Without momentum yet there is nothing that the optimiser could scale, hence no warning.
        if moved is None:
            return {"push": torch.zeros_like(ctx.start)}, None
        return {"push": moved * (-self.factor / training.lr)}, plain_steps(training)

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        return push(step, ctx.flat["push"]) / (step.horizon[0] * step.horizon[1])

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float]:
        # Per step, so that the steps of a visit add up to `push`.
        return ctx.flat["push"], 1 / (step.horizon[0] * step.horizon[1])


@dataclass(frozen=True)
class _Global(_Momentum):
    """Momentum of common parameters: the receiver of a round keeps theta^t, and sends their differences."""

    flat: ClassVar[tuple[str, ...]] = ("moved",)

    @property
    def window(self) -> int:
        """How many rounds the difference covers, tau."""
        raise NotImplementedError

    def refuse(self, facts: ScheduleFacts) -> str | None:
        reason = super().refuse(facts)
        if reason is None and facts.rounds < self.window:
            return (
                f"there is no momentum before round tau + 1 = {self.window + 1}, and the last round that "
                f"trains is round {facts.rounds + 1}; use a smaller tau or more rounds"
            )
        return reason

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Statistics | None:
        """Return `moved/...` from this agent's own history, or else the mean of what was received."""
        # An agent with a history of its own needs no other: its difference is the newest.
        historians = {sender for sender, source in memory if source == PAST}
        received = [
            item
            for (sender, source), item in sorted(memory.items())
            if source == WHOLE and (not historians or sender in historians)
        ]
        if not received:
            return None

        total = Statistics({})
        for item in received:
            total = total + Statistics(item.tensors)
        if len(received) == 1:
            return Statistics(total.tensors)
        return Statistics({name: t / len(received) for name, t in total.tensors.items()})

    def difference(self, ctx: Context) -> Tensor | None:
        return ctx.flat.get("moved")

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]
    ) -> Mapping[str, Any]:
        """Keep the last tau + 1 parameters, private, and send the difference of the newest and the oldest."""
        if not any(message.trained for message in fresh):
            return memory
        held = memory.get(PAST)
        past = [after.frozen.without(before.base)]
        if held is not None:
            past = [held.group(str(i)) for i in range(held.meta["rounds"])]
        now = after.frozen.without(after.params)
        past = [*past, {name: p for name, p in now.items() if p.is_floating_point()}][-self.window - 1 :]
        # Items hold flat names: the age of the parameters comes first.
        kept = {f"{i}/{name}": p for i, params in enumerate(past) for name, p in params.items()}
        result = {**memory, PAST: Private(kept, {"rounds": len(past)})}

        # Entries that never move would only make messages longer.
        if len(past) > self.window:
            oldest, newest = past[0], past[-1]
            moving = [
                name for name in newest if name in oldest and not torch.equal(newest[name], oldest[name])
            ]
            result[WHOLE] = Statistics({f"moved/{name}": newest[name] - oldest[name] for name in moving})
        return result


@dataclass(frozen=True)
class GHBM(_Global):
    """Generalised heavy-ball momentum: the gradient gains beta / (lr tau J) (theta^(t-tau-1) - theta^(t-1)).

    J is the number of steps of a visit. Over rounds theta^t = theta^(t-1) - lr g + (beta / tau) (theta^(t-1)
    - theta^(t-tau-1)), g the sum of the gradients of round t: tau = 1 is the classical heavy ball, and tau =
    1 / (share of clients per round) weighs all clients alike. Round t is the t-th time that trained
    parameters are received; there is no correction before round tau + 1. The receiver keeps tau + 1
    parameters, and what it sends is twice as long. A straggler adds its fraction. With momentum or Adam
    inside it warns: it assumes plain SGD. Zaccone et al. 2023, arXiv:2311.18578.
    """

    beta: float = 0.9
    tau: int = 1

    neutral: ClassVar[dict[str, float]] = {"beta": 0.0}

    def __post_init__(self) -> None:
        non_negative("GHBM", beta=self.beta)
        if not isinstance(self.tau, int) or self.tau < 1:
            raise ConsilienceError(f"`tau` must be a whole number >= 1, got {self.tau!r}.")

    @property
    def window(self) -> int:
        return self.tau

    @property
    def factor(self) -> float:
        return self.beta / self.tau


@dataclass(frozen=True)
class FedCM(_Global):
    """Client momentum: a step's gradient is alpha g + (1 - alpha) (theta^(t-2) - theta^(t-1)) / (lr J).

    J is the number of steps of a visit. The objectives of a step are scaled by alpha in the first round too,
    where the momentum is 0; penalties of other corrections are not. It is GHBM with tau = 1, beta = 1 - alpha
    and the learning rate alpha lr. Xu et al. 2021, arXiv:2106.10874.
    """

    alpha: float = 0.1

    neutral: ClassVar[dict[str, float]] = {"alpha": 1.0}

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConsilienceError(f"`alpha` must be in (0, 1], got {self.alpha}.")

    @property
    def window(self) -> int:
        return 1

    @property
    def factor(self) -> float:
        return 1 - self.alpha

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        # Masks scale the objectives before they are aggregated, and leave penalties as they are.
        return torch.full_like(step.theta, self.alpha)


@dataclass(frozen=True)
class _Local(_Momentum):
    """Momentum from what an agent kept of its last visit, of any source; only a count of rounds is sent."""

    beta: float = 0.9

    flat: ClassVar[tuple[str, ...]] = ("anchor",)
    needs_delivery: ClassVar[bool] = True
    neutral: ClassVar[dict[str, float]] = {"beta": 0.0}

    def __post_init__(self) -> None:
        non_negative(type(self).__name__, beta=self.beta)

    @property
    def factor(self) -> float:
        return self.beta

    def refuse(self, facts: ScheduleFacts) -> str | None:
        reason = super().refuse(facts)
        if reason is None and not facts.own_history and not facts.revisited:
            return "no agent trains twice, so none has momentum of its own; use ghbm"
        return reason

    def keep(self, learned: Learned) -> Params:
        """Return the parameters to keep of a visit."""
        raise NotImplementedError

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Private:
        """Return `anchor/...` of the last visit, if any; the round now, and the round of that visit."""
        rounds = [int(item.meta["round"]) for (_, source), item in memory.items() if source == WHOLE]
        now = max(rounds, default=0)
        kept = [item for (_, source), item in sorted(memory.items()) if source and isinstance(item, Private)]
        if not kept:
            return Private({}, {"round": now, "last": now})
        return Private(kept[0].tensors, {"round": now, "last": kept[0].meta["round"]})

    def difference(self, ctx: Context) -> Tensor | None:
        """Return (theta - anchor) / rounds since then; 0 for entries that are new."""
        anchor = ctx.recalled.group("anchor")
        if not anchor or ctx.layout is None or ctx.start is None:
            return None
        # Visits without an exchange between them count as one round apart.
        rounds = max(1, ctx.recalled.meta["round"] - ctx.recalled.meta["last"])
        moved: Tensor = (ctx.start - ctx.flat["anchor"]) / rounds
        for name in ctx.layout.names:
            if name not in anchor:
                moved[ctx.layout.span(name)] = 0
        return moved

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        anchor = {f"anchor/{name}": p for name, p in self.keep(learned).items()}
        return Private(anchor, {"round": ctx.recalled.meta["round"]})

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Keep the item of the last visit only."""
        return {source: item for source, item in memory.items() if source in (WHOLE, learned.source.name)}

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]
    ) -> Mapping[str, Any]:
        """Count the rounds in which trained parameters were received, and send the count."""
        if not any(message.trained for message in fresh):
            return memory
        last = memory.get(WHOLE)
        rounds = 1 + (last.meta["round"] if last is not None else 0)
        return {**memory, WHOLE: Statistics({}, {"round": rounds})}


@dataclass(frozen=True)
class LocalGHBM(_Local):
    """GHBM from an agent's own visits: the gradient gains beta / (lr tau_i J) (theta_i - theta^(t-1)).

    theta_i are the parameters with which this agent's last visit began, and tau_i the rounds since: only a
    counter is sent in addition to federated averaging. Clients that take turns, a share C per round, have
    tau_i = 1 / C, and this is GHBM with tau = 1 / C. The first visit is plain. Zaccone et al. 2023,
    arXiv:2311.18578.
    """

    def keep(self, learned: Learned) -> Params:
        return dict(learned.start)


@dataclass(frozen=True)
class FedHBM(_Local):
    """LocalGHBM with an agent's own result as anchor: theta_i^end instead of theta_i.

    The gradient gains beta / (lr tau_i J) (theta_i^end - theta^(t-1)).

    theta_i^end are the parameters with which this agent's last visit ended, tau_i rounds ago: the difference
    holds what others did since, without its own step. Zaccone et al. 2023, arXiv:2311.18578.
    """

    def refuse(self, facts: ScheduleFacts) -> str | None:
        reason = super().refuse(facts)
        if reason is None and not facts.receives_others:
            return (
                "an agent that receives only from itself begins where it ended, so there is no momentum; "
                "use local_ghbm"
            )
        return reason

    def keep(self, learned: Learned) -> Params:
        return learned.trainable
