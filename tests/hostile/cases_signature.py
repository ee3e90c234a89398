"""55 and 56: signatures, and the model card."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import deltahub
from deltahub.sign import SIGNATURE_FILE, Policy, Signer, sign, verify_signature
from tests.hostile.corpus import ACCEPTED, Room, case, cases
from tests.sign.test_sign import make_key

Change = Callable[[dict[str, Any]], object]


def _signed(room: Room, name: str = "key") -> Policy:
    """Sign the package; gives the policy that demands this signature."""
    key, public = make_key(room.folder, name)
    sign(room.package, key)
    return Policy(signers=(Signer(name="Acme", key=public),), require=("*",))


def _public(policy: Policy) -> dict[str, bytes]:
    return {signer.name: signer.key for signer in policy.signers}


def _both(room: Room, policy: Policy) -> Any:
    """By the policy while loading, and by hand."""
    return [*room.refuse(policy=policy), lambda: verify_signature(room.package, _public(policy))]


@case(55, "over another package", "E_SIGN_MISMATCH")
def _(room: Room) -> Any:
    policy = _signed(room)
    room.config(scale=3.0)
    return _both(room, policy)


@case(55, "over another package, from a Hub", "E_SIGN_MISMATCH")
def _(room: Room) -> Any:
    policy = _signed(room)
    room.config(scale=3.0)
    return room.from_hub(room.hub(), policy=policy)


@case(55, "extra file that is not signed", "E_SIGN_MISMATCH")
def _(room: Room) -> Any:
    policy = _signed(room)
    (room.package / "extra.safetensors").write_bytes(b"x")
    return lambda: verify_signature(room.package, _public(policy))


@case(55, "wrong key", "E_SIGN_UNTRUSTED")
def _(room: Room) -> Any:
    _signed(room, "other")
    _, public = make_key(room.folder)
    return _both(room, Policy(signers=(Signer(name="Acme", key=public),), require=("*",)))


@case(55, "key for another namespace", "E_SIGN_UNTRUSTED")
def _(room: Room) -> Any:
    policy = _signed(room)
    elsewhere = Signer(name="Acme", key=policy.signers[0].key, namespaces=("elsewhere",))
    return room.refuse(policy=Policy(signers=(elsewhere,), require=("*",)))


@case(55, "not signed", "E_SIGN_MISSING")
def _(room: Room) -> Any:
    _, public = make_key(room.folder)
    return _both(room, Policy(signers=(Signer(name="Acme", key=public),), require=("*",)))


def _payload(change: Change) -> Change:
    def apply(bundle: dict[str, Any]) -> None:
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        change(statement)
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    return apply


def _envelope(**members: object) -> Change:
    return lambda bundle: bundle["dsseEnvelope"].update(members)


def _signature(**members: object) -> Change:
    return lambda bundle: bundle["dsseEnvelope"]["signatures"][0].update(members)


def _weaker(statement: dict[str, Any]) -> None:
    for resource in statement["predicate"]["resources"]:
        resource["algorithm"] = "md5"


BUNDLES: dict[str, tuple[object, str]] = {
    "algorithm swapped": (_payload(_weaker), "E_SIGN_UNTRUSTED"),
    "file taken out": (_payload(lambda s: s["predicate"]["resources"].pop()), "E_SIGN_UNTRUSTED"),
    "payload type changed": (_envelope(payloadType="text/plain"), "E_SIGN_UNTRUSTED"),
    "signature of zeros": (_signature(sig="AAAA"), "E_SIGN_UNTRUSTED"),
    "signature that is no base64": (_signature(sig="not base64!"), "E_SIGN_BUNDLE"),
    "signature that is null": (_signature(sig=None), "E_SIGN_BUNDLE"),
    "payload that is no base64": (_envelope(payload="%%%%"), "E_SIGN_BUNDLE"),
    "payload that is a number": (_envelope(payload=1), "E_SIGN_BUNDLE"),
    "payload outside ASCII": (_envelope(payload="\u00e9\u00e9\u00e9\u00e9"), "E_SIGN_BUNDLE"),
    "no signatures": (_envelope(signatures=[]), "E_SIGN_BUNDLE"),
    "two signatures": (lambda b: b["dsseEnvelope"]["signatures"].append({}), "E_SIGN_BUNDLE"),
    "certificate": (lambda b: b.update(verificationMaterial={"certificate": {}}), "E_SIGN_BUNDLE"),
    "material that is a string": (lambda b: b.update(verificationMaterial="publicKey"), "E_SIGN_BUNDLE"),
    "nested deeply": (lambda b: b"[" * 100_000, "E_SIGN_BUNDLE"),
    "5,000 digits": (lambda b: b'{"a": ' + b"9" * 5000 + b"}", "E_SIGN_BUNDLE"),
    "member twice": (lambda b: b'{"dsseEnvelope": 1, "dsseEnvelope": 2}', "E_SIGN_BUNDLE"),
    "array": (lambda b: b"[]", "E_SIGN_BUNDLE"),
    "bad UTF-8": (lambda b: b'{"\xff": 1}', "E_SIGN_BUNDLE"),
    "empty": (lambda b: b"", "E_SIGN_BUNDLE"),
}


@cases(55, {f"bundle, {name}": given for name, given in BUNDLES.items()})
def _(room: Room, change: Change) -> Any:
    policy = _signed(room)
    path = room.package / SIGNATURE_FILE
    bundle = json.loads(path.read_text())
    raw = change(bundle)
    path.write_bytes(raw if isinstance(raw, bytes) else json.dumps(bundle).encode())
    return _both(room, policy)


STATEMENTS: dict[str, tuple[Change, str]] = {
    "other predicate": (lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), "E_SIGN_BUNDLE"),
    "algorithm md5": (_weaker, "E_SIGN_BUNDLE"),
    "subject of another sum": (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "E_SIGN_BUNDLE"),
    "no resources": (lambda s: s["predicate"].update(resources=[]), "E_SIGN_BUNDLE"),
    "resources that are numbers": (lambda s: s["predicate"].update(resources=[1]), "E_SIGN_BUNDLE"),
    "digest that is a list": (lambda s: s["predicate"]["resources"][0].update(digest=[]), "E_SIGN_BUNDLE"),
    "name that is a list": (lambda s: s["predicate"]["resources"][0].update(name=[]), "E_SIGN_BUNDLE"),
}


@cases(55, {f"statement that is validly signed, {name}": given for name, given in STATEMENTS.items()})
def _(room: Room, change: Change) -> Any:
    """Not even the right key makes it one over this package."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from deltahub.sign import bundles

    policy = _signed(room)
    key = serialization.load_pem_private_key((room.folder / "key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    path = room.package / SIGNATURE_FILE
    bundle = json.loads(path.read_text())
    _payload(change)(bundle)
    envelope = bundle["dsseEnvelope"]
    body = base64.b64decode(envelope["payload"])
    message = bundles._pre_authentication(envelope["payloadType"], body)
    envelope["signatures"][0]["sig"] = base64.b64encode(key.sign(message, ec.ECDSA(hashes.SHA256()))).decode()
    path.write_text(json.dumps(bundle))
    return _both(room, policy)


@case(55, "bundle of 10 MB", "E_SIGN_BUNDLE")
def _(room: Room) -> Any:
    policy = _signed(room)
    (room.package / SIGNATURE_FILE).write_bytes(b" " * (10 << 20))
    return lambda: verify_signature(room.package, _public(policy))


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)
CARDS: dict[str, tuple[object, str]] = {
    "Python tag": ("---\nx: !!python/object/apply:os.system ['touch pwned']\n---\n", "E_HUB_CARD"),
    "Python name": ("---\nx: !!python/name:os.system\n---\n", "E_HUB_CARD"),
    "aliases that multiply": (f"---\n{LAUGHS}---\n", "E_HUB_CARD"),
    "10 MB": ("---\na: b\n---\n" + "x" * (10 << 20), "E_HUB_CARD"),
    "10 MB of metadata": ("---\n" + "k: v\n" * (2 << 20) + "---\n", "E_HUB_CARD"),
    "nested deeply": ("---\nx: " + "[" * 100_000 + "\n---\n", "E_HUB_CARD"),
    "list": ("---\n- a\n---\n", "E_HUB_CARD"),
    "bad UTF-8": (b"---\na: \xff\n---\n", "E_HUB_CARD"),
}


def _card(content: object) -> bytes:
    return content if isinstance(content, bytes) else str(content).encode()


@cases(56, {f"card, {name}": given for name, given in CARDS.items()})
def _(room: Room, card: object) -> Any:
    """The card matters when a package is pushed: it is read then, here and in the repository."""
    hub = room.hub()
    (room.package / "README.md").write_bytes(_card(card))
    return lambda: deltahub.push(room.package, "acme/other", endpoint=hub.url, token=hub.token)


@cases(56, {f"card in the repository, {name}": given for name, given in CARDS.items() if "10 MB" not in name})
def _(room: Room, card: object) -> Any:
    hub = room.hub()
    hub.commit("acme/delta", {"README.md": _card(card)})
    room.config(scale=3.0)
    return lambda: deltahub.push(room.package, "acme/delta", endpoint=hub.url, token=hub.token)


@case(56, "card in the repository, 10 MB", "E_HUB_TOO_LARGE")
def _(room: Room) -> Any:
    hub = room.hub()
    hub.commit("acme/delta", {"README.md": _card(CARDS["10 MB"][0])})
    room.config(scale=3.0)
    return lambda: deltahub.push(room.package, "acme/delta", endpoint=hub.url, token=hub.token)


@case(56, "cards are never opened by loading", ACCEPTED)
def _(room: Room) -> Any:
    from tests.hostile.cases_package import ignored

    (room.package / "README.md").write_text(f"---\n{LAUGHS}---\n<script>alert(1)</script>{{{{ 7 * 7 }}}}")
    (room.package / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    return lambda: ignored(room, {"README.md", "chat_template.jinja"})


@case(56, "markup and templates in a card stay text", ACCEPTED)
def _(room: Room) -> Any:
    hub = room.hub()
    mine = "<script>alert(1)</script> {{ 7 * 7 }} {% for x in range(10**9) %}x{% endfor %}"
    (room.package / "README.md").write_text(mine)

    def act() -> None:
        deltahub.push(room.package, "acme/other", endpoint=hub.url, token=hub.token)
        assert mine in hub.read("acme/other", "README.md").decode()

    return act
