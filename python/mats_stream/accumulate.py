"""Running sums of one statistic each: Grams, sketches, means, squares of per-example gradients.

Sums are f32, or f64 for f64 activations: what arrives in 16 bits is widened first. A sum is allocated with its first
addition and given out once, in pieces, already divided.
"""

from __future__ import annotations

from typing import Iterator, List, Optional, Tuple

import torch
from torch import Tensor

# Rows of a Gram that are one product: little above the diagonal is computed, and products are still large ones.
BLOCK = 256
# Elements that are converted at a time when a sum is given out.
PIECE = 1 << 20


def wide(x: Tensor) -> Tensor:
    """`x` in the precision sums are kept in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class Accumulator:
    """One statistic's sum. `shape` is the stored shape."""

    shape: Tuple[int, ...]

    def add(self, rows: Tensor) -> None:
        """Adds rows `[R, n]`."""
        raise NotImplementedError

    def bytes(self) -> int:
        """Held while summing, in f32."""
        raise NotImplementedError

    def pieces(self, count: float) -> Iterator[Tensor]:
        """The statistic, sum / `count`, row-major in 1-D pieces, not rounded yet. The sum is spent."""
        raise NotImplementedError

    def diagonal(self, count: float) -> Optional[Tensor]:
        """What is on the diagonal of the statistic, before [`pieces`]; `None` where it has none."""
        return None

    def error_bound(self, count: float) -> Optional[float]:
        """Spectral norm that an approximation may be off by, `None` for exact sums."""
        return None


def _flat(total: Tensor) -> Iterator[Tensor]:
    flat = total.reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        yield flat[start : start + PIECE]


class Gram(Accumulator):
    """Σ x xᵀ `[n, n]`, of which only blocks of rows up to the diagonal are summed: R·n·(n + BLOCK) flops a batch."""

    def __init__(self, n: int, packed: bool) -> None:
        self.n, self.packed = n, packed
        self.shape = (n * (n + 1) // 2,) if packed else (n, n)
        self.total: Optional[Tensor] = None

    def add(self, rows: Tensor) -> None:
        rows = wide(rows)
        if self.total is None:
            self.total = torch.zeros(self.n, self.n, dtype=rows.dtype, device=rows.device)
        for start in range(0, self.n, BLOCK):
            stop = min(start + BLOCK, self.n)
            self.total[start:stop, :stop].addmm_(rows[:, start:stop].t(), rows[:, :stop])

    def diagonal(self, count: float) -> Optional[Tensor]:
        return None if self.total is None else self.total.diagonal() / max(count, 1.0)

    def bytes(self) -> int:
        return 4 * self.n * self.n

    def pieces(self, count: float) -> Iterator[Tensor]:
        total, self.total = self.total, None
        if total is None:
            total = torch.zeros(self.n, self.n)
        total /= max(count, 1.0)
        if not self.packed:
            # What lies above the diagonal was summed in part.
            for i in range(self.n):
                total[i, i + 1 :] = total[i + 1 :, i]
            yield from _flat(total)
            return
        rows: List[Tensor] = []
        held = 0
        for i in range(self.n):
            rows.append(total[i, : i + 1])
            held += i + 1
            if held >= PIECE or i == self.n - 1:
                yield torch.cat(rows)
                rows, held = [], 0


class Mean(Accumulator):
    """Σ x `[n]`."""

    def __init__(self, n: int) -> None:
        self.shape = (n,)
        self.total: Optional[Tensor] = None

    def add(self, rows: Tensor) -> None:
        part = wide(rows).sum(0)
        self.total = part if self.total is None else self.total.add_(part)

    def bytes(self) -> int:
        return 4 * self.shape[0]

    def pieces(self, count: float) -> Iterator[Tensor]:
        total, self.total = self.total, None
        if total is None:
            total = torch.zeros(self.shape)
        yield from _flat(total / max(count, 1.0))


class Sketch(Accumulator):
    """Frequent directions: F `[r, n]` with 0 ≼ Σxxᵀ - FᵀF ≼ ε·I, from rows seen once.

    Rows fill a buffer `[2r, n]`; when it is full, the r largest directions stay, with the square of the (r+1)-th
    singular value taken off each of their squares, and that much is added to ε. So the bound is of the data at hand
    and never above ‖X‖²_F / r. Cost: 2·r·n flops a row and an f64 eigendecomposition of `[2r, 2r]` every r rows.
    Liberty 2013 (arXiv:1206.0594); Ghashami et al. 2016 (arXiv:1501.01711), algorithm 3.1 with a buffer of 2r.
    """

    def __init__(self, n: int, rank: int) -> None:
        self.n, self.rank = n, min(rank, n)
        self.shape = (self.rank, n)
        self.buffer: Optional[Tensor] = None
        self.filled = 0
        self.shrunk = 0.0

    def add(self, rows: Tensor) -> None:
        rows = wide(rows)
        if self.buffer is None:
            self.buffer = torch.zeros(2 * self.rank, self.n, dtype=rows.dtype, device=rows.device)
        start = 0
        while start < rows.shape[0]:
            if self.filled == self.buffer.shape[0]:
                self._shrink()
            take = min(self.buffer.shape[0] - self.filled, rows.shape[0] - start)
            self.buffer[self.filled : self.filled + take] = rows[start : start + take]
            self.filled += take
            start += take

    def _shrink(self) -> None:
        assert self.buffer is not None
        wide_rows = self.buffer[: self.filled].double()
        squares, vectors = torch.linalg.eigh(wide_rows @ wide_rows.t())
        keep = min(self.rank, self.filled)
        cut = float(squares[-keep - 1].clamp_min(0)) if self.filled > keep else 0.0
        squares, vectors = squares[-keep:], vectors[:, -keep:]
        # A direction of zero length has no scale: it is cut.
        scale = torch.where(squares > 0, ((squares - cut).clamp_min(0) / squares.clamp_min(1e-300)).sqrt(), 0 * squares)
        self.buffer[:keep] = (scale[:, None] * (vectors.t() @ wide_rows)).to(self.buffer.dtype)
        self.buffer[keep:] = 0
        self.filled = keep
        self.shrunk += cut

    def bytes(self) -> int:
        # The buffer and its f64 copy while it shrinks, twice.
        return 2 * self.rank * self.n * (4 + 8 + 8) + 3 * 8 * (2 * self.rank) ** 2

    def pieces(self, count: float) -> Iterator[Tensor]:
        if self.buffer is not None and self.filled > self.rank:
            self._shrink()
        buffer, self.buffer = self.buffer, None
        total = torch.zeros(self.shape) if buffer is None else buffer[: self.rank] / max(count, 1.0) ** 0.5
        yield from _flat(total)

    def error_bound(self, count: float) -> Optional[float]:
        if self.buffer is not None and self.filled > self.rank:
            self._shrink()
        return self.shrunk / max(count, 1.0)


class Squares(Accumulator):
    """Σ over examples of the squared gradient, in a parameter's shape."""

    def __init__(self, shape: Tuple[int, ...]) -> None:
        self.shape = shape
        self.total: Optional[Tensor] = None
        self._product: Optional[Tensor] = None

    def sum(self, like: Tensor) -> Tensor:
        """The running sum itself, made on first use with the dtype and device of `like`."""
        if self.total is None:
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            self.total = torch.zeros(self.shape, dtype=dtype, device=like.device)
        return self.total

    def add(self, rows: Tensor) -> None:
        """Adds gradients of examples `[B, elements]`."""
        rows = wide(rows)
        self.sum(rows).view(-1).add_((rows * rows).sum(0))

    def add_products(self, left: Tensor, right: Tensor) -> None:
        """Adds (Σ_t left_t right_tᵀ)² of each example: `left` `[B, T, m]`, `right` `[B, T, n]`, the sum is `[m, n]`.

        2·B·T·m·n flops, and one pass over `[m, n]` an example; where an example is one row, one product for all.
        """
        left, right = wide(left), wide(right)
        m, n = left.shape[-1], right.shape[-1]
        total = self.sum(left).view(m, n)
        if left.shape[1] == 1:
            left, right = left[:, 0], right[:, 0]
            total.addmm_((left * left).t(), right * right)
            return
        if left.device.type != "cpu":
            at_once = max(1, (64 << 20) // (4 * m * n))
            for start in range(0, left.shape[0], at_once):
                product = torch.bmm(left[start : start + at_once].transpose(1, 2), right[start : start + at_once])
                total += product.square_().sum(0)
            return
        # One example's gradient stays in the cache between the product and the sum.
        if self._product is None:
            self._product = torch.empty(m, n, dtype=left.dtype)
        for a, b in zip(left, right):
            torch.mm(a.t(), b, out=self._product)
            total.addcmul_(self._product, self._product)

    def bytes(self) -> int:
        elements = 1
        for dim in self.shape:
            elements *= dim
        return 2 * 4 * elements

    def diagonal(self, count: float) -> Optional[Tensor]:
        return None if self.total is None else self.total.reshape(-1) / max(count, 1.0)

    def pieces(self, count: float) -> Iterator[Tensor]:
        total, self.total, self._product = self.total, None, None
        if total is None:
            total = torch.zeros(self.shape)
        yield from _flat(total.div_(max(count, 1.0)))
