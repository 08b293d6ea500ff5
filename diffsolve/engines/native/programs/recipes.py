"""Which recipe makes the program of which kind of right-hand side."""

from __future__ import annotations

from diffsolve.engines.native.programs.recipe import Recipe
from diffsolve.engines.native.programs.row_recipe import RowRecipe
from diffsolve.engines.native.programs.scalar_recipe import ScalarRecipe
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.vector_field import VectorField

_RECIPES: dict[type[VectorField], Recipe] = {VectorField: ScalarRecipe(), SDEField: RowRecipe()}


def recipe_of(field: VectorField) -> Recipe:
    """The recipe for right-hand sides of this kind."""
    return _RECIPES[type(field)]
