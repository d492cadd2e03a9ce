"""How hidden nodes step from layer to layer: what a rank computes on, what it exchanges, and what the plan knows of it.

A processor is one file here and one line of PROCESSORS in trainer/model/processor.py.
"""
