"""Forecasts: every rank writes its own cells while the next step computes; scores, pictures, NetCDF, programs.

A checkpoint and a dataset come in; datasets of forecasts and what they are worth go out.
"""
