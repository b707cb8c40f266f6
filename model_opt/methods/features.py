"""What a network computes on the way: its stages by resolution, and the activations that methods compare."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor, nn

from model_opt.activation import PartialActivation
from model_opt.networks import activation_shapes, device_of


def stages(model: nn.Module, input_shape: tuple[int, ...]) -> list[list[str]]:
    """Names of the activations (nn.ReLU or partial) in order, grouped by the resolution of what they see.

    For a ResNet these are the stages of the literature, the stem's ReLU in the first.
    """
    kind = PartialActivation if any(isinstance(m, PartialActivation) for m in model.modules()) else nn.ReLU
    shapes = activation_shapes(model, input_shape, kind)
    return [list(names) for _, names in groupby(shapes, key=lambda name: shapes[name][1:])]


@torch.no_grad()
def weights_before(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, str]:
    """For each nn.ReLU the convolution or linear layer that feeds it: the last one run before, shortcuts (1x1) left out."""
    last, hooks = "", []
    found: dict[str, str] = {}

    def ran(name: str) -> None:
        nonlocal last
        last = name

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)):
            hooks.append(module.register_forward_hook(lambda *_, name=name: ran(name)))
        elif isinstance(module, nn.ReLU):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: found.__setitem__(name, last)))
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, *input_shape, device=device_of(model)))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


class Recorder:
    """Keeps the outputs of named modules of a network in its latest forward pass; `close` when done."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.outputs: dict[str, Tensor] = {}
        self._hooks = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in names]

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def record(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            self.outputs[name] = output

        return record

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.outputs.clear()
