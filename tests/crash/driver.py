"""``kill -9`` at random moments of all that writes; afterwards each target is absent or whole.

``python -m tests.crash.driver KILLS`` prints what was found. One warmed process forks a child per attempt, so that a
kill falls into the work and not into imports; the Hub lives in the process that judges.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["Crashes", "main"]

ROOT = Path(__file__).resolve().parents[2]
WORKS = ("save", "overwrite", "push", "pull", "merge", "diff")
REPO = "acme/delta"


# ---- the warmed process, and the work itself


def work(name: str, folder: Path, seed: int, hub: dict[str, str]) -> None:
    """One piece of work, as a user would do it."""
    import deltahub

    if name in {"save", "overwrite"}:
        made(seed).save(folder / name, overwrite=name == "overwrite")
    elif name == "push":
        package = folder / f"push-{seed}"
        deltahub.push(package, REPO, endpoint=hub["url"], token=hub["token"])
    elif name == "pull":
        deltahub.pull(REPO, endpoint=hub["url"], token=hub["token"], cache_dir=folder / "cache")
    elif name == "diff":
        from deltahub.converters.diff import diff

        diff(folder / "backbone", folder / "tuned", folder / "diff", form="lowrank", rank=2, overwrite=True)
    else:
        from deltahub.converters.merge import merge

        merge(folder / "push-0", folder / "merge", backbone=folder / "backbone", overwrite=True)


_MODELS: dict[str, Any] = {}


def made(seed: int) -> Any:
    """A delta with numbers of its own on the warmed model."""
    import deltahub
    from tests.zoo import randomise

    delta = deltahub.attach(_MODELS["model"], "lora", ["q_proj", "down_proj"], rank=8, name="crash")
    randomise(delta.parameters(), seed=seed)
    return delta


def serve(folder: Path, hub: dict[str, str]) -> None:
    """Fork a child for each line ``work seed seconds``, kill it after that time, and answer with how it ended."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.models import llama

    torch.set_num_threads(1)
    llama().save_pretrained(folder / "backbone")
    llama(seed=1).save_pretrained(folder / "tuned")
    _MODELS["model"] = LlamaForCausalLM.from_pretrained(folder / "backbone").eval()
    for seed in range(2):
        delta = made(seed)
        delta.save(folder / f"push-{seed}")
        delta.detach()
    for name in ("push", "pull", "merge", "diff"):  # imports and connections are made before anything is forked
        work(name, folder, 0, hub)
    from huggingface_hub import close_session

    close_session()
    print("ready", flush=True)
    for line in sys.stdin:
        name, seed, after = line.split()
        child = os.fork()
        if not child:
            code = 1
            try:
                os.dup2(2, 1)
                work(name, folder, int(seed), hub)
                code = 0
            finally:
                os._exit(code)
        if float(after) >= 0:
            time.sleep(float(after))
            os.kill(child, signal.SIGKILL)  # nobody has waited for it yet, so the number is still its own
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


# ---- the judge


class Crashes:
    """A Hub, a warmed process, and what was found so far."""

    def __init__(self, folder: Path, hub: Any) -> None:
        self.folder, self.hub = folder, hub
        hub.create(REPO)
        address = json.dumps({"url": hub.url, "token": hub.token})
        environment = {**os.environ, **hub.environment(), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"TMPDIR": str(folder / "tmp"), "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        environment["DELTAHUB_CACHE"] = str(folder / "deltahub")
        (folder / "tmp").mkdir()
        self.random = random.Random(0)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.driver", "--serve", str(folder), address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        assert self._line() == "ready"
        self.longest = {name: self.attempt(name, None)[1] for name in WORKS}
        self.found: Counter[str] = Counter()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def attempt(self, name: str, after: float | None) -> tuple[int, float]:
        """Do one piece of work, killed after so many seconds; gives how it ended, and how long it took."""
        self.prepare(name)
        assert self.process.stdin is not None
        start = time.monotonic()
        seed = self.random.randrange(2)
        self.process.stdin.write(f"{name} {seed} {-1 if after is None else after}\n")
        self.process.stdin.flush()
        return int(self._line()), time.monotonic() - start

    def prepare(self, name: str) -> None:
        import shutil

        if name == "save":
            shutil.rmtree(self.folder / "save", ignore_errors=True)
        elif name == "pull":
            shutil.rmtree(self.folder / "cache", ignore_errors=True)

    def kill(self) -> str:
        """One work, killed at a random moment, and judged."""
        name = self.random.choice(WORKS)
        ended, _ = self.attempt(name, self.random.uniform(0, self.longest[name] * 1.1))
        assert ended in {0, -signal.SIGKILL}, (name, ended)
        how = f"{name}, {'too late' if ended == 0 else self.judge(name)}"
        self.judge(name)
        self.found[how] += 1
        return how

    def judge(self, name: str) -> str:
        """What the target is now; an error if it is neither absent nor whole."""
        from deltahub.hub import pull
        from deltahub.package import Package

        if name in {"save", "overwrite", "diff"}:
            target = self.folder / name
            if not target.exists():
                return "absent"
            with Package.open(target) as package:
                package.verify()
            return "whole"
        if name == "push":
            with tempfile.TemporaryDirectory() as cache:
                pull(REPO, endpoint=self.hub.url, token=self.hub.token, cache_dir=cache)
            return "whole"
        if name == "pull":
            snapshots = list((self.folder / "cache").glob("models--*/snapshots/*/*.safetensors"))
            pull(REPO, endpoint=self.hub.url, token=self.hub.token, cache_dir=self.folder / "cache")  # a rerun finishes
            return "whole" if snapshots else "absent"
        return self._merged()

    def _merged(self) -> str:
        from deltahub.tensors import TensorFile

        target = self.folder / "merge"
        if not target.exists():
            return "absent"
        assert (target / "config.json").is_file()
        with (
            TensorFile.read(target / "model.safetensors") as file,
            TensorFile.open(self.folder / "backbone" / "model.safetensors") as base,
        ):
            assert file.keys() == base.keys()
        return "whole"

    def leftovers(self) -> list[str]:
        """After one more run of each work, undisturbed: what is left of the killed ones."""
        time.sleep(2.2)
        for name in WORKS:
            ended, _ = self.attempt(name, None)
            assert ended == 0, name
            self.judge(name)
        names = [p.name for p in self.folder.iterdir()]
        partial = [str(p) for p in (self.folder / "cache").rglob("*.incomplete")]
        return [n for n in names if n.endswith((".part", ".old"))] + partial

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait(30)


def main(kills: int) -> int:
    """Kill so many times and print what was found."""
    from deltahub.testing import serve_hub

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name, serve_hub(Path(name) / "hub") as hub:
        crashes = Crashes(Path(name), hub)
        try:
            for _ in range(kills):
                crashes.kill()
            left = crashes.leftovers()
        finally:
            crashes.close()
    for how, times in sorted(crashes.found.items()):
        print(f"{times:5d}  {how}")
    print(
        f"{kills} kills, every target absent or whole; left over: {left or 'nothing'}; {time.monotonic() - start:.0f} s"
    )
    return int(bool(left))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        sys.exit(main(int(sys.argv[1])))
