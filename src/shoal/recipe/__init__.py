"""What is trained, as one value: read from YAML or Python, checked whole, written, compared.

recipe = Recipe.from_yaml("recipes/digits.yaml")
load_recipe("recipes/digits.yaml", ("optimizer.lr=0.05", "strategy=dp2")).strategy_default
"""

from shoal.recipe.component import Component, Options
from shoal.recipe.components import DATA_SETS, METRICS, SIGNATURES, Role
from shoal.recipe.data import DataSpec, SourceSpec, Transform
from shoal.recipe.recipe import (
    CheckpointSpec,
    EvaluateSpec,
    Recipe,
    RecipeFile,
    StopSpec,
    load_recipe,
)

__all__ = [
    "DATA_SETS",
    "METRICS",
    "SIGNATURES",
    "CheckpointSpec",
    "Component",
    "DataSpec",
    "EvaluateSpec",
    "Options",
    "Recipe",
    "RecipeFile",
    "Role",
    "SourceSpec",
    "StopSpec",
    "Transform",
    "load_recipe",
]
