"""A Hub on loopback for tests and demonstrations: ``with serve_hub(folder) as hub: … hub.url …``."""

from __future__ import annotations

from deltahub.testing.faults import Fault
from deltahub.testing.server import LoopbackHub, serve_hub
from deltahub.testing.state import Call

__all__ = ["Call", "Fault", "LoopbackHub", "serve_hub"]
