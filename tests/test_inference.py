"""Every layer and whole networks: private results against exact integers, the simulation and CrypTen."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model_opt.activation import IDENTITY, RELU, SQUARE, PartialActivation
from protocol import ring
from protocol.channel import Buffer, MemoryChannel, memory_pair
from protocol.errors import InputError, MaterialError, PeerError, ProtocolViolation
from protocol.inference import encode_images, infer, preprocess
from protocol.material import Material
from protocol.model import Model, Node, save
from protocol.online import online_client, online_server
from protocol.plaintext import Plaintext, rounding_bound
from protocol.plan import make_plan
from protocol.simulation import server_graph, simulate
from tests.conftest import CLASSES, build_compiled, make_network
from tests.services import SHAPE

PINNED_STEPS = "LAAAAALALRLLALRL"
torch.manual_seed(0)
LINEAR = {
    "conv": nn.Conv2d(3, 4, 3),
    "stride and padding": nn.Conv2d(3, 4, 3, (2, 1), (1, 2)),
    "dilation": nn.Conv2d(3, 4, 3, dilation=2),
    "groups": nn.Conv2d(3, 6, 3, groups=3),
    "depthwise": nn.Conv2d(3, 3, 3, padding=1, groups=3),
    "no bias": nn.Conv2d(3, 4, 1, bias=False),
    "batch norm folded": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "batch norm alone": nn.BatchNorm2d(3),
    "dropout and identity": nn.Sequential(nn.Dropout(), nn.Identity(), nn.Conv2d(3, 4, 3)),
    "average pool": nn.AvgPool2d(2),
    "average pool of odd size": nn.AvgPool2d(3, 2, 1),
    "adaptive pool": nn.AdaptiveAvgPool2d((2, 4)),
}


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten()).eval()


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_are_exact(name: str, images: Tensor) -> None:
    """No truncation lies on the way, so that the private result is the integer result, bit for bit."""
    model = build_compiled(flat(LINEAR[name]), images.float(), classes=())
    assert torch.equal(infer(model, images).logits, simulate(model, images))
    plain = Plaintext(model, torch.float64)(images)
    assert torch.allclose(simulate(model, images), plain, atol=0.01)


def test_linear_layer_is_exact(images: Tensor) -> None:
    model = build_compiled(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), images.float())
    assert torch.equal(infer(model, images).logits, simulate(model, images))


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((3, 2), 1)])
def test_comparisons_are_exact(layer: nn.Module, images: Tensor) -> None:
    model = build_compiled(flat(layer), images.float(), classes=())
    private = infer(model, images).logits
    assert torch.equal(private, simulate(model, images))
    expected = layer(images).flatten(1)
    assert torch.allclose(private, expected, atol=2.0**-model.public.fixed_point.activation_bits)


class Branches(nn.Module):
    """A residual whose branches have different scales, and an identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.a(x) + self.b(x) + x, 1)


def test_residual_addition_is_exact(images: Tensor) -> None:
    model = build_compiled(Branches(), images.float(), classes=())
    assert torch.equal(infer(model, images).logits, simulate(model, images))


def single_activation(kind: int | None, shift: int = 2) -> nn.Module:
    layer = PartialActivation(SHAPE)
    with torch.no_grad():
        layer.mask.copy_(torch.randint(0, 3, SHAPE) if kind is None else torch.full(SHAPE, kind))
        layer.c2_shift.fill_(shift)
        layer.c1.copy_(torch.randn(3, 1, 1))
        layer.c0.copy_(torch.randn(3, 1, 1))
    return flat(layer)


@pytest.mark.parametrize("kind", [SQUARE, RELU, None])
@pytest.mark.parametrize("shift", [0, 3])
def test_partial_activation(kind: int | None, shift: int, images: Tensor) -> None:
    network = single_activation(kind, shift)
    model = build_compiled(network, images.float(), classes=())
    unit = 2.0**-model.public.fixed_point.activation_bits
    private = infer(model, images).logits
    assert float((private - simulate(model, images)).abs().max()) <= unit
    with torch.no_grad():
        assert torch.allclose(private, network(images.float()).double(), atol=8 * unit)


def test_identity_pixels_cost_nothing(images: Tensor) -> None:
    everything = build_compiled(nn.Sequential(single_activation(IDENTITY), nn.Linear(192, 10)), images.float())
    assert make_plan(everything.public, 1).rounds == 1
    some = build_compiled(single_activation(None), images.float(), classes=())
    step = make_plan(some.public, 1).activations[0]
    assert step.identities > 0
    assert infer(some, images[:1]).online_down.bytes == 8 * (step.active + 192)


@pytest.mark.parametrize("which", ["relu_model", "mixed_model"])
@pytest.mark.parametrize("batch", [1, 4])
def test_whole_network_within_the_rounding_bound(which: str, batch: int, images: Tensor, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(which)
    private, simulated = infer(model, images[:batch]).logits, simulate(model, images[:batch])
    difference = (private - simulated).abs().amax(1)
    for x, d in zip(images[:batch], difference):
        bound = rounding_bound(model, x[None])
        assert 0 <= float(d) <= bound < 0.01
    assert torch.allclose(simulated, Plaintext(model, torch.float64)(images[:batch]), atol=0.01)


def test_compiled_network_equals_pytorch(images: Tensor, mixed_model: Model) -> None:
    with torch.no_grad():
        expected = make_network(True)(images.float())
    assert torch.allclose(Plaintext(mixed_model)(images.float()), expected, atol=1e-2)


@pytest.mark.parametrize("which", ["relu_model", "mixed_model"])
def test_same_graph_on_crypten(which: str, images: Tensor, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A second implementation: CrypTen's own two-party run of the same graph gives the same logits."""
    from benchmarks.peers.run import run_peers
    from protocol.inference import normalise_images

    model: Model = request.getfixturevalue(which)
    save(model, tmp_path / "m.safetensors")
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, *SHAPE), dtype=np.uint8))
    (result,) = run_peers(tmp_path / "m.safetensors", pixels, ["crypten-tfp"], 2)
    assert "skipped" not in result, result
    expected = infer(model, normalise_images(pixels, model.public)).logits
    assert torch.allclose(torch.tensor(result["logits"]).double(), expected, atol=0.02)
    assert not result["hides_image_from_server"]


def with_public_factors(images: Tensor) -> Model:
    model = build_compiled(single_activation(None, 6), images.float(), classes=())
    nodes = tuple(Node(n.name, n.op, n.inputs, n.attrs | {"c2_factor": [3, -5, 7]}) if n.op == "activation" else n
                  for n in model.public.nodes)
    return Model(replace(model.public, nodes=nodes), model.private)


def with_nothing_active(images: Tensor) -> Model:
    """A layer of identities, which a file may have though our compiler leaves it out."""
    model = build_compiled(single_activation(RELU), images.float(), classes=())
    masks = {name: torch.zeros_like(mask) for name, mask in model.public.masks.items()}
    assert IDENTITY == 0
    return Model(replace(model.public, masks=masks), model.private)


class Pieces:
    """A client's end of a connection on which d arrives cut at random bytes, and whose answers must begin before d is whole."""

    def __init__(self, channel: MemoryChannel, seed: int) -> None:
        self.channel, self.random = channel, random.Random(seed)
        self.begun = 0

    def send(self, *parts: Buffer, last: bool = True) -> None:
        self.begun += 1
        self.channel.send(*parts, last=last)

    def receive(self, length: int) -> bytearray:
        return self.channel.receive(length)

    def pieces(self, length: int) -> Iterator[Buffer]:
        data = self.channel.receive(length)
        cuts = [0, *sorted(self.random.choices(range(length + 1), k=self.random.randrange(9) if length else 0)), length]
        for first, last in pairwise(cuts):
            before = self.begun
            yield data[first:last]
            assert self.begun - before == (last // 8 > first // 8 or not length)  # whole elements are answered at once


@pytest.mark.parametrize(("which", "batch"), [("relu_model", 3), ("mixed_model", 1), ("mixed_model", 3), ("factors", 3), ("no layer", 1)])
def test_answers_piece_by_piece_are_the_same(which: str, batch: int, images: Tensor, request: pytest.FixtureRequest,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    if which == "factors":
        model = with_public_factors(images)
    elif which == "no layer":
        model = with_nothing_active(images)
    else:
        model = request.getfixturevalue(which)
    monkeypatch.setattr("protocol.dcf.BLOCK_KEYS", 50)  # pieces end inside blocks of keys, and span several
    client, server, _ = preprocess(model, batch)
    x_ring = ring.encode(images[:batch], model.public.fixed_point.activation_bits)
    results = []
    for seed in range(5):
        halves = [Material(b"", half.plan, deepcopy(half._contents)) for half in (client, server)]  # for this comparison only
        client_end, server_end = memory_pair()
        with ThreadPoolExecutor() as pool:
            serving = pool.submit(online_server, halves[1], server_graph(model), server_end)
            results.append(online_client(halves[0], x_ring, Pieces(client_end, seed) if seed else client_end))
            serving.result()
    assert all(torch.equal(one, results[0]) for one in results)


@pytest.mark.parametrize(("which", "batch"), [("relu_model", 1), ("mixed_model", 3)])
def test_bytes_and_rounds_are_those_of_the_protocol(which: str, batch: int, images: Tensor, request: pytest.FixtureRequest) -> None:
    """Online: 8 (input + logits) + 16 per activation, one round trip per activation layer and the logits."""
    model: Model = request.getfixturevalue(which)
    run = infer(model, images[:batch])
    plan, active = run.plan, sum(s.active for s in run.plan.activations)
    assert run.online_up.bytes == 8 * (batch * 192 + active)
    assert run.online_down.bytes == 8 * (batch * 10 + active)
    assert run.online_down.messages == plan.rounds == len(plan.activations) + 1
    assert run.online_up.messages == plan.rounds
    linear = sum(torch.Size(s.shape).numel() for s in plan.steps if type(s).__name__ == "LinearStep")
    keys = sum(plan.key_bytes(s) for s in plan.activations)
    squares, relus = sum(s.squares for s in plan.activations), sum(s.relus for s in plan.activations)
    assert run.dealer_to_server.bytes == 8 * linear + keys
    assert run.dealer_to_client.bytes == 8 * squares + 16 * relus + keys
    identities, remasks = (sum(s.identities for s in plan.activations),
                           sum(torch.Size(s.shape).numel() for s in plan.steps if type(s).__name__ == "RemaskStep"))
    assert run.preprocessing_up.bytes == 8 * (active + identities + remasks)


def test_plan_of_the_relu_network_is_pinned(relu_model: Model) -> None:
    """Two maps in a row re-mask in preprocessing; the 3x3 max pool is a tree of four levels."""
    plan = make_plan(relu_model.public, 1)
    kinds = "".join(type(s).__name__[0] for s in plan.steps)  # Linear, Activation, Remask, in order
    assert kinds == PINNED_STEPS
    assert plan.rounds == kinds.count("A") + 1 == 8


def test_resnet18_rounds() -> None:
    from benchmarks.networks import random_model

    model = random_model("resnet18", 4, 100)
    plan = make_plan(model.public, 1)
    assert (plan.rounds, model.public.relus) == (18, 100)
    x = torch.rand(1, 3, 32, 32).double()
    assert float((infer(model, x).logits - simulate(model, x)).abs().max()) <= rounding_bound(model, x)


def test_a_value_beyond_the_comparison_width_is_garbage(images: Tensor) -> None:
    """The public bound n matters: this is what calibration with margin protects against."""
    model = build_compiled(flat(nn.ReLU()), images.float(), classes=())
    limit = 2.0 ** (model.public.fixed_point.comparison_bits - 1 - model.public.fixed_point.activation_bits)
    good, bad = torch.full((1, *SHAPE), -0.9 * limit).double(), torch.full((1, *SHAPE), -1.5 * limit).double()
    assert float(infer(model, good).logits.abs().max()) == 0
    assert float(infer(model, bad).logits.abs().max()) > 0


# --- misuse ----------------------------------------------------------------------------------------------------------


def test_material_is_used_once(mixed_model: Model, images: Tensor) -> None:
    client, server, _ = preprocess(mixed_model, 1)
    client.take()
    with pytest.raises(MaterialError, match="has been used"):
        client.take()
    server.destroy()
    with pytest.raises(MaterialError):
        server.take()


@pytest.mark.parametrize("change", [-8, 8])
def test_server_refuses_a_message_of_the_wrong_length(change: int, mixed_model: Model) -> None:
    _, server, _ = preprocess(mixed_model, 1)
    mine, theirs = memory_pair()
    mine.send(bytes(8 * 192 + change))
    with pytest.raises(ProtocolViolation, match="bytes where"):
        online_server(server, server_graph(mixed_model), theirs)
    with pytest.raises(MaterialError):  # and the material is gone
        server.take()


def test_client_refuses_a_message_of_the_wrong_length(mixed_model: Model) -> None:
    client, _, _ = preprocess(mixed_model, 1)
    mine, theirs = memory_pair()
    theirs.send(bytes(16))
    with pytest.raises(ProtocolViolation):
        online_client(client, torch.zeros(1, *SHAPE, dtype=torch.int64), mine)


def test_one_mask_never_covers_several_images(mixed_model: Model) -> None:
    client, _, _ = preprocess(mixed_model, 1)
    mine, _ = memory_pair()
    with pytest.raises(InputError, match="the material is for"):
        online_client(client, torch.zeros(4, *SHAPE, dtype=torch.int64), mine)
    assert mine.outgoing.messages == 0
    client.take()  # nothing was sent: the material is still good


def test_a_peer_that_leaves_ends_the_phase(mixed_model: Model) -> None:
    client, _, _ = preprocess(mixed_model, 1)
    mine, theirs = memory_pair()
    theirs.outgoing.close()
    with pytest.raises(PeerError):
        online_client(client, torch.zeros(1, *SHAPE, dtype=torch.int64), mine)


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 8, 9, dtype=torch.uint8), torch.zeros(1, *SHAPE),
                                 torch.zeros(0, *SHAPE, dtype=torch.uint8)])
def test_wrong_images_are_refused(bad: Tensor, mixed_model: Model) -> None:
    encode_images(torch.zeros(1, *SHAPE, dtype=torch.uint8), mixed_model.public)
    with pytest.raises(InputError, match="uint8 of shape"):
        encode_images(bad, mixed_model.public)


def test_coefficients_per_channel_with_public_factor(images: Tensor) -> None:
    """A model with one public c2 per channel (AutoReP as published) runs on the same protocol."""
    changed = with_public_factors(images)
    unit = 2.0**-changed.public.fixed_point.activation_bits
    private = infer(changed, images).logits
    assert float((private - simulate(changed, images)).abs().max()) <= unit
    assert torch.allclose(private, Plaintext(changed, torch.float64)(images), atol=8 * unit)


def test_class_names_must_fit(images: Tensor) -> None:
    from model_opt.compiler import CompileError
    from protocol.errors import ModelFileError

    with pytest.raises((CompileError, ModelFileError), match="class names"):
        build_compiled(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), images.float(), classes=CLASSES)
