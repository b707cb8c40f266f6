"""The links that private inference is planned and measured for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """Round-trip time in seconds and bits per second each way; 0 bits per second stands for no limit."""

    name: str
    rtt_s: float
    bits_per_s: float

    def seconds(self, rounds: int, bytes_up: int, bytes_down: int) -> float:
        """Least time on the link of a dialogue whose answers begin while the questions still arrive: both directions are busy at once."""
        return rounds * self.rtt_s + (8 * max(bytes_up, bytes_down) / self.bits_per_s if self.bits_per_s else 0.0)


LINKS = {link.name: link for link in (
    Link("loopback", 0.0, 0.0), Link("lan", 0.5e-3, 1e9), Link("wan", 80e-3, 100e6), Link("mobile", 60e-3, 20e6))}
