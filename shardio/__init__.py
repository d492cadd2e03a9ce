"""shardio: weather datasets cut into grid-chunks, and loaded so that no rank ever holds the full grid."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ gives at run time, for type checkers and editors
    from shardio.dataset import Dataset, open_dataset
    from shardio.loader import ShardedBatch, ShardedDataLoader
    from shardio.partition import Partition
    from shardio.sampler import ReadGroupSampler
    from shardio.sharded_writer import Description, ShardedWriter
    from shardio.topology import Topology

__version__ = "0.1.0"

__all__ = [
    "Dataset",
    "Description",
    "Partition",
    "ReadGroupSampler",
    "ShardedBatch",
    "ShardedDataLoader",
    "ShardedWriter",
    "Topology",
    "__version__",
    "open_dataset",
]

_HOMES = {
    "Dataset": "dataset",
    "Description": "sharded_writer",
    "Partition": "partition",
    "ReadGroupSampler": "sampler",
    "ShardedBatch": "loader",
    "ShardedDataLoader": "loader",
    "ShardedWriter": "sharded_writer",
    "Topology": "topology",
    "open_dataset": "dataset",
}


def __getattr__(name: str) -> Any:
    # Names are fetched when first used: `import shardio` itself costs no torch, no zarr.
    if name not in _HOMES:
        raise AttributeError(f"module 'shardio' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"shardio.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
