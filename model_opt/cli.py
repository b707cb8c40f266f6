"""Command line of model optimisation: train, reduce, evaluate, compile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.status import Status
from torch import nn

from model_opt import autorep, compiler, data, files
from model_opt.activation import count_relus
from model_opt.networks import activation_shapes, build
from model_opt.training import Recipe, TrainingError, accuracy, fit, write_atomically
from protocol import model as compiled
from protocol.errors import InputError, ModelFileError
from protocol.simulation import simulate
from protocol.terminal import exit_on_error

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Train networks, reduce their ReLUs, and compile them for private inference.")
ERRORS = (data.DataError, files.NetworkFileError, compiler.CompileError, autorep.BudgetError, TrainingError)
PROGRAM = "relucent-opt"

Data = Annotated[Path, typer.Option("--data", help="Folder that holds cifar-10-batches-bin/.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch CIFAR-10 there first, checksum verified.")]
Run = Annotated[Path | None, typer.Option(help="Folder for the checkpoint and log; an interrupted run resumes from it.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training split.", min=1)]
Batch = Annotated[int, typer.Option(help="Images per step.", min=2)]
Seed = Annotated[int, typer.Option(help="Seed of initialisation, order and augmentation.")]


def _download(folder: Path) -> None:
    with Status("downloading CIFAR-10", console=Console(stderr=True)) as status:
        data.download(folder, lambda done, total: status.update(f"downloading CIFAR-10: {done >> 20} of {total >> 20} MiB"))


def _save(model: nn.Module, info: files.NetworkInfo, out: Path) -> None:
    try:
        write_atomically(out, files.serialise_network(model, info))
    except OSError as error:
        raise TrainingError(f"cannot write {out}: {error.strerror}") from error


@app.command()
@exit_on_error(PROGRAM, *ERRORS)
def train(
    out: Annotated[Path, typer.Option(help="Where to write the network.")],
    folder: Data = Path("data"),
    network: Annotated[str, typer.Option(help="Architecture.")] = "resnet18",
    width: Annotated[int, typer.Option(help="Channels of the first stage.")] = 32,
    epochs: Epochs = 15,
    batch: Batch = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", min=0)] = 0.2,
    seed: Seed = 0,
    run: Run = None,
    download: Download = False,
) -> None:
    """Train an all-ReLU network on CIFAR-10; it becomes the teacher of ReLU reduction."""
    if download:
        _download(folder)
    training, validation = data.load_train(folder)
    torch.manual_seed(seed)
    try:
        model = build(network, width)
    except ValueError as error:
        raise InputError(str(error)) from error
    recipe = Recipe(epochs=epochs, batch=batch, lr=lr, seed=seed)
    score = fit(model, training, validation, recipe, run or Path("runs") / out.stem, label=f"train {network} {width}")
    made_by: dict[str, str | int | float] = {"command": "train", "epochs": epochs,
                                               "batch": batch, "lr": lr, "seed": seed, "validation_accuracy": score}
    _save(model, files.NetworkInfo(network, width, data.CLASSES, (3, 32, 32), False, made_by), out)
    print(f"wrote {out}: validation accuracy {score:.2%}")


@app.command()
@exit_on_error(PROGRAM, *ERRORS)
def reduce(
    teacher: Annotated[Path, typer.Option(help="All-ReLU network, from `train`.")],
    budget: Annotated[int, typer.Option(help="ReLUs per image that may remain.")],
    out: Annotated[Path, typer.Option(help="Where to write the network.")],
    folder: Data = Path("data"),
    epochs: Epochs = 15,
    batch: Batch = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the weights.", min=0)] = 0.1,
    indicator_lr: Annotated[float, typer.Option(help="Adam's rate for the indicators.", min=0)] = 1e-3,
    freeze: Annotated[float, typer.Option(help="Fraction of the run after which the mask is fixed.", min=0.01, max=1)] = 0.4,
    distil: Annotated[bool, typer.Option(help="Distil from the teacher; else label smoothing only.")] = True,
    seed: Seed = 0,
    run: Run = None,
    download: Download = False,
) -> None:
    """Replace ReLUs by squares with AutoReP until at most BUDGET remain."""
    if download:
        _download(folder)
    parent, info = files.load_network(teacher)
    if info.partial:
        raise InputError(f"{teacher} is already reduced", "pass the all-ReLU network that `train` wrote")
    total = sum(torch.Size(s).numel() for s in activation_shapes(parent, info.input_shape, nn.ReLU).values())
    autorep.check_budget(budget, total)
    training, validation = data.load_train(folder)
    torch.manual_seed(seed)
    student = build(info.network, info.width, len(info.classes))
    sample = data.Split(training.images[:2000], training.labels[:2000])
    autorep.prepare(parent, student, info.input_shape, sample)
    stage = autorep.AutoRep(student, budget, indicator_lr=indicator_lr, freeze=freeze, seed=seed)
    recipe = Recipe(epochs=epochs, batch=batch, lr=lr, warmup=0.1, seed=seed)
    score = fit(student, training, validation, recipe, run or Path("runs") / out.stem, teacher=parent if distil else None,
                stage=stage, label=f"autorep {budget} {indicator_lr} {freeze}")
    relus = stage.finish()
    made_by: dict[str, str | int | float] = {"command": "reduce", "method": "autorep",
                                               "budget": budget, "relus": relus, "total": total, "epochs": epochs,
               "batch": batch, "lr": lr, "indicator_lr": indicator_lr, "freeze": freeze, "distil": int(distil), "seed": seed,
               "validation_accuracy": score}
    _save(student, replace(info, partial=True, made_by=made_by), out)
    print(f"wrote {out}: {relus:,} of {total:,} ReLUs, validation accuracy {score:.2%}")


@app.command("compile")
@exit_on_error(PROGRAM, *ERRORS)
def compile_network(
    network: Annotated[Path, typer.Argument(help="Float network, from `train` or `reduce`.")],
    out: Annotated[Path, typer.Option(help="Where to write the compiled model.")],
    folder: Data = Path("data"),
    images: Annotated[int, typer.Option(help="Training images to calibrate on.", min=1)] = 500,
    name: Annotated[str, typer.Option(help="Name of the model; default: the architecture, width and ReLUs.")] = "",
) -> None:
    """Compile NETWORK to the file that `relucent-server serve` takes."""
    model, info = files.load_network(network)
    training, _ = data.load_train(folder)
    title = name or f"{info.network}-w{info.width}-{info.made_by.get('relus', 'all')}-relus"
    with Status("compiling", console=Console(stderr=True)) as status:
        result = compiler.compile_model(model, data.normalise(training.images[:images]), name=title, classes=info.classes,
                                        mean=data.MEAN, std=data.STD, progress=status.update)
    try:
        write_atomically(out, compiled.serialise(result))
    except OSError as error:
        raise TrainingError(f"cannot write {out}: {error.strerror}") from error
    point = result.public.fixed_point
    print(f"wrote {out}: {result.public.relus:,} ReLUs, f_a {point.activation_bits}, f_w {point.weight_bits}, comparison width "
          f"{point.comparison_bits}, truncation failure at most {point.failure_bound:.1e} per inference, id {result.public.model_id[:12]}")


def _fixed_point_accuracy(model: compiled.Model, split: data.Split) -> float:
    hits = 0
    starts = range(0, len(split), 100)
    for start in track(starts, description="fixed point", console=Console(stderr=True), transient=True):
        x = data.normalise(split.images[start : start + 100])
        hits += int((simulate(model, x).argmax(1) == split.labels[start : start + 100]).sum())
    return hits / len(split)


@app.command()
@exit_on_error(PROGRAM, *ERRORS)
def evaluate(
    file: Annotated[Path, typer.Argument(help="Float network or compiled model.")],
    folder: Data = Path("data"),
    split: Annotated[str, typer.Option(help="validation or test. Choose on validation; touch test once.")] = "validation",
    limit: Annotated[int, typer.Option(help="Only the first LIMIT images; 0 for all.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Accuracy of FILE: in float for a network, in simulated fixed point for a compiled model."""
    if split not in ("validation", "test"):
        raise InputError(f"unknown split {split!r}", "use validation or test")
    images = data.load_test(folder) if split == "test" else data.load_train(folder)[1]
    if limit:
        images = data.Split(images.images[:limit], images.labels[:limit])
    try:
        model, _ = files.load_network(file)
        kind, score, relus = "float", accuracy(model, images), count_relus(model)
    except files.NetworkFileError:
        try:
            loaded = compiled.load(file)
        except ModelFileError as error:
            raise InputError(str(error), "pass a file from `train`, `reduce` or `compile`") from error
        kind, score, relus = "fixed_point", _fixed_point_accuracy(loaded, images), loaded.public.relus
    if as_json:
        print(json.dumps({"file": str(file), "split": split, "images": len(images), "arithmetic": kind, "accuracy": score,
                          "relus": relus}))
    else:
        print(f"{kind} accuracy {score:.2%} on {len(images):,} {split} images, {relus:,} ReLUs")
