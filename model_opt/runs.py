"""Facts about training runs: how long they took, on what, and what they made."""

from __future__ import annotations

import csv
import os
import platform
from pathlib import Path
from typing import Any

import torch

from model_opt.files import NetworkInfo

FOUND = ("command", "relus", "total", "validation_accuracy", "minutes", "hardware", "torch", "details")
"""What `made_by` of a reduced network holds beside the settings."""


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


def table_row(info: NetworkInfo, file: str) -> dict[str, Any]:
    """A reduced network's row in tables of methods; ValueError for a network that no method reduced.

    Epochs and minutes include the training that went on from the reduced network (`train --from`); `later` has its settings, and
    the validation accuracy is that of the last.
    """
    later: list[dict[str, Any]] = []
    made_by = last = info.made_by
    while "from" in made_by:
        later.insert(0, {key: value for key, value in made_by.items() if key != "from"})
        made_by = made_by["from"]
    if made_by.get("command") != "reduce":
        raise ValueError(f"{file} was not made by `relucent-opt reduce` or `pareto`")
    options = made_by["options"]
    label = made_by["method"] + ":" * bool(options) + ",".join(f"{name}={value}" for name, value in options.items())
    return {"label": label, "method": made_by["method"], "network": info.network, "width": info.width, "relus": made_by["relus"],
            "budget": made_by["budget"], "file": file,
            "degree": options.get("degree", 2 if made_by["method"] in ("autorep", "cost") else 0),
            "validation_accuracy": last["validation_accuracy"], "test_accuracy": None, "seed": made_by["seed"],
            "epochs": sum(part["epochs"] for part in (made_by, *later)), "hardware": last["hardware"],
            "minutes": round(sum(part["minutes"] for part in (made_by, *later)), 1), "torch": made_by["torch"],
            "settings": {key: value for key, value in made_by.items() if key not in FOUND}, "details": made_by["details"],
            **({"later": later} if later else {})}
