"""Reads the folder that `export.py` writes, and the frame of a peer's program. Needs numpy only."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PARAMETERS = ("weight", "bias", "c1", "c0")
"""What the server keeps private; masks and c2 are public."""


class InputError(Exception):
    """The folder or an option is wrong; the program ends with code 2."""


@dataclass(frozen=True)
class Exported:
    """One exported network and its images.

    nodes: dictionaries of name, op, inputs, attrs. arrays: by "node.weight" and so on. images: float32 (N, C, H, W), normalised.
    """

    folder: Path
    name: str
    nodes: list[dict[str, Any]]
    arrays: Mapping[str, Array]
    images: Array

    @property
    def parameters(self) -> dict[str, Array]:
        """The private arrays, float32, in order of name."""
        return {name: self.arrays[name] for name in sorted(self.arrays) if name.rpartition(".")[2] in PARAMETERS}


def load(folder: Path) -> Exported:
    """Read an exported network. Raises InputError."""
    try:
        described = json.loads((folder / "model.json").read_text())
        with np.load(folder / "model.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        images = np.load(folder / "images.npy", allow_pickle=False)
        exported = Exported(folder, described["name"], described["nodes"], arrays, images)
        if images.dtype != np.float32 or list(images.shape[1:]) != described["input_shape"] or not len(images):
            raise InputError(f"{folder}/images.npy does not fit the model")
    except OSError as error:
        raise InputError(f"{folder} is no exported model: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is no exported model: {error}") from error
    return exported


def run_program(description: str, measure: Callable[[Exported, int, str], dict[str, Any]], choices: tuple[str, ...]) -> None:
    """The command line FOLDER [--runs N] [--protocol P] of a peer: prints what `measure` returns as one JSON object.

    Ends with one line on stderr and code 2 for bad input, 1 for any other failure.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--protocol", choices=choices, default=choices[0])
    options = parser.parse_args()
    try:
        if options.runs < 1:
            raise InputError(f"--runs must be positive, not {options.runs}")
        print(json.dumps(measure(load(options.folder), options.runs, options.protocol)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        sys.exit(1)
