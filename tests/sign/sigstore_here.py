"""A whole Sigstore on loopback: an issuer of identities, a certificate authority, a transparency log, and their roots.

The real client signs against it and verifies with its roots, so that everything but the public instance is tried.
What it signs with is made anew each time; nothing of it is worth anything elsewhere.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import http.server
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jwt
import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
SCTS = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def der(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def log_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(der(key.public_key())).digest()


class Sigstore:
    """The keys of the three services, and what each answers."""

    def __init__(self) -> None:
        self.authority, self.log, self.witness = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self.start = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
        self.requests: list[str] = []
        self.refuse: str = ""
        name = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, "here"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "here")]
        )
        self.name = name
        usage = dict.fromkeys(
            (
                *("content_commitment", "key_encipherment", "data_encipherment"),
                *("key_agreement", "encipher_only", "decipher_only"),
            ),
            False,
        )
        self.root = (
            self.builder(name, self.authority.public_key(), days=10)
            .subject_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **usage), critical=True
            )
            .sign(self.authority, hashes.SHA256())
        )
        self.usage = x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, **usage)

    def builder(self, issuer: x509.Name, key: Any, *, days: float) -> x509.CertificateBuilder:
        mine = self.authority.public_key()
        return (
            x509.CertificateBuilder()
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.start)
            .not_valid_after(self.start + dt.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(mine), critical=False)
        )

    def certificate(self, request: dict[str, Any], token: str) -> dict[str, Any]:
        """A certificate for whom the token names, as Fulcio gives it: with a promise of its log inside."""
        claims = jwt.decode(token, options={"verify_signature": False})
        asked = x509.load_pem_x509_csr(base64.b64decode(request["certificateSigningRequest"]))
        subject = str(claims["sub"])
        name = x509.RFC822Name(subject) if "@" in subject else x509.UniformResourceIdentifier(subject)
        base = (
            self.builder(self.name, asked.public_key(), days=2)
            .subject_name(x509.Name([]))
            .add_extension(self.usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(x509.UnrecognizedExtension(ISSUER, str(claims["iss"]).encode()), critical=False)
        )
        plain = base.sign(self.authority, hashes.SHA256()).tbs_certificate_bytes
        now = int(time.time() * 1000)
        entry = log_id(self.authority) + struct.pack("!I", len(plain))[1:] + plain
        signed = self.witness.sign(struct.pack("!BBQH", 0, 0, now, 1) + entry + b"\0\0", ec.ECDSA(hashes.SHA256()))
        promise = b"\0" + log_id(self.witness) + struct.pack("!QH", now, 0) + b"\x04\x03"
        promise += struct.pack("!H", len(signed)) + signed
        listed = struct.pack("!HH", len(promise) + 2, len(promise)) + promise
        octets = b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])) + listed
        final = base.add_extension(x509.UnrecognizedExtension(SCTS, octets), critical=False)
        leaf = final.sign(self.authority, hashes.SHA256())
        chain = [c.public_bytes(serialization.Encoding.PEM).decode() for c in (leaf, self.root)]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}

    def entry(self, proposed: dict[str, Any]) -> dict[str, Any]:
        """An entry of the log, as Rekor writes it: the body without the payload, a proof, a promise."""
        content = proposed["spec"]["proposedContent"]
        envelope = json.loads(content["envelope"])
        (signature,) = envelope["signatures"]
        payload = base64.b64decode(envelope["payload"])
        spec = {
            "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(content["envelope"].encode()).hexdigest()},
            "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()},
            "signatures": [{"signature": signature["sig"], "verifier": content["verifiers"][0]}],
        }
        body = rfc8785.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        root = hashlib.sha256(b"\0" + body).digest()  # a log of one entry
        note = f"here - 1\n1\n{b64(root)}\n"
        signed = log_id(self.log)[:4] + self.log.sign(note.encode(), ec.ECDSA(hashes.SHA256()))
        now, identity = int(time.time()), log_id(self.log).hex()
        promised = rfc8785.dumps({"body": b64(body), "integratedTime": now, "logID": identity, "logIndex": 0})
        proof = {
            "logIndex": 0,
            "rootHash": root.hex(),
            "treeSize": 1,
            "hashes": [],
            "checkpoint": f"{note}\n\u2014 here {b64(signed)}\n",
        }
        verification = {
            "inclusionProof": proof,
            "signedEntryTimestamp": b64(self.log.sign(promised, ec.ECDSA(hashes.SHA256()))),
        }
        entry = {
            "body": b64(body),
            "integratedTime": now,
            "logID": identity,
            "logIndex": 0,
            "verification": verification,
        }
        return {"0" * 64: entry}

    def token(self, subject: str, *, seconds: int = 600, issuer: str) -> str:
        now = int(time.time())
        claims = {"iss": issuer, "sub": subject, "aud": "sigstore", "iat": now, "exp": now + seconds}
        return jwt.encode(claims, "x" * 32, algorithm="HS256")

    def trusted_root(self, url: str) -> dict[str, Any]:
        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            public = {
                "rawBytes": b64(der(key.public_key())),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": {"start": self.start.isoformat()},
            }
            return {
                "baseUrl": url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": public,
                "logId": {"keyId": b64(log_id(key))},
            }

        chain = {"certificates": [{"rawBytes": b64(self.root.public_bytes(serialization.Encoding.DER))}]}
        authority = {
            "subject": {"organization": "here", "commonName": "here"},
            "uri": url,
            "certChain": chain,
            "validFor": {"start": self.start.isoformat()},
        }
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.log)],
            "certificateAuthorities": [authority],
            "ctlogs": [log(self.witness)],
        }

    def trust_config(self, url: str) -> dict[str, Any]:
        service = {"url": url, "majorApiVersion": 1, "validFor": {"start": self.start.isoformat()}, "operator": "here"}
        return {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": self.trusted_root(url),
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [service],
                "oidcUrls": [service],
                "rekorTlogUrls": [service],
                "tsaUrls": [],
                "rekorTlogConfig": {"selector": "ANY"},
            },
        }


@contextmanager
def serve_sigstore() -> Iterator[tuple[Sigstore, str]]:
    """The services, all at one address."""
    sigstore = Sigstore()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def answer(self, document: Any, status: int = 200) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            sigstore.requests.append(self.path)
            base = f"http://{self.headers['Host']}"
            self.answer({"issuer": base, "authorization_endpoint": f"{base}/auth", "token_endpoint": f"{base}/token"})

        def do_POST(self) -> None:
            sigstore.requests.append(self.path)
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if sigstore.refuse and sigstore.refuse in self.path:
                self.answer({"message": "not you"}, 403)
            elif self.path == "/api/v2/signingCert":
                self.answer(sigstore.certificate(asked, self.headers["Authorization"].removeprefix("Bearer ")))
            else:
                self.answer(sigstore.entry(asked), 201)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield sigstore, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
