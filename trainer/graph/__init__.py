"""Nodes, edges and halos, cut by rank.

Coordinates and a partition of the cells come in; this rank's part of the graph goes out, ready to compute on.
"""
