"""The result of a run: everything that tables and reports need, and the agent that it trained."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, overload

import numpy as np
from torch import Tensor

from consilience.core.errors import Absent, ConsilienceError, unknown
from consilience.core.metrics import global_forgetting, mean, summary, worst
from consilience.core.model import MISFITS, misfit
from consilience.core.params import SEAL, Params, is_sealed
from consilience.core.source import Label
from consilience.core.tree import ready
from consilience.core.warning import warn
from consilience.loop.agent import Agent, input_shape

# Fields of a result that JSON holds as they are.
PLAIN = ("setting", "data", "method", "model", "metric", "seed", "costs", "curve", "config", "versions")

FIGURES = (
    *("score", "score_std", "forgetting", "backward_transfer", "forward_transfer", "normalised"),
    *("worst", "spread", "global_forgetting", "local_forgetting", "mapper_accuracy"),
    *("average_incremental", "stability", "plasticity"),
)
"""Numbers that follow from a result's fields; result.json has them too."""


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What a run found, over its repeats.

    R = `matrices[r]` [stages + 1, sources] has the metric on each source's test data before training (row 0)
    and after each stage, for repeat r. With personal entries, each source's own client is measured. T is the
    last stage, and l_j the only stage that trains on source j.
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
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The matrices of each further metric; where `measured_by` is set, of all. `of_metric` uses them."""
    higher: Mapping[str, bool | None] = field(default_factory=dict)
    """Whether more is better, by metric; None: unknown, and True if it is not here."""
    measured_by: tuple[str, ...] = ()
    """The metric of each source in the matrices, where they differ; else (), and it is `metric`."""
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
    visits: Sequence[Mapping[str, Any]] = ()
    """What corrections say of each visit of the first repeat: stage, agent, sources, and under the name of
    each correction with `figures` what these are."""
    personal: Mapping[str, float] | None = None
    """With `judge_clients`: the last score of each client's own parameters on its own test data."""
    stopped: Sequence[Mapping[str, Any]] = ()
    """With `stopping`, for each repeat: the last `stage`, `why` it is the last, the stage whose parameters
    are `returned`, and their `score` on validation data (higher is better). Rows of R that a repeat did not
    reach are NaN; its scores, forgetting and transfer are those at the stage that is returned."""
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    foreseen: tuple[bool, ...] = ()
    """Whether all outputs of a source were trained before stage l_j, as `forward_transfer` needs; (): all."""
    labels: tuple[Label, ...] = ()
    """What each output column means: (label space, class name)."""
    sizes: Sequence[tuple[int, int]] = ()
    """The numbers of training and of test examples of each source."""
    confusion: np.ndarray | None = None
    """Test examples by class and answer [C, C + 1] at the last stage, summed over repeats, in the order of
    `labels`; the last column is no class (unknown). None where targets are no classes, or more than 100."""
    sharing: Mapping[str, Any] = field(default_factory=dict)
    """How each task mixes experts, or networks of tasks, at the end of the first repeat, as `models.sharing`
    measures it on training data; {} for models that mix nothing."""
    agent: Agent | None = None
    """The evaluated agent of the first repeat; None for a result that was read from a folder."""
    agents: Mapping[str, Agent] = field(default_factory=dict)
    """Agents of the first repeat with models of their own, by name: clients with `judge_clients`,
    `personalise` or personal entries, and agents that no server sends its parameters to."""

    # Scores

    @property
    def repeats(self) -> int:
        """The number of seeds."""
        return len(self.matrices)

    @property
    def matrix(self) -> np.ndarray:
        """The mean of R over repeats [stages + 1, sources], at each stage over those that reached it."""
        return mean(self.matrices, 0)

    @property
    def final(self) -> list[np.ndarray]:
        """R for each repeat, up to the stage whose parameters are returned: the last without `stopping`."""
        if not self.stopped:
            return list(self.matrices)
        return [R[: stop["returned"] + 1] for R, stop in zip(self.matrices, self.stopped, strict=True)]

    @property
    def scores(self) -> list[float]:
        """The final mean over sources, per repeat. Sources where the metric is undefined are left out.

        Every source counts the same, also where sources are clients with tests of different sizes.

        Raises ConsilienceError where sources have different metrics.
        """
        self._check_one_metric()
        return [float(mean(matrix[-1])) for matrix in self.final]

    @property
    def score(self) -> float:
        """The mean of `scores`."""
        return float(mean(self.scores))

    @property
    def score_std(self) -> float:
        """The standard deviation of `scores` (ddof 1); 0 for one repeat."""
        self._check_one_metric()
        return self.deviation("score") or 0.0

    @property
    def accuracy(self) -> float:
        """The score. Raises ConsilienceError if no metric is accuracy."""
        if "accuracy" not in (self.metric, *self.metrics):
            raise Absent(
                f"`accuracy` needs classification by accuracy, got metric {self.metric!r}; use `score`."
            )
        return self.of_metric("accuracy").score

    @property
    def spread(self) -> float:
        """The final standard deviation over sources (ddof 0)."""
        self._check_one_metric()
        rows = [matrix[-1] for matrix in self.final]
        return float(mean([np.nanstd(row) if np.isfinite(row).any() else np.nan for row in rows]))

    def worst(self, fraction: float = 0.1) -> float:
        """Return the final mean over the worst fraction of the sources: how fair a federation is."""
        if not 0 < fraction <= 1:
            raise ConsilienceError(f"`fraction` must be in (0, 1], got {fraction}.")
        higher = self._known_direction()
        return float(mean([worst(matrix[-1], fraction, higher) for matrix in self.final]))

    @property
    def seen(self) -> list[float]:
        """The mean over the sources seen so far, after each stage i: mean_{j: l_j <= i} R[i, j].

        A source that several stages train on counts from the first stage.
        """
        self._check_one_metric()
        at = [1 if stage is None else stage for stage in self.learned_at]
        rows = enumerate(self.matrix[1:], 1)
        # NaN before the first source was trained on.
        return [
            float(mean(np.array([row[j] for j, stage in enumerate(at) if 0 < stage <= i] or [np.nan])))
            for i, row in rows
        ]

    @property
    def average_incremental(self) -> float:
        """The mean of `seen` over stages: average incremental accuracy. Rebuffi et al. 2017."""
        return float(mean(np.array(self.seen)))

    @property
    def plasticity(self) -> float | None:
        """mean_j R[l_j, j]: how well each source is learned by the end of its own stage."""
        return self._mean("plasticity", directed=False)

    @property
    def stability(self) -> float | None:
        """mean_j R[T, j] over sources with l_j < T: how well earlier sources are known in the end."""
        return self._mean("stability", directed=False)

    # Several metrics

    def of_metric(self, name: str) -> Self:
        """Return this result by another of its metrics: with its matrices, forgetting, curves and table.

        Sources that it does not fit have NaN, and are left out of means. What `judge_clients` found is by the
        first metric only.
        """
        if name == self.metric:
            return self
        if name not in self.metrics:
            raise unknown("metric", name, {*self.metrics, self.metric} - {""}, "those of the run")

        # Curves have the first metric as the score, and all others next to it.
        def scored(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            return [{**point, "score": point["metrics"].get(name)} for point in points]

        return replace(
            self,
            metric=name,
            matrices=self.metrics[name],
            metrics={},
            measured_by=(),
            curve=scored(self.curve),
            learning_curve=scored(self.learning_curve),
            local=(),
            personal=None,
        )

    def by_metric(self) -> list[Self]:
        """Return this result by each of its metrics, the first first."""
        # Where the sources' metrics differ, no single one is the result's.
        first = [] if self.measured_by else [self]
        return [*first, *(self.of_metric(name) for name in self.metrics)]

    def figure(self, name: str) -> float | None:
        """Return a number of the result by its name, such as "forgetting"; None where it is refused."""
        try:
            value = getattr(self, name)
            return value() if callable(value) else value  # type: ignore[no-any-return]
        except ConsilienceError:
            return None

    def deviation(self, name: str) -> float | None:
        """Return the standard deviation over repeats (ddof 1) of a number that `figure` gives.

        None with fewer than two repeats in which it is defined, and for what is of the first repeat alone.
        """
        each = [self._alone(number).figure(name) for number in range(self.repeats)]
        found = [value for value in each if value is not None and np.isfinite(value)]
        return float(np.std(found, ddof=1)) if len(found) > 1 else None

    def _alone(self, number: int) -> Self:
        """Return the scores of one repeat as a result."""
        own = slice(number, number + 1)
        return replace(
            self,
            matrices=self.matrices[own],
            metrics={name: matrices[own] for name, matrices in self.metrics.items()},
            mapper=None if self.mapper is None else self.mapper[own],
            stopped=self.stopped[own],
            local=(),
        )

    def _check_one_metric(self) -> None:
        """Refuse means over sources that have different metrics."""
        if self.measured_by:
            raise Absent(
                f"the sources have different metrics ({', '.join(self.metrics)}), whose mean says nothing; "
                f"use `result.of_metric({self.measured_by[0]!r})`."
            )

    @property
    def direction(self) -> bool | None:
        """Whether more of the metric is better; None where that is unknown."""
        return self.higher.get(self.metric, True)

    def _known_direction(self) -> bool:
        """Return whether more is better; refuse what needs a direction where none is known."""
        self._check_one_metric()
        higher = self.direction
        if higher is None:
            raise Absent(
                f"forgetting and transfer need a metric with a direction, and {self.metric!r} has none; "
                "use `metric=cs.metrics.own(f, higher=True)`, or False where less is better."
            )
        return higher

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

    def _mean(self, name: str, directed: bool = True) -> float | None:
        """Return the mean over repeats of a field of `metrics.summary`, which may need a direction."""
        self._check_one_metric()
        higher = self._known_direction() if directed else True
        # A source that was to be learned after the last stage is learned at none.
        values = [
            summary(matrix, [at and (at if at < len(matrix) else 0) for at in self.learned_at], higher)[name]
            for matrix in self.final
        ]
        found = [value for value in values if value is not None]
        return float(np.mean(found)) if found else None

    @property
    def forgetting(self) -> float | None:
        """mean_j (max_{0 < i < T} R[i, j] - R[T, j]) over sources with l_j < T.

        Where less is better it is mean_j (R[T, j] - min_{0 < i < T} R[i, j]); transfer changes its sign too.
        """
        return self._mean("forgetting")

    @property
    def global_forgetting(self) -> float | None:
        """mean_j (max_{0 < i < T} R[i, j] - R[T, j]) over all sources, whichever stages train on them."""
        higher = self._known_direction()
        values = [global_forgetting(matrix, higher) for matrix in self.final]
        found = [value for value in values if value is not None]
        return float(np.mean(found)) if found else None

    @property
    def local_forgetting(self) -> float | None:
        """What a visit loses on others' data: the mean of others_before - others_after over `local`.

        Where less is better the difference has the other sign.
        """
        sign = 1 if self._known_direction() else -1
        pairs = [(visit["others_before"], visit["others_after"]) for visit in self.local]
        lost = [
            sign * (before - after) for before, after in pairs if before is not None and after is not None
        ]
        return float(np.mean(lost)) if lost else None

    @property
    def backward_transfer(self) -> float | None:
        """mean_j (R[T, j] - R[l_j, j]) over sources with l_j < T."""
        return self._mean("backward_transfer")

    @property
    def forward_transfer(self) -> float | None:
        """mean_j (R[l_j - 1, j] - R[0, j]) over sources with l_j > 1 whose outputs were trained before l_j.

        A class that no stage has trained yet, or a head of a task to come, scores 0 or chance by
        construction, whatever was learned: None where that is so of all sources, as in class-incremental
        learning. Lopez-Paz and Ranzato 2017.
        """
        if any(at is None for at in self.learned_at):
            return None
        # Those that are left out count as learned at no stage.
        known = self.foreseen or (True,) * len(self.sources)
        kept = [at if fits else 0 for at, fits in zip(self.learned_at, known, strict=True)]
        return replace(self, learned_at=tuple(kept))._mean("forward_transfer")

    @property
    def normalised(self) -> float | None:
        """mean_j R[T, j] / R[l_j, j]: the fraction of the score at l_j that is left.

        None where less is better, and for "r2", whose 0 is not the least.
        """
        return None if self.metric == "r2" else self._mean("normalised")

    @property
    def mapper_accuracy(self) -> float | None:
        """The final fraction of test examples that the task mapper gives to their own task."""
        if self.mapper is None:
            return None
        return float(mean([own[len(R) - 2] for own, R in zip(self.mapper, self.final, strict=True)]))

    # The agent

    @property
    def params(self) -> Params:
        """The state dict of the evaluated agent (first repeat), as `state_dict` returns it."""
        return self.state_dict()

    def state_dict(self, agent: str | None = None) -> Params:
        """Return parameters and buffers as the torch module has them, for `module.load_state_dict`.

        Tied entries have all their names. `agent` names one of `agents`; None: the evaluated one. The
        attribute `labels` of what is returned says what the output columns mean, for `cs.Expert` and `base=`.

        Methods such as PackNet, HAT and iCaRL answer with a view of the parameters, by task or by what they
        keep (`Correction.view`). A state dict has the parameters without it, and a warning names the method's
        part.
        """
        chosen = self._agent(agent)
        state = chosen.state
        if views := [correction.name for correction, _ in chosen.predictor.views]:
            warn(
                f"{views[0]} answers with a view of the parameters, which a state dict does not have, so "
                "that a module that loads it answers otherwise; use `result.predict`."
            )
        found = OrderedDict(chosen.model.state_dict(state.params, state.buffers))
        # As torch keeps `_metadata`: torch.save and torch.load keep it too.
        vars(found)["labels"] = chosen.frame.labels
        return found

    @overload
    def predict(
        self, x: Any, task: str | None = None, *, names: Literal[False] = False, agent: str | None = None
    ) -> Tensor: ...

    @overload
    def predict(
        self, x: Any, task: str | None = None, *, names: Literal[True], agent: str | None = None
    ) -> list[Any]: ...

    def predict(
        self, x: Any, task: str | None = None, *, names: bool = False, agent: str | None = None
    ) -> Tensor | list[Any]:
        """Return predictions [B, classes, *places] of the evaluated agent (first repeat).

        They are probabilities of classes or labels, or values, in the order of `labels`. With `names`: the
        name of the likeliest class of each sample (None: unknown), or of all labels from 0.5 on. `agent`
        names one of `agents`, such as a client. `x` are inputs as `data.arrays` takes them.
        """
        chosen, samples = self._agent(agent), ready(x)
        # A module may take one sample for a batch of its rows.
        shapes = {input_shape(source.train) for source in chosen.schedule.sources}
        if tuple(samples.shape) in shapes and tuple(samples.shape[1:]) not in shapes:
            raise ConsilienceError(
                f"`x` must be a batch of samples [B, ...], got one sample {list(samples.shape)}; use x[None]."
            )
        if task is None and chosen.schedule.labelled and chosen.method.mapper is None:
            warn(
                "this run has task labels (scenario='task'), and these predictions are over all tasks; "
                f"give `task`, one of {', '.join(sorted(map(str, chosen.frame.tasks)))}."
            )
        try:
            answer = chosen.predict(samples, task)
        except MISFITS as error:
            raise misfit(samples, error) from error
        return chosen.frame.names(answer, task) if names else answer

    def _agent(self, name: str | None = None) -> Agent:
        """Return an agent by its name; None: the evaluated one."""
        if self.agent is None:
            raise Absent(
                "a result that was read from a folder has no parameters; resume its run (`resume=True`)."
            )
        if name is None:
            return self.agent
        every = {self.agent.name: self.agent, **self.agents}
        if name not in every:
            raise unknown("agent", name, every, "the agents whose models were kept")
        return every[name]

    # As text

    def __repr__(self) -> str:
        """Write what ran, how well, at what cost: five lines."""

        def said(name: str) -> str:
            value, spread = self.figure(name), self.deviation(name)
            shown = "-" if value is None else format(value, ".3f")
            return f"{name.replace('_', ' ')} {shown}" + ("" if spread is None else f" +- {spread:.3f}")

        counts = [(len(self.stages), "stage"), (len(self.sources), "source"), (self.repeats, "repeat")]
        sizes = ", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts)
        names = [name for _, name in self.labels[:6]]
        more = f", ... ({len(self.labels)})" if len(self.labels) > len(names) else ""
        return "\n".join(
            [
                f"{self.method} in {self.setting} on {self.data}, model {self.model}: {sizes}",
                f"  {self.metric}: {said('score')}, {said('average_incremental')}",
                "  " + ", ".join(map(said, ("forgetting", "backward_transfer", "stability", "plasticity"))),
                f"  outputs: {', '.join(names) or '-'}{more}",
                f"  cost: {self.costs['macs']:.3g} MACs, {self.costs['bytes']:.3g} bytes, "
                f"{self.costs['steps']} steps, {self.costs['seconds']:.1f} s",
            ]
        )

    def to_pandas(self) -> Any:
        """Return all scores as a DataFrame: seed, stage (0: before training), name, source, metric, score.

        Needs pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConsilienceError("`to_pandas` needs pandas: pip install pandas.") from error
        names = ("start", *self.stages)
        rows = [
            (self.seed + r, i, names[i], source, shown.metric, float(shown.matrices[r, i, j]))
            for shown in self.by_metric()
            for r in range(self.repeats)
            for i in range(len(names))
            for j, source in enumerate(self.sources)
        ]
        columns = ["seed", "stage", "name", "source", "metric", "score"]
        return pandas.DataFrame(rows, columns=columns)

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
            "higher": self.direction,
            "sources": list(self.sources),
            "labels": [list(label) for label in self.labels],
            "sizes": [list(size) for size in self.sizes],
            "confusion": None if self.confusion is None else self.confusion.tolist(),
            "stages": list(self.stages),
            "learned_at": list(self.learned_at),
            "foreseen": list(self.foreseen),
            "matrices": self.matrices.tolist(),
            "mapper": None if self.mapper is None else self.mapper.tolist(),
            "costs": dict(self.costs),
            "stopped": [dict(stop) for stop in self.stopped],
            "versions": dict(self.versions),
            "config": dict(self.config),
            "sharing": dict(self.sharing),
        }

        # Lists of records, where they were asked for.
        fields |= {
            "curve": [dict(point) for point in self.curve],
            "learning_curve": [dict(point) for point in self.learning_curve],
            "client_drift": [dict(entry) for entry in self.client_drift],
            "local": [dict(visit) for visit in self.local],
            "visits": [dict(visit) for visit in self.visits],
            "personal": None if self.personal is None else dict(self.personal),
        }

        # Derived numbers are written too, so that a reader needs none of the formulas.
        derived = {"matrix": self.matrix.tolist()} | {name: self.figure(name) for name in FIGURES}
        further = {
            name: {
                "higher": self.higher.get(name, True),
                "matrices": matrices.tolist(),
                **{figure: self.of_metric(name).figure(figure) for figure in FIGURES},
            }
            for name, matrices in self.metrics.items()
        }
        costs = {name: self.costs[name] for name in ("macs", "bytes", "seconds")}
        return {**fields, **derived, "metrics": further, "measured_by": list(self.measured_by), **costs}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return a result from the content of result.json, also one that version 0.1 wrote."""
        # Versions before 0.2 wrote no hash.
        if SEAL in content and not is_sealed(content):
            raise ConsilienceError(
                "result.json is damaged or edited: its hash is another; run again to write it."
            )
        content = renamed(content)

        # Fields that 0.1 did not write have their defaults.
        try:
            # Results of 0.1 have one metric, of which more is better.
            mapper, further = content["mapper"], content.get("metrics", {})
            confusion = content.get("confusion")
            higher = {name: found["higher"] for name, found in further.items()}
            return cls(
                **{name: content[name] for name in PLAIN},
                learning_curve=content.get("learning_curve", ()),
                client_drift=content.get("client_drift", ()),
                local=content.get("local", ()),
                visits=content.get("visits", ()),
                personal=content.get("personal"),
                sharing=content.get("sharing", {}),
                stopped=tuple(content.get("stopped", ())),
                sources=tuple(content["sources"]),
                labels=tuple((space, name) for space, name in content.get("labels", ())),
                sizes=tuple((train, test) for train, test in content.get("sizes", ())),
                confusion=None if confusion is None else np.array(confusion, dtype=np.int64),
                stages=tuple(content["stages"]),
                learned_at=tuple(content["learned_at"]),
                foreseen=tuple(content.get("foreseen", ())),
                matrices=np.array(content["matrices"], dtype=float),
                mapper=None if mapper is None else np.array(mapper, dtype=float),
                metrics={name: np.array(found["matrices"], dtype=float) for name, found in further.items()},
                higher={content["metric"]: content.get("higher", True), **higher},
                measured_by=tuple(content.get("measured_by", ())),
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
