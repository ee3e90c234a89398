"""A package on disk: opened only when all that needs no backbone has been checked, written whole or not at all.

:meth:`Package.open` checks in the order of the format's section on security: the manifest's bytes, its members, the
kinds and configs that it names, the listed files' paths, sizes and digests, and then the headers against the manifest.
The bytes that are hashed are the bytes that are used. :func:`write` writes nothing that :meth:`Package.open` refuses.
"""

from __future__ import annotations

__all__ = ["Package", "Probe", "write"]

from deltahub.package.probe import Probe
from deltahub.package.reading import Package
from deltahub.package.writing import write
