"""Merging: blocks of all models go through an aggregator, so that no complete model is in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from consilience.core.aggregator import Affine, Aggregator, Blockwise, Linear, canonical
from consilience.core.errors import ConsilienceError, kind_of, suggests, unknown
from consilience.core.params import all_finite, key, matches
from consilience.core.signals import ended_by_signals
from consilience.merging._files import Entries, opened, stem
from consilience.merging._out import Shards, Tensors
from consilience.merging._plan import MergeSettings, Plan, Reader, Span, plan

Progress = Callable[[int, int], None]
"""Called with the bytes read so far, and the bytes to read."""

Write = Callable[[str, int, Tensor], None]
"""Called with an entry's name, the index of the first element, and values."""

LINEAR = 1 << 17
"""Columns of a block for linear aggregators, which hold no more than three rows at once."""

CANCELS = 4.0
"""If absolute coefficients of parameters and base sum to more, changes are added: fewer digits are lost."""


class Prepared(NamedTuple):
    """A checked merge: its plan, weights [m], importances of entries, and factors of the change by entry."""

    plan: Plan
    aggregator: Aggregator
    weights: Tensor
    importances: list[Entries]
    scales: Mapping[str, float]


class Slot(NamedTuple):
    """Buffers for one block: the base [b] and the changes [m, b]."""

    base: Tensor
    rows: Tensor


class Block(NamedTuple):
    """One block that was read: its pieces, its base [b] and its changes [m, b]."""

    spans: list[Span]
    base: Tensor
    rows: Tensor


class Merge:
    """One aggregator over one group of entries.

    `run` puts the rows in canonical order, reads all blocks as often as the aggregator asks for, then makes
    and writes each block.
    """

    def __init__(
        self,
        prepared: Prepared,
        names: Sequence[str],
        generator: torch.Generator,
        send: Callable[[int], None],
        threads: int,
    ) -> None:
        self.plan, self.aggregator, self.scales = prepared.plan, prepared.aggregator, prepared.scales
        self.experts, self.importances = list(prepared.plan.experts), list(prepared.importances)
        self.weights = prepared.weights.to(self.plan.wide)
        self.generator, self.send, self.threads = generator, send, threads

        # With larger blocks threads wait less for each other. Results do not depend on the size.
        block = self.aggregator.block if isinstance(self.aggregator, Blockwise) else Blockwise.block
        self.reader = Reader(self.plan, names, block << 2 if threads > 1 else block)
        self.size, self.count = self.reader.size, len(self.experts)
        # Whether a pass has found all numbers finite, so that later ones need not look.
        self.known_finite = False

    # Reading.

    def slot(self) -> Slot:
        """Allocate buffers for one block."""
        width, dtype = min(self.reader.block, self.size), self.plan.wide
        return Slot(torch.zeros(width, dtype=dtype), torch.empty(self.count, width, dtype=dtype))

    def load(self, offset: int, slot: Slot, columns: int | None = None) -> Block:
        """Read a block, or its first columns, into a slot; refuse numbers that are not finite."""
        spans = list(self.reader.spans(offset, columns))
        width = spans[-1].columns.stop
        base, rows = slot.base.numpy()[:width], slot.rows.numpy()[:, :width]
        if self.plan.base is not None:
            self.reader.fill(self.plan.base, spans, base)
        for i in range(self.count):
            self.reader.fill(self.experts[i], spans, rows[i])
            if self.plan.base is not None:
                np.subtract(rows[i], base, out=rows[i])

        # A sum is not finite if any number is not, and costs a fraction of a test of each.
        made = torch.from_numpy(rows)
        if not self.known_finite and not np.isfinite(float(made.sum())):
            self._refuse_infinite(made)
        return Block(spans, torch.from_numpy(base), made)

    def blocks(self, columns: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield offset and changes [m, b] of every block in order, or of their first columns.

        With more than one thread, the next block is read ahead.
        """
        offsets = self.reader.offsets()
        slots = [self.slot() for _ in range(min(2, self.threads))]
        if len(slots) == 1:
            for offset in offsets:
                yield offset, self.load(offset, slots[0], columns).rows
                self.send(self.reader.block)
            return

        # Two slots: one is read while the other is used.
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.load, offsets[0], slots[0], columns)
            for i, offset in enumerate(offsets):
                rows = coming.result().rows
                if i + 1 < len(offsets):
                    coming = pool.submit(self.load, offsets[i + 1], slots[(i + 1) % 2], columns)
                yield offset, rows
                self.send(self.reader.block)

    def each_block(
        self, reader: Reader, allocate: Callable[[], Any], work: Callable[[int, Any], None]
    ) -> None:
        """Call `work` with the offset of every block, in any thread, and buffers of its own."""
        if self.threads == 1:
            buffers = allocate()
            for offset in reader.offsets():
                work(offset, buffers)
                self.send(reader.block)
            return

        free = [allocate() for _ in range(self.threads)]

        def in_thread(offset: int) -> None:
            buffers = free.pop()
            try:
                work(offset, buffers)
            finally:
                free.append(buffers)

        # Few blocks are submitted ahead, so that an error stops the merge at once.
        left, running = iter(reader.offsets()), deque[Future[None]]()
        with ThreadPoolExecutor(self.threads) as pool:
            for offset in islice(left, 2 * self.threads):
                running.append(pool.submit(in_thread, offset))
            while running:
                running.popleft().result()
                for offset in islice(left, 1):
                    running.append(pool.submit(in_thread, offset))
                self.send(reader.block)

    def _refuse_infinite(self, *computed: Tensor) -> None:
        """Say why a sum was not finite: numbers of some model, or computed ones that are too large."""
        if bad := not_finite(self.plan):
            raise NotFinite(bad)
        if not all(torch.isfinite(values).all() for values in computed):
            raise ConsilienceError(
                f"merged numbers must fit in {self.plan.wide}, got larger ones; use --dtype float64."
            )

    # Combining.

    def order(self) -> None:
        """Put the experts in canonical order, as an `Aggregator` does with rows in memory."""
        if self.count < 2:
            return
        # The changes' first numbers, as `canonical_rows` takes them from rows in memory.
        spans = list(self.reader.spans(0, 4))
        base, row = (torch.zeros(min(4, self.size), dtype=self.plan.wide).numpy() for _ in "ab")
        if self.plan.base is not None:
            self.reader.fill(self.plan.base, spans, base)
        heads: list[tuple[float, ...]] = []
        for expert, weight in zip(self.experts, self.weights.tolist(), strict=True):
            self.reader.fill(expert, spans, row)
            # Weights per entry do not fit in a head; equal rows then stay as they came.
            heads.append((*(row - base).tolist(), *(() if self.importances else (weight,))))

        pieces = (lambda i, rows=rows: rows[i].numpy().tobytes() for _, rows in self.blocks())
        order = canonical(heads, pieces)
        self.experts = [self.experts[i] for i in order]
        self.importances = [self.importances[i] for i in order] if self.importances else []
        self.weights = self.weights[order]

    def run(self, write: Write) -> None:
        """Combine all blocks, and write them."""
        self.order()
        if isinstance(self.aggregator, Linear):
            self._linear(self.aggregator, write)
        elif isinstance(self.aggregator, Blockwise):
            self._blockwise(self.aggregator, write)
        else:
            self._all_rows(self.aggregator, write)

    def _linear(self, aggregator: Linear, write: Write) -> None:
        """Add up parameters with the aggregator's coefficients, block by block."""
        sources, terms = self._terms(aggregator)
        # Rows are added one after another, so that blocks may be larger than where all rows are held.
        reader = Reader(self.plan, self.reader.names, LINEAR)
        if sources and terms.copied and not self.scales:
            source = sources[0]
            self.each_block(
                reader,
                lambda: None,
                lambda offset, _: self._copy(list(reader.spans(offset)), source, write),
            )
            return

        def allocate() -> list[Tensor]:
            width = min(LINEAR, self.size)
            return [torch.zeros(width, dtype=self.plan.wide) for _ in range(3)]

        def work(offset: int, buffers: list[Tensor]) -> None:
            spans = list(reader.spans(offset))
            base, row, total = (buffer[: spans[-1].columns.stop] for buffer in buffers)
            if self.plan.base is not None and (terms.base_share or self.scales):
                reader.fill(self.plan.base, spans, base.numpy())

            def rows() -> Iterator[Tensor]:
                for i, source in enumerate(sources):
                    # The first row is read straight into the sum, which saves a pass over it.
                    buffer = row if i or terms.by_changes else total
                    reader.fill(source, spans, buffer.numpy())
                    yield buffer

            made = terms.add(rows(), base, total) if sources else total.zero_()
            self._put(spans, base, made, write, True)

        self.each_block(reader, allocate, work)

    def _terms(self, aggregator: Linear) -> tuple[list[Entries], Affine]:
        """Return the models that are added, and how: experts with a coefficient, or else the base."""
        # Blocks are added in float64, so that the number of blocks costs no digits.
        gram = torch.zeros(0, 0, dtype=self.plan.wide)
        if aggregator.needs_gram:
            gram = torch.zeros(self.count, self.count, dtype=torch.float64)
            for _, rows in self.blocks():
                gram += (rows @ rows.T).double()
            gram = (gram + gram.T) / 2
        found = aggregator.weigh(gram.to(self.plan.wide), self.weights, self.generator).tolist()
        rest = 1 - sum(found) if self.plan.base is not None else 0.0

        # Experts without a coefficient are not read.
        used = [(expert, value) for expert, value in zip(self.experts, found, strict=True) if value]
        if not used and self.plan.base is not None:
            used, rest = [(self.plan.base, 1.0)], 0.0
        values = tuple(value for _, value in used)
        terms = Affine(values, rest)
        if terms.base_share and abs(terms.base_share) + sum(abs(value) for value in values) > CANCELS:
            terms = Affine(values, rest, by_changes=True)
        elif len(set(values)) == 1:
            terms = Affine(values, rest, factored=True)
        return [source for source, _ in used], terms

    def _copy(self, spans: Sequence[Span], source: Entries, write: Write) -> None:
        """Write a block of one model as it is."""
        for span in spans:
            owner = source if span.name in source.shapes else self.plan.like
            piece = owner.read(span.name, span.start, span.stop)
            if not all_finite(piece):
                raise NotFinite(not_finite(self.plan))
            write(span.name, span.start, piece)

    def _blockwise(self, aggregator: Blockwise, write: Write) -> None:
        """Scan all blocks until the aggregator is done, then make each."""
        state = aggregator.init(self.count, self.size, self.generator)
        while not state.done:
            columns = state.columns
            for offset, rows in self.blocks(columns):
                state = aggregator.scan(rows, offset, state)
            state, self.known_finite = aggregator.settle(state), columns is None

        def work(offset: int, slot: Slot) -> None:
            spans, base, rows = self.load(offset, slot)
            made = aggregator.apply(rows, self._entry_weights(spans, rows), offset, state)
            self._put(spans, base, made, write, False)

        self.each_block(self.reader, self.slot, work)

    def _entry_weights(self, spans: Sequence[Span], rows: Tensor) -> Tensor:
        """Return weights [m], or [m, b] if importances were given."""
        if not self.importances:
            return self.weights
        made = torch.zeros_like(rows)
        for i, source in enumerate(self.importances):
            for span in spans:
                source.into(span.name, span.start, made[i, span.columns].numpy())

        if not (made >= 0).all() or not torch.isfinite(made).all():
            bad = [
                f"{span.name!r} of {source.name}"
                for source, row in zip(self.importances, made, strict=True)
                for span in spans
                if not (row[span.columns] >= 0).all() or not torch.isfinite(row[span.columns]).all()
            ]
            raise ConsilienceError(
                f"importances must be finite and not negative, got others in {'; '.join(bad)}."
            )
        return made * self.weights[:, None]

    def _all_rows(self, aggregator: Aggregator, write: Write) -> None:
        """Combine all rows at once, for aggregators that work neither by coefficients nor by blocks."""
        # `prepare` has checked that this fits in `memory`.
        rows = torch.empty(self.count, self.size, dtype=self.plan.wide)
        for offset, block in self.blocks():
            rows[:, offset : offset + block.shape[1]] = block
        total = aggregator.combine(rows, self.weights, self.generator)
        del rows

        def work(offset: int, slot: Slot) -> None:
            spans, base, _ = self.load(offset, slot)
            self._put(spans, base, total[offset : offset + len(base)], write, False)

        self.each_block(self.reader, self.slot, work)

    def _put(
        self, spans: Sequence[Span], base: Tensor, total: Tensor, write: Write, parameters: bool
    ) -> None:
        """Write a block, scaled: `total` holds `parameters`, or else a change of the base's."""
        for span in spans:
            values, origin = total[span.columns], base[span.columns]
            scale = self.scales.get(span.name, 1.0)
            if parameters and scale != 1:
                values = origin + (values - origin) * scale
            elif not parameters:
                values = origin + (values * scale if scale != 1 else values)
            # Finite models can still overflow when they are combined.
            if not np.isfinite(float(values.sum())):
                self._refuse_infinite(values)
            write(span.name, span.start, values)


class NotFinite(ConsilienceError):
    """NaN or infinity in models' tensors."""

    def __init__(self, entries: Mapping[str, Sequence[str]]) -> None:
        got = "; ".join(f"{n!r} of {', '.join(models)}" for n, models in entries.items())
        super().__init__(f"parameters must be finite (--allow-non_finite), got NaN or infinity in {got}.")
        self.entries = set(entries)


def not_finite(plan: Plan) -> dict[str, list[str]]:
    """Find entries with NaN or infinity, and the models that have it there."""
    found: dict[str, list[str]] = {}
    # Without a base `like` is an expert too: each model is read once.
    for model in {id(model): model for model in (plan.like, *plan.experts)}.values():
        for n in plan.names:
            pieces = model.pieces(n, 0, plan.spans[n]) if n in model.shapes else ()
            if not all(all_finite(piece) for _, piece in pieces):
                found.setdefault(n, []).append(model.name)
    return found


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


@suggests  # type: ignore[misc]
def merge(
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

    A linear aggregator gives coefficients c, and the result is sum c_i expert_i + (1 - sum c) base: one
    unchanged expert, or the base, is taken as it is. Integer and boolean entries are the base's. Running
    means and variances (batch norm) are averaged by any aggregator: extrapolated, variances would become
    negative. Files and state dicts go through the same code: the same bits. Besides the result, memory holds
    a few blocks of every model (aggregators that read all rows at once: `memory`).

    Args:
        base: what the experts started from: a path of safetensors (file, folder, shards with their index), a
            state dict or a module; None combines complete parameters (the first expert gives names and
            dtypes).
        experts: the same, or folders of LoRA adapters on the base; a mapping names them.
        aggregator: one of `consilience.aggregators`; None is the mean.
        out: a new file (.safetensors) or folder; None gives a state dict.
        weights: one per expert; 1/m by default.
        per: "model" treats all entries as one vector, "tensor" every entry by itself.
        scales: factors of the change by pattern of names, the first that fits: {"layers.0.*": 0.5}.
        keep: patterns of entries that stay every expert's own (heads): the result has the base's, and a
            folder has the experts' in kept/.
        allow: of `missing`, `extra`, `vocabulary`, `non_finite`, `other_base`, `configuration`; others are
            refused.
        importances: one model of weights >= 0 per expert (Fisher information), for aggregators that weigh
            entries.
        dtype: of the arithmetic; float32, or float64 if an entry has it.
        out_dtype: of the floating-point entries written; the base's by default.
        shard: most bytes per file; as in the base's files by default.
        memory: bytes that may be held besides the result.
        threads: threads that take complete blocks; with more than one, blocks are also read ahead.
        seed: of aggregators that draw.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ConsilienceError: models that do not fit (with every problem), numbers that are not finite, an
            existing `out`.

    >>> base = {"w": torch.zeros(3)}
    >>> experts = [{"w": torch.tensor([2.0, 0.0, 4.0])}, {"w": torch.tensor([4.0, 2.0, 0.0])}]
    >>> merge(base, experts)["w"].tolist()
    [3.0, 1.0, 2.0]
    """
    from consilience.aggregators._mean import Mean

    settings = MergeSettings(
        weights=weights,
        per=per,
        scales=scales,
        keep=keep,
        allow=allow,
        importances=importances,
        dtype=dtype,
        out_dtype=out_dtype,
        shard=shard,
        memory=memory,
        threads=threads,
        seed=seed,
    )
    prepared = prepare(base, experts, aggregator or Mean(), out, settings)
    made = prepared.plan
    dtypes = {
        n: out_dtype if out_dtype is not None and stored.is_floating_point else stored
        for n, stored in made.like.dtypes.items()
    }
    before = torch.get_num_threads()
    # A file as large as the model must not be left behind where the process is ended.
    with ended_by_signals():
        sink = Tensors(made, dtypes) if out is None else Shards(made, dtypes, Path(out), shard)
        try:
            # Blocks are too small to divide among torch's threads: ours take complete blocks.
            torch.set_num_threads(1)
            skipped = _merge_all(prepared, settings, sink.write, progress, threads or before)
            _copy_unmerged(made, skipped, sink.write)
            sink.close(_recipe(prepared, settings, dtypes))
        except BaseException:
            sink.undo()
            raise
        finally:
            torch.set_num_threads(before)
    return sink.made if isinstance(sink, Tensors) else Path(out)  # type: ignore[arg-type]


def _merge_all(
    prepared: Prepared, settings: MergeSettings, write: Write, progress: Progress | None, threads: int
) -> set[str]:
    """Merge all groups of entries; return the entries that were left out, since they are not finite."""
    made, seed = prepared.plan, settings.seed
    averaged = _averaged(prepared)
    held = {n for n in made.names if is_statistic(n)} if averaged is not prepared else set()
    apart = [[n for n in made.names if (n in held) == own] for own in (False, True)]
    groups = apart if settings.per == "model" else [[n] for n in made.names]
    skipped: set[str] = set()
    while True:
        send = _Counter(progress, made)
        try:
            for group in groups:
                names = [n for n in group if n not in skipped]
                if not sum(made.spans[n] for n in names):
                    continue
                # By the entry's name, so that a tensor's draws do not depend on the others.
                one_vector = settings.per == "model"
                generator = torch.Generator().manual_seed(seed) if one_vector else key(seed, names[0])
                how = averaged if names[0] in held else prepared
                Merge(how, names, generator, send, threads).run(write)
            return skipped
        except NotFinite as error:
            # Begin again without these entries: all others may depend on them, as parts of one vector.
            if "non_finite" not in settings.allow or not error.entries - skipped:
                raise
            skipped |= error.entries


def is_statistic(name: str) -> bool:
    """Whether an entry is a running mean or variance of inputs, by torch's names.

    >>> is_statistic("1.running_var"), is_statistic("running_mean"), is_statistic("1.weight")
    (True, True, False)
    """
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def _averaged(prepared: Prepared) -> Prepared:
    """Return how running statistics are merged: as an average of experts and base, of shares >= 0.

    It is the merge itself, if that is such an average.
    """
    from consilience.aggregators._mean import Mean

    given, scales = prepared.weights.clamp(min=0), prepared.scales.values()
    total = float(given.sum())
    within = bool((prepared.weights >= 0).all()) and total <= 1 + 1e-9 and all(0 <= s <= 1 for s in scales)
    if type(prepared.aggregator) is Mean and within:
        return prepared

    # Without a base shares add up to 1; with one, the base has what is left.
    if prepared.plan.base is None and not total:
        given, total = torch.ones_like(given), float(len(given))
    shares = given / (total if prepared.plan.base is None else max(1.0, total))
    factors = {n: min(max(scale, 0.0), 1.0) for n, scale in prepared.scales.items()}
    return Prepared(prepared.plan, Mean(), shares, [], factors)


def _copy_unmerged(made: Plan, skipped: set[str], write: Write) -> None:
    """Write the entries, and the ends of entries, that are not merged."""
    for n in made.like.shapes:
        # The sink writes tied entries itself.
        if n in made.like.aliases:
            continue
        start = 0 if n in made.taken or n in skipped else made.spans[n]
        for at, piece in made.like.pieces(n, start):
            write(n, at, piece)


def prepare(
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    aggregator: Aggregator,
    out: str | Path | None,
    settings: MergeSettings,
) -> Prepared:
    """Open all models and check the merge: all that can be refused before anything is computed."""
    _check_arguments(base, aggregator, out, settings)
    start, models, importances = _open_all(base, experts, settings.importances)
    made = plan(start, models, settings.allow, settings.keep, settings.dtype)
    weights = _weights(settings.weights, len(models), aggregator)

    if settings.importances is not None:
        _check_importances(aggregator, importances, made)
    # Users' own aggregators may need all rows at once, where ours work by coefficients or blocks.
    if not isinstance(aggregator, Linear | Blockwise):
        columns = made.size if settings.per == "model" else max(made.spans.values())
        needed = (len(models) + 2) * made.wide.itemsize * columns
        if needed > settings.memory:
            raise ConsilienceError(
                f"{type(aggregator).__name__} reads all rows at once: `memory` must be {needed:,} bytes or "
                f'more (or `per` "tensor"), got {settings.memory:,}.'
            )
    scales = _scales(settings.scales or {}, made)
    if scales and base is None:
        raise ConsilienceError("`scales` are factors of changes and need a base, got none.")
    return Prepared(made, aggregator, weights, importances, scales)


def _check_arguments(
    base: Any, aggregator: Aggregator, out: str | Path | None, settings: MergeSettings
) -> None:
    """Refuse arguments that are wrong for any models."""
    from consilience.aggregators._slerp import Slerp

    if not isinstance(aggregator, Aggregator):
        raise ConsilienceError(
            "`aggregator` must be made by consilience.aggregators, such as ties(), got "
            f"{kind_of(aggregator)}."
        )
    if settings.per not in ("model", "tensor"):
        raise unknown("per", str(settings.per), ("model", "tensor"))
    if out is not None and Path(out).exists():
        raise ConsilienceError(f"`out` must be new, got {out}, which exists.")
    if settings.threads is not None and settings.threads < 1:
        raise ConsilienceError(f"`threads` must be at least 1, got {settings.threads}.")
    # Slerp is often used on parameters themselves, on an arc around zero.
    if base is None and aggregator.needs_base and not isinstance(aggregator, Slerp):
        raise ConsilienceError(f"{type(aggregator).__name__} combines changes and needs a base, got none.")


def _open_all(
    base: Any, experts: Sequence[Any] | Mapping[str, Any], importances: Iterable[Any] | None
) -> tuple[Entries | None, list[Entries], list[Entries]]:
    """Open base, experts and importances; one error lists all problems."""
    problems: list[str] = []

    def attempt(model: Any, base: Entries | None, name: str) -> Entries | None:
        try:
            return opened(model, base, name)
        except ConsilienceError as error:
            problems.append(str(error).rstrip("."))
            return None

    # The base first: adapters are read on top of it.
    start = attempt(base, None, "the base") if base is not None else None
    named = (
        experts if isinstance(experts, Mapping) else {f"expert {i}": model for i, model in enumerate(experts)}
    )
    models = [attempt(model, start, name) for name, model in named.items()]
    weighing = [attempt(model, start, f"importances {i}") for i, model in enumerate(importances or ())]
    if problems:
        raise ConsilienceError("; ".join(problems) + ".")
    return (
        start,
        [model for model in models if model is not None],
        [model for model in weighing if model is not None],
    )


def _weights(given: Sequence[float] | None, count: int, aggregator: Aggregator) -> Tensor:
    """Return checked weights [m], in float64."""
    if given is None:
        weights = torch.full((count,), 1 / count, dtype=torch.float64)
    else:
        weights = torch.as_tensor(list(given), dtype=torch.float64)
    positive = aggregator.takes_negative_weights or not (weights < 0).any()
    if weights.shape != (count,) or not torch.isfinite(weights).all() or not positive:
        rule = "finite" if aggregator.takes_negative_weights else "finite and not negative"
        raise ConsilienceError(f"`weights` must be {count} numbers, {rule}, got {weights.tolist()}.")
    aggregator.check_count(count, "experts")
    return weights


def _check_importances(aggregator: Aggregator, importances: list[Entries], made: Plan) -> None:
    """Refuse importances that do not fit the experts, or that the aggregator does not use."""
    count = len(made.experts)
    if not aggregator.takes_entry_weights:
        raise ConsilienceError(
            f"`importances` need an aggregator that weighs entries (fisher), got {type(aggregator).__name__}."
        )
    if len(importances) != count:
        raise ConsilienceError(f"`importances` must be {count}, one per expert, got {len(importances)}.")

    problems = []
    for model in importances:
        for name in made.names:
            if name not in model.shapes:
                problems.append(f"{model.name}: {name!r} is missing")
            elif model.shapes[name] != made.like.shapes[name]:
                problems.append(f"{model.name}: {name!r} has shape {list(model.shapes[name])}")
    if problems:
        raise ConsilienceError(
            f"`importances` must have the shapes of the entries that they weigh: {'; '.join(problems)}."
        )


def _scales(patterns: Mapping[str, float], made: Plan) -> dict[str, float]:
    """Return the factor of each entry that a pattern fits; the first that fits counts."""
    factors: dict[str, float] = {}
    for n in made.names:
        fitting = [float(value) for pattern, value in patterns.items() if matches(n, [pattern])]
        if fitting:
            factors[n] = fitting[0]
    # A pattern that fits nothing is nearly always a typing error.
    for pattern in patterns:
        if not any(matches(n, [pattern]) for n in made.names):
            raise ConsilienceError(
                f"a pattern of `scales` must fit some entry, got {pattern!r}, which fits none."
            )
    return factors


class _Counter:
    """Progress in bytes. The number of passes is not known before: further passes extend the total."""

    def __init__(self, progress: Progress | None, plan: Plan) -> None:
        self.progress, self.plan, self.done = progress, plan, 0

    def __call__(self, columns: int) -> None:
        self.done += columns
        if self.progress is not None:
            each = self.plan.wide.itemsize * (len(self.plan.experts) + 1)
            self.progress(self.done * each, max(self.plan.size, self.done) * each)


def _recipe(
    prepared: Prepared, settings: MergeSettings, dtypes: Mapping[str, torch.dtype]
) -> dict[str, object]:
    """Describe how a model was merged, for merge.json."""
    from consilience.version import __version__

    made = prepared.plan
    return {
        "consilience": __version__,
        "aggregator": repr(prepared.aggregator),
        # Names without their folders: where they lay concerns nobody who gets the result.
        "base": stem(made.base.name) if made.base is not None else None,
        "experts": [stem(model.name) for model in made.experts],
        "weights": prepared.weights.tolist(),
        "importances": [stem(model.name) for model in prepared.importances],
        "dtype": str(made.wide),
        "out_dtypes": sorted({str(dtypes[n]) for n in made.names}),
        "per": settings.per,
        "scales": dict(settings.scales or {}),
        "keep": list(settings.keep),
        "allow": list(settings.allow),
        "seed": settings.seed,
    }


@suggests
def fold_normalisation(
    params: Mapping[str, Tensor],
    layer: str,
    mean: Sequence[float],
    std: Sequence[float],
    to_mean: Sequence[float],
    to_std: Sequence[float],
) -> dict[str, Tensor]:
    """Change a model's first layer for inputs normalised by (to_mean, to_std) in the place of (mean, std).

    W' = W to_std / std, b' = b + sum W (to_mean - mean) / std, by channel; W [out, channels * p] or [out,
    channels, ..]. Exact for a linear layer or a convolution without padding (a padded one sees another
    border).

    Raises:
        ConsilienceError: no such layer, a missing bias that is needed, or other channels.

    >>> p = {"l.weight": torch.ones(1, 2), "l.bias": torch.zeros(1)}
    >>> folded = fold_normalisation(p, "l", [0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0])
    >>> folded["l.weight"].tolist(), folded["l.bias"].tolist()
    ([[2.0, 2.0]], [-2.0])
    """
    made = dict(params)
    weight, bias = params.get(f"{layer}.weight"), params.get(f"{layer}.bias")
    if weight is None:
        raise ConsilienceError(
            f"`layer` must have a weight among the parameters, got no {layer + '.weight'!r}."
        )
    channels = len(mean)
    if not len(std) == len(to_mean) == len(to_std) == channels or weight.shape[1] % channels:
        raise ConsilienceError(
            f"means and deviations must be one per channel of {layer!r}, {tuple(weight.shape)}, got "
            f"{channels}."
        )
    old_mean, old_std, new_mean, new_std = (
        torch.tensor(list(values), dtype=torch.float64) for values in (mean, std, to_mean, to_std)
    )
    if not ((old_std > 0).all() and (new_std > 0).all()):
        raise ConsilienceError(f"deviations must be positive, got {list(std)} and {list(to_std)}.")

    # The last axis holds all inputs of one channel, whether the layer is linear or a convolution.
    wide = weight.double().reshape(len(weight), channels, -1)
    shift = (wide * ((new_mean - old_mean) / old_std)[:, None]).sum((1, 2))
    if bias is None and bool((shift != 0).any()):
        raise ConsilienceError(f"{layer!r} must have a bias, because the means differ, got none.")
    made[f"{layer}.weight"] = (wide * (new_std / old_std)[:, None]).reshape(weight.shape).to(weight.dtype)
    if bias is not None:
        made[f"{layer}.bias"] = (bias.double() + shift).to(bias.dtype)
    return made
