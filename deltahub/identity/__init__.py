"""Which backbone is this? An identity that does not depend on names of repositories, on shards, or on file formats.

Every tensor has a leaf, SHA-256 over its dtype, shape and bytes; the leaves with their names form
the tree of RFC 6962. Its root over the tensors as stored is ``exact``; its root with floats rounded
to BF16 is ``bf16``, so that a checkpoint and its half-precision copy are known as one backbone.
"""

from __future__ import annotations

__all__ = [
    "ALGORITHM",
    "Checkpoint",
    "Declared",
    "Identity",
    "IdentityReport",
    "Inclusion",
    "Level",
    "check",
    "checkpoint_names",
    "describe",
    "digest_bytes",
    "entry",
    "fingerprint",
    "from_files",
    "from_module",
    "leaf",
    "leaves",
    "merkle_root",
    "open_checkpoint",
    "prove",
    "root",
    "structure",
]

from deltahub.identity.checking import IdentityReport, Level, check
from deltahub.identity.checkpoints import Checkpoint, open_checkpoint
from deltahub.identity.declared import ALGORITHM, Declared, digest_bytes
from deltahub.identity.fingerprints import Identity, describe, fingerprint, from_files, from_module, leaves
from deltahub.identity.modules import checkpoint_names
from deltahub.identity.tree import Inclusion, entry, leaf, merkle_root, prove, root, structure
