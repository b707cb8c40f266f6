"""The commands of `relucent-opt` on tiny networks and images."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from model_opt.activation import IDENTITY, RELU, SQUARE, count_relus, partial_activations, replace_relus
from model_opt.cli import average_networks, compile_network, evaluate, pareto, reduce, show, train
from model_opt.compiler import compile_model
from model_opt.datasets import open_dataset
from model_opt.files import load_network, serialise_network
from model_opt.methods import count_all
from model_opt.networks import build
from model_opt.published import PUBLISHED
from model_opt.runs import table_row, taken_in
from model_opt.show import draw_pareto
from model_opt.training import TrainingError, average, digest
from protocol.model import load, save
from tests.samples import MEAN, STD, network_info
from tests.test_data import folders

SHORT: dict[str, Any] = {"epochs": 1, "batch": 6}


def write_teacher(path: Path, seed: int = 0) -> nn.Module:
    """A network for the images of `folders`."""
    torch.manual_seed(seed)
    network = build("resnet18", 4, 2)
    path.write_bytes(serialise_network(network, network_info(classes=("cat", "dog"), input_shape=(3, 16, 16))))
    return network


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and teacher, where the commands run."""
    folders(tmp_path / "data")
    write_teacher(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """What was printed is an error with these words."""
    message = capsys.readouterr().err
    assert "error: " in message
    for word in words:
        assert word in message


def test_other_teachers_and_images_are_other_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def again() -> None:
        reduce([Path("teacher")], Path("out"), budget=200, lr=0.01, **SHORT)
        train(Path("trained"), start=Path("teacher"), teacher=[Path("teacher")], lr=0.01, **SHORT)

    again()
    again()
    made_by = load_network(Path("out"))[1].made_by
    assert {"schedule", "ema", "dataset", "teacher", "data", "torch", "options"} <= set(made_by)
    write_teacher(Path("teacher"), seed=1)
    with pytest.raises(SystemExit):
        reduce([Path("teacher")], Path("out"), budget=200, lr=0.01, **SHORT)
    refused(capsys, "other settings (reduced, teacher)")
    with pytest.raises(SystemExit):
        train(Path("trained"), start=Path("teacher"), teacher=[Path("teacher")], lr=0.01, **SHORT)
    refused(capsys, "other settings (from, teacher)")
    write_teacher(Path("teacher"))
    (place / "data" / "train" / "cat" / "0.png").unlink()
    with pytest.raises(SystemExit):
        reduce([Path("teacher")], Path("out"), budget=200, lr=0.01, **SHORT)
    refused(capsys, "other settings (data)")


def test_images_that_a_lineage_was_trained_on_do_not_validate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is made of a network that took in validation images is measured on the others."""
    (kept,) = open_dataset(Path("data")).load_train()[1:]
    train(Path("parent"), start=Path("teacher"), fold_in=1, **SHORT)
    reduce([Path("parent")], Path("child"), budget=200, lr=0.01, **SHORT)
    train(Path("pupil"), start=Path("teacher"), teacher=[Path("parent")], **SHORT)
    train(Path("heir"), start=Path("child"), **SHORT)
    for name in ("parent", "child", "pupil", "heir"):
        info = load_network(Path(name))[1]
        assert info.made_by["validation_images"] == len(kept) - 1 and taken_in([info]) == 1, name
        capsys.readouterr()
        evaluate(Path(name), as_json=True)
        assert json.loads(capsys.readouterr().out)["images"] == len(kept) - 1, name
    pareto(Path("parent"), Path("table"), "200", ["autorep"], **SHORT, lr=0.01)
    pareto(Path("parent"), Path("table"), "200", ["autorep"], **SHORT, lr=0.01)  # takes its finished row
    (row,) = json.loads(Path("table/pareto.json").read_text())["rows"]
    assert row["validation_images"] == len(kept) - 1
    compile_network(Path("heir"), Path("compiled"), images=4)
    capsys.readouterr()
    for held_out, count in ((0, len(kept)), (len(kept) - 1, len(kept) - 1)):  # a compiled model does not say what it was trained on
        evaluate(Path("compiled"), held_out=held_out, as_json=True)
        out, err = capsys.readouterr()
        assert json.loads(out)["images"] == count and ("--held-out" in err) == (held_out == 0)
    with pytest.raises(SystemExit):
        evaluate(Path("parent"), held_out=len(kept))
    refused(capsys, "no training took in")
    for number in range(20):  # other images validate then, which the network may know
        Image.new("RGB", (16, 16)).save(place / "data" / "train" / "cat" / f"more-{number}.png")
    for again in (lambda: evaluate(Path("heir")), lambda: train(Path("next"), start=Path("heir"), **SHORT),
                  lambda: reduce([Path("parent")], Path("next"), budget=200, lr=0.01, **SHORT)):
        with pytest.raises(SystemExit):
            again()
        refused(capsys, "trained on some of the validation images, here are others")


def test_a_network_for_a_target_without_squares_is_of_degree_1(place: Path) -> None:
    reduce([Path("teacher")], Path("lines"), target_bytes=300_000, lr=0.01, **SHORT)
    model, info = load_network(Path("lines"))
    with pytest.raises(SystemExit):
        reduce([Path("teacher")], Path("twice"), target_bytes=300_000, option=["target_bytes=5"], **SHORT)
    squares = sum(layer.count(SQUARE) for layer in partial_activations(model).values())
    assert squares == info.made_by["details"]["squares"] == 0 and table_row(info, "lines")["degree"] == 1


def test_evaluation_gives_accuracy_and_cross_entropy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of networks and of compiled models; no number where logits are none."""
    images = replace(open_dataset(Path("data")).load_train()[1], mean=MEAN, std=STD)
    network = load_network(Path("teacher"))[0]
    save(compile_model(network, images.normalised(), name="m", classes=("cat", "dog"), mean=MEAN, std=STD), Path("model"))
    logits = network(images.normalised()).detach()
    expected = float(nn.functional.cross_entropy(logits, images.labels))

    def evaluated(name: str) -> dict[str, Any]:
        capsys.readouterr()
        evaluate(Path(name), as_json=True)
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    plain, fixed = evaluated("teacher"), evaluated("model")
    assert plain["accuracy"] == float((logits.argmax(1) == images.labels).double().mean())
    assert (plain["arithmetic"], fixed["arithmetic"]) == ("float", "fixed_point")
    assert plain["cross_entropy"] == pytest.approx(expected, abs=1e-5) and fixed["cross_entropy"] == pytest.approx(expected, abs=0.01)
    evaluate(Path("teacher"))
    assert f"cross entropy {expected:.3f} on {len(images)} validation images" in capsys.readouterr().out
    with torch.no_grad():
        network.get_parameter("fc.bias").fill_(torch.inf)
    Path("broken").write_bytes(serialise_network(network, load_network(Path("teacher"))[1]))
    assert evaluated("broken")["cross_entropy"] is None
    evaluate(Path("broken"))
    assert "no cross entropy (a logit overflows)" in capsys.readouterr().out


def test_a_reduction_starts_from_a_reduced_network(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To smaller and larger budgets, in the teacher's place; the row has the last reduction and adds all up."""
    (kept,) = open_dataset(Path("data")).load_train()[1:]
    common: dict[str, Any] = {**SHORT, "lr": 0.01}
    reduce([Path("teacher")], Path("first"), budget=500, option=["degree=1", "freeze=0.5"], **common)
    train(Path("second"), start=Path("first"), fold_in=1, **SHORT)
    begun = load_network(Path("second"))[0]
    for name, start, budget in (("less", "second", 100), ("more", "less", 1000), ("none", "more", 0)):
        reduce([Path("teacher")], Path(name), start=Path(start), budget=budget, option=["freeze=0.9"] if name == "less" else None, **common)
        model, info = load_network(Path(name))
        row = table_row(info, name)
        assert count_relus(model) == row["relus"] == budget == row["budget"]
        assert row["settings"]["options"]["degree"] == row["degree"] == 1 and "later" not in row
        assert row["validation_images"] == len(kept) - 1 == info.made_by["validation_images"]
        assert all(layer.count(SQUARE) == 0 for layer in partial_activations(model).values())
    assert row["epochs"] == 5 and [part["command"] for part in row["earlier"]] == ["reduce", "train", "reduce", "reduce"]
    assert row["settings"]["options"]["freeze"] == 0.9  # of the network it started from
    less = load_network(Path("less"))[0]
    pairs = zip(partial_activations(begun).values(), partial_activations(less).values())
    assert sum(int(((a.mask == RELU) & (b.mask == RELU)).sum()) for a, b in pairs) > 80  # its own ReLUs, not a new choice

    for start, words, settings in (("teacher", "not of autorep", {}), ("first", "a snl run cannot start", {"method": "snl"}),
                                   ("first", "a cost run cannot start", {"target_bytes": 10**6}),
                                   ("first", "range_penalty", {"option": ["range_penalty=0"]}),
                                   ("first", "made with degree=1, which stays", {"option": ["degree=2"]})):
        with pytest.raises(SystemExit):
            reduce([Path("teacher")], Path("out"), start=Path(start), run=place / "out-run", **({"budget": 50} | settings), **common)
        refused(capsys, words)
    info = network_info(classes=("cat", "dog"), input_shape=(3, 16, 16), width=8)
    Path("wide").write_bytes(serialise_network(build("resnet18", 8, 2), info))
    with pytest.raises(SystemExit):
        reduce([Path("wide")], Path("out"), start=Path("first"), budget=50, **common)
    refused(capsys, "another architecture", "its lineage")


def test_several_networks_teach_a_reduction(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others may be reduced; no image that one of them took in is left to validate with."""
    (kept,) = open_dataset(Path("data")).load_train()[1:]
    common: dict[str, Any] = {**SHORT, "lr": 0.01, "budget": 200}
    reduce([Path("teacher")], Path("alone"), **common)
    train(Path("other"), start=Path("alone"), fold_in=1, **SHORT)
    reduce([Path("teacher"), Path("other")], Path("out"), **common)
    info = load_network(Path("out"))[1]
    assert info.made_by["mentors"] == [digest(load_network(Path("other"))[0])] and info.made_by["fold_in"] == 1
    assert info.made_by["validation_images"] == len(kept) - 1 and table_row(info, "out")["settings"]["mentors"]
    states = [load_network(Path(name))[0].state_dict() for name in ("alone", "out")]
    assert not torch.equal(*(state["blocks.0.conv1.weight"] for state in states))
    with pytest.raises(SystemExit):
        reduce([Path("teacher")], Path("out"), **common)  # the same run without the other
    refused(capsys, "other settings")
    train(Path("third"), start=Path("alone"), fold_in=1, seed=1, **SHORT)
    with pytest.raises(SystemExit):
        reduce([Path("teacher"), Path("third")], Path("out"), **common)  # the same images, taught by another network
    refused(capsys, "other settings (teacher)")
    for settings in ({"method": "senet"}, {"distil": False}):
        with pytest.raises(SystemExit):
            reduce([Path("teacher"), Path("other")], Path("out"), run=place / "out-run", **(common | settings))
        refused(capsys, "further teachers do not go with")
    info = network_info(classes=("cat", "dog", "cow"), input_shape=(3, 16, 16), width=8)
    Path("wide").write_bytes(serialise_network(build("resnet18", 8, 3), info))
    with pytest.raises(SystemExit):
        reduce([Path("teacher"), Path("wide")], Path("out"), **common)
    refused(capsys, "3 classes")


def test_pareto_searches_once_for_all_budgets(place: Path) -> None:
    pareto(Path("teacher"), Path("table"), "200,100", ["senet"], epochs=3, batch=6, lr=0.01)
    rows = json.loads(Path("table/pareto.json").read_text())["rows"]
    assert [row["epochs"] for row in rows] == [3, 3]  # what it would take alone
    assert len(list(Path("table/runs").rglob("prune"))) == 1


def test_budgets_share_what_their_teacher_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two budgets, and a training with the same teacher and augmentation: the file of logits grows with the first run alone."""
    kept = Path("runs/logits")

    def lessons() -> int:
        with closing(sqlite3.connect(kept)) as store:
            return int(store.execute("SELECT count(*) FROM logits").fetchone()[0])

    settings = SHORT | {"lr": 0.01, "logits": kept}
    pareto(Path("teacher"), Path("table"), "200", ["autorep"], **settings)
    first = lessons()
    pareto(Path("teacher"), Path("table"), "200,100", ["autorep"], **settings)
    train(Path("again"), start=Path("teacher"), teacher=[Path("teacher")], **settings)
    assert first == lessons() > 0
    for wrong in (lambda: train(Path("none"), **settings),
                  lambda: reduce([Path("teacher")], Path("none"), budget=50, distil=False, **settings),
                  lambda: pareto(Path("teacher"), Path("none"), "50", ["autorep"], distil=False, **settings)):
        with pytest.raises(SystemExit):
            wrong()
        refused(capsys, "--logits keeps what teachers say, and this run has none")
    kept.write_bytes(b"no file of logits" * 100)
    with pytest.raises(SystemExit) as ended:
        reduce([Path("teacher")], Path("none"), budget=40, **settings)
    refused(capsys, "cannot keep the teachers' logits in runs/logits", "pass another --logits")
    assert ended.value.code == 1


def test_pareto_takes_finished_rows_of_the_same_settings_only(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(**changes: Any) -> list[dict[str, Any]]:
        pareto(Path("teacher"), Path("table"), "200", ["autorep"], **(SHORT | {"lr": 0.01} | changes))
        listed: list[dict[str, Any]] = json.loads(Path("table/pareto.json").read_text())["rows"]
        return listed

    (first,) = rows()
    network = Path("table/autorep-200-0.safetensors").read_bytes()
    assert first["test_accuracy"] is None
    assert rows() == [first]
    (tested,) = rows(test=True)
    assert tested == first | {"test_accuracy": tested["test_accuracy"]} and 0 <= tested["test_accuracy"] <= 1
    assert Path("table/autorep-200-0.safetensors").read_bytes() == network
    for changes, name in (({"epochs": 2}, "epochs"), ({"lr": 0.02}, "lr"), ({"distil": False}, "distil"), ({"shift": 0.0}, "shift"),
                          ({"noise": 2.0}, "noise"), ({"clip": 0.5}, "clip")):
        with pytest.raises(SystemExit):
            rows(**changes)
        refused(capsys, f"other settings ({name})")
    write_teacher(Path("teacher"), seed=1)
    with pytest.raises(SystemExit):
        rows()
    refused(capsys, "other settings (teacher)")
    facts = Path("table/autorep-200-0.json")
    for content in (json.dumps(json.loads(facts.read_text())["rows"][0]), '{"rows": []}', "[1]", "not JSON", '{"rows": [{}]}'):
        facts.write_text(content)
        with pytest.raises(SystemExit):
            rows()
        refused(capsys, "damaged or of an earlier version")


def test_training_that_goes_on_takes_in_validation_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The row of the network adds both trainings up, and keeps the settings of each."""
    reduce([Path("teacher")], Path("out"), budget=200, lr=0.01, option=["freeze=0.5"], **SHORT)
    train(Path("better"), start=Path("out"), teacher=[Path("teacher"), Path("out")], lr=0.02, fold_in=1, epochs=2, batch=6)
    before, after = (load_network(Path(name))[1] for name in ("out", "better"))
    (kept,) = open_dataset(Path("data")).load_train()[1:]
    row = table_row(after, "better")
    assert row["label"] == "autorep:freeze=0.5" and row["degree"] == 2 and row["file"] == "better"
    assert row["relus"] == table_row(before, "out")["relus"] <= 200 == row["budget"]
    assert (row["epochs"], row["settings"]["epochs"]) == (3, 1)
    (later,) = row["later"]
    assert (later["lr"], later["fold_in"], later["validation_images"], later["teachers"]) == (0.02, 1, len(kept) - 1, 2)
    assert row["validation_accuracy"] == later["validation_accuracy"] and "later" not in table_row(before, "out")
    train(Path("plain"), network="resnet18", width=4, **SHORT)
    plain = table_row(load_network(Path("plain"))[1], "plain")
    assert (plain["label"], plain["epochs"]) == ("all ReLUs", 1) and plain["relus"] == plain["budget"] > 8000
    with pytest.raises(SystemExit):
        train(Path("better"), start=Path("out"), fold_in=len(kept), **SHORT)
    refused(capsys, "--fold-in", "leaves none")
    with pytest.raises(SystemExit):
        train(Path("again"), start=Path("teacher"), teacher=[Path("out")], start_size=8, **SHORT)
    refused(capsys, "masks are of one image size")
    with pytest.raises(SystemExit):
        train(Path("again"), start=Path("teacher"), start_size=16, **SHORT)
    refused(capsys, "cannot grow from --start-size 16")
    average_networks([Path("out"), Path("better")], Path("mean"))
    states = [load_network(Path(name))[0].state_dict() for name in ("out", "better", "mean")]
    weight = "blocks.0.conv1.weight"
    assert torch.allclose((states[0][weight] + states[1][weight]) / 2, states[2][weight])
    average_networks([Path("out"), Path("better"), Path("better")], Path("heavier"))  # one that is named twice counts twice
    assert torch.allclose((states[0][weight] + 2 * states[1][weight]) / 3, load_network(Path("heavier"))[0].state_dict()[weight], atol=1e-6)
    masks = [name for name in states[0] if name.endswith(".mask")]
    assert masks and all(torch.equal(states[0][name], states[2][name]) for name in masks)
    compile_network(Path("mean"), Path("compiled"), images=5)
    assert load(Path("compiled")).public.name == f"resnet18-w4-{row['relus']}-relus"
    mean = table_row(load_network(Path("mean"))[1], "mean")
    assert (mean["epochs"], mean["minutes"], mean["relus"]) == (row["epochs"], row["minutes"], row["relus"])
    averaging = mean["later"][-1]
    assert [part["command"] for part in mean["later"]] == ["train", "average"] and len(set(averaging["networks"])) == 2
    assert (averaging["fold_in"], averaging["validation_images"]) == (1, len(kept) - 1)  # whichever network had taken it in
    for order in (["better", "out"], ["mean", "better", "out"], ["out", "mean"]):
        average_networks([Path(name) for name in order], Path("again"))
        again = table_row(load_network(Path("again"))[1], "again")
        assert (again["epochs"], again["minutes"], again["later"][-1]["fold_in"]) == (row["epochs"], row["minutes"], 1), order
    reduce([Path("teacher")], Path("fewer"), start=Path("out"), budget=100, lr=0.01, **SHORT)
    average_networks([Path("fewer")], Path("grafted"), relus_of=Path("out"))  # the weights of the one, the ReLUs of the other
    fewer, grafted = (load_network(Path(name))[0].state_dict() for name in ("fewer", "grafted"))
    assert torch.equal(fewer[weight], grafted[weight]) and not torch.equal(fewer[weight], states[0][weight])
    assert all(torch.equal(grafted[name], states[0][name]) for name in masks)
    assert not all(torch.equal(grafted[name], fewer[name]) for name in masks)
    crossed = table_row(load_network(Path("grafted"))[1], "grafted")
    assert (crossed["relus"], crossed["budget"], crossed["epochs"]) == (row["relus"], 200, 2)  # the teacher's cost is not a method's
    reduce([Path("teacher")], Path("other"), budget=100, lr=0.01, **SHORT)
    for networks, held_out, message in ((["out"], 0, "name two or more"), (["out", "teacher"], 0, "different trainings"),
                                        (["out", "other"], 0, "different trainings"),
                                        (["out", "better"], len(kept), "no training took in")):
        with pytest.raises(SystemExit):
            average_networks([Path(name) for name in networks], Path("none"), held_out=held_out)
        refused(capsys, message)
    kinds = {name: load_network(Path(name))[0] for name in ("out", "teacher", "other")}
    for name, message in (("teacher", "different architectures"), ("other", "different ReLUs")):
        with pytest.raises(TrainingError, match=message):
            average([kinds["out"], kinds[name]], open_dataset(Path("data")).load_train()[0])
    assert not Path("none").exists()


def test_pareto_notes_impossible_budgets_and_reshaped_widths(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pareto(Path("teacher"), Path("table"), "5,100", ["deepreduce"], lr=0.01, **SHORT)
    made = json.loads(Path("table/pareto.json").read_text())
    assert [row["budget"] for row in made["impossible"]] == [5] and "at most 5 ReLUs" in made["impossible"][0]["reason"]
    (row,) = made["rows"]
    assert row["width"] == load_network(Path("table") / row["file"])[1].width == 2
    assert "deepreduce at 5 ReLUs: no combination" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        pareto(Path("teacher"), Path("none"), "5", ["deepreduce"], lr=0.01, **SHORT)
    refused(capsys, "no network was made")


def test_test_images_of_another_size_are_refused_before_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("data/test")
    folders(Path("data"), ("test",), (20, 20))
    with pytest.raises(SystemExit):
        pareto(Path("teacher"), Path("table"), "200", ["snl"], test=True, **SHORT)
    refused(capsys, "3x20x20")
    assert not Path("table").exists()


def test_settings_that_cannot_be(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for budgets, method, words in (("inf%", "autorep", "numbers separated by commas"), ("200", "senet:widths=0.5,a", "list of numbers"),
                                   ("200", "snl:search=0.5,threshold=-1", "threshold")):
        with pytest.raises(SystemExit):
            pareto(Path("teacher"), Path("table"), budgets, [method], **SHORT)
        refused(capsys, words)
    with pytest.raises(SystemExit):  # both widths are read, and the second is refused before anything is trained
        pareto(Path("teacher"), Path("table"), "200", ["senet:widths=0.5,0.3,beta=1"], **SHORT)
    assert "0.3 of the 4 channels" in capsys.readouterr().out and not Path("table").exists()
    reduced = replace_relus(load_network(Path("teacher"))[0], (3, 16, 16))
    facts = {"classes": ("cat", "dog"), "input_shape": (3, 16, 16), "partial": True}
    Path("reduced").write_bytes(serialise_network(reduced, network_info(**facts)))
    with pytest.raises(SystemExit):
        train(Path("out"), start=Path("reduced"), start_size=8, **SHORT)
    refused(capsys, "leave out --start-size")


def test_several_processes_reduce_together(place: Path) -> None:
    """torchrun with two processes on the CPU: all methods, gates that stop learning, and one process that writes."""
    (place / "run.py").write_text(
        "import sys, torch\nfrom pathlib import Path\nfrom model_opt.cli import pareto\nfrom model_opt.data import Split\n"
        "from model_opt.files import load_network\nfrom model_opt.methods import reduce\nfrom model_opt.training import Recipe, world\n"
        "from tests.samples import learnable\ntorch.set_num_threads(1)\n"
        "images = learnable(48)\nimages = Split(images.images[:, :, :16, :16], images.labels % 2, images.mean, images.std)\n"
        "teacher, _ = load_network(Path('teacher'))\n"
        "result = reduce(teacher, budget=200, data=(images, images), recipe=Recipe(epochs=2, batch=6, lr=0.01), folder=Path('autorep'))\n"
        "state = torch.cat([value.double().flatten() for value in result.model.state_dict().values()])\n"
        "torch.save(state, f'rank{world()[0]}')\n"
        "pareto(Path('teacher'), Path('table'), '200', ['snl', 'senet:widths=0.5', 'deepreduce'], epochs=1, batch=6, lr=0.01, test=True)\n"
        "torch.distributed.destroy_process_group()\n")
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load("rank0"), torch.load("rank1"))
    with Path("autorep/log.csv").open() as log:
        assert [int(row["relus"]) <= 200 for row in csv.DictReader(log)] == [True, True]
    rows = json.loads(Path("table/pareto.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["snl", "senet:widths=0.5", "senet:widths=0.5 (width0.5)", "deepreduce"]
    assert all(row["relus"] <= 200 for row in rows) and not list(place.rglob("*.part"))


def test_show_counts_and_draws(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a reduced network and of what it compiles to: the same counts, and a picture."""
    torch.manual_seed(0)
    network = replace_relus(load_network(Path("teacher"))[0], (3, 16, 16))
    layers = partial_activations(network)
    for layer in layers.values():
        layer.mask.copy_(torch.randint(0, 3, layer.mask.shape))
        layer.c2_shift.fill_(12)  # an untrained network of larger squares leaves the ring
    info = network_info(classes=("cat", "dog"), input_shape=(3, 16, 16), partial=True)
    Path("reduced").write_bytes(serialise_network(network, info))
    images = open_dataset(Path("data")).load_train()[0].normalised()
    save(compile_model(network, images, name="both", classes=info.classes, mean=MEAN, std=STD), Path("compiled"))
    capsys.readouterr()
    for file, name in ((Path("reduced"), "resnet18 width 4"), (Path("compiled"), "both")):
        show(file, plot=Path("masks.png"), as_json=True)
        shown = json.loads(capsys.readouterr().out)
        assert shown["name"] == name and len(shown["layers"]) == len(layers) == 17
        for row, layer in zip(shown["layers"], layers.values()):
            assert row["shape"] == list(layer.mask.shape)
            assert (row["relu"], row["square"], row["identity"]) == tuple(layer.count(kind) for kind in (RELU, SQUARE, IDENTITY))
        assert shown["total"]["relu"] == count_relus(network)
        assert Image.open("masks.png").size[0] > 500
        Path("masks.png").unlink()
        show(file)
        text = capsys.readouterr().out
        assert f"{count_relus(network):,}" in text and ("not in the file" in text) == (name == "both")
    for file, plot, words in (("teacher", None, "not reduced"), ("reduced", Path("masks.nothing"), "cannot write"), ("none", None, "none")):
        with pytest.raises(SystemExit):
            show(Path(file), plot=plot)
        refused(capsys, words)


def test_pareto_writes_a_table_and_a_picture(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pareto(Path("teacher"), Path("table"), "50%,200", ["snl", "autorep:degree=1,freeze=0.5"], lr=0.01, **SHORT)
    assert "wrote table/pareto.json" in capsys.readouterr().out
    rows = json.loads(Path("table/pareto.json").read_text())["rows"]
    total = count_all(load_network(Path("teacher"))[0], (3, 16, 16))
    assert [(row["method"], row["budget"]) for row in rows] == [(m, b) for m in ("snl", "autorep") for b in (total // 2, 200)]
    for row in rows:
        network, info = load_network(Path("table") / row["file"])
        assert count_relus(network) == row["relus"] == info.made_by["relus"] <= row["budget"]
        assert row["degree"] == (1 if row["method"] == "autorep" else 0)
    with Path("table/pareto.csv").open() as table:
        listed = list(csv.DictReader(table))
    assert [(row["label"], int(row["relus"])) for row in listed] == [(row["label"], row["relus"]) for row in rows]
    assert Image.open("table/pareto.png").size[0] > 500


def test_published_results_are_drawn_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("model_opt.show.plt.close", figures.append)
    rows = [{"label": label, "relus": relus, "validation_accuracy": 0.9, "test_accuracy": tested}
            for label, relus, tested in (("snl", 300, 0.8), ("snl", 100, 0.7), ("autorep", 0, None))]
    for chosen, published in ((rows, "cifar10"), (rows[:2], "")):
        draw_pareto(chosen, tmp_path / "p.png", "title", published)
    (ours, marks), (tested, none) = ([[line for line in figure.axes[0].get_lines() if line.get_label().startswith("published") == kind]
                                      for kind in (False, True)] for figure in figures)
    assert [line.get_label() for line in ours] == ["autorep", "snl"]
    assert list(ours[1].get_xdata()) == [100, 300] and list(ours[1].get_ydata()) == [90, 90]  # validation: one row has no test accuracy
    assert list(ours[0].get_xdata()) == [0] and [figure.axes[0].get_xscale() for figure in figures] == ["symlog", "log"]
    assert list(tested[0].get_ydata()) == [70, 80] and not none
    points = {(r.relus, r.accuracy) for r in PUBLISHED["cifar10"]}
    assert {point for line in marks for point in zip(line.get_xdata(), line.get_ydata())} == points
