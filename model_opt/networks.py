"""Networks for small images, built so that every ReLU is a module of its own.

The compiler and ReLU reduction address activations by module name, so no ReLU module is called twice. Inputs may be of
any size from 16x16 on: 32x32 for CIFAR, 64x64 for Tiny-ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


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
    """ResNet for small images: 3x3 stem, stages of `width * (1, 2, 4, ...)` channels, global average pool, linear.

    Args:
        blocks: basic blocks in each stage, (2, 2, 2, 2) for ResNet-18.
        width: channels of the first stage; 64 is the standard ResNet-18 (557,056 ReLUs at 32x32 input).
        classes: number of logits.
        stride: of the stem; 2 halves the resolution of everything (DeepReDuce's reshaping).
    """

    def __init__(self, blocks: Sequence[int], width: int, classes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        layers: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers.append(BasicBlock(channels, width << stage, 2 if stage > 0 and block == 0 else 1))
                channels = width << stage
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


class PreActivationBlock(nn.Module):
    """Block of Wide ResNets (Zagoruyko and Komodakis 2016, arXiv 1605.07146): BatchNorm and ReLU before each convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if in_channels != out_channels or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-22-8 at width 16: three stages of three pre-activation blocks with 8, 16, 32 times `width` channels.

    1,359,872 ReLUs at 32x32 input: the last BatchNorm has no ReLU behind it, as in AutoReP's and SNL's code.
    """

    def __init__(self, width: int, classes: int, stride: int, factor: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride, 1, bias=False)
        layers: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(3):
                out = width * factor << stage
                layers.append(PreActivationBlock(channels, out, 2 if stage > 0 and block == 0 else 1))
                channels = out
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.bn(self.blocks(self.conv1(x))))))  # type: ignore[no-any-return]


def _vgg16(width: int, classes: int, stride: int) -> nn.Module:
    """VGG-16 with BatchNorm (Simonyan and Zisserman 2014, arXiv 1409.1556) and one linear layer; average pooling, which is free."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, (factor, count) in enumerate(((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))):
        for i in range(count):
            first = stage == 0 and i == 0
            out = width * factor
            layers += [nn.Conv2d(channels, out, 3, stride if first else 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        if stage < 4:
            layers.append(nn.AvgPool2d(2))
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    _initialise(network)
    return network


NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "resnet18": lambda width, classes, stride: ResNet((2, 2, 2, 2), width, classes, stride),
    "resnet34": lambda width, classes, stride: ResNet((3, 4, 6, 3), width, classes, stride),
    "resnet20": lambda width, classes, stride: ResNet((3, 3, 3), width, classes, stride),
    "wrn22-8": lambda width, classes, stride: WideResNet(width, classes, stride),
    "vgg16-bn": _vgg16,
}
STANDARD_WIDTH = {"resnet18": 64, "resnet34": 64, "resnet20": 16, "wrn22-8": 16, "vgg16-bn": 64}


def build(network: str, width: int, classes: int = 10, stride: int = 1) -> nn.Module:
    """Make a network of the registry `NETWORKS`. stride: of the first convolution. Raises ValueError for an unknown name or size."""
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; known: {', '.join(sorted(NETWORKS))}")
    if not 1 <= width <= 1024:
        raise ValueError(f"width must lie in 1..1024, got {width}")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    return NETWORKS[network](width, classes, stride)


def device_of(model: nn.Module) -> torch.device:
    """Where a network's parameters are."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


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
        model.eval()(torch.zeros(1, *input_shape, device=device_of(model)))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return shapes
