"""Float networks on disk: safetensors with one JSON description. Nothing is unpickled.

These are the files between `train`, `reduce` and `compile`; what a server runs is a compiled model (`protocol.model`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from model_opt.activation import partial_activations, replace_relus
from model_opt.datasets import Dataset
from model_opt.networks import build
from protocol.errors import InputError

KEY = "relucent-network"
STEP = ".step"
"""Suffix of the step of each row of a tensor that is stored with 8 bits."""


class NetworkFileError(Exception):
    """The file is no float network of ours. The message says why."""

    hint = "make one with `relucent-opt train` or `reduce`"


@dataclass(frozen=True)
class NetworkInfo:
    """What rebuilds a network, and how it was made.

    network, width, stride: as in `model_opt.networks.build`. classes: names. mean, std: normalisation per channel, pixel / 255.
    partial: whether its ReLUs are partial activations. made_by: settings, seeds and results.
    """

    network: str
    width: int
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    partial: bool
    made_by: dict[str, Any]
    stride: int = 1

    def build(self) -> nn.Module:
        """The untrained network, all-ReLU. Raises ValueError."""
        return build(self.network, self.width, len(self.classes), self.stride)


def _eight_bits(name: str, tensor: Tensor) -> dict[str, Tensor]:
    step = (tensor.flatten(1).abs().amax(1) / 127).clamp_min(1e-12)
    return {name: torch.round(tensor / step.view(-1, *[1] * (tensor.dim() - 1))).to(torch.int8), name + STEP: step}


def serialise_network(model: nn.Module, info: NetworkInfo, bits: int = 32) -> bytes:
    """A network as the bytes of a file; with 16 or 8 bits for the kernels and matrices (8: one step per output channel)."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        if bits == 32 or not value.is_floating_point() or value.dim() < 2 or value[0].numel() == 1:
            tensors[name] = value
        else:
            tensors |= _eight_bits(name, value) if bits == 8 else {name: value.half()}
    data: bytes = safetensors.torch.save(tensors, {KEY: json.dumps(asdict(info))})
    return data


def _restore(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    restored = {}
    for name, value in tensors.items():
        if name.endswith(STEP):
            continue
        step = tensors.get(name + STEP)
        if step is not None:
            value = value.float() * step.view(-1, *[1] * (value.dim() - 1))
        restored[name] = value.float() if value.dtype == torch.float16 else value
    return restored


class Described(Protocol):
    """A network or compiled model that says what it takes and gives."""

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def classes(self) -> tuple[str, ...]: ...


def check_fits(dataset: Dataset, shape: tuple[int, ...], network: Described, path: Path) -> None:
    """Raise InputError unless images of this shape and the data set's classes are the network's at `path`."""
    if shape != network.input_shape or len(dataset.classes) != len(network.classes):
        raise InputError(f"{path} takes {'x'.join(map(str, network.input_shape))} images of {len(network.classes)} classes, {dataset.name} "
                         f"has {'x'.join(map(str, shape))} images of {len(dataset.classes)}", "pass the data that it was trained on")


def load_network(path: Path) -> tuple[nn.Module, NetworkInfo]:
    """Read a network, in float32 and eval mode. Raises NetworkFileError."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if KEY not in metadata:
            raise NetworkFileError(f"{path} is no float network")
        raw = json.loads(metadata[KEY])
        for key in ("classes", "input_shape", "mean", "std"):
            raw[key] = tuple(raw[key])
        info = NetworkInfo(**raw)
        model = info.build()
        if info.partial:
            replace_relus(model, info.input_shape)
            for name, layer in partial_activations(model).items():
                if f"{name}.c2" in tensors:
                    layer.per_channel_c2()
        model.load_state_dict(_restore(tensors))
    except FileNotFoundError:
        raise NetworkFileError(f"{path} does not exist") from None
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise NetworkFileError(f"{path} is damaged or of another version ({type(error).__name__})") from error
    return model.eval(), info
