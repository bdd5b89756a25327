"""`Statistics`: what `collect` returns, as a mapping from keys to tensors, in memory or in a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Union

import torch
from torch import Tensor

from . import kinds as K
from .errors import CollectError
from .writer import Entry, FileSink


class Statistics(Mapping[str, Tensor]):
    """Keys `{parameter}/{kind}` as stored (packed or full); aliases are keys too.

    `metadata` is that of the file, `notes` says of parameters without statistics why they have none.
    """

    def __init__(self, tensors: Dict[str, Tensor], metadata: Dict[str, str], notes: Optional[Dict[str, str]] = None,
                 path: Optional[Path] = None) -> None:
        self._tensors, self._path = tensors, path
        self.metadata = metadata
        self.notes: Dict[str, str] = notes or {}
        prefix = "alias:"
        self.aliases = {key[len(prefix) :]: to for key, to in metadata.items() if key.startswith(prefix)}
        self._stored: List[str] = list(tensors)
        if path is not None:
            self._stored = self._open_keys(path)

    @staticmethod
    def _open_keys(path: Path) -> List[str]:
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())

    def __getitem__(self, key: str) -> Tensor:
        target, steps = key, 0
        while target in self.aliases:
            target, steps = self.aliases[target], steps + 1
            if steps > len(self.aliases):
                raise CollectError(f"alias `{key}` loops")
        if target not in self._stored:
            raise KeyError(key)
        if self._path is None:
            return self._tensors[target]
        from safetensors import safe_open

        with safe_open(str(self._path), framework="pt") as file:
            return file.get_tensor(target)

    def __iter__(self) -> Iterator[str]:
        yield from self._stored
        yield from self.aliases

    def __len__(self) -> int:
        return len(self._stored) + len(self.aliases)

    def dense(self, parameter: str, kind: str) -> Tensor:
        """A statistic in f32 (f64 where it is stored so), Grams and factors as the full matrix `[n, n]` they stand for."""
        stored = self[f"{parameter}/{kind}"]
        stored = stored if stored.dtype == torch.float64 else stored.float()
        if kind in (K.INPUT_FACTOR, K.OUTPUT_FACTOR):
            return stored.t() @ stored
        if kind in (K.INPUT_GRAM, K.OUTPUT_GRAM, K.FISHER_BLOCK) and stored.dim() == 1:
            n = K.side_of_packed(stored.numel())
            full = torch.zeros(n, n, dtype=stored.dtype)
            rows, columns = torch.tril_indices(n, n)
            full[rows, columns] = stored
            full[columns, rows] = stored
            return full
        return stored

    def save(self, path: Union[str, Path]) -> None:
        """Writes the file; it appears when it is complete. Refuses to replace one."""
        path = Path(path)
        if self._path is not None:
            if path.resolve() != self._path.resolve():
                if path.exists():
                    raise CollectError(f"{path}: is already there; give another path or remove it")
                shutil.copyfile(self._path, path)
            return
        dtypes = {tensor.dtype for tensor in self._tensors.values()} or {torch.float32}
        if len(dtypes) != 1:
            raise CollectError(f"statistics of several dtypes {sorted(map(str, dtypes))}; convert them to one")
        dtype = next(name for name, (_, torch_dtype) in K.DTYPES.items() if torch_dtype in dtypes)
        entries = [Entry(key, tensor.shape) for key, tensor in self._tensors.items()]
        sink = FileSink(path, entries, dtype, len(json.dumps(self.metadata)), "save", resume=False)
        for entry in entries:
            sink.write(entry, [self._tensors[entry.key].reshape(-1)])
        sink.finish(self.metadata)

    @classmethod
    def load(cls, path: Union[str, Path]) -> "Statistics":
        """Opens a file; tensors are read when they are asked for."""
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            metadata: Dict[str, str] = dict(file.metadata() or {})
        if metadata.get("format") != K.FORMAT:
            raise CollectError(f"{path}: metadata `format` is {metadata.get('format')!r}, expected `{K.FORMAT}`")
        return cls({}, metadata, path=Path(path))

    def __repr__(self) -> str:
        counts: Dict[str, Any] = {}
        for key in self:
            kind = key.rsplit("/", 1)[1]
            counts[kind] = counts.get(kind, 0) + 1
        return f"Statistics({', '.join(f'{n} {kind}' for kind, n in sorted(counts.items()))})"
