"""What a student distils from: one network, the mean of several, and their logits kept for further runs."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_opt.training import TrainingFailure, digest, world


class Ensemble(nn.Module):
    """Several teachers as one: the mean of their logits, for each image of those that are finite."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes); not finite where no member's are."""
        logits = torch.stack([member(x).float() for member in self.members])
        usable = logits.isfinite().all(2, keepdim=True)
        return torch.where(usable, logits, 0.0).sum(0) / usable.sum(0)


class Remembered(nn.Module):
    """A teacher whose logits are kept in a file, by what went in: a batch that any run has shown it before costs a look-up.

    Augmentation is drawn from the seed, so runs of the same teacher, images, seed, batch and augmentation meet the same batches,
    whatever they train. The file takes 4 bytes for each image, epoch and class. Raises TrainingFailure if it cannot be used.
    """

    def __init__(self, teacher: nn.Module, file: Path) -> None:
        super().__init__()
        self.teacher = teacher
        self.file = file if world()[1] == 1 else file.with_stem(f"{file.stem}-{world()[0]}")
        self.identity = digest(teacher).encode()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The teacher's: a run is the same one with and without this."""
        return self.teacher.state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) in float32, as the teacher gave them when it saw these very images."""
        seen = x.detach().cpu().contiguous().numpy()
        precision = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        key = hashlib.sha256(b"%s %s %s " % (self.identity, str(precision).encode(), str(seen.shape).encode()) + seen.data).digest()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            store = sqlite3.connect(self.file, timeout=60, isolation_level=None)
            try:
                store.execute("PRAGMA journal_mode = WAL")
                store.execute("PRAGMA synchronous = OFF")
                store.execute("CREATE TABLE IF NOT EXISTS logits (images BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
                if found := store.execute("SELECT value FROM logits WHERE images = ?", (key,)).fetchone():
                    return torch.frombuffer(bytearray(found[0]), dtype=torch.float32).view(len(x), -1).to(x.device)
                logits = self.teacher(x).float()
                store.execute("INSERT OR IGNORE INTO logits VALUES (?, ?)", (key, logits.cpu().numpy().tobytes()))
                return logits  # type: ignore[no-any-return]
            finally:
                store.close()
        except (OSError, sqlite3.Error) as error:
            raise TrainingFailure(f"cannot keep the teachers' logits in {self.file}: {error}; pass another --logits, or none") from error


def mentor(networks: Sequence[nn.Module], logits: Path | None = None) -> nn.Module:
    """What to distil from: the only one of `networks`, or their mean; its logits kept in the file `logits` if one is given."""
    teacher = Ensemble(networks) if len(networks) > 1 else networks[0]
    return Remembered(teacher, logits) if logits is not None else teacher
