"""The `looptap` command from outside: its exit codes, and what it says where something went wrong."""

import os
import sys
import time
import traceback

from .. import __version__
from ..errors import FULL, UserError
from .commands import app

EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h


def main() -> None:
    """Run the command line.

    What a user can act on ends in one message and exit code 2, an unfinished capture in 1, Ctrl-C in 130, a
    fault of looptap in its traceback and 70.
    """
    started_s = time.perf_counter()
    try:
        if sys.argv[1:] == ["--version"]:
            print(f"looptap {__version__}")
            code = 0
        else:
            code = app.cli(
                prog="looptap",
                description="Activation capture for looped language models. looptap --version says which "
                "looptap this is.",
            )
        sys.stdout.flush()
    except KeyboardInterrupt:
        after = time.perf_counter() - started_s
        print(
            f"\nstopped after {after:.0f} s; what is committed is safe, the same command continues",
            file=sys.stderr,
        )
        code = 130
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` does
        _leave_stdout()
        code = 1
    except UserError as error:
        print(f"looptap: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        code = _full_disk(error) if error.errno in FULL else _fault()
    except Exception:
        code = _fault()
    sys.exit(code)


def _full_disk(error: OSError) -> int:
    """Prints that there is no room for standard output or temporary files; returns the exit code."""
    where = error.filename or "standard output or temporary files"
    print(
        f"looptap: no room left for {where} ({error.strerror}): make room and run it again", file=sys.stderr
    )
    try:
        sys.stdout.flush()
    except OSError:
        _leave_stdout()
    return 2


def _fault() -> int:
    """Prints the error that is being handled as a fault of looptap; returns the exit code."""
    traceback.print_exc()
    print(
        "looptap: this is a fault of looptap, not of what it was given: please report it with the lines "
        f"above and the command (version {__version__})",
        file=sys.stderr,
    )
    return EXIT_FAULT


def _leave_stdout() -> None:
    """Sends what is left in stdout's buffer nowhere, since Python would complain about it on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
