"""``make fuzz``: coverage-guided fuzzing of every parser, one process per target and core.

``python -m fuzz [SECONDS] [TARGET…]``; inputs that broke something are left in ``fuzz/found/``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

FOUND = Path(__file__).parent / "found"


def one(name: str, corpus: str, seconds: int) -> None:
    """In a process of its own: let atheris call the target until the time is up."""
    import atheris

    with atheris.instrument_imports(include=["deltahub"]):
        from deltahub.errors import DeltaHubError
        from fuzz.targets import SEEDS, TARGETS

    for seed in SEEDS[name]:
        Path(corpus, sha256(seed).hexdigest()).write_bytes(seed)

    def call(data: bytes) -> None:
        try:
            TARGETS[name](data)
        except DeltaHubError:
            return

    options = [f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=2048", "-max_len=4096"]
    atheris.Setup([name, *options, f"-artifact_prefix={FOUND}/{name}-", corpus], call)
    atheris.Fuzz()


def run(name: str, seconds: int) -> tuple[str, int, str]:
    """Start a process for a target; its name, how it ended, and the last that it said."""
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, "-m", "fuzz", "--one", name, corpus, str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return name, done.returncode, "\n".join(lines[-1:] if not done.returncode else lines[-40:])


def main(seconds: int, names: list[str]) -> int:
    """Fuzz the named targets, or all, and print what came of it."""
    from fuzz.targets import TARGETS

    FOUND.mkdir(exist_ok=True)
    start, bad = time.monotonic(), 0
    with ThreadPoolExecutor(2) as pool:
        for name, code, said in pool.map(lambda n: run(n, seconds), names or list(TARGETS)):
            bad += code != 0
            print(f"{'FOUND' if code else 'clean'}  {name:<12} {said}", flush=True)
    print(f"{bad} of {len(names or TARGETS)} targets broke a promise; {time.monotonic() - start:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 300, sys.argv[2:]))
