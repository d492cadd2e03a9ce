"""Layers, kernels, the network, the loss: what a rank computes on its own rows.

Normalised fields of own cells come in; predictions, and the loss of all ranks, go out.
"""
