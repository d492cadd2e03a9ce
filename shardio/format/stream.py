"""Decode a chunk that is a whole date little by little: what is encoded next is then still in the processor's cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardio.format.blocks import BloscBlocks


class BloscRows:
    """Rows of bytes within one blosc chunk, taken side by side, each from its begin."""

    def __init__(self, stored: NDArray[np.uint8], nbytes: int, begins: Sequence[int], where: str):
        """`stored`, of `nbytes` decoded bytes, is this object's own while it is used; `begins`: first of every row.

        ChunkError, here and from `take`, where blosc cannot decode it.
        """
        self._blocks = BloscBlocks(stored, nbytes, where)
        self._nbytes, self._block = nbytes, self._blocks.size
        self._next = [begin // self._block for begin in begins]  # block to decode next, of every row
        self._spare = np.empty((len(begins), self._block), np.uint8)
        self._held = [self._decoded(row, begin % self._block) for row, begin in enumerate(begins)]

    def take(self, out: NDArray[np.float32]) -> None:
        """Fill `out` [row, values] with what comes next of every row."""
        width = 4 * out.shape[1]
        behind = out.reshape(-1).view(np.uint8) if out.flags.c_contiguous else None  # the rows that are filled later
        for row, values in enumerate(out):
            self._take(row, width, values.view(np.uint8) if behind is None else behind[row * width :])

    def _take(self, row: int, wanted: int, out: NDArray[np.uint8]) -> None:
        """Fill the first `wanted` bytes of `out`; those behind them may be used."""
        # Every block is decoded once: of the last, the part that is not wanted yet is held.
        held = self._held[row][:wanted]
        out[: len(held)] = held
        self._held[row] = self._held[row][len(held) :]
        rest, wanted = out[len(held) :], wanted - len(held)
        if not wanted:
            return
        blocks = -(-wanted // self._block)
        size = min(blocks * self._block, self._nbytes - self._next[row] * self._block)
        if size > len(rest):
            blocks = wanted // self._block
            size = blocks * self._block
        if blocks:
            self._blocks.decode(self._next[row], rest[:size])
            self._next[row] += blocks
        if size > wanted:
            self._held[row] = self._spare[row, : size - wanted]
            self._held[row][:] = rest[wanted:size]
        if size < wanted:
            last = self._decoded(row, 0)
            rest[size:wanted] = last[: wanted - size]
            self._held[row] = last[wanted - size :]

    def _decoded(self, row: int, skip: int) -> NDArray[np.uint8]:
        """The next block of a row but for its first `skip` bytes, in the row's own buffer."""
        block = self._spare[row, : self._nbytes - self._next[row] * self._block]
        self._blocks.decode(self._next[row], block)
        self._next[row] += 1
        return block[skip:]
