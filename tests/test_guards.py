"""What an inference costs, as far as it is deterministic: bytes, rounds, AES blocks, copies of large tensors. Never time."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.networks import random_model
from benchmarks.sweep import AES_PER_RELU_BIT
from protocol import dcf, parallel, ring
from protocol.inference import preprocess, run_online
from protocol.model import Model
from protocol.plan import make_plan
from protocol.prg import Seed
from protocol.relucent_pb2 import Chunk, InferUp
from protocol.simulation import server_graph, server_parameters
from protocol.tensor import Weight
from protocol.wire import CHUNK_BYTES, FRAME_BYTES, ChunkReceiver, ChunkSender

WIDTH, RELUS = 8, 1500


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("resnet18", WIDTH, RELUS)


def test_bytes_and_rounds(model: Model) -> None:
    plan = make_plan(model.public, 1)
    activations = 557_056 * WIDTH // 64
    assert plan.rounds == 18
    assert plan.online_bytes_up == 8 * (3072 + activations)
    assert plan.online_bytes_down == 8 * (10 + activations)
    client, server, transcript = preprocess(model, 1)
    _, up, down = run_online(client, server, server_graph(model), Seed.fresh().ring("x", plan.input_shape) >> 40)
    assert (up.bytes, up.messages) == (plan.online_bytes_up, 18)
    assert (down.bytes, down.messages) == (plan.online_bytes_down, 18)
    keys = sum(plan.key_bytes(step) for step in plan.activations)
    outputs = sum(torch.Size(s.shape).numel() for s in plan.steps if type(s).__name__ == "LinearStep")
    assert transcript.dealer_to_server.bytes == 8 * outputs + keys
    assert transcript.dealer_to_client.bytes == 8 * (activations - RELUS) + keys + 16 * RELUS
    assert transcript.preprocessing_up.bytes == 8 * activations


def test_aes_blocks_per_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    hashers: list[dcf.Hasher] = []

    class Kept(dcf.Hasher):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            hashers.append(self)

    count, bits = 300, 19
    alpha, payload = torch.randint(0, 1 << bits, (count,)).numpy().astype("uint64"), torch.ones(count, 2).numpy().astype("uint64")
    keys, _ = dcf.generate(alpha, payload, bits, dcf.fresh_randomness(count))
    monkeypatch.setattr(dcf, "Hasher", Kept)
    dcf.evaluate(keys, alpha)
    assert sum(hasher.blocks for hasher in hashers) == AES_PER_RELU_BIT * bits * count


class Copies(TorchDispatchMode):
    """Counts operations that copy at least `least` elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.seen = least, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if name in ("aten.clone", "aten._to_copy", "aten.copy_", "aten.cat", "aten.index_select", "aten.index_copy_") and \
                isinstance(result, torch.Tensor) and result.numel() >= self.least:
            self.seen[name] += 1
        return result


def test_copies_of_large_tensors(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, both parties: nothing of a layer's size is copied but what mixes ReLUs into squares, and the windows of 8-bit kernels."""
    monkeypatch.setattr(parallel, "cores", lambda: 1)  # all parts in the counted threads, none smaller than a layer
    plan = make_plan(model.public, 1)
    client, server, _ = preprocess(model, 1)
    graph = server_graph(model)
    x_ring = Seed.fresh().ring("x", plan.input_shape) >> 40
    with Copies(WIDTH * 1024) as copies:
        _count_in_threads(copies, lambda: run_online(client, server, graph, x_ring))
    large = sum(1 for step in plan.activations if step.active >= WIDTH * 1024)
    assert large == 5
    digits = sum(1 for w in server_parameters(model).values() if isinstance(w, Weight) and w.digits is not None)
    assert sum(copies.seen.values()) <= 2 * large + digits, dict(copies.seen)


def _count_in_threads(mode: Copies, work: Any) -> None:
    """A dispatch mode holds for its own thread: enter it in the server's thread too."""
    import threading

    original = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with mode:
            original(self)

    threading.Thread.run = run  # type: ignore[method-assign]
    try:
        work()
    finally:
        threading.Thread.run = original  # type: ignore[method-assign]


def test_a_chunk_is_copied_once_each_way() -> None:
    """protobuf copies data whenever a field is read, and a whole message that is put into another."""
    reads = 0

    class Arrived:
        sequence, last = 0, True

        @property
        def data(self) -> bytes:
            nonlocal reads
            reads += 1
            return bytes(1000)

    ChunkReceiver(lambda: Arrived()).receive(1000)  # type: ignore[arg-type,return-value]
    assert reads == 1
    sent: list[InferUp] = []
    sender = ChunkSender(sent.append, InferUp)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("protocol.wire.Chunk", lambda **fields: Chunk(**fields) if "data" not in fields else pytest.fail("a chunk to copy"))
        sender.send(bytes(1000))
    assert len(sent[0].chunk.data) == 1000 and sender.bytes == sent[0].chunk.ByteSize() + FRAME_BYTES


def test_copies_on_the_way_to_grpc_and_back() -> None:
    """A layer's message: one copy into protobuf, one into its bytes; back one into protobuf, one into the buffer that the layer reads."""
    elements = torch.zeros(1 << 19, dtype=torch.int64)
    size = 8 * elements.numel()
    on_the_wire: list[bytes] = []
    gc.collect()
    tracemalloc.start()
    try:
        ChunkSender(lambda chunk: on_the_wire.append(chunk.SerializeToString())).send(ring.to_bytes(elements))
        sent = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        source = iter(on_the_wire)
        received = ring.from_bytes(ChunkReceiver(lambda: Chunk.FromString(next(source))).receive(size), (-1,))
        back = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert torch.equal(received, elements)
    assert len(on_the_wire) == size / CHUNK_BYTES
    assert sent[0] < 1.1 * size and sent[1] < size + 4 * CHUNK_BYTES  # what lies on the wire, and a chunk on its way
    assert back[1] - sent[0] < 1.3 * size + 4 * CHUNK_BYTES  # the buffer, which grows by an eighth at a time, and a chunk on its way
