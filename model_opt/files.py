"""Float networks on disk: safetensors with one JSON description. Nothing is unpickled.

These are the files between `train`, `reduce` and `compile`; what a server runs is a compiled model (`protocol.model`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from model_opt.activation import replace_relus
from model_opt.networks import build

KEY = "relucent-network"


class NetworkFileError(Exception):
    """The file is no float network of ours. The message says why."""


@dataclass(frozen=True)
class NetworkInfo:
    """What rebuilds a network, and how it was made. partial: whether its ReLUs are partial activations."""

    network: str
    width: int
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    partial: bool
    made_by: dict[str, str | int | float]


def serialise_network(model: nn.Module, info: NetworkInfo, half: bool = False) -> bytes:
    """A network as the bytes of a file; `half` stores float tensors with 16 bits."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if half:
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    data: bytes = safetensors.torch.save(tensors, {KEY: json.dumps(asdict(info))})
    return data


def load_network(path: Path) -> tuple[nn.Module, NetworkInfo]:
    """Read a network, in float32 and eval mode. Raises NetworkFileError."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if KEY not in metadata:
            raise NetworkFileError(f"{path} is no float network; make one with `relucent-opt train` or `reduce`")
        raw = json.loads(metadata[KEY])
        info = NetworkInfo(raw["network"], int(raw["width"]), tuple(raw["classes"]), tuple(raw["input_shape"]),
                           bool(raw["partial"]), dict(raw["made_by"]))
        model = build(info.network, info.width, len(info.classes))
        if info.partial:
            replace_relus(model, info.input_shape)
        model.load_state_dict({k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()})
    except FileNotFoundError:
        raise NetworkFileError(f"{path} does not exist") from None
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise NetworkFileError(f"{path} is damaged or of another version ({type(error).__name__})") from error
    return model.eval(), info
