"""shardio: weather datasets cut into grid-chunks, and loaded so that no rank ever holds the full grid."""

__version__ = "0.1.0"
