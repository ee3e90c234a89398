"""``python -m benchmarks [NAME …] [--quick]``: measure, print, and write ``benchmarks/out``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import warnings

NAMES = (
    "imports", "life", "scaling", "forward", "compiled", "training", "mixed", "merge", "diff", "backbone", "publish",
    "delta_conv", "distil", "onnx",
)  # fmt: skip

LARGE = ("merge_large",)
"""Asked for by name only: they need tens of gigabytes of disk."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    help_text = f"which of {', '.join(NAMES)}, which are all done by default; or {', '.join(LARGE)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=help_text)
    parser.add_argument("--quick", action="store_true", help="the smaller model and fewer repeats")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a goal is missed")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - {*NAMES, *LARGE}:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}")
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_XET="1", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")

    import torch

    from benchmarks.harness import OUT

    torch.set_num_threads(1)
    missed = 0
    with tempfile.TemporaryDirectory(prefix="deltahub-bench-") as home:
        os.environ.setdefault("HF_HOME", home)
        os.environ["DELTAHUB_HOME"] = home
        for name in given.names or NAMES:
            print(f"== {name}", flush=True)
            report = importlib.import_module(f"benchmarks.{name}").run(quick=given.quick)
            print("\n" + report.markdown())
            print("written:", *report.write_to(OUT))
            missed += sum(not goal["met"] for goal in report.goals)
    return int(given.strict and missed > 0)


if __name__ == "__main__":
    sys.exit(main())
