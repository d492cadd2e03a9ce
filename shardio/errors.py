"""Every error a user can meet. Each message says what happened, with which values, and what to do."""


class ShardioError(Exception):
    """Base of all errors that shardio raises on purpose."""


class DatasetError(ShardioError):
    """A dataset is absent, incomplete, or not what its metadata says."""


class SelectionError(ShardioError):
    """The dates, variables or cells asked for are not in the dataset."""


class ChunkError(ShardioError):
    """The stored bytes of a chunk are missing, truncated or changed."""


class PlanError(ShardioError):
    """What is asked for cannot be done: grid-chunks, memory bound, or world size do not fit."""


class OutputError(ShardioError):
    """The output exists, belongs to another run, or cannot be written."""


class HeldError(OutputError):
    """A file that one process may write at a time is held by another, `holder`: process 12 on node-3."""

    def __init__(self, path: object, holder: str):
        super().__init__(f"{path} is held by {holder}. Wait for it, or stop it.")
        self.holder = holder


class TopologyError(ShardioError):
    """Group sizes that do not divide one another, or a rank outside its world."""


# Of a damaged chunk.
REMEDY = "Copy it again from its source, or run: shardio verify PATH --repair --source SOURCE."
