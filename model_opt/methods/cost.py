"""Cost-aware reduction: the network for a latency on a link, instead of for a ReLU count.

In our protocol an identity or a line is free; a square costs 16 bytes online; a ReLU the same and the evaluation of its key; a layer
without any costs no round trip. The online latency of a network is therefore

    compute (measured here, on the teacher) + seconds per ReLU x ReLUs + rounds x RTT + bytes / bandwidth,

with rounds and bytes from the protocol's own plan. Layers are dropped, that is, made linear, in the order of the harm they do per second
they save, until the target leaves room for ReLUs; then AutoReP puts as many as fit at the best pixels of the layers that are left.
"""

from __future__ import annotations

import statistics
import time
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from model_opt.activation import LINEAR, RELU, SQUARE, fit_polynomials, partial_activations
from model_opt.compiler import compile_model
from model_opt.methods import autorep
from model_opt.methods.base import BudgetError, Reduced, Task
from model_opt.training import distillation_loss, fit
from protocol import ring
from protocol.inference import preprocess, run_online
from protocol.links import LINKS, Link
from protocol.plan import make_plan
from protocol.simulation import server_graph

SCORE_IMAGES = 256
RUNS = 5
TIMING_SHIFT = 12
"""Nearly lines, so that an untrained network of squares stays in range."""
RELU_SHARE = 0.02
"""A layer is dropped as long as the target leaves room for fewer ReLUs than this share of the active pixels."""


@dataclass(frozen=True)
class Options:
    """Of cost-aware reduction. target_ms: online latency of one image. link: of `protocol.links`. autorep's own: degree 2 throughout."""

    target_ms: float = 0.0
    link: str = "loopback"
    indicator_lr: float = 1e-3
    freeze: float = 0.4

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise ValueError(f"unknown link {self.link!r}; known: {', '.join(LINKS)}")
        if self.target_ms < 0:
            raise ValueError(f"target_ms must not be negative, got {self.target_ms}")


@dataclass(frozen=True)
class CostModel:
    """Predicts the online seconds of one image. base_s: compute without any ReLU; relu_s: per ReLU."""

    link: Link
    base_s: float
    relu_s: float
    input_pixels: int
    classes: int

    def seconds(self, layers: int, pixels: int, relus: int) -> float:
        """layers: activation layers left; pixels: their squares and ReLUs together."""
        byte_count = ring.ELEMENT_BYTES * (self.input_pixels + self.classes + 2 * pixels)
        return self.base_s + relus * self.relu_s + self.link.seconds(layers + 1, byte_count)

    def affordable(self, target_s: float, layers: int, pixels: int) -> int:
        """ReLUs that fit a target; negative if not even none does."""
        return min(int((target_s - self.seconds(layers, pixels, 0)) / self.relu_s), pixels)


def measure(task: Task, link: Link) -> CostModel:
    """Calibrate on this machine: the teacher's shapes in process, with squares and with ReLUs everywhere, medians of RUNS."""
    student = task.student()
    sample = task.train[:8].normalised().cpu()
    seconds, counts = [], []
    for kind in (SQUARE, RELU):
        for layer in partial_activations(student).values():
            layer.mask.fill_(kind)
            layer.c2_shift.fill_(TIMING_SHIFT)
        model = compile_model(student, sample, name="probe", classes=(), mean=task.train.mean, std=task.train.std)
        graph = server_graph(model)
        x_ring = ring.encode(sample[:1].double(), model.public.fixed_point.activation_bits)
        times = []
        for _ in range(RUNS + 1):
            client, server, _ = preprocess(model, 1)
            started = time.perf_counter()
            run_online(client, server, graph, x_ring)
            times.append(time.perf_counter() - started)
        seconds.append(statistics.median(times[1:]))
        counts.append(model.public.relus)
    plan = make_plan(model.public, 1)
    return CostModel(link, seconds[0], max(seconds[1] - seconds[0], 1e-9) / counts[1], torch.Size(task.shape).numel(), plan.output_shape[1])


def drop_layers(task: Task, cost: CostModel, target_s: float) -> tuple[list[str], int]:
    """Names of the layers to make linear, and the ReLU budget that then fits. Raises BudgetError if nothing meets the target."""
    probe = task.student()
    layers = partial_activations(probe)
    for layer in layers.values():
        layer.replacement = LINEAR
    fit_polynomials(probe, task.train[:SCORE_IMAGES])
    sample = task.train[:SCORE_IMAGES].normalised()
    teacher = deepcopy(task.teacher).eval()
    with torch.no_grad(), torch.autocast(sample.device.type, torch.bfloat16):
        reference = teacher(sample).float()

    def harm(name: str) -> float:
        layers[name].mask.fill_(LINEAR)
        with torch.no_grad(), torch.autocast(sample.device.type, torch.bfloat16):
            loss = float(distillation_loss(probe(sample).float(), reference, task.recipe.temperature))
        layers[name].mask.fill_(RELU)
        return loss

    left = {name: layer.mask.numel() for name, layer in layers.items()}
    dropped: list[str] = []
    while True:
        pixels = sum(left.values())
        room = cost.affordable(target_s, len(left), pixels)
        if (left and room >= RELU_SHARE * pixels) or (not left and room >= 0):
            return dropped, min(room, task.budget)
        if not left:
            raise BudgetError(f"even without any activation it takes {1000 * cost.seconds(0, 0, 0):.0f} ms; raise target_ms")

        def price(name: str, pixels: int = pixels) -> float:
            saved = cost.seconds(len(left), pixels, 0) - cost.seconds(len(left) - 1, pixels - left[name], 0)
            return harm(name) / max(saved, 1e-9)

        worst = min(left, key=price)
        del left[worst]
        layers[worst].mask.fill_(LINEAR)
        dropped.append(worst)


class Reduction(autorep.AutoRep):
    """AutoReP on the layers that are left."""

    def __init__(self, model: nn.Module, budget: int, options: autorep.Options, seed: int, dropped: list[str]) -> None:
        kept = {name: layer for name, layer in partial_activations(model).items() if name not in dropped}
        super().__init__(nn.ModuleDict({name.replace(".", "_"): layer for name, layer in kept.items()}), budget, options, seed)


def reduce(task: Task, options: Options) -> Reduced:
    """The network for a latency; the task's budget is an upper limit too. Raises BudgetError, TrainingError."""
    if not options.target_ms:
        raise BudgetError("cost-aware reduction needs target_ms")
    link = LINKS[options.link]
    cost = measure(task, link)
    dropped, relus = drop_layers(task, cost, options.target_ms / 1000)
    student = task.student()
    inner = autorep.Options(indicator_lr=options.indicator_lr, freeze=options.freeze)
    autorep.prepare(student, task, inner, dropped)
    kept = [layer for name, layer in partial_activations(student).items() if name not in dropped]
    stage = Reduction(student, relus, inner, task.recipe.seed, dropped) if kept else None
    score = fit(student, task.train, task.validation, task.recipe, task.folder, teacher=task.mentor, stage=stage, label="cost",
                settings={**task.settings(options), "dropped": dropped, "relus": relus})
    if stage is not None:
        stage.finish()
    pixels = sum(layer.mask.numel() for layer in kept)
    predicted = cost.seconds(len(kept), pixels, sum(layer.count(RELU) for layer in kept))
    return Reduced(student, score, details={
        "link": link.name, "target_ms": options.target_ms, "predicted_ms": round(1000 * predicted, 2), "dropped": dropped,
        "base_ms": round(1000 * cost.base_s, 2), "us_per_relu": round(1e6 * cost.relu_s, 4)})
