"""DistributedDataParallel under torchrun, as in the DDP tutorial: gloo, since there is no GPU."""

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import loaded

dist.init_process_group("gloo")
work = loaded.work()
model = DistributedDataParallel(work.model)
sampler = DistributedSampler(work.train)
loader = DataLoader(work.train, batch_size=work.batch // dist.get_world_size(), sampler=sampler)
optimizer = torch.optim.AdamW(model.parameters(), lr=work.lr)
clock = loaded.Clock(work)
while clock.runs:
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        clock.step(loss)
        if not clock.runs:
            break
if dist.get_rank() == 0:
    clock.report(work.model)
dist.destroy_process_group()
