"""Plain PyTorch on sharded batches: torchrun --nproc_per_node=2 train_plain_torch.py DATASET."""

import sys

import torch
import torch.distributed as dist

from shardio import ShardedDataLoader, Topology, open_dataset

dist.init_process_group("gloo")
topology = Topology.from_environment(num_gpus_per_model=dist.get_world_size())
dataset = open_dataset(sys.argv[1])
loader = ShardedDataLoader(dataset, topology, group=dist.group.WORLD, shuffle=True, seed=0)

mean = torch.tensor(dataset.statistics["mean"], dtype=torch.float32)
stdev = torch.tensor(dataset.statistics["stdev"], dtype=torch.float32).clamp(min=1e-12)
model = torch.nn.Linear(len(dataset.variables), len(dataset.variables))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.nn.init.eye_(model.weight)
torch.nn.init.zeros_(model.bias)

for batch in loader:
    fields = (batch.fields - mean) / stdev  # [batch, time, ensemble, cells/M, variables]
    now, then = fields[:, :1], fields[:, 1:]
    loss = ((model(now) - then) ** 2).sum() / (then[..., 0].numel() * dataset.shape[3] / then.shape[3])
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters():  # each rank holds the gradient of its cells: their sum is the whole
        dist.all_reduce(parameter.grad)
    optimizer.step()
    dist.all_reduce(loss.detach())
    if topology.rank == 0:
        print(f"{batch.dates[0, 0]}  cells {batch.cells.start}-{batch.cells.stop - 1}  loss {loss.item():.6f}")
dist.destroy_process_group()
