"""CrypTen as shipped: with a trusted first party (TFP), or with a trusted third party in a process of its own (TTP).

Usage: python -m benchmarks.peers.crypten_peer FOLDER [--runs N] [--protocol TFP|TTP], in our own environment. Rank 0 is the server with
the weights, rank 1 the client with the image, rank 2 the third party. The first inference warms up and is not reported.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch

from benchmarks.peers.exported import Exported, run_program
from benchmarks.peers.parties import run_parties, tcp_bytes
from benchmarks.processes import environment
from protocol.crypten_adapter import crypten, mpc_graph
from protocol.model import load

SERVER, CLIENT, THIRD = 0, 1, 2
NOTES = {"TFP": "the server makes the correlated randomness and can compute the image from it",
         "TTP": "the client's masks come from a Mersenne Twister with 32 bits of seed, which the server can search"}


def party(rank: int, network: Exported, runs: int, provider: str, rendezvous: str) -> dict[str, Any]:
    """One rank's process: seconds, bytes exchanged, rounds and logits of each run after the first; nothing from the third party."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "RENDEZVOUS": f"file://{rendezvous}", "DISTRIBUTED_BACKEND": "gloo"}
    crypten.cfg.mpc.provider = provider
    if rank == THIRD:
        crypten.mpc.provider.TTPServer()  # serves until the others have finished
        return {}
    crypten.init()
    crypten.cfg.communicator.verbose = True
    world = crypten.communicator.get()
    model = load(network.folder / "model.safetensors")
    world.barrier()
    before, started = sum(tcp_bytes()), time.perf_counter()
    graph = mpc_graph(model.public, model.floats())  # shares the weights
    world.barrier()
    setup = {"setup_s": time.perf_counter() - started, "setup_bytes": sum(tcp_bytes()) - before}
    result: dict[str, Any] = {"s": [], "bytes": [], "rounds": [], "logits": []}
    with crypten.no_grad(), torch.no_grad():
        for run in range(runs + 1):
            image = torch.from_numpy(network.images[[max(run - 1, 0) % len(network.images)]])
            world.barrier()
            world.reset_communication_stats()
            before, started = sum(tcp_bytes()), time.perf_counter()
            logits = graph(crypten.cryptensor(image, src=CLIENT)).get_plain_text()
            result["s"].append(time.perf_counter() - started)
            result["rounds"].append(world.comm_rounds)
            world.barrier()
            result["bytes"].append(sum(tcp_bytes()) - before)
            result["logits"].append(logits[0].tolist())
    crypten.uninit()
    return {name: values[1:] for name, values in result.items()} | setup


def measure(network: Exported, runs: int, provider: str) -> dict[str, Any]:
    """The figures with one provider of correlated randomness; see `docs/benchmarks.md`."""
    with tempfile.TemporaryDirectory() as folder:
        count = 3 if provider == "TTP" else 2
        result = run_parties(party, count, network, runs, provider, f"{folder}/rendezvous")[SERVER]
    return {
        "peer": "CrypTen", "protocol": provider, "runs": runs, "online_ms": [1e3 * s for s in result["s"]],
        "setup_ms": 1e3 * result["setup_s"], "setup_bytes": result["setup_bytes"],
        "bytes": result["bytes"][-1], "rounds": result["rounds"][-1], "logits": result["logits"],
        "versions": environment()["versions"], "hides_image_from_server": False, "needs_dealer": provider == "TTP",
        "notes": f"does not hide the image from the server: {NOTES[provider]}; correlated randomness is made within the online time; both "
                 "parties see the logits; bytes: sent and received by the server, who takes part in every message, over TCP, as the kernel "
                 "counts them; rounds: as CrypTen counts them at the server, requests to a third party included"}


if __name__ == "__main__":
    run_program("CrypTen on an exported network.", measure, tuple(NOTES))
