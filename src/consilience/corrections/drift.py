"""Against the drift of clients: control variates, dynamic regularisation, and momentum that clients add while they train.

All of them are linear in theta (FedDyn has FedProx's term too): they add a vector to the gradient of every step.
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
from consilience.core.optimiser import SGD
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.core.training import Training
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts
    from consilience.core.state import State


TOTAL, PAST = "the sum", "the past"
"""Where what is private to who absorbs is kept, beside sources."""


def plain_steps(training: Training) -> str | None:
    """What goes otherwise than these methods count on where a step is not the gradient times the learning rate, or None."""
    inner = training.inner()
    if training.lr_schedule != "constant":
        return f"it counts on one learning rate, and this one goes down ({training.lr_schedule}); train with lr_schedule='constant'"
    if training.rates:
        return "it counts on one learning rate for all entries, and `rates` gives some another; train without"
    if isinstance(inner, SGD):
        if not inner.momentum:
            return None
        return (
            f"momentum {inner.momentum:g} multiplies what it adds to each gradient, up to {1 / (1 - inner.momentum):.3g} times; "
            "train with momentum 0"
        )
    return f"it adds to gradients what plain SGD would step by, and {type(inner).__name__} scales gradients; train with sgd"


def push(step: StepView, vector: Tensor) -> Tensor:
    """A penalty whose gradient is `vector` [n]."""
    return torch.dot(step.theta, vector)


# control variates


@dataclass(frozen=True)
class Scaffold(Correction):
    """SCAFFOLD: every step's gradient gains c - c_i, the mean drift of all clients instead of the client's own.

    After K steps c_i+ = c_i - c + (theta_start - theta_end) / (K lr), the paper's option II; c_i stays with the client, by source,
    and c_i+ - c_i is told with its parameters. Who hears them adds them up and tells the sum: c = sum c_i / `clients`, or with
    `clients=None` over the number of those heard of so far (clients never heard of count as c_i = 0 only in the former). Every entry
    takes part, personal ones too. It is made for plain SGD: with momentum m, (theta_start - theta_end) / (K lr) is up to 1 / (1 - m) times the
    mean gradient, and so it warns. Karimireddy et al. 2020, arXiv:1910.06378.
    """

    clients: int | None = None

    flat: ClassVar[tuple[str, ...]] = ("own", "mean")
    needs_history: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clients is not None and (not isinstance(self.clients, int) or self.clients < 1):
            raise ConsilienceError(
                f"`clients` should be a whole number >= 1, or None. Found `clients = {self.clients!r}`."
            )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        return None if facts.rounds else "nobody learns after it heard what others learned; use finetune"

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Statistics | None:
        """`own/...` and `count`, the c_i of these sources; `mean/...`, c, where it was told."""
        now = {s.name for s in sources}
        mine = {sender for sender, source in memory if source == TOTAL}
        own, total = Statistics({}), Statistics({})
        for (sender, source), item in sorted(memory.items(), key=lambda kv: (kv[0][1], kv[0][0])):
            if source in now and isinstance(item, Private):
                own = own + Statistics(item.tensors)
            elif source == "" and not item.meta.get("gain") and (not mine or sender in mine):
                total = total + Statistics(item.tensors)
        if not own.tensors and not total.tensors:
            return None
        known = {f"own/{n}": c for n, c in own.group("c").items()} | {
            "count": own.tensors.get("count", torch.zeros(()))
        }
        if total.tensors:
            heard = float(total.tensors["count"])
            if self.clients is not None and heard > self.clients + 1e-6:
                raise ConsilienceError(
                    f"`clients` should be at least all that are heard. Found {heard:g} and {self.clients}."
                )
            known |= {f"mean/{n}": c / (self.clients or heard) for n, c in total.group("c").items()}
        return Statistics(known)

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        if not ctx.flat:
            return ctx.flat, None
        shift = (
            ctx.flat["mean"] - ctx.flat["own"]
            if ctx.recalled.group("mean")
            else torch.zeros_like(ctx.flat["own"])
        )
        return {"own": ctx.flat["own"], "shift": shift}, plain_steps(training)

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        return push(step, ctx.flat["shift"])

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float]:
        return ctx.flat["shift"], 1.0

    def summarise(self, learned: Learned, ctx: Context) -> Private | None:
        """This source's share of c_i+, `c/...`, with its share of one client, `count`, and what both gained, `gain/...`."""
        if not learned.steps or learned.training is None:
            return None
        start, end = learned.layout.flatten(learned.start), learned.layout.flatten(learned.trainable)
        c = (start - end) / (learned.steps * learned.training.lr) - ctx.flat.get("shift", 0.0)
        gain = learned.share * (c - ctx.flat.get("own", 0.0))
        before = ctx.recalled.tensors["count"] if ctx.recalled else 0.0
        new = {f"c/{n}": t for n, t in learned.layout.split(learned.share * c).items()}
        new |= {f"gain/c/{n}": t for n, t in learned.layout.split(gain).items()}
        one = torch.ones((), dtype=torch.float64)
        return Private(new | {"count": learned.share * one, "gain/count": learned.share * (one - before)})

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """What was gained since this agent last absorbed is told with the parameters."""
        told = memory.get("")
        gained = Statistics(told.tensors) if told is not None and told.meta.get("gain") else Statistics({})
        kept: dict[str, Any] = {}
        for source, item in sorted(memory.items()):
            gained = gained + Statistics(item.group("gain")) if source not in ("", TOTAL) else gained
            kept[source] = Private({k: t for k, t in item.tensors.items() if not k.startswith("gain/")})
        return {**kept, "": Statistics(gained.tensors, {"gain": True})}

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]
    ) -> Mapping[str, Any]:
        """The sum of all c_i, which is told with the parameters."""
        held = memory.get(TOTAL)
        total = Statistics(held.tensors if held is not None else {})
        for m in fresh:
            item = m.items.get(self.name)
            if item is not None and item.meta.get("gain"):
                total = total + Statistics(item.tensors)
        rest = {k: v for k, v in memory.items() if k != ""}
        return (
            {**rest, TOTAL: Private(total.tensors), "": Statistics(total.tensors)} if total.tensors else rest
        )


@dataclass(frozen=True)
class FedDyn(Correction):
    """FedDyn's clients: the loss gains -<h, theta> + (alpha / 2) ||theta - theta_start||^2; after training h <- h - alpha (theta - theta_start).

    h is private, by source, and begins at 0; the first visit is FedProx. The server's part is the outer optimiser
    `consilience.core.optimiser.Dynamic`; `methods.feddyn` has both. Acar et al. 2021, arXiv:2111.04263.
    """

    alpha: float = 0.1

    shared_items: ClassVar[bool] = False
    flat: ClassVar[tuple[str, ...]] = ("h",)
    neutral: ClassVar[dict[str, float]] = {"alpha": 0.0}

    def __post_init__(self) -> None:
        non_negative("FedDyn", alpha=self.alpha)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return None if facts.trains else NO_TRAINING

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Item | None:
        """The h of these sources."""
        now = {s.name for s in sources}
        total = Statistics({})
        for (_, source), item in sorted(memory.items(), key=lambda kv: (kv[0][1], kv[0][0])):
            if source in now:
                total = total + Statistics(item.tensors)
        return total if total.tensors else None

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        assert ctx.start is not None
        return {"h": ctx.flat.get("h", torch.zeros_like(ctx.start))}, None

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        away = step.theta - step.start
        return 0.5 * self.alpha * torch.dot(away, away) - push(step, ctx.flat["h"])

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float]:
        return (step.theta - step.start).mul_(self.alpha).sub_(ctx.flat["h"]), 1.0

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        away = learned.layout.flatten(learned.trainable) - learned.layout.flatten(learned.start)
        h = learned.share * (ctx.flat["h"] - self.alpha * away)
        return Private({f"h/{n}": t for n, t in learned.layout.split(h).items()})


@dataclass(frozen=True)
class LocalSteps(Correction):
    """Tells how many steps of plain SGD a learn was worth, for the consolidator `Normalised`; training is left as it is.

    K steps of SGD with momentum m move as far as sum_{k=1..K} (1 - m^k) / (1 - m) plain ones along one gradient, FedNova's
    ||a||_1; with Nesterov's form k begins at 2 and ends at K + 1; any other optimiser counts K. Wang et al. 2020, arXiv:2007.07481 (FedNova).
    """

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return None if facts.trains else NO_TRAINING

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        falls = "it counts steps of one learning rate, and this one goes down; train with lr_schedule='constant'"
        return ctx.flat, falls if training.lr_schedule != "constant" else None

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        inner = learned.training.inner() if learned.training is not None else None
        steps = float(learned.steps)
        if isinstance(inner, SGD) and inner.momentum:
            m, first = inner.momentum, 1 + inner.nesterov
            steps = sum((1 - m**k) / (1 - m) for k in range(first, learned.steps + first))
        return Private({"steps": torch.tensor(learned.share * steps, dtype=torch.float64)})

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """The steps since this agent last absorbed, told with the parameters."""
        total = Statistics({})
        for _, item in sorted(memory.items()):
            total = total + Statistics(item.tensors)
        return {"": total}

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]
    ) -> Mapping[str, Any]:
        return {}


# momentum


@dataclass(frozen=True)
class _Momentum(Correction):
    """Every step's gradient gains -factor / (lr J) x a difference of parameters, J = epochs x steps an epoch: a learn that sees no other gradient
    moves by factor x that difference."""

    @property
    def factor(self) -> float:
        """How much of the difference is added."""
        raise NotImplementedError

    def difference(self, ctx: Context) -> Tensor | None:
        """The difference [n], or None where there is none yet."""
        raise NotImplementedError

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        return (
            None
            if facts.rounds
            else "nobody learns after what was learned was heard, so that there is no momentum; use finetune"
        )

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        assert ctx.start is not None
        moved = self.difference(ctx)
        if moved is None:
            return {"push": torch.zeros_like(ctx.start)}, None
        return {"push": moved * (-self.factor / training.lr)}, plain_steps(training)

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        return push(step, ctx.flat["push"]) / (step.horizon[0] * step.horizon[1])

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float]:
        return ctx.flat["push"], 1 / (step.horizon[0] * step.horizon[1])


@dataclass(frozen=True)
class _Global(_Momentum):
    """Momentum of common parameters: who absorbs what was learned keeps their history and tells theta^(t-1) - theta^(t-tau-1)."""

    flat: ClassVar[tuple[str, ...]] = ("moved",)

    @property
    def span(self) -> int:
        """tau: over how many rounds the difference goes."""
        raise NotImplementedError

    def refuse(self, facts: ScheduleFacts) -> str | None:
        why = super().refuse(facts)
        if why is None and facts.rounds < self.span:
            return (
                f"there is no momentum before round tau + 1 = {self.span + 1}, and the last one that learns here is round {facts.rounds + 1}; "
                "use a smaller tau or more rounds"
            )
        return why

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Statistics | None:
        """`moved/...`, as this agent's own history has it, else the mean of what was told."""
        mine = {sender for sender, source in memory if source == PAST}
        told = [
            i
            for (sender, source), i in sorted(memory.items())
            if source == "" and (not mine or sender in mine)
        ]
        total = Statistics({})
        for item in told:
            total = total + Statistics(item.tensors)
        return (
            Statistics(
                {n: t / len(told) for n, t in total.tensors.items()} if len(told) > 1 else total.tensors
            )
            if told
            else None
        )

    def difference(self, ctx: Context) -> Tensor | None:
        return ctx.flat.get("moved")

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]
    ) -> Mapping[str, Any]:
        """The last tau + 1 parameters, private; and the difference of the newest and the oldest, told with the parameters."""
        if not any(m.trained for m in fresh):
            return memory
        held = memory.get(PAST)
        past = [held.group(str(i)) for i in range(held.meta["rounds"])] if held is not None else [before.base]
        past = [*past, {n: p for n, p in after.params.items() if p.is_floating_point()}][-self.span - 1 :]
        kept = {f"{i}/{n}": p for i, params in enumerate(past) for n, p in params.items()}
        result = {**memory, PAST: Private(kept, {"rounds": len(past)})}
        if len(past) > self.span:
            oldest, newest = past[0], past[-1]
            both = [n for n in newest if n in oldest and not torch.equal(newest[n], oldest[n])]
            result[""] = Statistics({f"moved/{n}": newest[n] - oldest[n] for n in both})
        return result


@dataclass(frozen=True)
class GHBM(_Global):
    """Generalised heavy-ball momentum: every step's gradient gains beta / (lr tau J) (theta^(t-tau-1) - theta^(t-1)), J the steps of a learn.

    Over rounds theta^t = theta^(t-1) - lr g + (beta / tau) (theta^(t-1) - theta^(t-tau-1)), g the sum of the gradients of round t: tau = 1 is the
    classical heavy ball, tau = 1 / (share of clients that a round hears) weighs all clients alike. Round t is the t-th time that what was learned is
    absorbed; there is no correction before round tau + 1. Who absorbs keeps tau + 1 parameters, and what it tells is twice as long. A straggler adds its fraction. With
    momentum or Adam inside it warns: it is made for plain SGD. Zaccone et al. 2023, arXiv:2311.18578.
    """

    beta: float = 0.9
    tau: int = 1

    neutral: ClassVar[dict[str, float]] = {"beta": 0.0}

    def __post_init__(self) -> None:
        non_negative("GHBM", beta=self.beta)
        if not isinstance(self.tau, int) or self.tau < 1:
            raise ConsilienceError(f"`tau` should be a whole number >= 1. Found `tau = {self.tau!r}`.")

    @property
    def span(self) -> int:
        return self.tau

    @property
    def factor(self) -> float:
        return self.beta / self.tau


@dataclass(frozen=True)
class FedCM(_Global):
    """Client momentum: the gradient of every step is alpha g + (1 - alpha) (theta^(t-2) - theta^(t-1)) / (lr J), J the steps of a learn.

    The objectives of a step are scaled by alpha in the first round too, where the momentum is 0; penalties of other corrections
    are not. It is GHBM with tau = 1, beta = 1 - alpha and the learning rate alpha lr. Xu et al. 2021, arXiv:2106.10874.
    """

    alpha: float = 0.1

    neutral: ClassVar[dict[str, float]] = {"alpha": 1.0}

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConsilienceError(f"`alpha` should be in (0, 1]. Found `alpha = {self.alpha}`.")

    @property
    def span(self) -> int:
        return 1

    @property
    def factor(self) -> float:
        return 1 - self.alpha

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        return torch.full_like(step.theta, self.alpha)


@dataclass(frozen=True)
class _Local(_Momentum):
    """Momentum from what an agent itself kept of its last learn, of whichever source; who absorbs only tells how many rounds there were."""

    beta: float = 0.9

    flat: ClassVar[tuple[str, ...]] = ("anchor",)
    neutral: ClassVar[dict[str, float]] = {"beta": 0.0}

    def __post_init__(self) -> None:
        non_negative(type(self).__name__, beta=self.beta)

    @property
    def factor(self) -> float:
        return self.beta

    def refuse(self, facts: ScheduleFacts) -> str | None:
        why = super().refuse(facts)
        again = facts.own_history or facts.revisited
        return (
            why if why or again else "no agent learns twice, so that none has momentum of its own; use ghbm"
        )

    def keep(self, learned: Learned) -> Params:
        """What it keeps of a learn."""
        raise NotImplementedError

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Private:
        """`anchor/...`, kept at the last learn, where there was one; how many rounds there were before this one, and before that."""
        rounds = [int(i.meta["round"]) for (_, source), i in memory.items() if source == ""]
        now = max(rounds, default=0)
        kept = [i for (_, source), i in sorted(memory.items()) if source and isinstance(i, Private)]
        return Private(
            kept[0].tensors if kept else {}, {"round": now, "last": kept[0].meta["round"] if kept else now}
        )

    def difference(self, ctx: Context) -> Tensor | None:
        """(theta - anchor) / rounds since then; 0 where an entry is new."""
        known = ctx.recalled.group("anchor")
        if not known or ctx.layout is None or ctx.start is None:
            return None
        moved: Tensor = (ctx.start - ctx.flat["anchor"]) / max(
            1, ctx.recalled.meta["round"] - ctx.recalled.meta["last"]
        )
        for n in ctx.layout.names:
            if n not in known:
                moved[ctx.layout.span(n)] = 0
        return moved

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        return Private(
            {f"anchor/{n}": p for n, p in self.keep(learned).items()}, {"round": ctx.recalled.meta["round"]}
        )

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Only the last learn's."""
        return {s: item for s, item in memory.items() if s in ("", learned.source.name)}

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]
    ) -> Mapping[str, Any]:
        """How often what was learned was absorbed here, told with the parameters."""
        if not any(m.trained for m in fresh):
            return memory
        last = memory.get("")
        return {**memory, "": Statistics({}, {"round": 1 + (last.meta["round"] if last is not None else 0)})}


@dataclass(frozen=True)
class LocalGHBM(_Local):
    """GHBM from an agent's own participations: the gradient gains beta / (lr tau_i J) (theta_i - theta^(t-1)), tau_i rounds after it began from theta_i.

    theta_i are the parameters with which this agent's last learn began, and tau_i the rounds since: nothing but a counter is told more than in
    federated averaging. Clients that take turns in rounds of a share C have tau_i = 1 / C, and this is GHBM with tau = 1 / C. The first
    participation is plain. Zaccone et al. 2023, arXiv:2311.18578.
    """

    def keep(self, learned: Learned) -> Params:
        return dict(learned.start)


@dataclass(frozen=True)
class FedHBM(_Local):
    """LocalGHBM with an agent's own result as anchor: the gradient gains beta / (lr tau_i J) (theta_i^end - theta^(t-1)).

    theta_i^end are the parameters with which this agent's last learn ended, tau_i rounds ago: what others did since, and not its
    own step. Zaccone et al. 2023, arXiv:2311.18578.
    """

    def refuse(self, facts: ScheduleFacts) -> str | None:
        alone = "an agent that hears itself alone ends where it begins again, so that there is no momentum; use local_ghbm"
        return super().refuse(facts) or (None if facts.receives_others else alone)

    def keep(self, learned: Learned) -> Params:
        return learned.trainable
