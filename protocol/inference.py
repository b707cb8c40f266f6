"""The whole protocol as one in-process run: every phase named, every message through an in-memory channel."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from protocol import ring
from protocol.channel import MemoryChannel, MemoryPipe, memory_pair
from protocol.dealing import DealtToClient, DealtToServer, deal, weight_masks
from protocol.errors import InputError
from protocol.material import ClientContents, Material, ServerContents
from protocol.model import Model, PublicModel
from protocol.online import online_client, online_server
from protocol.plan import Plan, make_plan
from protocol.preprocessing import preprocess_client, preprocess_server
from protocol.prg import Seed
from protocol.simulation import server_graph


def make_delta(model: Model, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Delta = W - B of every private weight: what the server publishes (protocol section 3)."""
    weights = model.weights()
    return {name: weights[name] - mask for name, mask in masks.items()}


def encode_images(images: Tensor, model: PublicModel) -> Tensor:
    """uint8 images (batch, *input_shape) to the fixed-point input. Raises InputError for another shape or type."""
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != model.input_shape or len(images) == 0:
        wanted = "x".join(map(str, model.input_shape))
        raise InputError(f"images must be uint8 of shape (batch, {wanted}), got {images.dtype} {tuple(images.shape)}")
    return ring.encode(normalise_images(images, model), model.fixed_point.activation_bits)


def normalise_images(images: Tensor, model: PublicModel) -> Tensor:
    """uint8 images to the real input: (pixel / 255 - mean) / std per channel, float64."""
    view = (1, -1) + (1,) * (len(model.input_shape) - 1)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(view) for v in (model.mean, model.std))
    return (images.double() / 255 - mean) / std


@dataclass(frozen=True)
class Transcript:
    """What an in-process inference produced: logits (float64) and every channel, with its counts."""

    logits: Tensor
    plan: Plan
    dealer_to_client: MemoryPipe
    dealer_to_server: MemoryPipe
    preprocessing_up: MemoryPipe
    online_up: MemoryPipe
    online_down: MemoryPipe


def preprocess(model: Model, batch: int) -> tuple[Material[ClientContents], Material[ServerContents], Transcript]:
    """Dealing and both parties' preprocessing for one inference; the transcript has no logits yet."""
    plan = make_plan(model.public, batch)
    masks = weight_masks(model.public, Seed.fresh())
    delta = make_delta(model, masks)
    client_seed, server_seed = Seed.fresh(), Seed.fresh()
    to_client, to_server, up = MemoryPipe(), MemoryPipe(), MemoryPipe()
    deal(plan, masks, client_seed, server_seed, to_client, to_server)
    client = preprocess_client(plan, delta, DealtToClient(plan, client_seed, to_client), up)
    server = preprocess_server(plan, DealtToServer(plan, server_seed, to_server), up)
    name = secrets.token_bytes(16)
    transcript = Transcript(torch.empty(0), plan, to_client, to_server, up, MemoryPipe(), MemoryPipe())
    return Material(name, plan, client), Material(name, plan, server), transcript


def run_online(client: Material[ClientContents], server: Material[ServerContents], graph: Any,
               x_ring: Tensor) -> tuple[Tensor, MemoryPipe, MemoryPipe]:
    """The online phase, client and server in two threads: logits in the ring, and what went up and down."""
    client_end, server_end = memory_pair()
    failure: list[BaseException] = []

    def serve(channel: MemoryChannel) -> None:
        try:
            online_server(server, graph, channel)
        except BaseException as error:
            failure.append(error)
            channel.outgoing.close()

    thread = threading.Thread(target=serve, args=(server_end,))
    thread.start()
    try:
        logits = online_client(client, x_ring, client_end)
    finally:
        thread.join()
    if failure:
        raise failure[0]
    return logits, client_end.outgoing, client_end.incoming


def infer(model: Model, x_float: Tensor) -> Transcript:
    """One private inference on normalised images (batch, *input_shape)."""
    client, server, dealt = preprocess(model, len(x_float))
    x_ring = ring.encode(x_float, model.public.fixed_point.activation_bits)
    logits, up, down = run_online(client, server, server_graph(model), x_ring)
    return replace(dealt, logits=ring.decode(logits, dealt.plan.output_scale), online_up=up, online_down=down)
