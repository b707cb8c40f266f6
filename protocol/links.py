"""The links that private inference is planned and measured for."""

from __future__ import annotations

from dataclasses import dataclass

TURNS_BITS_PER_S = 350e6
PIECE_S = 3e-3
"""Of a piece one way, about; on faster links than the above few layers are cut."""


@dataclass(frozen=True)
class Link:
    """Round-trip time in seconds and bits per second each way; 0 bits per second stands for no limit."""

    name: str
    rtt_s: float
    bits_per_s: float

    def least(self, rounds: int, bytes_up: int, bytes_down: int, streams: int = 1) -> float:
        """Seconds that no dialogue of these rounds can beat, its bytes split into streams at once: both directions are always busy."""
        busy = 8 * max(bytes_up, bytes_down) / self.bits_per_s if self.bits_per_s else 0.0
        return max(rounds * self.rtt_s + busy / streams, min(rounds, 1) * self.rtt_s + busy)

    def seconds(self, rounds: int, bytes_up: int, bytes_down: int, streams: int = 1) -> float:
        """Seconds of the online phase on the link: a slow one is busy in both directions at once, but for a piece of each round; on a
        fast one the parties take turns, since pieces would cost more than they save (`server/pacing.py`)."""
        if self.bits_per_s > TURNS_BITS_PER_S and streams == 1:
            return self.least(rounds, bytes_up + bytes_down, 0, streams)
        return self.least(rounds, bytes_up, bytes_down, streams) + (rounds * PIECE_S if self.bits_per_s else 0.0)


LINKS = {link.name: link for link in (
    Link("loopback", 0.0, 0.0), Link("lan", 0.5e-3, 1e9), Link("wan", 80e-3, 100e6), Link("mobile", 60e-3, 20e6))}
