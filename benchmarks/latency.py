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

from benchmarks.peers.run import run_peers
from benchmarks.plaintext import Plaintext, rounding_bound
from benchmarks.processes import environment, peak_rss_mb, serving
from benchmarks.relay import linked
from protocol.errors import PeerError
from protocol.inference import normalise_images
from protocol.links import LINKS, Link
from protocol.model import Model, save
from protocol.plan import make_plan
from protocol.simulation import simulate
from protocol.timeline import KINDS

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


def timelines(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the time went, over runs: median milliseconds by kind for each party, by layer at the server, and what is not covered."""

    def kinds(run: dict[str, Any], party: str) -> dict[str, float]:
        return {kind: sum(layer.get(kind, 0.0) for layer in run[party]) for kind in KINDS}

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    parties = {"client": "timeline", "server": "server_timeline"}
    result: dict[str, Any] = {name: {kind: median([kinds(run, key)[kind] for run in runs]) for kind in KINDS}
                              for name, key in parties.items()}
    # streams that run at once have a timeline each, of which these are the sums
    wall = [1e3 * run["seconds"] * run["streams"] for run in runs]
    result["coverage"] = {name: round(statistics.median([sum(kinds(run, key).values()) / ms for run, ms in zip(runs, wall)]), 4)
                          for name, key in parties.items()}
    # while the client waits, the server works or the bytes travel: what neither party's work explains
    result["between_ms"] = median([ms - sum(kinds(run, "timeline").values()) + kinds(run, "timeline")["wait"]
                                   - sum(v for k, v in kinds(run, "server_timeline").items() if k != "wait")
                                   for run, ms in zip(runs, wall)])
    result["layers"] = [
        {"layer": first["layer"], **{kind: median([run["server_timeline"][i].get(kind, 0.0) for run in runs]) for kind in KINDS}}
        for i, first in enumerate(runs[0]["server_timeline"])]
    return result


def measure(model: Model, network: str, width: int, *, batch: int, runs: int, crypten: bool, say: Say,
            images: np.ndarray[Any, Any] | None = None, link: Link = LINKS["loopback"]) -> dict[str, Any]:  # frozen
    """All figures of one network as a JSON-ready dictionary; see docs/benchmarks.md for the meaning of each.

    link: between the client and the other two; server and dealer are next to each other.
    """
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
        with serving(path, "--max-batch", str(max(batch, 32))) as roles, linked(roles.server, link) as server, \
                linked(roles.dealer, link) as dealer:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.client_role", server, dealer, str(image_path), str(runs + 1), folder],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            private = _finished(process, "the client", say)
            memory = {"client": private["peak_rss_mb"], "server": peak_rss_mb(roles.server_pid),
                      "dealer": peak_rss_mb(roles.dealer_pid)}
        say("plaintext again")
        plaintext += measure_plaintext(model, images, max(runs, 7))
        baseline: dict[str, Any] | None = None
        if crypten and batch == 1:
            say("CrypTen")
            (baseline,) = run_peers(path, torch.from_numpy(images[:, 0].copy()), ["crypten-tfp"], runs)
            if "skipped" in baseline:
                raise PeerError(f"CrypTen failed: {baseline['skipped']}")
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
        "link": link.name,
        "on_link_ms": round(1e3 * link.seconds(last_online["rounds"], last_online["bytes_up"] + last_online["bytes_down"]), 2),
        "timeline": timelines(private["online"][1:]),
        "rounds": last_online["rounds"], "max_abs_error": max(errors), "rounding_bound": bound,
        "agreement": hits / total, "peak_rss_mb": memory, **environment(),
    }
    if baseline is not None:
        times = [ms / 1e3 for ms in baseline["online_ms"]]
        result |= {"crypten_ms": _median_ms(times), "crypten_ms_spread": _spread_ms(times),
                   "crypten_bytes": baseline["bytes"], "crypten_rounds": baseline["rounds"]}
    return result


LABELS = {"spu-semi2k": "SPU 0.9.5 SEMI2K", "spu-aby3": "SPU 0.9.5 ABY3", "spu-cheetah": "SPU 0.9.5 CHEETAH (no dealer)",
          "tenseal": "TenSEAL CKKS (another, small network)", "crypten-tfp": "CrypTen 0.4.1 TFP", "crypten-ttp": "CrypTen 0.4.1 TTP"}


def run_side_by_side(model: Model, names: list[str], runs: int, say: Say) -> dict[str, Any]:
    """Ours, plaintext PyTorch and each peer on the same network and image, one after another: "rows" of medians in ms and bytes."""
    ours = measure(model, "network", 0, batch=1, runs=max(runs, 5), crypten=False, say=say)
    rows: list[dict[str, Any]] = [
        {"name": "plaintext", "label": "plaintext PyTorch float32", "online_ms": ours["plaintext_ms"], "bytes": None, "hides_image": False},
        {"name": "relucent", "label": f"Relucent, {ours['relus']:,} ReLUs", "online_ms": ours["online_ms"],
         "online_ms_spread": ours["online_ms_spread"], "preprocessing_ms": ours["preprocessing_ms"],
         "bytes": ours["online_bytes_up"] + ours["online_bytes_down"], "preprocessing_bytes": sum(ours["preprocessing_bytes"].values()),
         "rounds": ours["rounds"], "hides_image": True, "runs": ours["runs"]}]
    shape = model.public.input_shape
    image = torch.from_numpy(np.frombuffer(bytearray(os.urandom(int(np.prod(shape)))), np.uint8).reshape(1, *shape))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        for result in run_peers(path, image, names, runs, say=say):
            label = LABELS[result["name"]]
            if "skipped" in result:
                rows.append({"name": result["name"], "label": label, "skipped": result["skipped"]})
                continue
            before = result.get("preprocessing_ms")
            rows.append({"name": result["name"], "label": label, "online_ms": round(statistics.median(result["online_ms"]), 1),
                         "online_ms_spread": [min(result["online_ms"]), max(result["online_ms"])],
                         "preprocessing_ms": round(statistics.median(before), 1) if before else None, "bytes": result["bytes"],
                         "rounds": result.get("rounds"), "hides_image": result["hides_image_from_server"], "runs": result["runs"],
                         "max_abs_error": result["max_abs_error"], "agreement": result["agreement"], "notes": result["notes"],
                         "versions": result["versions"]})
    return {"relus": ours["relus"], "rows": rows, **environment()}
