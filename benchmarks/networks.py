"""Networks with random weights, for timing: online latency and traffic depend on shapes and ReLU counts alone."""

from __future__ import annotations

from functools import cache

import torch

from model_opt.activation import IDENTITY, RELU, SQUARE, partial_activations, replace_relus
from model_opt.compiler import compile_model
from model_opt.methods import check_budget, count_all
from model_opt.networks import build
from protocol.model import Model

INPUT_SHAPE = (3, 32, 32)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@cache
def check_network(network: str, width: int, relus: int | None) -> None:
    """Raise BudgetError or ValueError if `random_model` could not make this one; in a moment."""
    total = count_all(build(network, width), INPUT_SHAPE)
    if relus is not None:
        check_budget(relus, total)


@torch.no_grad()
def random_model(network: str, width: int, relus: int | None, squares: float = 1.0, seed: int = 0) -> Model:
    """A compiled random network with exactly `relus` ReLUs at random pixels; None keeps all. 8-bit weights.

    squares: share of the other pixels that square; the rest pass unchanged.

    BatchNorm statistics and polynomials are fitted layer by layer on noise, so that values stay in range. Raises
    BudgetError, ValueError.
    """
    torch.manual_seed(seed)
    model = build(network, width)
    images = (torch.rand(64, *INPUT_SHAPE) - 0.5) / 0.25
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # cumulative: one pass in training mode sets the statistics
    model.train()(images)
    model.eval()
    replace_relus(model, INPUT_SHAPE)
    layers = partial_activations(model)
    total = sum(layer.mask.numel() for layer in layers.values())
    if relus is not None:
        check_budget(relus, total)
        order = torch.randperm(total)
        masks = torch.full((total,), IDENTITY, dtype=torch.uint8)
        masks[order[:relus]] = RELU
        masks[order[relus : relus + round(squares * (total - relus))]] = SQUARE
        for layer, part in zip(layers.values(), masks.split([layer.mask.numel() for layer in layers.values()])):
            layer.mask.copy_(part.view(layer.mask.shape))

        def fit_then_run(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            z = args[0].transpose(0, 1).flatten(1)
            layer.fit(z.mean(1), z.std(1))  # type: ignore[operator]

        hooks = [layer.register_forward_pre_hook(fit_then_run) for layer in layers.values()]
        model(images)
        for hook in hooks:
            hook.remove()
    name = f"{network}-w{width}-random-{'all' if relus is None else relus}{'' if squares == 1 else f'-squares-{squares}'}"
    return compile_model(model, images[:32], name=name, classes=tuple(f"class{i}" for i in range(10)), mean=MEAN, std=STD,
                         eight_bits=True)
