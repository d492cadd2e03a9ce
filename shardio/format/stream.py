"""Decode a chunk that is a whole date little by little: what is encoded next is then still in the processor's cache.

A blosc chunk is a sequence of blocks, each compressed by itself, after a header that says where each begins. Any run
of blocks behind a header of its own is a blosc chunk too: that is how a part of a date is decoded.

    header (16 bytes) | begin of every block (4 bytes each) | block | block | ...
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardio.errors import REMEDY, ChunkError
from shardio.format.codec import check_blosc_header

HEADER = 16
BLOSC_HEADER = struct.Struct("<2sBB3I")  # versions, flags, size of a value; bytes decoded, of a block, stored
DONT_SPLIT, UNCOMPRESSED = 0x10, 0x02


class BloscRows:
    """Rows of bytes within one blosc chunk, taken side by side, each from its begin."""

    def __init__(self, stored: NDArray[np.uint8], nbytes: int, begins: Sequence[int], where: str):
        """`stored`, of `nbytes` decoded bytes, is this object's own while it is used; `begins`: first of every row.

        ChunkError, here and from `take`, where blosc cannot decode it.
        """
        self._stored, self._nbytes, self._where = stored, nbytes, where
        try:
            check_blosc_header(memoryview(stored), nbytes)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        self._versions, self._flags, self._typesize, _, self._block, _ = BLOSC_HEADER.unpack_from(stored)
        first = HEADER + 4 * -(-nbytes // max(self._block, 1))  # of the blocks' bytes
        if self._block == 0 or first > len(stored):
            raise self._damaged("it has no table of blocks")
        table = stored[HEADER:first].view("<i4").astype(np.int64)
        if table.min() < first or table.max() >= len(stored):
            raise self._damaged("its table of blocks points outside of it")
        self._table, self._begins, self._ends = table, table.tolist(), _ends(table, len(stored)).tolist()
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
            self._decode(self._next[row], rest[:size])
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
        self._decode(self._next[row], block)
        self._next[row] += 1
        return block[skip:]

    def _decode(self, first: int, out: NDArray[np.uint8]) -> None:
        """Decode whole blocks, or the last, behind a header that lies for a moment over the bytes before them."""
        from numcodecs import blosc

        last = first - (-len(out) // self._block)
        before = HEADER + 4 * (last - first)
        begin, end = min(self._begins[first:last]) - before, max(self._ends[first:last])
        chunk = self._stored[begin:end]
        header = chunk[:before]
        covered = header.copy()
        flags = self._flags | (DONT_SPLIT if len(out) < self._block else 0)  # as blosc stores a short last block
        sizes = (len(out), min(self._block, len(out)), end - begin)
        BLOSC_HEADER.pack_into(header, 0, self._versions, flags, self._typesize, *sizes)
        np.subtract(self._table[first:last], begin, out=header[HEADER:].view("<i4"), casting="unsafe")
        try:
            blosc.decompress(chunk, out)
        except RuntimeError as error:
            raise self._damaged(str(error)) from error
        finally:
            header[:] = covered

    def _damaged(self, problem: str) -> ChunkError:
        return ChunkError(f"{self._where}: blosc cannot decode {len(self._stored)} stored bytes: {problem}. {REMEDY}")


def streams(header: NDArray[np.uint8], largest_block: int) -> bool:
    """Whether what follows comes in blocks, none above `largest_block` bytes: else there is nothing to gain."""
    if len(header) < HEADER or header[2] & UNCOMPRESSED:
        return False
    return 0 < int(header[8:HEADER].view("<u4")[0]) <= largest_block


def _ends(begins: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Where every block ends; threads of blosc store them in any order."""
    order = np.argsort(begins)
    ends = np.empty_like(begins)
    ends[order] = np.append(begins[order[1:]], size)
    return ends
