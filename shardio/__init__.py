"""shardio: weather datasets cut into grid-chunks, and loaded so that no rank ever holds the full grid."""

from typing import TYPE_CHECKING

from shardio.lazy import fetch_from

if TYPE_CHECKING:  # what __getattr__ gives at run time, for type checkers and editors
    from shardio.format.files import atomic, lock, remove_temporary
    from shardio.load.batch import ShardedBatch
    from shardio.load.dataset import Dataset, open_dataset
    from shardio.load.loader import ShardedDataLoader
    from shardio.load.partition import Partition, balanced, partition
    from shardio.load.reading import Reading
    from shardio.load.reads import Reads, Wanted
    from shardio.load.sampler import ReadGroupSampler, valid_starts
    from shardio.load.topology import Topology
    from shardio.rechunk.allocator import keep_freed_memory
    from shardio.source.source import STATISTICS
    from shardio.source.synthetic import RossbyWaves, octahedral
    from shardio.write.job import sweep_published
    from shardio.write.sharded_writer import Description, ShardedWriter, begun_chunk_cells, is_complete

__version__ = "0.1.0"

__all__ = [
    "STATISTICS",
    "Dataset",
    "Description",
    "Partition",
    "ReadGroupSampler",
    "Reading",
    "Reads",
    "RossbyWaves",
    "ShardedBatch",
    "ShardedDataLoader",
    "ShardedWriter",
    "Topology",
    "Wanted",
    "__version__",
    "atomic",
    "balanced",
    "begun_chunk_cells",
    "is_complete",
    "keep_freed_memory",
    "lock",
    "octahedral",
    "open_dataset",
    "partition",
    "remove_temporary",
    "sweep_published",
    "valid_starts",
]

_HOMES = {
    "Dataset": "load.dataset",
    "Description": "write.sharded_writer",
    "Partition": "load.partition",
    "ReadGroupSampler": "load.sampler",
    "Reading": "load.reading",
    "Reads": "load.reads",
    "RossbyWaves": "source.synthetic",
    "STATISTICS": "source.source",
    "ShardedBatch": "load.batch",
    "ShardedDataLoader": "load.loader",
    "ShardedWriter": "write.sharded_writer",
    "Topology": "load.topology",
    "Wanted": "load.reads",
    "atomic": "format.files",
    "balanced": "load.partition",
    "begun_chunk_cells": "write.sharded_writer",
    "is_complete": "write.sharded_writer",
    "keep_freed_memory": "rechunk.allocator",
    "lock": "format.files",
    "octahedral": "source.synthetic",
    "open_dataset": "load.dataset",
    "partition": "load.partition",
    "remove_temporary": "format.files",
    "sweep_published": "write.job",
    "valid_starts": "load.sampler",
}

__getattr__ = fetch_from(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
