"""What torch raises when another rank has gone, told apart from errors of this rank."""

import contextlib
import re
from collections.abc import Iterator

from shoal.errors import PeerLost

# gloo and NCCL have no exception types of their own for this: their words are all there is.
_SIGNS = re.compile(
    r"connection (closed|reset|refused)|closed by (remote )?peer|broken pipe|timed out|"
    r"pair closure|socket (closed|timeout)|gloo/transport|"
    r"ncclRemoteError|ncclSystemError|no route to host",
    re.IGNORECASE,
)


def is_peer_failure(error: BaseException) -> bool:
    """Whether `error` is torch's word for a broken connection between ranks."""
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
