"""What is minimised: predictions and targets in, a value and the errors of each variable out.

A loss is one file here and one line of LOSSES in trainer/model/loss.py; training and plan take it from there.
"""
