"""From batches to weights: data, strategy, optimizer, checkpoints, and what the run keeps in its folder.

Datasets and options come in; checkpoints, logs and curves go out.
"""
