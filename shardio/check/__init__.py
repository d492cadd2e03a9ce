"""Look at a dataset: verify and repair it, tell what it holds, draw it, measure it.

A path comes in; what a person or a script wants to know about it goes out.
"""
