"""Who reads which positions of a global batch.

shares(50, 3) == ((0, 17), (17, 34), (34, 50))
shares(50, 3, multiple=8) == ((0, 24), (24, 40), (40, 50))
"""

import itertools

from shoal.parallel import Share


def shares(examples: int, ranks: int, multiple: int = 1) -> tuple[tuple[int, int], ...]:
    """Cut ``[0, examples)`` into consecutive (start, stop), sizes differing by `multiple` at most.

    Borders are multiples of `multiple`: of the size of statistics groups, where one has to lie
    whole on a rank. Fewer examples than ranks leave the last ranks with none.
    """
    each, more = divmod(-(-examples // multiple), ranks)
    cuts = [0]
    for rank in range(ranks):
        cuts.append(min(examples, cuts[-1] + (each + (rank < more)) * multiple))
    return tuple(itertools.pairwise(cuts))


def share_of(examples: int, ranks: int, multiple: int = 1) -> Share:
    """The shares of one step, as the replicas need them."""
    return Share(examples, shares(examples, ranks, multiple))
