"""A dealer and a server inside the tests' process, and what tests ask of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from client import Client
from protocol import relucent_pb2 as pb
from protocol.inference import normalise_images
from protocol.model import Model
from protocol.plan import make_plan
from protocol.simulation import simulate
from protocol.transport import OPTIONS, Security, listen, translate
from server.catalogue import Catalogue
from server.dealer import DealerService
from server.service import InferenceService
from server.sessions import Sessions
from server.state import State
from server.stock import Stock

SHAPE = (3, 8, 8)
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8))
PLAINTEXT = Security(insecure=True)


@dataclass
class Services:
    """A dealer and a server in this process."""

    server_address: str
    dealer_address: str
    service: InferenceService
    catalogue: Catalogue
    stock: Stock
    state: State
    sessions: Sessions
    dealer: DealerService
    dealer_server: grpc.Server
    inference_server: grpc.Server
    cache: Path

    def client(self, timeout_s: float = 30.0, **options: Any) -> Client:
        return Client(self.server_address, self.dealer_address, insecure=True, cache=self.cache, timeout_s=timeout_s, **options)

    def materials(self) -> int:
        """Prepared or in preparation."""
        return self.stock.bytes_used() // make_plan(self.catalogue.models()[0].public, 1).server_material_bytes


def start(add: Callable[[grpc.Server], None], address: str = "127.0.0.1:0", interceptors: tuple[Any, ...] = ()) -> tuple[grpc.Server, str]:
    server = grpc.server(ThreadPoolExecutor(32), options=OPTIONS, interceptors=interceptors)
    add(server)
    address = listen(server, address, PLAINTEXT)
    server.start()
    return server, address


Serve = Callable[..., Services]


def agrees(client: Client, model: Model, pixels: torch.Tensor = PIXELS[:1]) -> None:
    """The private result is the simulation's."""
    got = torch.tensor([p.logits for p in client.predict(pixels)], dtype=torch.float64)
    assert float((got - simulate(model, normalise_images(pixels, model.public))).abs().max()) < 0.01


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def steal(client: Client) -> tuple[bytes, bytes]:
    """Id and secret of the next material that was prepared in memory."""
    prepared = client._stock._ready[1][0]  # type: ignore[attr-defined]
    return prepared.material.material_id, prepared.secret


def infer_messages(client: Client, material_id: bytes, secret: bytes, *chunks: pb.Chunk, **changes: Any) -> list[pb.Chunk]:
    """A raw Infer call; raises what the server meant."""
    terms = {"protocol_version": 1, "model_id": client.model.model_id, "material_id": material_id, "client_secret": secret}

    def messages() -> Iterator[pb.InferUp]:
        yield pb.InferUp(open=pb.InferOpen(**(terms | changes)))
        for chunk in chunks:
            yield pb.InferUp(chunk=chunk)

    try:
        return list(client._server.Infer(messages(), timeout=10))
    except grpc.RpcError as error:
        raise translate(error, "the server") from None


def preprocess_open(client: Client, **changes: Any) -> pb.PreprocessUp:
    terms = {"protocol_version": 1, "model_id": client.model.model_id, "delta_id": client._offer.delta_id, "batch": 1,
             "client_id": bytes(32)}
    return pb.PreprocessUp(open=pb.PreprocessOpen(**(terms | changes)))
