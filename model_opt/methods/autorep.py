"""AutoReP: learn which pixels keep their ReLU under a budget (Peng et al., ICCV 2023, arXiv 2308.10134).

Each pixel has a real indicator w and a binary mask m with hysteresis: m stays 1 while w > -t, stays 0 while w <= t.
The straight-through gradient of w is softplus(w) times that of the mask. The published penalty, a constant push on all
indicators while the count is above the budget, is the option `penalty`; by default the push is exact: when the count
exceeds the scheduled budget, all indicators are lowered by the one amount that meets it. The schedule falls geometrically
from all ReLUs to the budget in the first part of the run; then the mask is frozen and the rest trains weights and
coefficients. Either way the final count never exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model_opt.activation import IDENTITY, LINEAR, RELU, SQUARE, fit_polynomials, partial_activations
from model_opt.methods.base import BudgetError, GateStage, Reduced, Task, keep_largest, set_gates
from model_opt.training import fit

FIT_IMAGES = 2000


@dataclass(frozen=True)
class Options:
    """Of AutoReP.

    degree: of the polynomial that replaces a ReLU: 2, 1 or 0 (identity). c2: "layer" for a public power of two per layer,
    "channel" for a trained coefficient per channel, as published. granularity: "pixel" or "channel".
    threshold: hysteresis t. indicator_lr: Adam's rate. freeze: fraction of the run after which the mask is fixed.
    penalty: 0 for the exact schedule; else the published lambda, up to `freeze`.
    released: start from the damped coefficients of the released code instead of the least-squares fit (c2 per channel).
    damping: halvings of c2 after the least-squares fit. scale_x2: factor on the first c2; clip_x2: largest |c2|, 0 for none (both
    c2 per channel). frozen: coefficients keep their first values.
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

    def __post_init__(self) -> None:
        if self.degree not in (0, 1, 2):
            raise ValueError(f"degree must be 0, 1 or 2, got {self.degree}")
        if self.c2 not in ("layer", "channel"):
            raise ValueError(f"c2 must be layer or channel, got {self.c2!r}")
        if self.degree == 2 and self.c2 == "layer" and (self.released or self.scale_x2 != 1 or self.clip_x2):
            raise ValueError("released, scale_x2 and clip_x2 need one c2 per channel")


class AutoRep(GateStage):
    """The indicator stage of one run; `model` has partial activations whose polynomials are fitted."""

    def __init__(self, model: nn.Module, budget: int, options: Options, seed: int = 0) -> None:
        super().__init__(model, budget, granularity=options.granularity, lr=options.indicator_lr, freeze=options.freeze)
        self.options = options
        generator = torch.Generator().manual_seed(seed)
        set_gates(self.layers, lambda mask: (0.05 + 0.1 * torch.rand(mask.shape, generator=generator)).to(mask.device), soft=False)
        if options.granularity == "channel":
            for layer in self.layers:
                assert layer.gate is not None
                layer.gate.data.copy_(layer.gate.data.flatten(1)[:, :1].view(layer.channels).expand_as(layer.gate))

    @property
    def learning(self) -> bool:
        """Whether the mask can still change."""
        return any(gate.requires_grad for gate in self.gates())

    def scheduled(self, progress: float) -> int:
        """ReLUs allowed after the fraction `progress` of the run."""
        done = min(progress / self.freeze, 1.0)
        if done >= 1:
            return self.budget
        if self.options.penalty:
            return self.total
        return max(self.budget, int(self.total * (max(self.budget, 1) / self.total) ** done))

    @torch.no_grad()
    def adapt(self) -> None:
        above = sum(layer.count(RELU) for layer in self.layers) > self.budget
        for gate in self.gates():
            assert gate.grad is not None
            gate.grad.add_(self.options.penalty / self.total if above else 0.0).mul_(nn.functional.softplus(gate))

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """Hysteresis, and the push down that keeps the count within the schedule."""
        leads = [gate + self.options.threshold * (2.0 * (layer.mask == RELU) - 1) for gate, layer in zip(self.gates(), self.layers)]
        lead, cost = self.units(leads)
        keep = lead > 0
        allowed = self.scheduled(progress)
        if int(cost[keep].sum()) > allowed:
            keep, push = keep_largest(lead, cost, allowed)
            for gate in self.gates():
                gate.sub_(max(push, 0.0))
        self.apply(keep)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        if self.options.clip_x2:
            for layer in self.layers:
                if layer.c2 is not None:
                    layer.c2.clamp_(-self.options.clip_x2, self.options.clip_x2)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "learning": self.learning}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        if not state.get("learning", True):
            for gate in self.gates():
                gate.requires_grad_(False)


def prepare(model: nn.Module, task: Task, options: Options, linear: Collection[str] = ()) -> None:
    """Fit the polynomials of a student's layers as the options say; the layers named in `linear` become lines at once."""
    layers = partial_activations(model).values()
    for name, layer in partial_activations(model).items():
        layer.replacement = LINEAR if name in linear else (IDENTITY, LINEAR, SQUARE)[options.degree]
        if options.c2 == "channel" and options.degree == 2:
            layer.per_channel_c2()
    fit_polynomials(model, task.train[:FIT_IMAGES], damping=options.damping, released=options.released)
    for name in linear:
        model.get_submodule(name).mask.fill_(LINEAR)  # type: ignore[operator]
    for layer in layers:
        if layer.c2 is not None:
            layer.c2.data.mul_(options.scale_x2)
        if options.frozen or options.degree == 0:
            layer.freeze()


def reduce(task: Task, options: Options) -> Reduced:
    """AutoReP on the task's teacher. Raises BudgetError, TrainingError."""
    student = task.student()
    prepare(student, task, options)
    stage = AutoRep(student, task.budget, options, task.recipe.seed)
    score = fit(student, task.train, task.validation, task.recipe, task.folder, teacher=task.mentor, stage=stage,
                label="autorep", settings=task.settings(options))
    stage.finish()
    result = Reduced(student, score)
    if result.relus > task.budget:
        raise BudgetError(f"the mask still has {result.relus:,} ReLUs")
    return result
