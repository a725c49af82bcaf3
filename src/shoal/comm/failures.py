"""What torch raises when another rank has gone, told apart from errors of this rank."""

import contextlib
import re
from collections.abc import Iterator

import torch.distributed as dist

from shoal.errors import PeerLost

# gloo and NCCL have no exception types of their own for this: their words are all there is. Only
# texts that name them count, since a user's own code may well speak of connections too.
_SIGNS = re.compile(
    r"gloo/|pair closure|nccl(Remote|System|Internal)Error|NCCL (error|timeout)", re.I
)


def is_peer_failure(error: BaseException) -> bool:
    """Whether `error` is torch's word for a broken connection between ranks."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None


@contextlib.contextmanager
def peer_failures() -> Iterator[None]:
    """Turn the errors of a broken connection between ranks into `PeerLost`."""
    try:
        yield
    except RuntimeError as error:
        if is_peer_failure(error):
            first_line = str(error).strip().splitlines()[0]
            raise PeerLost(first_line) from error
        raise
