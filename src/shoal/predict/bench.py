"""Members side by side on one device: what choosing and merging them needs.

selection     a tenth of the training data      models are chosen on it: best, greedy-soup
training      the rest                          statistics are estimated on it

bench = Bench(members, device)
bench.scores(0).accuracy                        # of member 0 on the selection tenth
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal import data
from shoal.data import Feed
from shoal.errors import Refused
from shoal.job import Workload, workload_of
from shoal.parallel import call_model
from shoal.predict.members import Member
from shoal.predict.merging import check_alike, estimate_statistics
from shoal.predict.permutations import State
from shoal.predict.scores import Scores


def probabilities_of(outputs: Any) -> Tensor:
    """Softmax of a classifier's outputs [n, classes], in float64. Raises `Refused` for others."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise Refused(
            f"predict needs a score for each class, [examples, classes]; the model gives {shape}",
            hint="Only classifiers of whole examples can be predicted with, for now.",
        )
    return torch.softmax(outputs.detach().double(), 1)


@dataclass(frozen=True)
class _Setting:
    """What belongs to a run: its workload, and the tenth that models are chosen on."""

    workload: Workload
    selection: Feed


class Bench:
    """Some members, loaded when they are needed; scores are kept, models are not."""

    def __init__(self, members: Sequence[Member], device: torch.device | None = None) -> None:
        self.members = tuple(members)
        self.device = device or torch.device("cpu")
        self._settings: dict[str, _Setting] = {}
        self._scores: dict[int, Scores] = {}

    def __len__(self) -> int:
        return len(self.members)

    def setting(self, number: int) -> _Setting:
        member = self.members[number]
        recipe = member.recipe
        key = f"{member.run} {recipe.fingerprint}"  # members of one run may be unlike
        if key not in self._settings:
            train, _ = data.resolve(recipe.data)
            plain = train.transform.model_copy(update={"augment": "none"})
            selection = data.open_feed(
                train.model_copy(update={"transform": plain}),
                batch_size=self.members[0].recipe.batch_size,  # they answer side by side
                seed=recipe.seed,
                shuffle=False,
                on_bad_example=recipe.data.on_bad_example,
                tenth="only",
            )
            work = workload_of(recipe, keeps_a_tenth=member.solo)
            self._settings[key] = _Setting(work, selection)
        return self._settings[key]

    def model(self, number: int) -> nn.Module:
        return self.members[number].model(self.setting(number).workload).to(self.device)

    def model_of(self, state: State) -> nn.Module:
        """The first member's model with other weights."""
        model = self.setting(0).workload.first_model(torch.float32)
        model.load_state_dict(dict(state))
        return model.to(self.device).eval()

    def states(self) -> list[State]:
        """The weights of all members. Raises `Refused` where they are unlike."""
        first = self.members[0].recipe.model
        states = [self.model(n).state_dict() for n in range(len(self))]
        check_alike([member.name for member in self.members], states)
        for member in self.members[1:]:
            if member.recipe.model != first:
                raise Refused(
                    f"{self.members[0].name} and {member.name} are models of other recipes, so "
                    "their parameters cannot be averaged",
                    hint="--how ensemble predicts with unlike models.",
                )
        return [{name: tensor.cpu() for name, tensor in state.items()} for state in states]

    def estimated(self, state: State, max_examples: int | None = None) -> dict[str, Tensor]:
        """The state with batch-norm statistics estimated on the training data."""
        model, work = self.model_of(state), self.setting(0).workload
        limit = {} if max_examples is None else {"max_examples": max_examples}
        estimate_statistics(model, work.feed, self.device, **limit)
        return {name: tensor.cpu() for name, tensor in model.state_dict().items()}

    def scores(self, number: int) -> Scores:
        """Of a member on the selection tenth."""
        if number not in self._scores:
            selection = self.setting(number).selection
            self._scores[number] = self.judged(self.model(number), selection)
        return self._scores[number]

    def scores_of(self, state: State) -> Scores:
        """Of other weights for the first member's model, on the selection tenth."""
        return self.judged(self.model_of(state), self.setting(0).selection)

    def judged(self, model: nn.Module, feed: Feed) -> Scores:
        parts = [
            Scores.of(probabilities.numpy(), labels.numpy())
            for probabilities, labels in answers(model, feed, self.device)
        ]
        return Scores.joined(parts)


@torch.no_grad()
def answers(model: nn.Module, feed: Feed, device: torch.device) -> Any:
    """(probabilities, labels) of each batch of an epoch, on the CPU."""
    for step in range(feed.steps_per_epoch):
        batch = feed.read(step, 0, feed.batch_examples(step)).to(device)
        yield probabilities_of(call_model(model, batch.inputs)).cpu(), batch.targets.cpu()
