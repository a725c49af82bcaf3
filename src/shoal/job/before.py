"""What can be known to fail before any rank starts: missing data, labels, the user's modules."""

import importlib.util

from shoal import data
from shoal.recipe import Component, Recipe


def check_before_start(recipe: Recipe) -> None:
    """Look at the data (names, headers, labels) and import the user's own components.

    Cheap, and without torch unless the recipe names components of the user's own. Raises
    `DataMissing` or `UsageError`.
    """
    classes = recipe.model.options.get("classes")
    for spec in data.resolve(recipe.data):
        if spec is not None:
            data.check_labels(data.describe(spec), classes)
    for role in ("model", "objective", "optimizer", "schedule"):
        component: Component = getattr(recipe, role)
        if not component.builtin:
            _import(component, role)


def _import(component: Component, role: str) -> None:
    from shoal.recipe.user import load

    importlib.invalidate_caches()
    load(component.name, role)
