"""Raw files for the C++ example: the input of one step, and the forecast that Python makes of it.

python fields.py model.pt2 o32.zarr 2020-02-10 fields.f32 expected.f32
"""

import sys

import numpy as np
import torch

from shardio import open_dataset
from trainer.predict.export import read_program

model, path, initial, fields_path, expected_path = sys.argv[1:]
program, about = read_program(model)
dates = np.datetime64(initial, "s") - np.arange(about["input_steps"])[::-1] * np.timedelta64(about["step_seconds"], "s")
dataset = open_dataset(path, select=about["inputs"])
fields = np.stack([dataset[int(np.searchsorted(dataset.dates, date))] for date in dates])
fields = np.ascontiguousarray(fields.transpose(0, 2, 3, 1))  # [input time, ensemble, cells, inputs]
with torch.no_grad():
    expected = program.module()(torch.from_numpy(fields)[None])[0]  # [ensemble, cells, outputs]
fields.tofile(fields_path)
expected.numpy().tofile(expected_path)
