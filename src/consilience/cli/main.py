"""The command line: dispatch, help and exit codes.

Nothing here or in the modules of the commands imports torch before a command needs it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from consilience.cli.check import check
from consilience.cli.choose import choose
from consilience.cli.compare import compare
from consilience.cli.demo import demo
from consilience.cli.diagnose import diagnose
from consilience.cli.distil import distil
from consilience.cli.exmodel import exmodel
from consilience.cli.experts import experts
from consilience.cli.merge import merge
from consilience.cli.methods import methods
from consilience.cli.options import COMMANDS
from consilience.cli.report import report
from consilience.cli.run import run
from consilience.core.errors import ConsilienceError, Interrupted, unknown
from consilience.core.names import clean
from consilience.core.signals import ended_by_signals

CALLS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run,
    "compare": compare,
    "diagnose": diagnose,
    "choose": choose,
    "distil": distil,
    "exmodel": exmodel,
    "experts": experts,
    "methods": methods,
    "merge": merge,
    "report": report,
    "check": check,
    "demo": demo,
}
"""The function of each command: it takes the words after the command's name and returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 for success, 2 for bad input (one line on stderr), 130 for Ctrl-C, SIGTERM or SIGHUP.

    1 is for damage that `check` found, and for a reader of a pipe that closed it.
    """
    if argv is None:
        # A warning of the library is for the user; where it was raised is not.
        warnings.formatwarning = lambda message, *_: f"warning: {clean(message)}\n"
    try:
        # Ended by a signal, a command deletes what it has written by half.
        with ended_by_signals():
            return dispatch(list(sys.argv[1:] if argv is None else argv))
    except (Interrupted, KeyboardInterrupt) as error:
        return fail(str(error) or "interrupted.", 130)
    except ConsilienceError as error:
        return fail(str(error), 2)
    except BrokenPipeError:
        # The reader of a pipe, such as head, has closed it; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return fail(f"cannot read or write{where}: {error.strerror or error}.", 2)


def dispatch(argv: list[str]) -> int:
    """Call the command that the first word names."""
    name = argv[0] if argv else ""
    if name in ("", "-h", "--help"):
        lines = "\n".join(f"  {key:9}{summary.text}" for key, summary in COMMANDS.items())
        print(f"usage: consilience COMMAND [options]\n\n{lines}\n\nconsilience COMMAND --help says more.")
        return 0 if argv else 2
    if name == "--version":
        from consilience.version import __version__

        print(__version__)
        return 0
    # A typing mistake in the command is the most frequent one.
    if name not in CALLS:
        raise unknown("command", name, CALLS)
    return CALLS[name](argv[1:])


def fail(text: str, code: int) -> int:
    """Print an error as one line on stderr, and return the exit code."""
    # Names in it may come from files, with control characters for the terminal.
    print(clean(text), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
