"""SENet++: one set of weights for several widths, by ordered dropout (Kundu et al., ICLR 2023, arXiv 2301.09254).

Width p uses the first p of every layer's channels, and a BatchNorm of its own; the classifier keeps all outputs and the mask is
shared. The paper's training step was not at hand: here every step adds, to the loss at full width, that of each narrower width
against the full width's outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model_opt.activation import replace_relus
from model_opt.data import Split
from model_opt.methods.base import BudgetError, Reduced, Task
from model_opt.training import Stage, accuracy, distillation_loss, reestimate_norms


class SlimConv2d(nn.Conv2d):
    """A convolution that uses the first `factor` of its output channels and as many input channels as it is given."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        outputs = round(self.out_channels * self.factor)
        bias = self.bias[:outputs] if self.bias is not None else None
        return nn.functional.conv2d(x, self.weight[:outputs, : x.shape[1]], bias, self.stride, self.padding, self.dilation, self.groups)


class SlimLinear(nn.Linear):
    """A linear layer that uses as many inputs as it is given; the classifier keeps all outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight[:, : x.shape[1]], self.bias)


class SlimBatchNorm(nn.Module):
    """One BatchNorm for each width."""

    factor = 1.0

    def __init__(self, full: nn.BatchNorm2d, factors: tuple[float, ...]) -> None:
        super().__init__()
        self.full = full
        self.narrow = nn.ModuleDict({str(f).replace(".", "_"): nn.BatchNorm2d(round(full.num_features * f)) for f in factors})

    def at(self, factor: float) -> nn.Module:
        return self.full if factor == 1 else self.narrow[str(factor).replace(".", "_")]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.at(self.factor)(x)
        return result


def check_slimmable(task: Task, factors: tuple[float, ...]) -> None:
    """Raise BudgetError unless the teacher can run at these widths."""
    if task.rebuild is None:
        raise BudgetError("only networks of the registry have narrower versions")
    for name, module in task.teacher.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.groups != 1:
                raise BudgetError(f"grouped convolutions ({name}) cannot be slimmed")
            for factor in factors:
                if abs(module.out_channels * factor - round(module.out_channels * factor)) > 1e-6:
                    raise BudgetError(f"{factor} of the {module.out_channels} channels of {name} is no whole number; choose other widths")


def make_slimmable(model: nn.Module, factors: tuple[float, ...]) -> None:
    """Let a network run at narrower widths too, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            module.__class__ = SlimConv2d
        elif isinstance(module, nn.Linear):
            module.__class__ = SlimLinear
        elif isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SlimBatchNorm(module, factors).to(module.weight.device))


def set_factor(model: nn.Module, factor: float) -> None:
    """The width at which a slimmable network runs from now on."""
    for module in model.modules():
        if isinstance(module, (SlimConv2d, SlimBatchNorm)):
            module.factor = factor


class Slimming(Stage):
    """Adds the losses of the narrower widths to `inner`, the stage of the full one."""

    def __init__(self, inner: Stage, factors: tuple[float, ...], temperature: float) -> None:
        self.inner, self.factors, self.temperature = inner, factors, temperature
        self.inputs = self.outputs = torch.empty(0)
        self.hooks: list[Any] = []

    def begin(self, model: nn.Module, teacher: nn.Module | None) -> list[dict[str, Any]]:
        self.model = model

        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if model.training:
                self.inputs, self.outputs = args[0], output.detach().float()

        self.hooks.append(model.register_forward_hook(keep))
        return self.inner.begin(model, teacher)

    def loss(self) -> Tensor | None:
        total, x, target = self.inner.loss(), self.inputs, self.outputs
        for factor in self.factors:
            set_factor(self.model, factor)
            narrow = distillation_loss(self.model(x).float(), target, self.temperature)
            total = narrow if total is None else total + narrow
        set_factor(self.model, 1.0)
        return total

    def after_step(self, progress: float) -> None:
        self.inner.after_step(progress)

    def after_epoch(self) -> None:
        self.inner.after_epoch()

    def status(self) -> dict[str, float]:
        return self.inner.status()

    def state(self) -> dict[str, Any]:
        return self.inner.state()

    def load(self, state: dict[str, Any]) -> None:
        self.inner.load(state)

    def end(self) -> None:
        self.inner.end()
        for hook in self.hooks:
            hook.remove()


def extract(model: nn.Module, task: Task, factor: float, sample: Split) -> Reduced:
    """The network of one width as one of the registry, its BatchNorm statistics re-estimated on `sample`."""
    assert task.rebuild is not None
    narrow = replace_relus(task.rebuild(factor, 1), task.shape)
    source: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = str(factor).replace(".", "_")
        if ".full." in name and factor == 1:
            source[name.replace(".full.", ".")] = tensor
        elif f".narrow.{key}." in name:
            source[name.replace(f".narrow.{key}.", ".")] = tensor
        elif ".full." not in name and ".narrow." not in name:
            source[name] = tensor
    with torch.no_grad():
        for name, tensor in narrow.state_dict().items():
            tensor.copy_(source[name][tuple(slice(size) for size in tensor.shape)] if tensor.dim() else source[name])
    reestimate_norms(narrow, sample)
    return Reduced(narrow, accuracy(narrow, task.validation), factor)
