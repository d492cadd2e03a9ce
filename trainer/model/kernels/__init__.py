"""Attention kernels, one a file: a table of them is in trainer/model/kernel.py."""
