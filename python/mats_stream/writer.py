"""Statistics files: written by position while statistics are finished, complete under their name or not there.

The header comes first in a safetensors file, and its numbers last: room is left for it, and it is written at the end.
Until then the file is `.NAME.partial`, with a journal beside it of what it already holds, so that a run can go on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Set, Tuple

import torch
from torch import Tensor

from . import kinds as K
from .errors import CollectError

# Room for what is only known at the end: numbers in the metadata.
HEADER_SLACK = 4096


class Entry:
    """A key with its shape; all entries of a file have one dtype."""

    def __init__(self, key: str, shape: Sequence[int]) -> None:
        self.key, self.shape = key, tuple(int(dim) for dim in shape)

    @property
    def elements(self) -> int:
        total = 1
        for dim in self.shape:
            total *= dim
        return total


def as_bytes(piece: Tensor) -> memoryview:
    """The little-endian bytes of a 1-D tensor, uncopied."""
    piece = piece.contiguous()
    if piece.dtype in (torch.bfloat16, torch.float16):
        piece = piece.view(torch.int16)
    array = piece.numpy()
    return memoryview(array.astype(array.dtype.newbyteorder("<"), copy=False)).cast("B")  # type: ignore[arg-type]


class Sink:
    """Where finished statistics go."""

    def done(self) -> Set[str]:
        """Keys that an earlier run finished."""
        return set()

    def notes(self) -> Dict[str, Any]:
        """What earlier passes noted."""
        return {}

    def write(self, entry: Entry, pieces: Iterable[Tensor]) -> None:
        raise NotImplementedError

    def pass_finished(self, keys: Sequence[str], notes: Mapping[str, Any]) -> None:
        """All of `keys` are there for good."""

    def finish(self, metadata: Mapping[str, str]) -> None:
        raise NotImplementedError


class MemorySink(Sink):
    """Keeps tensors."""

    def __init__(self) -> None:
        self.tensors: Dict[str, Tensor] = {}
        self._notes: Dict[str, Any] = {}

    def notes(self) -> Dict[str, Any]:
        return dict(self._notes)

    def pass_finished(self, keys: Sequence[str], notes: Mapping[str, Any]) -> None:
        self._notes.update(notes)

    def write(self, entry: Entry, pieces: Iterable[Tensor]) -> None:
        self.tensors[entry.key] = torch.cat(list(pieces)).reshape(entry.shape)

    def finish(self, metadata: Mapping[str, str]) -> None:
        pass


def leftovers(path: Path) -> Tuple[Path, Path]:
    """Where a run that is not finished keeps its file and its journal."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.journal")


class FileSink(Sink):
    """A file of known keys. `fingerprint` stands for everything that decides its values."""

    def __init__(self, path: Path, entries: Sequence[Entry], dtype: str, header_bytes: int, fingerprint: str,
                 resume: bool) -> None:
        self.path, self.dtype_name = path, K.DTYPES[dtype][0]
        self.partial, self.journal = leftovers(path)
        self.width = torch.empty(0, dtype=K.DTYPES[dtype][1]).element_size()
        self.offsets: Dict[str, Tuple[Entry, int]] = {}
        at = 0
        for entry in entries:
            self.offsets[entry.key] = (entry, at)
            at += entry.elements * self.width
        self.data_bytes = at
        shapes = len(self._header({}))
        self.header_room = (shapes + header_bytes + HEADER_SLACK + 7) // 8 * 8
        self._done: Set[str] = set()
        self._notes: Dict[str, Any] = {}
        if path.exists():
            raise CollectError(f"{path}: is already there; give another path or remove it")
        mark = {"fingerprint": fingerprint, "header_room": self.header_room, "data_bytes": self.data_bytes}
        # Without one whole line it is of a run that was killed before it had begun.
        going_on = self.partial.exists() and self.journal.exists() and b"\n" in self.journal.read_bytes()
        if going_on and not resume:
            raise CollectError(f"{path}: a run was interrupted here; resume it (--resume), or remove {self.partial} and "
                               f"{self.journal}")
        if going_on:
            self._read_journal(mark)
        try:
            self.file = open(self.partial, "r+b" if going_on else "w+b")
            if not going_on:
                self.file.truncate(8 + self.header_room + self.data_bytes)
                self._append(mark, "w")
        except OSError as error:
            raise CollectError(f"{self.partial}: cannot be written: {error.strerror}") from error

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        header: Dict[str, Any] = {"__metadata__": dict(metadata)}
        for key, (entry, at) in self.offsets.items():
            header[key] = {"dtype": self.dtype_name, "shape": list(entry.shape),
                           "data_offsets": [at, at + entry.elements * self.width]}
        return json.dumps(header, separators=(",", ":")).encode()

    def _read_journal(self, mark: Mapping[str, Any]) -> None:
        lines: List[Dict[str, Any]] = []
        for line in self.journal.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # the last line of a run that was killed
        if not lines or lines[0] != dict(mark):
            raise CollectError(f"{self.journal}: is of another run (other model, data or options); remove it and "
                               f"{self.partial} to start anew")
        for record in lines[1:]:
            self._done.update(record["keys"])
            self._notes.update(record["notes"])

    def _append(self, record: Mapping[str, Any], mode: str = "a") -> None:
        with open(self.journal, mode) as journal:
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def done(self) -> Set[str]:
        return set(self._done)

    def notes(self) -> Dict[str, Any]:
        return dict(self._notes)

    def write(self, entry: Entry, pieces: Iterable[Tensor]) -> None:
        _, at = self.offsets[entry.key]
        self.file.seek(8 + self.header_room + at)
        written = 0
        for piece in pieces:
            written += self.file.write(as_bytes(piece))
        assert written == entry.elements * self.width, entry.key

    def pass_finished(self, keys: Sequence[str], notes: Mapping[str, Any]) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self._done.update(keys)
        self._notes.update(notes)
        self._append({"keys": list(keys), "notes": dict(notes)})

    def finish(self, metadata: Mapping[str, str]) -> None:
        header = self._header(metadata)
        assert len(header) <= self.header_room, "room was left for every key of the metadata"
        self.file.seek(0)
        self.file.write(self.header_room.to_bytes(8, "little") + header + b" " * (self.header_room - len(header)))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)
        self.journal.unlink()
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Leaves the partial file for a later run, if there is anything in it."""
        self.file.close()
        if not self._done:
            self.partial.unlink()
            self.journal.unlink()
