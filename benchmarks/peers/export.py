"""The common input of all peers: a compiled model as plain arrays, so that a peer needs numpy and its engine only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from protocol.inference import normalise_images
from protocol.model import Model, save


def export_model(model: Model, images: Tensor, folder: Path) -> None:
    """Write `model.json`, `model.npz`, `images.npy` and `model.safetensors` into `folder`, which is created if missing.

    Args:
        model: a compiled model.
        images: uint8 (N, C, H, W) of the model's input shape.

    model.json holds name, input_shape, mean, std and the nodes (name, op, inputs, attrs). model.npz holds, for node n,
    float32 `n.weight`, `n.bias`, and for an activation `n.c1`, `n.c0`, `n.c2` of shape (C,) and the uint8 mask `n.mask` of the
    layer's shape: 0 identity, 1 c2 z^2 + c1 z + c0, 2 ReLU. images.npy is float32 and normalised. model.safetensors is the
    compiled file itself, for peers that share our environment. Raises ValueError for images of another shape, OSError.
    """
    public = model.public
    if images.dtype != torch.uint8 or images.shape[1:] != public.input_shape or not len(images):
        raise ValueError(f"images must be uint8 (N, {', '.join(map(str, public.input_shape))}), not {images.dtype} {tuple(images.shape)}")
    arrays = {name: value.float().numpy() for name, value in model.floats().items()}
    for name, mask in public.masks.items():
        layer = public.activation(name)
        factor = torch.tensor(layer.c2_factor or (1,) * mask.shape[0])
        arrays |= {f"{name}.mask": mask.numpy(), f"{name}.c2": (factor * 2.0**-layer.c2_shift).float().numpy()}
    described = {key: value for key, value in public.describe().items() if key in ("name", "input_shape", "nodes", "mean", "std")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(described))
    np.savez(folder / "model.npz", **arrays)  # type: ignore[arg-type]
    np.save(folder / "images.npy", normalise_images(images, public).float().numpy())
    save(model, folder / "model.safetensors")
