"""Latency and traffic over ReLU counts, widths, batches and links; what a ReLU and a square cost; physical limits."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.emulation import choose_emulation
from benchmarks.latency import measure
from benchmarks.networks import check_network, random_model
from benchmarks.processes import environment
from model_opt.networks import STANDARD_WIDTH
from protocol.dealing import deal, weight_masks
from protocol.errors import PeerError
from protocol.links import LINKS, Link
from protocol.model import Model
from protocol.plan import Plan, make_plan
from protocol.prg import Seed
from protocol.relucent_pb2 import Chunk
from protocol.ring import ELEMENT_BYTES
from protocol.tensor import Weight
from protocol.wire import ChunkSender, to_chunks

AES_PER_RELU_BIT = 2
"""AES blocks that evaluating a DCF key takes per compared bit: the seed and the payload words of one child."""

POINT_S = 30.0
"""Seconds on the link that the runs of one point may take together: slow points have fewer runs, at least one."""
INFERENCE_S = 60.0
"""Points of which one inference takes longer on the link are left out."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One combination. relus: None keeps all. squares: share of the other pixels that square."""

    network: str
    width: int
    relus: int | None
    squares: float
    batch: int
    link: str

    def __str__(self) -> str:
        count = "all" if self.relus is None else f"{self.relus:,}"
        squares = "" if self.squares == 1 else f", {self.squares:.0%} of the others square"
        return f"{self.network} w{self.width}, {count} ReLUs{squares}, batch {self.batch}, {self.link}"


def points(networks: Sequence[str], widths: Sequence[int], relus: Sequence[int | None], squares: Sequence[float], batches: Sequence[int],
           links: Sequence[str]) -> list[Point]:
    """The base, made of the first of each, and what varies from it in one dimension, squares at 0 ReLUs; all of them on every link."""
    base = Point(networks[0], widths[0], relus[0], squares[0], batches[0], links[0])
    varied = [*(replace(base, relus=r) for r in relus),
              *(replace(base, relus=0, squares=share) for share in squares[1:]),
              *(replace(base, network=name, width=STANDARD_WIDTH.get(name, 64)) for name in networks[1:]),
              *(replace(base, width=w) for w in widths[1:]),
              *(replace(base, batch=b) for b in batches[1:])]
    return [replace(point, link=link) for link in links for point in varied]


def run_sweep(chosen: Sequence[Point], runs: int, say: Say, keep: Callable[[dict[str, Any]], None] = lambda _: None,
              emulation: str = "auto") -> dict[str, Any]:
    """One row for each point. "left_out" names those that would take too long, "links" what the emulated links really give.

    keep: called with the result so far after each row. emulation: as in `benchmarks.emulation.emulated`.
    Raises ValueError if the first point, the base, would take too long, or a network cannot be made, InputError, PeerError.
    """
    facts = environment()
    slow = [name for name in dict.fromkeys(p.link for p in chosen) if LINKS[name].bits_per_s]
    if slow:
        emulation = choose_emulation(emulation)
    links = {name: _measured(name, emulation) for name in slow}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []

    def result() -> dict[str, Any]:
        predict(rows)
        return {"rows": rows, "fits": fit_growth(rows), "links": links, "left_out": left_out, **facts}

    models: dict[tuple[str, int, int | None, float], Model] = {}
    for point in chosen:
        check_network(point.network, point.width, point.relus)
    for point in chosen:
        key = (point.network, point.width, point.relus, point.squares)
        if key not in models:
            models[key] = random_model(*key)
        seconds = seconds_on(LINKS[point.link], make_plan(models[key].public, point.batch))
        if seconds > INFERENCE_S:
            if point == chosen[0]:
                raise ValueError(f"{point}, the base, takes {seconds:.0f} s on the link each time; put another link or count first")
            left_out.append(f"{point}: {seconds:.0f} s on the link for each inference")
            continue
        say(str(point))
        row = measure(models[key], point.network, point.width, batch=point.batch, runs=max(1, min(runs, int(POINT_S / max(seconds, 1e-9)))),
                      crypten=False, say=lambda _: None, link=LINKS[point.link], emulation=emulation)
        rows.append(row | {"limits": limits(models[key], point.batch, LINKS[point.link])})
        keep(result())
    return result()


def _measured(link: str, emulation: str) -> dict[str, Any]:
    code = f"from benchmarks.emulation import measure_link; measure_link({link!r}, {emulation!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"the link {link!r} cannot be emulated: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return dict(json.loads(done.stdout))


def seconds_on(link: Link, plan: Plan) -> float:
    """Least time of one inference, preprocessing included, between the client and the other two."""
    up = sum(ELEMENT_BYTES * s.active for s in plan.activations)
    dealt = sum(plan.key_bytes(s) + ELEMENT_BYTES * (s.squares + 2 * s.relus) for s in plan.activations)
    return link.least(0, up, dealt) + link.least(plan.rounds, plan.online_bytes_up, plan.online_bytes_down)


def predict(rows: list[dict[str, Any]]) -> None:
    """Adds to each row on an emulated link what rounds and bytes on it and the same work on loopback foretell, "predicted_ms"."""
    same = ("network", "width", "relus", "squares", "batch")
    for row in rows:
        twin = next((r for r in rows if r["link"] == "loopback" and all(r[key] == row[key] for key in same)), None)
        if twin is not None and twin is not row:
            on_link = LINKS[row["link"]].seconds(row["rounds"], row["online_bytes_up"], row["online_bytes_down"], row["streams"])
            row["predicted_ms"] = round(1e3 * on_link + twin["online_ms"], 1)


def fit_growth(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Least-squares lines around the base, for each link: microseconds and bytes per ReLU in place of a square, and per square in place
    of a pixel that passes unchanged, without ReLUs. Rows that compare other bits than the base are left out.

    Each with "residual", the largest distance of a row from its line, as a share of the row's value, and the slope's standard "error",
    None for a line through two points.
    """
    base = rows[0]
    alike = [r for r in rows if all(r[key] == base[key] for key in ("network", "width", "batch"))
             and (not r["relus"] or r["fixed_point"]["comparison_bits"] == base["fixed_point"]["comparison_bits"])]
    fits: dict[str, Any] = {}
    for link in dict.fromkeys(r["link"] for r in alike):
        full = [r for r in alike if r["link"] == link and r["relus"] + r["squares"] == base["relus"] + base["squares"]]
        _fit(fits, f"ReLU, {link}", "relus", full)
    for link in dict.fromkeys(r["link"] for r in alike):
        _fit(fits, f"square, {link}", "squares", [r for r in alike if (r["link"], r["relus"]) == (link, 0)])
    return fits


def _fit(fits: dict[str, Any], name: str, key: str, rows: list[dict[str, Any]]) -> None:
    x = np.array([r[key] for r in rows], float)
    if len(set(x)) < 2:
        return
    measured = {"online_us": [1e3 * r["online_ms"] for r in rows], "preprocessing_us": [1e3 * r["preprocessing_ms"] for r in rows],
                "online_bytes": [r["online_bytes_up"] + r["online_bytes_down"] for r in rows],
                "preprocessing_bytes": [sum(r["preprocessing_bytes"].values()) for r in rows]}
    fits[name] = {"from": int(x.min()), "to": int(x.max()), "points": len(rows)}
    for what, values in measured.items():
        y = np.array(values, float)
        slope, start = np.polyfit(x, y, 1)
        gaps, free = slope * x + start - y, len(x) - 2
        error = math.sqrt(float(gaps @ gaps) / free / float(((x - x.mean()) ** 2).sum())) if free else None
        fits[name][what] = {"slope": round(float(slope), 5), "error": None if error is None else round(error, 5),
                            "start": round(float(start), 1),
                            "residual": round(float(np.max(np.abs(slope * x + start - y) / y)), 4)}


def limits(model: Model, batch: int, link: Link) -> dict[str, float]:
    """What this machine and the link need at least, in milliseconds, each alone: see docs/benchmarks.md."""
    plan = make_plan(model.public, batch)
    blocks = AES_PER_RELU_BIT * plan.comparison_bits * sum(s.relus for s in plan.activations)
    up, down = plan.online_bytes_up, plan.online_bytes_down
    return {"int64_ms": _ms(linear_seconds(model, batch, whole=True)), "linear_ms": _ms(linear_seconds(model, batch)),
            "aes_blocks": blocks, "aes_ms": _ms(16 * blocks / aes_bytes_per_s()),
            "serialisation_ms": _ms(serialisation_seconds(plan)), "dealing_ms": _ms(dealing_seconds(plan)),
            "online_payload_bytes": up + down, "bandwidth_ms": _ms(link.least(0, up, down))}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _median_seconds(work: Callable[[], object], runs: int = 5) -> float:
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def dealing_seconds(plan: Plan) -> float:
    """Seconds in which a dealer makes the material of one inference, sending apart; in this process, median."""
    masks = weight_masks(plan.model, Seed.fresh())
    large = sum(s.relus for s in plan.activations) > 10**6
    return _median_seconds(lambda: deal(plan, masks, Seed.fresh(), Seed.fresh(), ChunkSender(lambda _: None), ChunkSender(lambda _: None)),
                           1 if large else 5)


def serialisation_seconds(plan: Plan) -> float:
    """Seconds of cutting all online messages into protobuf chunks, serialising, parsing and joining them, both ways; median."""
    sizes = [s.active for s in plan.activations]
    messages = [np.zeros(count, np.int64) for count in (torch.Size(plan.input_shape).numel(), *sizes, *sizes)]

    def work() -> None:
        for sequence, message in enumerate(messages):
            out = bytearray()
            for chunk in to_chunks(sequence, (memoryview(message).cast("B"),)):
                out += Chunk.FromString(chunk.SerializeToString()).data

    return _median_seconds(work)


def linear_seconds(model: Model, batch: int, whole: bool = False, runs: int = 5) -> float:
    """Seconds of all private maps on random ring elements, median, nothing else: as the server computes them, or, if `whole`, on
    whole 64-bit integers as PyTorch does."""
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
    if whole:
        parameters = {name: Weight(value.data) if isinstance(value, Weight) else value for name, value in parameters.items()}
    graph = build_graph(model.public, parameters)
    x = Seed.fresh().ring("x", (batch, *model.public.input_shape)) >> 40
    times = []
    with torch.no_grad():
        for _ in range(runs + 1):
            spent[0] = 0.0
            graph(Timed(Simulation(point), x, point.activation_bits, True))
            times.append(spent[0])
    return statistics.median(times[1:])


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


