"""How the bytes of one chunk are compressed, as both Zarr formats write it down."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.errors import ChunkError, ShardioError

Json = dict[str, Any]
_OTHERS = ("zstd", "zlib", "gzip")
_SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")


@dataclass(frozen=True)
class Codec:
    """Compression of one chunk: `kind` is blosc, zstd, none, or to decode only zlib, gzip; the rest parametrises it."""

    kind: str
    cname: str = ""
    level: int = 0
    shuffle: int = 0
    blocksize: int = 0

    def encode(self, values: NDArray[Any]) -> bytes:
        """Compress contiguous `values`; returns bytes of their own, never a view.

        Raises: ShardioError where this codec is only read.
        """
        from numcodecs import blosc, zstd

        if self.kind == "blosc":
            return bytes(blosc.compress(values, self.cname.encode(), self.level, self.shuffle, self.blocksize))
        if self.kind == "zstd":
            return bytes(zstd.compress(values, self.level))
        if self.kind != "none":
            raise ShardioError(f"shardio reads {self.kind} but does not write it. Use one of: {', '.join(NAMED)}.")
        return values.tobytes()

    def decode(self, stored: memoryview, out: NDArray[Any]) -> None:
        """Decompress `stored` into contiguous `out`; ChunkError when the bytes are not `out.nbytes` values."""
        from numcodecs import blosc, zstd

        try:
            if self.kind == "blosc":
                check_blosc_header(stored, out.nbytes)
                blosc.decompress(stored, out)
            elif self.kind == "zstd":
                # Given `out`, numcodecs would accept fewer values than it holds and leave its tail as it was.
                self._fill(out, memoryview(zstd.decompress(stored)))
            elif self.kind in ("zlib", "gzip"):  # zlib checks their checksums, tensorstore does not
                self._fill(out, memoryview(zlib.decompress(stored, wbits=47, bufsize=out.nbytes)))
            else:
                self._fill(out, stored)
        except (RuntimeError, ValueError, zlib.error) as error:
            raise ChunkError(f"{self.kind} cannot decode {len(stored)} stored bytes: {error}") from error

    @staticmethod
    def _fill(out: NDArray[Any], values: memoryview) -> None:
        if values.nbytes != out.nbytes:
            raise ValueError(f"it holds {values.nbytes} bytes, expected {out.nbytes}")
        memoryview(out).cast("B")[:] = values

    def v2_metadata(self) -> Json | None:
        """The `compressor` entry of `.zarray`."""
        if self.kind == "blosc":
            return {
                "id": "blosc",
                "cname": self.cname,
                "clevel": self.level,
                "shuffle": self.shuffle,
                "blocksize": self.blocksize,
            }
        return {"id": "zstd", "level": self.level} if self.kind == "zstd" else None

    def v3_metadata(self, typesize: int) -> list[Json]:
        """The bytes-to-bytes entries of `codecs` in `zarr.json`."""
        if self.kind == "blosc":
            configuration = {
                "cname": self.cname,
                "clevel": self.level,
                "shuffle": _SHUFFLES[self.shuffle],
                "typesize": typesize,
                "blocksize": self.blocksize,
            }
            return [{"name": "blosc", "configuration": configuration}]
        if self.kind == "zstd":
            return [{"name": "zstd", "configuration": {"level": self.level, "checksum": False}}]
        return []

    def __str__(self) -> str:
        return f"blosc-{self.cname}-{_SHUFFLES[self.shuffle]}" if self.kind == "blosc" else self.kind


NAMED = {
    "lz4": Codec("blosc", "lz4", 5, 1),
    "zstd": Codec("blosc", "zstd", 3, 2),
    "none": Codec("none"),
}


def named(name: str) -> Codec:
    """The codec of a `--codec` name.

    Raises: ShardioError where there is no such codec.
    """
    if name not in NAMED:
        raise ShardioError(f"unsupported codec {name!r}. Use one of: {', '.join(NAMED)}.")
    return NAMED[name]


def from_v2(compressor: Json | None, filters: list[Json] | None) -> Codec | None:
    """The codec of a `.zarray`, or None where only tensorstore or zarr can decode it."""
    if filters:
        return None
    if compressor is None:
        return Codec("none")
    if compressor["id"] == "blosc" and compressor["shuffle"] in (0, 1, 2):
        keys = ("cname", "clevel", "shuffle", "blocksize")
        return Codec("blosc", *(compressor.get(key, 0) for key in keys))
    return Codec(compressor["id"], level=compressor.get("level", 3)) if compressor["id"] in _OTHERS else None


def from_v3(codecs: list[Json]) -> tuple[Codec, bool] | None:
    """(codec, crc32c follows) of a `zarr.json` codec chain, or None where only tensorstore can decode it."""
    names = [codec["name"] for codec in codecs]
    if not names or names[0] != "bytes":
        return None
    if codecs[0].get("configuration", {}).get("endian", "little") != "little":
        return None
    checked = names[-1] == "crc32c"
    middle = codecs[1 : len(codecs) - checked]
    if not middle:
        return Codec("none"), checked
    settings = middle[0].get("configuration", {})
    if len(middle) > 1 or middle[0]["name"] not in ("blosc", *_OTHERS):
        return None
    if middle[0]["name"] in _OTHERS:
        return Codec(middle[0]["name"], level=settings.get("level", 0)), checked
    shuffle = _SHUFFLES.index(settings["shuffle"])
    return Codec("blosc", settings["cname"], settings["clevel"], shuffle, settings.get("blocksize", 0)), checked


def check_blosc_header(stored: memoryview, nbytes: int) -> None:
    """ValueError where `stored` does not say that it is this long and decodes to `nbytes`."""
    # blosc trusts its own header: a truncated buffer would be read past its end.
    if len(stored) < 16:
        raise ValueError("shorter than a blosc header (16 bytes)")
    decoded, _, compressed = np.frombuffer(stored[4:16], "<u4").tolist()
    if decoded != nbytes or compressed != len(stored):
        raise ValueError(
            f"its header promises {compressed} stored and {decoded} decoded bytes, expected {nbytes} decoded"
        )


def crc32c(stored: Any, before: int = 0) -> int:
    """CRC-32C (RFC 3720) of a bytes-like object, or of what has the CRC-32C `before` with it at its end."""
    import google_crc32c

    return int(google_crc32c.extend(before, np.frombuffer(stored, np.uint8)))
