"""From grid-chunks to this rank's cells: who owns what, which sample comes next, and the ring that reads ahead.

Datasets and a topology come in; batches sharded over the cells go out.
"""
