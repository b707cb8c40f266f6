"""The compiler: what it folds, what it refuses and how it says so, and what calibration chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_opt.activation import IDENTITY, partial_activations, replace_relus
from model_opt.compiler import FAILURE_TARGET, CompileError, check, compile_model
from protocol.inference import infer
from protocol.model import Model
from protocol.plan import make_plan
from protocol.simulation import simulate
from tests.conftest import build_compiled, make_network
from tests.services import SHAPE


def ops(model: Model) -> list[str]:
    return [n.op for n in model.public.nodes]


def test_batch_norm_dropout_and_identity_vanish(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(), nn.Dropout(), nn.Flatten()).eval()
    assert ops(build_compiled(network, images.float(), classes=())) == ["conv2d", "activation", "flatten"]


def test_layers_of_identities_vanish(images: Tensor) -> None:
    network = make_network(True)
    for layer in partial_activations(network).values():
        layer.mask.fill_(IDENTITY)
    model = build_compiled(network, images.float())
    assert "activation" not in ops(model)
    assert make_plan(model.public, 1).rounds == 5  # the max pool's four, and the logits


class Odd(nn.Module):
    """A network that ends in `tail` applied to two values."""

    def __init__(self, tail: object) -> None:
        super().__init__()
        self.conv, self.tail = nn.Conv2d(3, 3, 1), tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.conv(x), x)  # type: ignore[operator,no-any-return]


class Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


REFUSED = {
    "Sigmoid at '1'": nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()),
    "'mul'": Odd(lambda a, b: a * b),
    "'cat'": Odd(lambda a, b: torch.cat([a, b])),
    "with a constant": Odd(lambda a, _: a + 1),
    "adding a value to itself": Odd(lambda a, _: a + a),
    "with broadcasting": Broadcast(),
    "ceil_mode": nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)),
    "zero padding": nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
    "does not divide": nn.Sequential(nn.AdaptiveAvgPool2d(3)),
    "put a Flatten": nn.Sequential(nn.Linear(8, 2)),
    "start_dim": nn.Sequential(nn.Flatten(0)),
    "cannot trace the network (Branching)": Branching(),
    f"{Path(__file__).name}, line ": Branching(),
    "cannot trace module '1' (Branching)": nn.Sequential(nn.Conv2d(3, 3, 1), Branching()),
    "does not run": nn.Sequential(nn.Conv2d(5, 3, 1)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unsupported_networks_are_named(reason: str, images: Tensor) -> None:
    with pytest.raises(CompileError) as caught:
        build_compiled(REFUSED[reason].eval(), images.float(), classes=())
    assert reason in str(caught.value)


class Clipped(nn.ReLU):
    """A ReLU in name only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 0.1)


def residual(x: Tensor, y: Tensor) -> Tensor:
    x.add_(y)
    return torch.relu(x)


def read_after(x: Tensor, _: Tensor) -> Tensor:
    positive = torch.relu_(x)
    return positive + x


def in_place(x: Tensor, _: Tensor) -> Tensor:
    torch.relu_(x)
    return torch.flatten(x, 1)


@pytest.mark.parametrize("tail", [residual, read_after, in_place, Clipped()])
def test_what_a_trace_does_not_see_is_refused(tail: object, images: Tensor) -> None:
    """An operation in place whose old value is read again, and a layer that is not what it inherits from."""
    network = Odd(tail) if not isinstance(tail, nn.Module) else nn.Sequential(nn.Conv2d(3, 3, 1), tail)
    for attempt in (lambda: build_compiled(network, images.float(), classes=()), lambda: check(network, SHAPE)):
        with pytest.raises(CompileError, match="compute something else than the network"):
            attempt()


class Shared(nn.Module):
    """A convolution that two branches read, one of them through a BatchNorm behind something that vanishes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.norm = nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4)
        self.left, self.right = nn.ReLU(), nn.ReLU()
        self.norm.running_var.fill_(0.25)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(input=x)
        return (self.left(y) + self.right(self.norm(self.drop(y)))).flatten(1)


def test_a_batch_norm_folds_only_into_what_it_alone_reads(images: Tensor) -> None:
    network = Shared().eval()
    model = build_compiled(network, images.float(), classes=())
    assert ops(model).count("conv2d") == 2  # the norm is one
    assert torch.allclose(simulate(model, images), network(images.float()).double(), atol=1e-2)


def test_average_pools_in_a_row_stay_within_the_ring() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 7, 7)
    network = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten()).eval()
    with torch.no_grad():
        network[0].weight.mul_(30)
        expected = network(x).double()
        assert expected.abs().max() > 4
        model = build_compiled(network, x, classes=())
        assert torch.allclose(simulate(model, x.double()), expected, atol=0.01)
        assert torch.allclose(infer(model, x.double()).logits, expected, atol=0.01)


def test_facts_that_no_server_would_load_are_refused(images: Tensor) -> None:
    network = make_network(False)
    facts: dict[str, Any] = {"name": "m", "classes": (), "mean": (0, 0, 0), "std": (1, 1, 1)}  # whole numbers are numbers
    assert compile_model(network, images.float(), **facts).public.std == (1.0, 1.0, 1.0)
    for wrong in ({"mean": (0.0,)}, {"std": (1.0, 0.0, 1.0)}, {"name": "x" * 129}):
        with pytest.raises(CompileError):
            compile_model(network, images.float(), **(facts | wrong))


def test_calibration_meets_its_targets(relu_model: Model, images: Tensor) -> None:
    point = relu_model.public.fixed_point
    assert 0 < point.failure_bound <= FAILURE_TARGET
    assert 6 <= point.activation_bits <= 14
    from protocol.simulation import Simulation, simulate

    seen = Simulation(point)
    simulate(relu_model, images, seen)
    assert 4 * seen.largest_compared < 2 ** (point.comparison_bits - 1)


def test_large_values_cost_precision(images: Tensor) -> None:
    def network(scale: float) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()).eval()
        with torch.no_grad():
            layers[0].weight.mul_(scale)
        return layers

    small, large = (build_compiled(network(s), images.float(), classes=()).public.fixed_point for s in (1, 2.0**22))
    assert large.activation_bits < small.activation_bits
    with pytest.raises(CompileError, match="too large"):
        build_compiled(network(2.0**40), images.float(), classes=())


def test_compiling_leaves_the_network_alone(images: Tensor) -> None:
    network = make_network(False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    build_compiled(network, images.float())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not partial_activations(network)
    assert len(partial_activations(replace_relus(network, SHAPE))) == 3
