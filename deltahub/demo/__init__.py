"""The demonstration behind ``deltahub demo``: one delta's whole life on a real model, offline.

Three processes that share nothing but a Hub on loopback: this one runs the Hub; the *author* trains and publishes;
the *reader*, with an empty cache, loads by name. All files are in a temporary folder; the home stays untouched.
"""

from __future__ import annotations

__all__ = ["run"]

from deltahub.demo.stage import run
