"""SENet: allocate ReLUs to layers by sensitivity, to pixels by activation mismatch (Kundu et al., ICLR 2023, arXiv 2301.09254).

Three stages: (1) the sensitivity of a layer's ReLUs is 1 - the density its weights keep when the teacher is pruned; the budget is
split in proportion. (2) A student with masked ReLUs learns from the teacher; after every epoch each layer's mask becomes the pixels at
which student and teacher activations differ most. (3) The mask is fixed; the fine-tuning loss adds the mismatch of attention maps at the
end of each stage of the network (PRAM). SENet++ trains several widths in one network: `model_opt.methods.slimmable`.

Other than published: the student starts from the teacher's weights, which suits short runs (random ones, as published: the option
`init`), and each of the three stages has a whole cycle of the recipe's rate, not a constant one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from model_opt.activation import IDENTITY, RELU, partial_activations
from model_opt.methods.base import BudgetError, Reduced, Task, check_budget, check_granularity, check_values, split_epochs
from model_opt.methods.features import Recorder, stages, weights_before
from model_opt.methods.slimmable import Slimming, check_slimmable, extract, make_slimmable
from model_opt.training import NORM_IMAGES, Stage, fit


@dataclass(frozen=True)
class Options:
    """Of SENet. density: of the pruned teacher. prune, search: fractions of the epochs for stages 1 and 2.

    granularity: "pixel" or "channel". mismatch: what of the student stage 2 compares with the teacher's activation: "output", its own
    (as published), or "line", what a line would give in its place. A pixel that keeps its ReLU differs little from the teacher, so
    the published form drops most of the kept pixels after an epoch, which "line" does not.
    gamma, alpha: weights of cross entropy and distillation in stage 3; stage 2 weighs them equally.
    init: the student's first weights: "teacher", or "random" (as published).
    beta: weight of the PRAM loss. tune_lr: peak rate of stage 3, as a fraction of the recipe's.
    widths: narrower widths to train along in stage 3, such as (0.5,): SENet++.
    """

    density: float = 0.1
    prune: float = 0.1
    search: float = 0.4
    granularity: str = "pixel"
    mismatch: str = "output"
    init: str = "teacher"
    gamma: float = 0.1
    alpha: float = 0.5
    beta: float = 1000.0
    tune_lr: float = 0.5
    widths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_granularity(self.granularity)
        if self.mismatch not in ("output", "line"):
            raise ValueError(f"unknown mismatch {self.mismatch!r}; known: output, line")
        if self.init not in ("teacher", "random"):
            raise ValueError(f"unknown init {self.init!r}; known: teacher, random")
        for name, fractions in (("density", [self.density]), ("prune", [self.prune]), ("search", [self.search]), ("widths", self.widths)):
            if any(not 0 < fraction < 1 for fraction in fractions):
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        if self.prune + self.search >= 1:
            raise ValueError(f"prune and search leave no epochs for stage 3: {self.prune} and {self.search}")
        check_values(self, positive=("tune_lr",), not_negative=("gamma", "alpha", "beta"))


def allocate(budget: int, sensitivity: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Split a budget over layers in proportion to sensitivity; what exceeds a layer's size goes to the others.

    The result sums to min(budget, sum(sizes)) at most, and never exceeds it.
    """
    check_budget(budget, sum(sizes))
    share, open_layers, rest = [0.0] * len(sizes), [i for i in range(len(sizes)) if sensitivity[i] > 0], float(budget)
    while open_layers:
        total = sum(sensitivity[i] for i in open_layers)
        full = [i for i in open_layers if rest * sensitivity[i] / total >= sizes[i]]
        if not full:
            for i in open_layers:
                share[i] = rest * sensitivity[i] / total
            break
        for i in full:
            share[i] = sizes[i]
            rest -= sizes[i]
        open_layers = [i for i in open_layers if i not in full]
    counts = [int(s + 1e-9) for s in share]
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - share[i])
    for i in by_remainder[: max(min(budget, round(sum(share))) - sum(counts), 0)]:
        counts[i] += 1
    return counts


def whole_channels(counts: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Counts of ReLUs in whole channels; what a layer has left over goes to the next."""
    whole, rest = [], 0
    for count, (channels, *places) in zip(counts, shapes):
        pixels = math.prod(places)
        whole.append(min((count + rest) // pixels, channels) * pixels)
        rest += count - whole[-1]
    return whole


class Pruning(Stage):
    """Global magnitude pruning of all kernels and matrices while training: density falls to the target by mid-run."""

    EVERY = 20

    def __init__(self, density: float) -> None:
        self.density, self.steps = density, 0
        self.weights: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def begin(self, model: nn.Module, teacher: nn.Module | None) -> list[dict[str, Any]]:
        self.weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        return []

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        if self.steps % self.EVERY == 0 or progress >= 1:
            kept = self.density + (1 - self.density) * max(1 - 2 * progress, 0.0) ** 3
            sizes = torch.cat([w.abs().flatten() for w in self.weights.values()])
            threshold = sizes.kthvalue(max(int((1 - kept) * len(sizes)), 1)).values
            self.masks = {name: w.abs() > threshold for name, w in self.weights.items()}
        self.steps += 1
        for name, mask in self.masks.items():
            self.weights[name].mul_(mask)

    def densities(self) -> dict[str, float]:
        """Share of each layer's weights that survive."""
        return {name: float((w != 0).float().mean()) for name, w in self.weights.items()}

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.masks = {name: w.detach() != 0 for name, w in self.weights.items()}


def sensitivities(task: Task, options: Options, epochs: int) -> dict[str, float]:
    """ReLU sensitivity of each activation: 1 - density of the layer before it in the pruned teacher."""
    pruned, stage = deepcopy(task.teacher), Pruning(options.density)
    recipe = replace(task.recipe, epochs=epochs, lr=task.recipe.lr * options.tune_lr, ema=0.0)  # an average has no zeros
    fit(pruned, task.train, task.validation, recipe, task.searches / "prune", teacher=task.mentor, stage=stage, label="senet prune",
        settings=task.search_settings(options))
    kept = stage.densities()
    return {relu: 1 - kept[name] if name else 0.0 for relu, name in weights_before(task.teacher).items()}


class Mismatch(Stage):
    """Stage 2: masks follow the mismatch of activations. counts: ReLUs of each layer."""

    def __init__(self, student: nn.Module, counts: list[int], options: Options, seed: int) -> None:
        self.layers = partial_activations(student)
        self.counts, self.options = counts, options
        self.sums: dict[str, Tensor] = {}
        self.changed = 0.0
        generator = torch.Generator().manual_seed(seed)
        for layer, count in zip(self.layers.values(), counts):  # the first masks are random, the same for all channels
            layer.replacement = IDENTITY
            pixels = layer.mask[0].numel()
            chosen = torch.rand(pixels, generator=generator).argsort()[: count // len(layer.mask)]
            layer.mask.fill_(IDENTITY)
            layer.mask.view(len(layer.mask), -1)[:, chosen] = RELU

    def begin(self, model: nn.Module, teacher: nn.Module | None) -> list[dict[str, Any]]:
        if teacher is None:
            raise BudgetError("SENet compares activations with the teacher's and cannot do without distillation")
        self.mine, self.theirs = Recorder(model, list(self.layers)), Recorder(teacher, list(self.layers))
        return []

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        mine = self.mine.inputs if self.options.mismatch == "line" else self.mine.outputs
        for name in self.layers:
            gap = (self.theirs.outputs[name] - mine[name]).abs().float().sum(0)
            self.sums[name] = self.sums[name] + gap if name in self.sums else gap

    @torch.no_grad()
    def after_epoch(self) -> None:
        moved = 0
        for (name, layer), count in zip(self.layers.items(), self.counts):
            score = self.sums[name]
            if torch.distributed.is_initialized():  # each process has seen its share of the images
                torch.distributed.all_reduce(score)
            keep = torch.zeros(layer.mask.numel(), dtype=torch.bool, device=layer.mask.device)
            if self.options.granularity == "channel":
                keep = keep.view(len(layer.mask), -1)
                keep[score.reshape(len(score), -1).sum(1).argsort(descending=True)[: count // keep.shape[1]]] = True
            else:
                keep[score.flatten().argsort(descending=True)[:count]] = True
            fresh = torch.where(keep.view(layer.mask.shape), RELU, IDENTITY).to(layer.mask.dtype)
            moved += int((fresh != layer.mask).sum())
            layer.mask.copy_(fresh)
        self.changed = moved / sum(layer.mask.numel() for layer in self.layers.values())
        self.sums = {}

    def status(self) -> dict[str, float]:
        return {"relus": sum(layer.count(RELU) for layer in self.layers.values()), "mask_change": round(self.changed, 5)}

    def end(self) -> None:
        if hasattr(self, "mine"):
            self.mine.close()
            self.theirs.close()


def attention(features: Tensor) -> Tensor:
    """Normalised attention map of (N, C, H, W) features: mean of squares over the channels, (N, H W), of unit length."""
    return nn.functional.normalize(features.float().square().mean(1).flatten(1), dim=1)


class Pram(Stage):
    """Stage 3: beta times the sum over the network's stages of the mean squared difference of attention maps."""

    def __init__(self, ends: list[str], beta: float) -> None:
        self.ends, self.beta = ends, beta

    def begin(self, model: nn.Module, teacher: nn.Module | None) -> list[dict[str, Any]]:
        assert teacher is not None
        self.mine, self.theirs = Recorder(model, self.ends), Recorder(teacher, self.ends)
        return []

    def loss(self) -> Tensor:
        gaps = [(attention(self.mine.outputs[n]) - attention(self.theirs.outputs[n])).square().mean() for n in self.ends]
        return self.beta * torch.stack(gaps).sum()

    def end(self) -> None:
        if hasattr(self, "mine"):
            self.mine.close()
            self.theirs.close()


def restart(student: nn.Module, seed: int) -> None:
    """Random first weights, by the modules' own rules and the same in all of torchrun's processes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in student.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()


def reduce(task: Task, options: Options) -> Reduced:
    """SENet on the task's teacher. Raises BudgetError, TrainingError."""
    if not task.distil:
        raise BudgetError("SENet compares activations with the teacher's and cannot do without distillation")
    if options.widths:
        check_slimmable(task, options.widths)
    prune, search, tune = split_epochs(task.recipe, options.prune, options.search, 1)
    student = task.student()
    if options.init == "random":
        restart(student, task.recipe.seed)
    found, layers = sensitivities(task, options, prune), partial_activations(student).values()
    sensitivity = [found[name] for name in partial_activations(student)]
    counts = allocate(task.budget, sensitivity, [layer.mask.numel() for layer in layers])
    if options.granularity == "channel":
        counts = whole_channels(counts, [tuple(layer.mask.shape) for layer in layers])
    for layer in layers:
        layer.freeze()
    recipe = replace(task.recipe, hard_weight=0.5, soft_weight=0.5)
    fit(student, task.train, task.validation, replace(recipe, epochs=search, ema=0.0), task.folder / "search", teacher=task.teacher,
        stage=Mismatch(student, counts, options, recipe.seed), label="senet search", settings=task.settings(options))
    tuning = replace(recipe, epochs=tune, lr=recipe.lr * options.tune_lr, hard_weight=options.gamma, soft_weight=options.alpha)
    images = {name for name, layer in partial_activations(student).items() if layer.mask.dim() == 3}
    ends = [names[-1] for names in stages(student, task.shape) if names[-1] in images]
    stage = Pram(ends, options.beta) if ends else Stage()  # a network of linear layers only has no attention maps
    if options.widths:
        make_slimmable(student, options.widths)
        stage = Slimming(stage, options.widths, recipe.temperature)
    score = fit(student, task.train, task.validation, tuning, task.folder / "tune", teacher=task.teacher, stage=stage,
                label="senet tune", settings=task.settings(options))
    details = {"sensitivity": [round(s, 5) for s in sensitivity], "relus_per_layer": counts}
    if not options.widths:
        return Reduced(student, score, details=details)
    sample = task.train.sample(NORM_IMAGES)
    further = tuple(replace(extract(student, task, width, sample), name=f"width{width}") for width in options.widths)
    return replace(extract(student, task, 1.0, sample), details=details, further=further)
