"""The client of a measurement, in a process of its own. Prints one JSON object.

Usage: python -m benchmarks.client_role SERVER DEALER IMAGES.npy RUNS [CACHE]. IMAGES is uint8 (N, batch, C, H, W); run i
classifies IMAGES[i mod N].
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.peers.parties import tcp_bytes
from benchmarks.processes import peak_rss_mb
from client import Client


def main() -> None:
    """Run the measured inferences and print their figures."""
    server, dealer, path, runs = sys.argv[1:5]
    images = np.load(path, allow_pickle=False)
    batch = images.shape[1]
    online, preprocessing, logits = [], [], []
    started = time.perf_counter()
    with Client(server, dealer, insecure=True, cache=Path(sys.argv[5]) if len(sys.argv) > 5 else None, timeline=True) as client:
        setup = {"seconds": time.perf_counter() - started, "tcp_bytes": sum(tcp_bytes())}
        for run in range(int(runs)):
            before = sum(tcp_bytes())
            client.preprocess(1, batch)
            between = sum(tcp_bytes())
            result = client.predict(images[run % len(images)])
            assert client.last_online is not None and client.last_preprocessing is not None
            online.append(asdict(client.last_online) | {"tcp_bytes": sum(tcp_bytes()) - between})
            preprocessing.append(asdict(client.last_preprocessing) | {"tcp_bytes": between - before})
            logits.append([list(p.logits) for p in result])
            print(f"run {run + 1} of {runs}", file=sys.stderr, flush=True)
    print(json.dumps({"setup": setup, "online": online, "preprocessing": preprocessing, "logits": logits,
                      "peak_rss_mb": peak_rss_mb(os.getpid())}))


if __name__ == "__main__":
    main()
