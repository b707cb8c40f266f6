"""AutoReP: learn which pixels keep their ReLU under a budget (Peng et al., ICCV 2023, arXiv 2308.10134).

Each pixel has a real indicator w and a binary mask m with hysteresis: m stays 1 while w > -t, stays 0 while w <= t.
The indicator learns by the straight-through gradient of `model_opt.activation`. The published hinge penalty pushes
all indicators down while the count is above the budget; here that push is exact: when the count exceeds the
scheduled budget, all indicators are lowered by the one amount that meets it. The schedule falls geometrically from
all ReLUs to the budget in the first part of the run; then the mask is frozen and the rest of the run trains
weights and coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model_opt.activation import RELU, SQUARE, PartialActivation, partial_activations, replace_relus
from model_opt.data import Split, normalise
from model_opt.training import Stage


class BudgetError(ValueError):
    """The ReLU budget is negative or larger than the network's own count."""


def check_budget(budget: int, total: int) -> None:
    """Raise BudgetError unless 0 <= budget <= total."""
    if budget < 0:
        raise BudgetError(f"the budget must not be negative, got {budget:,}")
    if budget > total:
        raise BudgetError(f"the budget of {budget:,} ReLUs exceeds the network's {total:,}")


@contextmanager
def _inputs_of(layers: dict[str, PartialActivation]) -> Iterator[dict[str, list[Tensor]]]:
    sums: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Any:
        def record(_m: nn.Module, args: tuple[Tensor, ...]) -> None:
            z = args[0].float().transpose(0, 1).flatten(1)
            sums[name].append(torch.stack([z.mean(1), z.square().mean(1)]))

        return record

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fit_polynomials(model: nn.Module, sample: Split, batch: int = 250) -> None:
    """Set every layer's k, c1, c0 by the closed forms from its pre-activations on `sample`."""
    layers = partial_activations(model)
    model.eval()
    where = next(model.parameters()).device
    with _inputs_of(layers) as sums:
        for start in range(0, len(sample), batch):
            model(normalise(sample.images[start : start + batch].to(where)))
    for name, layer in layers.items():
        mean, square = torch.stack(sums[name]).mean(0)
        layer.fit(mean, (square - mean**2).clamp_min(0).sqrt())


class AutoRep(Stage):
    """The indicator stage of one run. Call `fit_polynomials` on the model first.

    Args:
        budget: ReLUs per image in the end; the final count never exceeds it.
        threshold: hysteresis t. indicator_lr: Adam's rate for the indicators.
        freeze: fraction of the run after which the mask is fixed.
    """

    def __init__(self, model: nn.Module, budget: int, *, threshold: float = 0.003, indicator_lr: float = 1e-3,
                 freeze: float = 0.5, seed: int = 0) -> None:
        self.layers = list(partial_activations(model).values())
        self.total = sum(layer.mask.numel() for layer in self.layers)
        check_budget(budget, self.total)
        self.budget, self.threshold, self.lr, self.freeze = budget, threshold, indicator_lr, freeze
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            start = 0.05 + 0.1 * torch.rand(layer.mask.shape, generator=generator)
            layer.indicator = nn.Parameter(start.to(layer.mask.device))
        self.optimiser: torch.optim.Adam | None = None

    def _indicators(self) -> list[Tensor]:
        return [layer.indicator for layer in self.layers if layer.indicator is not None]

    def begin(self, model: nn.Module) -> list[dict[str, Any]]:
        self.optimiser = torch.optim.Adam(self._indicators(), lr=self.lr)
        # in the main optimiser the indicators have rate zero: it must know them, but Adam moves them
        return [{"params": self._indicators(), "scale": 0.0, "weight_decay": 0.0}]

    def scheduled(self, progress: float) -> int:
        """ReLUs allowed after the fraction `progress` of the run."""
        done = min(progress / self.freeze, 1.0)
        return max(self.budget, int(self.total * (max(self.budget, 1) / self.total) ** done)) if done < 1 else self.budget

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        assert self.optimiser is not None
        if self._indicators()[0].requires_grad:
            self.optimiser.step()
            self._update(self.scheduled(progress))
        if progress >= self.freeze:
            for w in self._indicators():
                w.requires_grad_(False)
                w.grad = None

    def _update(self, allowed: int) -> None:
        """Hysteresis, and the push down that keeps the count at most `allowed`."""
        lead = torch.cat([
            (w + self.threshold * (2.0 * (layer.mask == RELU) - 1)).flatten() for w, layer in zip(self._indicators(), self.layers)
        ])
        keep = lead > 0
        if int(keep.sum()) > allowed:
            cut = lead.sort(descending=True)
            push = float(cut.values[allowed])
            keep = torch.zeros_like(keep).index_fill_(0, cut.indices[:allowed], True)
            for w in self._indicators():
                w.sub_(max(push, 0.0))
        for layer, part in zip(self.layers, keep.split([layer.mask.numel() for layer in self.layers])):
            layer.mask.copy_(torch.where(part.view(layer.mask.shape), RELU, SQUARE))

    def status(self) -> dict[str, float]:
        return {"relus": sum(layer.count(RELU) for layer in self.layers)}

    def state(self) -> dict[str, Any]:
        assert self.optimiser is not None
        return self.optimiser.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        assert self.optimiser is not None
        self.optimiser.load_state_dict(state)

    def finish(self) -> int:
        """Drop the indicators and return the exact ReLU count."""
        for layer in self.layers:
            layer.indicator = None
        return sum(layer.count(RELU) for layer in self.layers)


def prepare(teacher: nn.Module, student: nn.Module, input_shape: tuple[int, ...], sample: Split) -> None:
    """Make `student`, an all-ReLU network with the teacher's shape, start from the teacher with fitted polynomials."""
    student.load_state_dict(teacher.state_dict())
    replace_relus(student, input_shape)
    fit_polynomials(student, sample)
