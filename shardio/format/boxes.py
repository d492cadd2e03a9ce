"""Boxes of an array, and which part of them lies in which chunk. Pure arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

# Along each axis a range, or a list of indices in any order; lists along several axes mean their outer product.
Box = tuple[slice | tuple[int, ...], ...]


def chunks_of(box: Box, chunks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Indices of the chunks that a box touches, in storage order."""
    return itertools.product(*(_touched(cut, n) for cut, n in zip(box, chunks, strict=True)))


def _touched(cut: slice | tuple[int, ...], n: int) -> Iterable[int]:
    if isinstance(cut, slice):
        return range(cut.start // n, -(-cut.stop // n))
    return sorted({index // n for index in cut})


def as_cut(indices: tuple[int, ...]) -> slice | tuple[int, ...]:
    """The same indices as a slice where they are consecutive: that decodes in place."""
    first, n = indices[0], len(indices)
    return slice(first, first + n) if indices == tuple(range(first, first + n)) else indices


def overlap(cut: slice | tuple[int, ...], i: int, n: int) -> tuple[slice | list[int], slice | list[int]]:
    """Where chunk `i` of extent `n` meets `cut`: (index into the box, index into the chunk)."""
    if isinstance(cut, slice):
        start, stop = max(cut.start, i * n), min(cut.stop, (i + 1) * n)
        return slice(start - cut.start, stop - cut.start), slice(start - i * n, stop - i * n)
    places = [place for place, index in enumerate(cut) if index // n == i]
    return places, [cut[place] - i * n for place in places]


def outer_index(cuts: Sequence[slice | list[int]], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """An index that NumPy takes as the outer product of `cuts`; slices stay slices where they can."""
    if sum(isinstance(cut, list) for cut in cuts) < 2:
        return tuple(cuts)
    listed = [range(*cut.indices(n)) if isinstance(cut, slice) else cut for cut, n in zip(cuts, shape, strict=True)]
    return np.ix_(*listed)
