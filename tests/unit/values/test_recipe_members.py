"""Members of an ensemble that are unlike: what they may change, and how they are named."""

import pytest

from shoal.cluster import Cluster
from shoal.errors import RecipeError, Refused
from shoal.job import resolve
from shoal.recipe import Recipe

PLAIN = {
    "name": "small",
    "batch_size": 32,
    "steps": 4,
    "model": {"name": "mlp", "widths": [64, 8]},
    "data": {"train": "digits:train"},
    "objective": "cross_entropy",
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def recipe(*members: object) -> Recipe:
    return Recipe.from_dict({**PLAIN, "members": list(members)})


def test_each_member_has_the_recipe_with_its_changes() -> None:
    made = recipe("model.widths=[16]", ["model.widths=[4, 4]", "optimizer.lr=0.01"])
    first, second = made.member(0), made.member(1)
    assert first.members is None
    assert first.model.options["widths"] == (16,)
    assert first.optimizer.options["lr"] == 0.1
    assert second.model.options["widths"] == (4, 4)
    assert second.optimizer.options["lr"] == 0.01
    assert Recipe.from_dict(made.to_dict()) == made
    assert made.fingerprint != Recipe.from_dict(PLAIN).fingerprint


def test_a_recipe_without_members_is_its_own_only_member() -> None:
    plain = Recipe.from_dict(PLAIN)
    assert plain.member(0) == plain
    assert "members" not in plain.to_dict()


@pytest.mark.parametrize("change", ["batch_size=8", "data.train=digits:all", "seed=3", "name=x"])
def test_what_decides_the_data_and_the_steps_is_common(change: str) -> None:
    with pytest.raises(RecipeError, match=r"members may differ in .*model"):
        recipe("model.widths=[4]", change)


@pytest.mark.parametrize("members", [[], "model.widths=[4]", [1]])
def test_members_are_a_list_of_changes(members: object) -> None:
    with pytest.raises(RecipeError):
        Recipe.from_dict({**PLAIN, "members": members})


def test_a_run_trains_as_many_models_as_the_recipe_names() -> None:
    made = recipe("model.widths=[4]", "model.widths=[5]", "model.widths=[6]")
    resolved = resolve(made, "dp2/solo", Cluster.local())
    assert str(resolved.strategy) == "dp2/solo:members=3"
    for strategy in ("dp2", "dp2/local:4", "dp2/solo:members=2"):
        with pytest.raises(Refused, match="the recipe has 3 members of its own"):
            resolve(made, strategy, Cluster.local())
