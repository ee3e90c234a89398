"""Judge any implementation of the DeltaHub format by its answers to the vectors in this folder.

    python spec/conformance/runner.py -- my-loader --conformance
    python spec/conformance/runner.py --stream -- python -m deltahub.conformance --stream

Standard library only. The implementation reads a request (one JSON object) on standard
input and writes a verdict (one JSON object) on standard output; README.md gives both.
Without ``--stream`` it is started once per case and must also exit with 0 for "valid",
1 for "invalid" and 2 for "this operation is not supported"; with ``--stream`` it is
started once per file and answers line by line.

Exit status of this program: 0 all passed, 1 some failed, 2 the vectors or the call are wrong.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Case", "Outcome", "cases", "judge", "main", "raw_bytes", "request", "run"]

HERE = Path(__file__).resolve().parent
FORMAT = 1
SECOND = "second"
#: Fields that say what a case is; all others are handed to the implementation.
ABOUT = frozenset({"description", "clause", "valid", "error_code", "expect", "tolerance", "schema"})
#: Ways to write down bytes; each is handed over as ``data``, in base64.
RAW = ("manifest", "base", "text", "base64", "parts", "empty_tensors")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One vector: where it stands, what is asked, what must come out."""

    file: str
    index: int
    op: str
    body: dict[str, Any]
    bases: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.file}#{self.index}"

    @property
    def clauses(self) -> tuple[str, ...]:
        clause = self.body["clause"]
        return (clause,) if isinstance(clause, str) else tuple(clause)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case: ``passed``, ``failed`` or ``skipped``, and why."""

    case: Case
    status: str
    why: str = ""


def cases(directory: Path = HERE) -> Iterator[Case]:
    """Read every vector below ``directory``, in a fixed order."""
    for path in sorted(directory.glob("*/*.json")):
        if path.parent.name == SECOND:  # a program that answers the vectors, not vectors
            continue
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("format") != FORMAT:
            raise SystemExit(f"{path}: format {document.get('format')!r} is not {FORMAT}")
        for index, body in enumerate(document["cases"]):
            yield Case(
                file=path.relative_to(directory).as_posix(),
                index=index,
                op=body.get("op", document["op"]),
                body=body,
                bases=document.get("bases", {}),
            )


def _pointer(root: Any, pointer: str) -> tuple[Any, str | int]:
    """Walk an RFC 6901 pointer up to its last step: the container and the key in it."""
    steps = [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]
    for step in steps[:-1]:
        root = root[int(step)] if isinstance(root, list) else root[step]
    return root, int(steps[-1]) if isinstance(root, list) and steps[-1] != "-" else steps[-1]


def patched(value: Any, body: dict[str, Any]) -> Any:
    """Apply a case's ``set`` (pointer to value; ``-`` appends) and ``remove`` (pointers) to a copy."""
    value = deepcopy(value)
    for pointer, new in body.get("set", {}).items():
        container, key = _pointer(value, pointer)
        if key == "-":
            container.append(new)
        else:
            container[key] = new
    for pointer in body.get("remove", ()):
        container, key = _pointer(value, pointer)
        del container[key]
    return value


def raw_bytes(body: dict[str, Any], bases: dict[str, Any]) -> bytes:
    """The bytes that a case writes down in one of the ways of ``RAW``."""
    if "base64" in body:
        return base64.b64decode(body["base64"], validate=True)
    if "text" in body:
        return body["text"].encode("utf-8")
    if "parts" in body:  # [text, how often] …: what would be too long to write out
        return "".join(text * count for text, count in body["parts"]).encode("utf-8")
    if "empty_tensors" in body:  # a tensor file with that many tensors of no bytes
        entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        header = json.dumps({str(i): entry for i in range(body["empty_tensors"])}).encode("utf-8")
        return len(header).to_bytes(8, "little") + header
    value = body["manifest"] if "manifest" in body else patched(bases[body["base"]], body)
    return json.dumps(value, ensure_ascii=False, indent=2).encode("utf-8")


def _lay_out(files: dict[str, Any], root: Path, outside: Path) -> None:
    """Write a package's files; ``files`` maps a path to text, base64, or something odd."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif "json" in content:
            path.write_text(json.dumps(content["json"], ensure_ascii=False, indent=2), encoding="utf-8")
        elif "base64" in content:
            path.write_bytes(base64.b64decode(content["base64"], validate=True))
        elif "parts" in content:
            path.write_bytes(raw_bytes(content, {}))
        elif "symlink" in content:
            path.symlink_to(content["symlink"].replace("{outside}", str(outside)))
        elif "hardlink" in content:
            path.hardlink_to(content["hardlink"].replace("{outside}", str(outside)))
        elif "sparse" in content:
            with path.open("wb") as stream:
                stream.truncate(content["sparse"])
        elif "directory" in content:
            path.mkdir()
        elif "fifo" in content:
            os.mkfifo(path)
        else:
            raise ValueError(f"{name}: unknown content {sorted(content)}")


def request(case: Case, scratch: Path) -> dict[str, Any]:
    """What the implementation is asked; packages are laid out in a new folder under ``scratch``."""
    asked = {key: value for key, value in case.body.items() if key not in ABOUT}
    asked["op"] = case.op
    if any(key in asked for key in RAW):
        asked["data"] = base64.b64encode(raw_bytes(case.body, case.bases)).decode()
        for key in (*RAW, "set", "remove"):
            asked.pop(key, None)
    if "files" in asked:
        files = asked.pop("files")
        spot = Path(tempfile.mkdtemp(dir=scratch))
        root, outside = spot / "package", spot / "outside"
        root.mkdir()
        outside.mkdir()
        _lay_out(case.body.get("outside", {}), outside, outside)
        _lay_out(files, root, outside)
        asked.pop("outside", None)
        asked["directory"] = str(root)
    return asked


def _close(expected: float, found: Any, tolerance: float) -> bool:
    if isinstance(expected, bool) or isinstance(found, bool):
        return expected is found
    if not isinstance(found, int | float):
        return False
    if math.isnan(expected) or math.isinf(expected):
        return str(expected) == str(float(found))
    return abs(expected - found) <= tolerance * max(1.0, abs(expected))


def differs(expected: Any, found: Any, tolerance: float, where: str = "result") -> str | None:
    """Say where ``found`` is not what was expected; keys that nobody asked for do not matter."""
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return f"{where}: expected an object, found {found!r:.80}"
        for key, value in expected.items():
            if key not in found:
                return f"{where}.{key}: missing"
            if why := differs(value, found[key], tolerance, f"{where}.{key}"):
                return why
        return None
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return f"{where}: expected {len(expected)} items, found {found!r:.80}"
        for index, (left, right) in enumerate(zip(expected, found, strict=True)):
            if why := differs(left, right, tolerance, f"{where}[{index}]"):
                return why
        return None
    if isinstance(expected, float):
        return None if _close(expected, found, tolerance) else f"{where}: expected {expected!r}, found {found!r:.80}"
    same = expected == found and isinstance(expected, bool) == isinstance(found, bool)
    return None if same else f"{where}: expected {expected!r:.80}, found {found!r:.80}"


def judge(case: Case, verdict: Any, status: int | None = None) -> Outcome:
    """Compare a verdict (and the exit status, if the implementation was started for this case alone)."""
    valid = case.body["valid"]
    if not isinstance(verdict, dict):
        return Outcome(case=case, status="failed", why=f"the verdict is not a JSON object: {verdict!r:.200}")
    if "skipped" in verdict:
        return Outcome(case=case, status="skipped", why=str(verdict["skipped"]))
    problem = None
    if verdict.get("valid") is not valid:
        code = f" {verdict.get('error_code')}: {verdict.get('message', '')}"
        problem = "accepted, but is invalid" if verdict.get("valid") else f"refused, but is valid:{code:.400}"
    elif not valid:
        codes = case.body["error_code"]
        if verdict.get("error_code") not in ([codes] if isinstance(codes, str) else codes):
            problem = f"expected {codes}, found {verdict.get('error_code')}: {verdict.get('message', ''):.400}"
    if problem is None and "expect" in case.body:
        problem = differs(case.body["expect"], verdict.get("result"), case.body.get("tolerance", 0.0))
    if problem is None and status is not None and status != (0 if valid else 1):
        problem = f"exit status {status}"
    return Outcome(case=case, status="failed" if problem else "passed", why=problem or "")


def run(chosen: list[Case], ask: Callable[[dict[str, Any]], tuple[Any, int | None]]) -> list[Outcome]:
    """Put every case to ``ask``, which returns the verdict and an exit status or None."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="conformance-") as scratch:
        for case in chosen:
            verdict, status = ask(request(case, Path(scratch)))
            outcomes.append(judge(case, verdict, status))
    return outcomes


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line or "nothing"


def one_by_one(command: list[str], seconds: float) -> Callable[[dict[str, Any]], tuple[Any, int | None]]:
    """Start the implementation anew for each case."""

    def ask(asked: dict[str, Any]) -> tuple[Any, int | None]:
        try:
            done = subprocess.run(  # noqa: S603 - the command is what the caller asked to test
                command, input=json.dumps(asked), capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no answer in {seconds} s", None
        if done.returncode == 2:
            return {"skipped": done.stdout.strip() or "not supported"}, None
        return _parsed(done.stdout.strip()), done.returncode

    return ask


class Stream:
    """One process that answers line by line; started again after a crash, which fails the case that caused it."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(  # noqa: S603 - as above
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __call__(self, asked: dict[str, Any]) -> tuple[Any, int | None]:
        if self.process.poll() is not None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait(timeout=10)
            return "the process ended", None
        return _parsed(line.strip()), None

    def close(self) -> None:
        """End the process: it stops when its input ends."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait(timeout=10)
        self.process.stdout.close()


def _report(outcomes: list[Outcome], seconds: float, *, quiet: bool) -> int:
    for outcome in outcomes:
        if outcome.status == "failed" or (not quiet and outcome.status == "skipped"):
            print(f"{outcome.status.upper()} {outcome.case.name} {'/'.join(outcome.case.clauses)}", end=" ")
            print(f"{outcome.case.body['description']}\n    {outcome.why}")
    count = {status: sum(o.status == status for o in outcomes) for status in ("passed", "failed", "skipped")}
    print(f"{len(outcomes)} cases: {', '.join(f'{n} {s}' for s, n in count.items())} in {seconds:.1f} s")
    return 1 if count["failed"] else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the vectors against the command given after ``--``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=HERE, help="where the vectors are")
    parser.add_argument("--only", action="append", default=[], help="a folder, or a file such as manifest/valid.json")
    parser.add_argument("--clause", action="append", default=[], help="only cases that name this clause")
    parser.add_argument("--stream", action="store_true", help="one process, one line per case")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds per case when started anew for each")
    parser.add_argument("--quiet", action="store_true", help="do not list what was skipped")
    parser.add_argument("command", nargs="+", help="the implementation, after --")
    options = parser.parse_args(arguments)
    chosen = [
        case
        for case in cases(options.directory)
        if (not options.only or any(case.file == o or case.file.startswith(f"{o}/") for o in options.only))
        and (not options.clause or set(options.clause) & set(case.clauses))
    ]
    if not chosen:
        print("no case fits", file=sys.stderr)
        return 2
    began = time.monotonic()
    if options.stream:
        stream = Stream(options.command)
        try:
            outcomes = run(chosen, stream)
        finally:
            stream.close()
    else:
        outcomes = run(chosen, one_by_one(options.command, options.timeout))
    return _report(outcomes, time.monotonic() - began, quiet=options.quiet)


if __name__ == "__main__":
    sys.exit(main())
