"""The command line: what it prints, as text and as JSON, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import deltahub
from deltahub.cli import app
from deltahub.testing import LoopbackHub

Maker = Callable[..., Path]
VERBS = (
    *("kinds", "inspect", "verify", "fingerprint", "pull", "push", "search"),
    *("lock", "card", "sign", "doctor"),
)


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def run_json(*args: object, code: int = 0) -> Any:
    return json.loads(run(*args, "--json", code=code).stdout)


def test_help_lists_the_verbs() -> None:
    output = run("--help").stdout
    assert all(verb in output for verb in VERBS)
    for verb in VERBS:
        assert "--json" in run(verb, "--help").stdout


def test_every_verb_speaks_json() -> None:
    from typer.main import get_command

    def verbs(command: Any, path: tuple[str, ...] = ()) -> Any:
        for name, inside in getattr(command, "commands", {}).items():
            if hasattr(inside, "commands"):
                yield from verbs(inside, (*path, name))
            else:
                yield " ".join((*path, name)), {option for given in inside.params for option in given.opts}

    found = dict(verbs(get_command(app)))
    assert len(found) >= 20
    assert [verb for verb, options in found.items() if "--json" not in options] == []


def test_the_demonstration_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    import deltahub.demo

    for code in (0, 1):
        monkeypatch.setattr(deltahub.demo, "run", lambda *, code=code, **_: code)
        assert run_json("demo", code=code)["passed"] is (code == 0)


def test_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shell asks for while somebody types."""
    # The shell is named: which one runs the tests, if any, is not for them to say.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    for shell in ("bash", "zsh", "fish"):
        script = run("--show-completion", shell).stdout
        assert "_COMPLETE" in script, shell
    env = {"_DELTAHUB_COMPLETE": "complete_bash", "COMP_WORDS": "deltahub ki", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], prog_name="deltahub", env=env)
    assert "kinds" in result.stdout


def test_version() -> None:
    assert run("--version").stdout == f"{deltahub.__version__}\n"


def test_nothing_asked() -> None:
    assert "Usage" in run(code=2).output


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["kindz"], "Did you mean 'kinds'?"),
        (["pull", "--revisoin", "x", "y"], "--revision"),
        (["pull"], "Missing argument"),
        (["search", "--limit", "0"], "greater than or equal to 1"),
    ],
)
def test_usage_errors(args: list[str], says: str) -> None:
    result = run(*args, code=2)
    assert says in result.stderr
    assert result.stdout == ""


def test_kinds() -> None:
    assert {"lora", "bias", "assign", "adapter", "diff"} <= {
        line.split()[0] for line in run("kinds").stdout.splitlines()
    }
    listed = {entry["kind"]: entry for entry in run_json("kinds")}
    assert listed["lora"]["reference"] == "arXiv:2106.09685"
    assert run_json("kinds", "lora")["kind"] == "lora"
    page = run("kinds", "lora").stdout
    assert page.startswith("lora@1  Low-rank update of a linear map\n")
    for line in (
        "  hosts  linear, conv, embedding",
        "  weight  W + scale * up @ down",
        "  bias    b + scale * bias   where biased = true",
        "  down  [rank, in, *kernel]  starts as zeros, else kaiming_uniform",
        "  rank    integer  at least 1; at most 65536; must be given",
    ):
        assert line in page.splitlines(), line
    assert "opendelta  LoraModel" in page
    assert listed["lora"]["also"]["peft"].startswith("LoRA")


def test_every_kind_has_a_page() -> None:
    from deltahub import kinds

    for name in kinds.names():
        page = run("kinds", name).stdout
        assert all(part in page for part in ("\n  hosts  ", "\nequations\n")), name
    import tomllib

    also = tomllib.loads((Path(__file__).parents[1] / "spec" / "also.toml").read_text(encoding="utf-8"))
    assert set(also) <= set(kinds.names())
    assert "others call miss so" in run("kinds", "MiSSConfig", code=1).stderr
    assert "others call adapter so" in run("kinds", "houlsby", code=1).stderr


def test_an_error_is_text_and_no_traceback() -> None:
    result = run("kinds", "loar", code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("[E_KIND_UNKNOWN]")
    assert "Traceback" not in result.stderr


def test_an_error_as_json() -> None:
    error = run_json("kinds", "loar", code=1)["error"]
    assert error["code"] == "E_KIND_UNKNOWN"
    assert set(error) == {"code", "what", "where", "expected", "found", "hint", "also"}


def test_inspect(make_package: Maker) -> None:
    folder = make_package(rank=4, size=8)
    found = run_json("inspect", folder)
    assert found["backbone"]["source"]["hub"] == "org/base"
    assert found["parameters"] == 2 * (4 * 8 + 8 * 4)
    assert found["modules"] == [
        {
            "name": "attention",
            "kind": "lora",
            "version": 1,
            "brought": False,
            "config": {"rank": 4, "scale": 2.0},
            "targets": ["layer.{0..1}.query"],
            "sites": 2,
            "parameters": 128,
            "size": 512,
            "part": {},
        }
    ]
    lines = run("inspect", folder).stdout.splitlines()
    assert "backbone    org/base@000000000000 transformers.BertModel" in lines
    assert "attention  lora@1  2      128         layer.{0..1}.query" in lines
    assert lines[-1] == "        └── query  ← attention lora@1 rank=4 scale=2.0 down [4, 8], up [8, 4] 64"
    assert deltahub.inspect(folder).parameters == 128


def test_inspect_shows_settings_and_own_kinds(make_package: Maker) -> None:
    folder = make_package()
    path = folder / "delta.json"
    manifest = json.loads(path.read_text())
    lora = run_json("kinds", "bias")
    manifest["kinds"] = [lora | {"kind": "com.example.mine"}]
    manifest["modules"][0] |= {"kind": "com.example.mine", "config": {}}
    manifest["settings"] = [{"on": "config", "path": "num_labels", "was": 2, "value": 3}]
    path.write_text(json.dumps(manifest))
    output = run("inspect", folder).stdout
    assert "own kinds   com.example.mine@1 (data in the package; no code)" in output
    assert "setting     config.num_labels: 2 becomes 3" in output


def test_names_are_escaped(make_package: Maker) -> None:
    """A package cannot steer the terminal."""
    folder = make_package()
    path = folder / "delta.json"
    manifest = json.loads(path.read_text())
    manifest["settings"] = [{"on": "config", "path": "problem_type", "was": "\x1b[2J", "value": "\u202ex"}]
    path.write_text(json.dumps(manifest))
    output = run("inspect", folder).stdout
    assert "\x1b" not in output
    assert "\u202e" not in output


def test_missing_package(tmp_path: Path) -> None:
    error = run_json("inspect", tmp_path, code=1)["error"]
    assert error["code"].startswith("E_HUB_")


def test_push_pull_search(make_package: Maker, hub: LoopbackHub, cache: Path) -> None:
    folder = make_package()
    to = ("--endpoint", hub.url, "--token", hub.token)
    pushed = run_json("push", folder, "tester/delta", "--message", "first", *to)
    assert pushed["repo_id"] == "tester/delta"
    assert "delta.json" in pushed["changed"]
    assert "no commit was made" in run("push", folder, "tester/delta", *to).stdout
    source = f"tester/delta@{pushed['commit']}"
    pulled = run_json("pull", source, "--cache-dir", cache, *to)
    assert pulled["commit"] == pushed["commit"]
    assert Path(pulled["path"], "delta.safetensors").read_bytes() == (folder / "delta.safetensors").read_bytes()
    assert pulled["commit"] in run("pull", source, "--cache-dir", cache, "--offline", *to).stdout
    assert run_json("inspect", "tester/delta", "--cache-dir", cache, *to)["commit"] == pushed["commit"]
    assert [hit["repo_id"] for hit in run_json("search", *to)] == ["tester/delta"]
    assert "tester/delta" in run("search", "--kind", "lora", *to).stdout
    assert run_json("pull", "tester/none", "--cache-dir", cache, *to, code=1)["error"]["code"].startswith("E_HUB_")


def test_fingerprint(tmp_path: Path) -> None:
    """The golden value of the specification's three tensors."""
    import torch

    from deltahub.tensors import write

    write(
        tmp_path / "model.safetensors",
        {
            "a": torch.tensor(1.0),
            "b.w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
            "é": torch.zeros(0, 4, dtype=torch.int64),
        },
    )
    found = run_json("fingerprint", tmp_path)
    assert found["exact"] == "ab9a3cdd808b2280b6ef2a9a9f94bb67e94ea515796a18f49bbcb74244263c61"
    assert found["tensors"] == 3
    assert found["exact"] in run("fingerprint", tmp_path).stdout
    assert run_json("fingerprint", tmp_path, "--exclude", "a")["tensors"] == 2
    assert run_json("fingerprint", tmp_path / "none", code=1)["error"]["code"] == "E_IDENTITY_SOURCE"


def test_verify(tmp_path: Path, hub: LoopbackHub, cache: Path) -> None:
    """From the package alone: its backbone is fetched, checked, rebuilt; then one bit of it is changed."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=8)).save_pretrained(tmp_path / "base")
    hub.create("acme/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    model = BertModel.from_pretrained(tmp_path / "base")
    delta = deltahub.attach(model, "lora", "query", rank=2)
    for tensor in delta.parameters():
        torch.nn.init.normal_(tensor)
    delta.save(tmp_path / "delta", probe={"input_ids": torch.tensor([[1, 2, 3]])})
    report = run_json("verify", tmp_path / "delta", "--backbone", tmp_path / "base")
    assert report["effect"] > 0
    assert all(value < 1e-5 for value in report["probe"].values())
    to = ("--endpoint", hub.url, "--token", hub.token, "--cache-dir", cache)
    assert "the delta has an effect" in run("verify", tmp_path / "delta", "--backbone", "acme/base", *to).stdout
    weights = tmp_path / "base" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # of the pooler, which the delta does not touch
    weights.write_bytes(data)
    for level, code in (("touched", "E_PACKAGE_PROBE_DIFFERS"), ("full", "E_BACKBONE_MISMATCH")):
        error = run_json("verify", tmp_path / "delta", "--backbone", tmp_path / "base", "--level", level, code=1)[
            "error"
        ]
        assert error["code"] == code


def test_as_a_process(make_package: Maker) -> None:
    """The exit code and the streams of a real process; and no torch for what needs none."""
    folder = make_package()
    code = """
import sys
from deltahub.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules, "torch was loaded"
"""
    command = [sys.executable, "-c", code]
    good = subprocess.run([*command, "inspect", folder, "--json"], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["spec_version"] == "1.0"
    (folder / "delta.safetensors").write_bytes(b"")
    bad = subprocess.run([*command, "inspect", folder], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert bad.stdout == ""
    assert bad.stderr.startswith("[E_")
    assert "Traceback" not in bad.stderr


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one, as files."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    kind = serialization.BestAvailableEncryption(b"secret")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kind)
    (tmp_path / "acme.pem").write_bytes(pem)
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "acme.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, public))
    return tmp_path / "acme.pem", tmp_path / "acme.pub"


def test_sign_and_verify(make_package: Maker, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    folder = make_package()
    error = run_json("pull", folder, "--signed-by", public, code=1)["error"]
    assert error["code"] == "E_SIGN_MISSING"
    assert run_json("sign", folder, "--key", private, code=1)["error"]["code"] == "E_SIGN_KEY"  # it has a password
    assert "delta.json" in run_json("sign", folder, "--key", private, "--password", "secret")["files"]
    assert run_json("pull", folder, "--signed-by", public)["signer"] == "acme"
    assert run("pull", folder, "--signed-by", public).stdout.splitlines()[-1].split() == ["signer", "acme"]
    policy = tmp_path / "policy.toml"
    policy.write_text('[[signers]]\nname = "Acme releases"\nkey = "acme.pub"\n')
    assert run_json("pull", folder, "--policy", policy, "--require-signature")["signer"] == "Acme releases"
    (folder / "model.sig").unlink()
    assert run_json("pull", folder, "--policy", policy)["signer"] is None
    assert run_json("pull", folder, "--policy", policy, "--require-signature", code=1)["error"]["code"] == (
        "E_SIGN_MISSING"
    )
    assert "--policy or --signed-by" in run("pull", folder, "--require-signature", code=2).stderr
    assert "cannot be read" in run("pull", folder, "--signed-by", tmp_path / "none", code=2).stderr


def test_lock(make_package: Maker, hub: LoopbackHub, cache: Path, tmp_path: Path) -> None:
    to = ("--endpoint", hub.url, "--token", hub.token)
    first = run_json("push", make_package(seed=1), "tester/delta", *to)["commit"]
    file = tmp_path / "deltahub.lock"
    locked = run_json("lock", "tester/delta", "--out", file, "--cache-dir", cache, *to)
    assert [entry["commit"] for entry in locked["packages"]] == [first]
    assert locked == json.loads(file.read_text())
    run("push", make_package("second", seed=2), "tester/delta", *to)
    assert run_json("pull", "tester/delta", "--cache-dir", cache, *to)["commit"] != first
    assert run_json("pull", "tester/delta", "--lock", file, "--cache-dir", cache, *to)["commit"] == first
    error = run_json("pull", "tester/other", "--lock", file, "--cache-dir", cache, *to, code=1)["error"]
    assert error["code"] == "E_HUB_LOCK_MISMATCH"
    again = run("lock", "tester/delta", "--out", file, "--cache-dir", cache, *to).stdout
    assert "hf://tester/delta" in again
    assert again.splitlines()[-1] == f"written to {file}"


def test_card(make_package: Maker) -> None:
    folder = make_package()
    path = Path(run_json("card", folder, "user/delta", "--license", "mit", "--metric", "accuracy=0.91")["path"])
    text = path.read_text()
    assert 'deltahub.load("user/delta")' in text
    assert "license: mit" in text
    assert "| accuracy | 0.91 |" in text
    path.write_text(f"{text}\nMy own words.\n")
    assert run("card", folder, "--summary", "late").stdout.strip() == str(path)
    assert "My own words." in path.read_text()
    assert "NAME=NUMBER" in run("card", folder, "--metric", "accuracy", code=2).stderr


def test_search_says_how_sure_it_is(make_package: Maker, hub: LoopbackHub) -> None:
    to = ("--endpoint", hub.url, "--token", hub.token)
    run("push", make_package(), "tester/delta", *to)
    hub.create("org/base", {"config.json": b"{}"})
    head, row = run("search", "--backbone", "org/base", *to).stdout.splitlines()
    assert head.split() == ["repository", "match", "kinds", "backbone", "downloads", "updated"]
    assert row.split()[:4] == ["tester/delta", "name", "lora", "org/base"]
    assert "match" not in run("search", *to).stdout
    assert run("search", "--kind", "bias", *to).stdout == "nothing found\n"


def test_doctor() -> None:
    found = run_json("doctor", "--offline", "--endpoint", "https://huggingface.co")
    assert found["deltahub"] == deltahub.__version__
    assert found["answer"] == "not asked"
    assert "cpu" in found["devices"]
    assert {"torch", "huggingface_hub"} <= {part["name"] for part in found["parts"]}
    assert "deltahub[" in run("doctor", "--offline").stdout or not any(extra["missing"] for extra in found["extras"])
    broken = run("doctor").stdout  # nothing listens at the tests' endpoint
    assert "PROBLEM: http://127.0.0.1:1 cannot be reached" in broken


def test_doctor_knows_the_extras() -> None:
    import tomllib

    from deltahub.doctor import EXTRAS

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"all", "dev", "docs"}
    for extra, (parts, _) in EXTRAS.items():
        wanted = " ".join(project["optional-dependencies"][extra])
        assert all(part in wanted for part in parts), extra


def test_a_folder_that_is_almost_there(make_package: Maker) -> None:
    folder = make_package("package")
    error = run_json("inspect", folder.parent / "pakage", code=1)["error"]
    assert error["hint"] == f"did you mean {folder}?"


def test_progress_is_told(make_package: Maker, hub: LoopbackHub, cache: Path) -> None:
    """Every byte of a download and of hashing is told to who listens, and to nobody else."""
    from deltahub.hub import pull
    from deltahub.progress import listening

    class Log:
        def __init__(self) -> None:
            self.steps: list[tuple[str, int | None]] = []
            self.done: dict[int, int] = {}
            self.ended: set[int] = set()

        def begin(self, label: str, total: int | None) -> int:
            self.steps.append((label, total))
            return len(self.steps) - 1

        def advance(self, step: int, amount: int) -> None:
            self.done[step] = self.done.get(step, 0) + amount

        def end(self, step: int) -> None:
            self.ended.add(step)

    folder = make_package()
    size = (folder / "delta.safetensors").stat().st_size
    commit = deltahub.push(folder, "tester/delta", endpoint=hub.url, token=hub.token).commit
    log = Log()
    with listening(log):
        pull(f"tester/delta@{commit}", cache_dir=cache, endpoint=hub.url, token=hub.token)
    told = {label: (total, log.done.get(n)) for n, (label, total) in enumerate(log.steps)}
    assert told["fetching delta.safetensors"] == (size, size)
    assert {told[label] for label in told if label.startswith("checking ")} == {(size, size)}
    assert log.ended == set(range(len(log.steps)))
    before = len(log.steps)
    pull(folder)
    assert len(log.steps) == before


def test_bars_are_drawn_only_after_a_moment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltahub.cli import bars
    from deltahub.progress import listening, step

    monkeypatch.setenv("FORCE_COLOR", "1")
    with bars.Bars() as drawn, listening(drawn), step("checking", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(bars, "_MOMENT", 0.0)
    with bars.Bars() as drawn, listening(drawn), step("checking", 10) as advance:
        advance(5)
        advance(5)
    captured = capsys.readouterr()
    assert "checking" in captured.err
    assert captured.out == ""
