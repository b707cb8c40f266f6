"""Float, fixed-point and private accuracy on the test set, apart, and how far they agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.processes import environment, serving
from client import Client
from model_opt.data import normalise
from model_opt.datasets import open_dataset
from model_opt.files import check_fits, load_network
from protocol.inference import normalise_images
from protocol.model import load
from protocol.plaintext import Plaintext
from protocol.simulation import simulate


def measure_accuracy(model: Path, network: Path | None, data: Path, images: int, batch: int, dataset: str = "auto",
                     size: int = 0) -> dict[str, Any]:
    """Figures over the first `images` test images; private inference runs in real dealer and server processes.

    Args:
        network: float network to compare with; None for the compiled file's own weights in float32. dataset, size: as in `open_dataset`.
    """
    facts = environment()
    loaded = load(model)
    source = open_dataset(data, dataset, size)
    test = source.load_test()
    check_fits(source, test.shape, loaded.public, model)
    pixels, labels = test.images[:images], test.labels[:images]
    if network is not None:
        trained, info = load_network(network)
        check_fits(source, test.shape, info, network)
    else:
        plain = Plaintext(loaded)
    reals, fixed, private = [], [], []
    with serving(model, "--max-batch", str(batch)) as roles, Client(roles.server, roles.dealer, insecure=True) as client:
        parts = pixels.split(batch)
        for part in track(parts, description="classifying", console=Console(stderr=True), transient=True):
            x = normalise_images(part, loaded.public)
            with torch.inference_mode():
                reals.append(trained(normalise(part, info.mean, info.std)) if network is not None else plain(x.float()))
            fixed.append(simulate(loaded, x))
            private.append(torch.tensor([p.logits for p in client.predict(part)], dtype=torch.float64))
    logits = {"float": torch.cat(reals), "fixed_point": torch.cat(fixed), "private": torch.cat(private)}
    tops = {name: values.argmax(1) for name, values in logits.items()}

    def share(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a == b).double().mean())

    return {"model": loaded.public.name, "model_id": loaded.public.model_id, "relus": loaded.public.relus, "images": len(labels),
            **{f"{name}_accuracy": share(top, labels) for name, top in tops.items()},
            "private_float_agreement": share(tops["private"], tops["float"]),
            "private_fixed_point_agreement": share(tops["private"], tops["fixed_point"]),
            "max_abs_error": float((logits["private"] - logits["fixed_point"]).abs().max()), **facts}
