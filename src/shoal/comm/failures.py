"""What torch and our own groups raise when another rank has gone, told apart from other errors."""

import contextlib
import re
from collections.abc import Iterator

import torch.distributed as dist

from shoal.comm.shared_memory import CALLS_SIGN, PEER_SIGN
from shoal.errors import PeerLost, RanksDiffer

# gloo and NCCL have no exception types of their own for this: their words are all there is. Ours
# has, but an error that comes through torch's C++ is text. Only texts that name them count, since a
# user's own code may well speak of connections too.
_SIGNS = re.compile(
    r"gloo/|pair closure|nccl(Remote|System|Internal)Error|NCCL (error|timeout)|"
    + re.escape(PEER_SIGN),
    re.I,
)


def is_peer_failure(error: BaseException) -> bool:
    """Whether `error` is torch's word for a broken connection between ranks, or ours."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None


@contextlib.contextmanager
def peer_failures() -> Iterator[None]:
    """Turn the errors of a broken connection between ranks into `PeerLost`.

    Ranks that make different collectives at the same time are `RanksDiffer`; gloo does not find it.
    """
    try:
        yield
    except RuntimeError as error:
        if CALLS_SIGN in str(error):
            raise RanksDiffer(
                f"the ranks do not make the same collectives: {_after(CALLS_SIGN, error)}",
                hint="All ranks have to call the same collectives in the same order, with tensors "
                "of one type and size. A model that runs other layers for other examples (experts) "
                "does not under zero2 and zero3: use zero1, or run every layer.",
            ) from error
        if is_peer_failure(error):
            raise PeerLost(_after(PEER_SIGN, error)) from error
        raise


def _after(sign: str, error: RuntimeError) -> str:
    """The first line of an error, from behind the sign if it is there."""
    line: str = str(error).strip().partition(sign)[2] or str(error).strip()
    return line.splitlines()[0]
