"""A virtual environment for each peer, made once and reused, with pinned packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

INSTALL_S = 900.0
NO_NETWORK = ("NewConnectionError", "NameResolutionError", "name resolution", "ConnectTimeout", "Network is unreachable", "ProxyError")
Say = Callable[[str], None]


class Unavailable(Exception):
    """An environment cannot be made here; the message says why, in one line."""


@dataclass(frozen=True)
class Environment:
    """What a peer needs: pinned requirements, and the Python versions (3, minor) that they have wheels for, preferred first."""

    requirements: tuple[str, ...]
    minors: tuple[int, ...]


ENVIRONMENTS = {
    "spu": Environment(("spu==0.9.5", "jax==0.4.34", "jaxlib==0.4.34", "numpy==1.26.4", "ml_dtypes==0.5.4", "scipy==1.17.1",
                        "opt_einsum==3.4.0", "cachetools==8.0.0", "cloudpickle==3.1.2", "dill==0.4.1", "multiprocess==0.70.19",
                        "termcolor==3.3.0"), (11,)),
    "tenseal": Environment(("tenseal==0.3.18", "numpy==2.4.6"), (11, 12, 13, 14)),
}


def default_cache() -> Path:
    """Where environments are kept: $XDG_CACHE_HOME/relucent/peers, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relucent" / "peers"


def prepare(name: str, cache: Path | None = None, say: Say = lambda message: None) -> Path:
    """The Python interpreter of the environment `name`, a key of ENVIRONMENTS; makes the environment if it is missing or outdated.

    Args:
        cache: folder of all environments; None for `default_cache()`.
        say: told what takes time.

    Raises Unavailable: no network, no wheel for this platform, no suitable Python, no space, not Linux.
    """
    if sys.platform != "linux":
        raise Unavailable(f"peers are measured on Linux only, this is {platform.system()}")
    environment, folder = ENVIRONMENTS[name], (cache or default_cache()) / name
    python, marker = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(environment.requirements)
    try:
        if python.exists() and marker.is_file() and marker.read_text() == wanted:
            return python
        base = _interpreter(environment)
        say(f"installing {environment.requirements[0]} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _run([str(base), "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:", *environment.requirements])
        marker.write_text(wanted)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written: {error.strerror or error}") from error
    return python


def _interpreter(environment: Environment) -> Path:
    for minor in environment.minors:
        if sys.version_info[:2] == (3, minor):
            return Path(sys.executable)
    for minor in environment.minors:
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return Path(found)
    versions = ", ".join(f"3.{minor}" for minor in environment.minors)
    raise Unavailable(f"{environment.requirements[0]} needs Python {versions}, which is not on the PATH")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"installing took longer than {INSTALL_S:.0f} s") from error
    if done.returncode:
        output = done.stderr + done.stdout
        if any(sign in output for sign in NO_NETWORK):
            raise Unavailable("no network: the package index cannot be reached")
        errors = [line for line in output.splitlines() if line.startswith("ERROR:")] or output.strip().splitlines() or ["no message"]
        raise Unavailable(f"pip failed on {platform.machine()}, Python {platform.python_version()}: {errors[-1].removeprefix('ERROR: ')}")
