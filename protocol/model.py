"""The compiled model: a public part for all three parties and a private part for the server, in one file.

The file is safetensors with one JSON description in its metadata. Tensors named `public.*` (ReLU masks) and the
description are public; tensors named `private.*` (fixed-point weights, float64 biases and polynomial coefficients,
a random salt) never leave the server. The model id is the SHA-256 of the public part, which contains the SHA-256 of
the private part; the salt keeps anybody from testing guesses of the weights against it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from protocol.errors import ModelFileError

FORMAT = "relucent-model"
VERSION = 1
MAX_PUBLIC_BYTES = 64 << 20
MAX_NODES = 4096
MAX_WEIGHTS = 1 << 27
MAX_PIXELS = 1 << 25
IDENTITY, SQUARE, RELU = 0, 1, 2
OPS = ("conv2d", "linear", "scale", "add", "avg_pool2d", "max_pool2d", "flatten", "activation")
PRIVATE_MAPS = ("conv2d", "linear", "scale")
"""Operations with a private weight of the public shape in their attributes, and a private bias."""


@dataclass(frozen=True)
class Node:
    """One layer: a name, an operation of `OPS`, the names of its inputs, and public attributes."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attrs: dict[str, Any]


@dataclass(frozen=True)
class FixedPoint:
    """Public number formats.

    activation_bits, weight_bits: fractional bits f_a, f_w. comparison_bits: n with |z| < 2^(n-1) for every ReLU.
    failure_bound: probability that local truncation spoils any element of one inference on inputs like the
    calibration images.
    """

    activation_bits: int
    weight_bits: int
    comparison_bits: int
    failure_bound: float


@dataclass(frozen=True, eq=False)
class ActivationLayer:
    """Public facts of one activation: which pixels do what, and the quadratic coefficient c2 = factor 2^-shift.

    mask: uint8 of the layer's shape without batch. c2_factor: one integer per channel, or None for 1.
    """

    name: str
    mask: Tensor
    c2_shift: int
    c2_factor: tuple[int, ...] | None

    @cached_property
    def square(self) -> Tensor:
        return (self.mask.flatten() == SQUARE).nonzero().flatten()

    @cached_property
    def relu(self) -> Tensor:
        return (self.mask.flatten() == RELU).nonzero().flatten()

    @cached_property
    def identity(self) -> Tensor:
        return (self.mask.flatten() == IDENTITY).nonzero().flatten()

    @cached_property
    def active(self) -> Tensor:
        """Pixels that are not the identity, in order: the order of every message."""
        return (self.mask.flatten() != IDENTITY).nonzero().flatten()

    @cached_property
    def relu_in_active(self) -> Tensor:
        return (self.mask.flatten()[self.active] == RELU).nonzero().flatten()

    @cached_property
    def square_in_active(self) -> Tensor:
        return (self.mask.flatten()[self.active] == SQUARE).nonzero().flatten()

    @property
    def all_active(self) -> bool:
        return len(self.active) == self.mask.numel()

    @property
    def all_square(self) -> bool:
        return len(self.square) == self.mask.numel()

    def channel_of(self, pixels: Tensor) -> Tensor:
        """Channel of each flat pixel index."""
        return pixels // (self.mask.numel() // self.mask.shape[0])

    @cached_property
    def factor_of_active(self) -> Tensor | None:
        """c2's integer factor at each active pixel, or None where it is 1."""
        if self.c2_factor is None:
            return None
        return torch.tensor(self.c2_factor)[self.channel_of(self.active)]

    def c2_of_pixels(self, pixels: Tensor) -> Tensor | float:
        """The real c2 at each pixel."""
        scale = 2.0**-self.c2_shift
        return scale if self.c2_factor is None else torch.tensor(self.c2_factor)[self.channel_of(pixels)] * scale


@dataclass(frozen=True, eq=False)
class PublicModel:
    """Everything about a model that all three parties know."""

    name: str
    input_shape: tuple[int, ...]
    nodes: tuple[Node, ...]
    fixed_point: FixedPoint
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    masks: dict[str, Tensor] = field(repr=False)
    private_digest: str
    largest_logit: float | None = None
    """A multiple of the largest absolute logit that calibration saw: beyond it a result is implausible. None if unknown."""

    @property
    def output(self) -> str:
        return self.nodes[-1].name

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _layers(self) -> dict[str, ActivationLayer]:
        layers = {}
        for node in self.nodes:
            if node.op == "activation":
                factor = node.attrs.get("c2_factor")
                layers[node.name] = ActivationLayer(
                    node.name, self.masks[node.name], node.attrs["c2_shift"], tuple(factor) if factor else None
                )
        return layers

    def activation(self, name: str) -> ActivationLayer:
        return self._layers[name]

    @property
    def relus(self) -> int:
        """ReLUs per image in the activation layers."""
        return sum(len(layer.relu) for layer in self._layers.values())

    def describe(self) -> dict[str, Any]:
        """The JSON description."""
        point = self.fixed_point
        return {
            "format": FORMAT, "version": VERSION, "name": self.name, "input_shape": list(self.input_shape),
            "nodes": [{"name": n.name, "op": n.op, "inputs": list(n.inputs), "attrs": n.attrs} for n in self.nodes],
            "fixed_point": {"activation_bits": point.activation_bits, "weight_bits": point.weight_bits,
                            "comparison_bits": point.comparison_bits, "failure_bound": point.failure_bound},
            "classes": list(self.classes), "mean": list(self.mean), "std": list(self.std),
            "private_digest": self.private_digest,
        } | ({} if self.largest_logit is None else {"largest_logit": self.largest_logit})

    @cached_property
    def model_id(self) -> str:
        """SHA-256 of the public part, hexadecimal."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        digest.update(tensors_digest(self.masks))
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The public part as a safetensors file of its own."""
        tensors = {f"public.{name}": mask for name, mask in self.masks.items()}
        data: bytes = safetensors.torch.save(tensors, {"relucent": json.dumps(self.describe(), sort_keys=True)})
        return data

    @staticmethod
    def from_bytes(data: bytes) -> PublicModel:
        """Read `to_bytes`. Raises ModelFileError for anything that is not a valid public part."""
        if len(data) > MAX_PUBLIC_BYTES:
            raise ModelFileError("the public part of the model is too large")
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            description = json.loads(header["__metadata__"]["relucent"])
            tensors = safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelFileError("this is no Relucent model: the safetensors container is damaged or foreign") from error
        return parse_public(description, {k.removeprefix("public."): v for k, v in tensors.items()})


@dataclass(frozen=True, eq=False)
class Model:
    """A model as the server holds it: public part and private tensors."""

    public: PublicModel
    private: dict[str, Tensor] = field(repr=False)

    def weights(self) -> dict[str, Tensor]:
        """Fixed-point weights, int64, by "node.weight"; those stored with 8 bits are multiplied by their row's step."""
        found = {name: value.long() for name, value in self.private.items() if name.endswith(".weight")}
        for name, weight in found.items():
            step = self.private.get(f"{name}_step")
            if step is not None:
                weight *= step.long().view(-1, *[1] * (weight.dim() - 1))
        return found

    def constants(self) -> dict[str, Tensor]:
        """Biases and polynomial coefficients, float64, by "node.bias" and so on."""
        return {name: value.double() for name, value in self.private.items() if name.endswith((".bias", ".c1", ".c0"))}

    def floats(self) -> dict[str, Tensor]:
        """Weights, biases and coefficients as real numbers, float64."""
        scale = 2.0**-self.public.fixed_point.weight_bits
        return {name: value.double() * scale for name, value in self.weights().items()} | self.constants()


def tensors_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 over names, types, shapes and contents, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.digest()


def serialise(model: Model) -> bytes:
    """The bytes of a model file."""
    tensors = {f"public.{k}": v for k, v in model.public.masks.items()}
    tensors |= {f"private.{k}": v.contiguous() for k, v in model.private.items()}
    metadata = {"relucent": json.dumps(model.public.describe(), sort_keys=True)}
    data: bytes = safetensors.torch.save(tensors, metadata)
    return data


def save(model: Model, path: Path) -> None:
    """Write a model file. Raises OSError."""
    Path(path).write_bytes(serialise(model))


def load(path: Path) -> Model:
    """Read and verify a model file. Raises ModelFileError with a hint."""
    hint = "make one with `relucent-opt compile`, or use the bundled models/ file"
    if not Path(path).is_file():
        raise ModelFileError(f"{path} is missing or no regular file", hint)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "relucent" not in metadata:
                raise ModelFileError(f"{path} is a safetensors file but no compiled Relucent model", hint)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        description = json.loads(metadata["relucent"])
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}", hint) from error
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is no model file, or it is truncated or corrupt", hint) from error
    public = parse_public(description, {k[7:]: v for k, v in tensors.items() if k.startswith("public.")})
    private = {k[8:]: v for k, v in tensors.items() if k.startswith("private.")}
    if tensors_digest(private).hex() != public.private_digest:
        raise ModelFileError(f"the private part of {path} does not match its checksum; the file is corrupt", hint)
    _check_private(public, private)
    return Model(public, private)


def _check_private(public: PublicModel, private: Mapping[str, Tensor]) -> None:
    """Raise ModelFileError unless the private tensors are those of the public layers."""
    expected: dict[str, tuple[int, ...]] = {}
    for node in public.nodes:
        if node.op in PRIVATE_MAPS:
            shape = tuple(node.attrs["shape"])
            expected |= {f"{node.name}.weight": shape, f"{node.name}.bias": shape if node.op == "scale" else shape[:1]}
        elif node.op == "activation":
            expected |= dict.fromkeys((f"{node.name}.c1", f"{node.name}.c0"), public.masks[node.name].shape[:1])
    steps = {name: (shape[0],) for name, shape in ((f"{n}_step", s) for n, s in expected.items()) if name in private}
    for name, shape in (expected | steps).items():
        _require(name in private and tuple(private[name].shape) == tuple(shape), f"the tensor {name!r} is missing or of another shape")
        _require(private[name].is_floating_point() != name.endswith((".weight", "_step")), f"the tensor {name!r} has another type")
    _require(set(private) == {*expected, *steps, "salt"}, "there are tensors that no layer uses")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ModelFileError(f"the model description is invalid: {what}")


def _ints(value: Any, count: int, low: int, high: int) -> bool:
    return (isinstance(value, list) and len(value) == count
            and all(type(v) is int and low <= v <= high for v in value))


def _check_node(node: Any, known: set[str], masks: Mapping[str, Tensor]) -> Node:
    _require(isinstance(node, dict) and set(node) == {"name", "op", "inputs", "attrs"}, "a node has wrong fields")
    name, op, inputs, attrs = node["name"], node["op"], node["inputs"], node["attrs"]
    _require(isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_]{1,128}", name) is not None, "a node has no valid name")
    _require(name not in known, f"node {name!r} appears twice")
    _require(op in OPS, f"node {name!r} has the unknown operation {str(op)[:40]!r}")
    _require(isinstance(attrs, dict), f"node {name!r} has no attributes")
    _require(isinstance(inputs, list) and len(inputs) == (2 if op == "add" else 1)
             and all(isinstance(i, str) and i in known for i in inputs), f"node {name!r} has invalid inputs")
    if op == "add":
        _require(inputs[0] != inputs[1], f"node {name!r} adds a value to itself")
    if op == "conv2d":
        ok = (_ints(attrs.get("shape"), 4, 1, 65536) and _ints(attrs.get("stride"), 2, 1, 64)
              and _ints(attrs.get("padding"), 2, 0, 64) and _ints(attrs.get("dilation"), 2, 1, 64)
              and type(attrs.get("groups")) is int and 1 <= attrs["groups"] <= 65536)
        _require(ok and math.prod(attrs["shape"]) <= 1 << 28, f"convolution {name!r} has invalid attributes")
    elif op == "linear":
        _require(_ints(attrs.get("shape"), 2, 1, 1 << 22) and math.prod(attrs["shape"]) <= 1 << 28,
                 f"linear layer {name!r} has an invalid shape")
    elif op == "scale":
        shape = attrs.get("shape")
        _require(isinstance(shape, list) and len(shape) in (1, 3) and _ints(shape, len(shape), 1, 65536)
                 and math.prod(shape) <= MAX_PIXELS, f"scale {name!r} has an invalid shape")
    elif op in ("avg_pool2d", "max_pool2d"):
        ok = (_ints(attrs.get("kernel"), 2, 1, 256) and _ints(attrs.get("stride"), 2, 1, 256)
              and _ints(attrs.get("padding"), 2, 0, 128)
              and all(2 * p <= k for p, k in zip(attrs["padding"], attrs["kernel"])))
        _require(ok, f"pooling {name!r} has invalid attributes")
    elif op == "activation":
        _require(name in masks and type(attrs.get("c2_shift")) is int and -4 <= attrs["c2_shift"] <= 24,
                 f"activation {name!r} lacks a mask or a coefficient")
        factor = attrs.get("c2_factor")
        _require(factor is None or (_ints(factor, masks[name].shape[0], -(1 << 15), 1 << 15) and 0 not in factor),
                 f"activation {name!r} has invalid coefficients")
    return Node(name, op, tuple(inputs), attrs)


def parse_public(description: Any, masks: dict[str, Tensor]) -> PublicModel:
    """Validate a description and masks from anywhere. Raises ModelFileError.

    Shapes of the layers against each other are checked by `protocol.plan.make_plan`.
    """
    _require(isinstance(description, dict) and description.get("format") == FORMAT, "it is not Relucent's")
    version = description.get("version")
    if version != VERSION:
        raise ModelFileError(f"the model has format version {str(version)[:20]}, this program reads {VERSION}",
                             "compile it again with this version")
    raw = description.get("nodes")
    _require(isinstance(raw, list) and 1 <= len(raw) <= MAX_NODES, "no nodes, or too many")
    for name, mask in masks.items():
        _require(mask.dtype == torch.uint8 and 1 <= mask.dim() <= 3 and mask.numel() > 0 and int(mask.max()) <= RELU,
                 f"mask {name[:40]!r} is invalid")
    _require(sum(mask.numel() for mask in masks.values()) <= MAX_PIXELS, "too many activations")
    known, nodes = {"input"}, []
    for item in raw:
        nodes.append(_check_node(item, known, masks))
        known.add(nodes[-1].name)
    _require(sum(math.prod(n.attrs["shape"]) for n in nodes if n.op in PRIVATE_MAPS) <= MAX_WEIGHTS, "too many weights")
    point = description.get("fixed_point")
    _require(isinstance(point, dict) and set(point) == {"activation_bits", "weight_bits", "comparison_bits", "failure_bound"}
             and all(type(point.get(k)) is int for k in
             ("activation_bits", "weight_bits", "comparison_bits")), "no fixed-point format")
    _require(4 <= point["activation_bits"] <= 24 and 4 <= point["weight_bits"] <= 24
             and 2 <= point["comparison_bits"] <= 62 and isinstance(point.get("failure_bound"), float),
             "the fixed-point format is out of range")
    shape = description.get("input_shape")
    _require(isinstance(shape, list) and len(shape) in (1, 3) and _ints(shape, len(shape), 1, 8192), "the input shape is invalid")
    for key in ("classes", "mean", "std"):
        kind = str if key == "classes" else float
        _require(isinstance(description.get(key), list) and len(description[key]) <= 65536
                 and all(isinstance(v, kind) for v in description[key]), f"{key} is invalid")
    _require(all(label.isprintable() for label in description["classes"]), "classes is invalid")
    channels = description["input_shape"][0]
    _require(len(description["mean"]) == len(description["std"]) == channels
             and all(map(math.isfinite, description["mean"] + description["std"]))
             and all(v > 0 for v in description["std"]), "mean and std do not fit the input")
    _require(isinstance(description.get("name"), str) and len(description["name"]) <= 128 and description["name"].isprintable(), "no name")
    digest = description.get("private_digest")
    _require(isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None, "no digest")
    largest = description.get("largest_logit")
    _require(largest is None or (isinstance(largest, float) and 0 < largest < math.inf), "the largest logit is no number")
    return PublicModel(
        description["name"], tuple(description["input_shape"]), tuple(nodes), FixedPoint(**point),
        tuple(description["classes"]), tuple(description["mean"]), tuple(description["std"]), masks, digest, largest)
