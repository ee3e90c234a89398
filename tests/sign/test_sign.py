"""Signatures: our own round trip, every way in which one can be wrong, the policy, and the official package."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from deltahub.errors import SignatureError
from deltahub.hub import pull
from deltahub.sign import SIGNATURE_FILE, Policy, Signer, fingerprint, sign, verify_signature
from deltahub.testing import LoopbackHub

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

Maker = Callable[..., Path]
CURVES = [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()]


def make_key(folder: Path, name: str = "key", curve: ec.EllipticCurve = CURVES[0]) -> tuple[Path, bytes]:
    key = ec.generate_private_key(curve)
    path = folder / f"{name}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return path, public


def fails(code: str, call: Callable[[], object]) -> SignatureError:
    with pytest.raises(SignatureError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.fixture
def signed(tmp_path: Path, make_package: Maker) -> tuple[Path, Path, bytes]:
    """A signed package, the private key's file, and the public key."""
    folder = make_package(shards=2)
    (folder / "README.md").write_text("# card")
    key, public = make_key(tmp_path)
    sign(folder, key)
    return folder, key, public


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: str(curve.name))
def test_round_trip(tmp_path: Path, make_package: Maker, curve: ec.EllipticCurve) -> None:
    folder = make_package()
    key, public = make_key(tmp_path, curve=curve)
    made = sign(folder, key)
    found = verify_signature(folder, {"me": public})
    assert (found.signer, found.fingerprint, found.files) == ("me", fingerprint(public), made.files)
    assert set(found.files) == {"delta.json", "delta.safetensors"}
    sign(folder, key)  # again, over the old one
    assert verify_signature(folder, {"me": public}).files == made.files


def test_any_change_is_found(signed: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    folder, _, public = signed
    changes: dict[str, Callable[[Path], object]] = {
        "README.md altered": lambda f: (f / "README.md").write_text("# Card"),
        "extra.txt added": lambda f: (f / "extra.txt").write_text("x"),
        "delta-00001-of-00002.safetensors missing": lambda f: (f / "delta-00001-of-00002.safetensors").unlink(),
    }
    for what, change in changes.items():
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        change(copy)
        assert what in str(fails("E_SIGN_MISMATCH", lambda copy=copy: verify_signature(copy, {"me": public})))
        shutil.rmtree(copy)
    (folder / "link").symlink_to("README.md")
    fails("E_SIGN_FOLDER", lambda: verify_signature(folder, {"me": public}))


def bundle_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / SIGNATURE_FILE).read_text())
    return found


def test_altered_bundles(signed: tuple[Path, Path, bytes]) -> None:
    folder, _, public = signed
    good = bundle_of(folder)

    def attempt(code: str, change: Callable[[dict[str, Any]], object]) -> None:
        bundle = json.loads(json.dumps(good))
        raw = change(bundle)
        data = raw if isinstance(raw, bytes) else json.dumps(bundle).encode()
        (folder / SIGNATURE_FILE).write_bytes(data)
        fails(code, lambda: verify_signature(folder, {"me": public}))

    def payload(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
        def apply(bundle: dict[str, Any]) -> None:
            statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
            change(statement)
            bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

        return apply

    attempt("E_SIGN_UNTRUSTED", payload(lambda s: s["predicate"]["resources"].pop()))
    attempt("E_SIGN_UNTRUSTED", lambda b: b["dsseEnvelope"].update(payloadType="text/plain"))
    attempt("E_SIGN_UNTRUSTED", lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="AAAA"))
    attempt("E_SIGN_BUNDLE", lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="not base64!"))
    attempt("E_SIGN_BUNDLE", lambda b: b["dsseEnvelope"].update(payload="%%%%"))
    attempt("E_SIGN_BUNDLE", lambda b: b["dsseEnvelope"]["signatures"].append({}))
    attempt("E_SIGN_BUNDLE", lambda b: b["dsseEnvelope"].update(signatures=[]))
    attempt("E_SIGN_BUNDLE", lambda b: b.update(verificationMaterial={"certificate": {}}))
    attempt("E_SIGN_BUNDLE", lambda b: b"[" * 100_000)
    attempt("E_SIGN_BUNDLE", lambda b: b'{"dsseEnvelope": 1, "dsseEnvelope": 2}')
    attempt("E_SIGN_BUNDLE", lambda b: b" " * (2 << 20))
    (folder / SIGNATURE_FILE).unlink()
    fails("E_SIGN_MISSING", lambda: verify_signature(folder, {"me": public}))


def test_keys(signed: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    folder, key, public = signed
    _, other = make_key(tmp_path, "other")
    _, longer = make_key(tmp_path, "longer", CURVES[1])
    fails("E_SIGN_UNTRUSTED", lambda: verify_signature(folder, {"other": other, "longer": longer}))
    fails("E_SIGN_UNTRUSTED", lambda: verify_signature(folder, {}))
    assert verify_signature(folder, {"other": other, "me": public}).signer == "me"
    fails("E_SIGN_KEY", lambda: verify_signature(folder, {"me": b"junk"}))
    numbers = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "rsa.pem").write_bytes(numbers)
    fails("E_SIGN_KEY", lambda: sign(folder, tmp_path / "rsa.pem"))
    make_key(tmp_path, "koblitz", ec.SECP256K1())
    fails("E_SIGN_KEY", lambda: sign(folder, tmp_path / "koblitz.pem"))
    fails("E_SIGN_KEY", lambda: sign(folder, tmp_path / "none.pem"))
    locked = serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )
    (tmp_path / "locked.pem").write_bytes(locked)
    fails("E_SIGN_KEY", lambda: sign(folder, tmp_path / "locked.pem"))
    fails("E_SIGN_KEY", lambda: sign(folder, tmp_path / "locked.pem", password=b"wrong"))
    sign(folder, tmp_path / "locked.pem", password=b"secret")
    verify_signature(folder, {"me": public})


def test_only_whole_packages_are_signed(tmp_path: Path, make_package: Maker) -> None:
    folder = make_package()
    key, _ = make_key(tmp_path)
    (folder / "delta.safetensors").write_bytes(b"")
    fails("E_SIGN_FOLDER", lambda: sign(folder, key))
    (folder / "delta.json").unlink()
    fails("E_SIGN_FOLDER", lambda: sign(folder, key))
    assert not (folder / SIGNATURE_FILE).exists()


# ---- policy


def test_policy_files(tmp_path: Path) -> None:
    _, public = make_key(tmp_path, "acme")
    path = tmp_path / "trust.toml"
    path.write_text(
        'require = ["acme"]\n[[signers]]\nname = "Acme"\nkey = "acme.pub"\nnamespaces = ["acme"]\n'
        f'[[signers]]\nname = "Anybody"\nkey = """{public.decode()}"""\n'
    )
    policy = Policy.read(path)
    assert [(s.name, s.key, s.namespaces) for s in policy.signers] == [
        ("Acme", public, ("acme",)),
        ("Anybody", public, ("*",)),
    ]
    assert policy.demands("acme/delta")
    assert not policy.demands("acme2/delta")
    assert not policy.demands("")
    assert Policy(require=("*",)).demands("")
    for bad in ("require = 1", "other = 1", "[[signers]]\nname='x'", "[[signers]]\nname='x'\nkey='none.pub'", "["):
        path.write_text(bad)
        fails("E_SIGN_POLICY", lambda: Policy.read(path))
    fails("E_SIGN_POLICY", lambda: Policy.read(tmp_path / "none"))


def test_pull_under_a_policy(
    hub: LoopbackHub, cache: Path, tmp_path: Path, signed: tuple[Path, Path, bytes], make_package: Maker
) -> None:
    folder, key, public = signed
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    hub.create("acme/delta", files)
    options: dict[str, Any] = {"endpoint": hub.url, "token": hub.token, "cache_dir": cache}
    strict = Policy(signers=(Signer(name="Acme", key=public, namespaces=("acme",)),), require=("*",))
    found = pull("acme/delta", policy=strict, **options)
    assert found.signature is not None
    assert found.signature.signer == "Acme"
    assert pull("acme/delta", **options).signature is None  # nobody asked
    assert not (found.path / "README.md").exists()

    # Signed by somebody who may not sign for this namespace; not signed; signed for another package.
    hub.create("other/delta", files)
    fails("E_SIGN_UNTRUSTED", lambda: pull("other/delta", policy=strict, **options))
    lenient = Policy(signers=strict.signers)
    assert pull("other/delta", policy=lenient, **options).signature is None
    hub.commit("acme/delta", {SIGNATURE_FILE: None})
    assert pull("acme/delta", policy=lenient, **options).signature is None
    hub.log.clear()
    fails("E_SIGN_MISSING", lambda: pull("acme/delta", policy=strict, **options))
    assert not [call for call in hub.log if "safetensors" in call.path]  # refused before the tensors come
    other = make_package("other", seed=5)
    sign(other, key)
    hub.commit("acme/delta", {SIGNATURE_FILE: (other / SIGNATURE_FILE).read_bytes()})
    fails("E_SIGN_MISMATCH", lambda: pull("acme/delta", policy=lenient, **options))

    assert pull(folder, policy=Policy(signers=(Signer(name="A", key=public),), require=("*",))).signature is not None
    fails("E_SIGN_MISSING", lambda: pull(make_package("unsigned"), policy=strict))


def test_the_report_says_who_signed(tmp_path: Path) -> None:
    import torch

    import deltahub

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).eval()

    for tensor in deltahub.attach(made := model(), "lora", "0", rank=1).parameters():
        torch.nn.init.normal_(tensor)
    deltahub.save(made, tmp_path / "delta")
    key, public = make_key(tmp_path)

    def told(policy: Policy | None) -> str:
        loaded = deltahub.load(tmp_path / "delta", backbone=model(), policy=policy)
        (delta,) = deltahub.deltas(loaded).values()
        return str(delta.report)

    trusted = Policy(signers=(Signer(name="Acme", key=public),))
    assert "unsigned, which the policy allows" in told(trusted)
    fails("E_SIGN_MISSING", lambda: told(Policy(signers=trusted.signers, require=("*",))))
    sign(tmp_path / "delta", key)
    assert f"signed by Acme, key {fingerprint(public)[:16]}" in told(trusted)
    assert "signed" not in told(None)


# ---- the official package


@pytest.mark.skipif(find_spec("model_signing") is None, reason="model-signing is not installed")
@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: str(curve.name))
def test_the_official_package_verifies_ours_and_we_verify_its(
    tmp_path: Path, make_package: Maker, curve: ec.EllipticCurve
) -> None:
    folder = make_package()
    key, public = make_key(tmp_path, curve=curve)
    ignored = str(folder / SIGNATURE_FILE)

    def official(verb: str, *options: str) -> None:
        command = [sys.executable, "-m", "model_signing", verb, "key", str(folder), "--signature", ignored, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    sign(folder, key)
    official("verify", "--public_key", str(tmp_path / "key.pub"))
    (folder / SIGNATURE_FILE).unlink()
    official("sign", "--private_key", str(key))
    assert set(verify_signature(folder, {"me": public}).files) == {"delta.json", "delta.safetensors"}
