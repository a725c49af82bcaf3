"""Plant bugs one by one on lasting ranks, verify, and count what is found and named."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle

from mutation.mutants import Mutant
from mutation.subjects import SUBJECTS
from shoal.errors import ShoalError
from shoal.launch import Context, Ranks
from shoal.recipe.component import read
from shoal.strategy import Strategy
from shoal.verify.on_rank import Functions, VerifyTask, verify_on_rank

FOUND, NAMED = 0.95, 0.80
RANKS = 4
TESTS = str(Path(__file__).parents[1])


@dataclass
class Verdict:
    """Shares of the planted bugs that were found and named; alarms where there was none."""

    planted: int = 0
    seen: list[str] = field(default_factory=list)
    right: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)

    @property
    def found(self) -> float:
        return len(self.seen) / max(1, self.planted)

    @property
    def named(self) -> float:
        return len(self.right) / max(1, self.planted)

    def text(self) -> str:
        return (
            f"{self.planted} bugs planted: {len(self.seen)} found ({self.found:.0%}), "
            f"{len(self.right)} named by their cause ({self.named:.0%}); "
            f"{len(self.alarms)} false alarms"
        )


def hunt(mutants: Sequence[Mutant], tell: Callable[[str], None] = lambda _line: None) -> Verdict:
    """Verify under each bug; ranks are started again only after one that has ended them."""
    _carry_by_value()
    verdict, ranks = Verdict(), Ranks(RANKS, threads=1)
    try:
        for mutant in mutants:
            try:
                findings = _verify(ranks, mutant)
            except ShoalError as error:  # it was not silent, and says what it is
                findings = {"first_difference": "raised", "cause": error.message}
                if not ranks.alive:
                    ranks.close()
                    ranks = Ranks(RANKS, threads=1)
            _note(verdict, mutant, findings, tell)
    finally:
        ranks.close()
    return verdict


def _verify(ranks: Ranks, mutant: Mutant) -> dict[str, Any]:
    model_fn, batch_fn, loss_fn = SUBJECTS[mutant.subject]
    strategy = Strategy.parse(mutant.strategy if mutant.strategy[:2] != "mb"
                              else f"single/{mutant.strategy}")  # fmt: skip
    work = Functions(model_fn, batch_fn, loss_fn, None, read("optimizer", mutant.optimizer), None)
    task = VerifyTask(work, str(strategy), 3, mutant.plant)
    done = ranks.call(_quietly, task, ranks=strategy.world_size)
    return dict(done[0])


def _quietly(context: Context, task: VerifyTask) -> dict[str, Any]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return verify_on_rank(context, task)


def _note(verdict: Verdict, mutant: Mutant, findings: dict[str, Any], tell: Any) -> None:
    differs, cause = findings["first_difference"] is not None, findings["cause"] or ""
    if not mutant.words:
        verdict.alarms += [mutant.name] if differs else []
        tell(f"{'ALARM' if differs else 'healthy':8} {mutant.strategy:16} {mutant.name} {cause}")
        return
    named = differs and any(word in cause for word in mutant.words.split("|"))
    verdict.planted += 1
    verdict.seen += [mutant.name] if differs else []
    verdict.right += [mutant.name] if named else []
    state = "named" if named else "found" if differs else "MISSED"
    tell(f"{state:8} {mutant.strategy:16} {mutant.name}: {cause[:160]}")


def _carry_by_value() -> None:
    for module in list(sys.modules.values()):
        if (getattr(module, "__file__", None) or "").startswith(TESTS):
            cloudpickle.register_pickle_by_value(module)
