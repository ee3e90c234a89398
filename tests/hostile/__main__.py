"""``make hostile``: run every case and print what each ended in; fails where one ended otherwise."""

from __future__ import annotations

import sys
import time

from tests.hostile.sandbox import CPU_SECONDS, MEMORY_BYTES, Sandbox
from tests.hostile.table import CASES


def main(patterns: list[str]) -> int:
    """Run the cases whose names hold one of the patterns; all of them by default."""
    start = time.monotonic()
    chosen = [found for key, found in sorted(CASES.items()) if not patterns or any(p in key for p in patterns)]
    passed, slowest = 0, 0.0
    with Sandbox() as sandbox:
        for found in chosen:
            answer = sandbox.judge(found.key)
            good = answer["outcome"] == found.code and not answer["problems"]
            passed += good
            slowest = max(slowest, answer["seconds"])
            print(f"{'pass' if good else 'FAIL'}  {found.key:<70} {answer['outcome']}  {answer['seconds']:.2f} s")
            if not good:
                print(f"      expected {found.code}", *answer["problems"], answer["text"], sep="\n      ")
    numbers = len({found.number for found in chosen})
    limits = f"limits per case: {CPU_SECONDS} s of CPU, {MEMORY_BYTES >> 20} MiB of memory; slowest {slowest:.2f} s"
    print(f"{len(chosen)} cases of {numbers} numbers, {passed} passed, {time.monotonic() - start:.0f} s ({limits})")
    return int(passed != len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
