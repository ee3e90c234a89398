"""The vectors cover the specification, this implementation passes them, and the runner notices who does not."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from deltahub import conformance

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "spec" / "conformance"


def load(name: str) -> ModuleType:
    """A script of the vectors' folder as a module: the folder itself is no package."""
    spec = importlib.util.spec_from_file_location(f"conformance_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


runner = load("runner")
CASES: list[Any] = list(runner.cases())
FILES = sorted({case.file for case in CASES})


# ------------------------------------------------------------------------------------------------------- the vectors


@cache
def clauses() -> frozenset[str]:
    return frozenset(re.findall(r"\*\*\[(DH-[0-9.]+-[0-9]+)\]\*\*", (ROOT / "SPEC.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", FILES)
def test_files_are_well_formed(file: str) -> None:
    schema = json.loads((FOLDER / "cases.schema.json").read_text(encoding="utf-8"))
    document = json.loads((FOLDER / file).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(document)
    twice = [text for text, n in Counter(case["description"] for case in document["cases"]).items() if n > 1]
    assert not twice, "descriptions tell cases apart"


def test_every_clause_has_a_vector() -> None:
    assert not clauses() - {clause for case in CASES for clause in case.clauses}


def test_every_vector_names_clauses_that_exist() -> None:
    assert not {clause for case in CASES for clause in case.clauses} - clauses()


def test_every_error_code_in_a_vector_exists() -> None:
    known = {
        code
        for path in (ROOT / "spec" / "errors").glob("*.toml")
        for code in tomllib.loads(path.read_text(encoding="utf-8"))
    }
    named = {
        code
        for case in CASES
        for code in [case.body.get("error_code", [])]
        for code in ([code] if isinstance(code, str) else code)
    }
    assert not named - known


def test_every_op_of_the_language_has_a_vector() -> None:
    from deltahub.kinds.ops import OPS

    texts = " ".join(json.dumps(case.body) for case in CASES if case.op in {"apply", "forward"})
    texts += " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "spec" / "kinds").glob("*.toml"))
    assert not [name for name in OPS if f"{name}(" not in texts]


def test_every_builtin_kind_has_vectors() -> None:
    kinds = {path.stem for path in (ROOT / "spec" / "kinds").glob("*.toml")}
    assert not kinds - {case.body.get("kind") for case in CASES if case.op == "apply"}


def test_generated_files_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_vectors_hold_no_special_numbers() -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    for file in FILES:
        json.loads((FOLDER / file).read_text(encoding="utf-8"), parse_constant=refuse)


# ------------------------------------------------------------------------------------------------ schema and code


@cache
def validator() -> Any:
    schema = json.loads((ROOT / "spec" / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_schema_and_code_agree_on_every_manifest() -> None:
    """Where a schema cannot say what the code does, the case says so by ``schema``; nowhere else do they differ."""
    disagreeing = []
    for case in CASES:
        if case.op != "manifest":
            continue
        try:
            value = json.loads(runner.raw_bytes(case.body, case.bases).decode("utf-8"))
            found = validator().is_valid(value)
        except (ValueError, RecursionError):
            continue  # no JSON to hold against a schema
        if found != case.body.get("schema", case.body["valid"]):
            disagreeing.append(f"{case.name} {case.body['description']}: schema says {found}")
        if case.body["valid"] and not found:
            disagreeing.append(f"{case.name}: the schema refuses a valid manifest")
    assert not disagreeing


# ------------------------------------------------------------------------------------------------ this implementation


def ask(request: dict[str, Any]) -> tuple[Any, None]:
    # Through JSON, as it would come and go between two processes.
    return json.loads(json.dumps(conformance.answer(json.loads(json.dumps(request))))), None


@pytest.mark.parametrize("file", FILES)
def test_this_implementation_passes(file: str) -> None:
    outcomes = runner.run([case for case in CASES if case.file == file], ask)
    assert not [f"{o.case.name} {o.case.body['description']}: {o.why}" for o in outcomes if o.status != "passed"]


def test_the_interpreter_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The NumPy interpreter against the same numbers: it is the executable specification."""
    import numpy as np

    from deltahub.kinds.reference import Host, run

    monkeypatch.syspath_prepend(str(FOLDER))
    hosts = load("hosts")

    def tensor(value: dict[str, Any] | None) -> Any:
        if value is None:
            return None
        return np.array(value["data"], "i8" if value.get("dtype") == "I64" else "f4").reshape(value["shape"])

    checked = 0
    for case in CASES:
        if case.op != "apply":
            continue
        body, facts = case.body, case.body["host"]
        kind, shape = conformance.kind_of(body), conformance.shape_of(facts)
        inputs = {name: tensor(body.get(name)) for name in ("x", "y", "W", "b", "scores")}
        if body["port"] == "bias" and inputs["b"] is None:
            inputs["b"] = np.zeros(facts["out"], "f4")
        host = Host(
            context={n: tuple(v) for n, v in body.get("context", {}).items()},
            shape=shape,
            apply=lambda x, w, facts=facts: hosts.applied(facts, x, w),
            base=lambda x, facts=facts, given=inputs: hosts.forward(facts, x, given["W"], given["b"]),
        )
        given = {name: tensor(value) for name, value in body.get("tensors", {}).items()}
        value = run(kind.document, kind.check_config(body["config"]), body["port"], host, given, **inputs)
        expected = body["expect"]["value"]
        assert list(value.shape) == expected["shape"], case.name
        np.testing.assert_allclose(value.ravel(), np.array(expected["data"]), rtol=1e-4, atol=1e-4, err_msg=case.name)
        checked += 1
    assert checked > 200


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(FOLDER / "runner.py"), *arguments, "--", sys.executable, "-m", "deltahub.conformance"]


def test_in_processes_of_its_own() -> None:
    done = subprocess.run(
        command("--only", "targets/expand.json", "--clause", "DH-6-4"),
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* cases: [1-9]\d* passed, 0 failed, 0 skipped", done.stdout)


def test_as_a_stream() -> None:
    done = subprocess.run(
        [*command("--stream", "--only", "manifest/valid.json", "--only", "identity"), "--stream"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout


# ------------------------------------------------------------------------------------------------------- the runner


def case(**body: Any) -> Any:
    return runner.Case(file="x/y.json", index=0, op="targets", body={"description": "d", "clause": "DH-1-1", **body})


@pytest.mark.parametrize(
    ("body", "verdict", "status", "outcome"),
    [
        ({"valid": True}, {"valid": True}, None, "passed"),
        ({"valid": True}, {"valid": True}, 0, "passed"),
        ({"valid": True}, {"valid": True}, 1, "failed"),
        ({"valid": True}, {"valid": False, "error_code": "E_A"}, 1, "failed"),
        ({"valid": True}, {"valid": 1}, None, "failed"),
        ({"valid": True}, {}, None, "failed"),
        ({"valid": True}, "Traceback", None, "failed"),
        ({"valid": True}, {"skipped": "no"}, None, "skipped"),
        ({"valid": True, "expect": {"a": [1, 2]}}, {"valid": True, "result": {"a": [1, 2], "b": 3}}, None, "passed"),
        ({"valid": True, "expect": {"a": [1, 2]}}, {"valid": True, "result": {"a": [1]}}, None, "failed"),
        ({"valid": True, "expect": {"a": True}}, {"valid": True, "result": {"a": 1}}, None, "failed"),
        (
            {"valid": True, "expect": {"a": 1.0}, "tolerance": 0.1},
            {"valid": True, "result": {"a": 1.05}},
            None,
            "passed",
        ),
        ({"valid": True, "expect": {"a": 1.0}}, {"valid": True, "result": {"a": 1.05}}, None, "failed"),
        (
            {"valid": True, "expect": {"a": 1.0}, "tolerance": 1.0},
            {"valid": True, "result": {"a": "x"}},
            None,
            "failed",
        ),
        (
            {"valid": True, "expect": {"a": 1.0}, "tolerance": 9.0},
            {"valid": True, "result": {"a": float("nan")}},
            None,
            "failed",
        ),
        ({"valid": True, "expect": {"a": 1}}, {"valid": True, "result": {}}, None, "failed"),
        ({"valid": True, "expect": {"a": 1}}, {"valid": True}, None, "failed"),
        ({"valid": False, "error_code": "E_A"}, {"valid": False, "error_code": "E_A"}, 1, "passed"),
        ({"valid": False, "error_code": ["E_A", "E_B"]}, {"valid": False, "error_code": "E_B"}, None, "passed"),
        ({"valid": False, "error_code": "E_A"}, {"valid": False, "error_code": "E_B"}, None, "failed"),
        ({"valid": False, "error_code": "E_A"}, {"valid": False}, None, "failed"),
        ({"valid": False, "error_code": "E_A"}, {"valid": True}, None, "failed"),
        (
            {"valid": False, "error_code": "E_A", "expect": {"unchanged": True}},
            {"valid": False, "error_code": "E_A", "result": {"unchanged": False}},
            None,
            "failed",
        ),
    ],
)
def test_the_runner_judges(body: dict[str, Any], verdict: Any, status: int | None, outcome: str) -> None:
    assert runner.judge(case(**body), verdict, status).status == outcome


def test_the_runner_lays_out_what_is_odd(tmp_path: Path) -> None:
    files = {
        "a/b.txt": "text",
        "j": {"json": {"a": 1}},
        "b": {"base64": "AAE="},
        "p": {"parts": [["ab", 2]]},
        "l": {"symlink": "{outside}/s"},
        "s": {"sparse": 1 << 30},
        "d": {"directory": True},
        "f": {"fifo": True},
    }
    asked = runner.request(case(valid=True, files=files, outside={"s": "secret"}), tmp_path)
    folder = Path(asked["directory"])
    assert (folder / "a" / "b.txt").read_text() == "text"
    assert json.loads((folder / "j").read_text()) == {"a": 1}
    assert (folder / "b").read_bytes() == b"\0\1"
    assert (folder / "p").read_bytes() == b"abab"
    assert (folder / "l").read_text() == "secret"
    assert (folder / "s").stat().st_size == 1 << 30
    assert (folder / "d").is_dir()
    assert (folder / "f").is_fifo()
    assert "files" not in asked


def test_the_runner_changes_a_copy_of_a_base() -> None:
    base = {"a": [{"b": 1}, 2], "c": {"x/y": 1}}
    body = {"set": {"/a/0/b": 5, "/a/-": 7, "/c/x~1y": 2}, "remove": ["/a/1"]}
    assert runner.patched(base, body) == {"a": [{"b": 5}, 7], "c": {"x/y": 2}}
    assert base == {"a": [{"b": 1}, 2], "c": {"x/y": 1}}


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import sys; sys.exit(3)", "not a JSON object"),
        ("print('{}')", "refused, but is valid"),
        ("print('no json')", "not a JSON object"),
        ('print(\'{"valid": true, "result": {"paths": []}}\')', "expected 1 items"),
        ("import time; time.sleep(60)", "no answer in"),
    ],
)
def test_a_broken_implementation_is_found_out(program: str, says: str) -> None:
    done = subprocess.run(
        [
            sys.executable, str(FOLDER / "runner.py"), "--only", "targets/expand.json", "--clause", "DH-6-6",
            "--timeout", "2", "--", sys.executable, "-c", program,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert says in done.stdout or "one name" in done.stdout


def test_a_stream_that_crashes_fails_that_case_alone() -> None:
    program = """
import sys
for line in sys.stdin:
    if "0..999999999}" in line:
        sys.exit(1)
    print('{"skipped": "x"}', flush=True)
"""
    done = subprocess.run(
        [
            sys.executable, str(FOLDER / "runner.py"), "--stream", "--quiet", "--only", "targets/invalid.json",
            "--clause", "DH-6-5", "--", sys.executable, "-c", program,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"0 passed, 1 failed, [1-9] skipped", done.stdout), done.stdout


def test_an_implementation_that_supports_nothing_is_skipped_and_says_so() -> None:
    done = subprocess.run(
        [
            sys.executable, str(FOLDER / "runner.py"), "--only", "identity/tree.json", "--",
            sys.executable, "-c", "raise SystemExit(2)",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "0 passed, 0 failed, 9 skipped" in done.stdout


def test_an_unknown_operation_is_skipped() -> None:
    assert "skipped" in conformance.answer({"op": "levitate"})
