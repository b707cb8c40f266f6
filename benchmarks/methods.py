"""ReLU-reduction methods side by side: each network of `relucent-opt pareto` or `reduce`, measured as it would be served.

The test images are touched here and nowhere else, once for each network; methods and settings are chosen on validation images.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.accuracy import measure_accuracy
from benchmarks.latency import measure
from benchmarks.processes import environment
from model_opt.compiler import compile_model, fixed_point_score
from model_opt.datasets import open_dataset
from model_opt.files import check_fits, load_network
from model_opt.runs import table_row
from model_opt.training import accuracy
from protocol.errors import InputError
from protocol.model import save

CALIBRATION_IMAGES = 500


def _listed(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Networks, each with its row: all of a Pareto folder, or the one in a file. Raises InputError, NetworkFileError."""
    try:
        if path.is_dir():
            return [(path / row["file"], row) for row in json.loads((path / "pareto.json").read_text())["rows"]]
        return [(path, table_row(load_network(path)[1], path.name))]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no folder of `relucent-opt pareto` and no network of `reduce` or `train`",
                         "make one of them first") from error


def measure_methods(paths: Sequence[Path], data: Path, images: int, runs: int, done: Sequence[dict[str, Any]], say: Callable[[str], None],
                    keep: Callable[[list[dict[str, Any]]], None], dataset: str = "auto", size: int = 0) -> list[dict[str, Any]]:
    """One row for each network of `paths` with accuracies on the test images (float, fixed point, private), latency and bytes.

    A network is known by the SHA-256 of its file. Every row says when, on what and from which commit it was last measured.

    Args:
        paths: folders of `relucent-opt pareto` and files of networks. images: test images that are classified privately; the
            other two take all. runs: of the latency. dataset, size: as in `open_dataset`.
        done: rows measured before; they stay. Of their networks that are named again only the latency is measured, so that it
            can be compared with the others'. keep: called with all rows after each.
    """
    rows = [dict(row) for row in done]
    source = open_dataset(data, dataset, size)
    train, _ = source.load_train()
    test = source.load_test()
    for file, listed in [item for path in paths for item in _listed(path)]:
        name, facts = file.name, environment()
        network, info = load_network(file)
        checksum = hashlib.sha256(file.read_bytes()).hexdigest()
        check_fits(source, test.shape, info, file)
        unseen = replace(test, mean=info.mean, std=info.std)
        say(f"{name}: compiling")
        calibration = replace(train, mean=info.mean, std=info.std)[:CALIBRATION_IMAGES].normalised()
        model = compile_model(network, calibration, name=name, classes=info.classes, mean=info.mean, std=info.std, eight_bits=True)
        row = next((row for row in rows if row.get("sha256") == checksum), None)
        if row is None:
            row = {**listed, "sha256": checksum, "dataset": source.name}
            say(f"{name}: float accuracy")
            row["test_accuracy"] = accuracy(network, unseen)
            say(f"{name}: fixed-point accuracy")
            row["fixed_point_accuracy"] = fixed_point_score(model, unseen).accuracy
            with tempfile.TemporaryDirectory() as temporary:
                compiled = Path(temporary) / "model.safetensors"
                save(model, compiled)
                say(f"{name}: private accuracy")
                private = measure_accuracy(compiled, None, data, images, 32, dataset, size)
            row |= {"test_images": len(test), "private_accuracy": private["private_accuracy"], "private_images": private["images"],
                    "fixed_point_accuracy_same_images": private["fixed_point_accuracy"],
                    "private_fixed_point_agreement": private["private_fixed_point_agreement"]}
            rows.append(row)
        say(f"{name}: latency")
        timed = measure(model, info.network, info.width, batch=1, runs=runs, crypten=False, say=lambda _: None)
        row |= {"online_ms": timed["online_ms"], "online_ms_spread": timed["online_ms_spread"], "runs": timed["runs"],
                "online_bytes": timed["online_bytes_up"] + timed["online_bytes_down"], "rounds": timed["rounds"],
                "preprocessing_ms": timed["preprocessing_ms"], "preprocessing_bytes": sum(timed["preprocessing_bytes"].values()),
                "plaintext_ms": timed["plaintext_ms"], **facts}
        keep(rows)
    return rows
