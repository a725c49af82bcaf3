"""What all tests share: one pool of four ranks for the whole session.

    def total(groups, start):
        ...
        return [1, 2]                                  # JSON

    def test_it(pool):
        assert pool.run(total, 7, ranks=3) == [[1, 2]] * 3

Functions and what they use of test modules travel to the ranks by value. On a rank warnings are
errors, as they are here.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import hypothesis
import pytest

from shoal.launch import Context, Ranks

POOL_RANKS = 4

# No timing in a test: a machine that is busy with other workers is not a fault.
hypothesis.settings.register_profile("shoal", deadline=None)
hypothesis.settings.load_profile("shoal")


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `auto` finds out in tests is not the user's, and what the user's has is not theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Pool:
    """Ranks that wait for work; started at the first call, and again after a crash."""

    def __init__(self, size: int = POOL_RANKS) -> None:
        self.size = size
        self._ranks: Ranks | None = None

    @property
    def process_ids(self) -> tuple[int, ...]:
        return self._ranks.process_ids if self._ranks is not None else ()

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        ranks: int | None = None,
        on_message: Callable[[int, Any], None] = lambda _rank, _message: None,
    ) -> list[Any]:
        """``function(context, *arguments)`` on the first `ranks` ranks; a failure ends the pool."""
        if self._ranks is None or not self._ranks.alive:
            self.close()
            self._ranks = Ranks(self.size, threads=1)
            self._ranks.call(_import_torch)
        _carry_tests_by_value()
        try:
            return self._ranks.call(
                _strictly, function, *arguments, ranks=ranks, on_message=on_message
            )
        except BaseException:
            self.close()
            raise

    def run(
        self, function: Callable[..., Any], *arguments: Any, ranks: int, axes: Any = ()
    ) -> list[Any]:
        """``function(groups, *arguments)`` on `ranks` ranks that have met.

        ``axes``: (name, degree) of the groups they form; all are replicas without any.
        """
        return self.call(_together, function, tuple(axes), *arguments, ranks=ranks)

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None


def _import_torch(_context: Context) -> None:
    """Seconds that all ranks spend together here, rather than one by one in the tests."""
    import shoal.train.step  # noqa: F401


def _strictly(context: Context, function: Callable[..., Any], *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What torch's compiler says to itself: when imported, and at a break in a graph.
        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        return function(context, *arguments)


def _together(context: Context, function: Callable[..., Any], axes: Any, *arguments: Any) -> Any:
    import torch

    from shoal.comm import Groups

    torch.set_num_threads(1)
    groups = Groups.form(
        context.rank,
        context.world_size,
        context.store,
        context.generation,
        axes=axes,
        timeout_s=60,
    )
    result = function(groups, *arguments)
    groups.close()
    return result


def _carry_tests_by_value() -> None:
    here = str(Path(__file__).parent)
    for module in list(sys.modules.values()):
        if (getattr(module, "__file__", None) or "").startswith(here):
            cloudpickle.register_pickle_by_value(module)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four ranks; subgroups of them with ``ranks=k``."""
    ranks = Pool()
    yield ranks
    ranks.close()


POOL_FOLDER = "tests/distributed/"


# Parametrised tests of which `make test` runs every k-th case, and `make test-long` the others.
SAMPLED = {
    "test_distributed_zero.py": 11,
    "test_distributed_staged_zero.py": 15,
    "test_distributed_pipeline.py": 12,
    "test_distributed_tensor.py": 13,
    "test_distributed_tensor_sequence.py": 4,
    "test_distributed_comm_bytes.py": 3,
    "test_trace_segments.py": 3,
    "test_distributed_meetings.py": 7,
    "test_distributed_compression.py": 7,
    "test_faults_async.py": 2,
    "test_distributed_convergence.py": 2,
}
_seen: Counter[str] = Counter()


def _leave_to_the_long_run(item: pytest.Item) -> None:
    every = SAMPLED.get(item.path.name)
    if every is None or not hasattr(item, "callspec"):
        return
    function = item.nodeid.partition("[")[0]
    if _seen[function] % every:
        item.add_marker(pytest.mark.long)
    _seen[function] += 1


def pytest_itemcollected(item: pytest.Item) -> None:
    _leave_to_the_long_run(item)
    if "pool" in getattr(item, "fixturenames", ()):
        assert item.nodeid.startswith(POOL_FOLDER), f"tests of the pool live in {POOL_FOLDER}"
        item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under xdist one worker runs all tests of the pool, so that there is only one pool.

    By folder, as pytest 9.2 hides the marks from xdist 3.8 (its issue 1386), which then says
    nothing and gives each worker some of the tests.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OnePool(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ranks" if nodeid.startswith(POOL_FOLDER) else nodeid

    return OnePool(config, log) if config.getvalue("dist") == "loadgroup" else None
