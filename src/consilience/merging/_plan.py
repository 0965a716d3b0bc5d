"""What is merged, from what, into what: checked as a whole before anything is computed."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from consilience.core.errors import ConsilienceError
from consilience.core.params import matches
from consilience.merging._allowed import ALLOWED
from consilience.merging._files import Adapter, Array, Entries, Files, inside, read_json

# Fields that have to agree, or the same parameters mean something else.
CONFIGURATION_FIELDS = {
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
"""Fields of configuration files that must be the same in all models, by file."""
FAR = 0.9
"""An expert is of another base if its distance exceeds this share of that of unrelated models."""
PROBE = 256
"""How many numbers are compared at each of four places of a large entry."""


@dataclass(frozen=True)
class MergeSettings:
    """Options of a merge; `merging.merge` says what each means."""

    weights: Sequence[float] | None = None
    per: str = "model"
    scales: Mapping[str, float] | None = None
    keep: Sequence[str] = ()
    allow: Sequence[str] = ()
    importances: Sequence[Any] | None = None
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    shard: int | None = None
    memory: int = 512 << 20
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """Which entries are merged, in which order, and where the others are taken from."""

    base: Entries | None
    experts: tuple[Entries, ...]
    names: tuple[str, ...]
    """Merged entries, sorted: laid end to end they are the vector that aggregators see."""
    spans: Mapping[str, int]
    """Number of leading elements of each entry that are merged."""
    taken: Mapping[str, str]
    """Entries that are taken from the base as they are, and why."""
    kept: Mapping[str, tuple[str, ...]]
    """By expert: its own entries, kept next to the merged ones."""
    wide: torch.dtype
    """The dtype of the arithmetic."""
    notes: tuple[str, ...] = ()

    @property
    def like(self) -> Entries:
        """The model whose names, shapes and dtypes the result has."""
        return self.base if self.base is not None else self.experts[0]

    @property
    def size(self) -> int:
        """The number of merged elements."""
        return sum(self.spans.values())

    def table(self) -> str:
        """Describe the plan in lines of text."""
        by_reason: dict[str, list[str]] = {}
        for n, reason in self.taken.items():
            by_reason.setdefault(reason, []).append(n)
        base = self.base.name if self.base is not None else "none: parameters are combined as they are"
        owner = "base" if self.base is not None else "first"
        arithmetic = str(self.wide).removeprefix("torch.")

        lines = [f"base     {base}"]
        lines += [f"expert   {model.name}" for model in self.experts]
        lines += [f"merged   {len(self.names)} entries, {self.size:,} numbers, arithmetic in {arithmetic}"]
        lines += [f"{owner}'s   {len(ns)} entries ({why}): {few(ns)}" for why, ns in by_reason.items()]
        lines += [
            f"kept     {len(ns)} entries of {expert}: {few(ns)}" for expert, ns in self.kept.items() if ns
        ]
        lines += [f"note     {note}" for note in self.notes]
        return "\n".join(lines)


def plan(
    base: Entries | None,
    experts: Sequence[Entries],
    allow: Sequence[str] = (),
    keep: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Plan:
    """Compare all models, and decide what is merged; one error lists all problems."""
    for word in allow:
        if word not in ALLOWED:
            raise ConsilienceError(f"`allow` must be some of {', '.join(ALLOWED)}, got {word!r}.")
    if not experts:
        raise ConsilienceError("a merge needs experts, got none.")
    if dtype not in (None, torch.float32, torch.float64):
        raise ConsilienceError(f"`dtype` of the arithmetic must be float32 or float64, got {dtype}.")

    like = base if base is not None else experts[0]
    found = _Comparison(like, tuple(experts), frozenset(allow), tuple(keep))
    for n in sorted(like.shapes):
        found.compare(n)
    found.compare_names()
    if "configuration" not in allow:
        found.problems += _configurations(base, experts)
    if found.problems:
        options = " ".join(f"--allow-{word}" for word in ALLOWED)
        raise ConsilienceError(f"the models do not fit together ({options}): {'; '.join(found.problems)}.")
    if not found.spans:
        raise ConsilienceError("a merge needs floating-point entries, got none.")

    # Models in float64 keep their digits; narrower ones lose none in float32.
    wide = dtype
    if wide is None:
        has_double = any(like.dtypes[n] == torch.float64 for n in found.spans)
        wide = torch.float64 if has_double else torch.float32
    kept = (
        {model.name: tuple(n for n in sorted(model.shapes) if matches(n, keep)) for model in experts}
        if keep
        else {}
    )
    names = tuple(found.spans)
    made = Plan(base, tuple(experts), names, found.spans, found.taken, kept, wide, tuple(found.notes))

    # The values are looked at last: with entries that do not fit, a distance would mean nothing.
    if isinstance(base, Files) and "other_base" not in allow and (far := _strangers(made)):
        raise ConsilienceError(
            f"experts must come from the base {base.name} (--allow-other_base): {'; '.join(far)}."
        )
    return made


@dataclass
class _Comparison:
    """What a comparison of all models finds: entries to merge and to take, problems, and notes."""

    like: Entries
    experts: tuple[Entries, ...]
    allow: frozenset[str]
    keep: tuple[str, ...]
    spans: dict[str, int] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def others(self) -> list[Entries]:
        """All models but `like`, which is an expert if there is no base."""
        return [model for model in self.experts if model is not self.like]

    def compare(self, name: str) -> None:
        """Compare one entry of `like` with those of all experts."""
        # Ties come first: a kept or integer entry may be tied too, and is then written with its first name.
        if name in self.like.aliases:
            self.taken[name] = "tied to another"
            self.problems += _untied(self.like, self.experts, name, self.keep)
        elif matches(name, self.keep):
            self.taken[name] = "kept by every expert"
        elif not self.like.dtypes[name].is_floating_point:
            self.taken[name] = "not floating-point"
            self._compare_integers(name)
        else:
            self._compare_floats(name)

    def _compare_integers(self, name: str) -> None:
        """Note experts that hold floats, and adapters that change the entry: their changes would be lost."""
        like, dtype = self.like, self.like.dtypes[name]
        for model in self.experts:
            if name in model.shapes and model.dtypes[name].is_floating_point:
                self.problems.append(
                    f"{model.name}: {name!r} is {model.dtypes[name]}, in {like.name} {dtype}"
                )
        for model in self.experts:
            if isinstance(model, Adapter) and name in model.changed:
                self.problems.append(f"{model.name} changes {name!r}, which is {dtype}")
        if dtype.is_complex:
            self.problems.append(f"{like.name}: {name!r} is complex, and complex entries are not merged")

    def _compare_floats(self, name: str) -> None:
        """Find how many leading elements of an entry can be merged."""
        like, shape = self.like, self.like.shapes[name]
        shapes = [shape]
        # Problems are collected, so that one run shows all that has to be mended.
        for model in self.others:
            if name not in model.shapes:
                if "missing" not in self.allow:
                    self.problems.append(f"{model.name}: {name!r} is missing")
            elif not model.dtypes[name].is_floating_point:
                self.problems.append(
                    f"{model.name}: {name!r} is {model.dtypes[name]}, in {like.name} {like.dtypes[name]}"
                )
            elif model.shapes[name] != shape:
                its = model.shapes[name]
                if "vocabulary" in self.allow and len(its) == len(shape) and its[1:] == shape[1:]:
                    shapes.append(its)
                else:
                    self.problems.append(
                        f"{model.name}: {name!r} has shape {list(its)}, in {like.name} {list(shape)}"
                    )

        self.spans[name] = torch.Size(shape).numel()
        # Rows of an embedding or a head are words of the vocabulary; new words are appended.
        if len(shapes) > 1:
            rows = min(its[0] for its in shapes)
            self.spans[name] = rows * torch.Size(shape[1:]).numel()
            self.notes.append(
                f"the first {rows} rows of {name!r} are merged, {shape[0] - rows} are {like.name}'s own"
            )

    def compare_names(self) -> None:
        """Find entries that `like` lacks, and patterns of `keep` without any entry."""
        for model in self.others:
            extra = [
                n for n in sorted(model.shapes) if n not in self.like.shapes and not matches(n, self.keep)
            ]
            # Entries that only experts have could not be written: the result has the entries of `like`.
            if extra and "extra" in self.allow:
                self.notes.append(f"left out of {model.name}: {few(extra)}")
            elif extra:
                self.problems += [f"{model.name}: {n!r} is not in {self.like.name}" for n in extra]
        for pattern in self.keep:
            if not any(matches(n, [pattern]) for model in (self.like, *self.others) for n in model.shapes):
                self.problems.append(f"`keep` has {pattern!r}, which fits no entry")


def _untied(like: Entries, experts: Sequence[Entries], name: str, keep: Sequence[str]) -> list[str]:
    """List experts in which a tensor is not one that `like` has under two names."""
    first = like.aliases[name]
    found = []
    # Merged once and written under both names: if the experts had two tensors, one change would be lost.
    if matches(name, keep) != matches(first, keep):
        found.append(f"`keep` has one of {first!r} and {name!r}, which are tied in {like.name}")
    for model in experts:
        if model.aliases.get(name) == first and not (
            isinstance(model, Adapter) and model.changed & {name, first}
        ):
            continue
        equal = model.shapes.get(name) == model.shapes.get(first) and model.dtypes.get(
            name
        ) == model.dtypes.get(first)
        if equal and first in model.shapes:
            pairs = zip(model.pieces(name), model.pieces(first), strict=True)
            equal = all(torch.equal(piece, other) for (_, piece), (_, other) in pairs)
        if not equal and name in model.shapes:
            found.append(f"{model.name}: {name!r} is not {first!r}, to which {like.name} ties it")
    return found


def _configurations(base: Entries | None, experts: Sequence[Entries]) -> list[str]:
    """List fields in which the configurations next to the files disagree."""
    folders = {
        model.name: model.path if model.path.is_dir() else model.path.parent
        for model in ([base] if base else []) + list(experts)
        if isinstance(model, Files)
    }
    found: list[str] = []
    for file, fields in CONFIGURATION_FIELDS.items():
        facts: dict[str, Any] = {}
        for name, folder in folders.items():
            if inside(folder / file):
                try:
                    facts[name] = read_json(folder / file)
                except ConsilienceError as error:
                    found.append(str(error).rstrip("."))

        # All are compared with the first, which is the base's if it has the file.
        for name in list(facts)[1:]:
            first = next(iter(facts))
            for key in fields:
                mine, its = facts[name].get(key), facts[first].get(key)
                if mine != its and key in facts[name] and key in facts[first]:
                    hint = "; merging.fold_normalisation makes them agree" if key.startswith("image_") else ""
                    found.append(
                        f"{name}: {key} = {json.dumps(mine)} in {file}, {json.dumps(its)} in {first}{hint}"
                    )
    return found


def _strangers(plan: Plan) -> list[str]:
    """List experts that are as far from the base as unrelated models are, by some numbers of some entries.

    Unrelated vectors are |a|^2 + |b|^2 apart. An expert that moved far from a small start is so too, but is
    much longer than the start.
    """
    assert plan.base is not None
    base, found = plan.base, []
    # Matrices only: biases and norms start at equal values in unrelated models too.
    large = sorted((n for n in plan.names if len(base.shapes[n]) > 1), key=lambda n: -plan.spans[n])[:8]

    def probe(model: Entries, names: Sequence[str]) -> Array:
        pieces = []
        for n in names:
            width = min(PROBE, plan.spans[n])
            starts = sorted({i * (plan.spans[n] - width) // 3 for i in range(4)})
            pieces += [model.read(n, at, at + width).double().numpy() for at in starts]
        return np.concatenate(pieces)

    for model in plan.experts:
        shared = [n for n in large if n in model.shapes]
        # An adapter is built on this base, whatever it adds.
        if isinstance(model, Adapter) or not shared:
            continue

        origin, tuned = probe(base, shared), probe(model, shared)
        # Zeros are pruned or padded numbers, which unrelated models may share.
        valid = np.isfinite(origin) & np.isfinite(tuned) & (origin != 0)
        apart, before, after = (
            float(np.square(values[valid]).sum()) for values in (origin - tuned, origin, tuned)
        )
        similar_length = min(before, after) > max(before, after) / 4
        if similar_length and apart > FAR * FAR * (before + after):
            share = (apart / (before + after)) ** 0.5
            found.append(f"{model.name}, whose distance is {share:.2f} of that of unrelated models")
    return found


def few(names: Sequence[str]) -> str:
    """Join names, at most four of them."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclass(frozen=True)
class Span:
    """A piece of one entry within a block: elements start:stop of `name`, from column `at` on."""

    name: str
    start: int
    stop: int
    at: int

    @property
    def columns(self) -> slice:
        """The columns of the block that the piece fills."""
        return slice(self.at, self.at + self.stop - self.start)


@dataclass
class Reader:
    """Blocks of the vector that the merged entries form, laid end to end."""

    plan: Plan
    names: Sequence[str]
    block: int
    size: int = field(init=False)
    _starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._starts, self.size = [], 0
        for n in self.names:
            self._starts.append(self.size)
            self.size += self.plan.spans[n]

    def offsets(self) -> range:
        """Return the first column of every block."""
        return range(0, self.size, self.block)

    def spans(self, offset: int, columns: int | None = None) -> Iterator[Span]:
        """Yield the pieces of a block, or of its first columns."""
        end = min(self.size, offset + min(self.block, columns or self.block))
        # The last entry that starts at or before the block.
        i = bisect_right(self._starts, offset) - 1
        at = offset
        while at < end:
            name, start = self.names[i], self._starts[i]
            stop = min(end, start + self.plan.spans[name])
            # Entries without elements have no piece.
            if stop > at:
                yield Span(name, at - start, stop - start, at - offset)
            at, i = max(at, stop), i + 1

    def fill(self, entries: Entries, spans: Sequence[Span], out: Array) -> None:
        """Read a row of a block [b] from one model; entries that it lacks are the base's."""
        for span in spans:
            source = entries if span.name in entries.shapes else self.plan.like
            source.into(span.name, span.start, out[span.columns])
