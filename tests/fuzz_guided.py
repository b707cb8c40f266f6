"""Fuzzing guided by coverage, for as long as you like; what it finds new goes into the first folder.

    pip install atheris && python -m tests.fuzz_guided TARGET FOUND tests/corpus/TARGET [-max_total_time=3600]
"""

from __future__ import annotations

import sys


def main() -> None:
    """Fuzz one target until it is stopped or fails."""
    import atheris

    import protocol.kernels  # noqa: F401 - compiled by numba, which takes no instrumented bytecode

    with atheris.instrument_imports(include=["protocol", "server"]):
        from tests.fuzzing import TARGETS

    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
