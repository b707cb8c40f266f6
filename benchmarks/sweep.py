"""Latency and traffic over ReLU counts, widths, batches and links; what a ReLU and a square cost; physical limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.latency import measure
from benchmarks.networks import random_model
from protocol.links import LINKS
from protocol.model import Model
from protocol.plan import make_plan
from protocol.prg import Seed

AES_PER_RELU_BIT = 2
"""AES blocks that evaluating a DCF key takes per compared bit: the seed and the payload words of one child."""

SLOW_LINK_RELUS = 50_000
"""More are not measured on the slower links: their keys alone would take minutes for each inference."""

Say = Callable[[str], None]


def run_sweep(network: str, widths: Sequence[int], relus: Sequence[int | None], batches: Sequence[int], links: Sequence[str], runs: int,
              say: Say) -> dict[str, Any]:
    """One row for each combination; None ReLUs keeps all. The first of each dimension is the base that the others vary from."""
    points = [(widths[0], r, batches[0], links[0]) for r in relus]
    points += [(w, relus[0], batches[0], links[0]) for w in widths[1:]]
    points += [(widths[0], relus[0], b, links[0]) for b in batches[1:]]
    points += [(widths[0], r, batches[0], link) for link in links[1:] for r in relus if r is not None and r <= SLOW_LINK_RELUS]
    rows: list[dict[str, Any]] = []
    models: dict[tuple[int, int | None], Model] = {}
    for width, count, batch, link in points:
        key = (width, count)
        if key not in models:
            models = {k: m for k, m in models.items() if k[0] == width} | {key: random_model(network, width, count)}
        say(f"width {width}, {'all' if count is None else f'{count:,}'} ReLUs, batch {batch}, {link}")
        row = measure(models[key], network, width, batch=batch, runs=runs, crypten=False, say=lambda _: None, link=LINKS[link])
        row["limits"] = limits(models[key], batch)
        rows.append(row)
    return {"rows": rows, "fits": fit_growth(rows)}


def fit_growth(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Least-squares lines over ReLU counts at the base width and batch: microseconds and bytes per ReLU, for each link."""
    fits: dict[str, Any] = {}
    base = rows[0]
    for link in dict.fromkeys(row["link"] for row in rows):
        chosen = [r for r in rows if r["link"] == link and (r["width"], r["batch"]) == (base["width"], base["batch"])]
        if len({r["relus"] for r in chosen}) < 2:
            continue
        x = np.array([r["relus"] for r in chosen], float)
        fits[link] = {}
        measured = {"online_us": [1e3 * r["online_ms"] for r in chosen],
                    "preprocessing_us": [1e3 * r["preprocessing_ms"] for r in chosen],
                    "preprocessing_bytes": [sum(r["preprocessing_bytes"].values()) for r in chosen]}
        for name, values in measured.items():
            slope, start = np.polyfit(x, np.array(values, float), 1)
            fits[link][name] = {"per_relu": round(float(slope), 5), "without_any": round(float(start), 1)}
    return fits


def limits(model: Model, batch: int) -> dict[str, float]:
    """What this machine needs at least: its int64 convolutions alone, and AES alone, one party's share in milliseconds."""
    plan = make_plan(model.public, batch)
    blocks = AES_PER_RELU_BIT * plan.comparison_bits * sum(s.relus for s in plan.activations)
    return {"linear_ms": round(1e3 * linear_seconds(model, batch), 3), "aes_blocks": blocks,
            "aes_ms": round(1e3 * 16 * blocks / aes_bytes_per_s(), 3),
            "online_payload_bytes": plan.online_bytes_up + plan.online_bytes_down}


def linear_seconds(model: Model, batch: int, runs: int = 5) -> float:
    """Seconds of all private maps on random ring elements as the server computes them, median; nothing else."""
    from protocol.crypten_adapter import build_graph
    from protocol.simulation import Simulation, SimulationTensor, server_parameters

    spent = [0.0]

    class Timed(SimulationTensor):
        """Times the private maps."""

        def _private_map(self, weight: Any, apply: Any) -> torch.Tensor:
            started = time.perf_counter()
            result = super()._private_map(weight, apply)
            spent[0] += time.perf_counter() - started
            return result

    parameters, point = server_parameters(model), model.public.fixed_point
    graph = build_graph(model.public, parameters)
    x = Seed.fresh().ring("x", (batch, *model.public.input_shape)) >> 40
    times = []
    with torch.no_grad():
        for _ in range(runs):
            spent[0] = 0.0
            graph(Timed(Simulation(point), x, point.activation_bits, True))
            times.append(spent[0])
    return statistics.median(times)


def aes_bytes_per_s(byte_count: int = 1 << 26) -> float:
    """Rate of fixed-key AES-128 on whole buffers, one thread."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(bytes(16)), modes.ECB()).encryptor()  # noqa: S305  # a rate, not a secret
    data, out = np.zeros(byte_count, np.uint8), np.empty(byte_count + 16, np.uint8)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        encryptor.update_into(memoryview(data), memoryview(out))
        best = max(best, byte_count / (time.perf_counter() - started))
    return best


