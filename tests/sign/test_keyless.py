"""Signatures by an identity: the real client against a Sigstore on loopback, both ways with the official package."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deltahub.cli import app
from deltahub.errors import SignatureError
from deltahub.hub import pull
from deltahub.sign import SIGNATURE_FILE, Policy, Signer, sign, sign_keyless
from deltahub.sign.keyless import has_certificate, open_keyless
from deltahub.testing import LoopbackHub

pytest.importorskip("model_signing")
pytest.importorskip("OpenSSL")
from tests.sign.sigstore_here import Sigstore, serve_sigstore
from tests.sign.test_sign import fails, make_key

Maker = Callable[..., Path]
ME, ISSUER = "me@example.org", "https://accounts.example.org"


@pytest.fixture(scope="module")
def here() -> Iterator[tuple[Sigstore, str]]:
    with serve_sigstore() as running:
        yield running


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sigstore's client notes down the public roots that it came with."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))


@pytest.fixture
def config(here: tuple[Sigstore, str], tmp_path: Path) -> Path:
    """Where the loopback Sigstore is and what its roots are, as the official tools take it."""
    sigstore, url = here
    sigstore.refuse = ""
    sigstore.requests.clear()
    path = tmp_path / "sigstore.json"
    path.write_text(json.dumps(sigstore.trust_config(url)))
    return path


def signer(config: Path, **more: Any) -> Signer:
    return Signer(**{"name": "Me", "identity": ME, "issuer": ISSUER, "trust_root": config.read_bytes(), **more})


@pytest.fixture
def signed(here: tuple[Sigstore, str], config: Path, make_package: Maker) -> Path:
    folder = make_package(shards=2)
    (folder / "README.md").write_text("# card")
    made = sign_keyless(folder, identity_token=here[0].token(ME, issuer=ISSUER), trust_config=config)
    assert made.signer == ME
    assert set(made.files) == {p.name for p in folder.iterdir()} - {SIGNATURE_FILE}
    return folder


def test_an_identity_signs_and_is_checked_without_a_request(
    here: tuple[Sigstore, str], signed: Path, config: Path, tmp_path: Path
) -> None:
    assert here[0].requests == ["/.well-known/openid-configuration", "/api/v2/signingCert", "/api/v1/log/entries"]
    here[0].requests.clear()
    strict = Policy(signers=(signer(config),), require=("*",))
    found = pull(signed, policy=strict)
    assert found.signature is not None
    assert (found.signature.signer, len(found.signature.fingerprint)) == ("Me", 64)
    roots = json.dumps(json.loads(config.read_text())["trustedRoot"]).encode()  # the roots alone will do as well
    assert pull(signed, policy=Policy(signers=(signer(config, trust_root=roots),))).signature == found.signature
    assert here[0].requests == []

    # From a policy's file; and a key beside it counts as before.
    key, _ = make_key(tmp_path, "release")
    (tmp_path / "trust.toml").write_text(
        f'require = ["*"]\n[[signers]]\nname = "Me"\nidentity = "{ME}"\nissuer = "{ISSUER}"\n'
        'trust_root = "sigstore.json"\n[[signers]]\nname = "Release"\nkey = "release.pub"\n'
    )
    policy = Policy.read(tmp_path / "trust.toml")
    assert pull(signed, policy=policy).signature == found.signature
    sign(signed, key)
    again = pull(signed, policy=policy).signature
    assert again is not None
    assert again.signer == "Release"


@pytest.mark.parametrize(
    "other", [{"identity": "you@example.org"}, {"issuer": "https://elsewhere.example.org"}, {"trust_root": None}]
)
def test_another_identity_issuer_or_sigstore(signed: Path, config: Path, other: dict[str, Any]) -> None:
    """Without roots of its own the policy means the public Sigstore, whose roots came with the library."""
    policy = Policy(signers=(signer(config, **other),))
    error = fails("E_SIGN_UNTRUSTED", lambda: pull(signed, policy=policy, local_files_only=True))
    assert f"{ME} by {ISSUER}" in str(error)


def test_what_was_altered(signed: Path, config: Path, make_package: Maker) -> None:
    policy = Policy(signers=(signer(config),))
    path = signed / SIGNATURE_FILE
    good = path.read_bytes()

    def attempt(code: str, change: Callable[[dict[str, Any]], object]) -> None:
        bundle = json.loads(good)
        change(bundle)
        path.write_text(json.dumps(bundle))
        fails(code, lambda: pull(signed, policy=policy))

    other = json.loads(base64.b64decode(json.loads(good)["dsseEnvelope"]["payload"]))
    other["predicate"]["resources"].pop()
    swapped = base64.b64encode(json.dumps(other).encode()).decode()
    attempt("E_SIGN_UNTRUSTED", lambda b: b["dsseEnvelope"].update(payload=swapped))
    attempt("E_SIGN_UNTRUSTED", lambda b: b["dsseEnvelope"].update(payloadType="text/plain"))
    attempt("E_SIGN_UNTRUSTED", lambda b: b["verificationMaterial"]["tlogEntries"][0].update(integratedTime="1"))
    attempt("E_SIGN_BUNDLE", lambda b: b["verificationMaterial"].update(tlogEntries=[]))
    attempt("E_SIGN_BUNDLE", lambda b: b["verificationMaterial"].update(certificate={}))
    attempt("E_SIGN_BUNDLE", lambda b: b.update(mediaType="other"))
    key = Signer(name="Key", key=b"-----BEGIN")
    path.write_bytes(good)
    fails("E_SIGN_BUNDLE", lambda: pull(signed, policy=Policy(signers=(key,))))  # nobody here is known by identity
    second = make_package("second", seed=3)
    (second / SIGNATURE_FILE).write_bytes(good)
    fails("E_SIGN_MISMATCH", lambda: pull(second, policy=policy))
    for junk in (b"", b"[]", b'{"verificationMaterial": 1}', b"[" * 100_000):
        assert not has_certificate(junk)
        fails("E_SIGN_BUNDLE", lambda junk=junk: open_keyless(junk, [], "here"))


def test_by_namespace_on_a_hub(hub: LoopbackHub, cache: Path, signed: Path, config: Path) -> None:
    files = {p.name: p.read_bytes() for p in signed.iterdir()}
    for name in ("acme/delta", "other/delta"):
        hub.create(name, files)
    policy = Policy(signers=(signer(config, namespaces=("acme",)),), require=("*",))
    options: dict[str, Any] = {"endpoint": hub.url, "token": hub.token, "cache_dir": cache, "policy": policy}
    found = pull("acme/delta", **options)
    assert found.signature is not None
    assert pull(f"acme/delta@{found.commit}", local_files_only=True, **options).signature == found.signature
    fails("E_SIGN_BUNDLE", lambda: pull("other/delta", **options))


def test_what_sigstore_refuses(here: tuple[Sigstore, str], config: Path, make_package: Maker) -> None:
    sigstore, _ = here
    folder = make_package()
    good = sigstore.token(ME, issuer=ISSUER)

    def attempt(token: str) -> SignatureError:
        return fails("E_SIGN_IDENTITY", lambda: sign_keyless(folder, identity_token=token, trust_config=config))

    attempt("junk")
    attempt(sigstore.token(ME, issuer=ISSUER, seconds=-60))
    for refuse in ("signingCert", "entries"):
        sigstore.refuse = refuse
        attempt(good)
    sigstore.refuse = ""
    config.write_text("{}")
    attempt(good)
    assert not (folder / SIGNATURE_FILE).exists()
    (folder / "delta.safetensors").write_bytes(b"")
    fails("E_SIGN_FOLDER", lambda: sign_keyless(folder, identity_token=good, trust_config=config))


def test_roots_that_cannot_be_had(signed: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sigstore.errors import TUFError
    from sigstore.models import ClientTrustConfig

    def lost(offline: bool = False) -> None:
        raise TUFError(f"no network, offline {offline}")

    monkeypatch.setattr(ClientTrustConfig, "production", lost)
    policy = Policy(signers=(signer(config, trust_root=None),))
    assert "offline False" in str(fails("E_SIGN_ROOTS", lambda: pull(signed, policy=policy)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline True" in str(fails("E_SIGN_ROOTS", lambda: pull(signed, policy=policy)))
    fails("E_SIGN_ROOTS", lambda: pull(signed, policy=Policy(signers=(signer(config, trust_root=b"{}"),))))


def test_without_the_library(make_package: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltahub.sign.keyless.find_spec", lambda name: None)
    assert "deltahub[keyless]" in str(fails("E_SIGN_LIBRARY", lambda: sign_keyless(make_package())))
    fails("E_SIGN_LIBRARY", lambda: open_keyless(b"", [], "here"))


@pytest.mark.parametrize("given", [{}, {"identity": ME}, {"issuer": ISSUER}, {"key": b"x", "identity": ME}])
def test_a_signer_is_one_or_the_other(given: dict[str, Any]) -> None:
    fails("E_SIGN_POLICY", lambda: Signer(name="x", **given))


@pytest.mark.slow
def test_the_official_package_both_ways(
    here: tuple[Sigstore, str], signed: Path, config: Path, make_package: Maker
) -> None:
    def official(folder: Path, verb: str, *options: str) -> None:
        command = [sys.executable, "-m", "model_signing", verb, "sigstore", str(folder), "--signature"]
        command += [str(folder / SIGNATURE_FILE), "--trust_config", str(config), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    official(signed, "verify", "--identity", ME, "--identity_provider", ISSUER)
    theirs = make_package("theirs", seed=4)
    official(theirs, "sign", "--identity_token", here[0].token(ME, issuer=ISSUER))
    found = pull(theirs, policy=Policy(signers=(signer(config),), require=("*",)))
    assert found.signature is not None
    assert found.signature.signer == "Me"


def test_on_the_command_line(
    here: tuple[Sigstore, str], config: Path, make_package: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_package()

    def run(*args: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, result.output
        return result

    assert "one of the two" in run("sign", folder, code=2).stderr
    monkeypatch.setenv("SIGSTORE_IDENTITY_TOKEN", here[0].token("https://acme.example/release.yml", issuer=ISSUER))
    said = run("sign", folder, "--keyless", "--trust-config", config).stdout
    assert said.startswith("2 file(s) signed as https://acme.example/release.yml\n")
    (tmp_path / "trust.toml").write_text(
        '[[signers]]\nname = "Release"\nidentity = "https://acme.example/release.yml"\n'
        f'issuer = "{ISSUER}"\ntrust_root = "sigstore.json"\n'
    )
    demands = ("--policy", tmp_path / "trust.toml", "--require-signature")
    assert json.loads(run("pull", folder, *demands, "--json").stdout)["signer"] == "Release"
