"""Hugging Face Accelerate, as in its quick tour, under torchrun."""

import torch
from accelerate import Accelerator
from torch.nn import functional
from torch.utils.data import DataLoader

import loaded

accelerator = Accelerator(cpu=True)
work = loaded.work()
share = work.batch // accelerator.num_processes
loader = DataLoader(work.train, batch_size=share, shuffle=True)
optimizer = torch.optim.AdamW(work.model.parameters(), lr=work.lr)
model, optimizer, loader = accelerator.prepare(work.model, optimizer, loader)
clock = loaded.Clock(work)
while clock.runs:
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        clock.step(loss)
        if not clock.runs:
            break
if accelerator.is_main_process:
    clock.report(accelerator.unwrap_model(model))
accelerator.end_training()
