"""Who may run how much at once: a fair queue over clients, and limits for each and in total."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from protocol.errors import ResourceLimit

MAX_COUNTED = 10_000


class Sessions:
    """Slots for sessions. Waiting clients take turns; within a client the first comes first.

    Args:
        slots: sessions that run at once. client_slots: of those, for one client. waiting: sessions that may wait, in total;
            client_waiting: for one client. wait_s: how long one waits before it is refused. client_rate: sessions that one client
            may begin in a minute, saved up for at most a minute; 0 for any number.
    """

    def __init__(self, slots: int, client_slots: int, waiting: int, client_waiting: int, wait_s: float, client_rate: float = 0.0,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = client_rate, clock
        self._begun: dict[str, tuple[float, float]] = {}
        self._slots, self._client_slots = slots, client_slots
        self._waiting, self._client_waiting, self._wait_s = waiting, client_waiting, wait_s
        self._running: dict[str, int] = {}
        self._queues: OrderedDict[str, deque[threading.Event]] = OrderedDict()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)

    @contextmanager
    def slot(self, client: str) -> Iterator[None]:
        """Hold a slot. Raises ResourceLimit if too many wait, or none becomes free in time."""
        turn = threading.Event()
        with self._lock:
            self._count(client)
            queue = self._queues.setdefault(client, deque())
            if sum(map(len, self._queues.values())) >= self._waiting or len(queue) >= self._client_waiting:
                self._tidy(client)
                raise ResourceLimit("too many sessions are waiting", "try again in a few seconds")
            queue.append(turn)
            self._admit()
        if not turn.wait(self._wait_s):
            with self._lock:
                if not turn.is_set():
                    self._queues[client].remove(turn)
                    self._tidy(client)
                    raise ResourceLimit("no session became free in time", "try again in a few seconds")
        try:
            yield
        finally:
            with self._lock:
                self._running[client] -= 1
                if not self._running[client]:
                    del self._running[client]
                self._admit()
                self._idle.notify_all()

    def _count(self, client: str) -> None:
        """One session more for this client. Raises ResourceLimit if it begins them too fast."""
        if not self._rate:
            return
        now = self._clock()
        saved, since = self._begun.get(client, (self._rate, now))
        saved = min(saved + self._rate * (now - since) / 60, self._rate)
        if saved < 1:
            raise ResourceLimit(f"more than {self._rate:g} sessions a minute", f"try again in {60 * (1 - saved) / self._rate:.0f} s")
        self._begun[client] = saved - 1, now
        if len(self._begun) > MAX_COUNTED:  # whoever has saved up a minute's worth is as good as new
            self._begun = {c: (s, t) for c, (s, t) in self._begun.items() if s + self._rate * (now - t) / 60 < self._rate}

    def _tidy(self, client: str) -> None:
        if not self._queues.get(client, True):
            del self._queues[client]

    def _admit(self) -> None:
        """Give free slots to the clients in turn."""
        while sum(self._running.values()) < self._slots:
            client = next((c for c in self._queues if self._running.get(c, 0) < self._client_slots), None)
            if client is None:
                return
            self._queues[client].popleft().set()
            self._running[client] = self._running.get(client, 0) + 1
            self._queues.move_to_end(client)
            self._tidy(client)

    def counts(self) -> tuple[int, int]:
        """Sessions that run and that wait."""
        with self._lock:
            return sum(self._running.values()), sum(map(len, self._queues.values()))

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing runs; whether that came in time."""
        deadline = time.monotonic() + timeout_s
        with self._idle:
            while self._running:
                if not self._idle.wait(max(deadline - time.monotonic(), 0)) and time.monotonic() >= deadline:
                    return False
        return True
