"""What agents that share modules cost: work, bytes, and how much faster N agents are than one.

The speed-up is counted as in the paper, which takes the mean over agents, and by the slowest agent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from consilience.core.errors import ConsilienceError, kind_of, unknown
from consilience.loop.result import Result

ALPHA = 1000.0
"""MACs in which one byte is sent, by the paper's assumption."""


@dataclass(frozen=True)
class Speedup:
    """Work and bytes of each of N agents, and what they mean for N agents against one.

    All times are in MACs; one byte takes alpha of them. One agent alone trains on all tasks:
    T_1 = sum_i teachers_i. An agent receives serially, through one interface.
    """

    teachers: tuple[float, ...]
    """MACs of each agent to train on its tasks and make its messages."""
    received: tuple[float, ...]
    """Bytes that each agent receives."""
    students: tuple[float, ...]
    """MACs of each agent to process what it receives."""
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        # The fields may come from a user's own measurements.
        count = len(self.teachers)
        values = [*self.teachers, *self.received, *self.students, self.alpha]
        if (
            not count
            or len(self.received) != count
            or len(self.students) != count
            or any(not 0 <= value < float("inf") for value in values)
        ):
            raise ConsilienceError(
                f"costs must be finite numbers >= 0, one of each kind per agent, got {count} teachers, "
                f"{len(self.received)} received, {len(self.students)} students, alpha {self.alpha}."
            )
        # All ratios divide by T_1.
        if not sum(self.teachers):
            raise ConsilienceError(
                "a speed-up needs teachers with MACs, got none (or a ledger that counted none)."
            )

    @property
    def agents(self) -> int:
        """The number of agents, N."""
        return len(self.teachers)

    @property
    def alone(self) -> float:
        """T_1, MACs of one agent that trains on all tasks."""
        return sum(self.teachers)

    @property
    def teacher(self) -> float:
        """T_1 / N, the paper's teacher MACs."""
        return self.alone / self.agents

    @property
    def communication(self) -> float:
        """Bytes that an agent receives, averaged over agents."""
        return sum(self.received) / self.agents

    @property
    def student(self) -> float:
        """MACs of a student, averaged over agents."""
        return sum(self.students) / self.agents

    @property
    def total(self) -> float:
        """T_1 / N + alpha x communication + student."""
        return self.teacher + self.alpha * self.communication + self.student

    def efficiency(self, students: bool = False) -> float:
        """Return (T_1 / N) / (T_1 / N + alpha x communication), the paper's definition.

        It counts as if all agents had the same work. `students=True` adds the students' work to the
        denominator, which is then `total`. The paper does not say which of the two its figures show; its
        students have almost no work.

        >>> s = Speedup((3e9, 1e9), (1e6, 1e6), (1e9, 1e9))
        >>> round(s.efficiency(), 3), s.efficiency(students=True)
        (0.667, 0.5)
        """
        return self.teacher / (self.teacher + self.alpha * self.communication + students * self.student)

    @property
    def makespan(self) -> float:
        """MACs until the slowest agent is done: max_i (teachers_i + alpha received_i + students_i)."""
        return max(
            teacher + self.alpha * size + student
            for teacher, size, student in zip(self.teachers, self.received, self.students, strict=True)
        )

    @property
    def speedup(self) -> float:
        """T_1 / makespan, at most N: how many times faster N agents are than one."""
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
    """Compute work, bytes and speed-up of a run's agents from its ledger.

    The ledger's bytes are the serialised ones, with receipts. Work in receiving is the students', all other
    work the teachers'. Work that the ledger does not count is given as `student` and `teacher`: what a mapper
    computes at its first prediction (Mahalanobis: the covariance of the images that it received,
    `covariance_macs`), and, if agents trained on stored features (`data.embed`), the passes of their images
    through the backbone, `models.macs(backbone, image)` each.

    Args:
        costs: a result, its `costs`, or pages by agent: {agent: {"macs", "received", "receiving"}}.
        alpha: MACs per byte.
        student: further MACs of each student.
        teacher: further MACs of each teacher; or by agent, none for others.

    Raises ConsilienceError for costs without pages, and for a teacher without a page.

    Paper: Ge et al. 2023, figures 9 and 10.

    >>> pages = {"a": {"macs": 3e9, "received": 1e6}, "b": {"macs": 1e9, "received": 3e6}}
    >>> s = speedup(pages)
    >>> s.efficiency(), s.speedup, s.makespan_efficiency
    (0.5, 1.0, 0.5)
    >>> speedup(pages, teacher={"b": 2e9}).teachers
    (3000000000.0, 3000000000.0)
    """
    # A result's costs hold the pages under one key; pages by themselves are taken, too.
    pages = costs.costs if isinstance(costs, Result) else costs
    pages = pages.get("by_agent", pages)
    if not pages or any(
        not isinstance(page, Mapping) or not {"macs", "received"} <= page.keys() for page in pages.values()
    ):
        raise ConsilienceError(
            "`costs` must be those of a run, with a page of macs and bytes for each agent, "
            f"got {kind_of(costs)}."
        )
    strange = sorted(teacher.keys() - pages.keys()) if isinstance(teacher, Mapping) else []
    if strange:
        raise unknown("teacher", str(strange[0]), pages, "the agents with a page")

    names = sorted(pages)
    ordered = [pages[name] for name in names]
    more = [float(teacher.get(name, 0.0) if isinstance(teacher, Mapping) else teacher) for name in names]
    # The ledger's MACs are of all work, so those of receiving are taken out again.
    receiving = [float(page.get("receiving", 0)) for page in ordered]
    return Speedup(
        tuple(
            float(page["macs"]) - student_macs + extra
            for page, student_macs, extra in zip(ordered, receiving, more, strict=True)
        ),
        tuple(float(page["received"]) for page in ordered),
        tuple(student_macs + student for student_macs in receiving),
        alpha,
    )


def deal(work: Sequence[float], agents: int, order: Literal["given", "longest"] = "given") -> list[list[int]]:
    """Deal T tasks to N agents: one after another as they are given, or the longest first.

    "longest" gives each task to the agent with the least work so far. It ends at most 4/3 - 1/(3N) times as
    late as the best assignment (Graham 1969).

    >>> deal([1, 5, 2, 2], 2), deal([1, 5, 2, 2], 2, "longest")
    ([[0, 2], [1, 3]], [[1], [2, 3, 0]])
    """
    if isinstance(agents, bool) or not isinstance(agents, int) or not 1 <= agents <= len(work):
        raise ConsilienceError(
            f"`agents` must be a whole number from 1 to the {len(work)} tasks, got {agents!r}."
        )
    if order not in ("given", "longest"):
        raise ConsilienceError(f"`order` must be 'given' or 'longest', got {order!r}.")
    # "given" does not look at the work, as agents that do not know each other's tasks.
    if order == "given":
        return [list(range(i, len(work), agents)) for i in range(agents)]

    tasks: list[list[int]] = [[] for _ in range(agents)]
    load = [0.0] * agents
    # Ties go to the earlier task and the earlier agent, so that the assignment is fixed.
    for task in sorted(range(len(work)), key=lambda task: (-work[task], task)):
        agent = load.index(min(load))
        tasks[agent].append(task)
        load[agent] += work[task]
    return tasks


def speedups(
    work: Sequence[float],
    sent: Sequence[float],
    agents: Sequence[int] | None = None,
    alpha: float = ALPHA,
    receiving: Sequence[float] | float = 0.0,
    order: Literal["given", "longest", "balanced"] = "given",
) -> list[Speedup]:
    """Compute the speed-up by the number of agents, with T tasks dealt to N agents.

    Each agent receives the modules of all tasks that others trained on.

    Args:
        work: MACs to train on each task.
        sent: bytes that are sent for each task.
        agents: the values of N; None takes 1 to T.
        alpha: MACs per byte.
        receiving: MACs of a student to process each task that it receives (or the same for every task).
        order: how tasks are dealt (see `deal`). "balanced" deals equal parts of the sum of all work, which
            real tasks do not have, as the paper counts.

    Returns:
        A `Speedup` for each N.

    >>> [round(s.speedup, 2) for s in speedups([1e9, 9e9], [1e5, 1e5])]
    [1.0, 1.1]
    >>> [round(s.speedup, 2) for s in speedups([5e9, 5e9], [1e5, 1e5])]
    [1.0, 1.96]
    """
    per_task = [float(receiving)] * len(work) if isinstance(receiving, int | float) else list(receiving)
    if not len(work) == len(sent) == len(per_task):
        raise ConsilienceError(
            f"costs must be one of each kind per task, got {len(work)} of work, {len(sent)} sent, "
            f"{len(per_task)} of receiving."
        )

    found = []
    for count in range(1, len(work) + 1) if agents is None else agents:
        shares = deal(work, count, "given" if order == "balanced" else order)
        # `balanced` is the ideal that the paper counts; tasks cannot be divided like that.
        if order == "balanced":
            others = (count - 1) / count
            equal = (sum(work) / count, sum(sent) * others, sum(per_task) * others)
            teachers, received, students = ((cost,) * count for cost in equal)
        else:
            # An agent receives all but its own tasks.
            teachers = tuple(sum(work[task] for task in tasks) for tasks in shares)
            received = tuple(sum(sent) - sum(sent[task] for task in tasks) for tasks in shares)
            students = tuple(sum(per_task) - sum(per_task[task] for task in tasks) for tasks in shares)
        found.append(Speedup(teachers, received, students, alpha))
    return found


def covariance_macs(width: int, images: float = 0, macs: float = 0, factors: bool = True) -> float:
    """Compute the MACs of a student for the Mahalanobis mapper's covariance [d, d]: n (m + d^2) + d^3 / 3.

    Args:
        width: of the features, d.
        images: number of images received, n (5 per class in the paper); 0 where sums are received, which add.
        macs: of the backbone per image, m.
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
    """Compute the bytes that the paper counts per task: size (c d + 2 k d + biases) + c x images x image.

    These are a head without its bias [c, d], k diagonal Gaussians (means and variances), beneficial biases,
    and images of each class. What agents send here is counted as it is serialised, in the ledger.

    Args:
        classes, width: c and d.
        components: k.
        images, image: number of images per class, and bytes of one image.
        biases: number of floats.
        size: bytes of a float.

    >>> task_bytes(49.34, 2048, components=25)
    813793.28
    """
    return size * (classes * width + 2 * components * width + biases) + classes * images * image


COLUMNS = (
    "agents",
    "teacher (MACs)",
    "communication (bytes)",
    "student (MACs)",
    "total (MACs)",
    "efficiency",
    "by makespan",
)


def table(
    rows: Mapping[str, Speedup], scores: Mapping[str, float] | None = None, reference: str | None = None
) -> str:
    """Write the paper's figures 9 (one agent) and 10 (many) as a table in Markdown.

    It also has the efficiency by the slowest agent, next to the paper's.

    Args:
        rows: by name.
        scores: a fraction by name, for a last column.
        reference: the row whose total the others are divided by; None takes the first.

    Raises ConsilienceError for a reference without a row.

    >>> print(table({"heads": Speedup((2e9, 2e9), (1e3, 1e3), (0, 0))}, {"heads": 0.9}).splitlines()[-1])
    | heads | 2 | 2.00e+09 | 1.00e+03 | 0 | 2.00e+09 | 0.9995 | 0.9995 | 1.00x | 90.0 % |
    """
    first = reference if reference is not None else next(iter(rows), None)
    if first is None or first not in rows:
        raise ConsilienceError(f"`reference` must be one of the rows, {list(rows)}, got {first!r}.")

    # The name of the reference is in the head, so that the table can be read alone.
    heads = [*COLUMNS, f"against {first}", *(["score"] if scores is not None else [])]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for name, row in rows.items():
        amounts = (row.teacher, row.communication, row.student, row.total)
        cells = [
            str(row.agents),
            *(f"{amount:.2e}" if amount else "0" for amount in amounts),
            f"{row.efficiency():.4f}",
            f"{row.makespan_efficiency:.4f}",
            f"{row.total / rows[first].total:.2f}x",
        ]
        # A row without a score keeps its place in the column.
        if scores is not None:
            cells.append(f"{100 * scores[name]:.1f} %" if name in scores else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
