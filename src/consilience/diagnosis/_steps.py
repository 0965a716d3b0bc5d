"""The seven steps of debugging negative transfer: what the numbers say, and what to do, in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from consilience.core.metrics import mean
from consilience.core.names import clean
from consilience.diagnosis._groups import Groups
from consilience.report._significance import Difference, holm
from consilience.report._text import Column, in_percent, number

if TYPE_CHECKING:
    from consilience.diagnosis._found import Diagnosis, Outcome

ALERT = -0.1
"""The cosine of two tasks' gradients below which sharing is questioned, where it stays there."""
MORE_SEEDS = "use more seeds (`repeats`), since what an interval with 0 in it shows may be chance"


@dataclass(frozen=True)
class Step:
    """One step of the seven: what was found, and what to do. `done` is False where it was not measured."""

    number: int
    title: str
    found: tuple[str, ...]
    do: str
    done: bool = True


def steps(diagnosis: Diagnosis) -> tuple[Step, ...]:
    """Return the seven steps for what was found."""
    makers: tuple[Callable[[Diagnosis], Step], ...] = (
        baselines,
        incremental,
        conflicts,
        depth,
        capacity,
        soft,
        balance,
    )
    return tuple(maker(diagnosis) for maker in makers)


# Words for numbers.


def listed(names: Sequence[str]) -> str:
    """Write names as a list.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    shown = [clean(name) for name in names]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def signed(value: float, percent: bool) -> str:
    """Write a change with its sign.

    >>> signed(0.021, True), signed(-0.5, False), signed(float("nan"), True)
    ('+2.1', '-0.500', '-')
    """
    if not math.isfinite(value):
        return "-"
    return f"{'+' if value >= 0 else ''}{number(value, percent)}"


def spread(difference: Difference, percent: bool) -> str:
    """Write a mean change with its 95 % interval."""
    half = f" ± {number(difference.half, percent)}" if math.isfinite(difference.half) else ""
    return f"{signed(difference.behind, percent)}{half}"


def relative(difference: Difference) -> str:
    """Write a relative change in percent, with its 95 % interval."""
    return f"{spread(difference, True)} %"


def shown_groups(groups: Groups) -> str:
    """Write groups of tasks.

    >>> shown_groups((("a", "b"), ("c",)))
    'a + b | c'
    """
    return " | ".join(" + ".join(map(clean, group)) for group in groups)


def transfer_columns(diagnosis: Diagnosis) -> list[Column]:
    """Make the columns of the table of transfer."""
    rows = diagnosis.transfer
    percent = [in_percent(row.metric) for row in rows]
    corrected = holm({i: row.gain for i, row in enumerate(rows)})
    p_values = [corrected[i].p for i in range(len(rows))]
    pairs = list(zip(rows, percent, strict=True))
    return [
        Column("task", [clean(row.task) for row in rows], False),
        Column("metric", [f"{row.metric}{' (%)' if share else ''}" for row, share in pairs], False),
        Column("alone", [number(row.alone, share) for row, share in pairs]),
        Column("together", [number(row.together, share) for row, share in pairs]),
        Column("better by, 95 %", [spread(row.gain, share) for row, share in pairs]),
        Column("p by Holm", ["-" if math.isnan(p) else f"{p:.3f}" for p in p_values]),
        Column("transfer", [row.kind for row in rows], False),
    ]


def outcome_columns(outcomes: Sequence[Outcome], diagnosis: Diagnosis, first: str) -> list[Column]:
    """Make the columns of a table of runs on all tasks."""
    columns = [
        Column(first, [clean(outcome.name) for outcome in outcomes], False),
        Column("against together", [relative(outcome.together) for outcome in outcomes]),
        Column("against alone", [relative(outcome.alone) for outcome in outcomes]),
    ]
    for j, (task, metric) in enumerate(zip(diagnosis.tasks, diagnosis.metrics, strict=True)):
        cells = [number(outcome.scores[j], in_percent(metric)) for outcome in outcomes]
        columns.append(Column(clean(task), cells))
    return columns


def best_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome with the best mean over tasks, relative to training together."""
    # A score may be 0, and then nothing is relative to it.
    able = [outcome for outcome in outcomes if math.isfinite(outcome.together.behind)]
    return max(able or outcomes, key=lambda outcome: outcome.together.behind)


def tried(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Say what runs gained against plain training together, the best first."""
    ranked = sorted(outcomes, key=lambda outcome: -np.nan_to_num(outcome.together.behind, nan=-math.inf))
    return tuple(f"{clean(each.name)}: {relative(each.together)} against plain training" for each in ranked)


def skipped(diagnosis: Diagnosis, part: str, number_of: int, title: str, do: str) -> Step:
    """Return a step that was not measured, with why."""
    why = diagnosis.skipped.get(part, "it was not asked for")
    return Step(number_of, title, (f"Not measured: {why}.",), do, False)


# The steps.


def baselines(diagnosis: Diagnosis) -> Step:
    """1: each task alone, and what it gains together."""
    title = "Establish baselines"
    if not diagnosis.transfer:
        return skipped(diagnosis, "transfer", 1, title, "Train each task alone first: parts=('transfer',).")
    by_kind: dict[str, list[str]] = {}
    for row in diagnosis.transfer:
        by_kind.setdefault(row.kind, []).append(row.task)
    # Only intervals decide: a mean says nothing about chance.
    losers, winners = by_kind.get("negative", []), by_kind.get("positive", [])

    # Every task is named once, under what was shown of it.
    found = []
    for kind, words in (
        ("positive", "better together than alone"),
        ("negative", "worse together than alone"),
        ("not shown", "no difference that seeds do not explain"),
        ("one seed", "one seed, so nothing says whether a difference is chance"),
    ):
        rows = [row for row in diagnosis.transfer if row.kind == kind]
        if rows:
            each = [f"{clean(row.task)} {spread(row.gain, in_percent(row.metric))}" for row in rows]
            found.append(f"{words[0].upper()}{words[1:]}: {', '.join(each)}.")

    if len(losers) == len(diagnosis.transfer):
        do = (
            f"All tasks lose. Together each has 1/{len(losers)} of a step's loss, so train longer, or with a "
            "higher `lr`, before you look for conflicts in the next steps."
        )
    elif losers:
        verb = "loses" if len(losers) == 1 else "lose"
        do = f"{listed(losers)} {verb} by sharing: go through the next steps."
    elif winners:
        rest = "" if len(winners) == len(diagnosis.transfer) else f" For the other tasks, {MORE_SEEDS}."
        verb = "gains" if len(winners) == 1 else "gain"
        do = f"Train the tasks together: {listed(winners)} {verb}, and none is shown to lose.{rest}"
    elif diagnosis.repeats < 2:
        do = "Use three seeds or more (`repeats`), so that chance shows."
    else:
        do = f"Nothing is shown either way: {MORE_SEEDS}."
    return Step(1, title, tuple(found), do)


def incremental(diagnosis: Diagnosis) -> Step:
    """2: tasks added one by one, and the groups that the numbers suggest."""
    title, found = "Add tasks incrementally", []
    harmful = []
    for added in diagnosis.incremental:
        if added.gain is None:
            continue
        low, high = added.gain.behind - added.gain.half, added.gain.behind + added.gain.half
        words = "helps" if low > 0 else "harms" if high < 0 else "is not shown to help or harm"
        change = relative(added.gain)
        found.append(f"Adding {clean(added.task)} {words} the tasks before it: {change} of their scores.")
        if high < 0:
            harmful.append(added.task)

    # Groups by affinity are the ones that were trained; the others are shown next to them.
    suggested = None
    for grouping in diagnosis.groupings:
        text = f"Groups by {grouping.by}: {shown_groups(grouping.groups)}"
        if grouping.outcome is not None:
            text += f"; trained so, {relative(grouping.outcome.together)} against all together"
        if grouping.by == "affinity":
            suggested = grouping
        found.append(f"{text}.")
    if not found:
        return skipped(
            diagnosis,
            "incremental",
            2,
            title,
            "Start with two tasks and add one at a time: parts=('incremental',).",
        )

    if harmful:
        do = f"Train {listed(harmful)} apart from the tasks before, or in a group of its own."
    elif suggested is not None and suggested.outcome is not None and suggested.outcome.better:
        do = f"Train in the groups {shown_groups(suggested.groups)}: they are better than all together."
    elif suggested is not None and len(suggested.groups) == 1:
        do = "Keep all tasks together: steps of each lower the losses of the others."
    elif suggested is not None and suggested.outcome is None and len(suggested.groups) > 1:
        do = f"Try the groups {shown_groups(suggested.groups)}; they were not trained here."
    else:
        do = "No task stands out as harmful: keep them together, and look at the next steps."
    return Step(2, title, tuple(found), do)


def conflicts(diagnosis: Diagnosis) -> Step:
    """3: how gradients agree."""
    title, own = "Check gradient conflicts", diagnosis.conflicts
    if own is None:
        return skipped(diagnosis, "conflicts", 3, title, "Measure them: parts=('conflicts',).")
    # Over all layers; the page has each.
    ratio, cosine = float(mean(own.ratio()[:, -1])), float(mean(own.cosine()[:, -1]))
    if not math.isfinite(cosine):
        return Step(3, title, ("The tasks share no parameters.",), "Share some, or train the tasks apart.")
    found = [f"{number(ratio, True)} % of the pairs conflict over training; the mean cosine is {cosine:.2f}."]

    alerts = own.alerts()
    for alert in alerts[:6]:
        found.append(
            f"Alert: {listed(alert.tasks)} oppose each other in {clean(alert.layer)}, median cosine "
            f"{alert.cosine:.2f}, below {ALERT}."
        )
    if len(alerts) > 6:
        found.append(f"{len(alerts) - 6} further pairs and layers are below {ALERT}.")

    # The pair as a whole says more than one of its layers.
    loses = any(row.kind == "negative" for row in diagnosis.transfer)
    if alerts:
        worst = next((alert for alert in alerts if alert.layer == "all"), alerts[0])
        do = (
            f"Separate {listed(worst.tasks)}, or share fewer of the layers where they conflict (step 4), or "
            "reconcile their gradients (pcgrad, cagrad; step 7)."
        )
    elif loses:
        do = "Gradients do not oppose each other: look at capacity (step 5) and balance (step 7)."
    else:
        do = f"Nothing: no pair of tasks stays below {ALERT}."
    return Step(3, title, tuple(found), do)


def depth(diagnosis: Diagnosis) -> Step:
    """4: how many layers to share."""
    title = "Vary sharing depth"
    if not diagnosis.depth:
        return skipped(diagnosis, "depth", 4, title, "Share the early layers, and separate the later ones.")
    best = best_of(diagnosis.depth)
    if best.better:
        do = f"Use {clean(best.name)}: it is better than the model as it is."
    else:
        do = "Keep the sharing as it is: no other depth is better by more than seeds explain."
    return Step(4, title, tried(diagnosis.depth), do)


def capacity(diagnosis: Diagnosis) -> Step:
    """5: whether a wider model loses less by sharing."""
    title, own = "Scale up capacity", diagnosis.capacity
    if own is None:
        return skipped(diagnosis, "capacity", 5, title, "Try wider layers before giving up sharing.")
    found = [
        f"{clean(own.model)}, trained together: {relative(own.outcome.together)} against the model as it is."
    ]
    if math.isfinite(own.closed):
        found.append(f"It makes good {number(own.closed, True)} % of what tasks lost by sharing, on average.")

    if own.outcome.better and math.isfinite(own.closed) and own.closed > 0.5:
        do = "Use the wider model: the loss by sharing is for the most part a lack of capacity."
    elif own.outcome.better:
        do = "Use the wider model; it does not explain all that tasks lose, so go on."
    else:
        do = "Keep the width: wider layers help by no more than seeds explain, so capacity is not the cause."
    return Step(5, title, tuple(found), do)


def soft(diagnosis: Diagnosis) -> Step:
    """6: soft instead of hard sharing."""
    title, opposed = "Use soft sharing", []
    if diagnosis.conflicts is not None:
        opposed = [alert.tasks for alert in diagnosis.conflicts.alerts() if alert.layer == "all"]
    if not diagnosis.soft:
        do = "Consider it for pairs whose gradients conflict; step 3 found none."
        if opposed:
            do = f"Try it for {'; '.join(map(listed, opposed[:3]))}, whose gradients conflict."
        return skipped(diagnosis, "soft", 6, title, do)
    best = best_of(diagnosis.soft)
    do = "Keep hard sharing: soft sharing is not better by more than seeds explain."
    if best.better:
        do = f"Use {clean(best.name)} in place of hard sharing."
    return Step(6, title, tried(diagnosis.soft), do)


def balance(diagnosis: Diagnosis) -> Step:
    """7: balanced losses, and the front of mixtures."""
    title, found = "Apply loss balancing", list(tried(diagnosis.balance))
    front = diagnosis.front
    if front is not None:
        names = [clean(each.name) for each, free in zip(front.mixtures, front.free, strict=True) if free]
        found.append(
            f"{len(names)} of {len(front.mixtures)} mixtures are on the Pareto front: "
            f"{', '.join(names)}; they dominate {number(front.hypervolume, True)} % of the box of all."
        )
    if not found:
        return skipped(
            diagnosis, "balance", 7, title, "Try uncertainty weighting or GradNorm before giving up."
        )

    # Weights are choices too, so that the best of all is named.
    choices = [*diagnosis.balance, *(front.mixtures if front is not None else ())]
    best = best_of(choices)
    if best.better:
        do = f"Use {clean(best.name)}: {relative(best.together)} on average."
    elif front is not None and sum(front.free) > 1:
        do = "No weights are better for all tasks: choose a mixture of the front by which task matters most."
    else:
        do = "Keep equal weights: none is better by more than seeds explain."
    return Step(7, title, tuple(found), do)


def brief(diagnosis: Diagnosis) -> str:
    """Write a diagnosis in a few lines."""
    seeds = f"{diagnosis.repeats} seed{'s' * (diagnosis.repeats != 1)}"
    lines = [
        f"Diagnosis of {len(diagnosis.tasks)} tasks ({', '.join(map(clean, diagnosis.tasks[:6]))}"
        f"{', ...' * (len(diagnosis.tasks) > 6)}), model {clean(diagnosis.model)}, {seeds}, "
        f"{diagnosis.on} data, {len(diagnosis.runs)} runs"
    ]
    if diagnosis.transfer:
        each = [
            f"{clean(row.task)} {spread(row.gain, in_percent(row.metric))} ({row.kind})"
            for row in diagnosis.transfer[:6]
        ]
        lines.append(f"  transfer: {', '.join(each)}{', ...' * (len(diagnosis.transfer) > 6)}")
    if diagnosis.conflicts is not None:
        ratio = float(mean(diagnosis.conflicts.ratio()[:, -1]))
        cosine = float(mean(diagnosis.conflicts.cosine()[:, -1]))
        count = len(diagnosis.conflicts.alerts())
        lines.append(
            f"  conflicts: {number(ratio, True)} % of pairs, mean cosine {cosine:.2f}, "
            f"{count} alert{'s' * (count != 1)}"
        )
    for grouping in diagnosis.groupings[:1]:
        lines.append(f"  groups by {grouping.by}: {shown_groups(grouping.groups)}")
    # A step that was not measured has general advice only.
    lines += [f"  {step.number}. {step.title}: {step.do}" for step in steps(diagnosis) if step.done]
    if diagnosis.skipped:
        lines.append(f"  skipped: {', '.join(diagnosis.skipped)} (`skipped` says why)")
    return "\n".join(lines)
