"""Merging: blocks of all models through an aggregator, never a whole model at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator, Blockwise, Linear
from consilience.core.errors import ConsilienceError, kind_of, unknown
from consilience.core.params import key, matches
from consilience.merging._files import Array, Entries, finite, opened
from consilience.merging._out import Shards, Tensors
from consilience.merging._plan import Plan, Reader, Span, plan

Progress = Callable[[int, int], None]
"""Told bytes that were read, and of how many."""


Write = Callable[[str, int, Tensor], None]
Slot = tuple[Tensor, Tensor]
LINEAR = 1 << 17
"""Numbers of a block where rows are added one after another."""


CANCELS = 4.0
"""Where coefficients of parameters, the base's among them, have absolute values of a larger sum, changes are added instead: fewer digits are lost."""


class Merge:
    """One aggregator over one group of entries: `order` the rows, go through them in `blocks` as often as it wants, then make `every` block."""

    def __init__(
        self,
        plan: Plan,
        names: Sequence[str],
        aggregator: Aggregator,
        weights: Tensor,
        scales: Mapping[str, float],
        importances: Sequence[Entries],
        generator: torch.Generator,
        send: Callable[[int], None],
        threads: int,
    ) -> None:
        block = aggregator.block if isinstance(aggregator, Blockwise) else Blockwise.block
        self.plan, self.aggregator, self.scales, self.send = plan, aggregator, scales, send
        block = (
            block << 2 if threads > 1 else block
        )  # threads wait less for each other; results do not depend on it
        self.reader = Reader(plan, names, block)
        self.n, self.m = self.reader.size, len(plan.experts)
        self.experts, self.weights, self.importances = (
            list(plan.experts),
            weights.to(plan.wide),
            list(importances),
        )
        self.generator, self.threads = generator, threads
        self.checked = False  # whether all numbers were found finite

    # ------------------------------------------------------------------------------------------------------------ reading

    def slot(self) -> Slot:
        """Room for one block of the base [b] and of the changes [m, b]."""
        width = min(self.reader.block, self.n)
        return torch.zeros(width, dtype=self.plan.wide), torch.empty(self.m, width, dtype=self.plan.wide)

    def load(self, offset: int, slot: Slot, columns: int | None = None) -> tuple[list[Span], Tensor, Tensor]:
        """The pieces of a block, or of its first columns, its base [b] and its changes [m, b]; all finite."""
        spans = list(self.reader.spans(offset, columns))
        width = spans[-1].at + spans[-1].stop - spans[-1].start
        base, rows = slot[0].numpy()[:width], slot[1].numpy()[:, :width]
        if self.plan.base is not None:
            self.reader.fill(self.plan.base, spans, base)
        for i in range(self.m):
            self.reader.fill(self.experts[i], spans, rows[i])
            if self.plan.base is not None:
                np.subtract(rows[i], base, out=rows[i])
        made = torch.from_numpy(rows)
        if not self.checked and not np.isfinite(float(made.sum())):
            self._blame(made)
        return spans, torch.from_numpy(base), made

    def blocks(self, columns: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(offset, changes [m, b]) of every block in order, or of their first columns; with more threads, one is read ahead."""
        offsets = self.reader.offsets()
        slots = [self.slot() for _ in range(min(2, self.threads))]
        if len(slots) == 1:
            for o in offsets:
                yield o, self.load(o, slots[0], columns)[2]
                self.send(self.reader.block)
            return
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.load, offsets[0], slots[0], columns)
            for i, o in enumerate(offsets):
                now = coming.result()[2]
                if i + 1 < len(offsets):
                    coming = pool.submit(self.load, offsets[i + 1], slots[(i + 1) % 2], columns)
                yield o, now
                self.send(self.reader.block)

    def every(self, reader: Reader, room: Callable[[], Any], work: Callable[[int, Any], None]) -> None:
        """Work on every block, each in some thread, with room that no other uses at the time."""
        if self.threads == 1:
            own = room()
            for o in reader.offsets():
                work(o, own)
                self.send(reader.block)
            return
        rooms = [room() for _ in range(self.threads)]

        def one(offset: int) -> None:
            own = rooms.pop()
            try:
                work(offset, own)
            finally:
                rooms.append(own)

        left, going = iter(reader.offsets()), deque[Future[None]]()
        with ThreadPoolExecutor(self.threads) as pool:
            for o in islice(left, 2 * self.threads):
                going.append(pool.submit(one, o))
            while going:
                going.popleft().result()
                for o in islice(left, 1):
                    going.append(pool.submit(one, o))
                self.send(reader.block)

    def _blame(self, *computed: Tensor) -> None:
        """A sum was not finite: tell all numbers that are not, in any model; or that what was computed is too large."""
        if bad := not_finite(self.plan):
            raise NotFinite(bad)
        if not all(torch.isfinite(t).all() for t in computed):
            raise ConsilienceError(
                f"numbers should fit in the arithmetic's {self.plan.wide} (--dtype float64). Found larger ones."
            )

    # ---------------------------------------------------------------------------------------------------------- the rows

    def order(self) -> None:
        """Put the experts in the order of their content, as an `Aggregator` does with rows in memory."""
        if self.m < 2:
            return
        heads: list[list[float]] = [[] for _ in range(self.m)]
        spans = list(self.reader.spans(0, 4))
        base, row = (torch.zeros(min(4, self.n), dtype=self.plan.wide).numpy() for _ in "ab")
        if self.plan.base is not None:
            self.reader.fill(self.plan.base, spans, base)
        for i in range(self.m):
            self.reader.fill(self.experts[i], spans, row)
            heads[i] = (row - base).tolist()
        scalar = [() if self.importances else (w,) for w in self.weights.tolist()]
        keys = [(*h, *w) for h, w in zip(heads, scalar, strict=True)]
        groups = [[i for i in range(self.m) if keys[i] == k] for k in sorted(set(keys))]
        if any(len(g) > 1 for g in groups):
            for _, rows in self.blocks():
                groups = [part for g in groups for part in _split(g, rows)]
                if all(len(g) == 1 for g in groups):
                    break
        order = [i for g in groups for i in g]
        self.experts = [self.experts[i] for i in order]
        self.importances = [self.importances[i] for i in order] if self.importances else []
        self.weights = self.weights[order]

    def run(self, write: Write) -> None:
        """Combine all blocks, and write them."""
        a = self.aggregator
        self.order()
        if isinstance(a, Linear):
            self._linear(a, write)
        elif isinstance(a, Blockwise):
            self._blockwise(a, write)
        else:
            self._whole(a, write)

    def _linear(self, a: Linear, write: Write) -> None:
        gram = torch.zeros(0, 0, dtype=self.plan.wide)
        if a.needs_gram:
            gram = torch.zeros(self.m, self.m, dtype=torch.float64)
            for _, rows in self.blocks():
                gram += (rows @ rows.T).double()
        c = [float(x) for x in a.weigh(gram.to(self.plan.wide), self.weights, self.generator)]
        rest = 1 - sum(c) if self.plan.base is not None else 0.0
        rest = 0.0 if abs(rest) < 1e-6 else rest
        used = [(e, x) for e, x in zip(self.experts, c, strict=True) if x]
        if not used and self.plan.base is not None:
            used, rest = [(self.plan.base, 1.0)], 0.0
        reader = Reader(self.plan, self.reader.names, LINEAR)
        if not self.scales and len(used) == 1 and used[0][1] == 1 and not rest:
            self.every(
                reader,
                lambda: None,
                lambda offset, _: self._copy(list(reader.spans(offset)), used[0][0], write),
            )
            return

        alike = len({x for _, x in used}) == 1
        cancels = bool(rest) and abs(rest) + sum(abs(x) for _, x in used) > CANCELS

        def room() -> list[tuple[Tensor, Array]]:
            made = [torch.zeros(min(LINEAR, self.n), dtype=self.plan.wide) for _ in range(3)]
            return [(t, t.numpy()) for t in made]

        def work(offset: int, own: list[tuple[Tensor, Array]]) -> None:
            spans = list(reader.spans(offset))
            width = spans[-1].at + spans[-1].stop - spans[-1].start
            (base, base_array), (row, row_array), (total, total_array) = (
                (t[:width], x[:width]) for t, x in own
            )
            if self.plan.base is not None and (rest or self.scales):
                reader.fill(self.plan.base, spans, base_array)
            if not used or cancels:
                total.zero_()
            for i, (source, x) in enumerate(used):
                reader.fill(source, spans, row_array if i or cancels else total_array)
                if cancels:
                    total.add_(row.sub_(base), alpha=x)
                elif alike and i:
                    np.add(total_array, row_array, out=total_array)
                elif i:
                    total.add_(row, alpha=x)
                elif not alike:
                    total.mul_(x)
            if alike and not cancels:
                total.mul_(used[0][1])
            if rest:
                total.add_(base, alpha=1.0 if cancels else rest)
            self._put(spans, base, total, write, True)

        self.every(reader, room, work)

    def _copy(self, spans: Sequence[Span], source: Entries, write: Write) -> None:
        """A block of one model as it is."""
        for s in spans:
            owner = source if s.name in source.shapes else self.plan.like
            piece = owner.read(s.name, s.start, s.stop)
            if not finite(piece):
                raise NotFinite(not_finite(self.plan))
            write(s.name, s.start, piece)

    def _blockwise(self, a: Blockwise, write: Write) -> None:
        known = a.init(self.m, self.n, self.generator)
        while not known.done:
            columns = known.columns
            for offset, rows in self.blocks(columns):
                known = a.scan(rows, offset, known)
            known, self.checked = a.settle(known), columns is None

        def work(offset: int, slot: Slot) -> None:
            spans, base, rows = self.load(offset, slot)
            self._put(spans, base, a.apply(rows, self._weights(spans, rows), offset, known), write, False)

        self.every(self.reader, self.slot, work)

    def _weights(self, spans: Sequence[Span], rows: Tensor) -> Tensor:
        """[m], or [m, b] where importances were given."""
        if not self.importances:
            return self.weights
        made = torch.zeros_like(rows)
        for i, source in enumerate(self.importances):
            for s in spans:
                source.into(s.name, s.start, made[i, s.at : s.at + s.stop - s.start].numpy())
        if not (made >= 0).all() or not torch.isfinite(made).all():
            bad = [
                f"{s.name!r} of {source.name}"
                for source, row in zip(self.importances, made, strict=True)
                for s in spans
                if not ((piece := row[s.at : s.at + s.stop - s.start]) >= 0).all()
                or not torch.isfinite(piece).all()
            ]
            raise ConsilienceError(
                f"importances should be finite and not negative. Found others in {'; '.join(bad)}."
            )
        return made * self.weights[:, None]

    def _whole(self, a: Aggregator, write: Write) -> None:
        rows = torch.empty(self.m, self.n, dtype=self.plan.wide)
        for offset, block in self.blocks():
            rows[:, offset : offset + block.shape[1]] = block
        total = a.combine(rows, self.weights, self.generator)
        del rows

        def work(offset: int, slot: Slot) -> None:
            spans, base, _ = self.load(offset, slot)
            self._put(spans, base, total[offset : offset + len(base)], write, False)

        self.every(self.reader, self.slot, work)

    def _put(
        self, spans: Sequence[Span], base: Tensor, total: Tensor, write: Write, parameters: bool
    ) -> None:
        """Write a block: `total` is parameters, or a change of the base's that is scaled by entry."""
        for s in spans:
            piece = slice(s.at, s.at + s.stop - s.start)
            values, origin, scale = total[piece], base[piece], self.scales.get(s.name, 1.0)
            if parameters and scale != 1:
                values = origin + (values - origin) * scale
            elif not parameters:
                values = origin + (values * scale if scale != 1 else values)
            if not np.isfinite(float(values.sum())):
                self._blame(values)
            write(s.name, s.start, values)


class NotFinite(ConsilienceError):
    """NaN or infinity in models' tensors."""

    def __init__(self, entries: Mapping[str, Sequence[str]]) -> None:
        found = "; ".join(f"{n!r} of {', '.join(models)}" for n, models in entries.items())
        super().__init__(
            f"parameters should be finite (--allow-non_finite). Found NaN or infinity in {found}."
        )
        self.entries = set(entries)


def not_finite(plan: Plan) -> dict[str, list[str]]:
    """Entries with NaN or infinity, and the models that have it there."""
    found: dict[str, list[str]] = {}
    for e in {id(e): e for e in (plan.like, *plan.experts)}.values():
        for n in plan.names:
            if n in e.shapes and not all(finite(piece) for _, piece in e.pieces(n, 0, plan.spans[n])):
                found.setdefault(n, []).append(e.name)
    return found


def _split(group: list[int], rows: Tensor) -> list[list[int]]:
    """A group of rows that are alike so far, divided and ordered by the bytes of a further block."""
    if len(group) == 1:
        return [group]
    found: dict[bytes, list[int]] = {}
    for i in group:
        found.setdefault(rows[i].numpy().tobytes(), []).append(i)
    return [found[k] for k in sorted(found)]


@overload
def merge(
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    aggregator: Aggregator | None = None,
    out: None = None,
    **options: Any,
) -> dict[str, Tensor]: ...


@overload
def merge(
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    aggregator: Aggregator | None,
    out: str | Path,
    **options: Any,
) -> Path: ...


def merge(  # type: ignore[misc]
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    aggregator: Aggregator | None = None,
    out: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    per: str = "model",
    scales: Mapping[str, float] | None = None,
    keep: Sequence[str] = (),
    allow: Sequence[str] = (),
    importances: Sequence[Any] | None = None,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    shard: int | None = None,
    memory: int = 512 << 20,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor] | Path:
    """Merge experts into one model: base + A(expert_1 - base, .., expert_m - base), block by block.

    A linear aggregator gives coefficients c, and the result is sum c_i expert_i + (1 - sum c) base: one unchanged expert, or the base, is
    taken as it is. Integer and boolean entries are the base's. Files and state dicts go through the same code: the same bits.
    Memory beside the result is a few blocks of every model (aggregators that read all rows at once: `memory`).

    Args:
        base: what the experts started from: a path of safetensors (file, folder, shards with their index), a state dict or a module;
            None combines whole parameters (the first expert gives names and dtypes).
        experts: the same, or folders of LoRA adapters on the base; a mapping names them.
        aggregator: one of `consilience.aggregators`; None is the mean.
        out: a new file (.safetensors) or folder; None gives a state dict.
        weights: one an expert; 1/m by default.
        per: "model" treats all entries as one vector, "tensor" every entry by itself.
        scales: factors of the change by pattern of names, the first that fits: {"layers.0.*": 0.5}.
        keep: patterns of entries that stay every expert's own (heads): the result has the base's, and a folder the experts' in kept/.
        allow: of `missing`, `extra`, `vocabulary`, `non_finite`, `other_base`, `configuration`; else these are refused.
        importances: a model of weights >= 0 an expert (Fisher information), for aggregators that weigh entries.
        dtype: of the arithmetic; float32, or float64 where an entry has it.
        out_dtype: of the floating-point entries written; the base's by default.
        shard: bytes a file holds at most; as the base's files by default.
        memory: bytes that may be held beside the result.
        threads: that take whole blocks; with more than one, blocks are also read ahead.
        seed: of aggregators that draw.
        progress: told bytes done and in all.

    Raises:
        ConsilienceError: models that do not fit (every problem is told), what is not finite, a place that is taken.

    >>> base = {"w": torch.zeros(3)}
    >>> merge(base, [{"w": torch.tensor([2.0, 0.0, 4.0])}, {"w": torch.tensor([4.0, 2.0, 0.0])}])["w"].tolist()
    [3.0, 1.0, 2.0]
    """
    from consilience.aggregators._mean import Mean

    aggregator = aggregator or Mean()
    made, w, weighing, factors = checked(
        base,
        experts,
        aggregator,
        out,
        weights=weights,
        per=per,
        scales=scales,
        keep=keep,
        allow=allow,
        importances=importances,
        dtype=dtype,
        memory=memory,
        threads=threads,
    )
    dtypes = {
        n: out_dtype if out_dtype is not None and t.is_floating_point else t
        for n, t in made.like.dtypes.items()
    }
    sink = Tensors(made, dtypes) if out is None else Shards(made, dtypes, Path(out), shard)
    skip: set[str] = set()
    before = torch.get_num_threads()
    count = threads or before
    try:
        torch.set_num_threads(1)  # blocks are small: threads take whole blocks
        groups = [list(made.names)] if per == "model" else [[n] for n in made.names]
        while True:
            told = _Told(progress, made)
            try:
                for names in groups:
                    names = [n for n in names if n not in skip]
                    if names and sum(made.spans[n] for n in names):
                        generator = (
                            torch.Generator().manual_seed(seed) if per == "model" else key(seed, names[0])
                        )
                        Merge(made, names, aggregator, w, factors, weighing, generator, told, count).run(
                            sink.write
                        )
                break
            except NotFinite as e:
                if "non_finite" not in allow or not e.entries - skip:
                    raise
                skip |= e.entries  # and again, without them
        for n in made.like.shapes:
            begin = 0 if n in made.taken or n in skip else made.spans[n]
            for at, piece in made.like.pieces(n, begin) if n not in made.like.aliases else ():
                sink.write(n, at, piece)
        sink.close(
            _recipe(
                aggregator,
                made,
                w,
                weighing,
                dtypes,
                {
                    "per": per,
                    "scales": dict(scales or {}),
                    "keep": list(keep),
                    "allow": list(allow),
                    "seed": seed,
                },
            )
        )
    except BaseException:
        sink.undo()
        raise
    finally:
        torch.set_num_threads(before)
    return sink.made if isinstance(sink, Tensors) else Path(out)  # type: ignore[arg-type]


def checked(
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    aggregator: Aggregator,
    out: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    per: str = "model",
    scales: Mapping[str, float] | None = None,
    keep: Sequence[str] = (),
    allow: Sequence[str] = (),
    importances: Sequence[Any] | None = None,
    dtype: torch.dtype | None = None,
    memory: int = 512 << 20,
    threads: int | None = None,
    **rest: Any,
) -> tuple[Plan, Tensor, list[Entries], dict[str, float]]:
    """The plan of a merge, weights [m], importances and factors by entry: all that can be refused before anything is computed."""
    from consilience.aggregators._slerp import Slerp

    if not isinstance(aggregator, Aggregator):
        raise ConsilienceError(
            f"`aggregator` should be made by consilience.aggregators, such as ties(). Found {kind_of(aggregator)}."
        )
    if per not in ("model", "tensor"):
        raise unknown("per", str(per), ("model", "tensor"))
    if out is not None and Path(out).exists():
        raise ConsilienceError(f"`out` should be new. Found something at {out}.")
    if threads is not None and threads < 1:
        raise ConsilienceError(f"`threads` should be at least 1. Found {threads}.")
    if base is None and aggregator.needs_base and not isinstance(aggregator, Slerp):
        raise ConsilienceError(
            f"{type(aggregator).__name__} combines changes, so there should be a base. Found none."
        )
    problems: list[str] = []

    def there(what: Any, base: Entries | None, name: str) -> Entries | None:
        try:
            return opened(what, base, name)
        except ConsilienceError as e:
            problems.append(str(e).rstrip("."))
            return None

    start = there(base, None, "the base") if base is not None else None
    named = experts if isinstance(experts, Mapping) else {f"expert {i}": e for i, e in enumerate(experts)}
    found = [there(e, start, n) for n, e in named.items()]
    weighing = [e for i, x in enumerate(importances or ()) if (e := there(x, start, f"importances {i}"))]
    if problems:
        raise ConsilienceError("; ".join(problems) + ".")
    models = [e for e in found if e is not None]
    made = plan(start, models, allow, keep, dtype)
    m = len(models)
    w = (
        torch.full((m,), 1 / m, dtype=torch.float64)
        if weights is None
        else torch.as_tensor(list(weights), dtype=torch.float64)
    )
    if (
        w.shape != (m,)
        or not torch.isfinite(w).all()
        or (not aggregator.takes_negative_weights and (w < 0).any())
    ):
        sign = "" if aggregator.takes_negative_weights else " and not negative"
        raise ConsilienceError(f"weights should be {m} numbers, finite{sign}. Found {w.tolist()}.")
    if m < aggregator.fewest_rows:
        raise ConsilienceError(
            f"{type(aggregator).__name__} should be given at least {aggregator.fewest_rows} experts. Found {m}."
        )
    if importances is not None and (not aggregator.takes_entry_weights or len(importances) != m):
        raise ConsilienceError(
            f"importances should be one an expert, for an aggregator that weighs entries (fisher). Found {len(importances)} of {m} for {type(aggregator).__name__}."
        )
    problems += [
        f"{e.name}: {n!r} {'has shape ' + str(list(e.shapes[n])) if n in e.shapes else 'is missing'}"
        for e in weighing
        for n in made.names
        if e.shapes.get(n) != made.like.shapes[n]
    ]
    if problems:
        raise ConsilienceError(
            f"importances should have the shapes of what they weigh. Found {'; '.join(problems)}."
        )
    if not isinstance(aggregator, Linear | Blockwise):
        need = (m + 2) * made.wide.itemsize * (made.size if per == "model" else max(made.spans.values()))
        if need > memory:
            raise ConsilienceError(
                f'{type(aggregator).__name__} reads all rows at once, so `memory` should be {need:,} bytes or more (or `per` "tensor"). Found {memory:,}.'
            )
    factors = {}
    for n in made.names:
        for pattern, value in (scales or {}).items():
            if matches(n, [pattern]):
                factors[n] = float(value)
                break
    for pattern in scales or {}:
        if not any(matches(n, [pattern]) for n in made.names):
            raise ConsilienceError(
                f"a pattern of `scales` should fit some entry. Found {pattern!r}, which fits none."
            )
    if factors and base is None:
        raise ConsilienceError("`scales` are factors of changes, so there should be a base. Found none.")
    return made, w, weighing, factors


class _Told:
    """Progress in bytes: passes are counted as they come."""

    def __init__(self, progress: Progress | None, plan: Plan) -> None:
        self.progress, self.plan, self.done = progress, plan, 0

    def __call__(self, columns: int) -> None:
        self.done += columns
        if self.progress is not None:
            each = self.plan.wide.itemsize * (len(self.plan.experts) + 1)
            self.progress(self.done * each, max(self.plan.size, self.done) * each)


def _recipe(
    aggregator: Aggregator,
    plan: Plan,
    weights: Tensor,
    importances: Sequence[Entries],
    dtypes: Mapping[str, torch.dtype],
    rest: Mapping[str, Any],
) -> dict[str, object]:
    """What made a merged model."""
    from consilience import __version__

    return {
        "consilience": __version__,
        "aggregator": repr(aggregator),
        "base": plan.base.name if plan.base is not None else None,
        "experts": [e.name for e in plan.experts],
        "weights": weights.tolist(),
        "importances": [e.name for e in importances],
        "dtype": str(plan.wide),
        "out_dtypes": sorted({str(dtypes[n]) for n in plan.names}),
        **rest,
    }


def fold_normalisation(
    params: Mapping[str, Tensor],
    layer: str,
    mean: Sequence[float],
    std: Sequence[float],
    to_mean: Sequence[float],
    to_std: Sequence[float],
) -> dict[str, Tensor]:
    """Parameters for inputs normalised by (to_mean, to_std), of a model that was trained for (mean, std): its first layer takes the difference.

    W' = W to_std / std, b' = b + sum W (to_mean - mean) / std, by channel; W [out, channels * p] or [out, channels, ..]. Exact for a linear layer or a
    convolution without padding (a padded one sees another border).

    Raises:
        ConsilienceError: no such layer, a bias that is missing where one is needed, or other channels.

    >>> p = fold_normalisation({"l.weight": torch.ones(1, 2), "l.bias": torch.zeros(1)}, "l", [0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0])
    >>> p["l.weight"].tolist(), p["l.bias"].tolist()
    ([[2.0, 2.0]], [-2.0])
    """
    made = dict(params)
    w, b = params.get(f"{layer}.weight"), params.get(f"{layer}.bias")
    if w is None:
        raise ConsilienceError(
            f"`layer` should have a weight among the parameters. Found no {layer + '.weight'!r}."
        )
    channels = len(mean)
    if not len(std) == len(to_mean) == len(to_std) == channels or w.shape[1] % channels:
        raise ConsilienceError(
            f"means and deviations should be one a channel of {layer!r}, {tuple(w.shape)}. Found {channels}."
        )
    m, s, to_m, to_s = (torch.tensor(list(x), dtype=torch.float64) for x in (mean, std, to_mean, to_std))
    if not ((s > 0).all() and (to_s > 0).all()):
        raise ConsilienceError(f"deviations should be positive. Found {list(std)} and {list(to_std)}.")
    wide = w.double().reshape(len(w), channels, -1)
    shift = (wide * ((to_m - m) / s)[:, None]).sum((1, 2))
    if b is None and bool((shift != 0).any()):
        raise ConsilienceError(f"{layer!r} should have a bias, since the means differ. Found none.")
    made[f"{layer}.weight"] = (wide * (to_s / s)[:, None]).reshape(w.shape).to(w.dtype)
    if b is not None:
        made[f"{layer}.bias"] = (b.double() + shift).to(b.dtype)
    return made
