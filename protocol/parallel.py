"""Work in parts, one for each core, on threads that stay.

OpenMP gives every thread that asks for it a team of its own, so every session a new one, and kernels that wake a sleeping thread on the
waker's core, as seen in virtual machines, then have the team take turns on one core: 8-bit matrix products took twice as long. Sessions
share these threads, so many of them do not fight for the cores either.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import TypeVar

import torch

Part = TypeVar("Part")


def cores() -> int:
    """Cores that PyTorch uses: `OMP_NUM_THREADS`, or all."""
    return torch.get_num_threads()


_making = threading.Lock()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """A thread for each core, tied to it if these are all cores that the process may use."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    together, numbers = threading.Barrier(threads), itertools.count()

    def start() -> None:
        torch.set_num_threads(1)  # within a part
        torch.get_num_threads()  # the first call in a thread takes the number that was set last
        if len(allowed) == threads:
            with suppress(OSError):  # not allowed here: the kernel places the thread
                os.sched_setaffinity(threading.get_native_id(), {allowed[next(numbers)]})

    pool = ThreadPoolExecutor(threads, "parts", start)
    for _ in pool.map(lambda _: together.wait(), range(threads)):
        pass
    torch.set_num_threads(threads)
    return pool


def run(work: Callable[[Part], None], parts: Sequence[Part]) -> None:
    """work(part) for every part, as many at once as there are cores. Raises what the first failing part raised."""
    if len(parts) == 1 or cores() == 1:
        for part in parts:
            work(part)
        return
    with _making:
        pool = _pool(cores())
    for _ in pool.map(work, parts):
        pass


def _after_fork() -> None:
    """In a child: threads do not survive a fork, and nobody else holds the lock."""
    _making.release()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_after_fork)
