"""SPU: SEMI2K and CHEETAH between two parties, ABY3 between three, as processes that talk over loopback ports.

Usage: python -m benchmarks.peers.spu_peer FOLDER [--runs N] [--protocol SEMI2K|ABY3|CHEETAH]. Party 0 is the client with the image,
party 1 the server with the weights; both are secret inputs. Party 0 alone receives the logits.
"""

from __future__ import annotations

import pickle
import time
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import spu
from jax import lax
from spu.utils import frontend

from benchmarks.peers.exported import Array, Exported, InputError, run_program
from benchmarks.peers.parties import free_ports, run_parties, tcp_bytes

CLIENT, SERVER = 0, 1
IDENTITY, SQUARE, RELU = 0, 1, 2
PARTIES = {"SEMI2K": 2, "ABY3": 3, "CHEETAH": 2}
TIMEOUT_MS = 600_000
NOTES = {
    "SEMI2K": "the client is SPU's trusted first party: it makes the correlated randomness and could learn the weights from it",
    "ABY3": "three computing parties, honest majority",
    "CHEETAH": "two parties, homomorphic encryption and oblivious transfer, whose base is set up in the warm-up",
}


def activation(network: Exported, name: str, z: Any, parameters: dict[str, Any]) -> Any:
    """ReLU on the ReLU pixels alone, (c2 z + c1) z + c0 on the square pixels alone; z is (batch, *shape of the mask).

    Every index is public: selecting pixels and putting them back are gathers without communication.
    """
    mask, flat = network.arrays[f"{name}.mask"], z.reshape(len(z), -1)
    groups = {kind: index for kind in (RELU, SQUARE, IDENTITY) if len(index := np.flatnonzero(mask == kind))}

    def evaluate(kind: int, index: Array) -> Any:
        chosen = flat if len(groups) == 1 else flat[:, index]
        if kind == RELU:
            return jnp.maximum(chosen, 0)
        if kind == IDENTITY:
            return chosen
        channel = index // (mask.size // len(mask))
        c2, c1, c0 = network.arrays[f"{name}.c2"][channel], parameters[f"{name}.c1"][channel], parameters[f"{name}.c0"][channel]
        return (c2 * chosen + c1) * chosen + c0

    out = jnp.concatenate([evaluate(kind, index) for kind, index in groups.items()], 1)
    if len(groups) > 1:
        out = out[:, np.argsort(np.concatenate(list(groups.values())))]
    return out.reshape(z.shape)


def pool(x: Any, attrs: dict[str, Any], start: float, combine: Any) -> Any:
    """Combines the values of each window, zeros or -inf around; x is (batch, C, H, W)."""
    padding = ((0, 0), (0, 0), *((p, p) for p in attrs["padding"]))
    return lax.reduce_window(x, start, combine, (1, 1, *attrs["kernel"]), (1, 1, *attrs["stride"]), padding)


def forward(network: Exported, x: Any, parameters: dict[str, Any]) -> Any:
    """Logits (batch, classes) of normalised images x (batch, C, H, W), in JAX."""
    values = {"input": x}
    for node in network.nodes:
        name, op, attrs, a = node["name"], node["op"], node["attrs"], values[node["inputs"][0]]
        weight: Any = parameters.get(f"{name}.weight")
        bias: Any = parameters.get(f"{name}.bias")
        if op == "conv2d":
            values[name] = lax.conv_general_dilated(
                a, weight, attrs["stride"], [(p, p) for p in attrs["padding"]], rhs_dilation=attrs["dilation"],
                feature_group_count=attrs["groups"]) + bias.reshape(-1, 1, 1)
        elif op == "linear":
            values[name] = a @ weight.T + bias
        elif op == "scale":
            values[name] = a * weight + bias
        elif op == "add":
            values[name] = a + values[node["inputs"][1]]
        elif op == "flatten":
            values[name] = a.reshape(len(a), -1)
        elif op == "avg_pool2d":
            values[name] = pool(a, attrs, 0.0, lax.add) * (1 / np.prod(attrs["kernel"]))
        elif op == "max_pool2d":
            values[name] = pool(a, attrs, -np.inf, lax.max)
        elif op == "activation":
            values[name] = activation(network, name, a, parameters)
        else:
            raise InputError(f"node {name} has the unknown operation {op}")
    return values[network.nodes[-1]["name"]]


class Party:
    """One SPU node: its link to the others, its runtime and the compiled network."""

    def __init__(self, network: Exported, rank: int, protocol: str, ports: list[int]) -> None:
        description = spu.link.Desc()
        description.recv_timeout_ms = description.http_timeout_ms = TIMEOUT_MS
        for party, port in enumerate(ports):
            description.add_party(f"party{party}", f"127.0.0.1:{port}")
        config = spu.RuntimeConfig(protocol=spu.parse_protocol_kind(protocol), field=spu.FieldType.FM64)
        config.experimental_enable_colocated_optimization = protocol == "CHEETAH"  # where it saves traffic
        self.link = spu.link.create_brpc(description, rank)
        self.rank, self.count = rank, len(ports)
        self._io, self._runtime = spu.Io(self.count, config), spu.Runtime(self.link, config)
        parameters = network.parameters
        names = ["input", *parameters]
        self._program, _ = frontend.compile(
            frontend.Kind.JAX, lambda x, p: forward(network, x, p),
            [jax.ShapeDtypeStruct((1, *network.images.shape[1:]), np.float32), parameters], {}, names,
            [spu.Visibility.VIS_SECRET] * len(names), lambda flat: ["logits"])

    def share(self, names: list[str], arrays: list[Array] | None, owner: int) -> None:
        """The owner, who alone passes `arrays`, gives every party its shares of them."""
        if arrays is None:
            mine = pickle.loads(self.link.recv(owner))  # noqa: S301
        else:
            shares = [self._io.make_shares(array, spu.Visibility.VIS_SECRET, owner) for array in arrays]
            for other in range(self.count):
                if other != owner:
                    self.link.send(other, pickle.dumps([share[other] for share in shares]))
            mine = [share[owner] for share in shares]
        for name, share in zip(names, mine):
            self._runtime.set_var(name, share)

    def infer(self, image: Array | None) -> Array | None:
        """Logits (1, classes) at the client, who alone passes the image (1, C, H, W)."""
        self.share(["input"], None if image is None else [image], CLIENT)
        self._runtime.run(self._program)
        share = self._runtime.get_var("logits")
        if self.rank != CLIENT:
            self.link.send(CLIENT, pickle.dumps(share))
            return None
        others = [pickle.loads(self.link.recv(other)) for other in range(self.count) if other != CLIENT]  # noqa: S301
        logits: Array = self._io.reconstruct([share, *others])
        return logits


def party(rank: int, network: Exported, runs: int, protocol: str, ports: list[int]) -> dict[str, Any]:
    """One party's process: seconds, bytes it sent and logits of each run after the first, and the same for its set-up."""
    started = time.perf_counter()
    node = Party(network, rank, protocol, ports)
    parameters = network.parameters
    node.share(list(parameters), list(parameters.values()) if rank == SERVER else None, SERVER)
    node.link.barrier()
    result: dict[str, Any] = {"setup_s": time.perf_counter() - started, "setup_sent": tcp_bytes()[0], "s": [], "sent": [], "logits": []}
    for run in range(runs + 1):
        image = network.images[[max(run - 1, 0) % len(network.images)]] if rank == CLIENT else None
        node.link.barrier()
        before, started = tcp_bytes()[0], time.perf_counter()
        logits = node.infer(image)
        result["s"].append(time.perf_counter() - started)
        node.link.barrier()
        result["sent"].append(tcp_bytes()[0] - before)
        result["logits"].append(None if logits is None else logits[0].tolist())
    node.link.stop_link()
    return result | {name: result[name][1:] for name in ("s", "sent", "logits")}


def measure(network: Exported, runs: int, protocol: str) -> dict[str, Any]:
    """The figures of one protocol; see `docs/benchmarks.md`."""
    count = PARTIES[protocol]
    results = run_parties(party, count, network, runs, protocol, free_ports(count))
    return {
        "peer": "SPU", "protocol": protocol, "runs": runs, "online_ms": [1e3 * s for s in results[CLIENT]["s"]],
        "bytes": sum(r["sent"][-1] for r in results), "rounds": None, "logits": results[CLIENT]["logits"],
        "setup_ms": 1e3 * results[CLIENT]["setup_s"], "setup_bytes": sum(r["setup_sent"] for r in results),
        "versions": {name: version(name) for name in ("spu", "jax", "jaxlib", "numpy")},
        "hides_image_from_server": True, "needs_dealer": False,
        "notes": f"{NOTES[protocol]}; 64-bit ring, 18 fractional bits; correlated randomness is made within the online time; "
                 "set-up (start, compiling, sharing the weights) is apart; bytes: sent by all parties over TCP in the last run, as the "
                 "kernel counts them"}


if __name__ == "__main__":
    run_program("SPU on an exported network.", measure, tuple(PARTIES))
