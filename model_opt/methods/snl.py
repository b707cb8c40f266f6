"""SNL, selective network linearization (Cho et al., ICML 2022, arXiv 2202.02340).

Stage 1: every pixel mixes ReLU and identity, a = alpha relu(z) + (1 - alpha) z, alpha trained from 1 under lambda sum |alpha|;
lambda grows whenever the number of alphas above a threshold falls too slowly. Stage 2: alphas become 0 or 1, and the rest of the
run fine-tunes. Published: Adam 1e-3 for weights and alphas, lambda from 1e-5 by 1.1 an epoch for up to 2,000 epochs. Here a run is
short: SGD trains the weights, Adam at a higher rate the alphas, and lambda grows at every one of `CHECKS` checks while the count lies
above a geometric path to the budget. The search is over, as published, once the count is within the budget; then, and in any case
when stage 1 ends, the largest alphas stay ReLUs, as many as the budget allows, since under a steep lambda many fall at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model_opt.activation import IDENTITY, RELU
from model_opt.methods.base import GateStage, Reduced, Task, check_granularity, check_values, keep_largest, set_gates, split_epochs
from model_opt.training import fit

CHECKS = 100


@dataclass(frozen=True)
class Options:
    """Of SNL. penalty: first lambda. growth: its factor at a check. threshold: an alpha above it counts as a ReLU.

    alpha_lr: Adam's rate for the alphas. search: fraction of the epochs for stage 1. granularity: "pixel" or "channel".
    tune_lr: peak rate of stage 2, as a fraction of the recipe's.
    """

    penalty: float = 1e-5
    growth: float = 1.1
    threshold: float = 1e-2
    alpha_lr: float = 5e-3
    search: float = 0.5
    granularity: str = "pixel"
    tune_lr: float = 0.5

    def __post_init__(self) -> None:
        check_granularity(self.granularity)
        if not 0 < self.search < 1:
            raise ValueError(f"search must lie in (0, 1), got {self.search}")
        if not 1 <= self.growth < math.inf:
            raise ValueError(f"growth must be at least 1, got {self.growth}")
        check_values(self, positive=("penalty", "alpha_lr", "tune_lr"), not_negative=("threshold",))


class Snl(GateStage):
    """Stage 1."""

    def __init__(self, model: nn.Module, budget: int, options: Options) -> None:
        super().__init__(model, budget, granularity=options.granularity, lr=options.alpha_lr, freeze=1.0)
        self.options, self.penalty, self.checked = options, options.penalty, 0
        for layer in self.layers:
            layer.replacement = IDENTITY
            layer.freeze()
        set_gates(self.layers, torch.ones_like, soft=True)

    def _count(self) -> int:
        return sum(int((gate > self.options.threshold).sum()) for gate in self.gates())

    def loss(self) -> Tensor | None:
        if self.fixed:
            return None
        return self.penalty * torch.stack([gate.abs().sum() for gate in self.gates()]).sum()

    def update(self, progress: float) -> None:
        if int(progress * CHECKS) > self.checked:
            self.checked = int(progress * CHECKS)
            count = self._count()
            if count <= self.budget:
                self.binarise()
                return
            if count > self.total * (max(self.budget, 1) / self.total) ** progress:
                self.penalty *= self.options.growth
        if progress >= 1:
            self.binarise()

    @torch.no_grad()
    def binarise(self) -> None:
        """Once: the largest alphas become 1, at most as many as the budget, the others 0."""
        if self.fixed:
            return
        alpha, cost = self.units(self.gates())
        keep, _ = keep_largest(alpha, cost, self.budget)
        self.apply(keep)
        self.fix_masks()

    @torch.no_grad()
    def fix_masks(self) -> None:
        super().fix_masks()
        for layer in self.layers:
            assert layer.gate is not None
            layer.gate.copy_((layer.mask == RELU).to(layer.gate.dtype))

    def status(self) -> dict[str, float]:
        return {"relus": self._count(), "penalty": self.penalty}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "penalty": self.penalty, "checked": self.checked}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.penalty, self.checked = float(state["penalty"]), int(state["checked"])


def reduce(task: Task, options: Options) -> Reduced:
    """SNL on the task's teacher. Raises BudgetError, TrainingError."""
    student = task.student()
    stage = Snl(student, task.budget, options)
    first, second = split_epochs(task.recipe, options.search, 1)
    settings = task.settings(options)
    fit(student, task.train, task.validation, replace(task.recipe, epochs=first), task.folder / "search", teacher=task.mentor,
        stage=stage, label="snl search", settings=settings)
    stage.binarise()
    stage.finish()
    tuning = replace(task.recipe, epochs=second, lr=task.recipe.lr * options.tune_lr)
    score = fit(student, task.train, task.validation, tuning, task.folder / "tune", teacher=task.mentor, label="snl tune",
                settings=settings)
    return Reduced(student, score)
