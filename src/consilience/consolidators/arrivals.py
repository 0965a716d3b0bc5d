"""Continual merging: experts arrive one by one and are freed; memory does not grow with their number."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Message
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.schedule import ScheduleFacts
from consilience.core.state import State
from consilience.core.weight_space import WeightSpace, message_weights, with_weights


@dataclass(frozen=True)
class _OneByOne(WeightSpace):
    """A weight space in which every expert is merged into the current parameters, and then freed.

    Experts received together count one after another, by sender. Merged entries are those that the receiver
    has in common with them; a task's own are taken as received, floating-point buffers are running means.
    What is kept between experts stands in `State.outer`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregator is not None or self.outer is not None or self.lr != 1:
            got = "another lr" if self.lr != 1 else type(self.aggregator or self.outer).__name__
            raise ConsilienceError(
                f"`aggregator` and `outer` of {type(self).__name__} must be None and `lr` 1, because it "
                f"merges by itself, got {got}."
            )

    @property
    def from_base(self) -> bool:
        """Whether it needs the parameters that the experts started from."""
        return True

    def combines(self, facts: ScheduleFacts) -> bool:
        return facts.exchanges

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if self.from_base and not facts.receives_others:
            return (
                "it merges experts, and no agent receives from another here; use finetune, or an exmodel or "
                "merging setting"
            )
        if self.from_base and facts.repeats:
            return (
                "it merges experts that all start from one base, and here agents continue from the merged "
                "model; use parameter_average"
            )
        return super().refuse(facts)

    @abstractmethod
    def _merge(self, kept: Params, now: Params, new: Params, share: float) -> tuple[Params, Params]:
        """Merge one more expert: entries `now` and `new`, and its share of all weights so far.

        Returns the merged entries, and what to keep besides `kept`.
        """

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        received = with_weights(fresh)
        # Parameters that a server broadcasts are adopted, not merged again.
        if not any(m.trained for m in received):
            return super().receive(model, state, fresh, by_size, generator)
        if self.from_base and state.origin == "given":
            raise Refusal(
                f"{type(self).__name__} merges changes since the experts' base, got none; give `base`."
            )
        for message, weight in zip(received, message_weights(received, by_size), strict=True):
            if weight:
                state = self._add(model, state, message, weight, generator)
        return state.change(size=int(sum(m.size for m in received)))

    def _add(
        self, model: Model, state: State, message: Message, weight: float, generator: torch.Generator
    ) -> State:
        """Merge one more expert into the state."""
        # WeightSpace adopts a single message as it is, checked, with the entries that are not merged here.
        alone = WeightSpace().receive(model, state, [message], False, generator)
        sent = message.items["model"].group("params")

        # Sorted, so that sums over entries have the same order after a run was resumed.
        new = {
            name: alone.params[name]
            for name, p in sorted(state.base.items())
            if name in sent
            and model.task_of(name) is None
            and not model.frozen(name)
            and p.is_floating_point()
        }
        now, kept = {name: state.base[name] for name in new}, dict(state.outer)
        # The first expert finds the base, which later ones have left behind.
        if not kept:
            kept = {"weight": torch.zeros((), dtype=torch.float64)}
            kept |= {f"origin/{name}": p for name, p in now.items()} if self.from_base else {}

        total = float(kept["weight"]) + weight
        merged, more = self._merge(kept, now, new, weight / total)
        buffers = {
            name: torch.lerp(state.buffers[name], b, weight / total)
            if name in state.buffers and b.is_floating_point()
            else b
            for name, b in alone.buffers.items()
        }
        params = {**alone.params, **merged}
        outer = {**kept, **more, "weight": torch.tensor(total, dtype=torch.float64)}
        return alone.change(params=params, base=params, buffers=buffers, outer=outer)


@dataclass(frozen=True)
class RunningArithmetic(_OneByOne):
    """theta_t = base + coefficient x mean_{i <= t} (theta_i - base).

    With `of` "sum" it is theta_{t-1} + coefficient x (theta_t - base). The mean, weighted by examples if
    messages are, is that of all experts at once, to rounding, whatever their order. Coefficient 1 keeps only
    the sum of the weights, and needs no common base; others keep the base and the mean, the sum keeps the
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
            raise ConsilienceError(f"`coefficient` must be finite, got {self.coefficient}.")
        if self.of not in ("mean", "sum"):
            raise ConsilienceError(f"`of` must be mean or sum, got {self.of!r}.")

    @property
    def from_base(self) -> bool:
        return self.of == "sum" or self.coefficient != 1

    def _merge(self, kept: Params, now: Params, new: Params, share: float) -> tuple[Params, Params]:
        if not self.from_base:
            return {name: torch.lerp(now[name], p, share) for name, p in new.items()}, {}
        base = {name: kept[f"origin/{name}"] for name in new}
        if self.of == "sum":
            return {name: now[name] + self.coefficient * (p - base[name]) for name, p in new.items()}, {}
        mean = {name: torch.lerp(kept.get(f"mean/{name}", p), p, share) for name, p in new.items()}
        merged = {name: torch.lerp(base[name], p, self.coefficient) for name, p in mean.items()}
        return merged, {f"mean/{name}": p for name, p in mean.items()}


@dataclass(frozen=True)
class OPCM(_OneByOne):
    """theta_t = base + tau_t with tau_t = (lambda_{t-1} tau_{t-1} + P(theta_t - base)) / lambda_t.

    For entries that are matrices, with tau_{t-1} = U S V^T, P removes from the task vector D the block U_r
    U_r^T D V_r V_r^T of the r leading singular values, whose share of their sum is at most `threshold`, and
    the diagonal part sum_p u_p (u_p^T D v_p) v_p^T; other entries are added as they are. lambda_t makes the
    length of tau_t the mean length of all task vectors so far. The first expert is taken as it is; the order
    counts. It keeps the base, lambda, and that mean. Tang et al. 2025, arXiv:2501.09522 (threshold .5; its
    code projects only the weights of linear layers, here all matrices are projected).
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ConsilienceError(f"`threshold` must be in [0, 1], got {self.threshold}.")

    def _merge(self, kept: Params, now: Params, new: Params, share: float) -> tuple[Params, Params]:
        base = {name: kept[f"origin/{name}"] for name in new}
        tau = {name: p.double() - base[name].double() for name, p in new.items()}
        length = _length(tau)
        # The first expert has no directions before it to be projected off.
        if "scale" not in kept:
            return dict(new), {"scale": torch.ones_like(length), "length": length}
        mean = torch.lerp(kept["length"], length, share)

        total: Params = {}
        for name, change in tau.items():
            merged_before = kept["scale"] * (now[name].double() - base[name].double())
            if change.dim() == 2:
                change = across(change, merged_before, self.threshold)
            total[name] = merged_before + change

        # Without this scale the length of tau would grow with the number of experts.
        total_length = _length(total)
        scale = total_length / mean if total_length > 0 and mean > 0 else torch.ones_like(total_length)
        merged = {name: (base[name].double() + t / scale).to(new[name].dtype) for name, t in total.items()}
        return merged, {"scale": scale, "length": mean}


def across(new: Tensor, there: Tensor, threshold: float) -> Tensor:
    """Remove from a matrix `new` [a, b] its parts along `there` [a, b]: P of `OPCM`.

    >>> across(torch.ones(2, 2), torch.diag(torch.tensor([3.0, 1.0])), 0.5).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    left, values, right = torch.linalg.svd(there, full_matrices=False)
    # Singular vectors beyond the numerical rank are arbitrary.
    rank = int((values > values[:1] * torch.finfo(values.dtype).eps * max(there.shape)).sum())
    left, values, right = left[:, :rank], values[:rank], right[:rank]

    leading = int((values.cumsum(0) <= threshold * values.sum()).sum())
    inside = left.T @ new @ right.T
    along = torch.diag_embed(inside.diagonal())
    along[:leading, :leading] = inside[:leading, :leading]
    projected: Tensor = new - left @ along @ right
    return projected


def _length(entries: Mapping[str, Tensor]) -> Tensor:
    """Return the Euclidean length of all entries as one vector."""
    if not entries:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([t.square().sum() for t in entries.values()]).sum().sqrt()
