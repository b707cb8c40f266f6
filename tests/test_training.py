"""The training loop: learning, exact resume, schedules, several processes, and clear failures."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import model_opt.training as module
from model_opt.files import NetworkFileError, load_network, serialise_network
from model_opt.networks import build
from model_opt.teachers import Ensemble, mentor
from model_opt.training import Recipe, TrainingError, TrainingFailure, distillation_loss, fit, reestimate_norms
from tests.samples import learnable, network_info


def test_training_learns_and_resumes_exactly(tmp_path: Path) -> None:
    train, validation = learnable(320), learnable(100)
    recipe = Recipe(epochs=4, batch=32, lr=0.05)

    def model() -> nn.Module:
        torch.manual_seed(0)
        network = build("resnet18", 4)
        network.flatten = nn.Sequential(network.flatten, nn.Dropout(0.1))  # type: ignore[arg-type]
        return network

    whole = model()
    score = fit(whole, train, validation, recipe, tmp_path / "whole")
    assert score > 0.3

    class Killed(Exception):
        pass

    original, calls = module.accuracy, []

    def dies(*args: object) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return original(*args)  # type: ignore[arg-type]

    halved = model()
    module.accuracy = dies  # type: ignore[assignment]
    try:
        with pytest.raises(Killed):
            fit(halved, train, validation, recipe, tmp_path / "halved")
    finally:
        module.accuracy = original
    resumed = model()
    assert fit(resumed, train, validation, recipe, tmp_path / "halved") == score
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert len((tmp_path / "halved" / "log.csv").read_text().splitlines()) == 5
    with pytest.raises(TrainingError, match=r"other settings \(lr\)"):
        fit(model(), train, validation, Recipe(epochs=4, batch=32, lr=0.06), tmp_path / "halved")
    (tmp_path / "halved" / "checkpoint.pt").unlink()
    fit(model(), train, validation, replace(recipe, epochs=1), tmp_path / "halved")
    assert len((tmp_path / "halved" / "log.csv").read_text().splitlines()) == 2  # the attempt that was given up is no part of it


def test_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(TrainingError, match="no readable checkpoint"):
        fit(build("resnet18", 4), learnable(64), learnable(10), Recipe(epochs=1, batch=32), tmp_path)


def test_nan_stops_with_the_step(tmp_path: Path) -> None:
    model = build("resnet18", 4)
    with torch.no_grad():
        model.fc.bias.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"loss nan, .* at step 0; there is no checkpoint yet"):
        fit(model, learnable(64), learnable(10), Recipe(epochs=1, batch=32), tmp_path)


def test_gradients_that_are_not_finite_stop_before_they_reach_the_weights(tmp_path: Path) -> None:
    """Of a finite loss, in the second epoch: neither the weights nor the checkpoint are touched."""
    model, calls = build("resnet18", 4), []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * math.nan if len(calls) == 3 else gradient

    model.fc.bias.register_hook(spoil)  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match=r"loss \d.*, gradient norm nan at step 2; the run can resume from .*checkpoint.pt"):
        fit(model, learnable(64), learnable(10), Recipe(epochs=2, batch=32), tmp_path)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 2


def test_norms_take_the_median_of_the_samples_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3))
    norm, sample = model[0], learnable(230)
    sample.images[:50] //= 2
    sample.images[50:100] //= 3
    reestimate_norms(model, sample, batch=50)  # the incomplete batch is left out
    parts = [sample[start : start + 50].normalised() for start in range(0, 200, 50)]
    assert torch.allclose(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in parts]).median(0).values, atol=1e-4)
    assert torch.allclose(norm.running_var, torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in parts]).median(0).values, atol=1e-4)
    assert norm.momentum == 0.1
    assert not model.training


def test_one_outlier_does_not_spoil_the_norms() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    clean = learnable(300)
    clean = replace(clean, images=clean.images // 8)
    spoilt = replace(clean, images=clean.images.clone())
    spoilt.images[70] = 255
    variances = []
    for sample in (clean, spoilt):
        reestimate_norms(model, sample, batch=50)
        variances.append(model[0].running_var.clone())
    assert torch.allclose(*variances, rtol=0.1)


def test_distillation_is_zero_for_equal_logits() -> None:
    logits = torch.randn(5, 10)
    assert float(distillation_loss(logits, logits, 4.0)) == pytest.approx(0, abs=1e-6)
    assert float(distillation_loss(logits, logits.flip(1), 4.0)) > 0


def test_the_teacher_is_not_changed(tmp_path: Path) -> None:
    """Neither its mode nor where its weights are and in what order: training works on a copy."""
    torch.manual_seed(0)
    student, teacher = build("resnet18", 4), build("resnet18", 4)
    before = {name: (value.data_ptr(), value.stride()) for name, value in teacher.state_dict().items()}
    fit(student, learnable(64), learnable(10), Recipe(epochs=1, batch=32), tmp_path, teacher=teacher)
    assert teacher.training
    assert {name: (value.data_ptr(), value.stride()) for name, value in teacher.state_dict().items()} == before


@pytest.mark.parametrize(("schedule", "first"), [("one-cycle", 0.0), ("cosine", 0.2)])
def test_schedules(schedule: str, first: float) -> None:
    recipe = Recipe(epochs=1, lr=0.2, schedule=schedule, warmup=0.25)
    rates = [recipe.rate(i / 100) for i in range(101)]
    assert rates[0] == pytest.approx(first, abs=0.005)
    assert max(rates) == pytest.approx(0.2, abs=1e-3)
    assert rates[-1] == pytest.approx(0)
    with pytest.raises(ValueError, match="unknown schedule"):
        Recipe(epochs=1, schedule="stairs")
    for settings, message in (({"lr": math.nan}, "lr must be a number"), ({"noise": math.inf}, "noise must"), ({"lr": -1}, "lr must"),
                              ({"shift": 0.6}, "shift may be 0.5"), ({"cutout": 1.5}, "cutout 1"), ({"warmup": 1.0}, "warmup below 1"),
                              ({"seed": 2**64}, "64 bits"), ({"clip": 0.0}, "clip must be above 0")):
        with pytest.raises(ValueError, match=message):
            Recipe(epochs=1, **settings)


def test_a_gradient_moves_the_weights_no_further_than_its_clipped_norm(tmp_path: Path) -> None:
    """Without momentum a step is at most lr times clip long, whatever the loss: one exploding image cannot undo an epoch."""
    class Exploding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = build("resnet18", 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(x)
            return 1e4 * logits

    def moved(clip: float) -> float:
        torch.manual_seed(0)
        model = Exploding()
        before = [value.detach().clone() for value in model.parameters()]
        recipe = Recipe(epochs=1, batch=32, lr=0.1, schedule="cosine", momentum=0.0, weight_decay=0.0, clip=clip)
        fit(model, learnable(32), learnable(10), recipe, tmp_path / str(clip))
        return math.sqrt(sum(float((now.detach() - then).square().sum()) for now, then in zip(model.parameters(), before)))

    assert moved(0.5) == pytest.approx(0.05, rel=1e-3)
    assert moved(5.0) == pytest.approx(0.5, rel=1e-3)


def test_images_grow() -> None:
    recipe = Recipe(epochs=1, start_size=16)
    sizes = [recipe.image_size(i / 100, 32) for i in range(101)]
    assert sizes[0] == 16
    assert sizes == sorted(sizes)
    assert set(sizes) == {16, 20, 24, 28, 32}
    assert sizes[80] == 32
    assert Recipe(epochs=1).image_size(0, 32) == 32


def test_small_images_first_trains_and_ends_at_full_size(tmp_path: Path) -> None:
    seen: list[int] = []
    model = build("resnet18", 4)
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-1]) if m.training else None)
    fit(model, learnable(320), learnable(50), Recipe(epochs=2, batch=32, lr=0.05, start_size=16), tmp_path)
    assert seen[0] == 16
    assert seen[-1] == 32


def test_images_that_are_not_square_keep_their_form_while_they_grow(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    model = build("resnet18", 4)
    model.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[-2:])) if m.training else None)
    wide = learnable(64)
    wide = replace(wide, images=wide.images[:, :, ::2])  # 16x32
    fit(model, wide, wide, Recipe(epochs=1, batch=8, lr=0.05, start_size=16), tmp_path)
    assert {(8, 16), (16, 32)} <= set(seen) and all(width == 2 * height for height, width in seen)


def test_images_too_small_for_a_network_are_refused(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch=8, start_size=8)
    with pytest.raises(TrainingError, match=r"cannot take images of 8x8: .*train on larger ones"):
        fit(build("vgg16-bn", 4), learnable(16), learnable(8), recipe, tmp_path)


def test_any_batch_of_a_sample_is_from_all_over_the_split() -> None:
    split = replace(learnable(1000), labels=torch.arange(1000))
    sample = split.sample(400)
    assert len(sample.labels.unique()) == 400 and len(split.sample(2000).labels.unique()) == 1000
    assert all(400 < float(sample[start : start + 100].labels.float().mean()) < 600 for start in range(0, 400, 100))
    assert torch.equal(sample.images, split.images[sample.labels])
    assert torch.equal(sample.labels, split.sample(400).labels)


def test_ema_takes_the_weights_place(tmp_path: Path) -> None:
    def run(ema: float) -> nn.Module:
        torch.manual_seed(0)
        model = build("resnet18", 4)
        fit(model, learnable(320), learnable(50), Recipe(epochs=2, batch=32, lr=0.05, ema=ema), tmp_path / str(ema))
        return model

    plain, averaged = run(0.0), run(0.9)
    assert not torch.equal(plain.fc.weight, averaged.fc.weight)  # type: ignore[union-attr,arg-type]
    assert torch.allclose(plain.fc.weight, averaged.fc.weight, atol=0.05)  # type: ignore[union-attr,arg-type]
    with pytest.raises(ValueError, match="ema"):
        Recipe(epochs=1, ema=1.0)


def test_shortages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="fewer than one batch"):
        fit(build("resnet18", 4), learnable(20), learnable(10), Recipe(epochs=1, batch=32), tmp_path)

    def exhausted(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(module, "distillation_loss", exhausted)
        with pytest.raises(TrainingError, match=r"out of memory at a batch of 32 images; use a smaller --batch"):
            fit(build("resnet18", 4), learnable(64), learnable(10), Recipe(epochs=1, batch=32), tmp_path, teacher=build("resnet18", 4))
    little = tmp_path / "meminfo"
    little.write_text("MemTotal: 9000 kB\nMemAvailable: 1000 kB\n")  # a batch of 32 takes 2,176 KiB at least: 34,816 activations
    with monkeypatch.context() as patch:
        patch.setattr(module, "MEMORY", little)
        with pytest.raises(TrainingError, match="a batch of 32 images takes at least 2 MiB, 0 MiB are free"):
            fit(build("resnet18", 4), learnable(64), learnable(10), Recipe(epochs=1, batch=32), tmp_path)
        fit(build("resnet18", 4), learnable(64), learnable(10), Recipe(epochs=1, batch=8), tmp_path / "smaller")
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(TrainingError, match="MiB free"):
        fit(build("resnet18", 4), learnable(64), learnable(10), Recipe(epochs=1, batch=32), tmp_path)


def test_several_processes_train_one_model(tmp_path: Path) -> None:
    """torchrun with two processes on the CPU: both end with the same weights, the first writes the log."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\n"
        "from model_opt.networks import build\nfrom model_opt.training import Recipe, fit, world\n"
        "from tests.samples import learnable\ntorch.manual_seed(0)\ntorch.set_num_threads(1)\nmodel = build('resnet18', 4)\n"
        "score = fit(model, learnable(320), learnable(100), Recipe(epochs=3, batch=32, lr=0.05), Path(sys.argv[1]))\n"
        "total = sum(float(p.double().abs().sum()) for p in model.parameters())\n"
        "Path(sys.argv[1], f'rank{world()[0]}').write_text(f'{total!r} {score}')\n"
        "torch.distributed.destroy_process_group()\n")
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root,
                          env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "rank0").read_text(), (tmp_path / "rank1").read_text()
    assert first == second
    assert float(first.split()[1]) > 0.2
    with (tmp_path / "log.csv").open() as log:
        assert len(list(csv.DictReader(log))) == 3


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 0.0), (16, 1e-3), (8, 0.02)])
def test_network_files(tmp_path: Path, bits: int, tolerance: float) -> None:
    torch.manual_seed(0)
    model = build("resnet18", 4).eval()
    data = serialise_network(model, network_info(), bits)
    (tmp_path / "n").write_bytes(data)
    again, info = load_network(tmp_path / "n")
    assert info == network_info()
    x = torch.randn(4, 3, 32, 32)
    expected = model(x)
    assert float((again(x) - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())
    assert len(data) < (70_000 if bits == 8 else 300_000)


def test_damaged_network_files(tmp_path: Path) -> None:
    with pytest.raises(NetworkFileError, match="does not exist"):
        load_network(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"x" * 100)
    with pytest.raises(NetworkFileError, match="damaged"):
        load_network(tmp_path / "x")
    (tmp_path / "x").write_bytes(serialise_network(build("resnet18", 4), network_info(width=5)))
    with pytest.raises(NetworkFileError, match="damaged or of another version"):
        load_network(tmp_path / "x")


def test_teachers_that_explode_on_an_image_are_left_out_there() -> None:
    class Fixed(nn.Module):
        def __init__(self, logits: list[list[float]]) -> None:
            super().__init__()
            self.logits = torch.tensor(logits)

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return self.logits

    nan, inf = float("nan"), float("inf")
    both = Ensemble([Fixed([[1.0, 3.0], [inf, 0.0], [nan, 1.0]]), Fixed([[3.0, 5.0], [2.0, 1.0], [0.0, -inf]])])(torch.zeros(3))
    assert both[:2].tolist() == [[2.0, 4.0], [2.0, 1.0]] and not both[2].isfinite().any()
    student = torch.tensor([[1.0, 2.0], [0.5, 0.0], [4.0, 4.0]], requires_grad=True)
    loss = distillation_loss(student, both, 4.0)
    assert loss.item() == pytest.approx(2 / 3 * distillation_loss(student[:2], both[:2], 4.0).item(), rel=1e-6)
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all() and not student.grad[2].any() and student.grad[:2].all()


def test_remembered_logits_change_nothing_and_save_the_teachers_passes(tmp_path: Path) -> None:
    """A second run of the same teachers, images, seed and augmentation asks nothing of them; of another seed or teacher it does."""
    asked: list[int] = []

    class Counted(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            asked.append(len(x))
            return self.network(x)  # type: ignore[no-any-return]

    def run(name: str, file: Path | None, seed: int = 0, teacher_seed: int = 1) -> tuple[nn.Module, int]:
        torch.manual_seed(teacher_seed)
        teachers = [Counted(build("resnet18", 4)), Counted(build("resnet18", 4))]
        torch.manual_seed(2)
        student = build("resnet18", 4)
        before = len(asked)
        fit(student, learnable(64), learnable(10), Recipe(epochs=2, batch=32, seed=seed), tmp_path / name, teacher=mentor(teachers, file))
        return student, len(asked) - before

    file = tmp_path / "folder" / "logits.sqlite"
    (plain, without), (first, asking), (second, asking_again) = run("plain", None), run("first", file), run("second", file)
    assert (without, asking, asking_again) == (8, 8, 0)
    for student in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), student.state_dict().values()))
    assert run("seed", file, seed=1)[1] == 8 and run("teacher", file, teacher_seed=3)[1] == 8
    run("plain", file)  # finished without the file: the same run with it, so nothing is left to do
    file.write_bytes(b"no database" * 1000)
    with pytest.raises(TrainingFailure, match="cannot keep the teachers' logits"):
        run("broken", file)
