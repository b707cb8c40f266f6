"""The partial activation: closed forms, gradients, and replacing ReLUs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from model_opt.activation import (
    IDENTITY,
    LINEAR,
    RELU,
    SQUARE,
    PartialActivation,
    best_c2,
    count_relus,
    damped_fit,
    fit_relu,
    replace_relus,
)
from model_opt.networks import build


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-1.2, 2.0), (3.0, 1.0)])
def test_closed_forms_are_the_least_squares_fit(mean: float, std: float) -> None:
    """Against weighted least squares on a fine quadrature, an independent method."""
    z = np.linspace(mean - 9 * std, mean + 9 * std, 200_001)
    weight = np.sqrt(np.exp(-(((z - mean) / std) ** 2) / 2))
    relu = np.maximum(z, 0)
    full = np.linalg.lstsq(np.stack([z**2, z, np.ones_like(z)], 1) * weight[:, None], relu * weight, rcond=None)[0]
    m, s = torch.tensor([mean]).double(), torch.tensor([std]).double()
    c2 = best_c2(m, s)
    assert float(c2) == pytest.approx(full[0], abs=1e-6)
    for given in (float(c2), 0.25, 0.0):
        rest = np.linalg.lstsq(np.stack([z, np.ones_like(z)], 1) * weight[:, None], (relu - given * z**2) * weight, rcond=None)[0]
        c1, c0 = fit_relu(m, s, given)
        assert [float(c1), float(c0)] == pytest.approx(list(rest), abs=1e-6)


def test_known_values_at_the_standard_normal() -> None:
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    c2 = best_c2(zero, one)
    c1, c0 = fit_relu(zero, one, c2)
    assert [float(c2), float(c1), float(c0)] == pytest.approx([0.199471, 0.5, 0.199471], abs=1e-6)
    # the released code's start: 0.020 z^2 + 0.5 z + 0.04 at unit variance, before its scale_x2
    assert [float(v) for v in damped_fit(zero, one, SQUARE)] == pytest.approx([0.0199471, 0.5, 0.0398942], abs=1e-6)
    assert [float(v) for v in damped_fit(zero, one, LINEAR)] == pytest.approx([0.0, 0.5, 0.0797885], abs=1e-6)


def test_fit_follows_the_replacement() -> None:
    mean, std = torch.tensor([0.0, 0.5, -0.5, 0.1]), torch.tensor([1.0, 1.2, 0.8, 1.0])
    square = PartialActivation((4, 2, 2))
    square.fit(mean, std, damping=0)
    assert torch.equal(square.quadratic().flatten(), torch.full((4,), 0.25))
    assert torch.allclose(square.c1.flatten(), fit_relu(mean, std, 0.25)[0])
    channel = PartialActivation((4, 2, 2))
    channel.per_channel_c2()
    channel.fit(mean, std, damping=1)
    assert torch.allclose(channel.quadratic().flatten(), best_c2(mean, std) / 2)
    line = PartialActivation((4, 2, 2))
    line.replacement = LINEAR
    line.fit(mean, std)
    assert torch.allclose(line.c0.flatten(), fit_relu(mean, std, 0.0)[1])
    identity = PartialActivation((4, 2, 2))
    identity.replacement = IDENTITY
    identity.fit(mean, std)
    assert torch.equal(identity.c1.flatten(), torch.full((4,), 0.5))


@pytest.mark.parametrize("shape", [(3, 5, 4), (7,)])
@pytest.mark.parametrize("replacement", [SQUARE, LINEAR, IDENTITY])
@pytest.mark.parametrize("per_channel", [False, True])
def test_forward_and_gradients_match_automatic_differentiation(shape: tuple[int, ...], replacement: int, per_channel: bool) -> None:
    torch.manual_seed(0)
    layer = PartialActivation(shape).double()
    layer.replacement = replacement
    if per_channel:
        layer.per_channel_c2()
        assert layer.c2 is not None
        layer.c2.data.mul_(torch.rand(layer.c2.shape).double() + 0.5)
    kinds = torch.tensor([IDENTITY, SQUARE, RELU, LINEAR], dtype=torch.uint8)
    layer.mask.copy_(kinds[torch.randint(0, 4, shape)])
    layer.c1.data.normal_()
    layer.c0.data.normal_()
    layer.gate = nn.Parameter(torch.rand(shape).double())
    z = torch.randn(6, *shape).double().requires_grad_()
    seed = torch.randn(6, *shape).double()
    out = layer(z)
    out.backward(seed)
    z2 = z.detach().clone().requires_grad_()
    c2, c1, c0 = (t.detach().clone().requires_grad_() for t in (layer.quadratic(), layer.c1, layer.c0))
    pieces = {RELU: z2.relu(), SQUARE: c2 * z2 * z2 + c1 * z2 + c0, LINEAR: c1 * z2 + c0, IDENTITY: z2}
    expected = sum(torch.where(layer.mask == kind, value, 0.0) for kind, value in pieces.items())
    expected.backward(seed)
    assert torch.allclose(out, expected, atol=1e-6)
    # beyond the range the penalty adds to the gradient of z at squares
    inside = (z2.detach().abs() <= 0.25 / c2.detach()) | (layer.mask != SQUARE)
    assert torch.allclose(z.grad[inside], z2.grad[inside], atol=1e-6)  # type: ignore[index]
    assert torch.allclose(layer.c1.grad, c1.grad, atol=1e-5)  # type: ignore[arg-type]  # sums run in float32
    assert torch.allclose(layer.c0.grad, c0.grad, atol=1e-5)  # type: ignore[arg-type]
    if layer.c2 is not None:
        assert torch.allclose(layer.c2.grad, c2.grad, atol=1e-5)  # type: ignore[arg-type]
    # the gate's straight-through gradient: ReLU against what the pixel is, or would become
    instead = torch.where(layer.mask == RELU, pieces[replacement], expected).detach()
    literal = (seed * (z2.relu().detach() - instead)).sum(0)
    assert torch.allclose(layer.gate.grad, literal, atol=1e-5)  # type: ignore[arg-type]


def test_soft_gate_mixes_relu_and_identity() -> None:
    """SNL's activation and its gradients."""
    torch.manual_seed(0)
    layer = PartialActivation((3, 4, 4)).double()
    layer.replacement, layer.soft_gate = IDENTITY, True
    layer.gate = nn.Parameter(torch.rand(3, 4, 4).double())
    z = torch.randn(5, 3, 4, 4).double().requires_grad_()
    seed = torch.randn(5, 3, 4, 4).double()
    layer(z).backward(seed)
    z2, alpha = z.detach().clone().requires_grad_(), layer.gate.detach().clone().requires_grad_()
    expected = alpha * z2.relu() + (1 - alpha) * z2
    assert torch.allclose(layer(z), expected)
    expected.backward(seed)
    assert torch.allclose(z.grad, z2.grad)  # type: ignore[arg-type]
    assert torch.allclose(layer.gate.grad, alpha.grad, atol=1e-5)  # type: ignore[arg-type]


def test_range_penalty_pulls_outliers_in() -> None:
    layer = PartialActivation((1, 1, 1))
    layer.mask.fill_(SQUARE)
    z = torch.tensor([[[[100.0]]], [[[-100.0]]], [[[0.5]]]], requires_grad=True)
    layer(z).backward(torch.zeros(3, 1, 1, 1))
    assert z.grad is not None
    assert z.grad.flatten().sign().tolist() == [1, -1, 0]


def test_fewer_channels_use_the_first() -> None:
    layer = PartialActivation((4, 2, 2))
    layer.mask[:2] = IDENTITY
    z = torch.randn(3, 2, 2, 2)
    assert torch.equal(layer(z), z)


TOTALS = {"resnet18": 557_056, "resnet34": 966_656, "resnet20": 188_416, "wrn22-8": 1_359_872, "vgg16-bn": 276_480}


@pytest.mark.parametrize("network", TOTALS)
def test_replacing_relus_keeps_the_function_and_counts(network: str) -> None:
    """The totals of the literature at a quarter of the standard width; Tiny-ImageNet's inputs have four times as many."""
    torch.manual_seed(0)
    width = {"resnet20": 4, "wrn22-8": 4}.get(network, 16)
    model = build(network, width).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    replace_relus(model, (3, 32, 32))
    assert torch.allclose(model(x), before, atol=1e-4)
    assert count_relus(model) * 4 == TOTALS[network]
    large = replace_relus(build(network, width, 200), (3, 64, 64))
    assert count_relus(large) == 4 * count_relus(model)
    assert large(torch.randn(1, 3, 64, 64)).shape == (1, 200)


def test_activations_are_made_where_the_network_is() -> None:
    network = replace_relus(build("resnet18", 4).to("meta"), (3, 32, 32))
    assert {value.device.type for value in network.state_dict().values()} == {"meta"}
    assert network(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_halved_resolution() -> None:
    assert count_relus(replace_relus(build("resnet18", 16, stride=2), (3, 32, 32))) * 16 == 557_056


def test_unknown_networks() -> None:
    with pytest.raises(ValueError, match="unknown network"):
        build("resnet5", 16)
    with pytest.raises(ValueError, match="width"):
        build("resnet18", 0)
    with pytest.raises(ValueError, match="stride"):
        build("resnet18", 16, stride=3)
