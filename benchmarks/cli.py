"""Command line of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from benchmarks.accuracy import measure_accuracy
from benchmarks.demo import MODEL, demo_images
from benchmarks.demo import demo as run_demo
from benchmarks.latency import measure
from benchmarks.networks import random_model
from model_opt.datasets import DataError
from model_opt.files import NetworkFileError
from protocol.errors import InputError
from protocol.model import load
from protocol.terminal import exit_on_error

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Measure private inference.")


@app.callback()
def _root() -> None:
    """Keeps every command a subcommand."""


def table_of(results: list[dict[str, Any]]) -> Table:
    """The human form of `measure`'s figures, one column for each network."""
    table = Table("", *(f"{r['network']} w{r['width']}, {r['relus']:,} ReLUs" for r in results))

    def row(name: str, value: Any) -> None:
        table.add_row(name, *(value(r) for r in results))

    def traffic(r: dict[str, Any]) -> str:
        return f"{r['online_bytes_up'] / 1e6:.2f} + {r['online_bytes_down'] / 1e6:.2f}"

    row("online, ms (median, min-max)", lambda r: f"{r['online_ms']:.0f} ({r['online_ms_spread'][0]:.0f}-{r['online_ms_spread'][1]:.0f})")
    row("plaintext, ms", lambda r: f"{r['plaintext_ms']:.1f}")
    row("online / plaintext", lambda r: f"{r['online_ms'] / r['plaintext_ms']:.1f}x")
    row("preprocessing, ms", lambda r: f"{r['preprocessing_ms']:.0f}")
    row("online traffic up + down, MB", traffic)
    row("preprocessing traffic, MB", lambda r: f"{sum(r['preprocessing_bytes'].values()) / 1e6:.1f}")
    row("rounds", lambda r: str(r["rounds"]))
    if any(r["crypten_ms"] is not None for r in results):
        row("CrypTen (not private), ms", lambda r: "-" if r["crypten_ms"] is None else f"{r['crypten_ms']:.0f}")
        row("CrypTen traffic, MB", lambda r: "-" if r["crypten_bytes"] is None else f"{r['crypten_bytes'] / 1e6:.0f}")
    row("peak memory client/server/dealer, MB",
        lambda r: "/".join(f"{r['peak_rss_mb'][k]:.0f}" for k in ("client", "server", "dealer")))
    return table


@app.command()
@exit_on_error("relucent-bench")
def latency(
    model: Annotated[Path | None, typer.Option(help="Compiled model; else a random network.")] = None,
    network: Annotated[str, typer.Option(help="Architecture of the random network.")] = "resnet18",
    width: Annotated[int, typer.Option(help="Its channels in the first stage.")] = 64,
    relus: Annotated[str, typer.Option(help="Its ReLUs, or 'all'; squares elsewhere.")] = "12900",
    batch: Annotated[int, typer.Option(help="Images in one inference.", min=1, max=256)] = 1,
    runs: Annotated[int, typer.Option(help="Measured runs; one more warms up.", min=1)] = 7,
    crypten: Annotated[bool, typer.Option(help="Also run the graph on CrypTen.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Private inference in three processes on loopback, beside plaintext PyTorch and CrypTen."""
    console = Console(stderr=True)
    pixels = None  # noise, which random networks are calibrated on; a trained one is used on real images only
    with Status("making the network", console=console) as status:
        if model is not None:
            loaded, network, width = load(model), model.stem, 0
            pixels = demo_images(loaded.public.input_shape, batch) if loaded.public.input_shape == (3, 32, 32) else None
        else:
            if relus != "all" and not relus.lstrip("-").isdigit():
                raise InputError(f"--relus {relus!r} is no number", "pass a count or 'all'")
            try:
                loaded = random_model(network, width, None if relus == "all" else int(relus))
            except ValueError as error:
                raise InputError(str(error)) from error
        result = measure(loaded, network, width, batch=batch, runs=runs, crypten=crypten, say=status.update, images=pixels)
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(table_of([result]))


@app.command()
@exit_on_error("relucent-bench")
def demo(
    model: Annotated[Path, typer.Option(help="Compiled CIFAR-10 model.")] = MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Classify ten bundled CIFAR-10 test images privately and show what fewer ReLUs save."""
    run_demo(model, as_json)


@app.command()
@exit_on_error("relucent-bench", DataError, NetworkFileError)
def accuracy(
    model: Annotated[Path, typer.Option(help="Compiled CIFAR-10 model.")] = MODEL,
    network: Annotated[Path | None, typer.Option(help="The float network it was compiled from; else the file's own weights.")] = None,
    data: Annotated[Path, typer.Option(help="Folder that holds cifar-10-batches-bin/.")] = Path("data"),
    images: Annotated[int, typer.Option(help="Test images, from the first.", min=1, max=10_000)] = 1000,
    batch: Annotated[int, typer.Option(help="Images in one inference.", min=1, max=256)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Float, fixed-point and private accuracy and their agreement, private in three real processes."""
    result = measure_accuracy(model, network, data, images, batch)
    if as_json:
        print(json.dumps(result))
    else:
        for key in ("float_accuracy", "fixed_point_accuracy", "private_accuracy", "private_float_agreement",
                    "private_fixed_point_agreement"):
            print(f"{key.replace('_', ' ')}: {result[key]:.2%}")
        print(f"largest difference of private and fixed-point logits: {result['max_abs_error']:.5f}")


if __name__ == "__main__":
    app()
