"""Attention kernels, one a file: a table of them is in attention.py."""
