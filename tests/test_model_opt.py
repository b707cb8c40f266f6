"""Closed forms, straight-through gradient, budget, data and resumable training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model_opt import data
from model_opt.activation import (
    RELU,
    SQUARE,
    PartialActivation,
    best_c2,
    count_relus,
    fit_relu,
    partial_activations,
    replace_relus,
)
from model_opt.autorep import AutoRep, BudgetError, check_budget, prepare
from model_opt.data import DataError, Split
from model_opt.files import NetworkFileError, NetworkInfo, load_network, serialise_network
from model_opt.networks import build, resnet18
from model_opt.training import Recipe, TrainingError, accuracy, distillation_loss, fit, reestimate_norms

# --- polynomials -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-1.2, 2.0), (3.0, 1.0)])
def test_closed_forms_are_the_least_squares_fit(mean: float, std: float) -> None:
    """Against weighted least squares on a fine quadrature, an independent method."""
    z = np.linspace(mean - 9 * std, mean + 9 * std, 200_001)
    weight = np.sqrt(np.exp(-(((z - mean) / std) ** 2) / 2))
    relu = np.maximum(z, 0)
    full = np.linalg.lstsq(np.stack([z**2, z, np.ones_like(z)], 1) * weight[:, None], relu * weight, rcond=None)[0]
    m, s = torch.tensor([mean]).double(), torch.tensor([std]).double()
    c2 = best_c2(m, s)
    assert float(c2) == pytest.approx(full[0], abs=1e-6)
    for given in (float(c2), 0.25, 0.0):
        rest = np.linalg.lstsq(np.stack([z, np.ones_like(z)], 1) * weight[:, None], (relu - given * z**2) * weight, rcond=None)[0]
        c1, c0 = fit_relu(m, s, given)
        assert [float(c1), float(c0)] == pytest.approx(list(rest), abs=1e-6)


def test_known_values_at_the_standard_normal() -> None:
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    c2 = best_c2(zero, one)
    c1, c0 = fit_relu(zero, one, c2)
    assert [float(c2), float(c1), float(c0)] == pytest.approx([0.199471, 0.5, 0.199471], abs=1e-6)


def test_square_is_a_power_of_two_and_best_given_it() -> None:
    layer = PartialActivation((4, 2, 2))
    mean, std = torch.tensor([0.0, 0.5, -0.5, 0.1]), torch.tensor([1.0, 1.2, 0.8, 1.0])
    layer.fit(mean, std, damping=0)
    assert layer.c2 == 0.25
    expected = fit_relu(mean, std, 0.25)
    assert torch.allclose(layer.c1.flatten(), expected[0])
    assert torch.allclose(layer.c0.flatten(), expected[1])


# --- the layer -----------------------------------------------------------------------------------------------------------


def test_forward_and_gradients_match_automatic_differentiation() -> None:
    torch.manual_seed(0)
    layer = PartialActivation((3, 5, 4)).double()
    layer.mask.copy_(torch.where(torch.rand(3, 5, 4) < 0.4, RELU, SQUARE))
    layer.fit(torch.zeros(3).double(), torch.ones(3).double())
    layer.indicator = nn.Parameter(torch.rand(3, 5, 4).double())
    z = torch.randn(6, 3, 5, 4).double().requires_grad_()
    seed = torch.randn(6, 3, 5, 4).double()
    out = layer(z)
    out.backward(seed)
    got = [z.grad, layer.c1.grad, layer.c0.grad]
    z2, c1, c0 = z.detach().clone().requires_grad_(), layer.c1.detach().clone().requires_grad_(), layer.c0.detach().clone().requires_grad_()
    poly = layer.c2 * z2 * z2 + c1 * z2 + c0
    expected = torch.where(layer.mask == RELU, z2.relu(), poly)
    expected.backward(seed)
    assert torch.allclose(out, expected)
    # beyond the range the penalty adds to the gradient of z
    inside = z2.detach().abs() <= 0.25 / layer.c2
    assert torch.allclose(got[0][inside], z2.grad[inside])  # type: ignore[index]
    for mine, theirs in zip(got[1:], (c1.grad, c0.grad)):
        assert torch.allclose(mine, theirs, atol=1e-5)  # type: ignore[arg-type]  # sums run in float32
    # AutoReP's straight-through gradient, literally
    gap = (z2.relu() - poly).detach()
    literal = nn.functional.softplus(layer.indicator) * (seed * gap).sum(0)
    assert torch.allclose(layer.indicator.grad, literal, atol=1e-5)  # type: ignore[arg-type]


def test_range_penalty_pulls_outliers_in() -> None:
    layer = PartialActivation((1, 1, 1))
    layer.mask.fill_(SQUARE)
    z = torch.tensor([[[[100.0]]], [[[-100.0]]], [[[0.5]]]], requires_grad=True)
    layer(z).backward(torch.zeros(3, 1, 1, 1))
    assert z.grad is not None
    assert z.grad.flatten().sign().tolist() == [1, -1, 0]


def test_replacing_relus_keeps_the_function_and_counts() -> None:
    torch.manual_seed(0)
    network = resnet18(4).eval()
    x = torch.randn(2, 3, 32, 32)
    before = network(x)
    replace_relus(network, (3, 32, 32))
    assert torch.allclose(network(x), before, atol=1e-5)
    assert count_relus(network) == 557_056 * 4 // 64


# --- the indicator ----------------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    torch.manual_seed(0)
    return replace_relus(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10)), (3, 32, 32))


def test_schedule_ends_at_the_budget_and_never_exceeds_it() -> None:
    model = small()
    stage = AutoRep(model, 100, freeze=0.5)
    stage.begin(model)
    counts = []
    for step in range(1, 41):
        for w in stage._indicators():
            w.grad = torch.randn_like(w)
        stage.after_step(step / 40)
        counts.append(count_relus(model))
        assert counts[-1] <= stage.scheduled(step / 40)
    assert counts[19] <= 100
    assert counts[19:] == [counts[19]] * 21  # frozen
    assert stage.finish() == counts[-1]
    assert partial_activations(model)["1"].indicator is None


def test_hysteresis() -> None:
    model = small()
    stage = AutoRep(model, 4096, threshold=0.01)
    (layer,), (w,) = stage.layers, stage._indicators()
    w.data.fill_(-0.005)  # a ReLU stays one down to -t
    stage._update(4096)
    assert layer.count(RELU) == 4096
    w.data.fill_(-0.015)
    stage._update(4096)
    assert layer.count(RELU) == 0
    w.data.fill_(0.005)  # a square stays one up to t
    stage._update(4096)
    assert layer.count(RELU) == 0
    w.data.fill_(0.015)
    stage._update(4096)
    assert layer.count(RELU) == 4096


@pytest.mark.parametrize("budget", [-1, 4097])
def test_impossible_budgets(budget: int) -> None:
    check_budget(0, 4096)
    check_budget(4096, 4096)
    with pytest.raises(BudgetError):
        AutoRep(small(), budget)


def test_budget_zero_removes_all() -> None:
    model = small()
    stage = AutoRep(model, 0, freeze=0.5)
    stage.begin(model)
    for w in stage._indicators():
        w.grad = torch.zeros_like(w)
    stage.after_step(0.5)
    assert count_relus(model) == 0


# --- data -----------------------------------------------------------------------------------------------------------------


def write_cifar(root: Path, records: int = 10_000) -> Path:
    """A folder in the official layout with random content."""
    rng = np.random.default_rng(0)
    folder = root / data.FOLDER
    folder.mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        raw = rng.integers(0, 256, (records, data.RECORD_BYTES), dtype=np.uint8)
        raw[:, 0] %= 10
        raw.tofile(folder / f"{name}.bin")
    return root


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar(tmp_path_factory.mktemp("cifar"))


def test_splits(cifar: Path) -> None:
    train, validation = data.load_train(cifar)
    assert (len(train), len(validation), len(data.load_test(cifar))) == (45_000, 5_000, 10_000)
    assert train.images.shape[1:] == (3, 32, 32)
    assert train.images.dtype == torch.uint8
    raw = np.fromfile(cifar / data.FOLDER / "data_batch_1.bin", np.uint8)
    assert int(train.labels[0]) == raw[0]
    assert train.images[0, 0, 0, :5].tolist() == raw[1:6].tolist()


def test_missing_and_damaged_data(cifar: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing; pass --data .*--download"):
        data.load_train(tmp_path)
    target = tmp_path / data.FOLDER
    target.mkdir()
    whole = (cifar / data.FOLDER / "test_batch.bin").read_bytes()
    for content, reason in ((whole[:-1], "damaged"), (b"\x0b" + whole[1:], "label above 9")):
        (target / "test_batch.bin").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            data.load_test(tmp_path)


def test_download_refuses_a_wrong_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake.tar.gz"
    fake.write_bytes(b"not the data set")
    monkeypatch.setattr(data, "URL", fake.as_uri())
    with pytest.raises(DataError, match="checksum"):
        data.download(tmp_path / "out", lambda *_: None)
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr(data, "URL", (tmp_path / "nothing").as_uri())
    with pytest.raises(DataError, match="cannot download"):
        data.download(tmp_path / "out", lambda *_: None)


def test_augmentation_moves_flips_and_cuts() -> None:
    image = torch.arange(3 * 32 * 32).float().view(1, 3, 32, 32) + 1
    out = data.augment(image.repeat(64, 1, 1, 1), torch.Generator().manual_seed(0))
    assert out.shape == (64, 3, 32, 32)
    assert len({tuple(row.tolist()) for row in out[:, 0, 0]}) > 20
    holes = (out == 0).all(1).flatten(1).sum(1)
    assert int(holes.min()) >= 16
    assert int(holes.max()) == 64
    again = data.augment(image.repeat(64, 1, 1, 1), torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


# --- training ------------------------------------------------------------------------------------------------------------


def learnable(count: int) -> Split:
    """Images whose brightness tells the class."""
    labels = torch.arange(count) % 10
    images = (labels.view(-1, 1, 1, 1) * 25 + torch.randint(0, 10, (count, 3, 32, 32))).to(torch.uint8)
    return Split(images, labels)


def test_training_learns_and_resumes_exactly(tmp_path: Path) -> None:
    train, validation = learnable(320), learnable(100)
    recipe = Recipe(epochs=4, batch=32, lr=0.05)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return resnet18(4)

    whole = model()
    score = fit(whole, train, validation, recipe, tmp_path / "whole")
    assert score > 0.3

    class Killed(Exception):
        pass

    import model_opt.training as module

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


def test_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(TrainingError, match="no readable checkpoint"):
        fit(resnet18(4), learnable(64), learnable(10), Recipe(epochs=1, batch=32), tmp_path)


def test_nan_stops_with_the_step(tmp_path: Path) -> None:
    model = resnet18(4)
    with torch.no_grad():
        model.fc.bias.fill_(math.nan)
    with pytest.raises(TrainingError, match="nan at step 0"):
        fit(model, learnable(64), learnable(10), Recipe(epochs=1, batch=32), tmp_path)


def test_reduction_of_a_small_network_keeps_the_budget(tmp_path: Path) -> None:
    train, validation = learnable(320), learnable(100)
    torch.manual_seed(0)
    teacher = resnet18(4)
    fit(teacher, train, validation, Recipe(epochs=3, batch=32, lr=0.05), tmp_path / "teacher")
    student = resnet18(4)
    prepare(teacher, student, (3, 32, 32), train)
    stage = AutoRep(student, 500, freeze=0.5)
    score = fit(student, train, validation, Recipe(epochs=3, batch=32, lr=0.02), tmp_path / "student", teacher=teacher, stage=stage)
    assert stage.finish() <= 500
    assert score > 0.2
    path = tmp_path / "s.safetensors"
    path.write_bytes(serialise_network(student, NetworkInfo("resnet18", 4, data.CLASSES, (3, 32, 32), True, {})))
    again, info = load_network(path)
    assert info.partial
    assert count_relus(again) == count_relus(student)
    assert accuracy(again, validation) == score


def test_norms_are_averages_of_the_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3))
    sample = learnable(200)
    reestimate_norms(model, sample, batch=100)
    norm = model[0]
    assert torch.allclose(norm.running_mean, data.normalise(sample.images).mean((0, 2, 3)), atol=1e-4)
    assert norm.momentum == 0.1
    assert not model.training


def test_distillation_is_zero_for_equal_logits() -> None:
    logits = torch.randn(5, 10)
    assert float(distillation_loss(logits, logits, 4.0)) == pytest.approx(0, abs=1e-6)
    assert float(distillation_loss(logits, logits.flip(1), 4.0)) > 0


def test_unknown_networks_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown network"):
        build("resnet5", 16)
    with pytest.raises(ValueError, match="width"):
        build("resnet18", 0)
    with pytest.raises(NetworkFileError, match="does not exist"):
        load_network(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"x" * 100)
    with pytest.raises(NetworkFileError, match="damaged"):
        load_network(tmp_path / "x")
