"""NumPy's indexing, split in two: what to read along each axis, and how to pick the answer from that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def expand(index: Any, ndim: int) -> tuple[tuple[Any, ...], int | None]:
    """One item per axis: an ellipsis and absent trailing axes become whole slices; and where the ellipsis stood.

    NumPy takes integers and lists on both sides of an ellipsis as apart, also where it stands for no axis.

    Raises: IndexError where there are more indices than axes.
    """
    items = index if isinstance(index, tuple) else (index,)
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1 or len(items) - len(dots) > ndim:
        raise IndexError(f"{len(items)} indices for the {ndim} axes date, variable, member, cell")
    at = dots[0] if dots else len(items)
    fill = (slice(None),) * (ndim - len(items) + len(dots))
    return (*items[:at], *fill, *items[at + len(dots) :]), at if dots else None


def outer(item: Any, n: int) -> tuple[Sequence[int], Any]:
    """(indices to read along one axis, increasing and without repeats; the index that picks the answer from them).

    Raises: IndexError where it is out of bounds.
    """
    if isinstance(item, slice):
        wanted = range(*item.indices(n))
        return (wanted, slice(None)) if wanted.step > 0 else (wanted[::-1], slice(None, None, -1))
    array = np.asarray(item)
    if array.dtype.kind == "b":
        if array.shape != (n,):
            raise IndexError(f"a mask of shape {array.shape} for an axis of {n}")
        array = np.flatnonzero(array)
    if array.size == 0:
        return (), array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise IndexError(f"{item!r} is neither an integer, a slice, a list of integers nor a mask")
    if array.min() < -n or array.max() >= n:
        raise IndexError(
            f"index {array.min() if array.min() < -n else array.max()} is out of bounds for an axis of {n}"
        )
    unique, inverse = np.unique(np.where(array < 0, array + n, array), return_inverse=True)
    inner: Any = int(inverse.reshape(-1)[0]) if array.ndim == 0 else inverse.reshape(array.shape)
    return unique.tolist(), inner
