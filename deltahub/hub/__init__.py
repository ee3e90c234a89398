"""The Hub: publish a package, pull it, find it, and write down what exactly was loaded."""

from __future__ import annotations

__all__ = [
    "CardDetails",
    "Lock",
    "PulledPackage",
    "PushResult",
    "SearchHit",
    "Source",
    "lock_of",
    "parse_source",
    "pull",
    "push",
    "render_card",
    "search",
    "write_card",
]

from deltahub.hub.card import CardDetails, render_card
from deltahub.hub.locking import Lock, lock_of
from deltahub.hub.pulling import PulledPackage, pull
from deltahub.hub.pushing import PushResult, push, write_card
from deltahub.hub.searching import SearchHit, search
from deltahub.hub.sources import Source, parse_source
