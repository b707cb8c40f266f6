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

from benchmarks.emulation import emulated
from benchmarks.peers.run import run_peers
from benchmarks.processes import environment, peak_rss_mb, serving
from protocol.errors import PeerError
from protocol.inference import normalise_images
from protocol.links import LINKS, Link
from protocol.model import Model, save
from protocol.plaintext import Plaintext, rounding_bound
from protocol.plan import Plan, make_plan
from protocol.ring import ELEMENT_BYTES
from protocol.simulation import simulate
from protocol.timeline import KINDS, PREPROCESSING_KINDS

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
    """Where the time went, over runs: median milliseconds of one stream by kind for each party, and by layer at the server.

    Both parties' laps of a layer share its name, and the server's waiting in it splits into "link", that is gRPC, serialisation and the
    way, and "client", what the client worked meanwhile; see `_split_layer`. "coverage" is a party's sum over the wall time that
    the client measured.
    """

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    kinds = [kind for kind in KINDS if kind != "wait"]
    split = [[_split_layer(mine, theirs, run["streams"]) for mine, theirs in zip(run["timeline"], run["server_timeline"], strict=True)]
             for run in runs]
    server = {kind: median([sum(layer[kind] for layer in layers) for layers in split]) for kind in (*kinds, "client", "link")}
    client = {kind: median([sum(layer.get(kind, 0.0) for layer in run["timeline"]) / run["streams"] for run in runs]) for kind in KINDS}
    coverage = {name: round(statistics.median(
        [sum(layer.get(kind, 0.0) for layer in run[key] for kind in KINDS) / (1e3 * run["seconds"] * run["streams"]) for run in runs]), 4)
        for name, key in (("client", "timeline"), ("server", "server_timeline"))}
    layers = [{"layer": runs[0]["server_timeline"][i]["layer"], **{kind: median([layers[i][kind] for layers in split]) for kind in server}}
              for i in range(len(split[0]))]
    return {"client": client, "server": server, "coverage": coverage, "layers": layers}


def preprocessing_timelines(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the time of preprocessing went, over runs: median milliseconds by kind for each party, and its "coverage" as in `timelines`."""
    told: dict[str, Any] = {"coverage": {}}
    for party, key in (("client", "timeline"), ("server", "server_timeline"), ("dealer", "dealer_timeline")):
        sums = [{kind: sum(layer.get(kind, 0.0) for layer in run[key]) for kind in PREPROCESSING_KINDS} for run in runs]
        told[party] = {kind: round(statistics.median(one[kind] for one in sums), 3) for kind in PREPROCESSING_KINDS}
        told["coverage"][party] = round(statistics.median(sum(one.values()) / (1e3 * run["seconds"]) for one, run in zip(sums, runs)), 4)
    return told


def add_bytes(layers: list[dict[str, Any]], plan: Plan) -> None:
    """What the plan has each party send in each layer of one inference, "bytes_up" and "bytes_down": 8 for each element."""
    count = [ELEMENT_BYTES * torch.Size(shape).numel() for shape in (plan.input_shape, plan.output_shape)]
    each = [ELEMENT_BYTES * step.active for step in plan.activations]
    for layer, up, down in zip(layers, [count[0], *each, 0], [0, *each, count[1]], strict=True):
        layer |= {"bytes_up": up, "bytes_down": down}


def _split_layer(client: dict[str, Any], server: dict[str, Any], streams: int) -> dict[str, float]:
    """Milliseconds of a layer at the server by kind, its waiting split.

    From the server's message to the answer pass the way there, the client's work and the way back, one after another but where a slow link
    carries both ways at once; the server works meanwhile, then waits. Both ways take alike: what they take together is wait + own work -
    client's work, and of the way there only what the server's own work does not cover is waited for.
    """
    if client["layer"] != server["layer"]:
        raise PeerError("the two parties' timelines do not fit")
    worked = sum(ms for kind, ms in client.items() if kind not in ("layer", "wait", "setup"))
    wait = server.get("wait", 0.0)
    own = server.get("squares", 0.0) + server.get("comparison", 0.0)
    way = max(wait + own - worked, 0.0) / 2
    link = min(wait, way + max(way - own, 0.0))
    parts = {kind: server.get(kind, 0.0) for kind in KINDS if kind != "wait"} | {"client": wait - link, "link": link}
    return {kind: ms / streams for kind, ms in parts.items()}


def random_images(*shape: int) -> np.ndarray[Any, Any]:
    """Noise, uint8."""
    return np.frombuffer(bytearray(os.urandom(int(np.prod(shape)))), dtype=np.uint8).reshape(shape)


def measure(model: Model, network: str, width: int, *, batch: int, runs: int, crypten: bool, say: Say,
            images: np.ndarray[Any, Any] | None = None, link: Link = LINKS["loopback"], emulation: str = "auto") -> dict[str, Any]:
    """All figures of one network as a JSON-ready dictionary; see docs/benchmarks.md for the meaning of each.

    link: between the client and the other two; server and dealer are next to each other.
    """
    facts = environment()
    if images is None:
        images = random_images(min(runs, 8), batch, *model.public.input_shape)
    plan = make_plan(model.public, batch)
    with tempfile.TemporaryDirectory() as folder:
        path, image_path = Path(folder) / "model.safetensors", Path(folder) / "images.npy"
        save(model, path)
        np.save(image_path, images)
        say("plaintext")
        plaintext = measure_plaintext(model, images, max(runs, 7))
        say("private inference")
        with emulated(link, emulation) as way, serving(path, "--max-batch", str(max(batch, 32)), host=way.host) as roles, \
                way.to(roles.server) as server, way.to(roles.dealer) as dealer:
            process = subprocess.Popen(
                [*way.prefix, sys.executable, "-m", "benchmarks.client_role", server, dealer, str(image_path), str(runs + 1), folder],
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
    errors, hits, compared = [], 0, 0
    for index in range(min(len(images), runs + 1)):
        x = normalise_images(torch.from_numpy(images[index]), model.public)
        logits = torch.tensor(private["logits"][index], dtype=torch.float64)
        errors.append(float((simulate(model, x) - logits).abs().max()))
        with torch.inference_mode():
            hits += int((Plaintext(model)(x.float()).argmax(1) == logits.argmax(1)).sum())
        compared += len(x)
    bound = rounding_bound(model, normalise_images(torch.from_numpy(images[0]), model.public))
    online = [r["seconds"] for r in private["online"][1:]]
    preprocessing = [r["seconds"] for r in private["preprocessing"][1:]]
    last_online, last_pre = private["online"][-1], private["preprocessing"][-1]
    total = [before + after for before, after in zip(preprocessing, online)]
    result: dict[str, Any] = {
        "network": network, "width": width, "relus": plan.model.relus, "squares": sum(s.squares for s in plan.activations) // batch,
        "activations": sum(s.active for s in plan.activations) // batch, "activation_layers": len(plan.activations),
        "batch": batch, "runs": runs,
        "fixed_point": plan.model.describe()["fixed_point"],
        "plaintext_ms": _median_ms(plaintext), "plaintext_ms_spread": _spread_ms(plaintext), "plaintext_runs": len(plaintext),
        "online_ms": _median_ms(online), "online_ms_spread": _spread_ms(online),
        "preprocessing_ms": _median_ms(preprocessing), "preprocessing_ms_spread": _spread_ms(preprocessing),
        "total_ms": _median_ms(total), "total_ms_spread": _spread_ms(total),
        "setup_ms": round(1e3 * private["setup"]["seconds"], 1), "setup_bytes": private["setup"]["tcp_bytes"],
        "crypten_ms": None, "crypten_ms_spread": None, "crypten_bytes": None, "crypten_rounds": None,
        "online_bytes_up": last_online["bytes_up"], "online_bytes_down": last_online["bytes_down"],
        "online_payload_bytes": plan.online_bytes_up + plan.online_bytes_down,
        "preprocessing_bytes": {"client_to_server": last_pre["bytes_up"], "server_to_client": last_pre["bytes_down"],
                                "dealer_to_client": last_pre["dealer_bytes"], "dealer_to_server": last_pre["dealer_to_server_bytes"]},
        "online_tcp_bytes": last_online["tcp_bytes"],
        "preprocessing_tcp_bytes": last_pre["tcp_bytes"] + last_pre["dealer_to_server_bytes"],
        "link": link.name, "emulation": way.emulation, "streams": last_online["streams"],
        "on_link_ms": round(1e3 * link.least(*(last_online[key] for key in ("rounds", "bytes_up", "bytes_down", "streams"))), 2),
        "timeline": timelines(private["online"][1:]), "preprocessing_timeline": preprocessing_timelines(private["preprocessing"][1:]),
        "rounds": last_online["rounds"], "max_abs_error": max(errors), "rounding_bound": bound,
        "agreement": hits / compared, "peak_rss_mb": memory, **facts,
    }
    add_bytes(result["timeline"]["layers"], plan)
    if baseline is not None:
        times = [ms / 1e3 for ms in baseline["online_ms"]]
        result |= {"crypten_ms": _median_ms(times), "crypten_ms_spread": _spread_ms(times),
                   "crypten_bytes": baseline["bytes"], "crypten_rounds": baseline["rounds"]}
    return result


LABELS = {"spu-semi2k": "SPU 0.9.5 SEMI2K", "spu-aby3": "SPU 0.9.5 ABY3", "spu-cheetah": "SPU 0.9.5 CHEETAH (no dealer)",
          "tenseal": "TenSEAL CKKS (another, small network)", "crypten-tfp": "CrypTen 0.4.1 TFP", "crypten-ttp": "CrypTen 0.4.1 TTP"}


def run_side_by_side(model: Model, network: str, width: int, names: list[str], runs: int, say: Say,
                     keep: Callable[[dict[str, Any]], None] = lambda _: None,
                     images: np.ndarray[Any, Any] | None = None) -> dict[str, Any]:
    """Ours, plaintext PyTorch and each peer on the same network and images, one after another: "rows" of medians in ms and bytes.

    Bytes are what the kernel counted on the parties' sockets; ours and the peers' first inference warms up. keep: called with what there
    is after each. images: uint8 (runs, 1, C, H, W); noise if there are none.
    """
    if images is None:
        images = random_images(min(runs, 8), 1, *model.public.input_shape)
    ours = measure(model, network, width, batch=1, runs=runs, crypten=False, say=say, images=images)
    rows: list[dict[str, Any]] = [
        {"name": "plaintext", "label": "plaintext PyTorch float32", "online_ms": ours["plaintext_ms"],
         "online_ms_spread": ours["plaintext_ms_spread"], "total_ms": ours["plaintext_ms"], "hides_image": False,
         "runs": ours["plaintext_runs"]},
        {"name": "relucent", "label": f"Relucent, {ours['relus']:,} ReLUs", "hides_image": True,
         "bytes": ours["online_tcp_bytes"], "total_bytes": ours["online_tcp_bytes"] + ours["preprocessing_tcp_bytes"]} |
        {key: ours[key] for key in ("online_ms", "online_ms_spread", "preprocessing_ms", "total_ms", "setup_ms", "setup_bytes", "rounds",
                                    "runs", "max_abs_error", "agreement", "load_average")}]
    facts = ("network", "width", "relus", "versions", "cpu", "load_average", "commit", "date")
    measured = {key: ours[key] for key in facts} | {"rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        keep(measured)
        for result in run_peers(path, torch.from_numpy(images[:, 0].copy()), names, runs, say=say):
            rows.append(_peer_row(result))
            keep(measured)
    return measured


def _peer_row(result: dict[str, Any]) -> dict[str, Any]:
    """The row of what a peer's program measured."""
    row = {"name": result["name"], "label": LABELS[result["name"]]}
    if "skipped" in result:
        return row | {"skipped": result["skipped"]}
    online = round(statistics.median(result["online_ms"]), 1)  # peers make their correlated randomness within it
    return row | {"online_ms": online, "total_ms": online,
                  "online_ms_spread": [round(min(result["online_ms"]), 1), round(max(result["online_ms"]), 1)],
                  "total_bytes": result["bytes"], "hides_image": result["hides_image_from_server"],
                  "same_network": result["name"] != "tenseal"} | {
        key: result.get(key) for key in ("bytes", "setup_ms", "setup_bytes", "rounds", "runs", "max_abs_error", "agreement", "notes",
                                         "versions")}
