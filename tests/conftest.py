"""Small networks, compiled once, and running services on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model_opt.activation import partial_activations, replace_relus
from model_opt.compiler import compile_model
from protocol import relucent_pb2_grpc as rpc
from protocol import ring
from protocol.model import Model, save
from protocol.tls import Identity
from protocol.transport import connect
from server.catalogue import Catalogue
from server.certificates import Authority
from server.dealer import DealerService
from server.metrics import Metrics
from server.service import Access, InferenceService, Limits
from server.sessions import Sessions
from server.state import State
from server.stock import Stock
from tests.services import PLAINTEXT, SHAPE, Serve, Services, start
from tests.site import Site


@pytest.fixture
def digits_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies vectors of 8-bit numbers, whatever this one is."""
    monkeypatch.setattr(ring, "DIGITS_PAY", True)


CLASSES = tuple("abcdefghij")


class TinyResidual(nn.Module):
    """Every supported layer in 8x8: strides, padding, dilation, groups, both pools, a residual, two maps in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.max = nn.MaxPool2d(3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=8)
        self.relu2 = nn.ReLU()
        self.point = nn.Conv2d(8, 8, 1, groups=2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.relu3 = nn.ReLU()
        self.average = nn.AvgPool2d(3, 1, 1)
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max(self.relu1(self.bn1(self.conv1(x))))
        y = self.conv2(self.point(self.relu2(self.depthwise(x))))
        y = self.relu3(y + self.shortcut(x) + x)
        return self.fc(self.dropout(self.flatten(self.pool(self.bn2(self.average(y))))))


def build_compiled(network: nn.Module, images: Tensor, **options: object) -> Model:
    """Compile with the tests' class names and normalisation."""
    classes = options.pop("classes", CLASSES)
    return compile_model(network, images, name="tiny", classes=classes, mean=(0.5,) * images.shape[1],  # type: ignore[arg-type]
                         std=(0.25,) * images.shape[1])


def make_network(mixed: bool) -> nn.Module:
    """TinyResidual with random statistics; `mixed` puts identity, square and ReLU at random pixels."""
    torch.manual_seed(1)
    network = TinyResidual().eval()
    for norm in (network.bn1, network.bn2):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    if mixed:
        replace_relus(network, SHAPE)
        for layer in partial_activations(network).values():
            layer.mask.copy_(torch.randint(0, 3, layer.mask.shape))
            layer.fit(torch.zeros(len(layer.mask)), torch.ones(len(layer.mask)), damping=0)
    return network


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Normalised images, float64 (4, 3, 8, 8)."""
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(2)).double()


@pytest.fixture(scope="session")
def relu_model(images: Tensor) -> Model:
    return build_compiled(make_network(False), images.float())


@pytest.fixture(scope="session")
def mixed_model(images: Tensor) -> Model:
    return build_compiled(make_network(True), images.float())


@contextmanager
def serving(root: Path) -> Iterator[Serve]:
    """serve(model, **options of Stock, Limits and Sessions) -> Services, stopped in the end."""
    started: list[Services] = []

    def run(*models: Model, stock_bytes: int = 4 << 30, client_bytes: int = 4 << 30, lifetime_s: float = 3600.0, slots: int = 4,
            client_slots: int = 4, waiting: int = 64, wait_s: float = 30.0, folder: Path | None = None, url: str = "sqlite://",
            timelines: bool = False, **limits: float) -> Services:
        dealer = DealerService(plaintext=True, timelines=timelines)
        dealer_server, dealer_address = start(lambda s: rpc.add_DealingServicer_to_server(dealer, s))
        state = State(url, bytes(32))
        catalogue = Catalogue(connect(dealer_address, PLAINTEXT), state, 600.0)
        catalogue.replace(list(models), 10)
        stock = Stock(state, folder=folder, limit_bytes=stock_bytes, client_bytes=client_bytes, lifetime_s=lifetime_s)
        sessions = Sessions(slots, client_slots, waiting, waiting, wait_s)
        bounds = Limits(**limits, timelines=timelines)  # type: ignore[arg-type]
        service = InferenceService(catalogue, stock, Access(state, True), sessions, Metrics("server"), bounds)
        server, address = start(lambda s: rpc.add_InferenceServicer_to_server(service, s))
        started.append(Services(address, dealer_address, service, catalogue, stock, state, sessions, dealer, dealer_server, server,
                                root / "cache"))
        return started[-1]

    yield run
    for services in started:
        services.inference_server.stop(0)
        services.dealer_server.stop(0)
        services.state.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """See `serving`."""
    with serving(tmp_path) as run:
        yield run


@pytest.fixture
def site(tmp_path: Path, mixed_model: Model) -> Iterator[Site]:
    save(mixed_model, tmp_path / "m.safetensors")
    authority = Authority(tmp_path)
    for role in ("dealer", "server"):
        authority.issue(Identity(role, role), ["localhost", "127.0.0.1"])
    made = Site(tmp_path, tmp_path / "m.safetensors")
    yield made
    for process in made.processes:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
