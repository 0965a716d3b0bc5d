"""The command `consilience run`: one method in one setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.cli.build import listed, method_of, metrics_of, model_of, schedule_of, training_of
from consilience.cli.options import Order, understand
from consilience.core.errors import ConsilienceError

if TYPE_CHECKING:
    from consilience.api import Result
    from consilience.core.method import Method
    from consilience.core.schedule import Schedule


def run(argv: Sequence[str]) -> int:
    """Run a method, print its table, and keep the run in --out."""
    order = understand("run", argv)
    if order is None:
        return 0

    out, resume = order.run.out, order.run.resume
    if resume and not out:
        raise ConsilienceError("`--resume` needs the folder of the run to continue, `--out`.")
    if resume and not (Path(str(out)) / "config.yaml").exists():
        raise ConsilienceError(f"`--resume` needs a run in `--out`, but {out} has no config.yaml.")

    # The method is built first: its mistakes cost less time than reading the data.
    method = method_of(order, order.names["method"])
    result = carry_out(order, schedule_of(order), method, order.config, out, resume)
    print(result.table())
    if out:
        print(f"kept in {out}")
    return 0


def carry_out(
    order: Order, schedule: Schedule, method: Method, config: Mapping[str, Any], out: str | None, resume: bool
) -> Result:
    """Run one method with the options of an order."""
    import consilience as cs

    options = order.run
    return cs.run(
        schedule,
        method,
        model_of(order, schedule),
        training_of(order),
        out=out,
        resume=resume,
        progress=True,
        config=config,
        repeats=options.repeats,
        seed=options.seed,
        metric=None if options.metric is None else metrics_of(options.metric),
        engine=options.engine,
        checkpoint_seconds=options.checkpoint_seconds,
        checkpoint_steps=options.checkpoint_steps,
        judge_clients=options.judge_clients,
        stopping=options.stopping,
        trackers=[] if options.trackers is None else listed(options.trackers),
    )
