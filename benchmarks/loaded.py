"""What every loop that is not Shoal's is given: the model, the data in memory, a clock, a report.

    work = loaded.work()                         # from the command line: NAME --steps --warmup
    clock = Clock(work)
    while clock.runs: …; clock.step(loss)
    clock.report(model)                          # one line of JSON

Inputs are scaled as Shoal scales them, so all train on the same numbers.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shoal.models import ResNet, ResNetOptions, Transformer, TransformerOptions
from workloads import LENGTH, VOCABULARY, WORKLOADS, Workload


@dataclass(frozen=True)
class Work:
    """A workload in memory, and the command line."""

    name: str
    workload: Workload
    model: nn.Module
    train: TensorDataset
    held_out: TensorDataset
    steps: int
    warmup: int
    arguments: argparse.Namespace

    @property
    def batch(self) -> int:
        return self.workload.batch

    @property
    def lr(self) -> float:
        return self.workload.lr


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(WORKLOADS))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    return parser


def work(parser: argparse.ArgumentParser | None = None) -> Work:
    given = (parser or arguments()).parse_args()
    workload = WORKLOADS[given.name]
    with np.load(workload.data, allow_pickle=False) as archive:
        train, held_out = (
            TensorDataset(
                _scaled(archive[f"{prefix}inputs"]), torch.from_numpy(archive[f"{prefix}targets"])
            )
            for prefix in ("", "evaluate_")
        )
    torch.manual_seed(0)
    model = build_model(given.name)
    return Work(given.name, workload, model, train, held_out, given.steps, given.warmup, given)


def build_model(name: str) -> nn.Module:
    """That of the recipe."""
    if name == "transformer":
        return Transformer(TransformerOptions(classes=2, vocab=VOCABULARY, length=LENGTH))
    if name == "small-resnet":
        options = ResNetOptions(depth=18, width=16, classes=10, in_channels=1, stem="small")
        return ResNet(options)
    return ResNet(ResNetOptions(101, "depthwise_separable", classes=10, in_channels=1))


def _scaled(inputs: np.ndarray) -> Tensor:
    if inputs.dtype != np.uint8:
        return torch.from_numpy(inputs)
    return torch.from_numpy(inputs)[:, None].float().sub_(127.5).div_(127.5)


class Clock:
    """Counts steps; knows when the first one was done, and how fast those after the warm-up."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._done = 0
        self._first = self._since = self._rate = 0.0
        self._loss: Tensor | float = 0.0

    @property
    def runs(self) -> bool:
        return self._done < self._work.steps

    def step(self, loss: Any) -> None:
        """A step is done; its loss is only read after the last one."""
        self._done += 1
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        if self._done == 1:
            self._first = time.time() - float(os.environ.get("BENCH_STARTED", "nan"))
        if self._done == self._work.warmup:
            self._since = time.perf_counter()
        if self._done == self._work.steps:
            measured = (self._work.steps - self._work.warmup) * self._work.batch
            self._rate = measured / (time.perf_counter() - self._since)

    def report(self, model: nn.Module, path: str | None = None, *, evaluated: bool = True) -> None:
        """Print, or write to a file, what was measured, and how well the model does."""
        document = {
            "samples_per_second": self._rate,
            "seconds_to_first_step": self._first,
            "loss": float(self._loss),
        }
        if evaluated:
            held_out = self._work.held_out
            document["accuracy"] = accuracy(model, held_out, self._work.batch)
        if path is None:
            print(json.dumps(document), flush=True)
        else:
            Path(path).write_text(json.dumps(document))


@torch.no_grad()
def accuracy(model: nn.Module, held_out: TensorDataset, batch: int) -> float:
    model.eval()
    inputs, targets = held_out.tensors
    right = sum(
        int((model(rows).argmax(1) == wanted).sum())
        for rows, wanted in zip(inputs.split(batch), targets.split(batch), strict=True)
    )
    return right / len(targets)
