"""A warmed process that forks children, each for the cases of one number: no import is paid for twice.

``python -m tests.hostile.sandbox FOLDER`` reads names of cases from its input, one per line, and answers each with
one line of JSON. :class:`Sandbox` is the other end.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.hostile.corpus import ACCEPTED, CASES, Case, Room, Template

__all__ = ["CPU_SECONDS", "MEMORY_BYTES", "Sandbox"]

ROOT = Path(__file__).resolve().parents[2]
CPU_SECONDS = 5
MEMORY_BYTES = 512 << 20
_PATIENCE = 60.0


class Sandbox:
    """The warmed process, seen from outside."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="deltahub-hostile-")
        home = Path(self._folder.name, "home")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
        environment = kept | {
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "DELTAHUB_CACHE": str(home / "deltahub"),
            "TMPDIR": str(home / "tmp"),
            "HF_ENDPOINT": "http://127.0.0.1:1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_XET": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",  # each thread's own arena would count as address space that is never used
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(p for p in [str(ROOT), os.environ.get("PYTHONPATH", "")] if p),
        }
        (home / "tmp").mkdir(parents=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.sandbox", self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        self._answer()

    def judge(self, name: str) -> dict[str, Any]:
        """Run a case; gives ``outcome``, ``problems``, ``seconds`` of CPU and ``text`` of the error."""
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the warmed process is gone"
        return dict(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(30)
        self._folder.cleanup()


# ---- the warmed process


def warm(folder: Path) -> Template:
    """Do once what every case needs, so that children import nothing."""
    import torch

    import deltahub
    from deltahub.testing import serve_hub

    torch.set_num_threads(1)
    template = Template.make(folder)
    room = Room(folder / "warm", template)
    hub = room.hub()
    room.pull(hub)
    deltahub.inspect(room.package)
    deltahub.verify(room.package, backbone=room.model, cache_dir=room.cache)
    deltahub.load(room.package, backbone=template.backbone)
    room.close()
    from huggingface_hub import close_session

    close_session()
    assert serve_hub
    gc.collect()
    gc.freeze()
    return template


def fork(chosen: Sequence[Case], folder: Path, template: Template) -> dict[str, dict[str, Any]]:
    """Judge cases in one child, one after the other; those that a dead child did not come to get one of their own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w") as out:
            for i, one in enumerate(chosen):
                print(
                    json.dumps([one.key, _judged(one, folder.with_name(f"{folder.name}-{i}"), template)]),
                    file=out,
                    flush=True,
                )
        os._exit(0)
    os.close(writing)
    data = _until(reading, child)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    found = dict(json.loads(line) for line in data.decode().splitlines())
    missing = [one for one in chosen if one.key not in found]
    if missing:
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
        found[missing[0].key] = {"outcome": f"killed by {how}", "problems": [], "text": "", "seconds": 0.0}
        if missing[1:]:
            found |= fork(missing[1:], folder.with_name(f"{folder.name}-again"), template)
    return found


def _until(reading: int, child: int) -> bytes:
    """Everything that a child says until it ends, or until patience does and it is ended."""
    data, end = b"", time.monotonic() + _PATIENCE
    while select.select([reading], [], [], max(end - time.monotonic(), 0))[0]:
        piece = os.read(reading, 1 << 16)
        if not piece:
            return data
        data += piece
        end = time.monotonic() + _PATIENCE
    os.kill(child, signal.SIGKILL)
    return data


def _judged(one: Case, folder: Path, template: Template) -> dict[str, Any]:
    here, path = Path.cwd(), list(sys.path)
    try:
        return judge(one, folder, template)
    except BaseException:
        return {"outcome": "broken", "problems": [traceback.format_exc()], "text": "", "seconds": 0.0}
    finally:
        os.chdir(here)
        sys.path[:] = path


def judge(case: Case, folder: Path, template: Template) -> dict[str, Any]:
    """In the child: prepare, limit, watch, act, compare."""
    room = Room(folder, template)
    try:
        return _watched(room, case.prepare(room))
    finally:
        room.close()


def _watched(room: Room, acts: Any) -> dict[str, Any]:
    from tests.hostile.watching import Watch

    home = Path(os.environ["HOME"])
    watch = Watch(room, (room.cache, home, room.folder / "hub"))
    watch.start()
    _limit()
    start = time.process_time()
    outcomes, texts = [], []
    for act in [acts] if callable(acts) else acts:
        outcome, text = _outcome(act)
        outcomes.append(outcome)
        texts.append(text)
    seconds = time.process_time() - start
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    problems = watch.stop()
    problems += [f"the message does not print: {t!r:.300}" for t in texts if not t.replace("\n", "").isprintable()]
    return {
        "outcome": " / ".join(dict.fromkeys(outcomes)),
        "problems": problems,
        "seconds": seconds,
        "text": "\n".join(dict.fromkeys(texts)),
    }


def _limit() -> None:
    """From here on: so many seconds of the processor, so much more address space than is in use now."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(spent.ru_utime + spent.ru_stime) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, resource.RLIM_INFINITY))


def _outcome(act: Any) -> tuple[str, str]:
    from deltahub.errors import DeltaHubError

    try:
        act()
    except DeltaHubError as error:
        return error.code, str(error)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"[:500], ""
    return ACCEPTED, ""


def main() -> None:
    import tests.hostile.table  # noqa: F401 - fills the table

    folder = Path(sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr
    template = warm(folder)
    print("{}", file=out, flush=True)
    known: dict[str, dict[str, Any]] = {}
    for line in sys.stdin:
        key = line.rstrip("\n")
        if key not in known:  # all cases of a number share a child: forking so large a process is what costs most
            number = CASES[key].number
            alike = [one for one in CASES.values() if one.number == number]
            known |= fork(alike, folder / f"case{number:02d}", template)
        print(json.dumps(known[key]), file=out, flush=True)


if __name__ == "__main__":
    # Imported under its own name, so that there is one table of cases.
    from tests.hostile.sandbox import main as run

    run()
