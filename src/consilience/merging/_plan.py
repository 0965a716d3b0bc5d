"""What is merged, from what, into what: checked as a whole before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from consilience.core.errors import ConsilienceError
from consilience.core.params import matches
from consilience.merging._files import Adapter, Array, Entries, Files, _json

ALLOWED = {
    "missing": "an entry that an expert lacks counts as unchanged from the base",
    "extra": "entries that the base lacks are left out",
    "vocabulary": "of entries whose first sizes differ, the rows that all have are merged; the base's further rows stay, others' are left out",
    "non_finite": "entries with NaN or infinity in any model are taken from the base",
    "other_base": "experts may be far from the base, as if trained from another one",
    "configuration": "configurations of the experts may differ from the base's in what changes their meaning",
}
TELLING = {
    "config.json": (
        "model_type",
        "architectures",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "rope_theta",
    ),
    "preprocessor_config.json": ("do_normalize", "image_mean", "image_std", "do_rescale", "rescale_factor"),
}
"""Facts of configurations that have to agree, or the same parameters mean something else."""
FAR = 0.9
"""Experts whose distance from the base is more than this share of both norms are taken for strangers (unrelated models: about 1)."""
PROBE = 256
"""How many numbers are looked at, at four places of each of some large entries."""


@dataclass(frozen=True)
class Plan:
    """Which entries are merged, in which order, and what becomes of the others."""

    base: Entries | None
    experts: tuple[Entries, ...]
    names: tuple[str, ...]
    """Entries that are merged, sorted: laid one after another they are the vector that aggregators see."""
    spans: Mapping[str, int]
    """How many leading elements of each are merged."""
    taken: Mapping[str, str]
    """Entries that are not merged, taken from the base as they are, and why."""
    kept: Mapping[str, tuple[str, ...]]
    """By expert: its own entries, kept beside the merged ones."""
    wide: torch.dtype
    """The dtype of the arithmetic."""
    notes: tuple[str, ...] = ()

    @property
    def like(self) -> Entries:
        """Whose names, shapes and dtypes the result has."""
        return self.base if self.base is not None else self.experts[0]

    @property
    def size(self) -> int:
        """How many numbers are merged."""
        return sum(self.spans.values())

    def table(self) -> str:
        """The plan, in words."""
        by_kind: dict[str, list[str]] = {}
        for n, why in self.taken.items():
            by_kind.setdefault(why, []).append(n)
        lines = [
            f"base     {self.base.name if self.base is not None else 'none: parameters are combined as they are'}",
            *(f"expert   {e.name}" for e in self.experts),
            f"merged   {len(self.names)} entries, {self.size:,} numbers, arithmetic in {str(self.wide).removeprefix('torch.')}",
            *(
                f"{'base' if self.base is not None else 'first'}'s   {len(ns)} entries ({why}): {_few(ns)}"
                for why, ns in by_kind.items()
            ),
            *(f"kept     {len(ns)} entries of {e}: {_few(ns)}" for e, ns in self.kept.items() if ns),
            *(f"note     {n}" for n in self.notes),
        ]
        return "\n".join(lines)


def plan(
    base: Entries | None,
    experts: Sequence[Entries],
    allow: Sequence[str] = (),
    keep: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Plan:
    """Compare all models; every problem is told at once."""
    for a in allow:
        if a not in ALLOWED:
            raise ConsilienceError(f"`allow` should have some of {', '.join(ALLOWED)}. Found {a!r}.")
    if not experts:
        raise ConsilienceError("there should be experts to merge. Found none.")
    if dtype not in (None, torch.float32, torch.float64):
        raise ConsilienceError(f"`dtype` of the arithmetic should be float32 or float64. Found {dtype}.")
    like = base if base is not None else experts[0]
    models = [like, *(e for e in experts if e is not like)]
    problems, notes = [], []
    spans: dict[str, int] = {}
    taken: dict[str, str] = {}
    for n in sorted(like.shapes):
        if n in like.aliases:
            taken[n] = "tied to another"
            problems += _untied(like, experts, n, keep)
            continue
        if matches(n, keep):
            taken[n] = "kept by every expert"
            continue
        if not like.dtypes[n].is_floating_point:
            others = [e for e in experts if n in e.shapes and e.dtypes[n].is_floating_point]
            problems += [f"{e.name}: {n!r} is {e.dtypes[n]}, in {like.name} {like.dtypes[n]}" for e in others]
            problems += [
                f"{e.name} changes {n!r}, which is {like.dtypes[n]}"
                for e in experts
                if isinstance(e, Adapter) and n in e.changed
            ]
            if like.dtypes[n].is_complex:
                problems.append(f"{like.name}: {n!r} is complex, which is not merged")
            taken[n] = "not floating-point"
            continue
        shapes = [like.shapes[n]]
        for e in models[1:]:
            if n not in e.shapes:
                if "missing" not in allow:
                    problems.append(f"{e.name}: {n!r} is missing")
            elif not e.dtypes[n].is_floating_point:
                problems.append(f"{e.name}: {n!r} is {e.dtypes[n]}, in {like.name} {like.dtypes[n]}")
            elif e.shapes[n] != like.shapes[n]:
                shape = e.shapes[n]
                if (
                    "vocabulary" in allow
                    and len(shape) == len(like.shapes[n])
                    and shape[1:] == like.shapes[n][1:]
                ):
                    shapes.append(shape)
                else:
                    problems.append(
                        f"{e.name}: {n!r} has shape {list(shape)}, in {like.name} {list(like.shapes[n])}"
                    )
        spans[n] = torch.Size(like.shapes[n]).numel()
        if len(shapes) > 1:
            rows = min(s[0] for s in shapes)
            spans[n] = rows * torch.Size(like.shapes[n][1:]).numel()
            notes.append(
                f"the first {rows} rows of {n!r} are merged, {like.shapes[n][0] - rows} are {like.name}'s own"
            )
    for e in models[1:]:
        extra = [n for n in sorted(e.shapes) if n not in like.shapes and not matches(n, keep)]
        if extra and "extra" in allow:
            notes.append(f"left out of {e.name}: {_few(extra)}")
        elif extra:
            problems += [f"{e.name}: {n!r} is not in {like.name}" for n in extra]
    for pattern in keep:
        if not any(matches(n, [pattern]) for e in models for n in e.shapes):
            problems.append(f"`keep` has {pattern!r}, which fits no entry")
    if "configuration" not in allow:
        problems += _configurations(base, experts)
    if problems:
        raise ConsilienceError(
            f"models should fit together ({' '.join(f'--allow-{a}' for a in ALLOWED)}). Found "
            + "; ".join(problems)
            + "."
        )
    if not spans:
        raise ConsilienceError("there should be floating-point entries to merge. Found none.")
    wide = dtype or (torch.float64 if any(like.dtypes[n] == torch.float64 for n in spans) else torch.float32)
    kept = {e.name: tuple(n for n in sorted(e.shapes) if matches(n, keep)) for e in experts} if keep else {}
    made = Plan(base, tuple(experts), tuple(spans), spans, taken, kept, wide, tuple(notes))
    if isinstance(base, Files) and "other_base" not in allow and (far := _strangers(made)):
        raise ConsilienceError(
            f"experts should come from the base ({base.name}; --allow-other_base). Found "
            + "; ".join(far)
            + "."
        )
    return made


def _untied(like: Entries, experts: Sequence[Entries], name: str, keep: Sequence[str]) -> list[str]:
    """Where a tensor that the base has under two names is not one in an expert."""
    first = like.aliases[name]
    found = []
    if matches(name, keep) != matches(first, keep):
        found.append(f"`keep` has one of {first!r} and {name!r}, which are tied in {like.name}")
    for e in experts:
        if e.aliases.get(name) == first and not (isinstance(e, Adapter) and e.changed & {name, first}):
            continue
        alike = e.shapes.get(name) == e.shapes.get(first) and e.dtypes.get(name) == e.dtypes.get(first)
        if alike and first in e.shapes:
            alike = all(
                torch.equal(a, b) for (_, a), (_, b) in zip(e.pieces(name), e.pieces(first), strict=True)
            )
        if not alike and name in e.shapes:
            found.append(f"{e.name}: {name!r} is not {first!r}, to which {like.name} ties it")
    return found


def _configurations(base: Entries | None, experts: Sequence[Entries]) -> list[str]:
    """Where configurations that lie beside the files disagree."""
    folders = {
        e.name: e.path if e.path.is_dir() else e.path.parent
        for e in ([base] if base else []) + list(experts)
        if isinstance(e, Files)
    }
    found: list[str] = []
    for file, keys in TELLING.items():
        facts: dict[str, Any] = {}
        for name, folder in folders.items():
            if (folder / file).is_file():
                try:
                    facts[name] = _json(folder / file)
                except ConsilienceError as e:
                    found.append(str(e).rstrip("."))
        for name in list(facts)[1:]:
            first = next(iter(facts))
            for k in keys:
                mine, its = facts[name].get(k), facts[first].get(k)
                if mine != its and k in facts[name] and k in facts[first]:
                    hint = "; merging.fold_normalisation makes them agree" if k.startswith("image_") else ""
                    found.append(
                        f"{name}: {k} = {json.dumps(mine)} in {file}, {json.dumps(its)} in {first}{hint}"
                    )
    return found


def _strangers(plan: Plan) -> list[str]:
    """Experts that are as far from the base as models that have nothing to do with it, by some numbers of some entries.

    Unrelated vectors are |a|^2 + |b|^2 apart; an expert that went far from a small beginning is so too, but then it is much longer.
    """
    assert plan.base is not None
    base, found = plan.base, []
    large = sorted((n for n in plan.names if len(base.shapes[n]) > 1), key=lambda n: -plan.spans[n])[:8]

    def numbers(e: Entries, names: Sequence[str]) -> Array:
        pieces = []
        for n in names:
            width = min(PROBE, plan.spans[n])
            starts = sorted({i * (plan.spans[n] - width) // 3 for i in range(4)})
            pieces += [e.read(n, at, at + width).double().numpy() for at in starts]
        return np.concatenate(pieces)

    for e in plan.experts:
        mine = [n for n in large if n in e.shapes]
        if isinstance(e, Adapter) or not mine:
            continue
        a, b = numbers(base, mine), numbers(e, mine)
        ok = np.isfinite(a) & np.isfinite(b) & (a != 0)
        apart, own, its = (float(np.square(x[ok]).sum()) for x in (a - b, a, b))
        alike = min(own, its) > max(own, its) / 4
        if alike and apart > FAR * FAR * (own + its):
            found.append(
                f"{e.name}, whose distance is {(apart / (own + its)) ** 0.5:.2f} of what strangers' would be"
            )
    return found


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclass(frozen=True)
class Span:
    """A piece of one entry within a block: elements start:stop of `name`, at `at` of the block."""

    name: str
    start: int
    stop: int
    at: int


@dataclass
class Reader:
    """Blocks of the vector that the merged entries make, laid one after another."""

    plan: Plan
    names: Sequence[str]
    block: int
    size: int = field(init=False)
    _begins: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._begins, self.size = [], 0
        for n in self.names:
            self._begins.append(self.size)
            self.size += self.plan.spans[n]

    def offsets(self) -> range:
        """Where blocks begin."""
        return range(0, self.size, self.block)

    def spans(self, offset: int, columns: int | None = None) -> Iterator[Span]:
        """The pieces of a block, or of its first columns."""
        from bisect import bisect_right

        end = min(self.size, offset + min(self.block, columns or self.block))
        i = bisect_right(self._begins, offset) - 1
        at = offset
        while at < end:
            n, begin = self.names[i], self._begins[i]
            stop = min(end, begin + self.plan.spans[n])
            if stop > at:
                yield Span(n, at - begin, stop - begin, at - offset)
            at, i = max(at, stop), i + 1

    def fill(self, entries: Entries, spans: Sequence[Span], out: Array) -> None:
        """A row of a block [b] from one model; what it lacks is the base's."""
        for s in spans:
            source = entries if s.name in entries.shapes else self.plan.like
            source.into(s.name, s.start, out[s.at : s.at + s.stop - s.start])
