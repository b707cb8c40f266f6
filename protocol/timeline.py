"""Where the time of one party's online phase goes: every moment belongs to one kind of work in one layer."""

from __future__ import annotations

from collections.abc import Callable

KINDS = ("setup", "linear", "elementwise", "squares", "comparison", "send", "wait")
"""Until the first message, opening of the call and taking of material included; private maps; truncation, masks and copies; squares;
DCF evaluation; handing messages over; waiting for the peer."""


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

    def totals(self) -> dict[str, float]:
        """Seconds of each kind."""
        return {kind: sum(laps.get(kind, 0.0) for _, laps in self.layers) for kind in KINDS}

    def describe(self) -> list[dict[str, object]]:
        """The layers as JSON-ready dictionaries, milliseconds by kind."""
        return [{"layer": name, **{kind: round(1e3 * seconds, 4) for kind, seconds in laps.items()}} for name, laps in self.layers]
