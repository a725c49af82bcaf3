"""The job that `local_peers.py` gives to each: one model, one start, one order of the batches.

    model = build()                                      # the same weights whoever asks
    for inputs, targets in batches(64, rank, ranks=2): …  # this rank's rows of Shoal's batches

Torch's own loop around it is `trained`: it is what a peer's optimizer is put into.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.data.order import order
from shoal.models import ResNet, ResNetOptions
from workloads import DATA

BATCH, LR, MOMENTUM = 64, 0.02, 0.9
SEED = 0


def build(**_given: Any) -> nn.Module:
    """ResNet-18, 11.2 million parameters, of images that it reads at a quarter of their size."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return ResNet(
            ResNetOptions(
                18, stem="small", norm="group", input_downscale=4, classes=10, in_channels=1
            )
        )


def batches(steps: int, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    inputs, targets = _examples("")
    share = BATCH // ranks
    for step in range(steps):
        first = step * BATCH + rank * share
        places = order(np.arange(first, first + share), examples=len(targets), seed=SEED, epoch=0)
        yield inputs[places], targets[places]


def _examples(prefix: str) -> tuple[Tensor, Tensor]:
    with np.load(DATA / "small-resnet.npz", allow_pickle=False) as archive:
        pixels = torch.from_numpy(archive[f"{prefix}inputs"])
        targets = torch.from_numpy(archive[f"{prefix}targets"])
    return pixels[:, None].float().sub_(127.5).div_(127.5), targets


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    inputs, targets = _examples("evaluate_")
    model.eval()
    total = sum(
        functional.cross_entropy(model(rows), wanted, reduction="sum").item()
        for rows, wanted in zip(inputs.split(100), targets.split(100), strict=True)
    )
    return total / len(targets)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--folder", required=True)
    given = parser.parse_args()
    given.rank, given.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return given


def trained(given: argparse.Namespace, model: nn.Module, optimizer: Any) -> float:
    """Train; samples a second of all ranks after the first `every` steps, meetings included."""
    since = time.perf_counter()
    rows = list(batches(given.steps, given.rank, given.ranks))
    for step, (inputs, targets) in enumerate(rows):
        if step == given.every:
            since = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return BATCH * (given.steps - given.every) / (time.perf_counter() - since)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)


def report(given: argparse.Namespace, model: nn.Module, rate: float, **more: Any) -> None:
    """One line of JSON, from rank 0."""
    if given.rank == 0:
        loss = held_out_loss(model)
        print(json.dumps({"samples_per_second": rate, "loss": loss, **more}), flush=True)
