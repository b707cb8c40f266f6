"""Cost-aware reduction: targets in ms and bytes are met by the plan's own count, by dropping layers and by lines at single pixels."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model_opt.activation import IDENTITY, LINEAR, RELU, SQUARE, partial_activations, replace_relus
from model_opt.compiler import compile_model
from model_opt.files import serialise_network
from model_opt.methods import BudgetError, Reduced, Task, cost, make_options, reduce
from model_opt.methods.cost import CostModel, Reduction, choose, cost_model, decide, demote, line_scores
from model_opt.networks import build
from model_opt.training import Recipe, TrainingError, fit
from protocol.inference import infer
from protocol.links import LINKS
from protocol.model import Model
from protocol.plan import Plan, make_plan
from protocol.simulation import simulate
from tests.samples import MEAN, STD, learnable, network_info

TRAIN, VALIDATION = learnable(320), learnable(100)
SHORT = Recipe(epochs=3, batch=32, lr=0.02)
PIXELS = {"1": 1024, "5": 512, "8": 128}
COMPUTE_MS, RELU_MS = 10.0, 1e-3


def network() -> nn.Module:
    """Three activation layers of `PIXELS`, and a max pool of two rounds."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    model = network()
    assert fit(model, TRAIN, VALIDATION, Recipe(epochs=4, batch=32, lr=0.05), tmp_path_factory.mktemp("teacher")) > 0.4
    return model


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known speed."""
    measure = cost.measure

    def known(task: Task, options: cost.Options) -> CostModel:
        return in_ms(make_plan(compiled(task.student()).public, 1)) if options.target_ms else measure(task, options)

    monkeypatch.setattr(cost, "measure", known)


def in_ms(plan: Plan, link: str = "wan") -> CostModel:
    return cost_model("ms", plan, lambda *traffic: 1000 * LINKS[link].seconds(*traffic), COMPUTE_MS, RELU_MS)


def in_bytes(plan: Plan) -> CostModel:
    return cost_model("bytes", plan, lambda _rounds, up, down: up + down)


def compiled(model: nn.Module) -> Model:
    return compile_model(model, VALIDATION[:4].normalised(), name="m", classes=(), mean=MEAN, std=STD)


def on_wan_ms(plan: Plan) -> float:
    return 1000 * LINKS["wan"].seconds(plan.rounds, plan.online_bytes_up, plan.online_bytes_down)


def bytes_of(plan: Plan) -> int:
    return plan.online_bytes_up + plan.online_bytes_down


def run(teacher: nn.Module, folder: Path, budget: int = sum(PIXELS.values()), **options: Any) -> Reduced:
    return reduce(teacher, method="cost", budget=budget, data=(TRAIN, VALIDATION), recipe=SHORT, folder=folder, **options)


def test_the_cost_model_counts_what_the_plan_counts() -> None:
    everything = make_plan(compiled(network()).public, 1)
    model = replace_relus(network(), (3, 32, 32))
    layers = partial_activations(model)
    assert {name: layer.mask.numel() for name, layer in layers.items()} == PIXELS
    for name, choices in (("1", [IDENTITY, SQUARE, RELU, LINEAR]), ("5", [LINEAR]), ("8", [SQUARE, LINEAR])):
        layers[name].mask.copy_(torch.tensor(choices)[torch.randint(0, len(choices), layers[name].mask.shape)])
    plan = make_plan(compiled(model).public, 1)
    relus = layers["1"].count(RELU)
    active = relus + layers["1"].count(SQUARE) + layers["8"].count(SQUARE)
    assert in_bytes(everything).total(2, active, relus) == bytes_of(plan)
    assert plan.rounds == everything.rounds - 1 == 1 + 2 + 2 * 2  # logits, layers, max pools
    assert in_ms(everything).total(2, active, relus) == pytest.approx(COMPUTE_MS + RELU_MS * relus + on_wan_ms(plan))


def test_what_a_target_affords_costs_no_more() -> None:
    for model in (CostModel("ms", 20, 80, 1e-3, 5e-4), CostModel("ms", 20, 0, 0, 1e-3), CostModel("bytes", 800, 0, 16, 0)):
        for target in (10, 150, 263.7, 1700, 30_000):
            for limit in (0, 50, 10_000):
                counts = model.afford(target, 3, 2000, limit)
                if counts is None:
                    assert model.total(3, min(limit, 40), min(limit, 40)) > target - max(model.pixel, 1e-9)
                    continue
                active, relus = counts
                assert min(limit, 40) <= relus <= min(limit, active) and active <= 2000
                assert model.total(3, active, relus) <= target + 1e-9
                dearer = (active + 1, relus) if active < 2000 else (active, relus + 1)
                assert relus == limit or relus == active == 2000 or model.total(3, *dearer) > target
    assert CostModel("ms", 20, 80, 1e-3, 5e-4).afford(20, 0, 0, 9) == (0, 0)


def test_link_decides_what_to_drop(teacher: nn.Module) -> None:
    task = Task(teacher, 10**9, TRAIN, VALIDATION, SHORT, Path())
    plan = make_plan(compiled(teacher).public, 1)
    choice = choose(task, in_ms(plan, "loopback"), COMPUTE_MS + 0.5)
    assert (choice.dropped, choice.active, choice.relus) == ([], sum(PIXELS.values()), 500)  # no round trip to save
    wan = in_ms(plan)
    choice = choose(task, wan, wan.total(2, sum(PIXELS.values()), 100))
    assert len(choice.dropped) == 1
    with pytest.raises(BudgetError, match=r"even without any activation it takes 4[0-9]{2} ms; raise target_ms"):
        choose(task, wan, 300)


def test_harm_is_what_a_layer_adds(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer dropped harms; of the others the one that adds less per saving follows, though it saves less."""
    probe = Task(teacher, 10**9, TRAIN, VALIDATION, SHORT, Path()).student()
    harms = {"1": 0.3, "5": 0.4, "8": 0.1}
    monkeypatch.setattr(Task, "student", lambda _: probe)
    monkeypatch.setattr(cost, "distillation_loss", lambda *_: torch.tensor(sum(
        harms[name] for name, layer in partial_activations(probe).items() if bool((layer.mask == LINEAR).all()))))
    task = Task(teacher, 10**9, TRAIN, VALIDATION, SHORT, Path())
    assert choose(task, CostModel("ms", 0, 100, 1, 0), 150).dropped == ["1", "8"]


def test_of_equal_counts_the_least_harmful_network_is_chosen(teacher: nn.Module) -> None:
    """A target that pays for two thirds of the bytes of all pixels, but drops of layers save no round trip."""
    task = Task(teacher, 10**9, TRAIN, VALIDATION, SHORT, Path())
    model = in_bytes(make_plan(compiled(teacher).public, 1))
    choice = choose(task, model, model.total(0, 1100, 0))
    assert choice.dropped == [] and choice.active == choice.relus == 1100


def test_scores_are_what_the_loss_changes() -> None:
    model = replace_relus(network(), (3, 32, 32)).eval()
    layers = partial_activations(model)
    for layer in layers.values():
        layer.mask.fill_(SQUARE)
        layer.c2_shift.fill_(12)
    one = TRAIN[:1]
    scores = line_scores(model, one)

    @torch.no_grad()
    def loss() -> float:
        return float(nn.functional.cross_entropy(model.double()(one.normalised().double()), one.labels))

    before = loss()
    for name, layer in layers.items():
        pixel = int(scores[name].argmax())
        layer.mask.view(-1)[pixel] = LINEAR
        assert float(scores[name].max()) == pytest.approx((loss() - before) ** 2, rel=0.1), name
        layer.mask.view(-1)[pixel] = SQUARE


def test_the_pixels_of_the_lowest_scores_become_lines() -> None:
    layers = partial_activations(replace_relus(network(), (3, 32, 32)))
    scores = {name: torch.rand(layer.mask.shape) for name, layer in layers.items()}
    demote(layers, scores, 300)
    kept = torch.cat([layer.mask.flatten() == RELU for layer in layers.values()])
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert int(kept.sum()) == 300
    assert float(flat[kept].min()) > float(flat[~kept].max())
    assert {int(v) for layer in layers.values() for v in layer.mask.unique()} == {RELU, LINEAR}


@pytest.mark.parametrize("unit", ["ms", "bytes"])
@pytest.mark.parametrize("budget", [150, sum(PIXELS.values())])
@pytest.mark.usefixtures("measured")
def test_the_plan_of_the_network_meets_the_target(budget: int, unit: str, teacher: nn.Module, tmp_path: Path) -> None:
    """A target that pays for 700 pixels and, in ms, for one layer: the others are dropped; bytes pay for no round trips."""
    everything = make_plan(compiled(teacher).public, 1)
    full = in_ms(everything) if unit == "ms" else in_bytes(everything)
    target = int(full.total(1, 700, 100))
    result = run(teacher, tmp_path, budget, **({"target_ms": target, "link": "wan"} if unit == "ms" else {"target_bytes": target}))
    model = compiled(result.model)
    plan = make_plan(model.public, 1)
    if unit == "bytes":
        taken, spare = float(bytes_of(plan)), full.pixel
        sent = infer(model, VALIDATION[:1].normalised().double())
        assert taken == sent.online_up.bytes + sent.online_down.bytes
    else:
        taken, spare = COMPUTE_MS + RELU_MS * result.relus + on_wan_ms(plan), 1.0
    assert target - spare < taken <= target
    assert len(result.details["dropped"]) == (2 if unit == "ms" else 0)
    assert result.details[f"predicted_{unit}"] == pytest.approx(taken, abs=0.01)
    assert result.relus <= budget
    activations = partial_activations(result.model)
    assert all(bool((activations[name].mask == LINEAR).all()) for name in result.details["dropped"])
    wanted = {RELU, LINEAR, SQUARE} if budget == 150 else {RELU, LINEAR}
    assert any(wanted <= set(layer.mask.unique().tolist()) for layer in activations.values())  # side by side in one layer
    x = VALIDATION[:2].normalised().double()
    assert torch.allclose(infer(model, x).logits, simulate(model, x), atol=0.01)
    assert torch.allclose(simulate(model, x), result.model(x.float()).double(), atol=0.05)
    assert result.validation_accuracy > 0.15


def test_every_choice_in_one_layer_runs_privately() -> None:
    model = replace_relus(network().eval(), (3, 32, 32))
    for layer in partial_activations(model).values():
        layer.mask.copy_(torch.tensor([IDENTITY, SQUARE, RELU, LINEAR])[torch.randint(0, 4, layer.mask.shape)])
        layer.c1.data.normal_(0.5, 0.1)
        layer.c0.data.normal_(0, 0.1)
    x = VALIDATION[:2].normalised()
    result = compiled(model)
    assert torch.allclose(infer(result, x.double()).logits, simulate(result, x.double()), atol=0.01)
    assert torch.allclose(simulate(result, x.double()), model(x).double(), atol=0.05)


def test_lines_behind_a_linear_layer(tmp_path: Path) -> None:
    """Dropped whole or pixel by pixel, they cost nothing online; the linear layer before takes them in."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), nn.ReLU(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    result = run(model, tmp_path, 48, target_bytes=8 * (3072 + 10) + 16 * 20)
    assert sum(layer.count(LINEAR) for layer in partial_activations(result.model).values()) == 28
    public = compiled(result.model).public
    assert bytes_of(make_plan(public, 1)) == 8 * (3072 + 10) + 16 * 20
    assert "scale" not in [node.op for node in public.nodes]
    for first in (nn.Flatten(), nn.Linear(3072, 3072)):
        other = replace_relus(nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(3072, 10)).eval(), (3, 32, 32))
        layer = partial_activations(other)["2"]
        for choices in ([LINEAR], [IDENTITY, SQUARE, RELU, LINEAR]):
            layer.mask.copy_(torch.tensor(choices)[torch.randint(0, len(choices), layer.mask.shape)])
            x, private = VALIDATION[:2].normalised(), compiled(other)
            assert torch.allclose(infer(private, x.double()).logits, simulate(private, x.double()), atol=0.01)
            assert torch.allclose(simulate(private, x.double()), other(x).double(), atol=0.05)


def test_targets_that_contradict_each_other(teacher: nn.Module, tmp_path: Path) -> None:
    for options, reason in (({"target_ms": 5.0, "target_bytes": 5}, "exclude each other"), ({"target_bytes": -5}, "negative"),
                            ({"link": "wan"}, "link needs"),
                            ({"target_bytes": 5, "link": "wan"}, "link needs"), ({"link": "moon"}, "unknown link")):
        with pytest.raises(ValueError, match=reason):
            make_options("cost", options)
    with pytest.raises(BudgetError, match="needs target_ms or target_bytes"):
        run(teacher, tmp_path)
    with pytest.raises(BudgetError, match="raise target_bytes"):
        run(teacher, tmp_path, target_bytes=1000)


def test_a_restart_measures_nothing_anew(teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after the mask is fixed and some squares are lines, a run goes on to what it would have become, on any machine."""
    everything = make_plan(compiled(teacher).public, 1)
    goal = {"budget": 150, "target_ms": int(in_ms(everything).total(1, 700, 100)), "link": "wan"}
    monkeypatch.setattr(cost, "measure", lambda *_: in_ms(everything))
    whole = run(teacher, tmp_path / "whole", **goal)
    epochs = []

    def interrupt(_: Reduction) -> None:
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reduction, "after_epoch", interrupt, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run(teacher, tmp_path / "parts", **goal)
    monkeypatch.setattr(cost, "measure", None)
    resumed = run(teacher, tmp_path / "parts", **goal)
    assert resumed.details == whole.details
    assert all(torch.allclose(value, resumed.model.state_dict()[key], atol=1e-6) for key, value in whole.model.state_dict().items())
    with pytest.raises(TrainingError, match=r"other settings \(budget\)"):
        run(teacher, tmp_path / "parts", **{**goal, "budget": 160})
    (tmp_path / "parts" / "choice.json").write_text("{}")
    with pytest.raises(TrainingError, match="delete it to start anew"):
        run(teacher, tmp_path / "parts", **goal)


def test_other_processes_read_what_the_first_chose(teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(teacher, 150, TRAIN, VALIDATION, SHORT, tmp_path)
    options = cost.Options(target_bytes=60_000)
    first = decide(task, options)
    (tmp_path / "choice.json").rename(tmp_path / "later")
    monkeypatch.setattr(cost, "measure", None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    writing = threading.Timer(0.3, lambda: (tmp_path / "later").rename(tmp_path / "choice.json"))
    writing.start()
    assert decide(task, options) == first
    writing.join()


def test_other_processes_learn_that_there_is_no_choice(teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, options = Task(teacher, 150, TRAIN, VALIDATION, SHORT, tmp_path), cost.Options(target_bytes=1000)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(BudgetError, match="raise target_bytes"):
            decide(task, options)


def test_the_command_refuses_targets_beside_another_method(tmp_path: Path) -> None:
    from tests.test_programs import mistake, program

    (tmp_path / "t").write_bytes(serialise_network(build("resnet18", 4), network_info()))
    command = ["opt", "reduce", "--teacher", tmp_path / "t", "--out", tmp_path / "o", "--data", tmp_path]
    mistake(program(*command, "--target-ms", 500, "--method", "snl"), 2, "do not go with --method snl")
    mistake(program(*command, "--target-ms", 500, "--target-bytes", 500), 2, "exclude each other")
