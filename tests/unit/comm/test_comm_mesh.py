"""Which ranks differ in which axes."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.mesh import Mesh


def test_parts_of_a_grid() -> None:
    mesh = Mesh((("pp", 2), ("dp", 2), ("tp", 2)))
    assert mesh.size == 8
    assert mesh.parts(("tp",)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert mesh.parts(("dp",)) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert mesh.parts(("pp",)) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert mesh.parts(("pp", "tp")) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert mesh.parts(("cp",)) == [(rank,) for rank in range(8)]
    assert mesh.coordinates(5) == {"pp": 1, "dp": 0, "tp": 1}


@given(
    st.permutations(["pp", "dp", "tp"]),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.sets(st.sampled_from(["pp", "dp", "tp"])),
)
def test_every_rank_is_in_one_part_and_differs_along_those_axes_only(
    names, degrees, chosen
) -> None:
    mesh = Mesh(tuple(zip(names, degrees, strict=True)))
    parts = mesh.parts(tuple(chosen))
    assert sorted(rank for part in parts for rank in part) == list(range(mesh.size))
    for part in parts:
        places = [mesh.coordinates(rank) for rank in part]
        for name in set(names) - chosen:
            assert len({place[name] for place in places}) == 1
