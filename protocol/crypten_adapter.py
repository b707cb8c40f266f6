"""The only module that touches CrypTen: importing it, its tensor registry, and building graphs of its modules.

CrypTen 0.4.1 (https://github.com/facebookresearch/CrypTen). Nothing here changes CrypTen's process-wide state
(communicator, generators, provider, configuration).
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from protocol.errors import InputError

if TYPE_CHECKING:
    from protocol.model import ActivationLayer, PublicModel


def _import_crypten() -> Any:
    # CrypTen imports a module that PyTorch has moved; the attribute it reads is unused on this path
    old = "torch.onnx._internal.registration"
    if old not in sys.modules:
        try:
            sys.modules[old] = importlib.import_module("torch.onnx._internal.torchscript_exporter.registration")
        except ImportError:
            substitute = types.ModuleType(old)
            substitute.registry = None  # type: ignore[attr-defined]
            sys.modules[old] = substitute
    try:
        return importlib.import_module("crypten")
    except ModuleNotFoundError as error:
        raise InputError(f"CrypTen cannot be imported: {error}", "pip install --no-deps crypten==0.4.1") from error


crypten = _import_crypten()
CrypTensor: Any = crypten.CrypTensor
_Module: Any = crypten.nn.Module
register_cryptensor: Callable[[str], Callable[[type], type]] = crypten.register_cryptensor


class PartialActivation(_Module):  # type: ignore[misc]
    """The partial activation as a CrypTen module.

    On our tensors it is one step of the protocol. On any other CrypTensor (CrypTen's own "mpc" type) it evaluates
    ReLU on the ReLU pixels only and one square on the square pixels.
    """

    def __init__(self, layer: ActivationLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        if hasattr(x, "partial_activation"):
            return x.partial_activation(self)
        layer, flat = self.layer, x.flatten(start_dim=1)
        out = flat.clone()
        if len(layer.square):
            z = flat if layer.all_square else flat[:, layer.square]
            y = z.square().mul(layer.c2_of_pixels(layer.square)).add(z.mul(self._pixels("c1"))).add(self._pixels("c0"))
            if layer.all_square:
                out = y
            else:
                out[:, layer.square] = y
        if len(layer.relu):
            out[:, layer.relu] = flat[:, layer.relu].relu()
        return out.view(x.shape)

    def _pixels(self, name: str) -> Any:
        parameter = getattr(self, name)
        return parameter.flatten()[self.layer.channel_of(self.layer.square)]


class Scale(_Module):  # type: ignore[misc]
    """A private factor and constant for each pixel."""

    def forward(self, x: Any) -> Any:
        return x.mul(self.weight).add(self.bias)


def _module(node: Any, model: PublicModel) -> Any:
    nn, attrs = crypten.nn, node.attrs
    if node.op == "conv2d":
        module = nn.Conv2d.__new__(nn.Conv2d)
        nn.Module.__init__(module)
        for name in ("stride", "padding", "dilation", "groups"):
            value = attrs[name]
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
        return module
    if node.op == "linear":
        module = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(module)
        return module
    if node.op == "scale":
        return Scale()
    if node.op == "add":
        return nn.Add()
    if node.op == "flatten":
        return nn.Flatten(axis=1)
    if node.op in ("avg_pool2d", "max_pool2d"):
        kind = nn.AvgPool2d if node.op == "avg_pool2d" else nn.MaxPool2d
        return kind(tuple(attrs["kernel"]), stride=tuple(attrs["stride"]), padding=tuple(attrs["padding"]))
    return PartialActivation(model.activation(node.name))


def build_graph(model: PublicModel, parameters: Mapping[str, Any]) -> Any:
    """A `crypten.nn.Graph` of the model with this role's `parameters`, by "node.weight", "node.bias", and so on."""
    graph = crypten.nn.Graph("input", model.output)
    for node in model.nodes:
        module = _module(node, model)
        for name, value in parameters.items():
            owner, _, leaf = name.rpartition(".")
            if owner == node.name:
                module._parameters[leaf] = value
        module.encrypted = True
        graph.add_module(node.name, module, list(node.inputs))
    graph.encrypted = True
    return graph


def mpc_graph(model: PublicModel, floats: Mapping[str, Tensor]) -> Any:
    """The same graph on CrypTen's own "mpc" tensors, its parameters shared by rank 0: reference and baseline.

    Every process of an initialised CrypTen world calls this (`crypten.init()` is the caller's); run the graph under
    `crypten.no_grad()` on `crypten.cryptensor(x)`.
    """
    with crypten.no_grad(), torch.no_grad():
        return build_graph(model, {name: crypten.cryptensor(value.float(), src=0) for name, value in floats.items()})
