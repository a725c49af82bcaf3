"""Losses of scores that are cut over the classes, beside the same losses of whole scores.

The ranks are threads here: what is tested is arithmetic, not transport.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.learn.objectives import CrossEntropy
from shoal.parallel.tensor.vocabulary import CutScores, Range

CLASSES = 37
BOUNDS = (0, 13, 26, 37)


@dataclass
class Meeting:
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(3, timeout=20))
    given: list[Any] = field(default_factory=lambda: [None] * 3)

    def exchange(self, rank: int, value: Tensor) -> Tensor:
        self.given[rank] = value.detach().clone()
        self.barrier.wait()
        everything = torch.stack(self.given)
        self.barrier.wait()
        return everything


@dataclass
class ThreadGroup:
    """What the losses use of `shoal.comm.Group`."""

    rank: int
    meeting: Meeting
    size: int = 3
    calls: list[tuple[str, int]] = field(default_factory=list)

    def all_reduce(self, tensor: Tensor, purpose: str, *, largest: bool = False) -> Tensor:
        assert purpose == "activation"
        self.calls.append(("all_reduce", tensor.numel()))
        everything = self.meeting.exchange(self.rank, tensor)
        return tensor.copy_(everything.amax(0) if largest else everything.sum(0))

    def all_gather(self, tensor: Tensor, purpose: str) -> Tensor:
        self.calls.append(("all_gather", tensor.numel()))
        return self.meeting.exchange(self.rank, tensor)


def targets() -> Tensor:
    found = torch.randint(0, CLASSES, (3, 5), generator=torch.Generator().manual_seed(2))
    found[0, 1] = -100
    return found


def shifted(outputs: Tensor, labels: Tensor) -> Tensor:
    """As a language model's own loss does it."""
    kept = outputs.double()[..., :-1, :].contiguous()
    return F.cross_entropy(kept.view(-1, CLASSES), labels[..., 1:].contiguous().view(-1))


def picked(outputs: Tensor, labels: Tensor) -> Tensor:
    known = labels.clamp(min=0).unsqueeze(-1)
    return -(outputs.log_softmax(-1).gather(-1, known).squeeze(-1) * (labels >= 0)).sum()


def nll(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(outputs, dim=-1).flatten(0, 1), labels.flatten())


PARALLEL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the objective": lambda o, t: CrossEntropy(ignore_index=-100)(o, t)[0],
    "smoothed": lambda o, t: CrossEntropy(label_smoothing=0.1, ignore_index=-100)(o, t)[0],
    "flattened": lambda o, t: F.cross_entropy(o.view(-1, o.size(-1)), t.view(-1)),
    "classes second": lambda o, t: F.cross_entropy(o.transpose(1, 2), t, reduction="none").sum(),
    "with a temperature": lambda o, t: F.cross_entropy((o / 2.0).flatten(0, 1), t.flatten()),
    "a layer": lambda o, t: torch.nn.CrossEntropyLoss()(o.movedim(-1, 1), t),
    "some rows": lambda o, t: F.cross_entropy(o[t >= 0], t[t >= 0]),
    "the last place": lambda o, t: F.cross_entropy(o[:, -1], t[:, -1]),
    "shifted": shifted,
    "picked": picked,
    "nll": nll,
}
GATHERED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": lambda o, t: ((o - 1) ** 2).mean(),
    "softmax": lambda o, t: (o.softmax(-1) ** 2).sum(),
    "soft targets": lambda o, t: F.cross_entropy(
        o.flatten(0, 1), torch.linspace(0, 1, 15 * CLASSES).double().view(15, -1).softmax(-1)
    ),
}


def run(loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor) -> list[Any]:
    meeting, results, failures = Meeting(), [None] * 3, []

    def work(rank: int) -> None:
        try:
            group: Any = ThreadGroup(rank, meeting)
            mine = scores[..., BOUNDS[rank] : BOUNDS[rank + 1]].clone().requires_grad_()
            value = loss(CutScores(mine * 1.0, 2, Range(BOUNDS, group)), targets())
            value.backward()
            results[rank] = (value.detach(), mine.grad, group.calls)
        except Exception as error:
            failures.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        failures.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
        raise failures[0]
    return results


@pytest.mark.parametrize("name", [*PARALLEL, *GATHERED])
def test_a_loss_and_its_gradient_are_those_of_whole_scores(name: str) -> None:
    loss = {**PARALLEL, **GATHERED}[name]
    scores = torch.randn(
        3, 5, CLASSES, dtype=torch.double, generator=torch.Generator().manual_seed(1)
    )
    whole = scores.clone().requires_grad_()
    expected = loss(whole, targets())
    expected.backward()
    results = run(loss, scores)
    for value, _, calls in results:
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
        assert ("all_gather" in {call for call, _ in calls}) == (name in GATHERED)
    gradient = torch.cat([each for _, each, _ in results], -1)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-13)


def test_a_cross_entropy_moves_three_numbers_a_label() -> None:
    results = run(PARALLEL["flattened"], torch.randn(3, 5, CLASSES, dtype=torch.double))
    assert sum(count for _, count in results[0][2]) == 3 * 15


def test_a_label_that_is_no_class_is_refused_as_torch_does() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        run(lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten() + 36), torch.randn(3, 5, 37))


def test_scores_look_whole() -> None:
    group: Any = ThreadGroup(1, Meeting())
    scores = CutScores(torch.zeros(3, 5, 13), 2, Range(BOUNDS, group))
    assert scores.shape == (3, 5, 37)
    assert scores.size(-1) == 37
    assert scores.reshape(-1, 37).shape == (15, 37)
    assert isinstance(scores, Tensor)
    assert scores.dtype == torch.float32
