"""What can be known to fail before any rank starts: missing data, labels, the user's modules."""

import importlib

from shoal import data
from shoal.recipe import Component, Recipe
from shoal.recipe.component import thaw
from shoal.recipe.user import check_options, load, signature_of

# How many arguments a component of the user's is given before its options, by its role.
_GIVEN = {"model": 0, "objective": 2, "optimizer": 1, "schedule": 1}
# Options that are Shoal's business, and what a model gets from the data if it asks for it.
_OURS = ("clip_norm", "no_decay")
_FROM_DATA = ("classes", "in_channels")


def check_before_start(recipe: Recipe) -> None:
    """Look at the data (names, headers, labels) and at the user's own components.

    Cheap, and without torch unless a module of the user's imports it. Raises `DataMissing` or
    `UsageError`.
    """
    members = range(len(recipe.members or ())) if recipe.members else range(1)
    for each in (recipe.member(number) for number in members):
        classes = each.model.options.get("classes")
        for spec in data.resolve(each.data):
            if spec is not None:
                data.check_labels(data.describe(spec), classes)
        _check_components(each)


def _check_components(recipe: Recipe) -> None:
    """The user's own ones."""
    for role, given in _GIVEN.items():
        component: Component = getattr(recipe, role)
        if not component.builtin:
            _check(component, role, given)


def _check(component: Component, role: str, given: int) -> None:
    """Import the user's function, and see whether it takes these options."""
    importlib.invalidate_caches()
    function = load(component.name, role)
    options = thaw(component.options)
    if role == "optimizer":
        options = {key: value for key, value in options.items() if key not in _OURS}
    if role == "model":
        signature = signature_of(function)
        named = () if signature is None else signature.parameters
        options = {key: None for key in _FROM_DATA if key in named} | options
    check_options(function, component.name, options, role, *[None] * given)
