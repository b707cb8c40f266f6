"""The programs as users run them: real processes, exit codes, and one clear line for a mistake."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.networks import random_model
from benchmarks.processes import Roles, serving
from protocol.links import LINKS
from protocol.model import Model, save
from protocol.terminal import exit_on_error

BUNDLED = Path(__file__).resolve().parent.parent / "models" / "cifar10-resnet18-w32.safetensors"
APPS = {"client": "client.cli:app", "server": "server.cli:server_app", "dealer": "server.cli:dealer_app",
        "opt": "model_opt.cli:app", "bench": "benchmarks.cli:app"}


def program(name: str, *arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    module, app = APPS[name].split(":")
    command = [sys.executable, "-c", f"from {module} import {app} as app; app()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture(scope="module")
def model_path(mixed_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save(mixed_model, path)
    return path


@pytest.fixture(scope="module")
def roles(model_path: Path) -> Iterator[Roles]:
    with serving(model_path) as running:
        yield running


def image(folder: Path, size: int = 8) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / "i.png")
    return folder / "i.png"


def test_three_processes_classify(roles: Roles, tmp_path: Path, mixed_model: Model) -> None:
    peers = ["--server", roles.server, "--dealer", roles.dealer, "--insecure", "--cache", tmp_path / "cache"]
    done = program("client", "classify", image(tmp_path), tmp_path / "i.png", *peers, "--json")
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["model_id"] == mixed_model.public.model_id
    assert [r["label"] for r in out["results"]] == [out["results"][0]["label"]] * 2
    text = program("client", "classify", image(tmp_path, 20), *peers)
    assert text.returncode == 0
    assert "resized from 20x20 to 8x8" in text.stderr
    assert out["results"][0]["label"] in mixed_model.public.classes


def mistake(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if re.match(r"relucent-\w+: error: ", line)]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_client_mistakes(roles: Roles, tmp_path: Path) -> None:
    peers = ["--server", roles.server, "--dealer", roles.dealer, "--cache", tmp_path]
    (tmp_path / "text.png").write_text("no image")
    mistake(program("client", "classify", tmp_path / "text.png", *peers, "--insecure"), 2, "no readable image", "hint")
    mistake(program("client", "classify", tmp_path / "none.png", *peers, "--insecure"), 2, "does not exist")
    mistake(program("client", "classify", image(tmp_path), *peers), 1, "no secure connection", "hint")
    mistake(program("client", "classify", image(tmp_path), *peers, "--insecure", "--certificate", "a", "--key", "b"), 2, "plaintext")
    nowhere = ["--server", "127.0.0.1:9", "--dealer", "127.0.0.1:9", "--insecure"]
    mistake(program("client", "classify", image(tmp_path), *nowhere), 1, "unreachable", "hint")
    mistake(program("client", "classify", tmp_path / "none.png", *nowhere), 2, "does not exist")
    swapped = ["--server", roles.dealer, "--dealer", roles.server, "--insecure"]
    mistake(program("client", "classify", image(tmp_path), *swapped), 1, "no Relucent service")


def test_server_mistakes(roles: Roles, tmp_path: Path, model_path: Path) -> None:
    options = ["--dealer", roles.dealer, "--listen", "127.0.0.1:0", "--insecure"]
    data = model_path.read_bytes()
    for name, content in {"truncated": data[:1000], "other": b"x" * 500}.items():
        (tmp_path / name).write_bytes(content)
        mistake(program("server", "serve", tmp_path / name, *options), 2, "truncated or corrupt", "hint")
    changed = data.replace(b'\\"version\\": 1', b'\\"version\\": 7')
    assert changed != data
    (tmp_path / "newer").write_bytes(changed)
    mistake(program("server", "serve", tmp_path / "newer", *options), 2, "version 7")
    mistake(program("server", "serve", tmp_path / "none", *options), 2, "missing")
    mistake(program("server", "serve", model_path, "--dealer", roles.dealer), 2, "no certificate", "--help")
    mistake(program("server", "serve", model_path, "--dealer", roles.dealer, "--insecure", "--listen", roles.server), 1, "cannot listen")


def test_sigterm_stops_cleanly(model_path: Path) -> None:
    from benchmarks.processes import role_command

    command = role_command("dealer", "serve", "--insecure", "--listen", "127.0.0.1:0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as dealer:
        assert dealer.stdout is not None
        assert dealer.stdout.readline().startswith("dealing on 127.0.0.1:")
        dealer.send_signal(signal.SIGTERM)
        assert dealer.wait(15) == 0


def test_opt_mistakes(tmp_path: Path, model_path: Path) -> None:
    mistake(program("opt", "train", "--data", tmp_path, "--out", tmp_path / "o"), 2, "is missing", "--download")
    mistake(program("opt", "reduce", "--teacher", tmp_path / "none", "--budget", 10, "--out", tmp_path / "o"), 2, "does not exist")
    mistake(program("opt", "evaluate", model_path, "--data", tmp_path), 2, "is missing")
    from model_opt.files import serialise_network
    from model_opt.networks import build
    from tests.samples import network_info

    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(serialise_network(build("resnet18", 4), network_info()))
    for budget, word in ((-1, "negative"), (10**9, "exceeds"), (10**9, "hint: pass 0 to")):
        done = program("opt", "reduce", "--teacher", teacher, "--budget", budget, "--out", tmp_path / "o", "--data", tmp_path)
        mistake(done, 2, word)
    mistake(program("opt", "compile", tmp_path / "none", "--out", tmp_path / "o"), 2, "does not exist")


LIMITED_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
"""Files of this process may not grow beyond 20 kB: every larger write fails as on a full disk."""


def test_full_disk_while_training_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    from tests.samples import write_cifar

    write_cifar(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    code = (
        "from model_opt.training import *; from tests.samples import learnable; from model_opt.networks import build\n"
        f"fit(build('resnet18', 4), learnable(64), learnable(10), Recipe(epochs=1, batch=32), __import__('pathlib').Path({str(run)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", LIMITED_DISK + code], capture_output=True, text=True, timeout=120)
    assert "TrainingFailure: cannot write" in done.stderr, done.stderr
    assert list(run.iterdir()) == []  # nothing half-written


def test_full_disk_while_compiling(tmp_path: Path) -> None:
    from model_opt.files import serialise_network
    from model_opt.networks import build
    from tests.samples import network_info, write_cifar

    write_cifar(tmp_path)
    (tmp_path / "n").write_bytes(serialise_network(build("resnet18", 4), network_info()))
    run = "from model_opt.cli import app; app()"
    options = ["compile", str(tmp_path / "n"), "--data", str(tmp_path), "--images", "2", "--out", str(tmp_path / "o" / "m")]
    done = subprocess.run([sys.executable, "-c", LIMITED_DISK + run, *options], capture_output=True, text=True, timeout=120)
    mistake(done, 1, "cannot write")
    assert list((tmp_path / "o").iterdir()) == []
    assert subprocess.run([sys.executable, "-c", run, *options], capture_output=True, timeout=120).returncode == 0


def test_latency_prints_every_figure(model_path: Path) -> None:
    done = program("bench", "latency", "--model", model_path, "--runs", 2, "--no-crypten", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    wanted = {"network", "width", "relus", "activations", "activation_layers", "batch", "runs", "plaintext_ms", "online_ms",
              "online_ms_spread", "preprocessing_ms", "crypten_ms", "online_bytes_up", "online_bytes_down", "preprocessing_bytes",
              "rounds", "crypten_bytes", "crypten_rounds", "max_abs_error", "agreement", "peak_rss_mb", "versions", "cpu"}
    assert wanted <= set(figures)
    assert figures["max_abs_error"] <= figures["rounding_bound"]
    assert figures["agreement"] == 1.0
    assert set(figures["peak_rss_mb"]) == {"client", "server", "dealer"}
    mistake(program("bench", "latency", "--relus", "-5", "--width", 4), 2, "negative")
    mistake(program("bench", "latency", "--relus", "10000000", "--width", 4), 2, "exceeds")
    mistake(program("bench", "latency", "--relus", "some"), 2, "no number")
    mistake(program("bench", "demo", "--model", model_path.parent / "none"), 2, "missing")
    mistake(program("bench", "sweep", "--links", "lan", "--emulation", "tbf", "--out", model_path.parent / "s"), 2, "emulation 'tbf'")


def test_planning_does_not_import_a_compiler(model_path: Path) -> None:
    """PyTorch's took each of three programs two seconds before its first inference."""
    code = ("import sys; from pathlib import Path; from protocol.model import load; from protocol.plan import make_plan\n"
            f"for name in {[str(BUNDLED), str(model_path)]}: make_plan(load(Path(name)).public, 1)\n"
            "print('sympy' in sys.modules, 'torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_demonstration_classifies_every_image_and_compares_costs(tmp_path: Path) -> None:
    """With as many layers as the bundled network has: the client tells more of them than a pipe holds."""
    save(random_model("resnet18", 4, 100), tmp_path / "m")
    done = program("bench", "demo", "--model", tmp_path / "m", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert len(shown["images"]) == 10
    assert sum(row["private"] == row["plaintext"] for row in shown["images"]) >= 9
    assert shown["reduced"]["relus"] == 100 and shown["all_relu"]["relus"] > 8000
    assert shown["all_relu"]["dealer_to_client_bytes"] > 10 * shown["reduced"]["dealer_to_client_bytes"]


def bench(folder: Path, name: str, *arguments: object) -> dict[str, Any]:
    """What a measuring command prints with --json, and the same that it stores."""
    done = program("bench", name, *arguments, "--out", folder / f"{name}.json", "--json", timeout_s=300)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((folder / f"{name}.json").read_text())
    assert printed["command"].startswith(f"relucent-bench {name}") and {"cpu", "commit", "date", "versions", "load_average"} <= set(printed)
    return dict(printed)


def test_measuring_commands_give_what_the_report_draws(model_path: Path, tmp_path: Path) -> None:
    sweep = bench(tmp_path, "sweep", "--relus", 50, "--networks", "resnet18", "--squares", "100,50", "--widths", 4, "--batches", 1,
                  "--links", "loopback,lan", "--runs", 1)
    assert [(r["relus"], r["link"]) for r in sweep["rows"]] == [(relus, link) for link in ("loopback", "lan") for relus in (50, 0)]
    assert sweep["rows"][2]["online_ms"] > 1e3 * 18 * LINKS["lan"].rtt_s and sweep["rows"][2]["predicted_ms"] > 0
    assert set(sweep["links"]) == {"lan"} and all(row["agreement"] == 1 for row in sweep["rows"])
    peers = bench(tmp_path, "peers", "--peers", "crypten-tfp", "--width", 4, "--relus", 50, "--runs", 1)
    assert [row["name"] for row in peers["rows"]] == ["plaintext", "relucent", "crypten-tfp"]
    assert [row["hides_image"] for row in peers["rows"]] == [False, True, False]
    load = bench(tmp_path, "load", "--clients", 2, "--seconds", 1, "--model", model_path)
    assert [row["clients"] for row in load["rows"]] == [2]
    assert all(row["inferences"] >= 1 and row["images_per_s"] > 0 and not row["errors"] for row in load["rows"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["load.json", "peers.json", "sweep.json"]  # nothing unfinished stays
    (tmp_path / "file").touch()
    mistake(program("bench", "report", "--results", tmp_path, "--out", tmp_path / "file"), 1, "cannot write", "hint")
    report = program("bench", "report", "--results", tmp_path, "--out", tmp_path / "report")
    assert report.returncode == 0, report.stderr
    assert {"report.html", "growth.png", "peers.png", "load.png"} <= {path.name for path in (tmp_path / "report").iterdir()}


def test_a_full_disk_is_one_line_wherever_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_error("relucent-bench")
    def command(number: int) -> None:
        raise OSError(number, os.strerror(number), "/tmp/model")

    with pytest.raises(SystemExit) as stopped:
        command(errno.ENOSPC)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines() == ["relucent-bench: error: cannot write /tmp/model: No space left on device",
                                                    "relucent-bench: hint: free some space"]
    with pytest.raises(OSError, match="Input/output"):  # of ours to explain, or a bug
        command(errno.EIO)
    with pytest.raises(SystemExit) as stopped:
        command(errno.EACCES)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["relucent-bench: error: cannot use /tmp/model: Permission denied",
                                                    "relucent-bench: hint: check the path and its permissions"]


def test_memory_that_runs_out_is_one_line_wherever_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_error("relucent-opt")
    def command(error: Exception) -> None:
        raise error

    for shortage in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")):
        with pytest.raises(SystemExit) as stopped:
            command(shortage)
        assert stopped.value.code == 1
        first, second = capsys.readouterr().err.splitlines()
        assert first == "relucent-opt: error: out of memory" and second.startswith("relucent-opt: hint: use a smaller batch")
    with pytest.raises(RuntimeError, match="another"):
        command(RuntimeError("another"))


@pytest.mark.parametrize(("name", "arguments", "words"), [
    ("opt", ["reduce", "--budget", "abc"], "--budget"), ("opt", ["reduce", "--budget", "12.5"], "valid integer"),
    ("opt", ["train"], "--out"), ("opt", ["redcue"], "redcue"), ("client", ["classify", "--timeout", "soon"], "--timeout"),
    ("server", ["token", "lend"], "lend"), ("dealer", ["serve", "--nowhere"], "--nowhere"), ("bench", ["latency", "--runs", "0"], "--runs"),
])
def test_mistakes_in_options_are_one_line_and_a_hint(name: str, arguments: list[str], words: str) -> None:
    done = program(name, *arguments)
    mistake(done, 2, words)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 2
    assert done.stderr.splitlines()[1].startswith(f"relucent-{name}: hint: see `relucent-{name}")


def test_no_arguments_ask_for_help() -> None:
    done = program("opt")
    assert done.returncode == 2 and "reduce" in done.stdout + done.stderr and "error" not in done.stderr
    assert program("opt", "reduce", "--help").returncode == 0


def test_measuring_mistakes_keep_the_stored_result(tmp_path: Path) -> None:
    stored = tmp_path / "sweep.json"
    stored.write_text("{}")
    mistake(program("bench", "sweep", "--links", "moon", "--out", stored), 2, "unknown link 'moon'", "hint")
    mistake(program("bench", "sweep", "--relus", "few", "--out", stored), 2, "no list of numbers", "hint")
    mistake(program("bench", "sweep", "--relus", 10**9, "--widths", 4, "--out", stored), 2, "exceeds")
    for option, value, words in (("--networks", "resnet18,resnet35", "unknown network 'resnet35'"), ("--relus", f"10,{10**9}", "exceeds"),
                                 ("--squares", "100,150", "above 100"), ("--batches", "1,300", "above 256"),
                                 ("--emulation", "tbf", "emulation 'tbf'")):  # before anything is measured
        mistake(program("bench", "sweep", "--widths", 4, "--relus", 10, "--links", "loopback", option, value, "--out", stored), 2, words)
    mistake(program("bench", "peers", "--peers", "nobody", "--out", stored), 2, "no peer 'nobody'", "hint")
    mistake(program("bench", "load", "--clients", 0, "--out", stored), 2, "below 1", "hint")
    assert stored.read_text() == "{}" and list(tmp_path.iterdir()) == [stored]
