"""Networks for small images, built so that every ReLU is a module of its own.

The compiler and ReLU reduction address activations by module name, so no ReLU module is called twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Residual block of He et al. 2015 (arXiv 1512.03385): two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        result: Tensor = self.relu2(out)
        return result


class ResNet(nn.Module):
    """CIFAR ResNet: 3x3 stem, four stages of `width * (1, 2, 4, 8)` channels, global average pool, linear.

    Args:
        blocks: basic blocks in each of the four stages, (2, 2, 2, 2) for ResNet-18.
        width: channels of the first stage; 64 is the standard network (557,056 ReLUs at 32x32 input).
        classes: number of logits.
    """

    def __init__(self, blocks: tuple[int, int, int, int], width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        layers: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


def resnet18(width: int = 64, classes: int = 10) -> ResNet:
    """ResNet-18 for 32x32 images; 557,056 ReLUs at width 64, stem included."""
    return ResNet((2, 2, 2, 2), width, classes)


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {"resnet18": resnet18}


def build(network: str, width: int, classes: int = 10) -> nn.Module:
    """Make a network of the registry `NETWORKS`. Raises ValueError for an unknown name or width."""
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; known: {', '.join(sorted(NETWORKS))}")
    if not 1 <= width <= 1024:
        raise ValueError(f"width must lie in 1..1024, got {width}")
    return NETWORKS[network](width, classes)


@torch.no_grad()
def activation_shapes(model: nn.Module, input_shape: tuple[int, ...], kind: type[nn.Module]) -> dict[str, tuple[int, ...]]:
    """Shape, without the batch, of what each module of type `kind` receives, in order of execution.

    Raises ValueError if one module is called twice: its pixels could not be told apart.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, kind):

            def record(_m: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if name in shapes:
                    raise ValueError(f"activation {name!r} is called more than once; give each call a module of its own")
                shapes[name] = tuple(args[0].shape[1:])

            hooks.append(module.register_forward_pre_hook(record))
    was_training = model.training
    try:
        first = next(model.parameters(), None)
        model.eval()(torch.zeros(1, *input_shape, device=first.device if first is not None else "cpu"))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return shapes
