"""The result of a run: frozen, with everything a table or a report needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.metrics import global_forgetting, summary, worst

if TYPE_CHECKING:
    from torch import Tensor

    from consilience.core.params import Params
    from consilience.loop.agent import Agent


@dataclass(frozen=True, eq=False)
class Result:
    """What a run found, over its repeats.

    `matrices` [repeats, stages + 1, sources] hold the metric on each source's test data before training and after each
    stage; `costs` are means over the repeats (`by_agent`: of the first); `learned_at` the only stage in which each source is learned (None: several; 0: none). `agent` is the evaluated agent of the
    first repeat (None for a result read from a folder).
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
    matrices: np.ndarray
    costs: Mapping[str, Any]
    mapper: np.ndarray | None = None
    """Task-mapper accuracy [repeats, stages], over the sources known at that stage."""
    curve: Sequence[Mapping[str, float]] = ()
    """Before training and after each stage of the first repeat: score, macs, bytes, seconds so far."""
    learning_curve: Sequence[Mapping[str, Any]] = ()
    """Inside the tasks of the first repeat, where asked for: agent, source, epoch, step in it, steps so far, score."""
    client_drift: Sequence[Mapping[str, Any]] = ()
    """Where `clients` were judged, for each time that an agent of the first repeat absorbed two or more that learned from its own
    parameters: stage, agent, clients, and what `metrics.client_drift` gives."""
    local: Sequence[Mapping[str, Any]] = ()
    """Where `clients` were judged, for each learn of the first repeat: stage, agent, and the score on its own test data and the mean
    over all others', by its own parameters before and after the learn: own_before, own_after, others_before, others_after."""
    personal: Mapping[str, float] | None = None
    """The last score of each client's own parameters on its own test data, where clients were judged."""
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    agent: Agent | None = None

    @property
    def repeats(self) -> int:
        return len(self.matrices)

    @property
    def matrix(self) -> np.ndarray:
        """Mean over repeats [stages + 1, sources]; row 0 is before any training."""
        return self.matrices.mean(0)  # type: ignore[no-any-return]

    @property
    def scores(self) -> list[float]:
        """The final mean over sources, for each repeat."""
        return [float(np.nanmean(m[-1])) if np.isfinite(m[-1]).any() else float("nan") for m in self.matrices]

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))

    @property
    def score_std(self) -> float:
        """The standard deviation over repeats (ddof 1), 0 for one."""
        return float(np.std(self.scores, ddof=1)) if self.repeats > 1 else 0.0

    @property
    def accuracy(self) -> float:
        """The score, where the metric is accuracy."""
        if self.metric != "accuracy":
            raise ConsilienceError(
                f"`accuracy` needs classification by accuracy. Found the metric {self.metric!r}; use `score`."
            )
        return self.score

    def _mean(self, name: str) -> float | None:
        values = [summary(m, self.learned_at)[name] for m in self.matrices]
        found = [v for v in values if v is not None]
        return float(np.mean(found)) if found else None

    @property
    def forgetting(self) -> float | None:
        return self._mean("forgetting")

    @property
    def global_forgetting(self) -> float | None:
        """mean_j (max_{0 < i < T} R[i, j] - R[T, j]): also where sources are learned again and again."""
        found = [v for m in self.matrices if (v := global_forgetting(m)) is not None]
        return float(np.mean(found)) if found else None

    @property
    def local_forgetting(self) -> float | None:
        """What local learning loses on others' data: the mean of others_before - others_after over all learns of clients."""
        lost = [
            d["others_before"] - d["others_after"]
            for d in self.local
            if None not in (d["others_before"], d["others_after"])
        ]
        return float(np.mean(lost)) if lost else None

    def worst(self, fraction: float = 0.1) -> float:
        """The final mean over the worst sources, that fraction of all of them and at least one: how fair a federation is to clients."""
        if not 0 < fraction <= 1:
            raise ConsilienceError(f"`fraction` should be in (0, 1]. Found `fraction = {fraction}`.")
        return float(np.mean([worst(m[-1], fraction) for m in self.matrices]))

    @property
    def spread(self) -> float:
        """The final standard deviation over sources (ddof 0)."""
        stds = [float(np.nanstd(m[-1])) if np.isfinite(m[-1]).any() else float("nan") for m in self.matrices]
        return float(np.mean(stds))

    @property
    def backward_transfer(self) -> float | None:
        return self._mean("backward_transfer")

    @property
    def forward_transfer(self) -> float | None:
        return self._mean("forward_transfer")

    @property
    def normalised(self) -> float | None:
        """mean_j R[T, j] / R[l_j, j]: what is left of the score that each source had when it was learned; None for "r2"."""
        return None if self.metric == "r2" else self._mean("normalised")

    @property
    def first_source(self) -> list[float]:
        """The score on the first source learned, before training and after each stage."""
        at = [len(self.matrix) if a == 0 else a or 0 for a in self.learned_at]  # 0: nobody learned it
        return [float(v) for v in self.matrix[:, at.index(min(at))]]

    def of_source(self, name: str) -> list[float]:
        """The score on one source, before training and after each stage."""
        if name not in self.sources:
            raise unknown("source", name, self.sources)
        return [float(v) for v in self.matrix[:, self.sources.index(name)]]

    @property
    def mapper_accuracy(self) -> float | None:
        """The share of test samples that the task mapper gives to their own task, at the end."""
        return None if self.mapper is None else float(self.mapper[:, -1].mean())

    @property
    def params(self) -> Params:
        """The final parameters of the evaluated agent (first repeat)."""
        return dict(self._agent().state.params)

    def predict(self, x: Tensor, task: str | None = None) -> Tensor:
        """Class probabilities (or values) [B, classes] of the evaluated agent (first repeat)."""
        import torch

        return self._agent().predict(torch.as_tensor(x), task)

    def _agent(self) -> Agent:
        if self.agent is None:
            raise ConsilienceError(
                "parameters live in the run or in its checkpoint. Found a result read from a folder."
            )
        return self.agent

    def to_json(self) -> dict[str, Any]:
        """The content of result.json."""
        return {
            "setting": self.setting,
            "data": self.data,
            "method": self.method,
            "model": self.model,
            "repeats": self.repeats,
            "seed": self.seed,
            "metric": self.metric,
            "score": self.score,
            "score_std": self.score_std,
            "matrix": self.matrix.tolist(),
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "normalised": self.normalised,
            "macs": self.costs["macs"],
            "bytes": self.costs["bytes"],
            "seconds": self.costs["seconds"],
            "versions": dict(self.versions),
            "sources": list(self.sources),
            "stages": list(self.stages),
            "learned_at": list(self.learned_at),
            "matrices": self.matrices.tolist(),
            "mapper": None if self.mapper is None else self.mapper.tolist(),
            "mapper_accuracy": self.mapper_accuracy,
            "costs": dict(self.costs),
            "curve": [dict(c) for c in self.curve],
            "learning_curve": [dict(c) for c in self.learning_curve],
            "config": dict(self.config),
            "worst": self.worst(),
            "spread": self.spread,
            "global_forgetting": self.global_forgetting,
            "local_forgetting": self.local_forgetting,
            "client_drift": [dict(d) for d in self.client_drift],
            "local": [dict(d) for d in self.local],
            "personal": None if self.personal is None else dict(self.personal),
        }

    @staticmethod
    def from_json(d: Mapping[str, Any]) -> Result:
        """A result from the content of result.json."""
        try:
            return Result(
                **{
                    k: d[k]
                    for k in (
                        "setting",
                        "data",
                        "method",
                        "model",
                        "metric",
                        "seed",
                        "costs",
                        "curve",
                        "config",
                        "versions",
                    )
                },
                learning_curve=d.get("learning_curve", ()),
                client_drift=d.get("client_drift", ()),
                local=d.get("local", ()),
                personal=d.get("personal"),
                sources=tuple(d["sources"]),
                stages=tuple(d["stages"]),
                learned_at=tuple(d["learned_at"]),
                matrices=np.array(d["matrices"], dtype=float),
                mapper=None if d["mapper"] is None else np.array(d["mapper"], dtype=float),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise ConsilienceError(
                f"a result should have all keys of result.json. Found a fault: {e}."
            ) from e
