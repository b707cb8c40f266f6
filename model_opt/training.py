"""Training loop shared by teachers and ReLU reduction: one-cycle schedule, bf16 on CPU, exact resume.

A run folder holds `checkpoint.pt` (written atomically after each epoch), `log.csv` and, at the end, the model.
"""

from __future__ import annotations

import csv
import io
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from model_opt.data import Split, batches, normalise

NORM_IMAGES = 4000


class TrainingError(Exception):
    """Training cannot start or go on. The message says why and what is kept."""


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; a checkpoint resumes only under the same ones.

    lr: peak learning rate. warmup: fraction of the run in which it rises. momentum and weight_decay: of SGD.
    temperature: of distillation. clip: largest gradient norm. label_smoothing: without a teacher only.
    """

    epochs: int
    batch: int = 256
    lr: float = 0.4
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    temperature: float = 4.0
    clip: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise ValueError("epochs must be at least 1 and batch at least 2")

    def rate(self, progress: float) -> float:
        """Learning rate after the fraction `progress` of the run: linear rise, then cosine to zero."""
        if progress < self.warmup:
            return self.lr * max(progress / self.warmup, 0.02)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


class Stage:
    """What a reduction method adds to plain training. The base class adds nothing."""

    def begin(self, model: nn.Module) -> list[dict[str, Any]]:
        """Called once before training or resume; returns extra optimiser parameter groups."""
        return []

    def after_step(self, progress: float) -> None:
        """Called after every optimiser step with the fraction of the run that is done."""

    def status(self) -> dict[str, float]:
        """Figures for the log and the progress bar."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides model and optimiser."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, mean over the batch (Hinton et al. 2015)."""
    log_p = torch.log_softmax(student / temperature, 1)
    log_q = torch.log_softmax(teacher / temperature, 1)
    return nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, batch: int = 500) -> float:
    """Top-1 accuracy in float32 without augmentation, as a fraction."""
    where = next(model.parameters()).device
    was_training = model.training
    model.eval()
    hits = 0
    for start in range(0, len(split), batch):
        x = normalise(split.images[start : start + batch].to(where)).contiguous(memory_format=torch.channels_last)
        hits += int((model(x).argmax(1).cpu() == split.labels[start : start + batch].cpu()).sum())
    model.train(was_training)
    return hits / len(split)


@torch.no_grad()
def reestimate_norms(model: nn.Module, sample: Split, batch: int = 500) -> None:
    """Set every BatchNorm's running statistics to the averages over `sample`, unaugmented, in float32.

    Behind squares a few outliers dominate the exponential averages of training and spoil evaluation: 70% instead of
    85% on the same weights was seen. Leaves the model in eval mode.
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    where = next(model.parameters()).device
    model.train()
    for start in range(0, len(sample), batch):
        model(normalise(sample.images[start : start + batch].to(where)).contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.eval()


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that a crash or a full disk leaves the old one: to a neighbour first, then rename. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _resume(path: Path, settings: dict[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer,
            generator: torch.Generator, stage: Stage) -> tuple[int, int]:
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise TrainingError(f"{path} is no readable checkpoint ({type(error).__name__}); delete it to start anew") from error
    if state["settings"] != settings:
        changed = sorted(k for k in settings if state["settings"].get(k) != settings[k])
        raise TrainingError(f"{path} was made with other settings ({', '.join(changed)}); use another folder or the same settings")
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    generator.set_state(state["generator"])
    stage.load(state["stage"])
    return int(state["epoch"]), int(state["step"])


def fit(model: nn.Module, train: Split, validation: Split, recipe: Recipe, folder: Path, *,
        teacher: nn.Module | None = None, stage: Stage | None = None, label: str = "train") -> float:
    """Train `model` in place and return its validation accuracy; resumes from `folder/checkpoint.pt` if present.

    With a teacher the loss is cross entropy plus distillation, else cross entropy with label smoothing.
    Raises TrainingError on a NaN loss, a checkpoint of other settings, or a full disk; the last checkpoint is kept.
    """
    stage = stage or Stage()
    where = device()
    model.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if teacher is not None:
        teacher.to(where, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    train = train.to(where)
    groups = stage.begin(model)
    special = {id(p) for group in groups for p in group["params"]}
    weights = [p for p in model.parameters() if id(p) not in special]
    decay = [p for p in weights if p.dim() >= 2 and p.numel() > max(p.shape)]
    plain = [p for p in weights if not (p.dim() >= 2 and p.numel() > max(p.shape))]
    optimiser = torch.optim.SGD(
        [{"params": decay, "scale": 1.0}, {"params": plain, "weight_decay": 0.0, "scale": 1.0}, *groups],
        lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True)
    generator = torch.Generator().manual_seed(recipe.seed)
    checkpoint, log = folder / "checkpoint.pt", folder / "log.csv"
    settings = {"label": label, **asdict(recipe)}
    first, step = _resume(checkpoint, settings, model, optimiser, generator, stage) if checkpoint.exists() else (0, 0)
    steps = recipe.epochs * (len(train) // recipe.batch)
    validated = accuracy(model, validation) if first else 0.0
    sample = Split(train.images[:NORM_IMAGES], train.labels[:NORM_IMAGES])
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=steps, completed=step, note="")
        for epoch in range(first, recipe.epochs):
            model.train()
            started, total, seen = time.monotonic(), 0.0, 0
            for x, y in batches(train, recipe.batch, generator):
                for group in optimiser.param_groups:
                    group["lr"] = recipe.rate(step / steps) * group["scale"]
                x = x.contiguous(memory_format=torch.channels_last)
                with torch.autocast(where.type, torch.bfloat16):
                    logits = model(x).float()
                    with torch.no_grad():
                        target = teacher(x).float() if teacher is not None else None
                if target is None:
                    loss = nn.functional.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
                else:
                    loss = nn.functional.cross_entropy(logits, y) + distillation_loss(logits, target, recipe.temperature)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise TrainingError(f"loss is {value} at step {step}; the last good checkpoint is {checkpoint}; try a lower --lr")
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(weights, recipe.clip)
                optimiser.step()
                step += 1
                stage.after_step(step / steps)
                total, seen = total + value, seen + 1
                bar.update(task, completed=step, note=f"loss {value:.3f}")
            reestimate_norms(model, sample)
            validated = accuracy(model, validation)
            row = {"epoch": epoch + 1, "loss": round(total / seen, 5), "validation_accuracy": validated,
                   "seconds": round(time.monotonic() - started, 1), **stage.status()}
            state = {"settings": settings, "model": model.state_dict(), "optimiser": optimiser.state_dict(),
                     "generator": generator.get_state(), "stage": stage.state(), "epoch": epoch + 1, "step": step}
            try:
                buffer = io.BytesIO()  # torch.save to a file hides a full disk behind a RuntimeError
                torch.save(state, buffer)
                write_atomically(checkpoint, buffer.getbuffer())
                fresh = not log.exists()
                with log.open("a", newline="") as out:
                    writer = csv.DictWriter(out, list(row))
                    if fresh:
                        writer.writeheader()
                    writer.writerow(row)
            except OSError as error:
                raise TrainingError(f"cannot write to {folder}: {error.strerror}; the run can resume from the last checkpoint") from error
            bar.console.print("  ".join(f"{k} {v}" for k, v in row.items()))
    return validated
