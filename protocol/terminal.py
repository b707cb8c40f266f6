"""What every command line does with errors: one line, a hint, an exit code, and no traceback for a user's mistake."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import typer

from protocol.errors import InputError, RelucentError, one_line, out_of_memory

P = ParamSpec("P")


class Program(typer.Typer):
    """The commands of one program. What is wrong with its options, too, is one line on stderr and a hint, exit code 2."""

    def __init__(self, name: str, help: str) -> None:
        super().__init__(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=help)
        self.program = name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            code = super().__call__(*args, **kwargs, prog_name=self.program, standalone_mode=False)
        except Exception as error:
            if not hasattr(error, "format_message"):  # the base of typer's own errors, which has moved between its versions
                raise
            if "NoArgs" in type(error).__name__:  # help was asked for by saying nothing
                error.show()  # type: ignore[attr-defined]
                raise SystemExit(error.exit_code) from None  # type: ignore[attr-defined]
            context = getattr(error, "ctx", None)
            fail(self.program, error.format_message(), f"see `{context.command_path if context else self.program} --help`", 2)
        if code:
            raise SystemExit(code)


PATH_ERRORS = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


def exit_on_error(program: str, *also: type[Exception]) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate a command: errors of ours, and those of the types `also`, end it with a line on stderr.

    A full disk, a file or folder that may not be used, and memory that runs out are one such line, too. Exit code 2 for the user's own
    input, 1 for everything else; those of the types `also` are input unless they have an `exit_code`.
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
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    fail(program, f"cannot write {error.filename or 'a temporary file'}: {error.strerror}", "free some space", 1)
                if not isinstance(error, PATH_ERRORS) or not error.filename:
                    raise
                fail(program, f"cannot use {error.filename}: {error.strerror}", "check the path and its permissions", 2)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                fail(program, "out of memory", "use a smaller batch or network, or a machine with more memory", 1)
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
