"""The client's command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from client.api import Client, default_stock, list_models
from protocol.errors import InputError
from protocol.images import check_image, load_image
from protocol.terminal import Program, exit_on_error

app = Program("relucent-client", "Classify images on a server that never sees them.")


Server = Annotated[str, typer.Option(help="HOST:PORT of the server.")]
Dealer = Annotated[str, typer.Option(help="HOST:PORT of the dealer.")]
Ca = Annotated[Path | None, typer.Option(help="Authorities that certify server and dealer (PEM); default: the system's.")]
TokenFile = Annotated[Path | None, typer.Option(help="File that holds the API token; default: $RELUCENT_TOKEN.")]
Certificate = Annotated[Path | None, typer.Option(help="This client's certificate (PEM), in place of a token.")]
Key = Annotated[Path | None, typer.Option(help="Its private key (PEM).")]
Model = Annotated[str, typer.Option(help="Name of the model; default: the server's first.")]
Stock = Annotated[Path | None, typer.Option(help="Folder of what `prepare` made; default: one in the user's state folder.")]
StockKey = Annotated[Path | None, typer.Option(help="File of the key that encrypts it; default: one in the user's configuration folder.")]
Cache = Annotated[Path | None, typer.Option(help="Folder for the model's public data.")]
Timeout = Annotated[float, typer.Option(help="Deadline of each call in seconds.", min=0.1)]
Insecure = Annotated[bool, typer.Option("--insecure", help="Plaintext transport, on trusted networks only.")]


def _token(path: Path | None, insecure: bool) -> str | None:
    """The API token from a file or the environment; never from the command line, where others could read it."""
    if path is None:
        return None if insecure else os.environ.get("RELUCENT_TOKEN")
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the token file {path}", "write the token that the operator gave you into it") from error


@app.command()
@exit_on_error("relucent-client")
def models(server: Server, ca: Ca = None, token_file: TokenFile = None, certificate: Certificate = None, key: Key = None,
           insecure: Insecure = False, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What the server offers."""
    found = list_models(server, ca=ca, token=_token(token_file, insecure), certificate=certificate, key=key, insecure=insecure)
    if as_json:
        print(json.dumps([vars(m) for m in found]))
        return
    table = Table("name", "input", "classes", "ReLUs", "id")
    for m in found:
        table.add_row(escape(m.name), "x".join(map(str, m.input_shape)), str(m.classes), f"{m.relus:,}", m.model_id[:12])
    Console().print(table)


@app.command()
@exit_on_error("relucent-client")
def prepare(
    server: Server,
    dealer: Dealer,
    count: Annotated[int, typer.Option(help="Inferences that shall be ready.", min=1)] = 10,
    batch: Annotated[int, typer.Option(help="Images that each of them classifies together.", min=1)] = 1,
    model: Model = "",
    ca: Ca = None, token_file: TokenFile = None, certificate: Certificate = None, key: Key = None, insecure: Insecure = False,
    stock: Stock = None,
    stock_key: StockKey = None,
    cache: Cache = None,
    timeout: Timeout = 300.0,
) -> None:
    """Preprocess ahead, so that `classify` answers at once. What is ready stays on disk, encrypted, and is used once."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (Client(server, dealer, ca=ca, token=_token(token_file, insecure), certificate=certificate, key=key, insecure=insecure,
                 model=model, cache=cache, stock=stock or default_stock(), stock_key=stock_key, timeout_s=timeout) as client,
          Progress(*columns, console=Console(stderr=True), transient=True) as bar):
        ready = client.prepared(batch)
        task = bar.add_task("preprocessing", total=max(count, ready), completed=ready)
        client.preprocess(max(count - ready, 0), batch, lambda done: bar.update(task, completed=ready + done))
        print(f"{client.prepared(batch)} inferences of {batch} image{'s' * (batch > 1)} ready for {client.model.name}")


@app.command()
@exit_on_error("relucent-client")
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files: PNG, JPEG, ...")],
    server: Server,
    dealer: Dealer,
    model: Model = "",
    ca: Ca = None, token_file: TokenFile = None, certificate: Certificate = None, key: Key = None, insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    stock: Stock = None,
    stock_key: StockKey = None,
    cache: Cache = None,
    timeout: Timeout = 300.0,
) -> None:
    """Classify IMAGES privately. Images of another size are resized; grey and transparent ones become RGB.

    What `prepare` has made ahead is used up first; without it, preprocessing comes before each batch.
    """
    if stock is None and default_stock().is_dir():
        stock = default_stock()
    for path in images:
        check_image(path)  # before anybody is asked for anything
    console = Console(stderr=True)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("fetching the model", total=None)
        with Client(server, dealer, ca=ca, token=_token(token_file, insecure), certificate=certificate, key=key, insecure=insecure,
                    model=model, cache=cache, stock=stock, stock_key=stock_key, timeout_s=timeout) as client:
            loaded = [load_image(path, client.model.input_shape) for path in images]
            for path, (_, note) in zip(images, loaded):
                if note:
                    print(f"relucent-client: note: {path}: {note}", file=sys.stderr)
            results, online_s, preprocessing_s, up, down = [], 0.0, 0.0, 0, 0
            pixels = torch.stack([image for image, _ in loaded])
            for part in pixels.split(client.max_batch):
                client.last_preprocessing = None
                results += client.predict(part, lambda what: bar.update(task, description=what))
                assert client.last_online is not None
                online_s += client.last_online.seconds
                preprocessing_s += client.last_preprocessing.seconds if client.last_preprocessing is not None else 0.0
                up, down = up + client.last_online.bytes_up, down + client.last_online.bytes_down
            name, model_id = client.model.name, client.model.model_id
    for path, result in zip(images, results):
        if not result.plausible:
            print(f"relucent-client: note: {path}: the result is implausible; does the model know this kind of image?", file=sys.stderr)
    if as_json:
        print(json.dumps({
            "model": name, "model_id": model_id, "online_ms": round(online_s * 1e3, 3),
            "preprocessing_ms": round(preprocessing_s * 1e3, 3), "online_bytes_up": up, "online_bytes_down": down,
            "results": [{"image": str(p), "label": r.label, "index": r.index, "logits": list(r.logits), "plausible": r.plausible}
                        for p, r in zip(images, results)]}))
        return
    table = Table("image", "label")
    for path, result in zip(images, results):
        table.add_row(escape(str(path)), escape(result.label) + ("" if result.plausible else " [dim](implausible)[/dim]"))
    Console().print(table)
    print(f"online {online_s * 1e3:.0f} ms, preprocessing {preprocessing_s * 1e3:.0f} ms, "
          f"{up / 1e6:.2f} MB sent and {down / 1e6:.2f} MB received online", file=sys.stderr)
