"""What a call did besides returning: files, imports, processes, sockets, threads, and the bits of a model."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tests.hostile.corpus import Room

__all__ = ["Watch", "state_of"]

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events that change what a path means: where in their arguments the path is, and the folder it is relative to.
_CHANGES = {
    "os.mkdir": [(0, 2)],
    "os.rename": [(0, 2), (1, 3)],
    "os.remove": [(0, 1)],
    "os.rmdir": [(0, 1)],
    "os.symlink": [(1, 2)],
    "os.link": [(1, 3)],
    "os.truncate": [(0, 9)],
    "os.chmod": [(0, 2)],
    "os.chown": [(0, 3)],
}
_PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn"}
_HUB_THREADS = ("AnyIO worker", "asyncio_")
_NEVER = {"pickle.find_class", "code.__new__", "webbrowser.open", "ctypes.dlsym/handle"}


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a refused delta may not change."""
    return {
        "bits": {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "config": str(getattr(model, "config", None)),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for part in ("classes", "flags", "attributes", "config"):
        if before[part] != after[part]:
            yield f"the model's {part} changed"
    old, new = before["bits"], after["bits"]
    for name in old.keys() | new.keys():
        if name not in old or name not in new or old[name].dtype != new[name].dtype:
            yield f"the model's tensor {name} came, went or changed its dtype"
        elif not old[name].equal(new[name]):
            yield f"the model's tensor {name} has other bits"


def _files(root: Path, *without: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if Path(folder, name) not in without]
        for name in [*names, *files]:
            path = Path(folder, name)
            at = path.lstat()
            link = str(path.readlink()) if path.is_symlink() else ""
            # A folder's time changes with the cache in it; its names are compared one by one anyway.
            folder_like = stat.S_ISDIR(at.st_mode)
            found[str(path)] = (at.st_mode, link) if folder_like else (at.st_mode, at.st_size, at.st_mtime_ns, link)
    return found


def _absolute(path: Any, folder: object) -> Path:
    """A path as of :func:`os.open`, relative to an open folder where one is given."""
    name = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        return Path(os.path.normpath(Path(f"/proc/self/fd/{folder}").readlink() / name))
    return Path(os.path.abspath(name))  # noqa: PTH100 - links are not to be followed


def _here(address: object) -> bool:
    return isinstance(address, tuple) and address[0] in {"127.0.0.1", "::1", "localhost"}


def _descriptors() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith(("socket:", "pipe:")) or "/" in target:
            found.add(f"{entry.name} -> {target}")
    return found


def _children() -> list[str]:
    mine = Path("/proc/self/task")
    found: list[str] = []
    for task in mine.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread may end while it is looked at
            found += (task / "children").read_text().split()
    return found


_current: list[Watch] = []
_hooked: list[bool] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _current:
        _current[0].audit(event, args)


class Watch:
    """Between :meth:`start` and :meth:`stop` nothing goes unseen; what was wrong is then in ``problems``.

    Args:
        room: of the case; its model must keep its state, and ``opened`` takes what is opened below its folder.
        allowed: where alone something may be written.
    """

    def __init__(self, room: Room, allowed: tuple[Path, ...]) -> None:
        self.folder, self.model, self.opened = room.folder, room.model, room.opened
        self.pooled = room.pooled
        self.allowed = (*allowed, *room.forgiven)
        self.problems: list[str] = []
        self._on = False
        _current[:] = [self]

    def start(self) -> None:
        if not _hooked:
            _hooked.append(True)
            sys.addaudithook(_hook)  # there is no way to take one off again
        self._state = state_of(self.model)
        self._files = _files(self.folder, *self.allowed)
        self._modules = set(sys.modules)
        self._threads = set(threading.enumerate())
        self._descriptors = _descriptors()
        self._children = _children()
        self._on = True

    def stop(self) -> list[str]:
        self._on = False
        from huggingface_hub import close_session

        close_session()  # connections that the Hub's client keeps for its next request
        self.problems += differences(self._state, state_of(self.model))
        after = _files(self.folder, *self.allowed)
        self.problems += [f"{p} was written" for p in after if after[p] != self._files.get(p)]
        self.problems += [f"{p} is gone" for p in self._files.keys() - after.keys()]
        self.problems += [f"{name} was imported" for name in self._strange()]
        self.problems += [f"the thread {t.name} is left" for t in self._left()]
        self.problems += [f"the descriptor {d} is left" for d in self._open()]
        self.problems += [f"the process {pid} is left" for pid in _children() if pid not in self._children]
        return self.problems

    def _open(self) -> set[str]:
        """Descriptors that are new. The loopback Hub sees a moment later that its client has gone."""
        for _ in range(50):
            found = _descriptors() - self._descriptors
            if not found:
                break
            time.sleep(0.02)
        return {d for d in found if "socket:" not in d or not self.pooled}

    def _left(self) -> set[threading.Thread]:
        """Threads that are new; those of the loopback Hub's own pool belong to the test."""
        return {t for t in threading.enumerate() if t not in self._threads and not t.name.startswith(_HUB_THREADS)}

    def _strange(self) -> list[str]:
        """Modules that are new and belong to nothing that was there: parts of a known package may be loaded late."""
        known = {name.partition(".")[0] for name in self._modules} | sys.stdlib_module_names
        return sorted(name for name in set(sys.modules) - self._modules if name.partition(".")[0] not in known)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open":
            self._file(*args)
        elif event in _CHANGES:
            for at, beside in _CHANGES[event]:
                if isinstance(args[at], str | bytes | os.PathLike):
                    self._written(_absolute(args[at], args[beside] if beside < len(args) else -1))
        elif event in _PROCESSES or event in _NEVER:
            self.problems.append(f"{event} {args!r:.200}")
        elif event == "socket.connect" and not _here(args[1]):
            self.problems.append(f"connected to {args[1]!r}")

    def _file(self, path: object, _: object, flags: int) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor, which was opened before
        where = _absolute(path, -1)
        if flags & _WRITES:
            self._written(where)
        if where.is_relative_to(self.folder):
            self.opened.append(where)

    def _written(self, path: Path) -> None:
        if path != Path(os.devnull) and not any(path.is_relative_to(folder) for folder in self.allowed):
            self.problems.append(f"{path} was opened for writing or changed")
