"""Facts about training runs: how long they took, and on what."""

from __future__ import annotations

import csv
import os
import platform
from pathlib import Path

import torch


def minutes_spent(folder: Path) -> float:
    """Minutes of training over all logs in a run folder, resumed parts included."""
    seconds = 0.0
    for log in folder.rglob("log.csv"):
        with log.open(newline="") as rows:
            seconds += sum(float(row["seconds"]) for row in csv.DictReader(rows))
    return round(seconds / 60, 1)


def describe_hardware() -> str:
    """The GPU's name, or the processor's with the number of cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    return f"{processor}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
