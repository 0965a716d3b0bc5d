"""Continual merging: experts arrive one by one and are let go of; what is kept does not grow with their number."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Message, Weights
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.schedule import ScheduleFacts
from consilience.core.state import State
from consilience.core.weight_space import WeightSpace


@dataclass(frozen=True)
class _OneByOne(WeightSpace):
    """A weight space in which every expert is merged with what is there, and then let go of.

    Those that are heard at once count one after another, by sender. Entries are those that the hearer has in common with them; a
    task's own are taken as they are heard, floating-point buffers are running means. What is kept stands in `State.outer`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregator is not None or self.outer is not None or self.lr != 1:
            found = "another lr" if self.lr != 1 else type(self.aggregator or self.outer).__name__
            raise ConsilienceError(
                f"`aggregator` and `outer` of {type(self).__name__} should be None, `lr` 1: it merges by itself. Found {found}."
            )

    @property
    def from_base(self) -> bool:
        """Whether it needs what the experts started from."""
        return True

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if self.from_base and not facts.receives_others:
            return "it merges experts, and nobody hears another agent here; use finetune, or an exmodel or merging setting"
        if self.from_base and facts.repeats:
            return "it merges experts that all start from one base, and here agents go on from what was merged; use parameter_average"
        return super().refuse(facts)

    @abstractmethod
    def _merge(self, kept: Params, now: Params, new: Params, share: float) -> tuple[Params, Params]:
        """The entries after one more expert, from those of now and its own, and what is kept more; `share` is its part of all weights."""

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        heard = [m for m in fresh if isinstance(m.items.get("model"), Weights)]
        if not any(m.trained for m in heard):
            return super().receive(model, state, fresh, by_size, generator)
        if self.from_base and state.origin == "given":
            raise Refusal(
                f"{type(self).__name__} merges what experts learned since their base. Found none; give `base`."
            )
        weights = [float(m.size) if by_size else float(m.size > 0) for m in heard]
        for m, weight in zip(heard, weights if any(weights) else [1.0] * len(heard), strict=True):
            if weight:
                state = self._add(model, state, m, weight, generator)
        return state.change(size=int(sum(m.size for m in heard)))

    def _add(
        self, model: Model, state: State, m: Message, weight: float, generator: torch.Generator
    ) -> State:
        """The state with one expert more."""
        alone = WeightSpace().receive(model, state, [m], False, generator)
        told = m.items["model"].group("params")
        new = {
            n: alone.params[n]
            for n, p in sorted(state.base.items())  # so that sums over entries are the same once resumed
            if n in told and model.task_of(n) is None and not model.frozen(n) and p.is_floating_point()
        }
        now, kept = {n: state.base[n] for n in new}, dict(state.outer)
        if not kept:
            kept = {"weight": torch.zeros((), dtype=torch.float64)}
            kept |= {f"origin/{n}": p for n, p in now.items()} if self.from_base else {}
        total = float(kept["weight"]) + weight
        merged, more = self._merge(kept, now, new, weight / total)
        buffers = {
            n: torch.lerp(state.buffers[n], b, weight / total)
            if n in state.buffers and b.is_floating_point()
            else b
            for n, b in alone.buffers.items()
        }
        params = {**alone.params, **merged}
        outer = {**kept, **more, "weight": torch.tensor(total, dtype=torch.float64)}
        return alone.change(params=params, base=params, buffers=buffers, outer=outer)


@dataclass(frozen=True)
class RunningArithmetic(_OneByOne):
    """theta_t = base + coefficient x mean_{i <= t} (theta_i - base), or, `of` "sum", theta_{t-1} + coefficient x (theta_t - base).

    The mean, weighted by examples where messages are, is that of all experts at once, to rounding, in whatever order they came:
    coefficient 1 keeps no more than the sum of the weights (and any base will do), others the base and the mean, the sum the
    base. Of means, Wortsman et al. 2022; of task vectors, Ilharco et al. 2023.

    >>> step = RunningArithmetic()._merge({}, {"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}, 1 / 3)
    >>> step[0]["w"].tolist()
    [2.0]
    """

    coefficient: float = 1.0
    of: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(self.coefficient) < float("inf"):
            raise ConsilienceError(
                f"`coefficient` should be finite. Found `coefficient = {self.coefficient}`."
            )
        if self.of not in ("mean", "sum"):
            raise ConsilienceError(f"`of` should be mean or sum. Found `of = {self.of!r}`.")

    @property
    def from_base(self) -> bool:
        return self.of == "sum" or self.coefficient != 1

    def _merge(self, kept: Params, now: Params, new: Params, share: float) -> tuple[Params, Params]:
        if not self.from_base:
            return {n: torch.lerp(now[n], p, share) for n, p in new.items()}, {}
        base = {n: kept[f"origin/{n}"] for n in new}
        if self.of == "sum":
            return {n: now[n] + self.coefficient * (p - base[n]) for n, p in new.items()}, {}
        mean = {n: torch.lerp(kept.get(f"mean/{n}", p), p, share) for n, p in new.items()}
        merged = {n: torch.lerp(base[n], p, self.coefficient) for n, p in mean.items()}
        return merged, {f"mean/{n}": p for n, p in mean.items()}


@dataclass(frozen=True)
class OPCM(_OneByOne):
    """tau_t = (lambda_{t-1} tau_{t-1} + P(theta_t - base)) / lambda_t; theta_t = base + tau_t: what is new is added across what is there.

    For entries that are matrices P takes out of the task vector D, with tau_{t-1} = U S V^T, the block U_r U_r^T D V_r V_r^T of the
    r leading singular values, whose share of their sum is at most `threshold`, and the diagonal part sum_p u_p (u_p^T D v_p) v_p^T;
    other entries are added as they are. lambda_t makes the length of tau_t the mean length of all task vectors so far. The first
    expert is taken as it is; the order counts. What is kept: the base, lambda, and that mean. Tang et al. 2025,
    arXiv:2501.09522 (threshold .5; its code projects the weights of linear layers alone, here all matrices are).
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ConsilienceError(f"`threshold` should be in [0, 1]. Found `threshold = {self.threshold}`.")

    def _merge(self, kept: Params, now: Params, new: Params, share: float) -> tuple[Params, Params]:
        base = {n: kept[f"origin/{n}"] for n in new}
        tau = {n: p.double() - base[n].double() for n, p in new.items()}
        length = _length(tau)
        if "scale" not in kept:
            return dict(new), {"scale": torch.ones_like(length), "length": length}
        mean = torch.lerp(kept["length"], length, share)
        total: Params = {}
        for n, t in tau.items():
            there = kept["scale"] * (now[n].double() - base[n].double())
            total[n] = there + (across(t, there, self.threshold) if t.dim() == 2 else t)
        long = _length(total)
        scale = long / mean if long > 0 and mean > 0 else torch.ones_like(long)
        merged = {n: (base[n].double() + t / scale).to(new[n].dtype) for n, t in total.items()}
        return merged, {"scale": scale, "length": mean}


def across(new: Tensor, there: Tensor, threshold: float) -> Tensor:
    """A matrix `new` [a, b] without what stands along `there` [a, b]: P of `OPCM`.

    >>> across(torch.ones(2, 2), torch.diag(torch.tensor([3.0, 1.0])), 0.5).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    u, s, vh = torch.linalg.svd(there, full_matrices=False)
    rank = int((s > s[:1] * torch.finfo(s.dtype).eps * max(there.shape)).sum())
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    r = int((s.cumsum(0) <= threshold * s.sum()).sum())
    inside = u.T @ new @ vh.T
    along = torch.diag_embed(inside.diagonal())
    along[:r, :r] = inside[:r, :r]
    left: Tensor = new - u @ along @ vh
    return left


def _length(entries: Mapping[str, Tensor]) -> Tensor:
    return (
        torch.stack([t.square().sum() for t in entries.values()]).sum().sqrt()
        if entries
        else torch.zeros((), dtype=torch.float64)
    )
