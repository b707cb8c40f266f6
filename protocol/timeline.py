"""Where the time of one party's phase goes: every moment belongs to one kind of work in one layer."""

from __future__ import annotations

from collections.abc import Callable

from protocol.channel import Buffer, Receiver, Sender

KINDS = ("setup", "linear", "elementwise", "squares", "comparison", "send", "wait")
"""Of the online phase. Until the first message, opening of the call and taking of material included; private maps; truncation, masks and
copies; squares; DCF evaluation; handing messages over; waiting for the peer."""
PREPROCESSING_KINDS = ("setup", "linear", "randomness", "keys", "elementwise", "send", "wait", "store")
"""Likewise; and expanding seeds; making DCF keys; putting the material into the stock. Squares are elementwise here."""


class Timeline:
    """Laps of a clock. Without a clock nothing is recorded, and nothing costs time.

    Args:
        clock: seconds, monotonic. started: when the first lap began; default now.
    """

    def __init__(self, clock: Callable[[], float] | None = None, started: float | None = None) -> None:
        self._clock = clock
        self._last = started if started is not None else clock() if clock is not None else 0.0
        self._current: dict[str, float] = {}
        self.layers: list[tuple[str, dict[str, float]]] = []

    def lap(self, kind: str) -> None:
        """The time since the last lap went into `kind`."""
        if self._clock is not None:
            now = self._clock()
            self._current[kind] = self._current.get(kind, 0.0) + now - self._last
            self._last = now

    def close(self, layer: str) -> None:
        """All laps since the last close belong to `layer`."""
        if self._clock is not None:
            self.layers.append((layer, self._current))
            self._current = {}

    def describe(self) -> list[dict[str, object]]:
        """The layers as JSON-ready dictionaries, milliseconds by kind."""
        return [{"layer": name, **{kind: round(1e3 * seconds, 4) for kind, seconds in laps.items()}} for name, laps in self.layers]


class TimedReceiver:
    """A receiver whose every message is waited for; the time before it was elementwise work."""

    def __init__(self, source: Receiver, timeline: Timeline) -> None:
        self._source, self._timeline = source, timeline

    def receive(self, length: int) -> bytearray:
        self._timeline.lap("elementwise")
        data = self._source.receive(length)
        self._timeline.lap("wait")
        return data


class TimedSender:
    """A sender whose messages are handed over; the time before each was elementwise work."""

    def __init__(self, target: Sender, timeline: Timeline) -> None:
        self._target, self._timeline = target, timeline

    def send(self, *parts: Buffer) -> None:
        self._timeline.lap("elementwise")
        self._target.send(*parts)
        self._timeline.lap("send")
