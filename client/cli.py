"""The client's command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from client.api import Client
from client.images import load_image
from protocol.terminal import exit_on_error

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Classify images on a server that never sees them.")


@app.callback()
def _root() -> None:
    """Keeps `classify` a subcommand."""


@app.command()
@exit_on_error("relucent-client")
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files: PNG, JPEG, ...")],
    server: Annotated[str, typer.Option(help="HOST:PORT of the server.")],
    dealer: Annotated[str, typer.Option(help="HOST:PORT of the dealer.")],
    insecure: Annotated[bool, typer.Option("--insecure", help="Accept plaintext transport; there is no other yet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder for the model's public data.")] = None,
    timeout: Annotated[float, typer.Option(help="Deadline of each call in seconds.", min=0.1)] = 300.0,
) -> None:
    """Classify IMAGES privately. Images of another size are resized; grey and transparent ones become RGB."""
    console = Console(stderr=True)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("fetching the model", total=None)
        with Client(server, dealer, insecure=insecure, cache=cache, timeout_s=timeout) as client:
            loaded = [load_image(path, client.model.input_shape) for path in images]
            for path, (_, note) in zip(images, loaded):
                if note:
                    print(f"relucent-client: note: {path}: {note}", file=sys.stderr)
            results, online_s, preprocessing_s, up, down = [], 0.0, 0.0, 0, 0
            pixels = torch.stack([image for image, _ in loaded])
            for part in pixels.split(client.max_batch):
                bar.update(task, description=f"preprocessing {len(part)} image(s)")
                client.preprocess(1, len(part))
                bar.update(task, description=f"classifying {len(part)} image(s)")
                results += client.predict(part)
                assert client.last_online is not None and client.last_preprocessing is not None
                online_s += client.last_online.seconds
                preprocessing_s += client.last_preprocessing.seconds
                up, down = up + client.last_online.bytes_up, down + client.last_online.bytes_down
            name, model_id = client.model.name, client.model.model_id
    if as_json:
        print(json.dumps({
            "model": name, "model_id": model_id, "online_ms": round(online_s * 1e3, 3),
            "preprocessing_ms": round(preprocessing_s * 1e3, 3), "online_bytes_up": up, "online_bytes_down": down,
            "results": [{"image": str(p), "label": r.label, "index": r.index, "logits": list(r.logits)}
                        for p, r in zip(images, results)]}))
        return
    table = Table("image", "label")
    for path, result in zip(images, results):
        table.add_row(escape(str(path)), escape(result.label))
    Console().print(table)
    print(f"online {online_s * 1e3:.0f} ms, preprocessing {preprocessing_s * 1e3:.0f} ms, "
          f"{up / 1e6:.2f} MB sent and {down / 1e6:.2f} MB received online", file=sys.stderr)
