"""Compile a trained PyTorch network to the model file that the protocol runs.

torch.fx traces the network; dropout and identities vanish, BatchNorm folds into the layer before it, ReLUs and partial
activations become activation nodes; calibration on sample images then chooses the fixed-point formats. The nodes
form the `crypten.nn.Graph` that `protocol.crypten_adapter.build_graph` makes in every role.
"""

from __future__ import annotations

import copy
import json
import math
import operator
import os
import secrets
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, fx, nn

from model_opt.activation import IDENTITY, LINEAR, SQUARE, PartialActivation, Tracer, partial_activations, replace_relus, separate_relus
from model_opt.data import Split
from model_opt.training import Score
from protocol.errors import ModelFileError
from protocol.model import FixedPoint, Model, Node, PublicModel, parse_public, tensors_digest
from protocol.plaintext import Plaintext
from protocol.plan import make_plan
from protocol.ring import RING_BITS
from protocol.simulation import Simulation, simulate

SUPPORTED = ("Conv2d", "Linear", "BatchNorm2d", "BatchNorm1d", "ReLU", "PartialActivation", "addition", "AvgPool2d",
             "AdaptiveAvgPool2d", "MaxPool2d", "Flatten", "Dropout", "Identity")
LOGIT_MARGIN = 4.0
"""Times the largest logit of calibration: what is beyond comes from an image unlike all of these, or from a truncation that failed."""
FAILURE_TARGET = 2.0**-14
RANGE_MARGIN = 4.0
"""A ReLU's input may be this many times larger than any seen in calibration before its comparison fails."""
MAGNITUDE_MARGIN = 2.0
TOLERANCE = 0.01
"""Of the largest logit: single precision rounds, and networks of squares magnify it; another function differs by more."""
FACTOR_BITS = 7
IMAGES_AT_ONCE = 50
"""In a simulated pass; a fifth faster than 100 at ResNet-18 of width 64."""


class CompileError(Exception):
    """The network cannot be compiled. The message names the layer, its place, and what is supported."""


def _unsupported(what: str, where: str, why: str = "") -> CompileError:
    return CompileError(f"{what} at {where!r} is not supported{': ' + why if why else ''}; supported: {', '.join(SUPPORTED)}")


def _public_factors(c2: Tensor) -> dict[str, Any]:
    """A c2 per channel as public integers of FACTOR_BITS bits and a power of two; none is zero."""
    shift = int((2.0**FACTOR_BITS - 1) / float(c2.abs().max().clamp_min(2.0**-17))).bit_length() - 1
    factors = torch.round(c2 * 2.0**shift)
    factors = torch.where(factors == 0, torch.where(c2 < 0, -1.0, 1.0).double(), factors)
    return {"c2_shift": shift, "c2_factor": [int(f) for f in factors]}


@dataclass
class _Draft:
    """A node under construction: public attributes and private real tensors."""

    name: str
    op: str
    inputs: list[str]
    attrs: dict[str, Any]
    tensors: dict[str, Tensor]
    where: str


def _pair(value: Any) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(v) for v in value]


class _Lowering:
    """Walks a traced graph and drafts nodes; `alias` maps fx nodes to the drafted value they stand for."""

    def __init__(self, traced: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> None:
        self.traced, self.shapes = traced, shapes
        self.drafts: dict[str, _Draft] = {}
        self.alias: dict[str, str] = {}

    def run(self) -> list[_Draft]:
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                if "input" in self.alias.values():
                    raise CompileError("the network takes more than one input; exactly one image is supported")
                self.alias[node.name] = "input"
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise CompileError("the network returns more than one tensor; exactly one is supported")
                last = self.alias[node.args[0].name]
                if not self.drafts or last != next(reversed(self.drafts)):
                    raise CompileError("the network's output is not its last layer")
            elif node.op == "call_module":
                if node.kwargs and not node.args and len(node.kwargs) == 1:
                    node.args, node.kwargs = tuple(node.kwargs.values()), {}
                if node.kwargs or len(node.args) != 1:
                    raise _unsupported("a call with several arguments", str(node.target))
                self._module(node, self.traced.get_submodule(str(node.target)), str(node.target))
            elif node.op in ("call_function", "call_method"):
                self._function(node)
            else:
                raise _unsupported(f"a {node.op} node", node.name)
        return list(self.drafts.values())

    def _input(self, node: fx.Node, index: int = 0) -> str:
        argument = node.args[index]
        if not isinstance(argument, fx.Node):
            raise _unsupported("an operation with a constant", node.name)
        return self.alias[argument.name]

    def _shape(self, node: fx.Node, index: int = 0) -> tuple[int, ...]:
        argument = node.args[index]
        assert isinstance(argument, fx.Node)
        return self.shapes[argument.name]

    def _foldable(self, node: fx.Node, source: str) -> _Draft | None:
        """The convolution or matrix that `node` alone reads, through what has vanished between them; None if there is none."""
        draft, reader = self.drafts.get(source), node
        if draft is None or draft.op not in ("conv2d", "linear"):
            return None
        while reader.name != source:
            argument = reader.args[0]
            assert isinstance(argument, fx.Node)
            if len(argument.users) != 1:
                return None
            reader = argument
        return draft

    def _emit(self, node: fx.Node, op: str, inputs: list[str], where: str, attrs: dict[str, Any] | None = None,
              **tensors: Tensor) -> None:
        self.alias[node.name] = node.name
        self.drafts[node.name] = _Draft(node.name, op, inputs, attrs or {}, tensors, where)

    def _module(self, node: fx.Node, module: nn.Module, where: str) -> None:
        kind = type(module).__name__
        source = self._input(node)
        if isinstance(module, (nn.Dropout, nn.Dropout2d, nn.Identity)):
            self.alias[node.name] = source
        elif isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros" or isinstance(module.padding, str):
                raise _unsupported(kind, where, "only numeric zero padding")
            bias = module.bias if module.bias is not None else torch.zeros(module.out_channels)
            attrs = {"shape": list(module.weight.shape), "stride": _pair(module.stride), "padding": _pair(module.padding),
                     "dilation": _pair(module.dilation), "groups": module.groups}
            self._emit(node, "conv2d", [source], where, attrs, weight=module.weight.double(), bias=bias.double())
        elif isinstance(module, nn.Linear):
            if len(self._shape(node)) != 2:
                raise _unsupported(kind, where, "its input must be flat; put a Flatten before it")
            bias = module.bias if module.bias is not None else torch.zeros(module.out_features)
            self._emit(node, "linear", [source], where, {"shape": list(module.weight.shape)},
                       weight=module.weight.double(), bias=bias.double())
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            self._batch_norm(node, module, source, where)
        elif isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
            self._pool(node, module, source, where)
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            self._adaptive_pool(node, module, source, where)
        elif isinstance(module, nn.Flatten):
            if module.start_dim != 1 or module.end_dim != -1:
                raise _unsupported(kind, where, "only start_dim=1, end_dim=-1")
            self._emit(node, "flatten", [source], where)
        elif isinstance(module, PartialActivation):
            self._activation(node, module, source, where)
        else:
            raise _unsupported(kind, where)

    def _batch_norm(self, node: fx.Node, module: nn.BatchNorm2d | nn.BatchNorm1d, source: str, where: str) -> None:
        if module.running_mean is None or module.running_var is None:
            raise _unsupported("BatchNorm without running statistics", where)
        scale = (module.running_var.double() + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight.double()
        shift = -module.running_mean.double() * scale
        if module.bias is not None:
            shift = shift + module.bias.double()
        if draft := self._foldable(node, source):
            weight = draft.tensors["weight"]
            draft.tensors["weight"] = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            draft.tensors["bias"] = draft.tensors["bias"] * scale + shift
            self.alias[node.name] = source
            return
        shape = self._shape(node)
        if len(shape) != 4:
            raise _unsupported("BatchNorm", where, "it does not follow a convolution or linear layer directly")
        channels = shape[1]  # a depthwise 1x1 convolution: a private scale per channel
        attrs = {"shape": [channels, 1, 1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": channels}
        self._emit(node, "conv2d", [source], where, attrs, weight=scale.view(-1, 1, 1, 1), bias=shift)

    def _pool(self, node: fx.Node, module: nn.MaxPool2d | nn.AvgPool2d, source: str, where: str) -> None:
        kernel = _pair(module.kernel_size)
        stride = _pair(module.stride if module.stride is not None else module.kernel_size)
        if module.ceil_mode or getattr(module, "dilation", 1) not in (1, (1, 1)) or getattr(module, "return_indices", False):
            raise _unsupported(type(module).__name__, where, "ceil_mode, dilation and return_indices")
        padding = _pair(module.padding)
        if isinstance(module, nn.AvgPool2d) and (module.divisor_override or (padding != [0, 0] and not module.count_include_pad)):
            raise _unsupported("AvgPool2d", where, "divisor_override, or padding that is not counted")
        op = "max_pool2d" if isinstance(module, nn.MaxPool2d) else "avg_pool2d"
        self._emit(node, op, [source], where, {"kernel": kernel, "stride": stride, "padding": padding})

    def _adaptive_pool(self, node: fx.Node, module: nn.AdaptiveAvgPool2d, source: str, where: str) -> None:
        height, width = self._shape(node)[2:]
        target = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,) * 2
        rows, columns = (target[0] or height), (target[1] or width)
        if height % rows or width % columns:
            raise _unsupported("AdaptiveAvgPool2d", where, f"{height}x{width} does not divide into {rows}x{columns}")
        kernel = [height // rows, width // columns]
        self._emit(node, "avg_pool2d", [source], where, {"kernel": kernel, "stride": kernel, "padding": [0, 0]})

    def _activation(self, node: fx.Node, module: PartialActivation, source: str, where: str) -> None:
        if bool((module.mask == LINEAR).any()):
            source = self._scale(node, module, source, where)
        mask = torch.where(module.mask == LINEAR, IDENTITY, module.mask)
        if not bool((mask != IDENTITY).any()):
            self.alias[node.name] = source  # nothing but identities: no layer, no round
            return
        attrs = {"c2_shift": int(module.c2_shift)}
        if module.c2 is not None and bool((mask == SQUARE).any()):
            attrs = _public_factors(module.c2.flatten().double())
        self._emit(node, "activation", [source], where, attrs, mask=mask,
                   c1=module.c1.double().flatten(), c0=module.c0.double().flatten())

    def _scale(self, node: fx.Node, module: PartialActivation, source: str, where: str) -> str:
        """c1 z + c0 at the linear pixels: folded into the layer before where whole channels are linear, else a node."""
        linear = module.mask == LINEAR
        weight = torch.where(linear, module.c1, 1.0).double()
        bias = torch.where(linear, module.c0, 0.0).double()
        by_channel = bool((linear == linear.reshape(len(linear), -1)[:, :1].view(module.channels)).all())
        if by_channel and (draft := self._foldable(node, source)):
            scale, shift = (t.reshape(len(t), -1)[:, 0] for t in (weight, bias))
            draft.tensors["weight"] = draft.tensors["weight"] * scale.view(-1, *[1] * (draft.tensors["weight"].dim() - 1))
            draft.tensors["bias"] = draft.tensors["bias"] * scale + shift
            return source
        name = f"{node.name}_scale"
        self.drafts[name] = _Draft(name, "scale", [source], {"shape": list(weight.shape)}, {"weight": weight, "bias": bias}, where)
        return name

    def _function(self, node: fx.Node) -> None:
        if node.target in (operator.add, operator.iadd, torch.add, "add", "add_") and not node.kwargs:
            a, b = self._input(node, 0), self._input(node, 1)
            if self._shape(node, 0) != self._shape(node, 1):
                raise _unsupported("an addition with broadcasting", node.name)
            if a == b:
                raise _unsupported("adding a value to itself", node.name)
            self._emit(node, "add", [a, b], node.name)
        elif node.target in (torch.flatten, "flatten") and tuple(node.args[1:]) == (1,) and not node.kwargs:
            self._emit(node, "flatten", [self._input(node)], node.name)
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            raise _unsupported(f"the operation {name!r}", node.name)


def _line_of(error: BaseException) -> str:
    """The last line of an error's way that is not PyTorch's, " (file, line n)", or nothing."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__)
           if not frame.filename.startswith((os.path.dirname(torch.__file__), os.path.dirname(__file__), "<"))]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _trace(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[list[_Draft], tuple[int, ...]]:
    """The network's drafts, and the shape of its output for one image."""
    tracer = Tracer()
    try:
        traced = fx.GraphModule(model, tracer.trace(model))
    except Exception as error:
        kind = type(model.get_submodule(tracer.where)).__name__
        place = f"module {tracer.where!r} ({kind})" if tracer.where else f"the network ({kind})"
        raise CompileError(f"torch.fx cannot trace {place}: {error}{_line_of(error)}; write its forward without data-dependent "
                           "control flow") from error
    shapes: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n.name] = tuple(result.shape)
            return result

    try:
        output = Recorder(traced).run(torch.zeros(1, *input_shape))
    except Exception as error:
        raise CompileError(f"the network does not run on an input of shape {input_shape}: {error}") from error
    return _Lowering(traced, shapes).run(), tuple(output.shape[1:])


def check(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a network's output for one image. Raises CompileError, naming the place, if it could not be compiled later."""
    *_, output_shape = _lower(network, torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0)))
    return output_shape


@torch.no_grad()
def _lower(network: nn.Module, images: Tensor) -> tuple[tuple[Node, ...], dict[str, Tensor], dict[str, Tensor], tuple[int, ...]]:
    """A network's nodes, masks and real tensors, and the shape of its output for one image.

    Together they compute what the network does on `images` (N, *input_shape), or it raises CompileError: a trace knows nothing of
    operations in place, nor of layers that are not what they inherit from.
    """
    shape = tuple(images.shape[1:])
    partial = _with_partial_activations(network, shape)
    drafts, output_shape = _trace(partial, shape)
    nodes = tuple(Node(d.name, d.op, tuple(d.inputs), d.attrs) for d in drafts)
    masks = {d.name: d.tensors.pop("mask").clone() for d in drafts if d.op == "activation"}
    reals = {f"{d.name}.{k}": v.detach() for d in drafts for k, v in d.tensors.items()}
    original = copy.deepcopy(network).cpu().float().eval()
    for layer in partial_activations(original).values():
        if layer.c2 is not None and bool((layer.mask == SQUARE).any()):
            public = _public_factors(layer.c2.flatten().double())
            layer.c2.copy_(torch.tensor(public["c2_factor"]).view(layer.channels) * 2.0 ** -public["c2_shift"])
    expected = original(images)
    largest = max([1.0, *(float(value.abs().max()) for name, value in reals.items() if name.endswith(".weight"))])
    bits = 62 - math.frexp(largest)[1]  # as precise as 64-bit integers can be
    exact = PublicModel("", shape, nodes, FixedPoint(8, bits, 62, 1.0), (), (), (), masks, "0" * 64)
    gap = (Plaintext(quantise(exact, reals, torch.zeros(32, dtype=torch.uint8)))(images) - expected).abs().max()
    if bool(expected.isfinite().all()) and not float(gap) <= TOLERANCE * max(float(expected.abs().max()), 1e-2):
        raise CompileError("the compiled layers compute something else than the network; does its forward change a value in place that it "
                           "reads again (add_, relu_, inplace=True), or inherit from a layer with a forward of its own? write these out")
    return nodes, masks, reals, output_shape


def _with_partial_activations(network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    try:
        return replace_relus(separate_relus(copy.deepcopy(network).cpu().float().eval()), input_shape)
    except ValueError as error:
        raise CompileError(str(error)) from error
    except Exception as error:  # whatever a user's forward raises
        raise CompileError(f"the network does not run on an input of shape {input_shape}: {error}") from error


def compile_model(network: nn.Module, calibration: Tensor, *, name: str, classes: tuple[str, ...], mean: tuple[float, ...],
                  std: tuple[float, ...], eight_bits: bool = False, progress: Callable[[str], None] = lambda _: None) -> Model:
    """Compile a trained network.

    Args:
        network: any module that torch.fx can trace; ReLUs and PartialActivation are its activations.
        calibration: normalised images (N, *input_shape), float; they choose the number formats.
        mean, std: per channel, in units of pixel / 255; the client normalises with them.
        eight_bits: store weights as 8-bit integers per output channel.

    Raises CompileError.
    """
    if calibration.dim() < 2 or len(calibration) == 0:
        raise CompileError("calibration needs at least one image")
    input_shape = tuple(calibration.shape[1:])
    nodes, masks, reals, _ = _lower(network, calibration[:2].float().cpu())
    public = PublicModel(name, input_shape, nodes, FixedPoint(8, 8, 62, 1.0), tuple(classes), tuple(map(float, mean)),
                         tuple(map(float, std)), masks, "0" * 64)
    try:
        parse_public(json.loads(json.dumps(public.describe())), masks)  # what no server would load
    except ModelFileError as error:
        raise CompileError(str(error)) from error
    make_plan(public, 1)
    return _calibrate(public, reals, calibration, eight_bits, progress)


def quantise(public: PublicModel, reals: dict[str, Tensor], salt: Tensor, eight_bits: bool = False) -> Model:
    """Weights as integers with f_w fractional bits in the smallest type, the salt, and the digest over all of it.

    eight_bits: each row (output channel) of a kernel or matrix as 8-bit integers times an integer step of its own; half the size.
    """
    private: dict[str, Tensor] = {"salt": salt}
    for key, value in reals.items():
        if key.endswith(".weight") and eight_bits and value.dim() in (2, 4) and value[0].numel() > 1:
            rows = value.flatten(1) * 2.0**public.fixed_point.weight_bits
            step = (rows.abs().amax(1) / 127).ceil().clamp_min(1)
            private[key] = torch.round(rows / step[:, None]).to(torch.int8).view(value.shape)
            private[f"{key}_step"] = step.to(torch.int32)
        elif key.endswith(".weight"):
            integers = torch.round(value * 2.0**public.fixed_point.weight_bits).long()
            largest = int(integers.abs().max())
            private[key] = integers.to(torch.int16 if largest < 1 << 15 else torch.int32 if largest < 1 << 31 else torch.int64)
        else:
            private[key] = value.float()
    return Model(replace(public, private_digest=tensors_digest(private).hex()), private)


def _calibrate(public: PublicModel, reals: dict[str, Tensor], images: Tensor, eight_bits: bool,
               progress: Callable[[str], None]) -> Model:
    """Choose the largest f_a = f_w - 1 whose failure bound meets FAILURE_TARGET, and n from the ranges seen.

    An element y is spoilt by local truncation with probability at most |y| 2^-63; the bound sums this over every
    truncated element of the worst calibration image, with MAGNITUDE_MARGIN.
    """
    salt = torch.frombuffer(bytearray(secrets.token_bytes(32)), dtype=torch.uint8)
    for activation_bits in range(14, 5, -1):
        point = FixedPoint(activation_bits, activation_bits + 1, 62, 1.0)
        model = quantise(replace(public, fixed_point=point), reals, salt, eight_bits)
        seen, logits = Simulation(point), torch.zeros(1, dtype=torch.float64)
        progress(f"calibrating f_a = {activation_bits}")
        for start in range(0, len(images), IMAGES_AT_ONCE):
            part = Simulation(point)
            logits = torch.maximum(logits, simulate(model, images[start : start + IMAGES_AT_ONCE], part).abs().max())
            seen.truncated_magnitude = max(seen.truncated_magnitude, part.truncated_magnitude)
            seen.largest_compared = max(seen.largest_compared, part.largest_compared)
        bound = MAGNITUDE_MARGIN * seen.truncated_magnitude * 2.0 ** (1 - RING_BITS)
        if bound <= FAILURE_TARGET:
            n = max(int(RANGE_MARGIN * seen.largest_compared).bit_length() + 1, 4)
            point = FixedPoint(activation_bits, activation_bits + 1, n, bound)
            largest = LOGIT_MARGIN * max(float(logits), 1.0)
            return quantise(replace(public, fixed_point=point, largest_logit=largest), reals, salt, eight_bits)
    raise CompileError("the activations are too large for the ring at any supported precision; is the network trained and "
                       "are the calibration images normalised?")


def fixed_point_score(model: Model, split: Split) -> Score:
    """Accuracy and cross entropy in simulated fixed point. Shows its progress on stderr."""
    starts = track(range(0, len(split), IMAGES_AT_ONCE), description="fixed point", console=Console(stderr=True), transient=True)
    return Score.of(torch.cat([simulate(model, split[start : start + IMAGES_AT_ONCE].normalised()) for start in starts]), split.labels)
