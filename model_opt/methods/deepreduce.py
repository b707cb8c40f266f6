"""DeepReDuce: drop ReLUs by stage, then by layer, then by reshaping (Jha et al., ICML 2021, arXiv 2103.01396).

Culling: for each stage a network that keeps ReLUs there only is trained; its criticality is (accuracy - accuracy without any
ReLU) / (ReLUs of the stage)^0.07, and the least critical stages lose their ReLUs first. Thinning: every second activation of the
remaining stages goes. Reshaping: half the channels, half the resolution. All combinations that fit the budget are candidates, one for each
count of ReLUs; those with the most are trained from the teacher with distillation. The best on the validation images wins; the others that
none with fewer ReLUs beats, the Pareto set, are given back with it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from model_opt.activation import IDENTITY, count_relus, partial_activations, replace_relus
from model_opt.methods.base import BudgetError, Reduced, Task
from model_opt.methods.features import stages
from model_opt.training import digest, fit, shortages, world, write_atomically

EXPONENT = 0.07
"""Of a stage's ReLU count in its criticality; from secondary sources, the paper's text was not at hand."""


@dataclass(frozen=True)
class Options:
    """Of DeepReDuce. probe: epochs for each criticality network, beyond the recipe's.

    candidates: how many to train at most; with several, the ones that no other beats with fewer ReLUs are the Pareto set.
    """

    probe: int = 1
    candidates: int = 1

    def __post_init__(self) -> None:
        if self.probe < 1 or self.candidates < 1:
            raise ValueError(f"probe and candidates must be at least 1, got {self.probe} and {self.candidates}")


@dataclass(frozen=True)
class Shape:
    """One point of the search space: stages that keep ReLUs (0 is the first), every second one dropped, and the reshaping."""

    kept: tuple[int, ...]
    thinned: bool
    width_factor: float
    stride: int


def inherit(network: nn.Module, teacher: nn.Module) -> nn.Module:
    """Give a network of the teacher's family, perhaps narrower, the leading part of each of the teacher's tensors."""
    own, theirs = network.state_dict(), teacher.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            source = theirs[name]
            tensor.copy_(source[tuple(slice(size) for size in tensor.shape)] if tensor.dim() else source)
    return network


def shaped(task: Task, shape: Shape) -> nn.Module:
    """The untrained network of a point, with partial activations, weights inherited from the teacher."""
    if shape.width_factor == 1 and shape.stride == 1:
        network = task.student()
    else:
        if task.rebuild is None:
            raise BudgetError("only networks of the registry can be reshaped")
        network = replace_relus(inherit(task.rebuild(shape.width_factor, shape.stride), task.teacher), task.shape)
    layers = partial_activations(network)
    for stage, names in enumerate(stages(network, task.shape)):
        # the last activation of a stage survives thinning: it sees the sum of block and shortcut
        keep = set(names[::-1][::2] if shape.thinned else names) if stage in shape.kept else set()
        for name in names:
            layers[name].replacement = IDENTITY
            if name not in keep:
                layers[name].mask.fill_(IDENTITY)
    for layer in layers.values():
        layer.freeze()
    return network


def criticality(task: Task, options: Options) -> dict[int, float]:
    """Of each stage; higher means that its ReLUs matter more."""
    recipe = replace(task.recipe, epochs=options.probe)
    total = len(stages(task.teacher, task.shape))
    accuracies = {}
    for stage in (-1, *range(total)):  # -1: no ReLU at all
        network = shaped(task, Shape((stage,), False, 1.0, 1))
        score = fit(network, task.train, task.validation, recipe, task.searches / f"probe{stage}", teacher=task.mentor,
                    label=f"deepreduce probe {stage}", settings={"reduced": digest(task.teacher)})
        accuracies[stage] = score, count_relus(network)
    least = accuracies[-1][0]
    return {k: (accuracy - least) / relus**EXPONENT for k, (accuracy, relus) in accuracies.items() if k >= 0}


def candidates(task: Task, order: list[int]) -> list[tuple[int, Shape]]:
    """Points within the budget with their counts, most ReLUs first. order: stages from least to most critical.

    Of those with the same count, the one that is least thinned, of the highest resolution, and widest.
    """
    reshapings = list(product((1.0, 0.5), (1, 2))) if task.rebuild is not None else [(1.0, 1)]
    points = [Shape(tuple(sorted(order[cut:])), thinned, width, stride)
              for cut in range(len(order)) for thinned in (False, True) for width, stride in reshapings]
    counted: dict[int, Shape] = {}
    for point in sorted(points, key=lambda point: (point.thinned, point.stride, -point.width_factor)):
        count = count_relus(shaped(task, point))
        if count <= task.budget:
            counted.setdefault(count, point)
    return sorted(counted.items(), reverse=True)


def pareto_set(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that no other reaches in accuracy with fewer ReLUs, fewest ReLUs first."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: row["relus"]):
        if not best or row["validation_accuracy"] > best[-1]["validation_accuracy"]:
            best.append(row)
    return best


def reduce(task: Task, options: Options) -> Reduced:
    """DeepReDuce on the task's teacher; the Pareto set goes to `pareto.json` in the run folder too. Raises BudgetError, TrainingError."""
    if not any(candidates(task, [stage]) for stage in range(len(stages(task.teacher, task.shape)))):
        raise BudgetError(f"no combination of culling, thinning and reshaping has at most {task.budget:,} ReLUs; raise the budget")
    critical = criticality(task, options)
    order = sorted(critical, key=lambda stage: critical[stage])
    found = candidates(task, order)
    if not found:
        raise BudgetError(f"no combination that keeps the most critical stage has at most {task.budget:,} ReLUs; raise the budget")
    tried: list[tuple[float, int, Shape, nn.Module]] = []
    for count, point in found[: options.candidates]:
        network = shaped(task, point)
        score = fit(network, task.train, task.validation, task.recipe, task.folder / f"candidate{len(tried)}", teacher=task.mentor,
                    label="deepreduce", settings=task.settings(point))
        tried.append((score, count, point, network))
    rows = pareto_set([{"relus": count, "validation_accuracy": score, **asdict(point)} for score, count, point, _ in tried])
    if world()[0] == 0:
        with shortages(task.folder, task.recipe.batch):
            write_atomically(task.folder / "pareto.json", json.dumps({"criticality": critical, "rows": rows}, indent=1).encode())
    made = {count: Reduced(network, score, point.width_factor, point.stride, {"criticality": critical, "shape": asdict(point)})
            for score, count, point, network in tried}
    *others, best = (row["relus"] for row in rows)  # accuracy rises with the count
    return replace(made[best], further=tuple(replace(made[count], name=f"{count}-relus") for count in others))
