"""Signals: how work is interrupted, and cleans up before it ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

# Windows has no SIGHUP, which a terminal sends when it is closed.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that end a process which does not handle them."""


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that receives the number of SIGINT, SIGTERM or SIGHUP; a second signal stops at once."""
    stop: list[int] = []

    def handle(number: int, frame: Any) -> None:
        # A second signal must stop a run that hangs.
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    with _handled({number: handle for number in (signal.SIGINT, *ENDING) if not _ignored(number)}):
        yield stop


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does: what is half done is cleaned up."""

    def handle(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(f"ended by {signal.Signals(number).name}.")

    # A handler of the user's program stays.
    free = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    with _handled(dict.fromkeys(free, handle)):
        yield


def _ignored(number: int) -> bool:
    """Whether `nohup` asked for a signal to be ignored."""
    return number in ENDING and signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def _handled(handlers: Mapping[int, Callable[[int, Any], None]]) -> Iterator[None]:
    """Handle signals; in other threads than the main one Python cannot, and nothing changes."""
    old: dict[int, Any] = {}
    with suppress(ValueError):
        for number, handler in handlers.items():
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
