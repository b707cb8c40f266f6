"""AutoReP: learn which pixels keep their ReLU under a budget (Peng et al., ICCV 2023, arXiv 2308.10134).

Each pixel has a real indicator w and a binary mask m with hysteresis: m stays 1 while w > -t, stays 0 while w <= t.
The straight-through gradient of w is softplus(w) times that of the mask. The published penalty, a constant push on all
indicators while the count is above the budget, is the option `penalty`; by default the push is exact: when the count
exceeds the scheduled budget, all indicators are lowered by the one amount that meets it. The schedule falls geometrically
from all ReLUs to the budget in the first part of the run; then the mask is frozen and the rest trains weights and
coefficients. Either way the final count never exceeds the budget.

A run may start from a network that AutoReP has reduced already, which needs fewer epochs than one from the teacher. Its pixels without
a ReLU start as far below zero as the others above; to a larger budget the schedule rises, and indicators are raised to meet it.

The options' published values together are the published method but for its optimiser: there Adam moves weights and coefficients too
(rate 1e-3; on Tiny-ImageNet 1e-4 within Lookahead), its rate falling as a cosine, and no gradient is clipped; here they take the recipe's
SGD with its clipping, and only the indicators Adam, at a constant rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from model_opt.activation import (
    IDENTITY,
    LINEAR,
    RANGE_PENALTY,
    RELU,
    SQUARE,
    PartialActivation,
    count_relus,
    fit_polynomials,
    partial_activations,
)
from model_opt.methods.base import BudgetError, GateStage, Reduced, Task, check_granularity, check_values, keep_largest, set_gates
from model_opt.training import Stage, fit

FIT_IMAGES = 2000
REFRESH_EVERY = 10
REPLACEMENTS = (IDENTITY, LINEAR, SQUARE)
"""What takes a ReLU's place, by degree."""
SETTLED = ("degree", "c2", "granularity", "released", "damping", "scale_x2", "refresh")
"""Options that a network to start from has settled."""
INITS = {"low": (0.05, 0.1), "uniform": (0.0, 1.0)}
"""Where the indicators' uniform distribution starts, and how wide it is."""


@dataclass(frozen=True)
class Options:
    """Of AutoReP.

    degree: of the polynomial that replaces a ReLU: 2, 1 or 0 (identity). c2: "layer" for a public power of two per layer,
    "channel" for a trained coefficient per channel, as published. granularity: "pixel" or "channel".
    threshold: hysteresis t. indicator_lr: Adam's rate. freeze: fraction of the run after which the mask is fixed.
    penalty: 0 for the exact schedule; else the published lambda, up to `freeze`.
    released: start from the damped coefficients of the released code instead of the least-squares fit (c2 per channel).
    damping: halvings of c2 after the least-squares fit. scale_x2: constant factor on c2, published 0.1 or 2; clip_x2: largest |c2|
    before that factor, 0 for none, published 1 (both c2 per channel). frozen: coefficients keep their first values.
    init: of the indicators: "low", U(0.05, 0.15), or "uniform", U(0, 1), as published. refresh: steps during which the coefficients are
    fitted anew at every tenth, published 500. range_penalty: see `model_opt.activation.RANGE_PENALTY`; published 0.
    """

    degree: int = 2
    c2: str = "layer"
    granularity: str = "pixel"
    threshold: float = 0.003
    indicator_lr: float = 1e-3
    freeze: float = 0.4
    penalty: float = 0.0
    released: bool = False
    damping: int = 2
    scale_x2: float = 1.0
    clip_x2: float = 0.0
    frozen: bool = False
    init: str = "low"
    refresh: int = 0
    range_penalty: float = RANGE_PENALTY

    def __post_init__(self) -> None:
        if self.degree not in (0, 1, 2):
            raise ValueError(f"degree must be 0, 1 or 2, got {self.degree}")
        if self.c2 not in ("layer", "channel"):
            raise ValueError(f"c2 must be layer or channel, got {self.c2!r}")
        if self.init not in INITS:
            raise ValueError(f"unknown init {self.init!r}; known: {', '.join(INITS)}")
        if not 0 < self.freeze <= 1:
            raise ValueError(f"freeze must lie in (0, 1], got {self.freeze}")
        check_values(self, positive=("indicator_lr", "scale_x2"),
                     not_negative=("threshold", "penalty", "damping", "clip_x2", "refresh", "range_penalty"))
        check_granularity(self.granularity)
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        for holds, condition, names in (
                (self.degree > 0, "degree 1 or 2", {"released", "frozen", "refresh"}),
                (self.degree == 2, "degree 2", {"c2", "damping", "scale_x2", "clip_x2", "range_penalty"}),
                (self.degree < 2 or self.c2 == "channel", "one c2 per channel, c2=channel", {"released", "scale_x2", "clip_x2"}),
                (not self.released, "released=false", {"damping"}), (not self.frozen, "frozen=false", {"refresh"})):
            if not holds and changed & names:
                raise ValueError(f"{', '.join(sorted(changed & names))}: without effect; needs {condition}")


class AutoRep(GateStage):
    """The indicator stage of one run; `model` has partial activations whose polynomials are fitted, and `refit` fits them anew."""

    def __init__(self, model: nn.Module, budget: int, options: Options, seed: int = 0, refit: Callable[[], None] = lambda: None) -> None:
        super().__init__(model, budget, granularity=options.granularity, lr=options.indicator_lr, freeze=options.freeze)
        self.options, self.refit, self.steps = options, refit, 0
        self.begun = count_relus(model)
        generator = torch.Generator().manual_seed(seed)
        least, width = INITS[options.init]
        set_gates(self.layers, lambda mask: side(mask) * (least + width * torch.rand(mask.shape, generator=generator)).to(mask.device),
                  soft=False)
        if options.granularity == "channel":
            for layer in self.layers:
                assert layer.gate is not None
                layer.gate.data.copy_(layer.gate.data.view(len(layer.gate), -1)[:, :1].view(layer.channels).expand_as(layer.gate))

    @property
    def growing(self) -> bool:
        """Whether the budget exceeds what the run began with."""
        return self.budget > self.begun

    def scheduled(self, progress: float) -> int:
        """ReLUs allowed after the fraction `progress` of the run."""
        done = min(progress / self.freeze, 1.0)
        if done >= 1:
            return self.budget
        if self.options.penalty and not self.growing:
            return self.begun
        if self.growing:
            return min(self.budget, int(max(self.begun, 1) * (self.budget / max(self.begun, 1)) ** done))
        return max(self.budget, int(self.begun * (max(self.budget, 1) / max(self.begun, 1)) ** done))

    @torch.no_grad()
    def adapt(self) -> None:
        above = sum(layer.count(RELU) for layer in self.layers) > self.budget
        for gate in self.gates():
            assert gate.grad is not None
            gate.grad.add_(self.options.penalty / self.total if above else 0.0).mul_(nn.functional.softplus(gate))

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """Hysteresis, and the push that keeps the count within the schedule; growing, the one that makes it meet the schedule."""
        leads = [gate + self.options.threshold * side(layer.mask) for gate, layer in zip(self.gates(), self.layers)]
        lead, cost = self.units(leads)
        keep = lead > 0
        allowed = self.scheduled(progress)
        if self.growing or int(cost[keep].sum()) > allowed:
            keep, push = keep_largest(lead, cost, allowed)
            if not self.growing:
                keep &= lead > 0  # what is left of the budget does not bring back what hysteresis took
                push = max(push, 0.0)
            for gate in self.gates():
                gate.sub_(push if math.isfinite(push) else 0.0)
        self.apply(keep)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        self.steps += 1
        if self.steps <= self.options.refresh and self.steps % REFRESH_EVERY == 0:
            self.refit()
        clip(self.layers, self.options)

    def finish(self) -> None:
        super().finish()
        for layer in self.layers:
            layer.fold_c2_scale()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.steps = int(state["steps"])


def side(mask: Tensor) -> Tensor:
    """1 where there is a ReLU, -1 elsewhere."""
    return 2.0 * (mask == RELU) - 1


@torch.no_grad()
def clip(layers: Iterable[PartialActivation], options: Options) -> None:
    """Hold c2 within the options' clip_x2."""
    for layer in layers:
        if options.clip_x2 and layer.c2 is not None:
            layer.c2.clamp_(-options.clip_x2, options.clip_x2)


class _Clipping(Stage):
    """Holds c2 within the options' clip_x2 after every step."""

    def __init__(self, layers: Collection[PartialActivation], options: Options) -> None:
        self.layers, self.options = layers, options

    def after_step(self, progress: float) -> None:
        clip(self.layers, self.options)


def folded(options: Options) -> Options:
    """The options for a network that a run has finished: its coefficients hold the factor of c2, and are not fitted again."""
    return replace(options, clip_x2=options.clip_x2 * options.scale_x2, scale_x2=1.0, refresh=0)


def going_on(network: nn.Module, options: Options) -> Stage:
    """The options' rules for a reduced network: replacement, range penalty, frozen coefficients, and clipping by the stage."""
    layers = partial_activations(network).values()
    for layer in layers:
        layer.replacement, layer.range_penalty = REPLACEMENTS[options.degree], options.range_penalty
        if options.frozen or options.degree == 0:
            layer.freeze()
    return _Clipping(layers, folded(options))


def check_start(network: nn.Module, options: Options) -> None:
    """Raise BudgetError unless the reduced network is one that AutoReP makes with these options."""
    for name, layer in partial_activations(network).items():
        if layer.count(RELU) + layer.count(REPLACEMENTS[options.degree]) < layer.mask.numel():
            raise BudgetError(f"the network to start from has other activations than ReLUs and degree {options.degree}, in {name}")
        if options.degree == 2 and (layer.c2 is None) != (options.c2 == "layer"):
            raise BudgetError(f"c2={options.c2} is not how the network to start from was made")
        rows = (layer.mask == RELU).view(len(layer.mask), -1)
        if options.granularity == "channel" and bool((rows != rows[:, :1]).any()):
            raise BudgetError(f"granularity=channel is not how the network to start from was made, see {name}")


def fit_coefficients(model: nn.Module, task: Task, options: Options) -> None:
    """Set the polynomials by the closed forms from the present pre-activations, the same in all of torchrun's processes."""
    training = model.training
    fit_polynomials(model, task.train.sample(FIT_IMAGES), damping=options.damping, released=options.released)
    model.train(training)
    layers = partial_activations(model).values()
    clip(layers, options)
    if torch.distributed.is_initialized():
        for layer in layers:
            for coefficient in (layer.c2, layer.c1, layer.c0):
                if coefficient is not None:
                    torch.distributed.broadcast(coefficient.data, 0)


def prepare(model: nn.Module, task: Task, options: Options, linear: Collection[str] = ()) -> None:
    """Fit the polynomials of a student's layers as the options say; the layers named in `linear` become lines at once."""
    layers = partial_activations(model).values()
    for name, layer in partial_activations(model).items():
        layer.replacement = LINEAR if name in linear else REPLACEMENTS[options.degree]
        layer.range_penalty, layer.c2_scale = options.range_penalty, options.scale_x2
        if options.c2 == "channel":
            layer.per_channel_c2()
    fit_coefficients(model, task, options)
    for name in linear:
        model.get_submodule(name).mask.fill_(LINEAR)  # type: ignore[operator]
    for layer in layers:
        if options.frozen or options.degree == 0:
            layer.freeze()


def reduce(task: Task, options: Options) -> Reduced:
    """AutoReP on the task's teacher, or on what it starts from. Raises BudgetError, TrainingError."""
    student = task.student()
    if task.start is None:
        prepare(student, task, options)
    else:
        check_start(student, options)
        going_on(student, options)
        options = folded(options)
    stage = AutoRep(student, task.budget, options, task.recipe.seed, lambda: fit_coefficients(student, task, options))
    score = fit(student, task.train, task.validation, task.recipe, task.folder, teacher=task.mentor, stage=stage,
                label="autorep", settings=task.settings(options))
    stage.finish()
    result = Reduced(student, score)
    if result.relus > task.budget:
        raise BudgetError(f"the mask still has {result.relus:,} ReLUs")
    return result
