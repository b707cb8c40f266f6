"""ReLU-reduction methods on one interface: an all-ReLU teacher, a budget and data in, a network with partial activations out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model_opt import compiler
from model_opt.activation import partial_activations, replace_relus, separate_relus
from model_opt.data import Split
from model_opt.datasets import Dataset
from model_opt.methods import autorep, cost, deepreduce, senet, snl
from model_opt.methods.base import BudgetError, Reduced, Task, check_budget, count_all
from model_opt.networks import device_of
from model_opt.training import Recipe, Stage

METHODS: dict[str, tuple[type[Any], Callable[[Task, Any], Reduced]]] = {
    "autorep": (autorep.Options, autorep.reduce),
    "snl": (snl.Options, snl.reduce),
    "deepreduce": (deepreduce.Options, deepreduce.reduce),
    "senet": (senet.Options, senet.reduce),
    "cost": (cost.Options, cost.reduce),
}


def make_options(method: str, values: dict[str, Any]) -> Any:
    """The method's options. Raises ValueError for an unknown method, name or value."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    kind = METHODS[method][0]
    known = [f.name for f in fields(kind)]
    if unknown := set(values) - set(known):
        raise ValueError(f"{method} has no option {min(unknown)!r}; it has: {', '.join(known)}")
    return kind(**values)


def reduce(model: nn.Module, *, method: str = "autorep", budget: int, data: Dataset | tuple[Split, Split], recipe: Recipe | None = None,
           folder: Path = Path("runs/reduce"), shared: Path | None = None, distil: bool = True,
           rebuild: Callable[[float, int], nn.Module] | None = None, start: nn.Module | None = None,
           teachers: Sequence[nn.Module] = (), logits: Path | None = None, **options: Any) -> Reduced:
    """Reduce the ReLUs of a trained network to a budget.

    Args:
        model: all-ReLU network that torch.fx can trace; it is not changed.
        method: of `METHODS`; `options` are its own, see the Options class in its module.
        budget: ReLUs per image that may remain; the result never has more.
        data: a data set, or training and validation images.
        recipe: how to train; default 15 epochs with a peak rate of 0.05.
        folder: for checkpoints and logs; an interrupted run with the same settings resumes from it.
        shared: folder for searches that do not depend on the budget (SENet's, DeepReDuce's): runs of other budgets that are given
            the same one do not repeat them. Default: `folder`.
        rebuild: makes an untrained network of the same family from a width factor and a stem stride, for methods that reshape.
        start: network that AutoReP made of the same model with the same options, at a larger or smaller budget, to start from.
        teachers: further networks to distil from, of the same images and classes: from the mean of all logits. Not for SENet, which
            compares activations with the model's.
        logits: file in which the teachers' outputs are kept: runs with the same teachers, images, seed, batch and augmentation that are
            given the same one do not compute them again. Not for SENet's search and tuning.

    Raises BudgetError, CompileError, DataError, TrainingError, ValueError.
    """
    chosen = make_options(method, options)
    train, validation = data.load_train() if isinstance(data, Dataset) else data
    model = separate_relus(model)
    if partial_activations(model):
        raise BudgetError("the network is reduced already; pass the all-ReLU network")
    if start is not None and (method != "autorep" or not fits(start, model, train.shape)):
        raise BudgetError("to start from a reduced network, pass one that autorep made of the same model, and method autorep")
    if teachers and (method == "senet" or not distil):
        raise BudgetError("further teachers do not go with " + ("method senet" if distil else "no distillation"))
    outputs = compiler.check(model, train.shape)
    for further in teachers:
        if _outputs(further, train.shape) != outputs:
            raise BudgetError("a further teacher does not take the model's images, or gives other outputs than the model does")
    check_budget(budget, count_all(model, train.shape))
    classes = len(data.classes) if isinstance(data, Dataset) else 1 + int(max(train.labels.max(), validation.labels.max()))
    if len(outputs) != 1 or classes > outputs[0] or (isinstance(data, Dataset) and classes != outputs[0]):
        raise BudgetError(f"the network gives {'x'.join(map(str, outputs))} numbers for an image, the data has {classes} classes; "
                          "pass the data that it was trained on")
    task = Task(model, int(budget), train, validation, recipe or Recipe(epochs=15, lr=0.05, warmup=0.1), Path(folder), distil, rebuild,
                shared, start, teachers, logits)
    return METHODS[method][1](task, chosen)


@torch.no_grad()
def _outputs(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of what an image gives, without the batch; None if the network does not take such images."""
    training = network.training
    try:
        return tuple(network.eval()(torch.zeros(1, *shape, device=device_of(network))).shape[1:])
    except RuntimeError:
        return None
    finally:
        network.train(training)


def fits(reduced: nn.Module, model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a network with partial activations has the architecture of an all-ReLU one."""
    states = [network.state_dict() for network in (reduced, replace_relus(copy.deepcopy(model), shape))]
    return {name: value.shape for name, value in states[0].items() if not name.endswith(".c2")} == {
        name: value.shape for name, value in states[1].items()}


def going_on(network: nn.Module, made_by: dict[str, Any]) -> Stage:
    """Put a loaded network back under the rules of the method that reduced it; the stage holds those of every step.

    Args:
        made_by: the facts of its reduction; empty for a network that was not reduced.
    """
    if made_by.get("method") != "autorep":
        return Stage()
    return autorep.going_on(network, autorep.Options(**made_by["options"]))


__all__ = ["METHODS", "BudgetError", "Reduced", "Task", "check_budget", "count_all", "going_on", "make_options", "reduce"]
