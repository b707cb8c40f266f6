"""Delta on disk: downloaded once per model and registration, verified each time it is read."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from protocol.errors import StorageError


def default_folder() -> Path:
    """$XDG_CACHE_HOME/relucent, or ~/.cache/relucent."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relucent"


class DeltaCache:
    """Files named by model id and Delta id, with older Deltas of the same model removed. Delta is public to clients."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, model_id: str, delta_id: bytes, length: int, fetch: Callable[[], bytes]) -> bytearray:
        """Delta from disk if it is there and intact, else from `fetch`. Raises StorageError if it cannot be stored."""
        path = self._folder / f"{model_id[:32]}-{delta_id.hex()[:32]}.delta"
        try:
            if path.stat().st_size == length:
                data = bytearray(path.read_bytes())
                if hashlib.sha256(data).digest() == delta_id:
                    return data
        except OSError:
            pass
        data = bytearray(fetch())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.glob(f"{model_id[:32]}-*.delta"):
                old.unlink(missing_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as part:
                try:
                    part.write(data)
                    part.flush()
                    os.replace(part.name, path)
                except OSError:
                    os.unlink(part.name)
                    raise
        except OSError as error:
            raise StorageError(f"cannot store Delta in {self._folder}: {error.strerror}",
                               "free some space, or name another folder with --cache") from error
        return data
