"""What goes wrong in a group that shares memory, in words that name the rank.

    raise PeerGone("rank 1 (process 4711) has ended; it had not arrived at collective 7, …")

`comm/failures.py` knows the first words of each, as torch carries errors through C++ as text.
"""

PEER_SIGN = "shared-memory group, peer lost: "
CALLS_SIGN = "shared-memory group, calls differ: "


class CannotShare(Exception):
    """Why these ranks cannot share memory; every rank of the group raises the same."""


class PeerGone(RuntimeError):
    """A rank that was killed, has left, or has not arrived in time."""

    def __init__(self, what: str) -> None:
        super().__init__(PEER_SIGN + what.removeprefix(PEER_SIGN))


class CallsDiffer(RuntimeError):
    """Ranks that make different collectives at the same time: another kind, type or size."""

    def __init__(self, what: str) -> None:
        super().__init__(CALLS_SIGN + what.removeprefix(CALLS_SIGN))
