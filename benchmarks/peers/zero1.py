"""DeepSpeed ZeRO stage 1, as in its "Getting started", under torchrun."""

import deepspeed
import torch
from torch.nn import functional

import loaded

deepspeed.init_distributed(dist_backend="gloo")
work = loaded.work()
config = {"train_batch_size": work.batch, "zero_optimization": {"stage": 1}}
optimizer = torch.optim.AdamW(work.model.parameters(), lr=work.lr)
engine, _, loader, _ = deepspeed.initialize(
    model=work.model, optimizer=optimizer, training_data=work.train, config=config
)
clock = loaded.Clock(work)
while clock.runs:
    for inputs, targets in loader:
        loss = functional.cross_entropy(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
        clock.step(loss)
        if not clock.runs:
            break
if engine.global_rank == 0:
    clock.report(engine.module)
torch.distributed.destroy_process_group()
