"""The loop that a competent user writes by hand, on one process or as a rank of DDP over gloo.

    python benchmarks/by_hand.py small-resnet --steps 60 --warmup 10 [--bf16] [--compile]
    … --rank 0 --ranks 2 --store FILE        # or under torchrun

Data in memory, indexed by a permutation an epoch; AdamW fused; gradients set to None; DDP with its
buckets as gradients, one thread a rank, each rank's own batch statistics. ``--bf16`` is autocast
with images and weights in channels_last.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import loaded


def main() -> None:
    parser = loaded.arguments()
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-evaluation", action="store_true")
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", "0")))
    parser.add_argument("--ranks", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    parser.add_argument("--store")
    work = loaded.work(parser)
    given = work.arguments
    if given.ranks > 1:
        where = f"file://{given.store}" if given.store else "env://"
        dist.init_process_group("gloo", where, rank=given.rank, world_size=given.ranks)
    if given.bf16:
        work.model.to(memory_format=torch.channels_last)
    net: nn.Module = work.model
    if given.ranks > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    if given.compile:
        net.compile()
    clock = loaded.Clock(work)
    train(work, net, clock)
    if given.rank == 0:
        clock.report(work.model, evaluated=not given.no_evaluation)
    if given.ranks > 1:
        dist.destroy_process_group()


def train(work: loaded.Work, net: nn.Module, clock: loaded.Clock) -> None:
    given, share = work.arguments, work.batch // work.arguments.ranks
    inputs, targets = work.train.tensors
    images_last = given.bf16 and inputs.dim() == 4
    optimizer = torch.optim.AdamW(work.model.parameters(), lr=work.lr, fused=True)
    generator = torch.Generator().manual_seed(0)
    while clock.runs:
        order = torch.randperm(len(inputs), generator=generator)
        for start in range(0, len(order) - work.batch + 1, work.batch):
            rows = order[start + given.rank * share : start + (given.rank + 1) * share]
            x, y = inputs[rows], targets[rows]
            if images_last:
                x = x.to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=given.bf16):
                loss = functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.step(loss)
            if not clock.runs:
                return


if __name__ == "__main__":
    main()
