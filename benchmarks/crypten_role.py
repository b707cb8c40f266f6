"""One party of the CrypTen baseline. Rank 0 prints one JSON object.

Usage: RANK=0|1 WORLD_SIZE=2 RENDEZVOUS=file:///... python -m benchmarks.crypten_role MODEL IMAGES.npy RUNS

CrypTen as shipped, trusted first party: it does not hide the image from the server (protocol section 1).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from protocol.crypten_adapter import crypten, mpc_graph
from protocol.inference import normalise_images
from protocol.model import load


def main() -> None:
    """Run this party and, at rank 0, print the figures."""
    path, images, runs = Path(sys.argv[1]), np.load(sys.argv[2], allow_pickle=False), int(sys.argv[3])
    crypten.init()
    crypten.cfg.communicator.verbose = True
    world = crypten.communicator.get()
    model = load(path)
    graph = mpc_graph(model.public, model.floats())
    seconds, sent, rounds, logits = [], [], [], []
    with crypten.no_grad(), torch.no_grad():
        for run in range(runs):
            batch = normalise_images(torch.from_numpy(images[run % len(images)]), model.public).float()
            world.barrier()
            world.reset_communication_stats()
            started = time.perf_counter()
            result = graph(crypten.cryptensor(batch, src=1)).get_plain_text()
            seconds.append(time.perf_counter() - started)
            sent.append(world.comm_bytes)
            rounds.append(world.comm_rounds)
            logits.append(result.tolist())
    if world.get_rank() == 0:
        print(json.dumps({"seconds": seconds, "bytes": sent, "rounds": rounds, "logits": logits}))


if __name__ == "__main__":
    main()
