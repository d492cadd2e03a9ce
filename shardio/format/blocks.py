"""Decode parts of a blosc chunk.

It is a sequence of blocks, each compressed by itself, after a header that says where each begins. Any run of blocks
behind a header of its own is a blosc chunk too: that is how a part of a chunk is decoded.

    header (16 bytes) | begin of every block (4 bytes each) | block | block | ...
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from shardio.errors import REMEDY, ChunkError
from shardio.format.codec import check_blosc_header

HEADER = 16
BLOSC_HEADER = struct.Struct("<2sBB3I")  # versions, flags, size of a value; bytes decoded, of a block, stored
DONT_SPLIT, UNCOMPRESSED = 0x10, 0x02


class BloscBlocks:
    """The blocks of one chunk; `size` is the decoded bytes of each but the last."""

    def __init__(self, stored: NDArray[np.uint8], nbytes: int, where: str):
        """`stored`, of `nbytes` decoded bytes, is this object's own while it is used.

        ChunkError, here and from `decode`, where blosc cannot decode it.
        """
        self._stored, self.nbytes, self._where = stored, nbytes, where
        try:
            check_blosc_header(memoryview(stored), nbytes)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        self._versions, self._flags, self._typesize, _, self.size, _ = BLOSC_HEADER.unpack_from(stored)
        first = HEADER + 4 * -(-nbytes // max(self.size, 1))  # of the blocks' bytes
        if self.size == 0 or first > len(stored):
            raise self._damaged("it has no table of blocks")
        table = stored[HEADER:first].view("<i4").astype(np.int64)
        if table.min() < first or table.max() >= len(stored):
            raise self._damaged("its table of blocks points outside of it")
        self._table, self._begins, self._ends = table, table.tolist(), _ends(table, len(stored)).tolist()

    def decode(self, first: int, out: NDArray[np.uint8]) -> None:
        """Decode whole blocks, or the last, behind a header that lies for a moment over the bytes before them."""
        from numcodecs import blosc

        last = first - (-len(out) // self.size)
        before = HEADER + 4 * (last - first)
        begin, end = min(self._begins[first:last]) - before, max(self._ends[first:last])
        chunk = self._stored[begin:end]
        header = chunk[:before]
        covered = header.copy()
        flags = self._flags | (DONT_SPLIT if len(out) < self.size else 0)  # as blosc stores a short last block
        sizes = (len(out), min(self.size, len(out)), end - begin)
        BLOSC_HEADER.pack_into(header, 0, self._versions, flags, self._typesize, *sizes)
        np.subtract(self._table[first:last], begin, out=header[HEADER:].view("<i4"), casting="unsafe")
        try:
            blosc.decompress(chunk, out)
        except RuntimeError as error:
            raise self._damaged(str(error)) from error
        finally:
            header[:] = covered

    def scatter(self, rows: Rows, spare: NDArray[np.uint8]) -> None:
        """Decode each row to its place, every block once: those within a row straight there, others by `spare`.

        Args:
          rows: by rising begins, without overlap.
          spare: `size` bytes, small enough for the processor's cache.
        """
        held = -1
        for begin, row in rows:
            done = 0
            while done < len(row):
                block, skip = divmod(begin + done, self.size)
                whole = 0 if skip else (len(row) - done) // self.size * self.size
                if whole:
                    self.decode(block, row[done : done + whole])
                    done += whole
                    continue
                decoded = spare[: min(self.size, self.nbytes - block * self.size)]
                if block != held:
                    self.decode(block, decoded)
                    held = block
                part = decoded[skip : skip + len(row) - done]
                row[done : done + len(part)] = part
                done += len(part)

    def _damaged(self, problem: str) -> ChunkError:
        return ChunkError(f"{self._where}: blosc cannot decode {len(self._stored)} stored bytes: {problem}. {REMEDY}")


Rows = list[tuple[int, NDArray[np.uint8]]]  # first byte of a row in a decoded chunk; where it goes, contiguous


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
