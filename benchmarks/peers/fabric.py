"""Lightning Fabric, as in its quick start; it starts its second process itself."""

import torch
from lightning_fabric import Fabric
from torch.nn import functional
from torch.utils.data import DataLoader

import loaded

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
work = loaded.work()
optimizer = torch.optim.AdamW(work.model.parameters(), lr=work.lr)
model, optimizer = fabric.setup(work.model, optimizer)
loader = DataLoader(work.train, batch_size=work.batch // fabric.world_size, shuffle=True)
loader = fabric.setup_dataloaders(loader)
clock = loaded.Clock(work)
while clock.runs:
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        optimizer.step()
        clock.step(loss)
        if not clock.runs:
            break
if fabric.is_global_zero:
    clock.report(work.model)
