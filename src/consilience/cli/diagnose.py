"""The command `consilience diagnose`: which tasks help or harm each other, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consilience.cli.build import (
    as_list,
    listed,
    method_of,
    metrics_of,
    model_of,
    sources_of,
    training_of,
)
from consilience.cli.compare import check_folder, write_config
from consilience.cli.options import Order, understand
from consilience.core.errors import Interrupted


def diagnose(argv: Sequence[str]) -> int:
    """Train tasks together, each alone, and otherwise; print the seven steps, and write one report."""
    order = understand("diagnose", argv)
    if order is None:
        return 0
    options = order.diagnosis
    folder = Path(options.out) if options.out else None
    check_folder("diagnosis", order.config, folder, options.resume)

    import consilience as cs

    # A folder may have its configuration, and no finished run yet.
    begun = folder is not None and options.resume and (folder / "runs.json").exists()
    arguments = arguments_of(order)
    if folder is not None and not options.resume and not options.dry_run:
        write_config(order.config, folder)
    try:
        found = cs.diagnose(**arguments, out=folder, resume=begun, progress=True, dry_run=options.dry_run)
    except Interrupted as error:
        resume = f"continue with `consilience diagnose --resume --out {folder}`"
        raise Interrupted(
            f"interrupted; {resume if folder else 'nothing was kept, without --out'}."
        ) from error
    if options.dry_run:
        return 0

    print(found.table())
    if folder is not None:
        print(f"wrote {folder / 'report.html'}")
    return 0


def arguments_of(order: Order) -> dict[str, Any]:
    """Build the arguments of `consilience.diagnose` that the options say."""
    options = order.diagnosis
    sources = [source for stream in as_list(sources_of(order)) for source in as_list(stream)]
    (setting,) = order.of("setting")
    schedule = setting.call(sources, **order.options(setting))

    # A method that is listed twice is tried once.
    names = dict.fromkeys(name.strip() for name in order.names["methods"].split(","))
    return {
        "sources": sources,
        "model": model_of(order, schedule),
        "training": training_of(order),
        "methods": {name: method_of(order, name, "methods") for name in names},
        "domains": options.domains,
        "parts": None if options.parts is None else listed(options.parts),
        "budget": options.budget,
        "scenario": order.values["setting.scenario"],
        "on": options.on,
        "repeats": options.repeats,
        "seed": options.seed,
        "metric": None if options.metric is None else metrics_of(options.metric),
        "engine": options.engine,
        "probes": options.probes,
    }
