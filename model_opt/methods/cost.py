"""Cost-aware reduction: the network for an online latency on a link, or for online bytes, instead of for a ReLU count.

In our protocol an identity or a line is free; a square costs 16 bytes online; a ReLU the same and the evaluation of its key; a layer
with neither costs no round trip. The online latency of a network is therefore

    compute (measured here, on the teacher) + time per ReLU x ReLUs + rounds x RTT + bytes / bandwidth,

with rounds and bytes from the protocol's own plan, max pools included (`protocol.links`: which bytes count). Two choices meet the target.
Layers are dropped, that is, made linear, in the order of the harm they add per cost they save; of the networks on the way the least
harmful is trained, with as many ReLUs as fit at its best pixels (AutoReP). When these are chosen, the squares that matter least become
lines, pixel by pixel, until no more pixels are active than the target pays for.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_opt.activation import LINEAR, RELU, SQUARE, PartialActivation, fit_polynomials, partial_activations
from model_opt.compiler import compile_model
from model_opt.data import Split
from model_opt.methods import autorep
from model_opt.methods.base import BudgetError, Reduced, Task, check_values, keep_largest
from model_opt.training import TrainingError, device, distillation_loss, fit, progress_bar, shortages, world, write_atomically
from protocol import ring
from protocol.inference import preprocess, run_online
from protocol.links import LINKS
from protocol.model import Model
from protocol.plan import Plan, make_plan
from protocol.simulation import server_graph

SCORE_IMAGES = 256
SCORE_BATCH = 64
RUNS = 5
TIMING_SHIFT = 12
"""Nearly lines, so that an untrained network of squares stays in range."""
RELU_SHARE = 0.02
"""Squares become lines, and layers are dropped, rather than that fewer ReLUs than this share of the pixels fit."""


@dataclass(frozen=True)
class Options:
    """Of cost-aware reduction.

    target_ms: online latency of one image on `link`, of `protocol.links`. target_bytes: instead, online bytes of one image, both ways
    together (preprocessing not counted), which are the same on every link. autorep's own: degree 2 throughout.
    """

    target_ms: float = 0.0
    target_bytes: int = 0
    link: str = "loopback"
    indicator_lr: float = 1e-3
    freeze: float = 0.4

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise ValueError(f"unknown link {self.link!r}; known: {', '.join(LINKS)}")
        check_values(self, not_negative=("target_ms", "target_bytes"))
        if self.target_ms and self.target_bytes:
            raise ValueError("target_ms and target_bytes exclude each other; give one of them")
        if self.link != "loopback" and not self.target_ms:
            raise ValueError("link needs target_ms; bytes are the same on every link")
        self.autorep(2)

    def autorep(self, degree: int) -> autorep.Options:
        """Of the choice of ReLUs."""
        return autorep.Options(degree=degree, indicator_lr=self.indicator_lr, freeze=self.freeze)

    @property
    def target(self) -> float:
        """In the unit of the cost model."""
        return self.target_ms or self.target_bytes


@dataclass(frozen=True)
class CostModel:
    """The online cost of one image, in ms or bytes: fixed + layer x layers + pixel x active pixels + relu x ReLUs.

    fixed: without any activation layer: compute, input, logits, max pools. layer: a round trip. pixel: a square or a ReLU. relu: what a
    ReLU costs beyond a square.
    """

    unit: str
    fixed: float
    layer: float
    pixel: float
    relu: float

    def total(self, layers: int, active: int, relus: float) -> float:
        return self.fixed + self.layer * layers + self.pixel * active + self.relu * relus

    def afford(self, target: float, layers: int, pixels: int, limit: int) -> tuple[int, int] | None:
        """Active pixels, and ReLUs among them up to `limit`, that a target pays for; None if too few.

        Pixels come first, once RELU_SHARE of them all can be ReLUs; what is then left pays for more ReLUs.
        """
        reserved = min(int(RELU_SHARE * pixels), limit)
        room = target - self.total(layers, 0, 0)
        if room - reserved * self.relu < 0:
            return None
        active = _count(room - reserved * self.relu, self.pixel, pixels)
        if layers and active < max(reserved, 1):
            return None
        return active, _count(room - active * self.pixel, self.relu, min(active, limit))


def _count(amount: float, price: float, most: int) -> int:
    """How many things of a price an amount pays for."""
    return int(min(amount / price, most)) if price else most


def cost_model(unit: str, plan: Plan, price: Callable[[int, int, int], float], compute: float = 0.0, relu: float = 0.0) -> CostModel:
    """From the plan of a network without identities and a price of rounds, bytes up and bytes down; compute, relu: measured.

    An active pixel, a square or a ReLU, is one element each way.
    """
    masks = plan.model.masks.values()
    pixels = ring.ELEMENT_BYTES * sum(mask.numel() for mask in masks)
    fixed = price(plan.rounds - len(masks), plan.online_bytes_up - pixels, plan.online_bytes_down - pixels)
    return CostModel(unit, compute + fixed, price(1, 0, 0), price(0, ring.ELEMENT_BYTES, ring.ELEMENT_BYTES), relu)


def _compiled(task: Task, kind: int) -> Model:
    """The teacher's shapes with the same choice at every pixel."""
    student = task.student().cpu()
    for layer in partial_activations(student).values():
        layer.mask.fill_(kind)
        layer.c2_shift.fill_(TIMING_SHIFT)
    return compile_model(student, task.train[:8].normalised().cpu(), name="probe", classes=(), mean=task.train.mean, std=task.train.std)


def measure(task: Task, options: Options) -> CostModel:
    """Bytes from the plan alone; for ms the compute of this machine too: in process, squares or ReLUs everywhere, medians of RUNS."""
    if options.target_bytes:
        return cost_model("bytes", make_plan(_compiled(task, RELU).public, 1), lambda _rounds, up, down: up + down)
    compute = []
    for kind in (SQUARE, RELU):
        model = _compiled(task, kind)
        graph = server_graph(model)
        x_ring = ring.encode(task.train[:1].normalised().cpu().double(), model.public.fixed_point.activation_bits)
        times = []
        for _ in range(RUNS + 1):
            client, server, _ = preprocess(model, 1)
            started = time.perf_counter()
            run_online(client, server, graph, x_ring)
            times.append(1000 * (time.perf_counter() - started))
        compute.append(statistics.median(times[1:]))
    relu = max(compute[1] - compute[0], 1e-6) / model.public.relus
    link = LINKS[options.link]
    return cost_model("ms", make_plan(model.public, 1), lambda *traffic: 1000 * link.seconds(*traffic), compute[0], relu)


def line_scores(model: nn.Module, sample: Split) -> dict[str, Tensor]:
    """What each pixel of each layer loses as a line: the mean over the images of (dL/dy (y - c1 z - c0))^2, L the cross entropy.

    That is the square of the loss's first-order change (Molchanov et al., CVPR 2019); at a square y - c1 z - c0 = c2 z^2.
    """
    layers = partial_activations(model)
    scores = {name: torch.zeros_like(layer.mask, dtype=torch.float32) for name, layer in layers.items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, args, y: seen.__setitem__(name, (args[0], y))

    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    where = next(model.parameters()).device
    try:
        for start in range(0, len(sample), SCORE_BATCH):
            part = sample[start : start + SCORE_BATCH].to(where)
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(model(part.normalised()).float(), part.labels, reduction="sum")
                slopes = torch.autograd.grad(loss, [seen[name][1] for name in layers])
            with torch.no_grad():
                for (name, layer), slope in zip(layers.items(), slopes):
                    z, y = seen[name]
                    scores[name] += (slope * (y - layer.c1 * z - layer.c0)).square().sum(0) / len(sample)
    finally:
        for handle in handles:
            handle.remove()
    return scores


def demote(layers: Mapping[str, PartialActivation], scores: Mapping[str, Tensor], active: int) -> None:
    """Make lines of all pixels but the `active` ones of the highest scores."""
    flat = torch.cat([scores[name].flatten() for name in layers])
    keep, _ = keep_largest(flat, torch.ones_like(flat, dtype=torch.int64), active)
    for layer, part in zip(layers.values(), keep.split([layer.mask.numel() for layer in layers.values()])):
        layer.mask[~part.view(layer.mask.shape)] = LINEAR


@dataclass(frozen=True)
class Choice:
    """What a target leaves: which layers are dropped, and how many pixels of the others stay active and ReLUs."""

    cost: CostModel
    dropped: list[str]
    active: int
    relus: int


def choose(task: Task, cost: CostModel, target: float) -> Choice:
    """The least harmful way to meet the target, by the divergence from the teacher. Raises BudgetError if there is none."""
    probe = task.student().to(device())
    layers = partial_activations(probe)
    for layer in layers.values():
        layer.replacement = LINEAR
    sample = task.train.sample(SCORE_IMAGES).to(device())
    fit_polynomials(probe, sample)
    scores = line_scores(probe, sample)
    x = sample.normalised()
    teacher = deepcopy(task.teacher).to(device()).eval()
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        reference = teacher(x).float()

    @torch.no_grad()
    def divergence() -> float:
        with torch.autocast(x.device.type, torch.bfloat16):
            return float(distillation_loss(probe(x).float(), reference, task.recipe.temperature))

    def price(name: str, before: float) -> tuple[float, float]:
        """The harm that dropping one more layer adds, per cost that it saves; of equals the one that saves most."""
        layers[name].mask.fill_(LINEAR)
        harm = divergence() - before
        layers[name].mask.fill_(RELU)
        saved = cost.total(1, left[name], RELU_SHARE * left[name]) - cost.fixed
        return max(harm, 0.0) / saved, -saved

    left = {name: layer.mask.numel() for name, layer in layers.items()}
    dropped: list[str] = []
    found: list[tuple[float, Choice]] = []
    with progress_bar() as bar:
        shown = bar.add_task("choosing layers", total=len(left), note="")
        while True:
            pixels = sum(left.values())
            counts = cost.afford(target, len(left), pixels, task.budget)
            if counts is not None:
                if left:
                    demote({name: layers[name] for name in left}, scores, counts[0])
                found.append((divergence(), Choice(cost, list(dropped), *counts)))
                for name in left:
                    layers[name].mask.fill_(RELU)
            if not left or (counts is not None and counts[0] == pixels):
                break
            now = divergence()
            worst = min(left, key=lambda name: price(name, now))
            del left[worst]
            layers[worst].mask.fill_(LINEAR)
            dropped.append(worst)
            bar.update(shown, advance=1, note=f"without {worst}")
    if not found:
        raise BudgetError(f"even without any activation it takes {cost.fixed:,.0f} {cost.unit}; raise target_{cost.unit}")
    return min(found, key=lambda pair: pair[0])[1]


def decide(task: Task, options: Options) -> Choice:
    """The choice for the options' target, measured once and kept in the run folder: a restart and torchrun's other processes read it.

    Raises BudgetError, and TrainingError for a file of other settings or that cannot be written or read.
    """
    path, settings = task.folder / "choice.json", task.settings(options)
    if world()[0] == 0 and not path.exists():
        try:
            found: dict[str, Any] = asdict(choose(task, measure(task, options), options.target))
        except BudgetError as error:
            if world()[1] == 1:
                raise
            # the other processes wait for the file
            found = {"impossible": str(error)}
        with shortages(path.parent, task.recipe.batch):
            write_atomically(path, json.dumps({"settings": settings, **found}, indent=1).encode())
    while not path.exists():
        time.sleep(0.2)
    try:
        kept = json.loads(path.read_bytes())
        before, impossible = kept.pop("settings"), kept.get("impossible")
        choice = None if impossible else Choice(**{**kept, "cost": CostModel(**kept["cost"])})
        changed = sorted(k for k in {*settings, *before} if settings.get(k) != before.get(k))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path} cannot be read ({type(error).__name__}); delete it to start anew") from error
    if changed:
        raise TrainingError(f"{path} was made with other settings ({', '.join(changed)}); use another folder or the same settings")
    if choice is None:
        raise BudgetError(str(impossible))
    return choice


class Reduction(autorep.AutoRep):
    """AutoReP on the layers that are left; when its choice is made, the squares that matter least become lines."""

    def __init__(self, model: nn.Module, choice: Choice, options: autorep.Options, seed: int, sample: Split) -> None:
        self.kept = {name: layer for name, layer in partial_activations(model).items() if name not in choice.dropped}
        super().__init__(nn.ModuleDict({name.replace(".", "_"): layer for name, layer in self.kept.items()}), choice.relus, options, seed)
        self.model, self.active, self.sample = model, choice.active, sample

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        fixed = self.fixed
        super().after_step(progress)
        if self.fixed and not fixed and sum(int((layer.mask != LINEAR).sum()) for layer in self.layers) > self.active:
            scores = line_scores(self.model, self.sample)
            for name, layer in self.kept.items():
                scores[name][layer.mask == RELU] = torch.inf
            demote(self.kept, scores, self.active)

    def status(self) -> dict[str, float]:
        return {**super().status(), "squares": sum(layer.count(SQUARE) for layer in self.layers)}


def reduce(task: Task, options: Options) -> Reduced:
    """The network for a target; the task's budget is an upper limit too. Raises BudgetError, TrainingError."""
    if not options.target:
        raise BudgetError("cost-aware reduction needs target_ms or target_bytes")
    choice = decide(task, options)
    cost = choice.cost
    student = task.student()
    # where the target pays for no pixel beyond the ReLUs, a ReLU that goes becomes a line at once
    inner = options.autorep(2 if choice.active > choice.relus else 1)
    autorep.prepare(student, task, inner, choice.dropped)
    layers = partial_activations(student)
    stage = None
    if len(layers) > len(choice.dropped):
        stage = Reduction(student, choice, inner, task.recipe.seed, task.train.sample(SCORE_IMAGES))
    score = fit(student, task.train, task.validation, task.recipe, task.folder, teacher=task.mentor, stage=stage, label="cost",
                settings={**task.settings(options), "dropped": choice.dropped, "active": choice.active, "relus": choice.relus})
    if stage is not None:
        stage.finish()
    counts = {kind: [layer.count(kind) for layer in layers.values()] for kind in (RELU, SQUARE)}
    active = [sum(pair) for pair in zip(*counts.values())]
    predicted = cost.total(sum(count > 0 for count in active), sum(active), sum(counts[RELU]))
    if predicted > options.target * (1 + 1e-9):
        raise BudgetError(f"the network takes {predicted:,.2f} {cost.unit}")
    return Reduced(student, score, details={
        "link": options.link, f"target_{cost.unit}": options.target, f"predicted_{cost.unit}": round(predicted, 2),
        "dropped": choice.dropped, "squares": sum(counts[SQUARE]), "fixed": cost.fixed, "per_relu": cost.relu})
