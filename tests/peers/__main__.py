"""``python -m tests.peers PYTHON``: AdapterHub's real library on one side, DeltaHub on the other; ``make peers``.

The library needs another transformers than this environment has, so it runs by an interpreter of its own. It writes
adapters of every method on eight models; they are imported, their outputs are compared, what can be said in its format
is exported again, and the library loads that and compares.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

import deltahub
from deltahub.converters import export_, import_
from deltahub.errors import DeltaHubError

TOLERANCE = 1e-5
EXPORTED = {"lora", "lora-everywhere", "ia3", "pfeiffer", "houlsby"}
REFUSED = {
    "compacter@bare": "E_CONVERT_MISSING",  # a model without a head does not save what layers share
    "compacter++@bare": "E_CONVERT_MISSING",
    "vera@bare": "E_CONVERT_MISSING",
    "compacter@t5": "E_CONVERT_MISSING",
    "compacter++@t5": "E_CONVERT_MISSING",
    "vera@t5": "E_CONVERT_MISSING",
    **{f"{method}@gpt2": "E_CONVERT_MISSING" for method in ("lora-gated", "unipelt")},  # two gates on one projection
    **{
        f"{method}@t5": "E_CONVERT_UNSUPPORTED"
        for method in ("prefix", "prefix-flat", "prefix-some", "mam", "union", "unipelt")
    },
    **{f"pfeiffer-inv@{name}": "E_CONVERT_UNSUPPORTED" for name in ("gpt2", "t5", "bart", "llama")},
}
"""What is refused, and by which error; everything else has to give the library's own numbers."""


def compare(one: Path, home: Path) -> str | None:
    """Import one adapter; what is wrong with it, or ``None``."""
    backbone = one / "backbone"
    (name,) = json.loads((backbone / "config.json").read_text(encoding="utf-8"))["architectures"]
    class_name = f"transformers.{name}"
    expected = REFUSED.get(one.name)
    try:
        package = import_(one / "adapter", home, backbone=backbone, class_name=class_name, allow_pickle=True)
    except DeltaHubError as error:
        return None if error.code == expected else f"refused: {error}"
    if expected:
        return f"not refused by {expected}"
    model = deltahub.load(package.path, backbone=backbone)
    with np.load(one / "reference.npz") as reference:
        given = {key[7:]: torch.from_numpy(reference[key]) for key in reference if key.startswith("input__")}
        want, before = reference["output"], reference["before"]
    with torch.no_grad():
        found = model(**given)[0].numpy()
    if one.name.partition("@")[0] in EXPORTED:
        _export(package.path, one, backbone)
    difference, effect = np.abs(found - want).max(), np.abs(before - want).max()
    print(f"{one.name:28} differs by {difference:.1e}; the adapter's effect is {effect:.2g}", flush=True)
    return None if difference <= TOLERANCE < effect else f"differs by {difference}"


def _export(package: Path, one: Path, backbone: Path) -> None:
    try:
        export_(package, one / "export", to="adapterhub", backbone=backbone, name="it")
    except DeltaHubError as error:
        print(f"{one.name:28} is not exported: {error.what}", flush=True)


def main(python: str) -> int:
    warnings.simplefilter("ignore")
    theirs = str(Path(__file__).with_name("theirs.py"))
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="deltahub-peers-") as folder:
        root = Path(folder)
        subprocess.run([python, "-W", "ignore", theirs, "make", folder], check=True, stderr=subprocess.DEVNULL)
        every = sorted(path for path in root.iterdir() if (path / "reference.npz").is_file())
        for one in every:
            if problem := compare(one, root / f"{one.name}.package"):
                wrong[one.name] = problem
        subprocess.run([python, "-W", "ignore", theirs, "load", folder], check=True, stderr=subprocess.DEVNULL)
        loaded = json.loads((root / "loaded.json").read_text(encoding="utf-8"))
    for name, found in loaded.items():
        print(f"{name:28} loaded again by the library: {found}", flush=True)
        if not isinstance(found, float) or found > TOLERANCE:
            wrong[f"{name}, exported"] = str(found)
    print(f"{len(every)} adapters, {len(loaded)} exported again, {len(wrong)} wrong")
    for name, problem in wrong.items():
        print(f"{name}: {problem}")
    return int(bool(wrong) or len(every) < 100 or not loaded)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
