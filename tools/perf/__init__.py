"""Performance CI: counters are gates, times are trends. `python -m tools.perf --help` says how to use it.

grids.py         four kinds of grid, a small dataset on each
works.py         rechunk, load, train a step, forecast a step: what one rank does
counters.py      what is counted: bytes read and sent, opens, messages, tensors, FLOPs
calibration.py   the machine's speed at this moment: a product, a copy, a decode
matrix.py        every grid x every work x 1 and 2 ranks, in real processes
gate.py          counters against baseline.json
history.py       times of all runs, and which are slower than the noise explains
report.py        both, drawn
knobs.py         what each knob of training costs and saves
"""
