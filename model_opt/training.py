"""Training loop shared by teachers and ReLU reduction: learning rate schedules, bf16 autocast, EMA, exact resume.

A run folder holds `checkpoint.pt` (written atomically after each epoch) and `log.csv`. Under `torchrun` every process
trains on its slice of each batch, gradients are averaged by DistributedDataParallel, and the first process writes.
"""

from __future__ import annotations

import copy
import csv
import ctypes
import io
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model_opt.activation import PartialActivation, partial_activations
from model_opt.data import CUTOUT, SHIFT, Split, batches
from model_opt.networks import activation_shapes, device_of
from protocol.errors import out_of_memory
from protocol.model import tensors_digest

NORM_IMAGES = 4000
QUICK_IMAGES = 1000
"""Images of the validation between epochs; the last one takes them all."""
CLIP = 5.0
"""Largest norm of a gradient if nobody says otherwise."""
MEMORY = Path("/proc/meminfo")
"""Where Linux says how much memory is free."""
GROW_FROM, GROW_UNTIL = 0.3, 0.8
"""Fractions of a run between which the images grow from `start_size`."""


class TrainingError(Exception):
    """Training cannot start or go on. The message says why and what is kept."""


class TrainingFailure(TrainingError):
    """Not the user's mistake: memory or disk ran out, or the loss is no number."""

    exit_code = 1


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; a checkpoint resumes only under the same ones.

    lr: peak learning rate. schedule: "one-cycle" rises over the fraction `warmup` of the run and falls as a cosine,
    "cosine" falls from the start. momentum and weight_decay: of SGD. clip: largest gradient norm.
    label_smoothing: without a teacher only. temperature, hard_weight, soft_weight: of distillation; the loss is
    hard_weight CE + soft_weight T^2 KL.
    ema: decay per step of an average of the weights that takes their place in the end; 0 for none.
    start_size: side of the training images at first, which then grows to the full one (progressive resizing: early
    epochs on small images cost a fraction); 0 trains on full images throughout. shift, cutout, noise: of
    augmentation, as in `data.batches`.
    """

    epochs: int
    batch: int = 256
    lr: float = 0.2
    schedule: str = "one-cycle"
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    temperature: float = 4.0
    hard_weight: float = 1.0
    soft_weight: float = 1.0
    clip: float = CLIP
    ema: float = 0.0
    start_size: int = 0
    shift: float = SHIFT
    cutout: float = CUTOUT
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise ValueError("epochs must be at least 1 and batch at least 2")
        numbers = {name: value for name, value in asdict(self).items() if isinstance(value, (int, float)) and name != "seed"}
        if wrong := [name for name, value in numbers.items() if not (math.isfinite(value) and value >= 0)]:
            raise ValueError(f"{wrong[0]} must be a number and not negative, got {numbers[wrong[0]]}")
        if not self.clip:
            raise ValueError("clip must be above 0, or nothing would be learnt")
        if self.shift > 0.5 or self.cutout > 1 or self.warmup >= 1:
            raise ValueError(f"shift may be 0.5 at most, cutout 1, warmup below 1, got {self.shift}, {self.cutout}, {self.warmup}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"the seed must fit into 64 bits, got {self.seed}")
        if self.schedule not in ("one-cycle", "cosine"):
            raise ValueError(f"unknown schedule {self.schedule!r}; known: one-cycle, cosine")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")

    def image_size(self, progress: float, full: int) -> int:
        """Side of the training images after the fraction `progress` of the run: from start_size to `full` in steps of 4."""
        if not 0 < self.start_size < full:
            return full
        grown = self.start_size + (full - self.start_size) * (progress - GROW_FROM) / (GROW_UNTIL - GROW_FROM)
        return min(full, max(self.start_size, self.start_size + 4 * math.ceil((grown - self.start_size) / 4)))

    def rate(self, progress: float) -> float:
        """Learning rate after the fraction `progress` of the run."""
        warmup = self.warmup if self.schedule == "one-cycle" else 0.0
        if progress < warmup:
            return self.lr * max(progress / warmup, 0.02)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class Stage:
    """What a reduction method adds to plain training. The base class adds nothing."""

    def begin(self, model: nn.Module, teacher: nn.Module | None) -> list[dict[str, Any]]:
        """Called once before training or resume; returns extra optimiser parameter groups."""
        return []

    def loss(self) -> Tensor | None:
        """A term to add to the loss of the batch that has just been run."""
        return None

    def after_step(self, progress: float) -> None:
        """Called after every optimiser step with the fraction of the run that is done."""

    def after_epoch(self) -> None:
        """Called after every epoch, before it is validated."""

    def end(self) -> None:
        """Called once when training is over, or has failed."""

    def status(self) -> dict[str, float]:
        """Figures for the log and the progress bar."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides model and optimiser."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


def world() -> tuple[int, int]:
    """Rank and number of the processes that `torchrun` started; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def progress_bar() -> Progress:
    """A bar with counts, time left and a `note`, shown by the first of torchrun's processes only."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
                    TimeRemainingColumn(), TextColumn("{task.fields[note]}"), disable=world()[0] > 0)


def _trained(model: nn.Module) -> list[bool]:
    """Which parameters have gradients, which its processes average."""
    return [parameter.requires_grad for parameter in model.parameters()]


def _parallel(model: nn.Module, where: torch.device) -> nn.Module:
    """`model` as its processes train it together."""
    if world()[1] == 1:
        return model
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    return DistributedDataParallel(model)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, mean over the batch (Hinton et al. 2015).

    Images on which the teacher's logits are not finite count nothing: networks of squares explode on a few augmented images.
    """
    usable = teacher.isfinite().all(1)
    log_p = torch.log_softmax(student / temperature, 1)
    log_q = torch.log_softmax(torch.where(usable[:, None], teacher, 0.0) / temperature, 1)
    each = nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    return (each * usable).mean() * temperature**2


@torch.no_grad()
def average(networks: Sequence[nn.Module], sample: Split, relus_of: nn.Module | None = None) -> nn.Module:
    """One network with the mean of the weights of several that were trained on from the same one (Izmailov et al. 2018).

    sample: training images, on which BatchNorm's statistics are set anew. relus_of: the network whose ReLUs it keeps, where the
    others may keep different ones. Raises TrainingError unless the networks have the same architecture and, without `relus_of`, ReLUs.
    """
    mean = copy.deepcopy(networks[0] if relus_of is None else relus_of)
    states = [network.state_dict() for network in (*networks, mean)]
    for name, target in mean.state_dict().items():
        values = [state.get(name) for state in states]
        kind = name.rpartition(".")[2]
        if any(state.keys() != states[0].keys() for state in states) or any(v is None or v.shape != target.shape for v in values):
            raise TrainingError("the networks have different architectures; average those that go on from the same one")
        if target.is_floating_point():
            target.copy_(torch.stack([v for v in values[:-1] if v is not None]).mean(0))
        elif kind != "num_batches_tracked" and not (kind == "mask" and relus_of is not None) and any(
                not torch.equal(target, v) for v in values if v is not None):
            raise TrainingError("the networks keep different ReLUs or scales of squares; average those that go on from the same one, "
                                "or say whose ReLUs the mean keeps")
    reestimate_norms(mean, sample)
    return mean


@dataclass(frozen=True)
class Score:
    """What a network is worth on labelled images.

    accuracy: top-1, as a fraction. cross_entropy: mean over the images, in nats; it orders networks where the images are too few for
    their accuracies to differ. Not finite if a logit is not.
    """

    accuracy: float
    cross_entropy: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Score:
        """logits: real (N, classes). labels: int64 (N,)."""
        return cls(float((logits.argmax(1) == labels).double().mean()), float(nn.functional.cross_entropy(logits.double(), labels)))

    def __str__(self) -> str:
        if not math.isfinite(self.cross_entropy):
            return f"accuracy {self.accuracy:.2%}, no cross entropy (a logit overflows)"
        return f"accuracy {self.accuracy:.2%}, cross entropy {self.cross_entropy:.3f}"


@torch.no_grad()
def score(model: nn.Module, split: Split) -> Score:
    """Accuracy and cross entropy without augmentation; in float32 unless the caller autocasts."""
    where, batch = device_of(model), split.inference_batch(500)
    was_training = model.training
    model.eval()
    parts = (split[start : start + batch].to(where) for start in range(0, len(split), batch))
    logits = torch.cat([model(part.normalised().contiguous(memory_format=torch.channels_last)) for part in parts])
    model.train(was_training)
    return Score.of(logits, split.labels.to(where))


def accuracy(model: nn.Module, split: Split) -> float:
    """Top-1 accuracy without augmentation, as a fraction; in float32 unless the caller autocasts."""
    return score(model, split).accuracy


@torch.no_grad()
def reestimate_norms(model: nn.Module, sample: Split, batch: int | None = None) -> None:
    """Set every BatchNorm's running statistics to the medians of those of the batches of `sample`, in random order and unaugmented.

    Behind squares a single outlier dominates averages, those of training too, and spoils evaluation: one image in a thousand made 8%
    of 89% (seen at ResNet-18 w64 in the middle of a run). Leaves the model in eval mode.
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of the last batch alone
    where, batch = device_of(model), batch or sample.inference_batch(125)
    model.train()
    seen: list[list[tuple[Tensor, Tensor]]] = []
    for start in range(0, max(len(sample) - batch, 0) + 1, batch):  # whole batches, or the one that there is
        model(sample[start : start + batch].to(where).normalised().contiguous(memory_format=torch.channels_last))
        seen.append([(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms])  # type: ignore[union-attr]
    for norm, momentum, statistics in zip(norms, momenta, zip(*seen)):
        norm.momentum = momentum
        for value, of_batches in zip((norm.running_mean, norm.running_var), zip(*statistics)):
            value.copy_(torch.stack(of_batches).median(0).values)  # type: ignore[union-attr]
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


def digest(network: nn.Module) -> str:
    """SHA-256 over a network's weights and buffers."""
    return tensors_digest({name: value.detach().cpu() for name, value in network.state_dict().items()}).hex()


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the settings in which two runs differ."""
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def _random_states() -> list[Tensor]:
    """Of the global generators, of the CPU and of the GPU if there is one: dropout draws from them."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


@dataclass
class _Parts:
    """All that a checkpoint holds."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    stage: Stage
    average: AveragedModel | None

    def save(self, path: Path, settings: dict[str, Any], epoch: int, step: int) -> None:
        state = {"settings": settings, "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(),
                 "generator": self.generator.get_state(), "random": _random_states(), "stage": self.stage.state(),
                 "epoch": epoch, "step": step, "average": self.average.state_dict() if self.average is not None else None}
        buffer = io.BytesIO()  # torch.save to a file hides a full disk behind a RuntimeError
        torch.save(state, buffer)
        write_atomically(path, buffer.getbuffer())

    def resume(self, path: Path, settings: dict[str, Any]) -> tuple[int, int]:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TrainingError(f"{path} is no readable checkpoint ({type(error).__name__}); delete it to start anew") from error
        if changed := changed_settings(state["settings"], settings):
            raise TrainingError(f"{path} was made with other settings ({', '.join(changed)}); use another folder or the same settings")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"][0])
        if torch.cuda.is_available() and len(state["random"]) > 1:
            torch.cuda.set_rng_state(state["random"][1])
        self.stage.load(state["stage"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        return int(state["epoch"]), int(state["step"])


def _kept(folder: Path) -> str:
    """What a failed run leaves."""
    checkpoint = folder / "checkpoint.pt"
    return f"the run can resume from {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"


@contextmanager
def shortages(folder: Path, batch: int) -> Iterator[None]:
    """Running out of memory or disk as a TrainingError that says what is kept."""
    try:
        yield
    except OSError as error:
        raise TrainingFailure(f"cannot write to {folder}: {error.strerror}; {_kept(folder)}") from error
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise TrainingFailure(f"out of memory at a batch of {batch} images; use a smaller --batch; {_kept(folder)}") from error
        raise


def _keep_memory() -> None:
    """Have glibc keep what is freed. Each step takes and frees hundreds of megabytes; given back to the kernel every time, they cost a
    tenth to a fifth of the processors' time in page faults."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of <malloc.h>
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)


def _scaled(shape: Sequence[int], width: int) -> tuple[int, int]:
    """Height and width of images of `shape` (..., H, W) that are scaled to that width."""
    return max(round(shape[-2] * width / shape[-1]), 1), width


def _check_size(model: nn.Module, shape: tuple[int, ...], side: int) -> None:
    """Raise TrainingError unless the network takes images of `shape` that are scaled to the width `side`."""
    height, width = _scaled(shape, side)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape[:-2], height, width, device=device_of(model)))
    except RuntimeError as error:
        raise TrainingError(f"the network cannot take images of {width}x{height}: {error}; train on larger ones") from error
    finally:
        model.train(was_training)


def _check_disk(folder: Path, model: nn.Module, averaged: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # two checkpoints: weights, momentum and perhaps an average
    needed = (6 if averaged else 4) * sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingFailure(f"{folder} has {free >> 20} MiB free, the checkpoints need {needed >> 20} MiB; choose another --run")


def _check_memory(model: nn.Module, shape: tuple[int, ...], recipe: Recipe) -> None:
    """Before the kernel ends a process that asked for too much: what one step takes at least, where the system says what is free.

    That is two bytes for the input of each activation, which the backward pass needs; steps take several times that.
    """
    try:
        free = next(1024 * int(line.split()[1]) for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable"))
        shapes = [s for kind in (nn.ReLU, PartialActivation) for s in activation_shapes(model, shape, kind).values()]
    except (OSError, StopIteration, ValueError):  # no Linux, or a network that calls one module several times
        return
    needed = 2 * recipe.batch // world()[1] * sum(map(math.prod, shapes))
    if needed > free:
        raise TrainingFailure(f"a batch of {recipe.batch} images takes at least {needed >> 20} MiB, {free >> 20} MiB are free; "
                              "use a smaller --batch")


def _optimiser(model: nn.Module, groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.SGD:
    """SGD; weight decay on matrices and kernels only."""
    special = {id(p) for group in groups for p in group["params"]}
    weights = [p for p in model.parameters() if id(p) not in special]
    decay = [p for p in weights if p.dim() >= 2 and p.numel() > max(p.shape)]
    plain = [p for p in weights if not (p.dim() >= 2 and p.numel() > max(p.shape))]
    return torch.optim.SGD(
        [{"params": decay, "scale": 1.0}, {"params": plain, "weight_decay": 0.0, "scale": 1.0}, *groups],
        lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0)


def fit(model: nn.Module, train: Split, validation: Split, recipe: Recipe, folder: Path, *,
        teacher: nn.Module | None = None, stage: Stage | None = None, label: str = "train",
        settings: dict[str, Any] | None = None) -> float:
    """Train `model` in place and return its validation accuracy; resumes from `folder/checkpoint.pt` if present.

    With a teacher the loss is cross entropy plus distillation, else cross entropy with label smoothing. settings: what else a
    resumed run must share, beside recipe, label, teacher and images.
    Raises TrainingError on a loss or gradient that is not finite, a checkpoint of other settings, or when memory or disk run out; the
    last checkpoint is kept.
    """
    if len(train) < recipe.batch:
        raise TrainingError(f"{len(train)} training images are fewer than one batch of {recipe.batch}; use a smaller --batch")
    if recipe.start_size and any(partial_activations(network) for network in (model, teacher) if network is not None):
        raise TrainingError("masks are of one image size; leave out --start-size, which only all-ReLU networks can use")
    if recipe.start_size >= train.shape[-1]:
        raise TrainingError(f"images of {train.shape[-1]} pixels cannot grow from --start-size {recipe.start_size}; pass a smaller one")
    _check_size(model, train.shape, recipe.start_size or train.shape[-1])
    stage = stage or Stage()
    settings = {"label": label, "distil": teacher is not None, "teacher": digest(teacher) if teacher is not None else "",
                "data": [train.digest(), validation.digest()], **asdict(recipe), **(settings or {})}
    try:
        with shortages(folder, recipe.batch):
            return _fit(model, train, validation, recipe, folder, teacher, stage, label, settings)
    finally:
        stage.end()


def _fit(model: nn.Module, train: Split, validation: Split, recipe: Recipe, folder: Path, teacher: nn.Module | None,
         stage: Stage, label: str, settings: dict[str, Any]) -> float:
    where, (rank, processes) = device(), world()
    _check_disk(folder, model, recipe.ema > 0)
    if where.type == "cpu":
        _check_memory(model, train.shape, recipe)
        _keep_memory()
    model.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if teacher is not None:
        teacher = copy.deepcopy(teacher)  # the caller's stays where and as it is
        teacher.to(where, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    train = train.to(where)
    groups = stage.begin(model, teacher)
    optimiser = _optimiser(model, groups, recipe)
    clipped = [p for group in optimiser.param_groups[:2] for p in group["params"]]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
    generator = torch.Generator().manual_seed(recipe.seed)
    checkpoint, log = folder / "checkpoint.pt", folder / "log.csv"
    parts = _Parts(model, optimiser, generator, stage, average)
    first, step = parts.resume(checkpoint, settings) if checkpoint.exists() else (0, 0)
    if not first and rank == 0:
        log.unlink(missing_ok=True)  # of an attempt that was given up
    parallel, trained = _parallel(model, where), _trained(model)
    if processes > 1:
        ends = torch.tensor([step, -step], device=where)
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
        if int(ends.sum()):
            raise TrainingError(f"the processes found different checkpoints in {folder}; all machines must share that folder")
    share = slice(rank, None, processes)
    steps = recipe.epochs * (len(train) // recipe.batch)
    validated = accuracy(model, validation) if first else 0.0
    sample, quick = train.sample(NORM_IMAGES), validation.sample(QUICK_IMAGES)
    with progress_bar() as bar:
        task = bar.add_task(label, total=steps, completed=step, note="")
        for epoch in range(first, recipe.epochs):
            parallel.train()
            started, total, seen = time.monotonic(), 0.0, 0
            for x, y in batches(train, recipe.batch, generator, share, recipe.shift, recipe.cutout, recipe.noise):
                for group in optimiser.param_groups:
                    group["lr"] = recipe.rate(step / steps) * group["scale"]
                side = recipe.image_size(step / steps, x.shape[-1])
                if side != x.shape[-1]:
                    x = nn.functional.interpolate(x, size=_scaled(x.shape, side), mode="bilinear", antialias=True)
                x = x.contiguous(memory_format=torch.channels_last)
                with torch.autocast(where.type, torch.bfloat16):
                    logits = parallel(x).float()
                    with torch.no_grad():
                        target = teacher(x).float() if teacher is not None else None
                    extra = stage.loss()
                if target is None:
                    loss = nn.functional.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
                else:
                    loss = (recipe.hard_weight * nn.functional.cross_entropy(logits, y)
                            + recipe.soft_weight * distillation_loss(logits, target, recipe.temperature))
                if extra is not None:
                    loss = loss + extra
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                value, norm = float(loss.detach()), float(nn.utils.clip_grad_norm_(clipped, recipe.clip))
                if not (math.isfinite(value) and math.isfinite(norm)):
                    raise TrainingFailure(f"loss {value}, gradient norm {norm} at step {step}; {_kept(folder)} with the same settings; "
                                          "another --run can begin with a lower --lr or --clip")
                optimiser.step()
                step += 1
                stage.after_step(step / steps)
                if _trained(model) != trained:
                    parallel, trained = _parallel(model, where), _trained(model)
                if average is not None:
                    average.update_parameters(model)
                total, seen = total + value, seen + 1
                bar.update(task, completed=step, note=f"loss {value:.3f}")
            last = epoch + 1 == recipe.epochs
            if last and average is not None:
                model.load_state_dict(average.module.state_dict())
            stage.after_epoch()
            with torch.autocast(where.type, torch.bfloat16, enabled=not last):
                reestimate_norms(model, sample if last else sample.sample(QUICK_IMAGES))
                validated = accuracy(model, validation if last else quick)
            row = {"epoch": epoch + 1, "loss": round(total / seen, 5), "validation_accuracy": validated,
                   "seconds": round(time.monotonic() - started, 1), **stage.status()}
            if rank == 0:
                parts.save(checkpoint, settings, epoch + 1, step)
                fresh = not log.exists()
                with log.open("a", newline="") as out:
                    writer = csv.DictWriter(out, list(row))
                    if fresh:
                        writer.writeheader()
                    writer.writerow(row)
                bar.console.print("  ".join(f"{k} {v}" for k, v in row.items()))
    return validated
