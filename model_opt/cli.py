"""Command line of model optimisation: train, reduce, pareto, show, evaluate, compile."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from torch import Tensor, nn

from model_opt import compiler, data, datasets, files, methods
from model_opt.activation import count_relus, partial_activations
from model_opt.methods.autorep import SETTLED
from model_opt.networks import NETWORKS, STANDARD_WIDTH, build
from model_opt.runs import averaged, describe_hardware, epochs_spent, folded_data, lineage, minutes_spent, reduction, table_row, taken_in
from model_opt.teachers import mentor
from model_opt.training import (
    CLIP,
    NORM_IMAGES,
    Recipe,
    TrainingError,
    TrainingFailure,
    accuracy,
    average,
    changed_settings,
    digest,
    fit,
    score,
    world,
    write_atomically,
)
from protocol import model as compiled
from protocol.errors import InputError, ModelFileError
from protocol.terminal import Program, exit_on_error

PROGRAM = "relucent-opt"
app = Program(PROGRAM, "Train networks, reduce their ReLUs, and compile them for private inference.")
ERRORS = (datasets.DataError, files.NetworkFileError, compiler.CompileError, methods.BudgetError, TrainingError)

Data = Annotated[Path, typer.Option("--data", help="Folder that holds the data set in its official layout.")]
DatasetName = Annotated[str, typer.Option("--dataset", help=f"auto, {', '.join(datasets.DATASETS)}.")]
ImageSize = Annotated[int, typer.Option("--image-size", help="Resize image files to this side; 0 keeps theirs.", min=0)]
Download = Annotated[bool, typer.Option("--download", help="Fetch the data set first, checksum verified; default CIFAR-10.")]
Run = Annotated[Path | None, typer.Option(help="Folder for checkpoints and logs; an interrupted run resumes from it.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training images.", min=1)]
Batch = Annotated[int, typer.Option(help="Images per step.", min=2)]
Rate = Annotated[float, typer.Option("--lr", help="Peak learning rate of the weights.", min=0)]
Schedule = Annotated[str, typer.Option(help="one-cycle (warm-up, then cosine) or cosine.")]
Clip = Annotated[float, typer.Option(
    help="Largest norm of a gradient. Squares explode on single images; 0.5 keeps such steps from undoing what was learnt.", min=1e-3)]
Ema = Annotated[float, typer.Option(help="Decay per step of an average of the weights; 0 for none.", min=0, max=0.9999)]
Shift = Annotated[float, typer.Option(help="Augmentation: largest shift, as a fraction of the side.", min=0, max=0.5)]
Cutout = Annotated[float, typer.Option(help="Augmentation: side of the hole, as a fraction of the side; 0 for none.", min=0, max=1)]
Noise = Annotated[float, typer.Option(
    help="Augmentation: largest standard deviation of white noise, in grey levels of 255; 0 for none.", min=0, max=255)]
Seed = Annotated[int, typer.Option(help="Seed of initialisation, order and augmentation.")]
Distil = Annotated[bool, typer.Option(help="Distil from the teacher; else label smoothing only.")]
Logits = Annotated[Path | None, typer.Option(
    help="File that keeps the teachers' outputs: further runs of the same teachers, data, seed, batch and augmentation read them there.")]
Link = Annotated[str | None, typer.Option(help="Link of --target-ms: loopback (the default), lan, wan, mobile.")]
MethodOption = Annotated[list[str] | None, typer.Option("--option", "-o", help="A setting of the method, as name=value; repeatable.")]


def _open(folder: Path, name: str, size: int, download: bool) -> datasets.Dataset:
    if download and world()[1] > 1:
        raise InputError("several processes cannot download the same files", "run the command with --download without torchrun first")
    if download:
        wanted = "cifar10" if name == "auto" else name
        with Status(f"downloading {wanted}", console=Console(stderr=True)) as status:
            datasets.download(folder, wanted, lambda done, total: status.update(
                f"downloading {wanted}: {done >> 20} of {total >> 20} MiB"))
    return datasets.open_dataset(folder, name, size)


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise TrainingFailure(f"cannot write {path}: {error.strerror}") from error


def _check_writable(path: Path) -> None:
    """Before hours of training: raise TrainingFailure if the result could not be written in the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingFailure(f"cannot write {path}: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise TrainingFailure(f"cannot write {path}: {'it is a folder' if path.is_dir() else 'no permission'}")


def _check_logits(logits: Path | None, taught: bool) -> None:
    if logits is not None and not taught:
        raise InputError("--logits keeps what teachers say, and this run has none", "leave --logits out, or distil from a teacher")
    if logits is not None:
        _check_writable(logits)


def _recipe(**settings: Any) -> Recipe:
    try:
        return Recipe(**settings)
    except ValueError as error:
        raise InputError(str(error)) from error


def _teacher(path: Path) -> tuple[nn.Module, files.NetworkInfo]:
    model, info = files.load_network(path)
    if info.partial:
        raise InputError(f"{path} is already reduced", "pass the all-ReLU network that `train` wrote")
    return model, info


def _start(path: Path, method: str, options: dict[str, Any], teacher: Path,
           info: files.NetworkInfo) -> tuple[nn.Module, files.NetworkInfo, dict[str, Any]]:
    """The reduced network at `path` for a reduction of the teacher to start from, and its options with the given ones over them."""
    model, before = files.load_network(path)
    if method != "autorep" or reduction(before.made_by).get("method") != "autorep":
        raise InputError(f"a {method} run cannot start from {path}" if method != "autorep" else f"{path} is not of autorep",
                         "--from goes with method autorep and a network that it made; leave --from out to start from the teacher")
    if replace(before, made_by={}, partial=False) != replace(info, made_by={}):
        raise InputError(f"{path} has another architecture, data or normalisation than {teacher}", "pass a teacher of its lineage")
    begun = reduction(before.made_by)["options"]
    settled = {name: getattr(methods.make_options(method, begun), name) for name in SETTLED}
    if changed := [f"{name}={value}" for name, value in settled.items() if options.get(name, value) != value]:
        raise InputError(f"{path} was made with {', '.join(changed)}, which stays",
                         "leave that setting out, or leave --from out to start from the teacher")
    _check_options(method, {**begun, **options})
    return model, before, {**begun, **options}


def _teachers(paths: Sequence[Path], dataset: datasets.Dataset, shape: tuple[int, ...], infos: list[files.NetworkInfo]) -> list[nn.Module]:
    """The networks to distil from; their facts are added to `infos`, whose first says how images are normalised."""
    networks = []
    for path in paths:
        network, info = files.load_network(path)
        files.check_fits(dataset, shape, info, path)
        if infos and (info.mean, info.std) != (infos[0].mean, infos[0].std):
            raise InputError(f"{path} normalises images differently than the first network", "distil from networks of the same lineage")
        infos.append(info)
        networks.append(network)
    return networks


def _fitting(dataset: datasets.Dataset, infos: Sequence[files.NetworkInfo], path: Path) -> tuple[data.Split, data.Split]:
    """Training images as the network at `path`, the first one, expects them; the validation images that none of these lineages took in."""
    info = infos[0]
    train, validation = dataset.load_train()
    files.check_fits(dataset, train.shape, info, path)
    unseen = _unseen(validation, infos)
    return replace(train, mean=info.mean, std=info.std), replace(unseen, mean=info.mean, std=info.std)


def _check_same(validation: data.Split, infos: Sequence[files.NetworkInfo]) -> None:
    """Raise InputError unless these are the validation images of which these networks' lineages took the first ones in."""
    if folded_data(infos) - {validation.labels_digest()}:
        raise InputError("a network was trained on some of the validation images, here are others", "pass the data that it was trained on")


def _unseen(validation: data.Split, infos: Sequence[files.NetworkInfo]) -> data.Split:
    """The validation images that no training of these networks' lineages took in."""
    taken = taken_in(infos)
    _check_same(validation, infos)
    if taken >= len(validation):
        raise InputError(f"the network was trained on {taken:,} validation images, here are {len(validation):,}",
                         "pass the data that it was trained on")
    return validation[taken:]


def _last(unseen: data.Split, held_out: int) -> data.Split:
    """The last `held_out` of these images; all for 0."""
    if held_out > len(unseen):
        raise InputError(f"--held-out {held_out} is more than the {len(unseen):,} validation images that no training took in", "pass fewer")
    return unseen[len(unseen) - (held_out or len(unseen)):]


def _rebuild(info: files.NetworkInfo) -> Callable[[float, int], nn.Module]:
    return lambda factor, stride: build(info.network, round(info.width * factor), len(info.classes), stride)


def _parse_options(method: str, pairs: list[str]) -> dict[str, Any]:
    """name=value settings in the types of the method's options."""
    if method not in methods.METHODS:
        raise InputError(f"unknown method {method!r}", f"use {', '.join(methods.METHODS)}")
    hints = get_type_hints(methods.METHODS[method][0])
    values: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        kind = hints.get(name, str)
        try:
            if kind is bool:
                values[name] = {"true": True, "false": False}[text.lower()]
            elif kind in (int, float, str):
                values[name] = kind(text)
            else:
                values[name] = tuple(float(part) for part in text.split(","))
        except (ValueError, KeyError) as error:
            expected = kind.__name__ if kind in (bool, int, float, str) else "list of numbers"
            raise InputError(f"{pair!r} is no valid setting", f"write {name}=VALUE with a {expected}") from error
    return values


def _check_options(method: str, options: dict[str, Any]) -> None:
    try:
        methods.make_options(method, options)
    except ValueError as error:
        raise InputError(str(error)) from error


def _sources(teacher: nn.Module, infos: Sequence[files.NetworkInfo], dataset: datasets.Dataset, splits: tuple[data.Split, data.Split],
             start: nn.Module | None = None, mentors: Sequence[nn.Module] = ()) -> dict[str, Any]:
    """What a network is reduced from. infos: of the teacher, of the network to start from and of those that teach besides."""
    taken, known = taken_in(infos), "".join(sorted(folded_data(infos)))  # one, since they are of the same data
    return {"teacher": digest(teacher), "dataset": dataset.name, "data": [split.digest() for split in splits],
            **({"start": digest(start)} if start is not None else {}),
            **({"mentors": [digest(model) for model in mentors]} if mentors else {}),
            **({"fold_in": taken} if taken else {}), **({"validation_data": known} if known else {})}


def _settings(method: str, budget: int, options: dict[str, Any], recipe: Recipe, distil: bool, sources: dict[str, Any]) -> dict[str, Any]:
    """All that decides what a reduction gives, as JSON gives it back."""
    settings = {"method": method, "budget": budget, "options": options, **asdict(recipe), "distil": distil, **sources}
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]


def _run_method(settings: dict[str, Any], options: dict[str, Any], teacher: nn.Module, info: files.NetworkInfo,
                splits: tuple[data.Split, data.Split], recipe: Recipe, *folders: Path,
                start: nn.Module | None = None, teachers: Sequence[nn.Module] = (),
                logits: Path | None = None) -> tuple[methods.Reduced, dict[str, Any]]:
    """The reduced network and the facts of the run. folders: of the run, and perhaps another of what other budgets share with it."""
    total = methods.count_all(teacher, info.input_shape)
    torch.manual_seed(recipe.seed)
    result = methods.reduce(teacher, method=settings["method"], budget=settings["budget"], data=splits, recipe=recipe, folder=folders[0],
                            shared=folders[-1], distil=settings["distil"], rebuild=_rebuild(info), start=start,
                            teachers=teachers, logits=logits, **options)
    made_by = {"command": "reduce", **settings, "relus": result.relus, "total": total,
               "validation_accuracy": result.validation_accuracy, "validation_images": len(splits[1]),
               "minutes": minutes_spent(*folders), "epochs_spent": epochs_spent(*folders),
               "hardware": describe_hardware(), "torch": torch.__version__, "details": result.details}
    return result, made_by


def _finished(facts: Path, settings: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a finished run; None if there are none. Raises InputError if it has other settings."""
    if not facts.is_file():
        return None
    try:
        rows: list[dict[str, Any]] = json.loads(facts.read_text())["rows"]
        before = rows[0]["settings"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{facts} is damaged or of an earlier version", "use another --out") from error
    if changed := changed_settings(before, settings):
        raise InputError(f"{facts} was made with other settings ({', '.join(changed)})", "use another --out, or the same settings")
    return rows


def _variants(result: methods.Reduced, made_by: dict[str, Any], path: Path) -> list[tuple[methods.Reduced, Path, dict[str, Any]]]:
    """The network that a run made and what it made besides, each with its file and the facts of the run."""
    return [(result, path, made_by)] + [
        (other, path.with_stem(f"{path.stem}-{other.name}"),
         {**made_by, "relus": other.relus, "validation_accuracy": other.validation_accuracy, "details": other.details})
        for other in result.further]


def _named(label: str, variant: methods.Reduced) -> str:
    return f"{label} ({variant.name})" if variant.name else label


def _reduced_info(info: files.NetworkInfo, result: methods.Reduced, made_by: dict[str, Any]) -> files.NetworkInfo:
    return replace(info, partial=True, made_by=made_by, width=round(info.width * result.width_factor), stride=result.stride)


@app.command()
@exit_on_error(PROGRAM, *ERRORS)
def train(
    out: Annotated[Path, typer.Option(help="Where to write the network.")],
    folder: Data = Path("data"),
    dataset: DatasetName = "auto",
    image_size: ImageSize = 0,
    network: Annotated[str, typer.Option(help=f"Architecture: {', '.join(NETWORKS)}.")] = "resnet18",
    width: Annotated[int, typer.Option(help="Channels of the first stage; 0 for the architecture's standard.", min=0)] = 0,
    epochs: Epochs = 15,
    batch: Batch = 256,
    lr: Rate = 0.2,
    schedule: Schedule = "one-cycle",
    clip: Clip = CLIP,
    label_smoothing: Annotated[float, typer.Option(help="Without a teacher.", min=0, max=0.9)] = 0.1,
    ema: Ema = 0.0,
    start_size: Annotated[int, typer.Option(help="Side of the images at first; they grow to full size. 0: full throughout.", min=0)] = 0,
    shift: Shift = data.SHIFT,
    cutout: Cutout = data.CUTOUT,
    noise: Noise = 0.0,
    seed: Seed = 0,
    start: Annotated[Path | None, typer.Option(
        "--from", help="Network to go on from, in place of --network and --width; a reduced one keeps its choice of ReLUs.")] = None,
    teacher: Annotated[list[Path] | None, typer.Option(
        help="Network to distil from, of any kind; several times for the mean of several.")] = None,
    fold_in: Annotated[int, typer.Option(
        help="Validation images to train on too, for a last run whose settings are chosen; the others still validate.", min=0)] = 0,
    logits: Logits = None,
    run: Run = None,
    download: Download = False,
) -> None:
    """Train an all-ReLU network, which becomes the teacher of ReLU reduction, or go on with a network of any kind."""
    _check_writable(out)
    _check_logits(logits, bool(teacher))
    recipe = _recipe(epochs=epochs, batch=batch, lr=lr, schedule=schedule, clip=clip, label_smoothing=label_smoothing, ema=ema,
                     start_size=start_size, shift=shift, cutout=cutout, noise=noise, seed=seed)
    source = _open(folder, dataset, image_size, download)
    training, validation = source.load_train()
    infos: list[files.NetworkInfo] = []
    torch.manual_seed(seed)
    origin, stage = "", None
    if start is not None:
        model, before = files.load_network(start)
        files.check_fits(source, training.shape, before, start)
        infos.append(before)
        network, width, origin = before.network, before.width, digest(model)
        stage = methods.going_on(model, reduction(before.made_by))
    else:
        try:
            width = width or STANDARD_WIDTH.get(network, 64)
            model = build(network, width, len(source.classes))
        except ValueError as error:
            raise InputError(str(error)) from error
    mentors = _teachers(teacher or [], source, training.shape, infos)
    _check_same(validation, infos)
    known = validation.labels_digest()
    if infos:
        training, validation = (replace(split, mean=infos[0].mean, std=infos[0].std) for split in (training, validation))
    taken = max(fold_in, taken_in(infos))
    if taken >= len(validation):
        raise InputError(f"--fold-in {taken} leaves none of the {len(validation):,} validation images", "leave some to validate with")
    training, validation = training.joined(validation[:fold_in]), validation[taken:]
    where = run or Path("runs") / out.stem
    score = fit(model, training, validation, recipe, where, stage=stage, label="train",
                teacher=mentor(mentors, logits) if mentors else None,
                settings={"network": network, "width": width, "from": origin})
    if world()[0] > 0:
        return
    made_by = {"command": "train", "dataset": source.name, **asdict(recipe), "distil": bool(mentors), "teachers": len(mentors),
               **({"mentors": [digest(model) for model in mentors]} if mentors else {}),
               "fold_in": taken, "validation_data": known,  # how many of which were seen by it or by what it comes from
               "validation_accuracy": score, "validation_images": len(validation), "minutes": minutes_spent(where),
               "hardware": describe_hardware()}
    if start is not None:
        made_by |= {"from": before.made_by, "relus": count_relus(model) if before.partial else "all"}
        info = replace(before, made_by=made_by)
    else:
        info = files.NetworkInfo(network, width, source.classes, training.shape, training.mean, training.std, False, made_by)
    _write(out, files.serialise_network(model, info))
    print(f"wrote {out}: validation accuracy {score:.2%}")


@app.command("average")
@exit_on_error(PROGRAM, *ERRORS)
def average_networks(
    networks: Annotated[list[Path], typer.Argument(help="Networks that `train --from` made of the same one, or that one and its heirs.")],
    out: Annotated[Path, typer.Option(help="Where to write the network.")],
    folder: Data = Path("data"),
    dataset: DatasetName = "auto",
    image_size: ImageSize = 0,
    held_out: Annotated[int, typer.Option(help="Last validation images to measure on; 0: all that no --fold-in took.", min=0)] = 0,
    relus_of: Annotated[Path | None, typer.Option(help="Network whose ReLUs the average keeps, if the others' differ.")] = None,
) -> None:
    """Average the weights of networks of one lineage: often a little better than each, at the cost of one.

    One that is named twice counts twice.
    """
    if len(networks) < 2 and relus_of is None:
        raise InputError("one network has no average", "name two or more")
    _check_writable(out)
    paths = [*networks, *([] if relus_of is None else [relus_of])]
    loaded = [files.load_network(path) for path in paths]
    models, infos = [model for model, _ in loaded], [info for _, info in loaded]
    chosen = None if relus_of is None else models.pop()
    source = _open(folder, dataset, image_size, False)
    training, validation = source.load_train()
    for info, path in zip(infos, paths):
        files.check_fits(source, training.shape, info, path)
        if lineage(info.made_by)[0] != lineage(infos[0].made_by)[0] or (info.mean, info.std) != (infos[0].mean, infos[0].std):
            raise InputError(f"{path} and {networks[0]} come from different trainings",
                             "average what `train --from` made of the same network")
    unseen, known = _last(_unseen(validation, infos), held_out), validation.labels_digest()
    taken = len(validation) - len(unseen)
    training, validation = (replace(part, mean=infos[0].mean, std=infos[0].std) for part in (training, unseen))
    model = average(models, training.sample(NORM_IMAGES), chosen)
    measured = score(model, validation)
    made_by = {**averaged(infos), "networks": [digest(model) for model in models], "fold_in": taken, "validation_data": known,
               **({} if chosen is None else {"relus_of": digest(chosen)}),
               "validation_accuracy": measured.accuracy, "validation_images": len(validation)}
    _write(out, files.serialise_network(model, replace(infos[-1], made_by=made_by)))
    print(f"wrote {out}: validation {measured} of {len(validation):,} images")


@app.command()
@exit_on_error(PROGRAM, *ERRORS)
def reduce(
    teacher: Annotated[list[Path], typer.Option(
        help="All-ReLU network, from `train`. Several: the first is reduced, the others, of any kind, teach too (mean of logits).")],
    out: Annotated[Path, typer.Option(help="Where to write the network.")],
    start: Annotated[Path | None, typer.Option(
        "--from", help="Network that autorep made, of the teacher's architecture, to start from: another budget in fewer epochs.")] = None,
    budget: Annotated[int | None, typer.Option(help="ReLUs per image that may remain.")] = None,
    method: Annotated[str | None, typer.Option(help=f"{', '.join(methods.METHODS)}; default autorep, or cost with a target.")] = None,
    option: MethodOption = None,
    target_ms: Annotated[float | None, typer.Option(
        help="Online latency to meet instead of a budget, as predicted from this machine's compute and the link's round trips and bytes "
             "(method cost).", min=0)] = None,
    target_bytes: Annotated[int | None, typer.Option(
        help="Online bytes of one image, both ways together, without framing, to meet instead of a budget (method cost).", min=0)] = None,
    link: Link = None,
    folder: Data = Path("data"),
    dataset: DatasetName = "auto",
    image_size: ImageSize = 0,
    epochs: Epochs = 15,
    batch: Batch = 256,
    lr: Rate = 0.05,
    schedule: Schedule = "one-cycle",
    clip: Clip = CLIP,
    ema: Ema = 0.0,
    distil: Distil = True,
    shift: Shift = data.SHIFT,
    cutout: Cutout = data.CUTOUT,
    noise: Noise = 0.0,
    seed: Seed = 0,
    logits: Logits = None,
    run: Run = None,
    download: Download = False,
) -> None:
    """Reduce a network's ReLUs to at most BUDGET, or until it meets a latency on a link or a number of online bytes."""
    path, *further = teacher
    parent, info = _teacher(path)
    _check_writable(out)
    _check_logits(logits, distil)
    goal = {"target_ms": target_ms, "target_bytes": target_bytes, "link": link}
    for name in ("target_ms", "target_bytes"):
        if goal[name] == 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0", "--budget 0 asks for no ReLU at all")
    if targets := [f"{name}={value}" for name, value in goal.items() if value is not None]:
        if method not in (None, "cost"):
            raise InputError(f"a target and --link do not go with --method {method}", "leave --method out, or pass --budget alone")
        if twice := [pair for pair in option or [] if goal.get(pair.partition("=")[0]) is not None]:
            raise InputError(f"-o {twice[0]} is given as an option of its own too", "pass it once")
        method, option = "cost", [*targets, *(option or [])]
    elif budget is None and method != "cost":
        raise InputError("no goal given", "pass --budget, --target-ms with --link, or --target-bytes")
    method = method or "autorep"
    options, infos, begin = _parse_options(method, option or []), [info], None
    if start is None:
        _check_options(method, options)
    else:
        begin, before, options = _start(start, method, options, path, info)
        infos.append(before)
    total = methods.count_all(parent, info.input_shape)
    budget = total if budget is None else budget
    methods.check_budget(budget, total)
    source = _open(folder, dataset, image_size, download)
    mentors = _teachers(further, source, info.input_shape, infos)
    splits = _fitting(source, infos, path)
    recipe = _recipe(epochs=epochs, batch=batch, lr=lr, schedule=schedule, warmup=0.1, clip=clip, ema=ema, shift=shift, cutout=cutout,
                     noise=noise, seed=seed)
    settings = _settings(method, budget, options, recipe, distil, _sources(parent, infos, source, splits, begin, mentors))
    result, made_by = _run_method(settings, options, parent, info, splits, recipe, run or Path("runs") / f"{out.stem}-{method}",
                                  start=begin, teachers=mentors, logits=logits)
    if world()[0] > 0:
        return
    if begin is not None:
        made_by["from"] = before.made_by
    for variant, target, facts in _variants(result, made_by, out):
        _write(target, files.serialise_network(variant.model, _reduced_info(info, variant, facts)))
        kept = _named(f"{variant.relus:,} of {total:,} ReLUs", variant)
        print(f"wrote {target}: {kept}, validation accuracy {variant.validation_accuracy:.2%}")


@app.command()
@exit_on_error(PROGRAM, *ERRORS)
def pareto(
    teacher: Annotated[Path, typer.Option(help="All-ReLU network, from `train`.")],
    out: Annotated[Path, typer.Option(help="Folder for networks, pareto.json, pareto.csv and pareto.png.")],
    budgets: Annotated[str, typer.Option(help="Numbers of ReLUs, or percentages of the teacher's: 12900,10%.")],
    configurations: Annotated[list[str], typer.Option(
        "--method", help="A method, with settings if need be: autorep, or autorep:c2=channel,damping=1. Repeatable.")],
    folder: Data = Path("data"),
    dataset: DatasetName = "auto",
    image_size: ImageSize = 0,
    epochs: Epochs = 15,
    batch: Batch = 256,
    lr: Rate = 0.05,
    clip: Clip = CLIP,
    shift: Shift = data.SHIFT,
    cutout: Cutout = data.CUTOUT,
    noise: Noise = 0.0,
    distil: Distil = True,
    logits: Logits = None,
    seeds: Annotated[str, typer.Option(help="Seeds, comma separated.")] = "0",
    test: Annotated[bool, typer.Option("--test", help="Also measure each network on the test images, once.")] = False,
) -> None:
    """Reduce one teacher with several methods, budgets and seeds; what is finished is not run again."""
    parent, info = _teacher(teacher)
    _check_logits(logits, distil)
    total = methods.count_all(parent, info.input_shape)
    try:
        counts = [round(float(b[:-1]) / 100 * total) if b.endswith("%") else int(b) for b in budgets.split(",")]
        numbers = [int(s) for s in seeds.split(",")]
    except (ValueError, OverflowError) as error:
        raise InputError("--budgets and --seeds take numbers separated by commas", "for example --budgets 12900,10%") from error
    for count in counts:
        methods.check_budget(count, total)
    chosen = []
    for configuration in configurations:
        method, _, text = configuration.partition(":")
        pairs = re.split(r",(?=\w+=)", text) if text else []  # a value may be a list: widths=0.5,0.25
        chosen.append((configuration, method, _parse_options(method, pairs)))
        _check_options(*chosen[-1][1:])
    source = _open(folder, dataset, image_size, False)
    splits = _fitting(source, [info], teacher)
    sources = _sources(parent, [info], source, splits)
    unseen = replace(source.load_test(), mean=info.mean, std=info.std) if test else None
    if unseen is not None:
        files.check_fits(source, unseen.shape, info, teacher)
    title = f"{info.network} width {info.width}, {total:,} ReLUs, {source.name}"
    rows: list[dict[str, Any]] = []
    impossible: list[dict[str, Any]] = []
    first = world()[0] == 0  # of several processes, all train and one writes
    for label, method, options in chosen:
        for count in counts:
            for seed in numbers:
                plain = label.replace(":", "-").replace(",", "-").replace("=", "_")
                stem, shared = f"{plain}-{count}-{seed}", out / "runs" / f"{plain}-{seed}"
                facts = out / f"{stem}.json"
                recipe = _recipe(epochs=epochs, batch=batch, lr=lr, warmup=0.1, clip=clip, shift=shift, cutout=cutout, noise=noise,
                                 seed=seed)
                settings = _settings(method, count, options, recipe, distil, sources)
                made = _finished(facts, settings)
                if made is None:
                    try:
                        result, made_by = _run_method(settings, options, parent, info, splits, recipe, out / "runs" / stem, shared,
                                                      logits=logits)
                    except methods.BudgetError as error:
                        impossible.append({"label": label, "budget": count, "seed": seed, "reason": str(error)})
                        continue
                    made = []
                    for variant, name, found in _variants(result, made_by, out / f"{stem}.safetensors"):
                        reduced = _reduced_info(info, variant, found)
                        made.append({**table_row(reduced, name.name), "label": _named(label, variant), "series": label})
                        if first:
                            _write(name, files.serialise_network(variant.model, reduced, 16))
                    if first:
                        _write(facts, json.dumps({"rows": made}, indent=1).encode())
                if not first:
                    continue
                for row in made:
                    if unseen is not None and row["test_accuracy"] is None:
                        row["test_accuracy"] = accuracy(files.load_network(out / row["file"])[0], unseen)
                        _write(facts, json.dumps({"rows": made}, indent=1).encode())
                rows += made
                _report(rows, impossible, out, title, source.name)
    if not first:
        return
    for row in impossible:
        print(f"{row['label']} at {row['budget']:,} ReLUs: {row['reason']}")
    if not rows:
        raise InputError("no network was made", "choose other --budgets")
    _report(rows, impossible, out, title, source.name)
    table = Table("method", "budget", "ReLUs", "seed", "validation", "test")
    for row in rows:
        test_text = "" if row["test_accuracy"] is None else f"{row['test_accuracy']:.2%}"
        table.add_row(row["label"], f"{row['budget']:,}", f"{row['relus']:,}", str(row["seed"]),
                      f"{row['validation_accuracy']:.2%}", test_text)
    Console().print(table)
    print(f"wrote {out}/pareto.json, pareto.csv and pareto.png")


def _report(rows: list[dict[str, Any]], impossible: list[dict[str, Any]], out: Path, title: str, published: str) -> None:
    from model_opt.show import draw_pareto  # matplotlib takes a second to import

    _write(out / "pareto.json", json.dumps({"rows": rows, "impossible": impossible}, indent=1).encode())
    text = io.StringIO()
    columns = [name for name in rows[0] if name not in ("settings", "details")]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    _write(out / "pareto.csv", text.getvalue().encode())
    try:
        draw_pareto(rows, out / "pareto.png", title, published)
    except OSError as error:
        raise TrainingFailure(f"cannot write {out / 'pareto.png'}: {error.strerror}") from error


def _load_masks(file: Path) -> tuple[str, dict[str, Tensor], str]:
    """Name and masks, from the first layer to the last, of a float network or a compiled model, and what the latter does not hold."""
    try:
        model, info = files.load_network(file)
    except files.NetworkFileError:
        public = _load_compiled(file).public
        masks = {node.name: public.masks[node.name] for node in public.nodes if node.name in public.masks}
        return public.name, masks, "compiled: layers without a ReLU or a square are not in the file"
    if not info.partial:
        raise InputError(f"{file} is not reduced: every activation is a ReLU", "pass a network from `reduce` or a compiled model")
    return f"{info.network} width {info.width}", {name: layer.mask for name, layer in partial_activations(model).items()}, ""


def _load_compiled(file: Path) -> compiled.Model:
    try:
        return compiled.load(file)
    except ModelFileError as error:
        raise InputError(str(error), "pass a file from `train`, `reduce` or `compile`") from error


@app.command()
@exit_on_error(PROGRAM, *ERRORS)
def show(
    file: Annotated[Path, typer.Argument(help="Reduced network or compiled model.")],
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG, PDF or SVG): bars, and where in the image ReLUs remain.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Where FILE's ReLUs remain, layer by layer."""
    from model_opt.show import KINDS, count_layers, draw_masks

    name, masks, note = _load_masks(file)
    layers = count_layers(masks)
    total = {kind: sum(layer.counts[kind] for layer in layers) for kind in KINDS}
    if as_json:
        rows = [{"name": layer.name, "shape": layer.shape, **layer.counts} for layer in layers]
        print(json.dumps({"name": name, "total": total, "layers": rows}))
    else:
        table = Table("layer", "shape", *KINDS, "kept", title=name, caption=note or None)
        for layer in layers:
            pixels = sum(layer.counts.values())
            share = layer.counts["relu"] / pixels
            bar = "█" * round(5 * share) or ("▏" if share else "")
            table.add_row(layer.name, "x".join(map(str, layer.shape)), *(f"{layer.counts[k]:,}" for k in KINDS), f"{share:6.1%} {bar}")
        table.add_section()
        table.add_row("all", "", *(f"{total[k]:,}" for k in KINDS), f"{total['relu'] / max(sum(total.values()), 1):6.2%}")
        Console().print(table)
    if plot is not None:
        try:
            draw_masks(masks, f"{name}: {total['relu']:,} of {sum(total.values()):,} ReLUs{note and ' (' + note + ')'}", plot)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot write {plot}: {error}", "use a name that ends in .png, .pdf or .svg") from error


@app.command("compile")
@exit_on_error(PROGRAM, *ERRORS)
def compile_network(
    network: Annotated[Path, typer.Argument(help="Float network, from `train` or `reduce`.")],
    out: Annotated[Path, typer.Option(help="Where to write the compiled model.")],
    folder: Data = Path("data"),
    dataset: DatasetName = "auto",
    image_size: ImageSize = 0,
    images: Annotated[int, typer.Option(help="Training images to calibrate on.", min=1)] = 500,
    name: Annotated[str, typer.Option(help="Name of the model; default: the architecture, width and ReLUs.")] = "",
    eight_bits: Annotated[bool, typer.Option("--eight-bits", help="Weights as 8-bit integers per output channel; half the file.")] = False,
) -> None:
    """Compile NETWORK to the file that `relucent-server serve` takes."""
    model, info = files.load_network(network)
    training, _ = _fitting(_open(folder, dataset, image_size, False), [info], network)
    title = name or f"{info.network}-w{info.width}-{count_relus(model) if info.partial else 'all'}-relus"
    with Status("compiling", console=Console(stderr=True)) as status:
        result = compiler.compile_model(model, training[:images].normalised(), name=title, classes=info.classes, mean=info.mean,
                                        std=info.std, eight_bits=eight_bits, progress=status.update)
    _write(out, compiled.serialise(result))
    point = result.public.fixed_point
    print(f"wrote {out}: {result.public.relus:,} ReLUs, f_a {point.activation_bits}, f_w {point.weight_bits}, comparison width "
          f"{point.comparison_bits}, truncation failure at most {point.failure_bound:.1e} per inference, id {result.public.model_id[:12]}")


@app.command()
@exit_on_error(PROGRAM, *ERRORS)
def evaluate(
    file: Annotated[Path, typer.Argument(help="Float network or compiled model.")],
    folder: Data = Path("data"),
    dataset: DatasetName = "auto",
    image_size: ImageSize = 0,
    split: Annotated[str, typer.Option(
        help="validation (without what a --fold-in took) or test. Choose on validation; touch test once.")] = "validation",
    limit: Annotated[int, typer.Option(help="Only the first LIMIT images; 0 for all.", min=0)] = 0,
    held_out: Annotated[int, typer.Option(
        help="Only the last HELD_OUT validation images: those that no --fold-in took, which a compiled model does not say.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Accuracy and cross entropy of FILE: in float for a network, in simulated fixed point for a compiled model."""
    if split not in ("validation", "test"):
        raise InputError(f"unknown split {split!r}", "use validation or test")
    source = _open(folder, dataset, image_size, False)
    images = source.load_test() if split == "test" else source.load_train()[1]
    if held_out and split == "test":
        raise InputError("--held-out goes with validation images", "leave it out for the test images")
    try:
        model, info = files.load_network(file)
        files.check_fits(source, images.shape, info, file)
        images = _last(images if split == "test" else _unseen(images, [info]), held_out)[:limit or None]
        kind, measured, relus = "float", score(model, replace(images, mean=info.mean, std=info.std)), count_relus(model)
        relus = relus if info.partial else methods.count_all(model, info.input_shape)
    except files.NetworkFileError:
        loaded = _load_compiled(file)
        files.check_fits(source, images.shape, loaded.public, file)
        if split == "validation" and not held_out:
            print("note: training may have taken some of these images in (--fold-in); --held-out N leaves them out", file=sys.stderr)
        images = replace(_last(images, held_out)[:limit or None], mean=loaded.public.mean, std=loaded.public.std)
        kind, measured, relus = "fixed_point", compiler.fixed_point_score(loaded, images), loaded.public.relus
    if as_json:
        print(json.dumps({"file": str(file), "split": split, "images": len(images), "arithmetic": kind, "accuracy": measured.accuracy,
                          "cross_entropy": measured.cross_entropy if math.isfinite(measured.cross_entropy) else None, "relus": relus}))
    else:
        print(f"{kind} {measured} on {len(images):,} {split} images, {relus:,} ReLUs")
