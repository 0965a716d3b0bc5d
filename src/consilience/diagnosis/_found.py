"""What a diagnosis found, part by part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from consilience.core.errors import ConsilienceError
from consilience.core.metrics import mean
from consilience.diagnosis._bench import plain
from consilience.diagnosis._groups import Groups
from consilience.diagnosis._steps import ALERT, Step, brief, steps, transfer_columns
from consilience.report._significance import Difference


@dataclass(frozen=True)
class Transfer:
    """A task alone and together with all others; `gain` is how much better it is together, by seed."""

    task: str
    metric: str
    alone: float
    together: float
    gain: Difference

    @property
    def kind(self) -> str:
        """ "positive" or "negative" where the 95 % interval leaves out 0; "not shown"; or "one seed"."""
        # Without a spread over seeds, any difference may be chance.
        if self.gain.seeds < 2:
            return "one seed"
        low, high = self.gain.behind - self.gain.half, self.gain.behind + self.gain.half
        return "positive" if low > 0 else "negative" if high < 0 else "not shown"


@dataclass(frozen=True)
class Outcome:
    """A run on all tasks: its mean scores [tasks], and how much better they are, relative to others.

    delta = mean_t s_t (M_t - B_t) / |B_t| (Maninis et al. 2019), with s_t = -1 where less is better: `alone`
    is against each task alone, `together` against plain training together.
    """

    name: str
    scores: tuple[float, ...]
    alone: Difference
    together: Difference

    @property
    def better(self) -> bool:
        """Whether it is better than plain training together: its interval lies above 0."""
        return self.together.behind - self.together.half > 0


class Alert(NamedTuple):
    """Two tasks whose gradients oppose each other in a layer, and the median of their cosine."""

    tasks: tuple[str, str]
    layer: str
    cosine: float


@dataclass(frozen=True, eq=False)
class Conflicts:
    """Cosines [seeds, places, layers, m, m] of tasks' gradients, after `steps`; the last layer is "all"."""

    tasks: tuple[str, ...]
    steps: tuple[int, ...]
    layers: tuple[str, ...]
    cosines: np.ndarray

    @property
    def pairs(self) -> np.ndarray:
        """The cosines of all pairs [seeds, places, layers, pairs]."""
        return self.cosines[..., *np.triu_indices(len(self.tasks), 1)]

    def ratio(self) -> np.ndarray:
        """Return the fraction of pairs with a negative cosine [places, layers], as a mean over seeds."""
        pairs = self.pairs
        return mean(np.where(np.isfinite(pairs), pairs < 0, np.nan), (0, 3))

    def cosine(self) -> np.ndarray:
        """Return the mean cosine of pairs [places, layers], over seeds."""
        return mean(self.pairs, (0, 3))

    def matrix(self) -> np.ndarray:
        """Return the mean over seeds and places of the cosines over all layers [m, m]."""
        return mean(self.cosines[:, :, -1], (0, 1))

    def alerts(self) -> list[Alert]:
        """Return pairs whose cosine is below -.1 in more than half of the measurements, the worst first."""
        # The median, so that a few places cannot raise an alert.
        found = []
        for i, one in enumerate(self.tasks):
            for j in range(i + 1, len(self.tasks)):
                for number, layer in enumerate(self.layers):
                    own = self.cosines[:, :, number, i, j]
                    middle = float(np.nanmedian(own)) if np.isfinite(own).any() else math.nan
                    if middle < ALERT:
                        found.append(Alert((one, self.tasks[j]), layer, middle))
        return sorted(found, key=lambda alert: alert.cosine)


@dataclass(frozen=True, eq=False)
class Affinities:
    """Affinities [seeds, places, m, m] of task i to task j: 1 - L_j(after a step for i) / L_j(before)."""

    tasks: tuple[str, ...]
    values: np.ndarray

    def matrix(self) -> np.ndarray:
        """Return the mean over seeds and places [m, m]."""
        return mean(self.values, (0, 1))


@dataclass(frozen=True)
class Grouping:
    """Groups of tasks that go together, by one criterion; and what they came to where they were trained."""

    by: str
    groups: Groups
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Added:
    """A task that was added to those before it: scores [tasks so far], and what the earlier tasks gained.

    `gains` are by task, `gain` is their mean relative to the score alone.
    """

    task: str
    scores: tuple[float, ...]
    gains: Mapping[str, Difference]
    gain: Difference | None


@dataclass(frozen=True)
class Capacity:
    """A wider model, trained together: how much each task gains, and how much of what it had lost."""

    model: str
    gains: Mapping[str, Difference]
    closed: float
    """The part of what tasks lost by sharing that it makes good: a mean over these tasks; NaN: none lost."""
    outcome: Outcome


@dataclass(frozen=True)
class Front:
    """Training mixtures, which of them no other beats in every task, and the share that they dominate."""

    mixtures: tuple[Outcome, ...]
    free: tuple[bool, ...]
    hypervolume: float


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What `diagnose` found. Parts that were skipped are None or empty, and `skipped` says why by name.

    `steps` are the seven steps of debugging negative transfer, each with what was found and what to do.
    `report(path)` writes them as one HTML file.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    """The metric of each task."""
    higher: tuple[bool, ...]
    """Whether more of it is better."""
    on: str
    scenario: str
    model: str
    repeats: int
    seed: int
    runs: Mapping[str, float]
    """The seconds of each run that was trained, all seeds together, by its name."""
    skipped: Mapping[str, str]
    transfer: tuple[Transfer, ...] = ()
    conflicts: Conflicts | None = None
    affinities: Affinities | None = None
    groupings: tuple[Grouping, ...] = ()
    incremental: tuple[Added, ...] = ()
    depth: tuple[Outcome, ...] = ()
    capacity: Capacity | None = None
    soft: tuple[Outcome, ...] = ()
    balance: tuple[Outcome, ...] = ()
    front: Front | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The seven steps, with what was found and what to do."""
        return steps(self)

    def table(self) -> str:
        """Write the seven steps as text, with the table of transfer above them."""
        from consilience.report._text import grid

        lines = [grid(transfer_columns(self)), ""] if self.transfer else []
        for step in self.steps:
            lines += [
                f"{step.number}. {step.title}",
                *(f"   {text}" for text in (*step.found, f"-> {step.do}")),
            ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Write what was found in a few lines."""
        return brief(self)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(self.table())}</pre>"

    def report(self, path: str | Path, title: str | None = None) -> Path:
        """Write one HTML file that opens offline: seven steps, with their tables and charts."""
        from consilience.core.params import write_bytes
        from consilience.diagnosis._page import page

        path = Path(path)
        write_bytes(path, page(self, title).encode("utf-8", "replace"))
        return path

    def to_pandas(self) -> Any:
        """Return transfer as a DataFrame with one row per task.

        Columns: task, metric, alone, together, gain, half (of the interval), p, transfer. Needs pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConsilienceError("`to_pandas` needs pandas: pip install pandas.") from error
        rows = [
            (each.task, each.metric, each.alone, each.together, *each.gain[:3], each.kind)
            for each in self.transfer
        ]
        columns = ["task", "metric", "alone", "together", "gain", "half", "p", "transfer"]
        return pandas.DataFrame(rows, columns=columns)

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain values, with the seven steps; what is not finite is None."""
        # All cosines would be a large file; their means say what the page shows.
        own = {name: value for name, value in vars(self).items() if name not in ("conflicts", "affinities")}
        found = {name: _plain(value) for name, value in own.items()}
        if self.conflicts is not None:
            found["conflicts"] = {
                "steps": list(self.conflicts.steps),
                "layers": list(self.conflicts.layers),
                "ratio": self.conflicts.ratio().tolist(),
                "cosine": self.conflicts.cosine().tolist(),
                "matrix": self.conflicts.matrix().tolist(),
                "alerts": [alert._asdict() for alert in self.conflicts.alerts()],
            }
        if self.affinities is not None:
            found["affinities"] = self.affinities.matrix().tolist()
        found["steps"] = [asdict(step) for step in self.steps]
        result: dict[str, Any] = plain(found)
        return result


def _plain(value: Any) -> Any:
    """Return dataclasses and named tuples as mappings, and all else as it is."""
    # Before sequences, since a named tuple is one.
    if isinstance(value, Difference):
        return {"mean": value.behind, "half": value.half, "p": value.p, "seeds": value.seeds}
    if hasattr(value, "__dataclass_fields__"):
        more = {"kind": value.kind} if isinstance(value, Transfer) else {}
        return {**{name: _plain(own) for name, own in vars(value).items()}, **more}
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(own) for own in value]
    return value
