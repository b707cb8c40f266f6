"""What each party sees is uniform, whatever the other's secret is."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from protocol import ring
from protocol.channel import MemoryChannel, MemoryPipe
from protocol.dealing import weight_masks
from protocol.inference import make_delta, preprocess
from protocol.model import Model
from protocol.online import online_client, online_server
from protocol.prg import Seed
from protocol.simulation import server_graph, server_parameters
from tests.services import SHAPE
from tests.test_dcf import bias

LIMIT = 6.0  # standard deviations of the chi-square statistic


class Recorder(MemoryPipe):
    """A pipe that keeps what went through it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []

    def send(self, *parts: bytes | bytearray | memoryview, last: bool = True) -> None:
        if not self._begun:
            self.seen.append(b"")
        self.seen[-1] += b"".join(parts)
        super().send(*parts, last=last)


def run(model: Model, x: Tensor) -> tuple[list[bytes], list[bytes]]:
    """The messages to the server and to the client in one online phase."""
    client, server, _ = preprocess(model, len(x))
    up, down = Recorder(), Recorder()
    thread = threading.Thread(target=online_server, args=(server, server_graph(model), MemoryChannel(down, up)))
    thread.start()
    online_client(client, ring.encode(x, model.public.fixed_point.activation_bits), MemoryChannel(up, down))
    thread.join()
    return up.seen, down.seen


@pytest.mark.parametrize("which", ["relu_model", "mixed_model"])
@pytest.mark.parametrize("x", [torch.zeros(4, *SHAPE).double(), torch.full((4, *SHAPE), 2.0).double()])
def test_online_messages_are_uniform(which: str, x: Tensor, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(which)
    runs = [run(model, x) for _ in range(5)]
    layers = len(runs[0][0])
    for index in range(layers):
        assert bias(b"".join(up[index] for up, _ in runs)) < LIMIT, f"message {index} to the server"
        if index < layers - 1:  # the last one is the client's result, checked below together with its share
            assert bias(b"".join(down[index] for _, down in runs)) < LIMIT, f"message {index} to the client"
    assert bias(ring.to_bytes(ring.encode(x, 10)).tobytes()) > 100  # structure would be seen


def test_server_preprocessing_messages_are_uniform(mixed_model: Model) -> None:
    from protocol.dealing import DealtToClient, DealtToServer, deal
    from protocol.plan import make_plan
    from protocol.preprocessing import preprocess_client, preprocess_server

    plan = make_plan(mixed_model.public, 4)
    to_client, to_server, up = Recorder(), Recorder(), Recorder()
    for _ in range(3):
        masks = weight_masks(mixed_model.public, Seed.fresh())
        seeds = Seed.fresh(), Seed.fresh()
        deal(plan, masks, *seeds, to_client, to_server)
        preprocess_client(plan, make_delta(mixed_model, masks), DealtToClient(plan, seeds[0], to_client), up)
        preprocess_server(plan, DealtToServer(plan, seeds[1], to_server), up)
    assert bias(b"".join(up.seen)) < LIMIT


def test_delta_is_uniform_and_hides_the_weights(relu_model: Model) -> None:
    data = b""
    for _ in range(20):
        delta = make_delta(relu_model, weight_masks(relu_model.public, Seed.fresh()))
        data += b"".join(bytes(ring.to_bytes(d)) for d in delta.values())
    assert bias(data) < LIMIT
    weights = b"".join(bytes(ring.to_bytes(v.long())) for k, v in relu_model.private.items() if k.endswith("weight"))
    assert bias(weights * 5) > 100


def test_shares_of_the_logits_are_uniform(relu_model: Model) -> None:
    data = b"".join(run(relu_model, torch.ones(4, *SHAPE).double())[1][-1] for _ in range(10))
    assert bias(data) < LIMIT


def test_secrets_print_nothing(mixed_model: Model) -> None:
    client, server, transcript = preprocess(mixed_model, 1)
    contents, other = client.take(), server.take()
    for thing in (client, server, contents, other, contents.activations[0], other.activations[0], contents.activations[0].relu,
                  server_parameters(mixed_model)["fc.weight" if "fc.weight" in mixed_model.private else "fc.bias"], mixed_model):
        text = repr(thing)
        assert "tensor(" not in text, text[:200]
        assert len(text) < 3000
    assert transcript.plan.batch == 1
