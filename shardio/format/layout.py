"""What an array looks like on disk: shape, chunks, Zarr shards, codec, names of its files. Pure data.

zarr.json, .zarray  --parse-->  ArrayLayout  --metadata-->  zarr.json, .zarray
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardio.errors import DatasetError, PlanError
from shardio.format.codec import Codec, from_v2, from_v3

Json = dict[str, Any]
DIMENSIONS = ("time", "variable", "ensemble", "cell")

# Encoded chunks of one Zarr shard, beyond one per thread: the one that is being written. Without it threads wait for
# the file (o1280, 2 threads: 5 % slower at best); each costs the memory of a grid-chunk per task in flight.
ENCODED_AHEAD = 1


@dataclass(frozen=True)
class ArrayLayout:
    """One Zarr array of any number of dimensions.

    Attributes:
      zarr_format: 2 or 3.
      shape, dtype: of the whole array; dtype as NumPy writes it ("<f4").
      chunks: extent of one chunk (of one inner chunk where the array is Zarr-sharded).
      zarr_shards: extent of one Zarr shard, None where each chunk is its own file.
      codec: None where only tensorstore can decode the chunks.
      checked: each chunk ends with its own crc32c (Zarr v3 only).
      index_checked: the index of a Zarr shard ends with its crc32c.
      prefix, separator: how a chunk index becomes a file name.
      order: "C", or "F" (Zarr v2 only).
    """

    zarr_format: int
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    codec: Codec | None
    zarr_shards: tuple[int, ...] | None = None
    checked: bool = False
    index_checked: bool = True
    index_at_end: bool = True
    fill_value: Any = field(default=None, compare=False)  # NaN is not equal to itself
    prefix: str = ""
    separator: str = "."
    order: str = "C"

    @property
    def native(self) -> bool:
        """Whether shardio's own reader can decode it: a known codec, C order, little-endian numbers."""
        kind = np.dtype(self.dtype)
        return self.codec is not None and self.order == "C" and kind.kind in "fiub" and kind.byteorder != ">"

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along every axis."""
        return tuple(math.ceil(n / c) for n, c in zip(self.shape, self.chunks, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """Decoded bytes of one full chunk."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    @property
    def chunks_per_zarr_shard(self) -> tuple[int, ...]:
        """Inner chunks along every axis of one Zarr shard; all ones where there is none."""
        outer = self.zarr_shards or self.chunks
        return tuple(s // c for s, c in zip(outer, self.chunks, strict=True))

    def file_of(self, chunk: tuple[int, ...]) -> tuple[str, int | None]:
        """(file name, place in its Zarr-shard index or None) of a chunk index."""
        per_shard = self.chunks_per_zarr_shard
        outer = [i // n for i, n in zip(chunk, per_shard, strict=True)]
        name = self.prefix + (self.separator.join(map(str, outer)) or "0")
        if self.zarr_shards is None:
            return name, None
        inner = tuple(i % n for i, n in zip(chunk, per_shard, strict=True))
        return name, int(np.ravel_multi_index(inner, per_shard))

    def metadata(self) -> Json:
        """The content of `.zarray` (v2) or of the array part of `zarr.json` (v3)."""
        assert self.codec is not None
        fill = "NaN" if isinstance(self.fill_value, float) and math.isnan(self.fill_value) else self.fill_value
        if self.zarr_format == 2:
            return {
                "zarr_format": 2,
                "shape": list(self.shape),
                "chunks": list(self.chunks),
                "dtype": self.dtype,
                "compressor": self.codec.v2_metadata(),
                "fill_value": fill,
                "filters": None,
                "order": "C",
                "dimension_separator": self.separator,
            }
        return self._v3_metadata(fill)

    def _v3_metadata(self, fill: Any) -> Json:
        crc = {"name": "crc32c"}
        number = {"name": "bytes", "configuration": {"endian": "little"}}
        codecs = [number, *self.codec.v3_metadata(np.dtype(self.dtype).itemsize)]  # type: ignore[union-attr]
        if self.checked:
            codecs.append(crc)
        if self.zarr_shards:
            sharding = {
                "chunk_shape": list(self.chunks),
                "codecs": codecs,
                "index_codecs": [number, crc],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        outer = list(self.zarr_shards or self.chunks)
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": np.dtype(self.dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": self.separator}},
            "fill_value": fill,
            "codecs": codecs,
            "dimension_names": list(DIMENSIONS),
            "storage_transformers": [],
        }


def parse(metadata: Json, where: str) -> ArrayLayout:
    """The layout that a `.zarray` or an array's `zarr.json` describes; DatasetError where it is neither."""
    try:
        return _checked(_parse_v2(metadata) if metadata["zarr_format"] == 2 else _parse_v3(metadata))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DatasetError(
            f"{where} is not valid Zarr metadata ({type(error).__name__}: {error}). "
            "Restore it from a copy, or make the dataset again."
        ) from error


def _checked(layout: ArrayLayout) -> ArrayLayout:
    extents = (layout.shape, layout.chunks, layout.zarr_shards or layout.chunks)
    if not all(type(n) is int for extent in extents for n in extent):
        raise ValueError("shape and chunks have to be lists of integers")
    if len({len(extent) for extent in extents}) > 1:
        raise ValueError(f"shape {list(layout.shape)} and chunks {list(layout.chunks)} differ in length")
    if min((*layout.chunks, *layout.shape, 1)) < 0 or 0 in layout.chunks:
        raise ValueError("a shape or chunk is too small")
    if any(shard % chunk or shard < 1 for chunk, shard in zip(*extents[1:], strict=True)):
        raise ValueError("the chunks do not divide the Zarr shards")
    if layout.separator not in (".", "/") or layout.order not in ("C", "F"):
        raise ValueError(f"separator {layout.separator!r} or order {layout.order!r} is unknown")
    if np.dtype(layout.dtype).kind in "fiu" and not isinstance(layout.fill_value, int | float | np.number | None):
        raise ValueError(f"fill value {layout.fill_value!r} is not a number")
    return layout


def _parse_v2(metadata: Json) -> ArrayLayout:
    dtype = np.dtype(metadata["dtype"])
    return ArrayLayout(
        zarr_format=2,
        shape=tuple(metadata["shape"]),
        dtype=dtype.str,
        chunks=tuple(metadata["chunks"]),
        codec=from_v2(metadata["compressor"], metadata.get("filters")),
        fill_value=_number(metadata["fill_value"], dtype),
        separator=metadata.get("dimension_separator", "."),
        order=metadata["order"],
    )


def _parse_v3(metadata: Json) -> ArrayLayout:
    if metadata.get("storage_transformers"):
        raise ValueError("storage transformers are not supported")
    outer = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    codecs, chunks, shards = metadata["codecs"], outer, None
    index: Json = {}
    if codecs[0]["name"] == "sharding_indexed" and len(codecs) == 1:
        index = codecs[0]["configuration"]
        codecs, chunks, shards = index["codecs"], tuple(index["chunk_shape"]), outer
    codec, checked = from_v3(codecs) or (None, False)
    if any(each.get("configuration", {}).get("endian") == "big" for each in index.get("index_codecs", [])):
        codec = None
    encoding = metadata["chunk_key_encoding"]
    default = encoding["name"] == "default"
    separator = encoding.get("configuration", {}).get("separator", "/" if default else ".")
    return ArrayLayout(
        zarr_format=3,
        shape=tuple(metadata["shape"]),
        dtype=np.dtype(metadata["data_type"]).str,
        chunks=chunks,
        codec=codec,
        zarr_shards=shards,
        checked=checked,
        index_checked=any(codec["name"] == "crc32c" for codec in index.get("index_codecs", [])),
        index_at_end=index.get("index_location", "end") == "end",
        fill_value=_number(metadata["fill_value"], np.dtype(metadata["data_type"])),
        prefix="c" + separator if default else "",
        separator=separator,
    )


def _number(fill: Any, dtype: np.dtype[Any]) -> Any:
    if not isinstance(fill, str):
        return fill
    if fill.startswith("0x") and dtype.kind == "f":  # the bits of a NaN with a payload
        return np.array(int(fill, 16), f"u{dtype.itemsize}").view(f"f{dtype.itemsize}")[()]
    return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(fill, fill)


def grid_chunked(shape: tuple[int, int, int, int], grid_chunks: int, zarr_format: int, codec: Codec) -> ArrayLayout:
    """The layout shardio writes: float32, one date cut into `grid_chunks` chunks of ceil(cells / grid_chunks).

    Zarr v2 keeps one file per chunk; Zarr v3 packs the chunks of a date into one Zarr shard.

    Raises: PlanError where the cells cannot be cut into so many equal chunks.
    """
    _, variables, ensemble, cells = shape
    if not 1 <= grid_chunks <= cells:
        raise PlanError(
            f"{grid_chunks} grid-chunks cannot be cut from {cells} cells. Choose --grid-chunks from 1 to {cells}."
        )
    chunk_cells = math.ceil(cells / grid_chunks)
    possible = math.ceil(cells / chunk_cells)
    if possible != grid_chunks:
        larger = math.ceil(cells / (chunk_cells - 1))
        raise PlanError(
            f"{cells} cells cannot be cut into {grid_chunks} equal grid-chunks: chunks of {chunk_cells} cells "
            f"make {possible}, chunks of {chunk_cells - 1} make {larger}. Use --grid-chunks {possible} or {larger}."
        )
    chunks = (1, variables, ensemble, chunk_cells)
    v3 = zarr_format == 3
    return ArrayLayout(
        zarr_format=zarr_format,
        shape=shape,
        dtype="<f4",
        chunks=chunks,
        codec=codec,
        zarr_shards=(1, variables, ensemble, chunk_cells * grid_chunks) if v3 else None,
        checked=v3,
        fill_value=math.nan,
        prefix="c." if v3 else "",
    )
