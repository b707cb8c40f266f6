"""The model file: round trip, integrity, and refusal of everything else."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from protocol.errors import ModelFileError
from protocol.model import Model, PublicModel, load, parse_public, save
from protocol.plan import make_plan
from protocol.simulation import simulate


@pytest.fixture
def saved(mixed_model: Model, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(mixed_model, path)
    return path


def test_round_trip(mixed_model: Model, saved: Path, images: Tensor) -> None:
    again = load(saved)
    assert again.public.model_id == mixed_model.public.model_id
    assert torch.equal(simulate(again, images), simulate(mixed_model, images))


def test_public_part_round_trip_holds_nothing_private(mixed_model: Model) -> None:
    data = mixed_model.public.to_bytes()
    again = PublicModel.from_bytes(data)
    assert again.model_id == mixed_model.public.model_id
    names = set(safetensors.torch.load(data))
    assert names
    assert all(name.startswith("public.") for name in names)
    for value in mixed_model.private.values():
        assert value.numel() < 4 or value.contiguous().numpy().tobytes() not in data


def test_id_depends_on_everything(mixed_model: Model) -> None:
    public = mixed_model.public
    ids = {public.model_id, replace(public, name="other").model_id, replace(public, private_digest="1" * 64).model_id}
    masks = {k: v.clone() for k, v in public.masks.items()}
    next(iter(masks.values())).flatten()[0] ^= 1
    ids.add(replace(public, masks=masks).model_id)
    assert len(ids) == 4


def test_same_weights_do_not_show_in_the_digest(images: Tensor) -> None:
    """The salt: two compilations of one network cannot be linked or tested against a guess by their digests."""
    from tests.conftest import build_compiled, make_network

    first, second = (build_compiled(make_network(False), images.float()) for _ in range(2))
    assert first.public.private_digest != second.public.private_digest


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_files_that_are_no_model(saved: Path, tmp_path: Path) -> None:
    load(saved)
    data = saved.read_bytes()
    bad = {"empty": b"", "truncated": data[: len(data) // 2], "pickle": pickle.dumps({"weights": 1}), "text": b"hello" * 100,
           "other safetensors": safetensors.torch.save({"a": torch.zeros(2)})}
    for name, content in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ModelFileError) as caught:
            load(path)
        assert caught.value.hint
    with pytest.raises(ModelFileError, match="missing"):
        load(tmp_path / "nothing")
    with pytest.raises(ModelFileError, match="no regular file"):
        load(tmp_path)


def test_a_flipped_weight_is_noticed(saved: Path) -> None:
    tensors = safetensors.torch.load(saved.read_bytes())
    header = int.from_bytes(saved.read_bytes()[:8], "little")
    metadata = json.loads(saved.read_bytes()[8 : 8 + header])["__metadata__"]
    victim = next(k for k in tensors if k.endswith(".weight"))
    tensors[victim].flatten()[0] += 1
    saved.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(ModelFileError, match="checksum"):
        load(saved)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version": lambda d: d.update(version=2),
    "format": lambda d: d.update(format="x"),
    "unknown operation": lambda d: d["nodes"][0].update(op="eval"),
    "unknown input": lambda d: d["nodes"][0].update(inputs=["nowhere"]),
    "two nodes of one name": lambda d: d["nodes"][1].update(name=d["nodes"][0]["name"]),
    "name with a path": lambda d: d["nodes"][0].update(name="../x"),
    "huge stride": lambda d: d["nodes"][0]["attrs"].update(stride=[10**9, 1]),
    "boolean stride": lambda d: d["nodes"][0]["attrs"].update(stride=[True, 1]),
    "no nodes": lambda d: d.update(nodes=[]),
    "precision": lambda d: d["fixed_point"].update(activation_bits=99),
    "input shape": lambda d: d.update(input_shape=[3, -8, 8]),
    "zero deviation": lambda d: d.update(std=[0.0, 1.0, 1.0]),
    "digest": lambda d: d.update(private_digest="zz"),
    "extra number format": lambda d: d["fixed_point"].update(more=1),
    "input shape that is no list": lambda d: d.update(input_shape=3),
    "mean that is no number": lambda d: d.update(mean=[float("nan"), 0.5, 0.5]),
    "too many weights": lambda d: d["nodes"][0]["attrs"].update(shape=[65536, 65536, 1, 1]),
    "zero coefficient": lambda d: d["nodes"][1]["attrs"].update(c2_factor=[0] * 8),
    "list for object": lambda d: d.update(fixed_point=[]),
    "name with an escape": lambda d: d.update(name="m\x1b[2J"),
    "class with an escape": lambda d: d.update(classes=["\x1b]0;x\x07", *d["classes"][1:]]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_invalid_descriptions_are_refused(name: str, mixed_model: Model) -> None:
    description = json.loads(json.dumps(mixed_model.public.describe()))
    parse_public(description, mixed_model.public.masks)
    CHANGES[name](description)
    with pytest.raises(ModelFileError):
        parse_public(description, mixed_model.public.masks)


def test_layers_that_do_not_fit_are_refused(mixed_model: Model) -> None:
    description = json.loads(json.dumps(mixed_model.public.describe()))
    description["nodes"][0]["attrs"]["shape"][1] = 5
    with pytest.raises(ModelFileError, match="fit together"):
        make_plan(parse_public(description, mixed_model.public.masks), 1)


def test_damaged_public_bytes_are_refused(mixed_model: Model) -> None:
    data = mixed_model.public.to_bytes()
    for bad in (b"", data[:50], b"\xff" * 100, data[:-3]):
        with pytest.raises(ModelFileError):
            PublicModel.from_bytes(bad)


@pytest.mark.parametrize("change", ["missing", "shape", "type", "more"])
def test_private_part_that_does_not_fit_the_layers(change: str, tmp_path: Path, mixed_model: Model) -> None:
    """A file with a good checksum whose tensors are not those of its layers."""
    from protocol.model import tensors_digest

    private = dict(mixed_model.private)
    name = next(n for n in private if n.endswith(".weight"))
    if change == "missing":
        del private[name]
    else:
        one = private[name]
        private |= {"shape": {name: one[:-1]}, "type": {name: one.float()}, "more": {"x": one.clone()}}[change]
    save(Model(replace(mixed_model.public, private_digest=tensors_digest(private).hex()), private), tmp_path / "m.safetensors")
    with pytest.raises(ModelFileError, match="tensor"):
        load(tmp_path / "m.safetensors")
