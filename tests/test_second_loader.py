"""The vectors suffice to write another loader: the one in JavaScript passes all that it says it does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "spec" / "conformance"
NOT_DONE = ("kind", "package", "forward")


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < 20:
        pytest.skip(f"node 20 is needed, found {version}")
    # A copy, so that nothing is installed into the checkout; the kind documents stand where the loader looks for them.
    root = tmp_path_factory.mktemp("second") / "spec"
    second = root / "conformance" / "second"
    shutil.copytree(FOLDER / "second", second, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(FOLDER.parent / "kinds", root / "kinds")
    command = [npm, "ci", "--no-audit", "--no-fund", "--silent"]
    try:
        done = subprocess.run(command, cwd=second, capture_output=True, text=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm does not answer")
    if done.returncode != 0:
        pytest.skip(f"its dependency cannot be installed: {done.stderr[-200:]}")
    return second / "loader.mjs"


def test_the_second_loader_passes(loader: Path) -> None:
    command = [sys.executable, str(FOLDER / "runner.py"), "--stream", "--", "node", str(loader), "--stream"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:]
    count = re.search(r"(\d+) passed, 0 failed", done.stdout)
    assert count is not None
    assert int(count[1]) > 900
    why = set(re.findall(r"SKIPPED .*\n    (.*)", done.stdout))
    assert why <= {f"{op} is not done here" for op in NOT_DONE}, "every other operation is answered"


def test_one_request_and_its_exit_status(loader: Path) -> None:
    for patterns, status in ((["a.{0..2}"], 0), (["a.*"], 1)):
        request = f'{{"op": "targets", "patterns": ["{patterns[0]}"]}}'
        done = subprocess.run(["node", str(loader)], input=request, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
