"""Throughput and latency with many clients at once, in real processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import environment, peak_rss_mb, serving_tls
from client import Client
from protocol.errors import RelucentError, ResourceLimit
from protocol.model import load

CLIENT_PROCESSES = 4


def measure_load(model: Path, clients: list[int], seconds: float, processes: int, say: Any) -> dict[str, Any]:
    """For each number of clients: images per second, latencies, memory, refusals and errors, over `seconds` after a warm-up.

    Every client, with a token of its own over TLS, prepares one inference and uses it, again and again. processes: of the server.
    """
    loaded = load(model)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = np.frombuffer(bytearray(os.urandom(8 * int(np.prod(loaded.public.input_shape)))), np.uint8)
        np.save(Path(folder) / "images.npy", images.reshape(8, 1, *loaded.public.input_shape))
        for count in clients:
            say(f"{count} clients")
            with serving_tls(model, count, "--processes", str(processes)) as roles:
                (Path(folder) / "tokens").write_text("\n".join(roles.tokens))
                groups = [count // CLIENT_PROCESSES + (i < count % CLIENT_PROCESSES) for i in range(CLIENT_PROCESSES)]
                running = [subprocess.Popen([sys.executable, "-m", "benchmarks.load", roles.server, roles.dealer, str(roles.ca), folder,
                                             str(sum(groups[:i])), str(group), str(seconds)], stdout=subprocess.PIPE, text=True)
                           for i, group in enumerate(groups) if group]
                parts = [json.loads(process.communicate()[0]) for process in running]
                memory = {"server": peak_rss_mb(roles.server_pid), "dealer": peak_rss_mb(roles.dealer_pid)}
            online, whole = (sorted(v for part in parts for v in part[key]) for key in ("online", "whole"))
            errors = sum((Counter(part["errors"]) for part in parts), Counter())
            rows.append({"clients": count, "inferences": len(online), "images_per_s": round(len(online) / seconds, 3),
                         "online_ms": _percentiles(online), "with_preprocessing_ms": _percentiles(whole),
                         "refused": errors.pop("ResourceLimit", 0), "errors": dict(errors), "peak_rss_mb": memory})
    return {"model": loaded.public.name, "relus": loaded.public.relus, "seconds": seconds, "server_processes": processes, "rows": rows,
            **environment()}


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {"p50": round(1e3 * sum(seconds), 1), "p99": round(1e3 * sum(seconds), 1)}
    return {"p50": round(1e3 * statistics.median(seconds), 1), "p99": round(1e3 * statistics.quantiles(seconds, n=100)[98], 1)}


def main() -> None:
    """Some of the clients, in threads of this process. Prints one JSON object."""
    server, dealer, ca, folder, first, count, seconds = sys.argv[1:8]
    images = np.load(Path(folder) / "images.npy", allow_pickle=False)
    tokens = (Path(folder) / "tokens").read_text().split()[int(first) :]
    online: list[float] = []
    whole: list[float] = []
    errors: Counter[str] = Counter()
    ready = threading.Barrier(int(count))

    def work(number: int) -> None:
        try:
            with Client(server, dealer, ca=Path(ca), token=tokens[number], cache=Path(folder) / f"cache{first}", timeout_s=120) as client:
                client.predict(images[0])  # warm-up
                ready.wait(300)
                until = time.perf_counter() + float(seconds)
                while time.perf_counter() < until:
                    started = time.perf_counter()
                    try:
                        client.predict(images[number % len(images)])
                    except RelucentError as error:
                        errors[type(error).__name__] += 1
                        if isinstance(error, ResourceLimit):
                            time.sleep(0.5)
                        continue
                    if time.perf_counter() <= until and client.last_online is not None:
                        whole.append(time.perf_counter() - started)
                        online.append(client.last_online.seconds)
        except RelucentError as error:
            errors[type(error).__name__] += 1
            ready.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(int(count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"online": online, "whole": whole, "errors": errors}))


if __name__ == "__main__":
    main()
