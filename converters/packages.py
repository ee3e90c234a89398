"""Packages as converters take and give them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltahub.package import Package

__all__ = ["opened"]


def opened(source: Package | str | os.PathLike[str]) -> Package:
    """A package that is open already, in a folder, or on the Hub.

    Raises:
        PackageError: it is no package, or altered.
        HubError: it is neither a folder nor on the Hub.
    """
    from deltahub import hub
    from deltahub.package import Package

    if isinstance(source, Package):
        return source
    pulled = hub.pull(source)
    return Package.open(pulled.path, root=pulled.root)
