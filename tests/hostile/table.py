"""The whole table: importing this fills it."""

from __future__ import annotations

import tests.hostile.cases_hub
import tests.hostile.cases_manifest
import tests.hostile.cases_model
import tests.hostile.cases_package
import tests.hostile.cases_signature
import tests.hostile.cases_tensors  # noqa: F401
from tests.hostile.corpus import CASES

__all__ = ["CASES"]
