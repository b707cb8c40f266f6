"""Latency and traffic of one network: private inference in three processes, plaintext, and CrypTen, in one run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.plaintext import Plaintext, rounding_bound
from benchmarks.processes import environment, peak_rss_mb, serving
from protocol.errors import PeerError
from protocol.inference import normalise_images
from protocol.model import Model, save
from protocol.plan import make_plan
from protocol.simulation import simulate

Say = Callable[[str], None]


def _median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)


def _spread_ms(seconds: list[float]) -> list[float]:
    return [round(min(seconds) * 1e3, 3), round(max(seconds) * 1e3, 3)]


def _finished(process: subprocess.Popen[str], what: str, say: Say) -> dict[str, Any]:
    out, err = process.communicate()
    if process.returncode != 0:
        raise PeerError(f"{what} failed: {(err.strip().splitlines() or ['no message'])[-1]}")
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return result


def measure_plaintext(model: Model, images: np.ndarray[Any, Any], runs: int) -> list[float]:
    """Seconds of the float32 forward pass, all cores, after two warm-up passes."""
    network = Plaintext(model)
    x = normalise_images(torch.from_numpy(images[0]), model.public).float()
    seconds = []
    with torch.inference_mode():
        for run in range(runs + 2):
            started = time.perf_counter()
            network(x)
            if run >= 2:
                seconds.append(time.perf_counter() - started)
    return seconds


def measure_crypten(model: Path, images: Path, runs: int, say: Say) -> dict[str, Any]:
    """CrypTen's own run of the same graph in two processes, trusted first party; the first run is warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.crypten_role", str(model), str(images), str(runs + 1)]
        base = os.environ | {"WORLD_SIZE": "2", "RENDEZVOUS": f"file://{folder}/rendezvous", "DISTRIBUTED_BACKEND": "gloo"}
        parties = [subprocess.Popen(command, env=base | {"RANK": str(rank)}, text=True, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE) for rank in (0, 1)]
        try:
            return _finished(parties[0], "CrypTen", say)
        finally:
            for party in parties:
                party.kill()
                party.communicate()


def measure(model: Model, network: str, width: int, *, batch: int, runs: int, crypten: bool, say: Say,
            images: np.ndarray[Any, Any] | None = None) -> dict[str, Any]:
    """All figures of one network as a JSON-ready dictionary; see docs/benchmarks.md for the meaning of each."""
    if images is None:
        shape = (min(runs, 8), batch, *model.public.input_shape)
        images = np.frombuffer(bytearray(os.urandom(int(np.prod(shape)))), dtype=np.uint8).reshape(shape)
    plan = make_plan(model.public, batch)
    with tempfile.TemporaryDirectory() as folder:
        path, image_path = Path(folder) / "model.safetensors", Path(folder) / "images.npy"
        save(model, path)
        np.save(image_path, images)
        say("plaintext")
        plaintext = measure_plaintext(model, images, max(runs, 7))
        say("private inference")
        with serving(path) as roles:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.client_role", roles.server, roles.dealer, str(image_path), str(runs + 1), folder],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            private = _finished(process, "the client", say)
            memory = {"client": private["peak_rss_mb"], "server": peak_rss_mb(roles.server_pid),
                      "dealer": peak_rss_mb(roles.dealer_pid)}
        say("plaintext again")
        plaintext += measure_plaintext(model, images, max(runs, 7))
        baseline: dict[str, Any] | None = None
        if crypten:
            say("CrypTen")
            baseline = measure_crypten(path, image_path, runs, say)
    say("comparing results")
    errors, hits, total = [], 0, 0
    for index in range(min(len(images), runs + 1)):
        x = normalise_images(torch.from_numpy(images[index]), model.public)
        logits = torch.tensor(private["logits"][index], dtype=torch.float64)
        errors.append(float((simulate(model, x) - logits).abs().max()))
        with torch.inference_mode():
            hits += int((Plaintext(model)(x.float()).argmax(1) == logits.argmax(1)).sum())
        total += len(x)
    bound = rounding_bound(model, normalise_images(torch.from_numpy(images[0]), model.public))
    online = [r["seconds"] for r in private["online"][1:]]
    preprocessing = [r["seconds"] for r in private["preprocessing"][1:]]
    last_online, last_pre = private["online"][-1], private["preprocessing"][-1]
    result: dict[str, Any] = {
        "network": network, "width": width, "relus": plan.model.relus, "activations": sum(s.active for s in plan.activations) // batch,
        "activation_layers": len(plan.activations), "batch": batch, "runs": runs,
        "fixed_point": plan.model.describe()["fixed_point"],
        "plaintext_ms": _median_ms(plaintext), "plaintext_ms_spread": _spread_ms(plaintext),
        "online_ms": _median_ms(online), "online_ms_spread": _spread_ms(online),
        "preprocessing_ms": _median_ms(preprocessing), "preprocessing_ms_spread": _spread_ms(preprocessing),
        "crypten_ms": None, "crypten_ms_spread": None, "crypten_bytes": None, "crypten_rounds": None,
        "online_bytes_up": last_online["bytes_up"], "online_bytes_down": last_online["bytes_down"],
        "online_payload_bytes": plan.online_bytes_up + plan.online_bytes_down,
        "preprocessing_bytes": {"client_to_server": last_pre["bytes_up"], "server_to_client": last_pre["bytes_down"],
                                "dealer_to_client": last_pre["dealer_bytes"], "dealer_to_server": last_pre["dealer_to_server_bytes"]},
        "rounds": last_online["rounds"], "max_abs_error": max(errors), "rounding_bound": bound,
        "agreement": hits / total, "peak_rss_mb": memory, **environment(),
    }
    if baseline is not None:
        seconds = baseline["seconds"][1:]
        result |= {"crypten_ms": _median_ms(seconds), "crypten_ms_spread": _spread_ms(seconds),
                   "crypten_bytes": baseline["bytes"][-1], "crypten_rounds": baseline["rounds"][-1]}
    return result
