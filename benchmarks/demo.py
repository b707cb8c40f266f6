"""The demonstration: ten real images classified privately by three processes, and what the reduced ReLU count saves."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.latency import measure_plaintext
from benchmarks.processes import serving
from protocol.errors import PeerError
from protocol.images import load_image
from protocol.inference import normalise_images
from protocol.model import RELU, Model, load, save
from protocol.plaintext import Plaintext

ROOT = Path(__file__).resolve().parent
MODEL = ROOT.parent / "models" / "cifar10-resnet18-w64.safetensors"
IMAGES = ROOT / "demo_images"
ALL_RELU_RUNS = 3
COMPARISON_BITS = 19
"""Of the bundled models with ReLUs; one without any has none to measure the range of."""


def demo_images(shape: tuple[int, ...], batch: int) -> np.ndarray[Any, Any]:
    """The bundled images as uint8 (runs, batch, C, H, W), repeated to fill batches; ten runs at batch 1."""
    pixels = np.stack([load_image(path, shape)[0].numpy() for path in sorted(IMAGES.glob("*.png"))])
    runs = max(1, len(pixels) // batch)
    index = np.arange(runs * batch) % len(pixels)
    return pixels[index].reshape(runs, batch, *shape)


def with_all_relus(model: Model) -> Model:
    """The same shapes with a ReLU at every pixel, compared at the usual width at least; for timing only: its results mean nothing."""
    public = model.public
    masks = {name: torch.full_like(mask, RELU) for name, mask in public.masks.items()}
    point = replace(public.fixed_point, comparison_bits=max(public.fixed_point.comparison_bits, COMPARISON_BITS))
    return Model(replace(public, masks=masks, fixed_point=point, name=f"{public.name}-all-relu"), model.private)


def run_client(model: Path, images: np.ndarray[Any, Any], runs: int, label: str, console: Console) -> dict[str, Any]:
    """Dealer, server and client as three processes on loopback; the client's figures."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=runs)
        path = Path(folder) / "images.npy"
        np.save(path, images)
        with serving(model) as roles:
            command = [sys.executable, "-m", "benchmarks.client_role", roles.server, roles.dealer, str(path), str(runs), folder]
            # The figures go to a file: a pipe that nobody reads while the progress is followed would fill and stop the client.
            figures = Path(folder) / "figures.json"
            with figures.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) as process:
                assert process.stderr is not None
                last = ""
                for line in process.stderr:
                    last = line.strip() or last
                    if line.startswith("run "):
                        bar.advance(task)
            if process.returncode != 0:
                raise PeerError(f"the client failed: {last}")
            result: dict[str, Any] = json.loads(figures.read_bytes())
    return result


def demo(model: Path, as_json: bool) -> None:
    """Run and print. Raises ModelFileError if the model is missing."""
    console = Console(stderr=True)
    loaded = load(model)
    files = sorted(IMAGES.glob("*.png"))
    images = demo_images(loaded.public.input_shape, 1)
    pixels = torch.from_numpy(images[:, 0])
    truth = [path.stem.split("-", 1)[1] for path in files]
    private = run_client(model, images, len(files), f"{loaded.public.relus:,} ReLUs", console)
    every = with_all_relus(loaded)
    with tempfile.TemporaryDirectory() as folder:
        all_path = Path(folder) / "all-relu.safetensors"
        save(every, all_path)
        compared = run_client(all_path, images, ALL_RELU_RUNS, f"{every.public.relus:,} ReLUs", console)
    plain = Plaintext(loaded)
    with torch.inference_mode():
        plain_labels = [loaded.public.classes[int(i)] for i in plain(normalise_images(pixels, loaded.public).float()).argmax(1)]
    private_labels = [loaded.public.classes[int(np.argmax(run[0]))] for run in private["logits"]]
    columns = [_costs(loaded, private, images), _costs(every, compared, images)]
    if as_json:
        rows = [{"image": f.name, "private": a, "plaintext": b, "true": c}
                for f, a, b, c in zip(files, private_labels, plain_labels, truth)]
        print(json.dumps({"images": rows, "reduced": columns[0], "all_relu": columns[1]}))
        return
    table = Table("image", "private", "plaintext", "true", title="Classified privately: the server saw neither image nor label")
    for path, mine, plainly, true in zip(files, private_labels, plain_labels, truth):
        table.add_row(path.name, mine, plainly, true)
    output = Console()
    output.print(table)
    output.print(_cost_table(columns))


def _costs(model: Model, run: dict[str, Any], images: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Medians of one network; the first run warms up where there are several."""
    online, preprocessing = ([r["seconds"] for r in run[k]][1:] for k in ("online", "preprocessing"))
    last, before = run["online"][-1], run["preprocessing"][-1]
    return {
        "relus": model.public.relus, "runs": len(online),
        "online_ms": statistics.median(online) * 1e3, "preprocessing_ms": statistics.median(preprocessing) * 1e3,
        "plaintext_ms": statistics.median(measure_plaintext(model, images, 10)) * 1e3,
        "online_bytes_up": last["bytes_up"], "online_bytes_down": last["bytes_down"], "rounds": last["rounds"],
        "client_to_server_bytes": before["bytes_up"], "dealer_to_client_bytes": before["dealer_bytes"],
        "dealer_to_server_bytes": before["dealer_to_server_bytes"]}


def _cost_table(columns: list[dict[str, Any]]) -> Table:
    reduced, full = columns
    table = Table("per image (median)", f"{reduced['relus']:,} ReLUs", f"all {full['relus']:,} ReLUs", "saved",
                  title="What fewer ReLUs save (the all-ReLU network has the same shape; only its cost is meaningful)")
    rows = [("online time", "online_ms", "ms", 1.0), ("preprocessing time", "preprocessing_ms", "ms", 1.0),
            ("plaintext time", "plaintext_ms", "ms", 1.0), ("online, client to server", "online_bytes_up", "MB", 1e-6),
            ("online, server to client", "online_bytes_down", "MB", 1e-6), ("online rounds", "rounds", "", 1.0),
            ("preprocessing, client to server", "client_to_server_bytes", "MB", 1e-6),
            ("preprocessing, dealer to client", "dealer_to_client_bytes", "MB", 1e-6),
            ("preprocessing, dealer to server", "dealer_to_server_bytes", "MB", 1e-6)]
    for name, key, unit, scale in rows:
        values = [c[key] * scale for c in columns]
        shown = [f"{v:.0f} {unit}" if key == "rounds" or v >= 100 else f"{v:.2f} {unit}" for v in values]
        table.add_row(name, *shown, f"{values[1] / values[0]:.1f}x")
    return table
