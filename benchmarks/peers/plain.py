"""Plain PyTorch: one process, every thread, as in the "Training with PyTorch" tutorial."""

import torch
from torch.nn import functional
from torch.utils.data import DataLoader

import loaded

work = loaded.work()
model = work.model
loader = DataLoader(work.train, batch_size=work.batch, shuffle=True)
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
clock.report(model)
