"""What agents that share cost: work, bytes, and how much faster many are than one, as the paper counts it and by the slowest agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from consilience.core.errors import ConsilienceError, unknown
from consilience.loop.result import Result

ALPHA = 1000.0
"""MACs in which a byte is sent, by the paper's assumption."""


@dataclass(frozen=True)
class Speedup:
    """Work and bytes of each of N agents, and what they say of N against one. All is in MACs, alpha of them a byte.

    One agent alone learns everything: T_1 = sum_i teachers_i. A student receives serially, through one interface.
    """

    teachers: tuple[float, ...]
    """MACs of each agent to learn its tasks and make what it tells."""
    received: tuple[float, ...]
    """Bytes that each hears."""
    students: tuple[float, ...]
    """MACs of each to take in what it hears."""
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        n = len(self.teachers)
        values = [*self.teachers, *self.received, *self.students, self.alpha]
        if (
            not n
            or len(self.received) != n
            or len(self.students) != n
            or any(not 0 <= v < float("inf") for v in values)
        ):
            raise ConsilienceError(
                "costs should be finite numbers >= 0, one a part and an agent. "
                f"Found {n} teachers, {len(self.received)} received, {len(self.students)} students, alpha {self.alpha}."
            )
        if not sum(self.teachers):
            raise ConsilienceError(
                "a speed-up needs learning that costs. Found teachers without MACs (or a ledger that counted none)."
            )

    @property
    def agents(self) -> int:
        """N."""
        return len(self.teachers)

    @property
    def alone(self) -> float:
        """T_1, MACs of one agent that learns all by itself."""
        return sum(self.teachers)

    @property
    def teacher(self) -> float:
        """T_1 / N, the paper's teacher MACs."""
        return self.alone / self.agents

    @property
    def communication(self) -> float:
        """Bytes received by a student, in the mean."""
        return sum(self.received) / self.agents

    @property
    def student(self) -> float:
        """MACs of a student, in the mean."""
        return sum(self.students) / self.agents

    @property
    def total(self) -> float:
        """T_1 / N + alpha x communication + student."""
        return self.teacher + self.alpha * self.communication + self.student

    def efficiency(self, students: bool = False) -> float:
        """(T_1 / N) / (T_1 / N + alpha x communication): the paper's definition, as if all agents had the same to do.

        `students=True` adds the students' work to the denominator, which is then `total`. The paper's figures do not tell which it
        took: its students have next to nothing to do.

        >>> s = Speedup((3e9, 1e9), (1e6, 1e6), (1e9, 1e9))
        >>> round(s.efficiency(), 3), s.efficiency(students=True)
        (0.667, 0.5)
        """
        return self.teacher / (self.teacher + self.alpha * self.communication + students * self.student)

    @property
    def makespan(self) -> float:
        """MACs until the slowest agent is done: max_i (teachers_i + alpha received_i + students_i)."""
        return max(
            t + self.alpha * b + s
            for t, b, s in zip(self.teachers, self.received, self.students, strict=True)
        )

    @property
    def speedup(self) -> float:
        """T_1 / makespan, at most N: how much sooner N agents are done than one."""
        return self.alone / self.makespan

    @property
    def makespan_efficiency(self) -> float:
        """The speed-up / N."""
        return self.speedup / self.agents


def speedup(
    costs: Result | Mapping[str, Any],
    alpha: float = ALPHA,
    student: float = 0.0,
    teacher: float | Mapping[str, float] = 0.0,
) -> Speedup:
    """What a run's ledger says: work, bytes and speed-up of its agents.

    The ledger's bytes are those serialised, receipts too. What was computed in absorbing is the students' work, all other
    work the teachers'. What the ledger does not have is given: what a mapper computes once it is asked (Mahalanobis, the covariance
    of images that it heard; `covariance_macs` says how much), and, where agents learned from kept features (`data.embed`), the
    passes of their images through the backbone, `models.macs(backbone, image)` each.

    Args:
        costs: a result, its `costs`, or pages by agent: {agent: {"macs", "received", "receiving"}}.
        alpha: MACs a byte.
        student: MACs more of each student.
        teacher: MACs more of each teacher; or by agent, others none.

    Raises ConsilienceError for costs without pages, and for a teacher who has none.

    Paper: Ge et al. 2023, figures 9 and 10.

    >>> pages = {"a": {"macs": 3e9, "received": 1e6}, "b": {"macs": 1e9, "received": 3e6}}
    >>> s = speedup(pages)
    >>> s.efficiency(), s.speedup, s.makespan_efficiency
    (0.5, 1.0, 0.5)
    >>> speedup(pages, teacher={"b": 2e9}).teachers
    (3000000000.0, 3000000000.0)
    """
    pages = costs.costs if isinstance(costs, Result) else costs
    pages = pages.get("by_agent", pages)
    if not pages or any(
        not isinstance(p, Mapping) or not {"macs", "received"} <= p.keys() for p in pages.values()
    ):
        raise ConsilienceError(
            "costs should be a run's, with a page of macs and bytes for each agent. Found none."
        )
    strange = sorted(teacher.keys() - pages.keys()) if isinstance(teacher, Mapping) else []
    if strange:
        raise unknown("teacher", str(strange[0]), pages, "the agents with a page")
    ordered = [pages[a] for a in sorted(pages)]
    more = [float(teacher.get(a, 0.0) if isinstance(teacher, Mapping) else teacher) for a in sorted(pages)]
    heard = [float(p.get("receiving", 0)) for p in ordered]
    return Speedup(
        tuple(float(p["macs"]) - h + m for p, h, m in zip(ordered, heard, more, strict=True)),
        tuple(float(p["received"]) for p in ordered),
        tuple(h + student for h in heard),
        alpha,
    )


def deal(work: Sequence[float], agents: int, order: Literal["given", "longest"] = "given") -> list[list[int]]:
    """Which of T tasks each of N agents learns: in the given order, one after another as cards are dealt; or the longest first,
    each to the agent that has the least to do.

    Longest first is done at most 4/3 - 1/(3N) times as late as the best way there is (Graham 1969).

    >>> deal([1, 5, 2, 2], 2), deal([1, 5, 2, 2], 2, "longest")
    ([[0, 2], [1, 3]], [[1], [2, 3, 0]])
    """
    if isinstance(agents, bool) or not isinstance(agents, int) or not 1 <= agents <= len(work):
        raise ConsilienceError(
            f"`agents` should be from 1 to the {len(work)} tasks. Found `agents = {agents!r}`."
        )
    if order not in ("given", "longest"):
        raise ConsilienceError(f"`order` should be given or longest. Found `order = {order!r}`.")
    if order == "given":
        return [list(range(i, len(work), agents)) for i in range(agents)]
    own: list[list[int]] = [[] for _ in range(agents)]
    load = [0.0] * agents
    for t in sorted(range(len(work)), key=lambda t: (-work[t], t)):
        i = load.index(min(load))
        own[i].append(t)
        load[i] += work[t]
    return own


def speedups(
    work: Sequence[float],
    told: Sequence[float],
    agents: Sequence[int] | None = None,
    alpha: float = ALPHA,
    taken: Sequence[float] | float = 0.0,
    order: Literal["given", "longest", "balanced"] = "given",
) -> list[Speedup]:
    """The speed-up against the number of agents, T tasks dealt over N of them; each hears what all others learned.

    Args:
        work: MACs to learn each task.
        told: bytes of what is told of each task.
        agents: the N; None takes 1 to T.
        alpha: MACs a byte.
        taken: MACs of a student to take in each task (or the same for every one).
        order: how tasks are dealt (see `deal`); "balanced" deals equal parts of all work, which no real tasks are, as the paper counts.

    Returns:
        A `Speedup` for each N.

    >>> [round(s.speedup, 2) for s in speedups([1e9, 9e9], [1e5, 1e5])], [round(s.speedup, 2) for s in speedups([5e9, 5e9], [1e5, 1e5])]
    ([1.0, 1.1], [1.0, 1.96])
    """
    took = [float(taken)] * len(work) if isinstance(taken, int | float) else list(taken)
    if not len(work) == len(told) == len(took):
        raise ConsilienceError(
            f"costs should be one a task. Found {len(work)} of work, {len(told)} told, {len(took)} taken."
        )
    found = []
    for n in range(1, len(work) + 1) if agents is None else agents:
        shares = deal(work, n, "given" if order == "balanced" else order)
        if order == "balanced":
            rest = (n - 1) / n
            found.append(
                Speedup((sum(work) / n,) * n, (sum(told) * rest,) * n, (sum(took) * rest,) * n, alpha)
            )
            continue
        sums = [[sum(c[t] for t in own) for own in shares] for c in (work, told, took)]
        teachers, sent, kept = sums
        found.append(
            Speedup(
                tuple(teachers), tuple(sum(told) - b for b in sent), tuple(sum(took) - k for k in kept), alpha
            )
        )
    return found


def covariance_macs(width: int, images: float = 0, macs: float = 0, factors: bool = True) -> float:
    """MACs of a student that makes the Mahalanobis mapper's covariance [d, d] of images that it heard: n (m + d^2) + d^3 / 3.

    Args:
        width: of the features, d.
        images: heard in all, n (5 a class in the paper); 0 for sums that add.
        macs: of the backbone for an image, m.
        factors: whether the Cholesky factor is counted.

    >>> covariance_macs(2, images=3, macs=10, factors=False)
    42.0
    """
    return float(images * (macs + width**2) + (width**3 / 3 if factors else 0))


def task_bytes(
    classes: float,
    width: int,
    components: int = 0,
    images: float = 0,
    image: float = 0,
    biases: int = 0,
    size: int = 4,
) -> float:
    """Bytes that the paper counts for a task: size (c d + 2 k d + biases) + c x images x image.

    A head without its bias [c, d], k diagonal Gaussians (means and variances), beneficial biases, and images a class of so many bytes.
    What agents send here is counted as it is serialised, in the ledger.

    Args:
        classes, width: c and d.
        components: k.
        images, image: images a class, and the bytes of one.
        biases: floats.
        size: bytes of a float.

    >>> task_bytes(49.34, 2048, components=25)
    813793.28
    """
    return size * (classes * width + 2 * components * width + biases) + classes * images * image


def table(
    rows: Mapping[str, Speedup], scores: Mapping[str, float] | None = None, reference: str | None = None
) -> str:
    """The paper's figures 9 (one agent) and 10 (many), as a table in Markdown, with the makespan beside the paper's efficiency.

    Args:
        rows: by name.
        scores: a fraction by name, for a last column.
        reference: the row whose total the others are divided by; None takes the first.

    Raises ConsilienceError for a reference that is no row.

    >>> print(table({"heads": Speedup((2e9, 2e9), (1e3, 1e3), (0, 0))}, {"heads": 0.9}))
    | | agents | teacher (MACs) | communication (bytes) | student (MACs) | total (MACs) | efficiency | by makespan | against heads | score |
    |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|
    | heads | 2 | 2.00e+09 | 1.00e+03 | 0 | 2.00e+09 | 0.9995 | 0.9995 | 1.00x | 90.0 % |
    """
    first = reference if reference is not None else next(iter(rows), None)
    if first is None or first not in rows:
        raise ConsilienceError(f"`reference` should be one of the rows. Found {first!r} in {list(rows)}.")
    heads = [
        "agents",
        "teacher (MACs)",
        "communication (bytes)",
        "student (MACs)",
        "total (MACs)",
        "efficiency",
        "by makespan",
        f"against {first}",
    ]
    heads += ["score"] if scores is not None else []
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for name, s in rows.items():
        amounts = [f"{v:.2e}" if v else "0" for v in (s.teacher, s.communication, s.student, s.total)]
        cells = [
            str(s.agents),
            *amounts,
            f"{s.efficiency():.4f}",
            f"{s.makespan_efficiency:.4f}",
            f"{s.total / rows[first].total:.2f}x",
        ]
        cells += ([f"{100 * scores[name]:.1f} %" if name in scores else "-"]) if scores is not None else []
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
