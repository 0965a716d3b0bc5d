"""The form of result.json: what a reader relies on, so that a damaged file is refused where it is read."""

from __future__ import annotations

from typing import Any

from consilience.core.form import Any_, Or

RECORD = {"agent?": str, "source?": str, "stage?": int}
NUMBERS = Any_(Or(float))

RESULT: dict[str, Any] = {
    **dict.fromkeys(("setting", "data", "method", "model", "metric"), str),
    "seed": int,
    "sources": [str],
    "stages": [str],
    "learned_at": [Or(int)],
    "higher?": Or(bool),
    "costs": {
        **dict.fromkeys(("macs", "bytes", "seconds"), float),
        "steps?": float,
        "by_agent?": Any_(Any_(float)),
    },
    "curve": [{"score": Or(float), "macs": float, "bytes": float, "seconds?": float, "metrics?": NUMBERS}],
    "learning_curve?": [{**RECORD, "steps": float, "score": Or(float)}],
    "client_drift?": [RECORD],
    "local?": [RECORD],
    "visits?": [{**RECORD, "sources": [str]}],
    "personal?": Or(NUMBERS),
    "stopped?": [{"stage": int, "why": str, "returned": int, "score": Or(float)}],
    "versions": Any_(None),
    "config": Any_(None),
    "metrics?": Any_({"higher": Or(bool), "matrices": list}),
    "measured_by?": [str],
    "sizes?": [[int]],
    "confusion?": Or([[int]]),
    "sharing?": Any_(Any_({"parts": [str], "weights": [float], "entropy": Or(float)})),
}
