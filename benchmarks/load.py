"""Throughput and latency with many clients at once, in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import environment, peak_rss_mb, serving_tls
from client import Client
from protocol.errors import PeerError, RelucentError, ResourceLimit
from protocol.model import load

CLIENT_PROCESSES = 4
READY = "ready\n"


def measure_load(model: Path, clients: list[int], seconds: float, processes: int, say: Any,
                 keep: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """For each number of clients: images per second, latencies, memory, refusals and errors, over `seconds` after a warm-up.

    Every client, with a token of its own over TLS, prepares one inference and uses it, again and again, and finishes the one that it is
    at when the time is over; its rate is what it finished over the time until then. All run on this machine, beside server and dealer.
    processes: of the server. keep: called with what there is after each.
    """
    loaded, rows = load(model), list[dict[str, Any]]()
    result = {"model": loaded.public.name, "relus": loaded.public.relus, "seconds": seconds, "server_processes": processes, "rows": rows,
              **environment()}
    with tempfile.TemporaryDirectory() as folder:
        images = np.frombuffer(bytearray(os.urandom(8 * int(np.prod(loaded.public.input_shape)))), np.uint8)
        np.save(Path(folder) / "images.npy", images.reshape(8, 1, *loaded.public.input_shape))
        for count in clients:
            say(f"{count} clients")
            with serving_tls(model, count, "--processes", str(processes)) as roles:
                (Path(folder) / "tokens").write_text("\n".join(roles.tokens))
                groups = [count // CLIENT_PROCESSES + (i < count % CLIENT_PROCESSES) for i in range(CLIENT_PROCESSES)]
                running = [subprocess.Popen([sys.executable, "-m", "benchmarks.load", roles.server, roles.dealer, str(roles.ca), folder,
                                             str(sum(groups[:i])), str(group), str(seconds)], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, text=True)
                           for i, group in enumerate(groups) if group]
                parts = _together(running)
                memory = {"server": peak_rss_mb(roles.server_pid), "dealer": peak_rss_mb(roles.dealer_pid)}
            online, whole = (sorted(v for part in parts for v in part[key]) for key in ("online", "whole"))
            errors = sum((Counter(part["errors"]) for part in parts), Counter())
            rows.append({"clients": count, "inferences": len(online), "images_per_s": round(sum(part["rate"] for part in parts), 3),
                         "online_ms": _percentiles(online), "with_preprocessing_ms": _percentiles(whole),
                         "refused": errors.pop("ResourceLimit", 0), "errors": dict(errors), "peak_rss_mb": memory})
            keep(result)
    return result


def _together(running: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What processes of clients measured, all from the same moment on: when the last one has warmed up. Raises PeerError."""
    try:
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline() != READY:
                raise PeerError("clients of the load test did not start", "see the lines above")
        for process in running:
            assert process.stdin is not None
            process.stdin.write(READY)
            process.stdin.flush()
        outputs = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            raise PeerError("clients of the load test failed", "see the lines above")
        return [json.loads(output) for output in outputs]
    finally:
        for process in running:
            process.kill()
            process.wait()


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in ms, interpolated between the values seen; 0 without any."""
    p50, p99 = np.percentile(seconds, (50, 99)) if seconds else (0.0, 0.0)
    return {"p50": round(1e3 * float(p50), 1), "p99": round(1e3 * float(p99), 1)}


def main() -> None:
    """Some of the clients, in threads of this process. Prints one JSON object."""
    server, dealer, ca, folder, first, count, seconds = sys.argv[1:8]
    images = np.load(Path(folder) / "images.npy", allow_pickle=False)
    tokens = (Path(folder) / "tokens").read_text().split()[int(first) :]
    online: list[float] = []
    whole: list[float] = []
    rates: list[float] = []
    errors: Counter[str] = Counter()
    warm, go = threading.Semaphore(0), threading.Event()

    def work(number: int) -> None:
        started_up = False
        try:
            with Client(server, dealer, ca=Path(ca), token=tokens[number], cache=Path(folder) / f"cache{first}", timeout_s=120) as client:
                client.predict(images[0])  # warm-up
                started_up = True
                warm.release()
                go.wait()
                began = ended = time.perf_counter()
                finished = 0
                while ended < began + float(seconds):
                    try:
                        client.predict(images[number % len(images)])
                    except RelucentError as error:
                        errors[type(error).__name__] += 1
                        if isinstance(error, ResourceLimit):
                            time.sleep(0.5)
                        ended = time.perf_counter()
                        continue
                    started, ended = ended, time.perf_counter()
                    assert client.last_online is not None
                    whole.append(ended - started)
                    online.append(client.last_online.seconds)
                    finished += 1
                rates.append(finished / (ended - began))
        except RelucentError as error:
            errors[type(error).__name__] += 1
        finally:
            if not started_up:
                warm.release()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(int(count))]
    for thread in threads:
        thread.start()
    for _ in threads:
        warm.acquire()
    print(READY, end="", flush=True)
    sys.stdin.readline()
    go.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"online": online, "whole": whole, "rate": sum(rates), "errors": errors}))


if __name__ == "__main__":
    main()
