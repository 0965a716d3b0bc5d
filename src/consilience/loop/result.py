"""The result of a run: everything that tables and reports need, and the agent that it trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from torch import Tensor

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.metrics import global_forgetting, summary, worst
from consilience.core.params import Params
from consilience.core.tree import ready
from consilience.loop.agent import Agent

# Fields of a result that JSON holds as they are.
PLAIN = ("setting", "data", "method", "model", "metric", "seed", "costs", "curve", "config", "versions")


@dataclass(frozen=True, eq=False)
class Result:
    """What a run found, over its repeats.

    R = `matrices[r]` [stages + 1, sources] has the metric on each source's test data before training (row 0)
    and after each stage, for repeat r. T is the last stage, and l_j the only stage that trains on source j.
    """

    setting: str
    data: str
    method: str
    model: str
    metric: str
    seed: int
    sources: tuple[str, ...]
    stages: tuple[str, ...]
    learned_at: tuple[int | None, ...]
    """l_j for each source; None: several stages train on it; 0: none does."""
    matrices: np.ndarray
    """[repeats, stages + 1, sources]."""
    costs: Mapping[str, Any]
    """macs, bytes, steps and seconds: means over the repeats; `by_agent`: those of the first repeat."""
    mapper: np.ndarray | None = None
    """Task-mapper accuracy [repeats, stages], over the sources that were trained on by then."""
    curve: Sequence[Mapping[str, float]] = ()
    """Before training and after each stage of the first repeat: score, macs, bytes, seconds so far."""
    learning_curve: Sequence[Mapping[str, Any]] = ()
    """Inside visits of the first repeat: agent, source, epoch, step in it, steps so far, score."""
    client_drift: Sequence[Mapping[str, Any]] = ()
    """With `judge_clients`: stage, agent, clients, and the fields of `metrics.client_drift`, for each time
    that an agent of the first repeat received from two or more agents that trained from its parameters."""
    local: Sequence[Mapping[str, Any]] = ()
    """With `judge_clients`, for each visit of the first repeat: stage, agent, and the score of its parameters
    on its own test data, and the mean over all others', before and after the visit: own_before, own_after,
    others_before, others_after."""
    personal: Mapping[str, float] | None = None
    """With `judge_clients`: the last score of each client's own parameters on its own test data."""
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    versions: Mapping[str, Any] = field(default_factory=dict)
    agent: Agent | None = field(default=None, repr=False)
    """The evaluated agent of the first repeat; None for a result that was read from a folder."""

    # Scores

    @property
    def repeats(self) -> int:
        """The number of seeds."""
        return len(self.matrices)

    @property
    def matrix(self) -> np.ndarray:
        """The mean of R over repeats [stages + 1, sources]."""
        return self.matrices.mean(0)  # type: ignore[no-any-return]

    @property
    def scores(self) -> list[float]:
        """The final mean over sources, per repeat. Sources where the metric is undefined are left out."""
        last = [matrix[-1] for matrix in self.matrices]
        return [float(np.nanmean(row)) if np.isfinite(row).any() else float("nan") for row in last]

    @property
    def score(self) -> float:
        """The mean of `scores`."""
        return float(np.mean(self.scores))

    @property
    def score_std(self) -> float:
        """The standard deviation of `scores` (ddof 1); 0 for one repeat."""
        return float(np.std(self.scores, ddof=1)) if self.repeats > 1 else 0.0

    @property
    def accuracy(self) -> float:
        """The score. Raises ConsilienceError if the metric is not accuracy."""
        if self.metric != "accuracy":
            raise ConsilienceError(
                f"`accuracy` needs classification by accuracy, got metric {self.metric!r}; use `score`."
            )
        return self.score

    @property
    def spread(self) -> float:
        """The final standard deviation over sources (ddof 0)."""
        last = [matrix[-1] for matrix in self.matrices]
        stds = [float(np.nanstd(row)) if np.isfinite(row).any() else float("nan") for row in last]
        return float(np.mean(stds))

    def worst(self, fraction: float = 0.1) -> float:
        """Return the final mean over the worst fraction of the sources: how fair a federation is."""
        if not 0 < fraction <= 1:
            raise ConsilienceError(f"`fraction` must be in (0, 1], got {fraction}.")
        return float(np.mean([worst(matrix[-1], fraction) for matrix in self.matrices]))

    @property
    def first_source(self) -> list[float]:
        """The score on the source that is trained on first, before training and after each stage."""
        # A source that nobody trains on (0) comes last, one of several stages (None) first.
        stages = [len(self.matrix) if at == 0 else at or 0 for at in self.learned_at]
        return [float(value) for value in self.matrix[:, stages.index(min(stages))]]

    def of_source(self, name: str) -> list[float]:
        """Return the score on one source, before training and after each stage."""
        if name not in self.sources:
            raise unknown("source", name, self.sources)
        return [float(value) for value in self.matrix[:, self.sources.index(name)]]

    # Forgetting and transfer: None where no source allows it.

    def _mean(self, name: str) -> float | None:
        """Return the mean over repeats of a field of `metrics.summary`."""
        values = [summary(matrix, self.learned_at)[name] for matrix in self.matrices]
        found = [value for value in values if value is not None]
        return float(np.mean(found)) if found else None

    @property
    def forgetting(self) -> float | None:
        """mean_j (max_{0 < i < T} R[i, j] - R[T, j]) over sources with l_j < T."""
        return self._mean("forgetting")

    @property
    def global_forgetting(self) -> float | None:
        """mean_j (max_{0 < i < T} R[i, j] - R[T, j]) over all sources, whichever stages train on them."""
        values = [global_forgetting(matrix) for matrix in self.matrices]
        found = [value for value in values if value is not None]
        return float(np.mean(found)) if found else None

    @property
    def local_forgetting(self) -> float | None:
        """What a visit loses on others' data: the mean of others_before - others_after over `local`."""
        pairs = [(visit["others_before"], visit["others_after"]) for visit in self.local]
        lost = [before - after for before, after in pairs if before is not None and after is not None]
        return float(np.mean(lost)) if lost else None

    @property
    def backward_transfer(self) -> float | None:
        """mean_j (R[T, j] - R[l_j, j]) over sources with l_j < T."""
        return self._mean("backward_transfer")

    @property
    def forward_transfer(self) -> float | None:
        """mean_j (R[l_j - 1, j] - R[0, j]) over sources with l_j > 1."""
        return self._mean("forward_transfer")

    @property
    def normalised(self) -> float | None:
        """mean_j R[T, j] / R[l_j, j]: the fraction of the score at l_j that is left; None for "r2"."""
        return None if self.metric == "r2" else self._mean("normalised")

    @property
    def mapper_accuracy(self) -> float | None:
        """The final fraction of test examples that the task mapper gives to their own task."""
        return None if self.mapper is None else float(self.mapper[:, -1].mean())

    # The agent

    @property
    def params(self) -> Params:
        """The final parameters of the evaluated agent (first repeat)."""
        return dict(self._agent().state.params)

    def predict(self, x: Any, task: str | None = None) -> Tensor:
        """Return predictions [B, classes, *places] of the evaluated agent (first repeat).

        They are probabilities of classes or labels, or values. `x` are inputs as `data.arrays` takes them.
        """
        return self._agent().predict(ready(x), task)

    def _agent(self) -> Agent:
        if self.agent is None:
            raise ConsilienceError(
                "a result that was read from a folder has no parameters; resume its run (`resume=True`)."
            )
        return self.agent

    # JSON

    def to_json(self) -> dict[str, Any]:
        """Return the content of result.json: the fields, and what follows from them, for other programs."""
        fields = {
            "setting": self.setting,
            "data": self.data,
            "method": self.method,
            "model": self.model,
            "repeats": self.repeats,
            "seed": self.seed,
            "metric": self.metric,
            "sources": list(self.sources),
            "stages": list(self.stages),
            "learned_at": list(self.learned_at),
            "matrices": self.matrices.tolist(),
            "mapper": None if self.mapper is None else self.mapper.tolist(),
            "costs": dict(self.costs),
            "versions": dict(self.versions),
            "config": dict(self.config),
        }

        # Lists of records, where they were asked for.
        fields |= {
            "curve": [dict(point) for point in self.curve],
            "learning_curve": [dict(point) for point in self.learning_curve],
            "client_drift": [dict(entry) for entry in self.client_drift],
            "local": [dict(visit) for visit in self.local],
            "personal": None if self.personal is None else dict(self.personal),
        }

        # Derived numbers are written too, so that a reader needs none of the formulas.
        derived = {
            "score": self.score,
            "score_std": self.score_std,
            "matrix": self.matrix.tolist(),
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "normalised": self.normalised,
            "worst": self.worst(),
            "spread": self.spread,
            "global_forgetting": self.global_forgetting,
            "local_forgetting": self.local_forgetting,
            "mapper_accuracy": self.mapper_accuracy,
        }
        return {**fields, **derived, **{name: self.costs[name] for name in ("macs", "bytes", "seconds")}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return a result from the content of result.json, also one that version 0.1 wrote."""
        content = renamed(content)
        try:
            mapper = content["mapper"]
            return cls(
                **{name: content[name] for name in PLAIN},
                learning_curve=content.get("learning_curve", ()),
                client_drift=content.get("client_drift", ()),
                local=content.get("local", ()),
                personal=content.get("personal"),
                sources=tuple(content["sources"]),
                stages=tuple(content["stages"]),
                learned_at=tuple(content["learned_at"]),
                matrices=np.array(content["matrices"], dtype=float),
                mapper=None if mapper is None else np.array(mapper, dtype=float),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise ConsilienceError(
                f"result.json must have the keys of a result, and one is missing or wrong: {e}; "
                "run again to write it."
            ) from e


def renamed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of result.json with the keys of 0.2, whichever version wrote it.

    >>> renamed({"drift": [], "costs": {"by_agent": {"server": {"macs": 3, "absorbing": 2}}}})
    {'costs': {'by_agent': {'server': {'macs': 3, 'receiving': 2}}}, 'client_drift': []}
    """
    result = dict(content)
    if "drift" in result:
        result["client_drift"] = result.pop("drift")

    # A page that is no mapping is reported as a fault by the reader.
    costs = result.get("costs")
    by_agent = costs.get("by_agent") if isinstance(costs, Mapping) else None
    if isinstance(costs, Mapping) and isinstance(by_agent, Mapping):
        names = {"absorbing": "receiving"}
        pages = {
            agent: {names.get(what, what): amount for what, amount in page.items()}
            for agent, page in by_agent.items()
        }
        result["costs"] = {**costs, "by_agent": pages}
    return result
