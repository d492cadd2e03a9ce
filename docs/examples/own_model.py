"""Your own model on sharded batches: torchrun --nproc_per_node=2 own_model.py DATASET."""

import sys

import numpy as np
import torch
import torch.distributed as dist
from scipy.spatial import cKDTree

from shardio import ShardedDataLoader, Topology, open_dataset
from trainer.comm import TorchComm
from trainer.fit.gradients import reduce_gradients
from trainer.graph.grid import Frames, cell_areas
from trainer.graph.halo import build_halo, exchange


class Neighbours(torch.nn.Module):
    """Every cell looks at its nearest cells: any nn.Module whose messages follow edges works like this."""

    def __init__(self, variables, halo):
        super().__init__()
        self.halo = halo
        self.inner = torch.nn.Linear(2 * variables, 32)
        self.outer = torch.nn.Linear(32, variables)

    def forward(self, fields):  # [batch, cells/M, variables]
        rows = exchange(fields, self.halo)  # [batch, cells/M + halo, variables]
        around = rows[:, self.halo.source].unflatten(1, (-1, 6)).mean(dim=2)  # [batch, cells/M, variables]
        return fields + self.outer(torch.nn.functional.gelu(self.inner(torch.cat([fields, around], dim=-1))))


dist.init_process_group("gloo")
comm = TorchComm()  # all ranks; TorchComm(group) for those of one model
topology = Topology.from_environment(num_gpus_per_model=comm.ranks)
dataset = open_dataset(sys.argv[1])
loader = ShardedDataLoader(dataset, topology, group=dist.group.WORLD, seed=0)
cells = loader.reading.owners  # who owns which cells
own = cells.cells(topology.model_rank)

# Edges: from the 6 nearest other cells to each cell that this rank owns. Sources are global numbers.
places = Frames.of(dataset.latitudes, dataset.longitudes).position
source = np.sort(cKDTree(places).query(places[own], k=7)[1][:, 1:], axis=1).ravel()
halo = build_halo(source, cells.bounds, comm)
area = torch.tensor(cell_areas(dataset.latitudes, dataset.longitudes)[own] / (4 * np.pi), dtype=torch.float32)

torch.manual_seed(0)  # the same weights on all ranks
model = Neighbours(len(dataset.variables), halo)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
mean = torch.tensor(dataset.statistics["mean"], dtype=torch.float32)
stdev = torch.tensor(dataset.statistics["stdev"], dtype=torch.float32).clamp(min=1e-12)

for batch in loader:
    fields = (batch.fields[:, :, 0] - mean) / stdev  # [batch, time, cells/M, variables]
    error = (model(fields[:, 0]) - fields[:, 1]).square().mean(dim=(0, 2))
    loss = (error * area).sum()  # of the cells that this rank owns
    optimizer.zero_grad()
    loss.backward()  # gradients of halo rows travel back to their owners
    reduce_gradients(model.parameters(), topology.data_size, comm)  # sum over the model, mean over the data groups
    optimizer.step()
    comm.sum(loss.detach(), "loss")
    if topology.rank == 0:
        print(f"{batch.dates[0, 0]}  {halo.rows - halo.owned} halo rows  loss {loss.item():.6f}")
dist.destroy_process_group()
