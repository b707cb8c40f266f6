"""Runs peers on one compiled model and the same images, one after another, and compares their logits with float arithmetic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.environments import Say, Unavailable, prepare
from benchmarks.peers.export import export_model
from protocol.errors import InputError
from protocol.inference import normalise_images
from protocol.model import load
from protocol.plaintext import Plaintext


@dataclass(frozen=True)
class Peer:
    """A peer's program and the environment it runs in, a key of ENVIRONMENTS; None for our own."""

    program: str
    protocol: str
    environment: str | None


PEERS = {
    "spu-semi2k": Peer("spu_peer", "SEMI2K", "spu"),
    "spu-aby3": Peer("spu_peer", "ABY3", "spu"),
    "spu-cheetah": Peer("spu_peer", "CHEETAH", "spu"),
    "tenseal": Peer("tenseal_peer", "CKKS", "tenseal"),
    "crypten-tfp": Peer("crypten_peer", "TFP", None),
    "crypten-ttp": Peer("crypten_peer", "TTP", None),
}


def run_peers(model_path: Path, images: Tensor, names: Sequence[str], runs: int, *, timeout_s: float = 900.0,
              cache: Path | None = None, say: Say = lambda message: None) -> Iterator[dict[str, Any]]:
    """The figures of each peer in `names`, keys of PEERS, one after another; run i classifies image i mod N.

    Args:
        model_path: a compiled model file.
        images: uint8 (N, C, H, W) of the model's input shape.
        timeout_s: for one peer, its installation apart.

    Yields:
        For each peer what its program prints (docs/benchmarks.md), with "name", "max_abs_error" (largest difference of its logits
        from float32 arithmetic on the same network) and "agreement" (share of runs with the same top-1); or, where it could not
        run, {"name": ..., "peer": ..., "skipped": reason}.

    Raises InputError for an unknown name or unsuitable images, ModelFileError.
    """
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise InputError(f"there is no peer {unknown[0]!r}", f"known are {', '.join(PEERS)}")
    model = load(model_path)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        try:
            export_model(model, images, work / "exported")
        except ValueError as error:
            raise InputError(str(error)) from error
        (work / "benchmarks").symlink_to(Path(__file__).resolve().parents[1])  # all that a peer sees of our environment
        with torch.inference_mode():
            reference = Plaintext(model)(normalise_images(images, model.public).float()).numpy()
        reference = reference[np.arange(runs) % len(reference)]
        for name in names:
            say(name)
            try:
                result = _compared(_measured(PEERS[name], work, runs, timeout_s, cache, say), reference)
            except Unavailable as error:
                result = {"peer": name, "skipped": str(error)}
            yield {"name": name} | result


def _measured(peer: Peer, work: Path, runs: int, timeout_s: float, cache: Path | None, say: Say) -> dict[str, Any]:
    python = Path(sys.executable) if peer.environment is None else prepare(peer.environment, cache, say)
    command = [str(python), "-m", f"benchmarks.peers.{peer.program}", str(work / "exported"), "--runs", str(runs),
               "--protocol", peer.protocol]
    with subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"it took longer than {timeout_s:.0f} s") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the parties with it
    if process.returncode:
        lines = err.strip().splitlines()
        reasons = [line for line in lines if line.startswith("error: ")] or lines or ["no message"]
        raise Unavailable(f"it failed with code {process.returncode}: {reasons[-1].removeprefix('error: ')}")
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return result


def _compared(result: dict[str, Any], reference: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Adds error and agreement; a peer that runs a network of its own brings that network's logits as "reference"."""
    expected, logits = np.array(result.pop("reference", reference)), np.array(result["logits"])
    return result | {"max_abs_error": float(np.abs(logits - expected).max()),
                     "agreement": float((logits.argmax(1) == expected.argmax(1)).mean())}
