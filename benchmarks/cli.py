"""Command line of the benchmarks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from benchmarks.accuracy import measure_accuracy
from benchmarks.demo import MODEL, demo_images
from benchmarks.demo import demo as run_demo
from benchmarks.emulation import check_emulation
from benchmarks.latency import measure, run_side_by_side
from benchmarks.load import measure_load
from benchmarks.methods import measure_methods
from benchmarks.networks import random_model
from benchmarks.peers.run import PEERS
from benchmarks.report import load_results, make_report, network_name
from benchmarks.sweep import points, run_sweep
from model_opt.cli import DatasetName, ImageSize
from model_opt.compiler import CompileError
from model_opt.datasets import DataError
from model_opt.files import NetworkFileError
from model_opt.training import write_atomically
from protocol.errors import InputError, StorageError
from protocol.links import LINKS
from protocol.model import Model, load
from protocol.terminal import Program, exit_on_error

app = Program("relucent-bench", "Measure private inference.")
MAX_BATCH = 256
"""Of the server."""
Emulation = Annotated[str, typer.Option(help="How slow links are made: netem (Linux, root), relay, or auto: netem where it works.")]


@app.callback()
def _root() -> None:
    """Keeps every command a subcommand."""


def table_of(results: list[dict[str, Any]]) -> Table:
    """The human form of `measure`'s figures, one column for each network."""
    table = Table("", *(f"{network_name(r)}, {r['relus']:,} ReLUs" for r in results))

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


def _own_images(file: Path | None, model: Model, batch: int) -> np.ndarray[Any, Any] | None:
    """What a model is measured on: a trained one, from a file, real images; None for noise, which random networks are calibrated on."""
    return demo_images(model.public.input_shape, batch) if file is not None and model.public.input_shape == (3, 32, 32) else None


@app.command()
@exit_on_error("relucent-bench")
def latency(
    model: Annotated[Path | None, typer.Option(help="Compiled model; else a random network.")] = None,
    network: Annotated[str, typer.Option(help="Architecture of the random network.")] = "resnet18",
    width: Annotated[int, typer.Option(help="Its channels in the first stage.")] = 64,
    relus: Annotated[str, typer.Option(help="Its ReLUs, or 'all'; squares elsewhere.")] = "12900",
    batch: Annotated[int, typer.Option(help="Images in one inference.", min=1, max=MAX_BATCH)] = 1,
    runs: Annotated[int, typer.Option(help="Measured runs; one more warms up.", min=1)] = 7,
    crypten: Annotated[bool, typer.Option(help="Also run the graph on CrypTen (batch 1).")] = True,
    link: Annotated[str, typer.Option(help="Between client and the others: loopback, lan, wan, mobile.")] = "loopback",
    emulation: Emulation = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Private inference in three processes, beside plaintext PyTorch and CrypTen."""
    if link not in LINKS:
        raise InputError(f"unknown link {link!r}", f"known are {', '.join(LINKS)}")
    check_emulation(emulation)
    console = Console(stderr=True)
    pixels = None
    with Status("making the network", console=console) as status:
        if model is not None:
            loaded, network, width = load(model), model.stem, 0
            pixels = _own_images(model, loaded, batch)
        else:
            if relus != "all" and not relus.lstrip("-").isdigit():
                raise InputError(f"--relus {relus!r} is no number", "pass a count or 'all'")
            try:
                loaded = random_model(network, width, None if relus == "all" else int(relus))
            except ValueError as error:
                raise InputError(str(error)) from error
        result = measure(loaded, network, width, batch=batch, runs=runs, crypten=crypten, say=status.update, images=pixels,
                         link=LINKS[link], emulation=emulation)
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
    data: Annotated[Path, typer.Option(help="Folder that holds the data set in its official layout.")] = Path("data"),
    dataset: DatasetName = "auto",
    image_size: ImageSize = 0,
    images: Annotated[int, typer.Option(help="Test images, from the first.", min=1)] = 1000,
    batch: Annotated[int, typer.Option(help="Images in one inference.", min=1, max=MAX_BATCH)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Float, fixed-point and private accuracy and their agreement, private in three real processes."""
    result = measure_accuracy(model, network, data, images, batch, dataset, image_size)
    if as_json:
        print(json.dumps(result))
    else:
        for key in ("float_accuracy", "fixed_point_accuracy", "private_accuracy", "private_float_agreement",
                    "private_fixed_point_agreement"):
            print(f"{key.replace('_', ' ')}: {result[key]:.2%}")
        print(f"largest difference of private and fixed-point logits: {result['max_abs_error']:.5f}")


def _numbers(text: str, what: str, words: dict[str, int | None] | None = None) -> list[int | None]:
    try:
        return [(words or {})[part] if part in (words or {}) else int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{what} {text!r} is no list of numbers", "separate them with commas") from error


def _counts(text: str, what: str, least: int = 1, most: int | None = None) -> list[int]:
    counts = [n or 0 for n in _numbers(text, what)]
    if min(counts) < least:
        raise InputError(f"{what} {text!r} has a number below {least}", f"count from {least}")
    if most is not None and max(counts) > most:
        raise InputError(f"{what} {text!r} has a number above {most}", f"stay within {most}")
    return counts


def _unfinished(out: Path) -> Path:
    """Where a long measurement keeps what it has: the last whole one stays until this one is whole."""
    return out.with_stem(f"{out.stem}-unfinished")


def _keeper(out: Path) -> Callable[[dict[str, Any]], None]:
    return lambda result: _write_json(_unfinished(out), result)


def _store(result: dict[str, Any], out: Path, as_json: bool) -> None:
    result |= {"command": "relucent-bench " + " ".join(sys.argv[1:])}
    _write_json(out, result)
    _unfinished(out).unlink(missing_ok=True)
    if as_json:
        print(json.dumps(result))
    else:
        print(f"wrote {out}; `relucent-bench report` draws it")


def _write_json(out: Path, result: dict[str, Any]) -> None:
    try:
        write_atomically(out, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}", "free some space, or name another file") from error


RESULTS = Path("benchmarks/results")
AsJson = Annotated[bool, typer.Option("--json", help="Also print the JSON.")]


@app.command()
@exit_on_error("relucent-bench")
def sweep(
    relus: Annotated[str, typer.Option(help="ReLU counts; 'all' keeps all. The first is the base.")] = "12900,0,1000,6000,50000,100000,all",
    networks: Annotated[str, typer.Option(help="Architectures; the first is the base, the others have their standard width.")] =
    "resnet18,resnet34",
    squares: Annotated[str, typer.Option(help="Percent of the pixels without a ReLU that square; the first is the base.")] = "100,50,10",
    widths: Annotated[str, typer.Option(help="Channels of the first stage; the first is the base.")] = "64,32,16",
    batches: Annotated[str, typer.Option(help="Images in one inference; the first is the base.")] = "1,8,32",
    links: Annotated[str, typer.Option(help="loopback, lan, wan, mobile; the first is the base.")] = "loopback,lan,wan,mobile",
    emulation: Emulation = "auto",
    runs: Annotated[int, typer.Option(help="Measured runs of each, fewer on slow links; one more warms up.", min=1)] = 7,
    out: Annotated[Path, typer.Option(help="Where to store the JSON.")] = RESULTS / "sweep.json",
    as_json: AsJson = False,
) -> None:
    """Vary ReLUs, squares, network, width and batch around one base, on every link; fit what a ReLU and a square cost."""
    names = links.split(",")
    if unknown := [n for n in names if n not in LINKS]:
        raise InputError(f"unknown link {unknown[0]!r}", f"known are {', '.join(LINKS)}")
    check_emulation(emulation)
    with Status("starting", console=Console(stderr=True)) as status:
        try:
            shares = [n / 100 for n in _counts(squares, "--squares", 0, 100)]
            result = run_sweep(points(networks.split(","), _counts(widths, "--widths"),
                                      _numbers(relus, "--relus", {"all": None}), shares,
                                      _counts(batches, "--batches", most=MAX_BATCH), names), runs, status.update,
                               _keeper(out), emulation)
        except ValueError as error:
            raise InputError(str(error)) from error
    _store(result, out, as_json)


@app.command()
@exit_on_error("relucent-bench")
def peers(
    names: Annotated[str, typer.Option("--peers", help=f"Of {', '.join(PEERS)}.")] = ",".join(PEERS),
    width: Annotated[int, typer.Option(help="Width of the random ResNet-18.", min=1)] = 64,
    relus: Annotated[int, typer.Option(help="Its ReLUs; squares elsewhere.", min=0)] = 12900,
    model: Annotated[Path | None, typer.Option(help="Compiled model instead.")] = None,
    runs: Annotated[int, typer.Option(help="Measured runs of each; one more warms up.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Where to store the JSON.")] = RESULTS / "peers.json",
    as_json: AsJson = False,
) -> None:
    """Ours beside other engines, one after another on this machine; each is installed into an environment of its own."""
    if unknown := [n for n in names.split(",") if n not in PEERS]:
        raise InputError(f"there is no peer {unknown[0]!r}", f"known are {', '.join(PEERS)}")
    with Status("making the network", console=Console(stderr=True)) as status:
        try:
            loaded = load(model) if model is not None else random_model("resnet18", width, relus)
        except ValueError as error:
            raise InputError(str(error)) from error
        network = ("resnet18", width) if model is None else (model.stem, 0)
        result = run_side_by_side(loaded, *network, names.split(","), runs, status.update, _keeper(out), _own_images(model, loaded, 1))
    _store(result, out, as_json)


@app.command("load")
@exit_on_error("relucent-bench")
def load_test(
    clients: Annotated[str, typer.Option(help="Numbers of clients.")] = "1,4,16,64",
    seconds: Annotated[float, typer.Option(help="Of measuring for each.", min=1)] = 30.0,
    processes: Annotated[int, typer.Option(help="Processes of the server.", min=1)] = 1,
    model: Annotated[Path, typer.Option(help="Compiled model.")] = MODEL,
    out: Annotated[Path, typer.Option(help="Where to store the JSON.")] = RESULTS / "load.json",
    as_json: AsJson = False,
) -> None:
    """Throughput and latency with many clients at once, preprocessing included."""
    with Status("starting", console=Console(stderr=True)) as status:
        result = measure_load(model, _counts(clients, "--clients"), seconds, processes, status.update, _keeper(out))
    _store(result, out, as_json)


@app.command()
@exit_on_error("relucent-bench", DataError, NetworkFileError, CompileError)
def methods(
    networks: Annotated[list[Path], typer.Argument(help="Folders of `relucent-opt pareto`, and networks of `reduce` and `train`.")],
    data: Annotated[Path, typer.Option(help="Folder of the data set; its test images are classified.")] = Path("data"),
    dataset: DatasetName = "auto",
    image_size: ImageSize = 0,
    images: Annotated[int, typer.Option(help="Test images that are classified privately.", min=1)] = 1000,
    runs: Annotated[int, typer.Option(help="Measured runs of the latency; one more warms up.", min=1)] = 15,
    out: Annotated[Path, typer.Option(
        help="Where to store the JSON. Rows that it holds stay; of networks named again only the latency is measured again.")] =
    RESULTS / "methods.json",
    as_json: AsJson = False,
) -> None:
    """Each network as it would be served: float, fixed-point and private accuracy, latency, bytes."""
    before = load_results(out.parent, out.stem) or {"rows": []}
    with Status("starting", console=Console(stderr=True)) as status:
        rows = measure_methods(networks, data, images, runs, before["rows"], status.update, lambda rows: _write_json(out, {"rows": rows}),
                               dataset, image_size)
    _store({"rows": rows}, out, as_json)


@app.command()
@exit_on_error("relucent-bench")
def report(
    results: Annotated[Path, typer.Option(help="Folder of stored results.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Folder for report.html and the plots.")] = RESULTS / "report",
    fill: Annotated[list[Path] | None, typer.Option(
        exists=True, dir_okay=False, help="Also put tables into this document, each between the marks that name it; repeatable.")] = None,
) -> None:
    """Turn stored results into one HTML page, PNG plots, and tables in documents."""
    try:
        for path in make_report(results, out, fill or []):
            print(f"wrote {path}")
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or out}: {error.strerror}", "free some space, or name another --out") from error


if __name__ == "__main__":
    app()
