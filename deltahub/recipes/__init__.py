"""Recipes: whole trainings that end in a package."""

from __future__ import annotations

from deltahub.recipes.distil import Options, Result, distil
from deltahub.recipes.warm import warm_start

__all__ = ["Options", "Result", "distil", "warm_start"]
