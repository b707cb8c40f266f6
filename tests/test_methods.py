"""ReLU reduction: every method keeps its budget, learns, resumes, compiles; the parts behave as their papers say."""

from __future__ import annotations

import json
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model_opt.activation import IDENTITY, LINEAR, RELU, SQUARE, count_relus, partial_activations, replace_relus, separate_relus
from model_opt.compiler import CompileError, compile_model
from model_opt.data import Split
from model_opt.files import load_network, serialise_network
from model_opt.methods import BudgetError, Reduced, Task, check_budget, going_on, make_options, reduce
from model_opt.methods.autorep import AutoRep, Options, check_start
from model_opt.methods.base import keep_largest, split_epochs
from model_opt.methods.deepreduce import Shape, candidates, pareto_set, shaped
from model_opt.methods.features import stages, weights_before
from model_opt.methods.senet import Mismatch, Pruning, allocate, attention, restart, sensitivities, whole_channels
from model_opt.methods.senet import Options as SenetOptions
from model_opt.methods.slimmable import make_slimmable, set_factor
from model_opt.methods.snl import Options as SnlOptions
from model_opt.methods.snl import Snl
from model_opt.networks import build
from model_opt.training import Recipe, Stage, TrainingError, _optimiser, accuracy, fit
from protocol.inference import infer
from protocol.simulation import simulate
from tests.samples import MEAN, STD, learnable, network_info

TRAIN, VALIDATION = learnable(320), learnable(100)
SHORT = Recipe(epochs=3, batch=32, lr=0.02)
GENTLE = replace(SHORT, lr=0.005)
"""For squares with a factor on top: at the higher rate some explode, depending on the order in which threads sum."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    torch.manual_seed(0)
    model = build("resnet18", 4)
    assert fit(model, TRAIN, VALIDATION, Recipe(epochs=3, batch=32, lr=0.05), tmp_path_factory.mktemp("teacher")) > 0.4
    return model


def rebuild(factor: float, stride: int) -> nn.Module:
    return build("resnet18", round(4 * factor), stride=stride)


def run(teacher: nn.Module, method: str, folder: Path, budget: int = 3000, recipe: Recipe = SHORT, **options: Any) -> Reduced:
    return reduce(teacher, method=method, budget=budget, data=(TRAIN, VALIDATION), recipe=recipe, folder=folder, rebuild=rebuild, **options)


CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "autorep": ("autorep", {}, SQUARE),
    "autorep-degree1": ("autorep", {"degree": 1}, LINEAR),
    "autorep-degree0": ("autorep", {"degree": 0}, IDENTITY),
    "autorep-published": ("autorep", {"c2": "channel", "released": True, "scale_x2": 2.0, "clip_x2": 1.0, "penalty": 80.0}, SQUARE),
    "autorep-channel": ("autorep", {"granularity": "channel", "frozen": True}, SQUARE),
    "snl": ("snl", {}, IDENTITY),
    "senet": ("senet", {}, IDENTITY),
    "deepreduce": ("deepreduce", {}, IDENTITY),
}


@pytest.mark.parametrize("case", CASES)
def test_every_method_keeps_its_budget_and_runs_privately(case: str, teacher: nn.Module, tmp_path: Path) -> None:
    method, options, replacement = CASES[case]
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    result = run(teacher, method, tmp_path, recipe=GENTLE if "scale_x2" in options else SHORT, **options)
    assert 0 < result.relus <= 3000
    assert result.validation_accuracy > 0.15
    masks = [layer.mask for layer in partial_activations(result.model).values()]
    assert {int(v) for mask in masks for v in mask.unique()} <= {RELU, replacement}
    assert not any(name.endswith("gate") for name in result.model.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    # the file gives the same network back, and it compiles to what private inference computes
    info = network_info(width=round(4 * result.width_factor), partial=True, stride=result.stride)
    (tmp_path / "n").write_bytes(serialise_network(result.model, info))
    again, _ = load_network(tmp_path / "n")
    assert count_relus(again) == result.relus
    assert accuracy(again, VALIDATION) == result.validation_accuracy
    x = VALIDATION[:2].normalised()
    for eight_bits in (False, True):
        model = compile_model(again, x, name="m", classes=(), mean=MEAN, std=STD, eight_bits=eight_bits)
        assert model.public.relus == result.relus
        fixed = simulate(model, x.double())
        # large squares leave few fractional bits
        assert torch.allclose(fixed, again(x).double(), atol=0.5 if eight_bits else 0.1, rtol=0.03)
        # truncation rounds at random, and squares carry what it does on in proportion
        assert torch.allclose(infer(model, x.double()).logits, fixed, atol=0.01, rtol=2e-3)


def test_a_finished_run_is_not_repeated(teacher: nn.Module, tmp_path: Path) -> None:
    """Resume of both stages of a method: same network, and no further epoch in the log."""
    first = run(teacher, "snl", tmp_path)
    logs = {p: p.read_text() for p in tmp_path.rglob("log.csv")}
    assert len(logs) == 2
    again = run(teacher, "snl", tmp_path)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in first.model.state_dict().items())
    assert all(p.read_text() == text for p, text in logs.items())
    with pytest.raises(TrainingError, match=r"other settings \(budget\)"):
        run(teacher, "snl", tmp_path, budget=2000)


@pytest.mark.parametrize(("method", "options"), [("autorep", {"freeze": 0.3}), ("snl", {"threshold": 2.0, "search": 0.7})])
def test_a_run_killed_after_its_masks_were_fixed_resumes_exactly(method: str, options: dict[str, Any], teacher: nn.Module, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    whole = run(teacher, method, tmp_path / "whole", **options)
    calls: list[object] = []

    def dies(*args: Any) -> float:
        calls.append(args)
        if len(calls) == 2:  # at the end of the second epoch: the checkpoint of the first is there
            raise Killed
        return accuracy(*args)

    with monkeypatch.context() as patch:
        patch.setattr("model_opt.training.accuracy", dies)
        with pytest.raises(Killed):
            run(teacher, method, tmp_path / "halved", **options)
    resumed = run(teacher, method, tmp_path / "halved", **options).model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.model.state_dict().items())


def test_a_network_without_a_registry_entry(tmp_path: Path) -> None:
    """Any network of nn.ReLU modules that torch.fx can trace."""
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16),
                        nn.ReLU(), nn.Linear(16, 10))
    x = VALIDATION[:4].normalised()
    for method, options in (("autorep", {"degree": 1}), ("snl", {"granularity": "channel"}), ("senet", {"granularity": "channel"}),
                            ("deepreduce", {})):
        result = reduce(own, method=method, budget=700, data=(TRAIN, VALIDATION), recipe=SHORT, folder=tmp_path / method, **options)
        assert 0 < result.relus <= 700, method
        model = compile_model(result.model, x, name="m", classes=(), mean=MEAN, std=STD)
        assert torch.allclose(simulate(model, x.double()), result.model(x).double(), atol=0.05), method
    assert weights_before(own) == {"1": "0", "3": "2", "6": "5"}


class Bottleneck(nn.Module):
    """As users write them: one nn.ReLU for all places, a function, layers registered in another order than they run, 1x1 at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.relu = nn.Linear(8, 10), nn.ReLU(inplace=True)
        self.shortcut, self.conv3 = nn.Conv2d(3, 8, 1, 4), nn.Conv2d(4, 8, 1)
        self.conv2, self.conv1 = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(3, 4, 3, 2, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.relu(self.conv2(self.relu(self.conv1(x)))))
        y += self.shortcut(x)
        return self.last(torch.flatten(self.pool(nn.functional.relu(y)), 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("method", "options"), [("autorep", {}), ("snl", {}), ("senet", {}), ("deepreduce", {})])
def test_a_network_whose_places_share_a_relu(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    own, x = Bottleneck(), VALIDATION[:4].normalised()
    separate = separate_relus(own)
    assert torch.equal(own(x), separate(x)) and separate_relus(separate) is separate
    assert list(weights_before(separate).values()) == ["conv1", "conv2", "conv3"]
    result = reduce(own, method=method, budget=np.int64(1100), data=(TRAIN, VALIDATION), recipe=SHORT, folder=tmp_path, **options)
    assert [layer.mask.numel() for layer in partial_activations(result.model).values()] == [1024, 256, 512] and 0 < result.relus <= 1100
    model = compile_model(result.model, x, name="m", classes=(), mean=MEAN, std=STD)
    assert torch.allclose(simulate(model, x.double()), result.model(x).double(), atol=0.05)
    assert list(own.state_dict()) == list(Bottleneck().state_dict())


@pytest.mark.parametrize(("method", "searches"), [("senet", {"prune"}), ("deepreduce", {f"probe{i}" for i in range(-1, 4)})])
def test_budgets_share_what_does_not_depend_on_them(method: str, searches: set[str], teacher: nn.Module, tmp_path: Path) -> None:
    alone = run(teacher, method, tmp_path / "alone", budget=2000).model.state_dict()

    def found() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "common").rglob("checkpoint.pt")}

    run(teacher, method, tmp_path / "first", budget=3000, shared=tmp_path / "common")
    before = found()
    second = run(teacher, method, tmp_path / "second", budget=2000, shared=tmp_path / "common").model.state_dict()
    assert set(before) == searches and found() == before
    assert not searches & {path.name for path in (tmp_path / "second").iterdir()}
    assert all(torch.equal(value, second[name]) for name, value in alone.items())


def test_momentum_leaves_the_gates_gradients_alone(teacher: nn.Module) -> None:
    """PyTorch's SGD over many tensors at once, as on GPUs, writes Nesterov's momentum into gradients."""
    student = replace_relus(deepcopy(teacher), (3, 32, 32))
    stage = AutoRep(student, 3000, Options(), 0)
    optimiser = _optimiser(student, stage.begin(student, None), SHORT)
    for group in optimiser.param_groups:
        group["foreach"] = True
    for _ in range(3):
        for gate in stage.gates():
            gate.grad = torch.ones_like(gate)
        optimiser.step()
    assert all(bool((gate.grad == 1).all()) for gate in stage.gates())


def test_networks_and_budgets_that_cannot_be(teacher: nn.Module, tmp_path: Path) -> None:
    for budget, reason in ((-1, "negative"), (float("nan"), "negative"), (10**9, "exceeds the network's 34,816")):
        with pytest.raises(BudgetError, match=reason):
            run(teacher, "autorep", tmp_path, budget=budget)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"no nn.ReLU"):
        reduce(nn.Sequential(nn.Conv2d(3, 4, 3)), budget=0, data=(TRAIN, VALIDATION), folder=tmp_path)
    with pytest.raises(BudgetError, match="no combination"):
        run(teacher, "deepreduce", tmp_path, budget=5)
    for options, reason in (({"degree": 3}, "degree must be"), ({"nothing": 1}, "no option 'nothing'"),
                            ({"released": True}, "c2 per channel"), ({"c2": "pixel"}, "layer or channel")):
        with pytest.raises(ValueError, match=reason):
            make_options("autorep", options)
    for method, name, value in (("senet", "prune", -1.0), ("senet", "search", 3.0), ("senet", "search", 0.9), ("snl", "search", 3.0),
                                ("snl", "threshold", -1.0), ("snl", "penalty", float("nan")), ("snl", "granularity", "row"),
                                ("senet", "granularity", "row")):
        with pytest.raises(ValueError, match=name):
            make_options(method, {name: value})
    for widths, own, reason in (((0.5, 0.3), rebuild, "0.3 of the 4 channels"), ((0.5,), None, "of the registry")):
        with pytest.raises(BudgetError, match=reason):
            reduce(teacher, method="senet", budget=3000, data=(TRAIN, VALIDATION), folder=tmp_path / "none", rebuild=own, widths=widths)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="unknown method"):
        make_options("magic", {})
    check_budget(0, 4096)


class Own(nn.Module):
    """A network whose ReLUs are not all modules, or that chooses its way by the image."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.conv, self.relu, self.flatten, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        if self.branches and y.sum() > 0:
            y = y + y.mean()
        return self.fc(self.flatten(y if self.branches else nn.functional.relu(y - 1)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("branches", "reason"), [(True, "cannot trace"), (False, "operation")])
def test_networks_that_would_not_compile_are_not_trained(branches: bool, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=reason):
        reduce(Own(branches), budget=100, data=(TRAIN, VALIDATION), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_networks_that_do_not_fit_the_data_are_not_trained(teacher: nn.Module, tmp_path: Path) -> None:
    fewer = replace(TRAIN, labels=TRAIN.labels % 10), replace(VALIDATION, labels=VALIDATION.labels + 5)
    small_images = [replace(split, images=split.images[:, :, :8, :8]) for split in (TRAIN, VALIDATION)]
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))
    for model, data, budget, reason in (
            (teacher, fewer, 10, "gives 10 numbers for an image, the data has 1[1-5] classes"),
            (flat, small_images, 10, "does not run on an input of shape"),
            (flat[:2], (TRAIN, VALIDATION), 10, "gives 4x16x16 numbers"),
            (replace_relus(build("resnet18", 4), (3, 32, 32)), (TRAIN, VALIDATION), 10, "reduced already"),
            (teacher, (TRAIN, VALIDATION), 12.5, "whole number"), (teacher, (TRAIN, VALIDATION), "12900", "whole number")):
        with pytest.raises((BudgetError, CompileError), match=reason):
            reduce(model, budget=budget, data=data, folder=tmp_path / "none")  # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("method", ["senet", "deepreduce", "snl", "autorep"])
def test_a_network_without_convolutions(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10))
    result = reduce(own, method=method, budget=12, data=(TRAIN, VALIDATION), recipe=SHORT, folder=tmp_path)
    assert 0 < result.relus <= 12


def test_an_impossible_budget_is_told_before_any_probe(teacher: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="no combination of culling, thinning and reshaping has at most 1 ReLUs"):
        run(teacher, "deepreduce", tmp_path / "none", budget=1)
    assert not (tmp_path / "none").exists()


def test_going_on_keeps_the_rules_of_the_reduction() -> None:
    made_by = {"command": "reduce", "method": "autorep",
               "options": {"c2": "channel", "scale_x2": 2.0, "clip_x2": 0.01, "range_penalty": 0.0}}
    network = small()
    (layer,) = partial_activations(network).values()
    layer.per_channel_c2()
    stage = going_on(network, made_by)
    assert layer.c2 is not None and layer.range_penalty == 0
    layer.c2.data.fill_(0.5)
    stage.after_step(0.1)
    assert torch.allclose(layer.c2.detach(), torch.tensor(0.02))  # the factor is folded in
    going_on(network, {"command": "reduce", "method": "autorep", "options": {"frozen": True}})
    assert not any(parameter.requires_grad for parameter in (layer.c2, layer.c1, layer.c0))
    assert going_on(small(), {}).status() == {}


def test_budget_zero(teacher: nn.Module, tmp_path: Path) -> None:
    assert run(teacher, "autorep", tmp_path, budget=0).relus == 0


# --- AutoReP ------------------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    torch.manual_seed(0)
    return replace_relus(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10)), (3, 32, 32))


def step(stage: AutoRep, progress: float, gradient: float | None = None) -> None:
    for gate in stage.gates():
        gate.grad = torch.randn_like(gate) if gradient is None else torch.full_like(gate, gradient)
    stage.after_step(progress)


@pytest.mark.parametrize("granularity", ["pixel", "channel"])
def test_schedule_ends_at_the_budget_and_never_exceeds_it(granularity: str) -> None:
    model = small()
    stage = AutoRep(model, 1100, Options(freeze=0.5, granularity=granularity))
    stage.begin(model, None)
    counts = []
    for i in range(1, 41):
        step(stage, i / 40)
        counts.append(count_relus(model))
        assert counts[-1] <= stage.scheduled(i / 40)
    assert counts[19:] == [counts[19]] * 21  # frozen
    assert counts[19] == (1100 if granularity == "pixel" else 1024)
    stage.finish()
    layer = partial_activations(model)["1"]
    assert layer.gate is None
    if granularity == "channel":
        assert all(len(channel.unique()) == 1 for channel in layer.mask)


@pytest.mark.parametrize(("begun", "budget"), [(1000, 100), (1000, 0), (100, 1000), (0, 1000), (500, 500)])
def test_a_reduced_network_goes_to_a_larger_or_smaller_budget(begun: int, budget: int) -> None:
    """The schedule leads there; noise alone does not move a pixel without a ReLU above one that has it."""
    model = small()
    (layer,) = partial_activations(model).values()
    layer.mask.fill_(SQUARE).flatten()[:begun] = RELU
    stage = AutoRep(model, budget, Options(freeze=0.5, indicator_lr=1e-6))
    stage.begin(model, None)
    counts = []
    for i in range(40):
        (gate,) = stage.gates()
        gate.grad = torch.randn_like(gate)
        stage.after_step(i / 40)
        counts.append(layer.count(RELU))
        assert min(begun, budget) <= counts[-1] <= max(begun, stage.scheduled(i / 40))
    assert counts[-1] == budget and counts == sorted(counts, reverse=budget < begun) and (budget == begun or len(set(counts)) > 5)
    assert int((layer.mask.flatten()[:begun] == RELU).sum()) == min(begun, budget)
    stage.finish()


@pytest.mark.parametrize(("options", "reason"), [({}, "ReLUs and degree 2, in "), ({"degree": 1, "granularity": "channel"}, "granularity"),
                                                 ({"degree": 1}, "")])
def test_a_start_of_other_settings_is_refused(options: dict[str, Any], reason: str) -> None:
    model = small()
    (layer,) = partial_activations(model).values()
    layer.mask.fill_(LINEAR).flatten()[:5] = RELU
    with pytest.raises(BudgetError, match=reason) if reason else nullcontext():
        check_start(model, Options(**options))
    layer.mask.fill_(SQUARE)
    with pytest.raises(BudgetError, match="c2=channel"):
        check_start(model, Options(c2="channel"))


def test_hysteresis() -> None:
    model = small()
    stage = AutoRep(model, 4096, Options(threshold=0.01))
    stage.begin(model, None)
    (layer,), (gate,) = stage.layers, stage.gates()
    # a ReLU stays one down to -t, a square stays one up to t
    for value, relus in ((-0.005, 4096), (-0.015, 0), (0.005, 0), (0.015, 4096)):
        gate.data.fill_(value)
        stage.update(0.0)
        assert layer.count(RELU) == relus


def test_to_a_larger_budget_the_schedule_rises_under_the_penalty_too() -> None:
    model = small()
    (layer,) = partial_activations(model).values()
    layer.mask.fill_(SQUARE).flatten()[:100] = RELU
    assert 100 < AutoRep(model, 1000, Options(penalty=50.0, freeze=1.0)).scheduled(0.5) < 1000
    layer.mask.fill_(RELU)
    assert AutoRep(model, 1000, Options(penalty=50.0, freeze=1.0)).scheduled(0.5) == layer.mask.numel()


def test_published_penalty_pushes_until_the_budget() -> None:
    model = small()
    stage = AutoRep(model, 100, Options(penalty=50.0, freeze=1.0))
    stage.begin(model, None)
    (gate,) = stage.gates()
    step(stage, 0.1, 0.0)
    assert torch.allclose(gate.grad, 50 / 4096 * nn.functional.softplus(gate), rtol=0.01)  # type: ignore[arg-type]
    stage.layers[0].mask.fill_(SQUARE)
    step(stage, 0.2, 0.0)
    assert not bool(gate.grad.any())  # type: ignore[union-attr]  # below the budget nothing pushes


def test_units_are_kept_by_score_within_their_cost() -> None:
    keep, cut = keep_largest(torch.tensor([0.1, 0.9, 0.5, 0.3]), torch.tensor([1, 4, 4, 1]), 8)
    assert keep.tolist() == [False, True, True, False]
    assert cut == pytest.approx(0.3)
    keep, cut = keep_largest(torch.tensor([0.9, 0.5, 0.6, 0.4, 0.3]), torch.tensor([1024, 512, 256, 256, 64]), 900)
    assert keep.tolist() == [False, True, True, False, True]  # what does not fit is passed over
    assert cut == float("-inf")
    keep, cut = keep_largest(torch.tensor([0.9, 0.8, 0.3, 0.2]), torch.tensor([2, 1, 2, 2]), 1)
    assert keep.tolist() == [False, True, False, False]
    assert cut == pytest.approx(0.3)
    assert split_epochs(Recipe(epochs=10), 0.1, 0.4, 1) == [1, 4, 5]
    assert split_epochs(Recipe(epochs=1), 0.1, 0.4, 1) == [1, 1, 1]


# --- SNL ----------------------------------------------------------------------------------------------------------------


def test_snl_raises_lambda_while_the_count_stays() -> None:
    model = small()
    stage = Snl(model, 100, SnlOptions())
    stage.begin(model, None)
    assert float(stage.loss().detach()) == pytest.approx(1e-5 * 4096)
    for i in range(1, 11):
        stage.update(i / 100)
    assert stage.penalty == pytest.approx(1e-5 * 1.1**10)
    stage.gates()[0].data.zero_()[:1] = 0.5
    stage.update(0.11)
    assert stage.penalty == pytest.approx(1e-5 * 1.1**10)  # below the path: no growth
    stage.binarise()
    assert count_relus(model) == 100


def test_snl_stops_its_search_within_the_budget() -> None:
    """However many alphas fall at once: the largest stay, as many as the budget allows, and lambda is off from then on."""
    model = small()
    stage = Snl(model, 100, SnlOptions())
    stage.begin(model, None)
    for gate in stage.gates():
        gate.data.copy_(torch.rand(gate.shape, generator=torch.Generator().manual_seed(gate.numel())) * 0.009)
    stage.gates()[0].data.view(-1)[:40] = 0.5
    largest = torch.cat([gate.detach().flatten() for gate in stage.gates()]).topk(100).indices
    stage.update(0.5)
    assert count_relus(model) == 100 and stage.status()["relus"] == 100
    kept = torch.cat([layer.mask.flatten() == RELU for layer in stage.layers])
    assert set(kept.nonzero().flatten().tolist()) == set(largest.tolist())
    assert stage.loss() is None and not any(gate.requires_grad for gate in stage.gates())
    resumed = Snl(model, 100, SnlOptions())
    resumed.begin(model, None)
    resumed.load(stage.state())
    assert resumed.loss() is None and resumed.status()["relus"] == 100


# --- SENet --------------------------------------------------------------------------------------------------------------

ETA = (0.00572, 0.01854, 0.02129, 0.02506, 0.02758, 0.03549, 0.04884, 0.05102, 0.05568, 0.06739, 0.08143, 0.08277, 0.08623, 0.0941,
       0.0990, 0.0999, 0.1000)
"""Normalised sensitivities of ResNet-18 behind the per-layer lists that RLNet's authors published."""


def test_allocation_clips_and_redistributes() -> None:
    sizes = [65_536] * 5 + [32_768] * 4 + [16_384] * 4 + [8_192] * 4
    counts = allocate(100_000, ETA, sizes)
    assert sum(counts) == 100_000
    assert all(c <= s for c, s in zip(counts, sizes))
    assert counts[-4:] == [8_192] * 4  # the last layers are full
    free = [c / e for c, e in zip(counts[:13], ETA)]
    assert max(free) / min(free) < 1.01  # the rest is in proportion
    assert allocate(sum(sizes), ETA, sizes) == sizes
    assert allocate(0, ETA, sizes) == [0] * 17


def test_channels_spend_what_earlier_layers_left_over() -> None:
    shapes = [(2, 8, 8), (4, 4, 4), (10,)]
    assert whole_channels([100, 20, 3], shapes) == [64, 48, 10]
    assert whole_channels([128, 64, 10], shapes) == [128, 64, 10]
    assert whole_channels([63, 0, 0], shapes) == [0, 48, 10]


def test_pruning_reaches_its_density(teacher: nn.Module, tmp_path: Path) -> None:
    from copy import deepcopy

    pruned, stage = deepcopy(teacher), Pruning(0.1)
    fit(pruned, TRAIN, VALIDATION, replace(SHORT, epochs=2), tmp_path, stage=stage)
    weights = [m.weight for m in pruned.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights) == pytest.approx(0.1, abs=0.002)
    assert set(stage.densities()) == {n for n, m in teacher.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def test_an_average_of_the_weights_spoils_neither_sensitivities_nor_masks(teacher: nn.Module, tmp_path: Path) -> None:
    plain, averaged = (sensitivities(Task(teacher, 3000, TRAIN, VALIDATION, replace(SHORT, ema=ema), tmp_path / str(ema)),
                                     SenetOptions(), 1) for ema in (0.0, 0.95))
    assert averaged == plain and max(plain.values()) > 0.5

    class Last(Stage):
        def after_epoch(self) -> None:
            model[1].mask.fill_(IDENTITY)  # type: ignore[operator]

    model = small()
    fit(model, TRAIN, VALIDATION, Recipe(epochs=1, batch=32, lr=0.02, ema=0.9), tmp_path, stage=Last())
    assert count_relus(model) == 0


def test_kept_pixels_are_dropped_by_the_published_mismatch_and_stay_by_that_against_a_line() -> None:
    torch.manual_seed(0)
    teacher, x = small(), torch.randn(64, 3, 32, 32)
    masks: dict[str, list[Tensor]] = {"output": [], "line": []}
    for mismatch, found in masks.items():
        student = small()  # the same weights
        (layer,) = partial_activations(student).values()
        with torch.no_grad():
            stage = Mismatch(student, [100], SenetOptions(mismatch=mismatch), seed=0)
            stage.begin(student, teacher)
            for _ in range(2):  # epochs of a network that learns nothing
                found.append(layer.mask == RELU)
                teacher(x), student(x)
                stage.after_step(0.5)
                stage.after_epoch()
            found.append(layer.mask == RELU)
            stage.end()
    assert [int(mask.sum()) for mask in masks["output"][1:] + masks["line"][1:]] == [100] * 4
    assert not (masks["output"][0] & masks["output"][1]).any()  # its output is the teacher's: no mismatch
    assert not (masks["output"][1] & masks["output"][2]).any()
    assert torch.equal(masks["line"][1], masks["line"][2])
    with pytest.raises(ValueError, match="unknown mismatch"):
        SenetOptions(mismatch="input")


def test_senets_student_starts_from_the_teacher_or_anew(teacher: nn.Module, tmp_path: Path) -> None:
    first, second = deepcopy(teacher), deepcopy(teacher)
    state = torch.random.get_rng_state()
    for student in (first, second):
        restart(student, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, mine), again, before in zip(first.named_parameters(), second.parameters(), teacher.parameters()):
        assert torch.equal(mine, again) and not torch.equal(mine, before), name
    norm = next(m for m in first.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.running_var is not None and bool((norm.running_var == 1).all())
    with pytest.raises(ValueError, match="unknown init"):
        SenetOptions(init="student")
    still = replace(SHORT, lr=1e-9)  # nothing is learnt: what the student began with shows
    results = [run(teacher, "senet", tmp_path / init, recipe=still, init=init) for init in ("teacher", "random")]
    kernels = [result.model.get_submodule("conv1").weight for result in results]
    origin = teacher.get_submodule("conv1").weight
    assert torch.allclose(kernels[0], origin, atol=1e-4) and not torch.allclose(kernels[1], origin, atol=1e-2)


def test_further_teachers_must_have_the_models_images_and_outputs(teacher: nn.Module, tmp_path: Path) -> None:
    for other in (build("resnet18", 4, 7), nn.Sequential(nn.Flatten(), nn.Linear(5, 10))):
        with pytest.raises(BudgetError, match="a further teacher"):
            run(teacher, "autorep", tmp_path, teachers=[other])


def test_attention_maps_have_unit_length() -> None:
    maps = attention(torch.randn(3, 8, 4, 4))
    assert maps.shape == (3, 16)
    assert torch.allclose(maps.norm(dim=1), torch.ones(3))


def test_stages_are_those_of_the_literature() -> None:
    groups = stages(build("resnet18", 4), (3, 32, 32))
    assert [len(names) for names in groups] == [5, 4, 4, 4]
    assert groups[0][0] == "relu"
    assert groups[-1][-1] == "blocks.7.relu2"


def test_senet_plus_plus_gives_a_network_for_each_width(teacher: nn.Module, tmp_path: Path) -> None:
    result = run(teacher, "senet", tmp_path, widths=(0.5,))
    (narrow,) = result.further
    assert 0 < narrow.relus < result.relus <= 3000
    assert narrow.model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    wide, small_ = (r.model.state_dict()["blocks.3.conv1.weight"] for r in (result, narrow))
    assert torch.equal(wide[: len(small_), : small_.shape[1]], small_)  # shared weights, the first channels
    assert not torch.equal(result.model.state_dict()["bn1.weight"][:2], narrow.model.state_dict()["bn1.weight"])


def test_full_width_of_a_slimmable_network_is_the_network(teacher: nn.Module) -> None:
    from copy import deepcopy

    slim = deepcopy(teacher).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = slim(x)
    make_slimmable(slim, (0.5,))
    assert torch.equal(slim.eval()(x), expected)
    set_factor(slim, 0.5)
    assert not torch.equal(slim(x), expected)


# --- DeepReDuce ---------------------------------------------------------------------------------------------------------


def test_published_counts_identify_configurations(teacher: nn.Module) -> None:
    """ResNet-18's counts in the literature, here at a sixteenth: width 4 instead of 64."""
    task = Task(teacher, 0, TRAIN, VALIDATION, SHORT, Path(), rebuild=rebuild)
    for count, shape in ((229_376, Shape((1, 2, 3), False, 1.0, 1)), (196_608, Shape((1, 2), False, 1.0, 1)),
                         (114_688, Shape((1, 2, 3), True, 1.0, 1)), (57_344, Shape((1, 2, 3), False, 1.0, 2)),
                         (28_672, Shape((1, 2, 3), True, 1.0, 2)), (12_288, Shape((2, 3), True, 1.0, 2)),
                         (12_288, Shape((1, 2), True, 0.5, 2))):
        assert count_relus(shaped(task, shape)) * 16 == count


def test_deepreduce_gives_the_pareto_set_of_its_candidates(teacher: nn.Module, tmp_path: Path) -> None:
    task = Task(teacher, 3000, TRAIN, VALIDATION, SHORT, tmp_path, rebuild=rebuild)
    counts = [count for count, _ in candidates(task, [0, 3, 2, 1])]
    assert counts == sorted(set(counts), reverse=True) and counts[0] <= 3000
    run(teacher, "deepreduce", tmp_path)
    logs = {path: path.read_text() for path in tmp_path.rglob("log.csv")}
    result = run(teacher, "deepreduce", tmp_path, candidates=3)
    assert all(path.read_text() == text for path, text in logs.items())  # probes and the first candidate are taken as they are
    assert len(list(tmp_path.rglob("log.csv"))) == len(logs) + 2
    rows = json.loads((tmp_path / "pareto.json").read_text())["rows"]
    assert rows[-1]["validation_accuracy"] == result.validation_accuracy
    assert rows == pareto_set(rows)
    assert [other.relus for other in result.further] == [row["relus"] for row in rows[:-1]]
    assert [other.name for other in result.further] == [f"{row['relus']}-relus" for row in rows[:-1]]
    points = [{"relus": relus, "validation_accuracy": accuracy} for relus, accuracy in ((3, 0.7), (1, 0.5), (2, 0.4), (4, 0.7))]
    assert pareto_set(points) == [points[1], points[0]]
    for options in ({"candidates": 0}, {"probe": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            make_options("deepreduce", options)


def test_going_on_with_a_reduced_network_keeps_its_masks(tmp_path: Path) -> None:
    """`train --from` a reduced network, distilling from its teacher: other weights, the same ReLUs, ready to compile."""
    from tests.test_data import folders
    from tests.test_programs import mistake, program

    torch.manual_seed(0)
    facts = {"classes": ("cat", "dog"), "input_shape": (3, 16, 16)}
    teacher, student, out = (tmp_path / name for name in ("teacher", "student", "out"))
    model = build("resnet18", 4, 2)
    teacher.write_bytes(serialise_network(model, network_info(**facts)))
    replace_relus(model, (3, 16, 16))
    for layer in partial_activations(model).values():
        layer.mask.copy_(torch.randint(0, 3, layer.mask.shape))
    student.write_bytes(serialise_network(model, network_info(partial=True, made_by={"relus": 7}, **facts)))
    folders(tmp_path / "data")
    command = ["opt", "train", "--from", student, "--data", tmp_path / "data", "--epochs", 1, "--batch", 6, "--out", out,
               "--run", tmp_path / "run"]
    done = program(*command, "--teacher", teacher)
    assert done.returncode == 0, done.stderr
    (before, _), (after, info) = load_network(student), load_network(out)
    assert info.made_by["distil"] and info.made_by["relus"] == count_relus(before) == count_relus(after)
    kept, changed = 0, 0
    for name, value in after.state_dict().items():
        same = torch.equal(value, before.state_dict()[name])
        kept += name.endswith("mask") and same
        changed += name.endswith(("weight", "c1")) and not same
    assert (kept, changed > 20) == (17, True)
    mistake(program(*command, "--teacher", student), 2, "other settings (teacher)")  # any network may teach, in a run of its own


def test_published_options_of_autorep(teacher: nn.Module, tmp_path: Path) -> None:
    """All of them together: a network within the budget that compiles to what it computes, its factor on c2 folded in."""
    result = run(teacher, "autorep", tmp_path, recipe=GENTLE, c2="channel", released=True, scale_x2=2.0, clip_x2=0.01, penalty=80.0,
                 init="uniform", refresh=500, range_penalty=0.0)
    assert 0 < result.relus <= 3000
    layers = partial_activations(result.model).values()
    largest = max(float(layer.c2.detach().abs().max()) for layer in layers)  # type: ignore[union-attr]
    assert largest == pytest.approx(0.02)  # the parameter is clipped, not its product with scale_x2
    assert all(layer.c2_scale == 1 for layer in layers)
    x = VALIDATION[:2].normalised()
    model = compile_model(result.model, x, name="m", classes=(), mean=MEAN, std=STD)
    assert torch.allclose(simulate(model, x.double()), result.model(x).double(), atol=0.1)  # a c2 near zero costs precision


def test_where_indicators_start() -> None:
    for init, least, most in (("low", 0.05, 0.15), ("uniform", 0.0, 1.0)):
        (gate,) = AutoRep(small(), 100, Options(init=init)).gates()
        low, high = gate.detach().aminmax()
        assert least <= float(low) < least + 0.01 * (most - least) and most - 0.01 * (most - least) < float(high) <= most


def test_coefficients_are_refreshed_at_every_tenth_step_for_a_while() -> None:
    model, steps = small(), []
    stage = AutoRep(model, 4096, Options(refresh=30), refit=lambda: steps.append(stage.steps))
    stage.begin(model, None)
    for i in range(15):
        step(stage, i / 100)
    resumed = AutoRep(model, 4096, Options(refresh=30), refit=lambda: steps.append(resumed.steps))
    resumed.begin(model, None)
    resumed.load(stage.state())
    for i in range(15, 50):
        step(resumed, i / 100)
    assert steps == [10, 20, 30]


def test_refreshed_coefficients_fit_the_present_network(teacher: nn.Module, tmp_path: Path) -> None:
    from model_opt.methods.autorep import fit_coefficients, prepare

    task, options = Task(teacher, 3000, TRAIN, VALIDATION, SHORT, tmp_path), Options(c2="channel", released=True, clip_x2=0.015)
    student = task.student().train()
    prepare(student, task, options)
    before = {name: layer.c0.detach().clone() for name, layer in partial_activations(student).items()}
    for layer in partial_activations(student).values():
        layer.mask.fill_(SQUARE)
    fit_coefficients(student, task, options)
    layers = partial_activations(student)
    assert student.training
    assert torch.equal(layers["relu"].c0, before["relu"]) and not torch.equal(layers["blocks.7.relu2"].c0, before["blocks.7.relu2"])
    assert all(float(layer.c2.detach().abs().max()) <= 0.015 for layer in layers.values())  # type: ignore[union-attr]


def test_range_penalty_and_factor_of_c2() -> None:
    layer = partial_activations(small())["1"]
    layer.mask.fill_(SQUARE)
    layer.per_channel_c2()
    assert layer.c2 is not None
    layer.c2_scale, layer.range_penalty = 0.1, 0.0
    z = torch.randn(2, *layer.mask.shape, requires_grad=True)
    layer(100 * z).sum().backward()
    assert z.grad is not None and layer.c2.grad is not None
    assert torch.allclose(z.grad, 100 * (2 * 0.025 * 100 * z + 0.5), rtol=1e-4)  # nothing but the polynomial's slope
    assert torch.allclose(layer.c2.grad.flatten(), 0.1 * (100 * z).square().sum((0, 2, 3)), rtol=1e-4)
    before = layer(z)
    layer.fold_c2_scale()
    assert layer.c2_scale == 1 and torch.allclose(layer(z), before)


INEFFECTIVE: dict[str, dict[str, Any]] = {
    "damping: .* released=false": {"released": True, "c2": "channel", "damping": 1},
    "clip_x2, scale_x2: .* degree 2": {"degree": 1, "clip_x2": 1.0, "scale_x2": 2.0},
    "c2: .* degree 2": {"degree": 1, "c2": "channel"},
    "range_penalty: .* degree 2": {"degree": 0, "range_penalty": 0.0},
    "frozen: .* degree 1 or 2": {"degree": 0, "frozen": True},
    "clip_x2: .* one c2 per channel": {"clip_x2": 1.0},
    "refresh: .* frozen=false": {"frozen": True, "refresh": 500},
    "unknown init": {"init": "zero"},
    "must not be negative": {"refresh": -1},
}


IMPOSSIBLE: list[tuple[str, dict[str, Any]]] = [
    ("autorep", {"threshold": float("nan")}), ("autorep", {"indicator_lr": 0.0}), ("snl", {"alpha_lr": -1.0}), ("snl", {"tune_lr": -1.0}),
    ("snl", {"growth": float("inf")}), ("senet", {"beta": float("nan")}), ("senet", {"tune_lr": 0.0}), ("cost", {"freeze": 2.0}),
    ("cost", {"target_ms": float("nan")}), ("cost", {"target_bytes": -1})]


@pytest.mark.parametrize(("method", "options"), IMPOSSIBLE)
def test_values_that_cannot_work_are_refused_before_hours_of_training(method: str, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must"):
        make_options(method, options)


@pytest.mark.parametrize("reason", INEFFECTIVE)
def test_options_without_effect_are_refused(reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_options("autorep", INEFFECTIVE[reason])
    make_options("autorep", {"degree": 1, "released": True})


def test_channels_of_a_layer_without_pixels(tmp_path: Path) -> None:
    """The ReLU behind a linear layer: each of its features is a channel of one ReLU."""
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 10))
    result = reduce(own, budget=520, data=(TRAIN, VALIDATION), recipe=SHORT, folder=tmp_path, granularity="channel")
    layers = partial_activations(result.model)
    assert 0 < result.relus <= 520
    assert all(len(channel.unique()) == 1 for channel in layers["1"].mask)
    fewer = reduce(own, budget=264, data=(TRAIN, VALIDATION), recipe=replace(SHORT, epochs=1), folder=tmp_path / "fewer",
                   start=result.model, granularity="channel")
    assert 0 < fewer.relus <= 264


def test_images_in_the_order_of_their_classes_reduce_as_well(teacher: nn.Module, tmp_path: Path) -> None:
    """Statistics, polynomials and validation between epochs are of all classes, however a caller has ordered the images."""
    def ordered(split: Split) -> Split:
        order = split.labels.argsort()
        return replace(split, images=split.images[order], labels=split.labels[order])

    many = replace(TRAIN, images=TRAIN.images.repeat(20, 1, 1, 1), labels=TRAIN.labels.repeat(20))  # beyond every sample
    shuffled, sorted_ = (reduce(teacher, budget=3000, data=(data, VALIDATION), recipe=replace(SHORT, epochs=1), folder=tmp_path / name,
                                c2="channel").validation_accuracy for name, data in (("shuffled", many), ("sorted", ordered(many))))
    assert sorted_ > shuffled - 0.1
