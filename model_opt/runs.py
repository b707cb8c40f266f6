"""Facts about training runs: how long they took, on what, and what they made."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model_opt.files import NetworkInfo
from model_opt.methods import count_all
from model_opt.training import world

FOUND = ("command", "relus", "total", "validation_accuracy", "validation_images", "minutes", "epochs_spent", "hardware", "torch", "details")
"""What `made_by` holds beside the settings."""


def _logs(folder: Path) -> list[dict[str, str]]:
    """The rows of all logs in a run folder, one for each epoch, resumed parts included."""
    rows: list[dict[str, str]] = []
    for log in sorted(folder.rglob("log.csv")):
        with log.open(newline="") as lines:
            rows += csv.DictReader(lines)
    return rows


def minutes_spent(*folders: Path) -> float:
    """Minutes of training over all logs in run folders."""
    return round(sum(float(row["seconds"]) for folder in folders for row in _logs(folder)) / 60, 1)


def epochs_spent(*folders: Path) -> int:
    """Epochs over all logs in run folders: searches, probes and candidates count too."""
    return sum(len(_logs(folder)) for folder in folders)


def describe_hardware() -> str:
    """The GPU's name and how many processes use one each, or the processor's with the number of cores."""
    if torch.cuda.is_available():
        return f"{world()[1]} x {torch.cuda.get_device_name()}"
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    return f"{processor}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def lineage(made_by: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of all runs that made a network, the first one first, each without its "from"."""
    before = lineage(made_by["from"]) if "from" in made_by else []
    return [*before, {key: value for key, value in made_by.items() if key != "from"}]


def reduction(made_by: dict[str, Any]) -> dict[str, Any]:
    """The facts of the last reduction in a network's lineage; empty if it has all its ReLUs."""
    return next((part for part in reversed(lineage(made_by)) if part.get("command") == "reduce"), {})


def all_runs(made_by: dict[str, Any]) -> list[dict[str, Any]]:
    """Its lineage and the runs that made what was averaged into it, each once."""
    found: list[dict[str, Any]] = []
    for part in lineage(made_by):
        own = {key: value for key, value in part.items() if key != "besides"}
        found += [run for run in (*part.get("besides", ()), own) if run not in found]
    return found


def taken_in(infos: Sequence[NetworkInfo]) -> int:
    """How many validation images, the first ones, any training of these networks or of their ancestors took in."""
    return max((run.get("fold_in", 0) for info in infos for run in all_runs(info.made_by)), default=0)


def folded_data(infos: Sequence[NetworkInfo]) -> set[str]:
    """Digests of the labels of the validation images of which trainings of these networks or their ancestors took some in, if known."""
    return {run["validation_data"] for info in infos for run in all_runs(info.made_by) if run.get("fold_in") and "validation_data" in run}


def averaged(infos: Sequence[NetworkInfo]) -> dict[str, Any]:
    """`made_by` of an average: it goes on from the last; "besides" has the runs that made only the others. Training took no time."""
    own = all_runs(infos[-1].made_by)
    besides: list[dict[str, Any]] = []
    for info in infos:
        besides += [run for run in all_runs(info.made_by) if run not in own and run not in besides]
    return {"command": "average", "epochs": 0, "minutes": 0.0, "hardware": describe_hardware(), "besides": besides,
            "from": infos[-1].made_by}


def table_row(info: NetworkInfo, file: str) -> dict[str, Any]:
    """A network's row in tables of methods; a teacher's too. Raises KeyError for a file of an earlier version.

    Epochs, minutes and hardware include all runs of its lineage and all that was averaged into it. `earlier` has the settings of those
    before its last reduction, `later` of those after it; the validation accuracy is that of the last.
    """
    parts, runs, reduced = lineage(info.made_by), all_runs(info.made_by), reduction(info.made_by)
    made_by, last = reduced or parts[0], parts[-1]
    earlier, later = parts[: parts.index(made_by)], parts[parts.index(made_by) + 1 :]
    if reduced:
        method, options = made_by["method"], made_by["options"]
        label = method + ":" * bool(options) + ",".join(f"{name}={value}" for name, value in options.items())
        relus, budget, degree = made_by["relus"], made_by["budget"], options.get("degree", 2 if method == "autorep" else 0)
        if method == "cost":  # which takes lines where its target pays for no pixel beyond the ReLUs
            degree = 2 if made_by.get("details", {}).get("squares", 1) else 1
    else:
        method, label, degree = "none", "all ReLUs", None
        relus = budget = count_all(info.build(), info.input_shape)
    return {"label": label, "method": method, "network": info.network, "width": info.width, "relus": relus, "budget": budget, "file": file,
            "degree": degree, "validation_accuracy": last["validation_accuracy"], "test_accuracy": None, "seed": made_by["seed"],
            "epochs": sum(int(run.get("epochs_spent", run["epochs"])) for run in runs),
            "hardware": " and ".join(dict.fromkeys(run["hardware"] for run in runs)),
            "minutes": round(sum(run["minutes"] for run in runs), 1), "torch": made_by.get("torch", ""),
            "settings": {key: value for key, value in made_by.items() if key not in FOUND}, "details": made_by.get("details", {}),
            **({name: last[name] for name in ("fold_in", "validation_images")} if last.get("fold_in") else {}),
            **({"earlier": earlier} if earlier else {}), **({"later": later} if later else {})}
