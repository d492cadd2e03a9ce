"""Which chunks are written: each rank notes its own, the first rank merges the notes where a run goes on.

One line per chunk: date, chunk, crc32c and bytes of what is stored. A chunk that no ledger names is written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shardio.errors import HeldError, OutputError
from shardio.format.codec import crc32c
from shardio.format.files import atomic, lock
from shardio.format.layout import ArrayLayout

Chunks = dict[tuple[int, int], tuple[int, int]]  # date, grid-chunk: crc32c, bytes
FIRST, OTHERS, RANKS = "ledger.jsonl", "ledger.*.jsonl", "ranks.lock"


@contextmanager
def lock_ranks(folder: Path, alone: bool) -> Iterator[None]:
    """Hold the folder of a job for the time of the `with`: alone, or together with the other ranks.

    Raises: OutputError where ranks of another run hold it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(folder / RANKS, shared=not alone))
        except HeldError:
            raise OutputError(
                f"{folder}: ranks of an earlier run are still writing. Wait until they have ended, or stop them."
            ) from None
        yield


def to_line(date: int, chunk: int, crc: int, nbytes: int) -> str:
    """What a rank notes of a chunk that it has written."""
    # The line before may be torn by a kill, hence the break at the start too.
    return f"\n{json.dumps([date, chunk, crc, nbytes])}\n"


def read(folder: Path) -> Chunks:
    """What all ledgers of a job say."""
    found: Chunks = {}
    for ledger in (folder / FIRST, *folder.glob(OTHERS)):
        with ledger.open("rb") as lines:
            for noted in lines:
                try:
                    date, chunk, crc, nbytes = json.loads(noted)
                except (ValueError, TypeError):
                    continue  # torn, or empty
                found[date, chunk] = (crc, nbytes)
    return found


def keep_intact(noted: Chunks, data: Path, layout: ArrayLayout, check: bool = False) -> Chunks:
    """Those chunks whose file has the size that the ledgers noted; where asked for, the bytes too."""
    with os.scandir(data) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries}
    names = {key: layout.file_of((key[0], 0, 0, key[1]))[0] for key in noted}
    found = {key: pair for key, pair in noted.items() if sizes.get(names[key]) == pair[1]}
    if check:
        found = {key: pair for key, pair in found.items() if crc32c((data / names[key]).read_bytes()) == pair[0]}
    return found


def merge(folder: Path, chunks: Chunks, sync: bool) -> None:
    """One ledger instead of many."""
    with atomic(folder / FIRST, sync) as partial:
        partial.write_text("".join(to_line(*key, *pair) for key, pair in sorted(chunks.items())))
    for ledger in folder.glob(OTHERS):
        ledger.unlink()


def name_of_rank(folder: Path, rank: int) -> Path:
    """The ledger that a rank writes; the first one goes on with the merged one, by which others count the dates."""
    return folder / (OTHERS.replace("*", str(rank)) if rank else FIRST)
