"""Who reads which positions of a global batch.

shares(50, 3) == ((0, 17), (17, 34), (34, 50))
"""

import itertools

from shoal.parallel import Share


def shares(examples: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Cut ``[0, examples)`` into consecutive (start, stop), sizes differing by one at most.

    Fewer examples than ranks leave the last ranks with none.
    """
    each, more = divmod(examples, ranks)
    cuts = [0]
    for rank in range(ranks):
        cuts.append(cuts[-1] + each + (rank < more))
    return tuple(itertools.pairwise(cuts))


def share_of(examples: int, ranks: int) -> Share:
    """The shares of one step, as the replicas need them."""
    return Share(examples, shares(examples, ranks))
