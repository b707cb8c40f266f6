"""What the benchmarks compute from what they measured, and the pages they make of it; on figures made by hand, never on time."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import methods
from benchmarks import sweep as sweeping
from benchmarks.demo import with_all_relus
from benchmarks.latency import add_bytes, preprocessing_timelines, timelines
from benchmarks.load import _percentiles
from benchmarks.networks import random_model
from benchmarks.peers.parties import tcp_bytes
from benchmarks.report import MARKS, accuracy_table, latency_table, make_report, targets_table, training_table
from benchmarks.sweep import Point, fit_growth, limits, points, predict, seconds_on
from model_opt.files import serialise_network
from model_opt.networks import build
from model_opt.training import Score
from protocol.errors import InputError, StorageError
from protocol.links import LINKS
from protocol.plaintext import Plaintext
from protocol.plan import make_plan
from protocol.timeline import KINDS, PREPROCESSING_KINDS
from tests.samples import network_info
from tests.test_data import folders

TOTAL = 557_056


def sweep_row(relus: int = 12_900, link: str = "loopback", batch: int = 1, **other: Any) -> dict[str, Any]:
    squares = other.pop("squares", TOTAL - relus)
    online = 70 + relus * 0.6e-3 + (squares - TOTAL + relus) * 0.05e-3 + LINKS[link].least(18, 4_480_000, 4_460_000) * 1e3
    timeline = {kind: 1.0 for kind in KINDS if kind != "wait"} | {"client": 5.0, "link": 3.0}
    return {"network": "resnet18", "width": 64, "relus": relus, "squares": squares, "batch": batch, "link": link, "runs": 3, "rounds": 18,
            "fixed_point": {"comparison_bits": 17}, "plaintext_ms": 11.0, "online_ms": online, "online_ms_spread": [online - 2, online + 3],
            "preprocessing_ms": 200 + relus * 4e-3, "total_ms": 280 + relus * 5e-3,
            "total_ms_spread": [270 + relus * 5e-3, 999 + relus * 5e-3],
            "online_bytes_up": 8 * (relus + squares), "online_bytes_down": 8 * (relus + squares), "streams": 1,
            "preprocessing_bytes": {"dealer_to_client": 13_800_000 + 1_100 * relus},
            "on_link_ms": LINKS[link].least(18, 4_480_000, 4_460_000) * 1e3,
            "limits": {"int64_ms": 40.0, "linear_ms": 20.0, "aes_ms": 1.0, "serialisation_ms": 2.0, "bandwidth_ms": 0.0,
                       "dealing_ms": 150.0},
            "timeline": {"client": timeline, "server": timeline, "layers": [{"layer": "input", **timeline}, {"layer": "relu", **timeline}]},
            "preprocessing_timeline": {party: dict.fromkeys(PREPROCESSING_KINDS, 20.0) for party in ("client", "server", "dealer")},
            "cpu": "a CPU, 2 cores", "load_average": [0.1, 0, 0], "versions": {"torch": "2"}, "date": "2026-01-01", "commit": "abc"} | other


def test_the_sweep_varies_one_dimension_at_a_time() -> None:
    chosen = points(["resnet18", "resnet34"], [64, 32], [12_900, 0, None], [1.0, 0.0], [1, 8], ["loopback", "wan"])
    base = Point("resnet18", 64, 12_900, 1.0, 1, "loopback")
    assert chosen[0] == base
    assert len(chosen) == len(set(chosen)) == 2 * (3 + 1 + 1 + 1 + 1)
    assert Point("resnet18", 64, 0, 0.0, 1, "loopback") in chosen
    assert Point("resnet18", 64, None, 1.0, 1, "wan") in chosen
    assert {Point("resnet34", 64, 12_900, 1.0, 1, link) for link in ("loopback", "wan")} <= {*chosen}
    assert str(Point("resnet34", 64, None, 0.5, 8, "lan")) == "resnet34 w64, all ReLUs, 50% of the others square, batch 8, lan"


def test_slopes_are_fitted_to_comparable_rows_only() -> None:
    rows = [sweep_row(), sweep_row(0), sweep_row(50_000), sweep_row(100_000), sweep_row(0, squares=300_000), sweep_row(0, squares=9),
            sweep_row(batch=8, online_ms=9_999.0), sweep_row(TOTAL, fixed_point={"comparison_bits": 20}, online_ms=9_999.0),
            sweep_row(link="wan"), sweep_row(50_000, link="wan")]
    fits = fit_growth(rows)
    assert set(fits) == {"ReLU, loopback", "ReLU, wan", "square, loopback"}
    assert fits["ReLU, loopback"]["online_us"]["slope"] == pytest.approx(0.6, rel=1e-3)
    assert fits["ReLU, loopback"]["preprocessing_bytes"] == {"slope": 1100.0, "error": 0.0, "start": 13_800_000.0, "residual": 0.0}
    assert fits["ReLU, loopback"]["to"] == 100_000
    assert fits["square, loopback"]["online_bytes"]["slope"] == pytest.approx(16)
    assert fits["square, loopback"]["online_us"]["slope"] == pytest.approx(0.05, rel=1e-3)


def test_a_link_is_foretold_from_loopback() -> None:
    rows = [sweep_row(), sweep_row(link="wan"), sweep_row(0, link="wan")]
    predict(rows)
    size = rows[1]["online_bytes_up"]
    assert rows[1]["predicted_ms"] == pytest.approx(18 * 83 + 8e3 * size / 100e6 + rows[0]["online_ms"], abs=0.1)
    assert "predicted_ms" not in rows[0] and "predicted_ms" not in rows[2]  # nothing to compare with


def test_waiting_is_split_into_the_clients_work_and_the_link() -> None:
    client = [{"layer": "input", "setup": 9.0, "elementwise": 1.0, "send": 1.0},
              {"layer": "relu", "wait": 50.0, "squares": 3.0, "comparison": 4.0, "send": 1.0}, {"layer": "output", "wait": 20.0}]
    server = [{"layer": "input", "setup": 10.0, "wait": 6.0}, {"layer": "relu", "linear": 40.0, "comparison": 4.0, "wait": 5.0},
              {"layer": "output", "linear": 5.0, "send": 1.0}]
    run = {"timeline": client, "server_timeline": server, "seconds": 0.089, "streams": 1}
    result = timelines([run, run])
    # in "relu" 5 + 4 ms pass from message to answer, 8 of them the client works, the ways take 0.5 each; the first is within the 4 ms
    assert (result["server"]["client"], result["server"]["link"]) == (2 + 4.5, 4 + 0.5)
    assert result["server"]["linear"] == 45
    assert result["client"]["wait"] == 70
    assert result["coverage"] == {"client": 1.0, "server": pytest.approx(71 / 89, abs=1e-3)}
    assert sum(v for k, v in result["layers"][1].items() if k != "layer") == 49
    two = timelines([run | {"streams": 2}])
    assert two["server"]["linear"] == 22.5  # sums over the streams, told for one


def test_preprocessing_is_told_for_all_parties() -> None:
    layers = [{"layer": "relu", "setup": 10.0, "linear": 30.0}, {"layer": "output", "linear": 5.0, "wait": 3.0}]
    run = {"timeline": layers, "server_timeline": layers[:1], "dealer_timeline": [], "seconds": 0.048}
    told = preprocessing_timelines([run, run, run | {"timeline": layers[1:]}])
    assert told["client"] == dict.fromkeys(PREPROCESSING_KINDS, 0.0) | {"setup": 10.0, "linear": 35.0, "wait": 3.0}
    assert told["server"]["linear"] == 30 and set(told["dealer"].values()) == {0.0}
    assert told["coverage"] == {"client": 1.0, "server": pytest.approx(40 / 48, abs=1e-4), "dealer": 0.0}


def test_bytes_of_all_layers_are_those_of_the_inference() -> None:
    plan = make_plan(random_model("resnet18", 4, 100).public, 2)
    layers = [{"layer": name} for name in ["input", *(step.layer.name for step in plan.activations), "output"]]
    add_bytes(layers, plan)
    sums = [sum(layer[key] for layer in layers) for key in ("bytes_up", "bytes_down")]  # type: ignore[misc]
    assert sums == [plan.online_bytes_up, plan.online_bytes_down]


def test_the_kernels_count_of_bytes_leaves_no_file_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far, Path(__file__).open():
            before, files = tcp_bytes(), len(os.listdir("/proc/self/fd"))
            near.sendall(bytes(1000))
            far.recv(1000)
            assert [now - then for now, then in zip(tcp_bytes(), before)] == [1000, 1000]
            assert len(os.listdir("/proc/self/fd")) == files


def test_a_sweep_that_stops_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(model: Any, network: str, width: int, **how: Any) -> dict[str, Any]:
        measured.append(how["batch"])
        if how["batch"] == 3:
            raise KeyboardInterrupt
        return sweep_row(batch=how["batch"])

    monkeypatch.setattr(sweeping, "measure", measure)
    monkeypatch.setattr(sweeping, "limits", lambda *_: {})
    kept: list[dict[str, Any]] = []
    chosen = points(["resnet18"], [4], [10], [1.0], [1, 2, 3], ["loopback"])
    with pytest.raises(KeyboardInterrupt):
        sweeping.run_sweep(chosen, 1, lambda _: None, lambda result: kept.append(json.loads(json.dumps(result))))
    assert [row["batch"] for row in kept[-1]["rows"]] == [1, 2] and kept[-1]["left_out"] == [] and "commit" in kept[-1]
    monkeypatch.setattr(sweeping, "INFERENCE_S", -1.0)
    with pytest.raises(ValueError, match=r"the base, takes .* put another link or count first"):
        sweeping.run_sweep(chosen, 1, lambda _: None)


def write_network(path: Path, seed: int = 0, **made_by: Any) -> Path:
    """A trained all-ReLU network's file."""
    torch.manual_seed(seed)
    facts = {"command": "train", "epochs": 2, "minutes": 1.0, "hardware": "a CPU", "seed": seed, "validation_accuracy": 0.1} | made_by
    info = network_info(classes=("cat", "dog"), input_shape=(3, 16, 16), made_by=facts)
    path.write_bytes(serialise_network(build("resnet18", 4, 2), info))
    return path


def test_methods_measure_a_network_once_and_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what takes real processes is left out."""
    folders(tmp_path / "data")
    served: list[Path] = []

    def measure_accuracy(model: Path, *_: Any) -> dict[str, Any]:
        served.append(model)
        return {"private_accuracy": 0.1, "images": 3, "fixed_point_accuracy": 0.1, "private_fixed_point_agreement": 1.0}

    monkeypatch.setattr(methods, "measure_accuracy", measure_accuracy)
    monkeypatch.setattr(methods, "measure", lambda *_, **__: sweep_row() | {"rounds": 18})
    monkeypatch.setattr(methods, "fixed_point_score", lambda *_: Score(0.5, 1.0))
    kept: list[list[str]] = []

    def measure(paths: list[Path], done: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return methods.measure_methods(paths, tmp_path / "data", 3, 1, done, lambda _: None,
                                       lambda rows: kept.append([r["file"] for r in rows]))

    def measure_sized(data: Path, path: Path) -> dict[str, Any]:
        (found,) = methods.measure_methods([path], data, 3, 1, [], lambda _: None, lambda _: None, size=16)
        return found

    first, second = (write_network(tmp_path / name, seed) for seed, name in enumerate(("a", "b")))
    (row,) = measure([first], [])
    assert row["label"] == "all ReLUs" and row["relus"] == row["budget"] > 8_000 and row["degree"] is None and row["dataset"] == "folder"
    assert 0 <= row["test_accuracy"] <= 1 and row["test_images"] > 1 and {"commit", "cpu", "sha256"} <= set(row)
    old = row | {"online_ms": -1.0, "test_accuracy": 2.0}
    rows = measure([second, first], [old])
    assert [r["file"] for r in rows] == ["a", "b"] and len(served) == 2
    assert rows[0]["test_accuracy"] == 2.0 and rows[0]["online_ms"] == row["online_ms"]  # of a network named again, the latency only
    assert kept == [["a"], ["a", "b"], ["a", "b"]] and old["online_ms"] == -1.0
    big = measure_sized(folders(tmp_path / "big", size=(20, 20)), first)
    assert big["sha256"] == row["sha256"] and big["test_images"] == row["test_images"]  # resized to what the network takes
    write_network(first, 2)
    assert [r["file"] for r in measure([first], rows)] == ["a", "b", "a"]  # another network of the same name
    (tmp_path / "results").mkdir()
    longer = rows[0] | {"epochs": 99, "test_accuracy": 0.1234}
    (tmp_path / "results" / "methods.json").write_text(json.dumps({"rows": [*rows, longer]}))
    document = tmp_path / "document.md"
    document.write_text(marked("methods", "accuracy"))
    assert (tmp_path / "out" / "accuracy.png") in make_report(tmp_path / "results", tmp_path / "out", [document])
    whole, short = document.read_text().split(MARKS[1])[:2]
    assert whole.count("| all ReLUs | resnet18 w4 |") == 3 and "| a CPU |" in whole
    assert short.count("| all ReLUs | resnet18 w4 |") == 2 and "| 12.34 |" in short  # of each the one that was trained longest
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no folder of"):
        measure([tmp_path / "empty"], [])
    empty = write_network(tmp_path / "old")
    empty.write_bytes(serialise_network(build("resnet18", 4), network_info()))
    with pytest.raises(InputError, match="no folder of"):
        measure([empty], [])


def test_a_full_disk_leaves_the_last_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.cli import _keeper, _store

    out = tmp_path / "load.json"
    _keeper(out)({"rows": [1]})
    assert json.loads((tmp_path / "load-unfinished.json").read_text()) == {"rows": [1]} and not out.exists()
    _store({"rows": [1, 2]}, out, False)
    assert json.loads(out.read_text())["rows"] == [1, 2] and [path.name for path in tmp_path.iterdir()] == ["load.json"]

    def full(path: Path, data: bytes) -> None:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        _store({"rows": []}, out, False)
    assert json.loads(out.read_text())["rows"] == [1, 2] and [path.name for path in tmp_path.iterdir()] == ["load.json"]


def test_peers_that_stop_leave_the_rows_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmarks.latency as module

    def run_peers(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {"name": "spu-aby3", "skipped": "no reason"}
        yield {"name": "crypten-tfp", "online_ms": [2.0, 1.0, 4.0], "bytes": 5, "hides_image_from_server": False, "setup_ms": 3.0}
        raise KeyboardInterrupt

    ours = dict.fromkeys(("network", "width", "relus", "plaintext_ms", "plaintext_ms_spread", "plaintext_runs", "online_tcp_bytes",
                          "preprocessing_tcp_bytes", "online_ms", "online_ms_spread", "preprocessing_ms", "total_ms", "setup_ms",
                          "setup_bytes", "rounds", "runs", "max_abs_error", "agreement", "load_average", "versions", "cpu", "commit",
                          "date"), 1)
    monkeypatch.setattr(module, "measure", lambda *_, **__: ours)
    monkeypatch.setattr(module, "run_peers", run_peers)
    kept: list[list[str]] = []
    with pytest.raises(KeyboardInterrupt):
        module.run_side_by_side(random_model("resnet18", 4, 10), "resnet18", 4, [], 3, lambda _: None,
                                lambda result: kept.append([f"{r['name']} {r.get('online_ms')}" for r in result["rows"]]))
    assert [len(names) for names in kept] == [2, 3, 4] and kept[-1][-2:] == ["spu-aby3 None", "crypten-tfp 2.0"]


def test_percentiles_lie_between_the_values_seen() -> None:
    assert _percentiles([]) == {"p50": 0.0, "p99": 0.0}
    assert _percentiles([0.1, 0.2]) == {"p50": 150.0, "p99": 199.0}


def test_links_that_would_take_minutes_are_told_beforehand() -> None:
    model = random_model("resnet18", 8, 1000)
    plan = make_plan(model.public, 1)
    keys = sum(plan.key_bytes(step) for step in plan.activations)
    assert 8 * keys / 20e6 < seconds_on(LINKS["mobile"], plan) - plan.rounds * 0.06 < 8 * (keys + 100 * 69_632) / 20e6
    found = limits(model, 1, LINKS["lan"])
    assert all(value > 0 for value in found.values())
    assert found["bandwidth_ms"] == pytest.approx(8e3 * plan.online_bytes_up / 1e9, abs=1e-3)


def test_a_share_of_the_pixels_squares() -> None:
    model = random_model("resnet18", 8, 1000, 0.5)
    plan = make_plan(model.public, 1)
    assert plan.model.relus == 1000
    assert sum(step.squares for step in plan.activations) == (69_632 - 1000) // 2
    assert plan.online_bytes_down == 8 * (10 + 1000 + (69_632 - 1000) // 2)
    assert model.public.input_shape == (3, 32, 32)
    image = torch.rand(1, 3, 32, 32)
    assert torch.isfinite(Plaintext(model)(image)).all()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    rows = [sweep_row(), sweep_row(0), sweep_row(TOTAL), sweep_row(batch=32, online_ms=1757.0), sweep_row(link="wan"),
            sweep_row(0, link="wan")]
    predict(rows)
    sweep = {"rows": rows, "fits": fit_growth(rows), "links": {"wan": {"rtt_s": 0.0801, "bits_per_s": 99e6}}, "left_out": ["x: 99 s"],
             "command": "relucent-bench sweep"} | {key: rows[0][key] for key in ("cpu", "load_average", "versions", "date", "commit")}
    facts = {key: sweep[key] for key in ("cpu", "load_average", "versions", "date", "commit")}
    times = {"online_ms": 100.0, "online_ms_spread": [90.0, 110.0], "runs": 3}
    peers = {"network": "resnet18", "width": 64, "rows": [
        {"name": "plaintext", "label": "plaintext", "total_ms": 10.0, "hides_image": False, **times},
        {"name": "relucent", "label": "Relucent", "total_ms": 300.0, "bytes": 9e6, "total_bytes": 37e6, "hides_image": True, **times},
        {"name": "spu-semi2k", "label": "SPU", "total_ms": 9000.0, "bytes": 279e6, "total_bytes": 279e6, "hides_image": True,
         "setup_ms": 2000.0, "setup_bytes": 9e6, "notes": "a; b", **times | {"online_ms": 9000.0}},
        {"name": "tenseal", "label": "TenSEAL", "total_ms": 3000.0, "bytes": 1e6, "total_bytes": 1e6, "hides_image": True,
         "same_network": False, **times},
        {"name": "crypten-ttp", "label": "CrypTen", "skipped": "no network"}], **facts}
    both = {"p50": 50.0, "p99": 70.0}
    load = {"model": "m", "relus": 8192, "server_processes": 1, "rows": [
        {"clients": n, "images_per_s": 5.0, "online_ms": both, "with_preprocessing_ms": both, "inferences": 75, "refused": 0, "errors": {},
         "peak_rss_mb": {"server": 600.0, "dealer": 500.0}} for n in (1, 4)], **facts}
    for name, result in (("sweep", sweep), ("peers", peers), ("load", load)):
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


def marked(*names: str) -> str:
    """A document that asks for these tables."""
    return "before\n" + "\nbetween\n".join(f"{MARKS[0].format(name)}\nstale\n{MARKS[1]}" for name in names) + "\nafter\n"


def test_the_report_and_the_tables(results: Path, tmp_path: Path) -> None:
    readme, guide = tmp_path / "README.md", tmp_path / "guide.md"
    readme.write_text(marked("latency", "sweep", "peers"))
    guide.write_text(marked("load"))
    written = make_report(results, tmp_path / "out", [readme, guide])
    assert {path.name for path in written} == {"growth.png", "time.png", "peers.png", "load.png", "report.html", "README.md", "guide.md"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and text.count("\nbetween\n") == 2 and "stale" not in text
    assert "| SPU | 3 | 9,000 (90-110) | 9,000 | 30.0x | 90.0x | 279.0 | 7.5x | 2.0 s, 9 MB | yes | a |" in text
    assert "| TenSEAL | 3 | 100 (90-110) | 3,000 |  |  | 1.0 |  |" in text
    assert "skipped: no network" in text and "Left out: x: 99 s." in text
    assert "| 0 | 557,056 | resnet18 w64 | 1 | 70 | 1,868 | 6.4x |" in text
    assert "| 0 | 70 | 1,868 | 6.4x |" in text
    assert "| clients | images/s |" in guide.read_text() and "stale" not in guide.read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "Left out: x: 99 s." in page
    assert "http" not in page  # self-contained
    make_report(results, tmp_path / "out", [readme, guide])
    assert readme.read_text() == text  # again gives the same


@pytest.mark.parametrize(("text", "words"), [
    ("no marks", "lacks the marks"), (marked("methods"), "no results"), (marked("else"), "no results"),
    (marked("load").replace(MARKS[1], ""), "lacks the marks")])
def test_a_document_that_cannot_be_filled_stays(results: Path, tmp_path: Path, text: str, words: str) -> None:
    document = tmp_path / "document.md"
    document.write_text(text)
    with pytest.raises(InputError, match=words):
        make_report(results, tmp_path / "out", [document])
    assert document.read_text() == text


def test_time_to_accuracy_adds_epochs_up(tmp_path: Path) -> None:
    log = tmp_path / "training-net.csv"
    log.write_text("epoch,loss,validation_accuracy,seconds\n1,2,0.7,60\n2,1,0.86,120\n3,1,0.84,60\n")
    assert training_table([log])[-1] == "| net | 3 | 4 | 3 | 3 |  |  |  | 84.0 |"


def test_missed_aims_are_said(results: Path) -> None:
    lines = "\n".join(targets_table(json.loads((results / "sweep.json").read_text())))
    assert "| online images per second, batch 32 against 1 | at least 3x | 1.4" in lines and "**no**" in lines
    assert "| material that one dealer makes, sending apart | at least 3 inferences a second | 6.67 a second | yes |" in lines


def test_aims_are_of_their_own_base_and_batch(results: Path) -> None:
    sweep = json.loads((results / "sweep.json").read_text())
    alone = sweep | {"rows": [row for row in sweep["rows"] if row["batch"] == 1]}
    assert not any("images per second" in line for line in targets_table(alone)) and len(targets_table(alone)) > 4
    (line,) = targets_table(sweep | {"rows": [row for row in sweep["rows"] if row["link"] == "wan"]})
    assert "on wan" in line


def test_rows_of_several_data_sets_and_image_counts_are_told_apart() -> None:
    row = {"label": "snl", "method": "snl", "network": "resnet18", "width": 16, "relus": 9, "budget": 9, "seed": 0, "epochs": 6,
           "test_accuracy": 0.5, "fixed_point_accuracy": 0.5, "private_accuracy": 0.5, "private_images": 1000, "online_bytes": 1e6,
           "online_ms": 61.7, "dataset": "cifar10", "settings": {}, "validation_accuracy": 0.5}
    rows = {"rows": [row, row | {"dataset": "cifar100", "private_images": 100}]}
    lines = accuracy_table(rows)
    assert "private, first 100 or 1,000" in lines[0] and [line.split(" | ")[1] for line in lines[2:]] == [
        "resnet18 w16, cifar10", "resnet18 w16, cifar100"]
    assert accuracy_table({"rows": [row]})[2].split(" | ")[1] == "resnet18 w16"
    besides = [{"command": "reduce", "relus": 5, "epochs": 3}, {"command": "train", "epochs": 4}]
    later = [{"command": "average", "epochs": 0, "relus_of": "a digest", "besides": besides}, {"command": "train", "epochs": 8}]
    (line,) = accuracy_table({"rows": [row | {"later": later}]})[2:]
    averaged = [{"command": "train", "epochs": 0}, {"command": "average", "epochs": 0}]
    for accuracy in (0.4, 0.6):  # of one that was trained and its average, the latter, whichever the test images like
        (chosen,) = accuracy_table({"rows": [row | {"later": averaged[:1]}, row | {"later": averaged, "test_accuracy": accuracy}]})[2:]
        assert chosen.startswith("| snl, weights averaged | ") and " | 62 | 1.00 | " in chosen
    assert line.startswith("| snl, then 12 epochs with the ReLUs fixed, weights averaged, also with those of 5 ReLUs | ")


def test_all_relus_are_compared_as_widely_as_in_a_network_that_has_some() -> None:
    model = random_model("resnet18", 4, 0)
    assert model.public.fixed_point.comparison_bits == 4 and with_all_relus(model).public.fixed_point.comparison_bits == 19


def test_a_point_may_be_left_out_on_the_base_link() -> None:
    rows = [sweep_row(link="mobile"), sweep_row(link="lan"), sweep_row(TOTAL, link="lan")]
    lines = latency_table({"rows": rows})
    assert lines[2].startswith("| 12,900 | ") and lines[3].startswith("| 557,056 |  | ")


def test_a_report_of_nothing_or_of_a_damaged_file(results: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results"):
        make_report(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "plain.md").write_text("nothing")
    with pytest.raises(InputError, match="lacks the marks"):
        make_report(results, tmp_path / "out", [tmp_path / "plain.md"])
    (results / "load.json").write_text("{")
    with pytest.raises(InputError, match=r"load\.json is no JSON"):
        make_report(results, tmp_path / "out")
