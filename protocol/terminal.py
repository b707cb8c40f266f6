"""What every command line does with errors: one line, a hint, an exit code, and no traceback for a user's mistake."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from protocol.errors import InputError, RelucentError, one_line

P = ParamSpec("P")


def exit_on_error(program: str, *also: type[Exception]) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate a command: errors of ours, and those of the types `also`, end it with a line on stderr.

    A full disk is one such line, too. Exit code 2 for the user's own input, 1 for everything else; those of the types `also` are input
    unless they have an `exit_code`.
    """

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                command(*args, **kwargs)
            except RelucentError as error:
                fail(program, str(error), error.hint, 2 if isinstance(error, InputError) else 1)
            except also as error:
                fail(program, str(error), getattr(error, "hint", ""), getattr(error, "exit_code", 2))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                fail(program, f"cannot write {error.filename or 'a temporary file'}: {error.strerror}", "free some space", 1)
            except KeyboardInterrupt:
                fail(program, "interrupted", "", 130)

        return run

    return decorate


def fail(program: str, message: str, hint: str, code: int) -> None:
    """Print `program: error: ...`, the hint if there is one, and exit with `code`."""
    print(f"{program}: error: {one_line(message, 4000)}", file=sys.stderr)
    if hint:
        print(f"{program}: hint: {one_line(hint)}", file=sys.stderr)
    raise SystemExit(code)
