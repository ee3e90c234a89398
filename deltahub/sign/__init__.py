"""Signatures over packages: OpenSSF Model Signing v1.0 bundles, made with a key or with an identity.

With a key they are written and read with ``cryptography`` alone, offline; the official ``model-signing`` package
verifies ours, and we verify what it writes. Where that package is installed, an identity that Sigstore certifies
signs as well. One signature binds the delta to its backbone, since it covers ``delta.json``, which holds the
backbone's roots.

What a *valid* signature is worth is for the caller to say, in a :class:`Policy`.
"""

from __future__ import annotations

__all__ = ["SIGNATURE_FILE", "Policy", "Signature", "Signer", "fingerprint", "sign", "sign_keyless", "verify_signature"]

from deltahub.sign.bundles import SIGNATURE_FILE, Signature, sign, verify_signature
from deltahub.sign.keyless import sign_keyless
from deltahub.sign.keys import fingerprint
from deltahub.sign.policy import Policy, Signer
