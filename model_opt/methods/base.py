"""What the reduction methods share: the task, the budget, and masks learnt through gates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_opt.activation import RELU, PartialActivation, count_relus, partial_activations, replace_relus
from model_opt.data import Split
from model_opt.networks import activation_shapes
from model_opt.teachers import mentor
from model_opt.training import Recipe, Stage, digest


class BudgetError(ValueError):
    """The ReLU budget cannot be met. The message says why, `hint` what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def count_all(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """ReLUs per image of a network of nn.ReLU modules. Raises BudgetError if there are none."""
    total = sum(torch.Size(s).numel() for s in activation_shapes(model, input_shape, nn.ReLU).values())
    if total == 0:
        raise BudgetError("the network has no nn.ReLU module, so there is nothing to reduce; write its ReLUs as nn.ReLU")
    return total


def check_budget(budget: int, total: int) -> None:
    """Raise BudgetError unless the budget is a whole number of ReLUs, 0 <= budget <= total."""
    if not isinstance(budget, Integral) or budget < 0:
        raise BudgetError(f"the budget must be a whole number of ReLUs and not negative, got {budget!r}", f"pass 0 to {total}")
    if budget > total:
        raise BudgetError(f"the budget of {budget:,} ReLUs exceeds the network's {total:,}", f"pass 0 to {total}")


def check_values(options: Any, *, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
    """Raise BudgetError unless the options of these names are finite numbers above zero, or not below it."""
    for name in (*positive, *not_negative):
        value = getattr(options, name)
        if not (math.isfinite(value) and (value > 0 or (value == 0 and name in not_negative))):
            raise BudgetError(f"{name} must {'not be negative' if name in not_negative else 'be positive'}, got {value}")


def check_granularity(granularity: str) -> None:
    """Raise BudgetError unless ReLUs can be chosen so."""
    if granularity not in ("pixel", "channel"):
        raise BudgetError(f"unknown granularity {granularity!r}; known: pixel, channel")


@dataclass(frozen=True)
class Task:
    """What a method is given.

    teacher: all-ReLU network of nn.ReLU modules; it is not changed. budget: ReLUs per image that may remain.
    recipe: its epochs are what the method may spend on training the result, searching included unless it says otherwise; each stage of a
    method takes one at least.
    folder: for checkpoints and logs. distil: learn from the teacher's outputs too.
    rebuild: makes an untrained network of the teacher's family from a width factor and a stem stride; None if unknown.
    shared: folder in which runs of other budgets find what does not depend on it; None for none.
    start: reduced network of the teacher's architecture whose weights and ReLUs the student starts from; None for the teacher's.
    besides: further networks to distil from. logits: file in which all their outputs are kept for runs of the same seed; None for none.
    """

    teacher: nn.Module
    budget: int
    train: Split
    validation: Split
    recipe: Recipe
    folder: Path
    distil: bool = True
    rebuild: Callable[[float, int], nn.Module] | None = None
    shared: Path | None = None
    start: nn.Module | None = None
    besides: Sequence[nn.Module] = ()
    logits: Path | None = None

    @property
    def searches(self) -> Path:
        """Folder of searches that do not depend on the budget."""
        return self.shared or self.folder

    @property
    def shape(self) -> tuple[int, ...]:
        return self.train.shape

    @property
    def mentor(self) -> nn.Module | None:
        """What the student shall distil from, if it shall: the teacher, or its mean with those besides."""
        return mentor([self.teacher, *self.besides], self.logits) if self.distil else None

    def settings(self, options: Any) -> dict[str, Any]:
        """What a resumed run must share: the budget, and all of `search_settings`."""
        return {"budget": self.budget, **self.search_settings(options)}

    def search_settings(self, options: Any) -> dict[str, Any]:
        """What runs of other budgets must share: the network that is reduced, and the method's options; `fit` adds what they learn from."""
        sources = {"reduced": digest(self.teacher), **({"from": digest(self.start)} if self.start is not None else {})}
        return sources | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()}

    def student(self) -> nn.Module:
        """A copy of the network to start from, or of the teacher with all-ReLU partial activations."""
        if self.start is not None:
            return copy.deepcopy(self.start)
        return replace_relus(copy.deepcopy(self.teacher), self.shape)


@dataclass(frozen=True)
class Reduced:
    """What a method returns: the network, its accuracy in float, and how its shape differs from the teacher's.

    width_factor, stride: reshaping (DeepReDuce, SENet++). details: figures worth keeping. further: what the same run made besides, each
    with a name: narrower widths (SENet++), the rest of the Pareto set (DeepReDuce).
    """

    model: nn.Module
    validation_accuracy: float
    width_factor: float = 1.0
    stride: int = 1
    details: dict[str, Any] = field(default_factory=dict)
    further: tuple[Reduced, ...] = ()
    name: str = ""

    @property
    def relus(self) -> int:
        return count_relus(self.model)


def split_epochs(recipe: Recipe, *fractions: float) -> list[int]:
    """Epochs of consecutive stages by fractions of the recipe's, at least one each, the last taking what is left."""
    parts = [max(round(recipe.epochs * fraction), 1) for fraction in fractions[:-1]]
    return [*parts, max(recipe.epochs - sum(parts), 1)]


def keep_largest(score: Tensor, cost: Tensor, budget: int) -> tuple[Tensor, float]:
    """Which units to keep, by score, so that their cost stays within the budget; and the score of the first behind them.

    score, cost: (units,). Units are taken in the order of their scores, those that no longer fit are passed over.
    """
    order = score.sort(descending=True, stable=True)
    ranked = cost[order.indices]
    kept = ranked.cumsum(0) <= budget
    end, room = int(kept.sum()), budget - int(ranked[kept].sum())
    while len(fitting := (ranked[end:] <= room).nonzero()):
        end += int(fitting[0])
        kept[end] = True
        room -= int(ranked[end])
        end += 1
    keep = torch.zeros_like(kept).index_put_((order.indices,), kept)
    return keep, float(order.values[end]) if end < len(score) else float("-inf")


class GateStage(Stage):
    """A stage that learns one gate per pixel or channel with Adam while SGD trains the weights.

    Subclasses set `layer.gate` to what it shall start from and turn gates into masks.

    Args:
        granularity: "pixel", or "channel": all pixels of a channel share their gate.
        lr: Adam's rate. freeze: fraction of the run after which the mask is fixed.
    """

    def __init__(self, model: nn.Module, budget: int, *, granularity: str, lr: float, freeze: float) -> None:
        check_granularity(granularity)
        if not 0 < freeze <= 1:
            raise BudgetError(f"freeze must lie in (0, 1], got {freeze}")
        self.layers = list(partial_activations(model).values())
        self.total = sum(layer.mask.numel() for layer in self.layers)
        check_budget(budget, self.total)
        self.budget, self.granularity, self.lr, self.freeze = budget, granularity, lr, freeze
        self.optimiser: torch.optim.Adam | None = None
        self.fixed = False

    def gates(self) -> list[Tensor]:
        """The gates, each of its layer's shape."""
        return [layer.gate for layer in self.layers if layer.gate is not None]

    def begin(self, model: nn.Module, teacher: nn.Module | None) -> list[dict[str, Any]]:
        self.optimiser = torch.optim.Adam(self.gates(), lr=self.lr)
        # in the main optimiser the gates have rate zero: it must know them, but Adam moves them; its momentum would be written
        # into their gradients where PyTorch updates many tensors at once, as on GPUs
        return [{"params": self.gates(), "scale": 0.0, "weight_decay": 0.0, "momentum": 0.0}]

    def adapt(self) -> None:
        """Change the gates' gradients before Adam's step."""

    def update(self, progress: float) -> None:
        """Turn gates into masks after Adam's step."""

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        assert self.optimiser is not None
        if self.fixed:
            return
        self.adapt()
        if self.granularity == "channel":
            for gate in self.gates():
                if gate.grad is not None and gate.dim() == 3:
                    gate.grad.copy_(gate.grad.sum((1, 2), keepdim=True).expand_as(gate))
        self.optimiser.step()
        self.update(progress)
        if progress >= self.freeze:
            self.fix_masks()

    def fix_masks(self) -> None:
        """From now on the masks stay as they are, and the gates learn no more."""
        self.fixed = True
        for gate in self.gates():
            gate.requires_grad_(False)
            gate.grad = None

    def units(self, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One value and the number of ReLUs for each unit of all layers: a pixel or a channel."""
        if self.granularity == "pixel":
            flat = torch.cat([v.flatten() for v in values])
            return flat, torch.ones_like(flat, dtype=torch.int64)
        flat = torch.cat([v.reshape(len(v), -1)[:, 0] for v in values])
        return flat, torch.cat([torch.full((len(v),), v[0].numel(), device=v.device) for v in values])

    def apply(self, keep: Tensor) -> None:
        """Set the masks from one decision per unit."""
        sizes = [layer.mask.numel() if self.granularity == "pixel" else len(layer.mask) for layer in self.layers]
        for layer, part in zip(self.layers, keep.split(sizes)):
            shaped = part.view(layer.mask.shape) if self.granularity == "pixel" else part.view(layer.channels)
            layer.mask.copy_(torch.where(shaped, RELU, layer.replacement))

    def status(self) -> dict[str, float]:
        return {"relus": sum(layer.count(RELU) for layer in self.layers)}

    def state(self) -> dict[str, Any]:
        assert self.optimiser is not None
        return {"adam": self.optimiser.state_dict(), "fixed": self.fixed}

    def load(self, state: dict[str, Any]) -> None:
        assert self.optimiser is not None
        self.optimiser.load_state_dict(state["adam"])
        if state["fixed"]:
            self.fix_masks()

    def finish(self) -> None:
        """Drop the gates; the masks stay."""
        for layer in self.layers:
            layer.gate, layer.soft_gate = None, False


def set_gates(layers: list[PartialActivation], start: Callable[[Tensor], Tensor], soft: bool) -> None:
    """Give every layer a trainable gate of its mask's shape."""
    for layer in layers:
        layer.gate = nn.Parameter(start(layer.mask.float()))
        layer.soft_gate = soft
