"""What is measured of one side, each task in the child process that was started for it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.benching.sides import FIRST, Ours, Peft, Side
from deltahub.benching.stopwatch import Timing, peak_during, timed

if TYPE_CHECKING:
    import torch

__all__ = ["TASKS", "Task"]

Found = dict[str, Timing | float]
Task = Callable[[Side, Mapping[str, Any]], Found]
"""From a side on a bare model and the options of the task to timings, and numbers, by what they are of."""


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="deltahub-bench-") as place:
        yield Path(place)


def _repeats(options: Mapping[str, Any], default: int = 5) -> int:
    return int(options.get("repeats", default))


def attach(side: Side, options: Mapping[str, Any]) -> Found:
    """A fresh delta on the bare model."""
    repeats = _repeats(options)
    found: Found = {"sites": float(len(side.paths))}
    found["attach"] = timed(side.attach, after=side.clear, repeats=repeats)
    if isinstance(side, Ours):
        found["attach, in the backbone's dtype"] = timed(side.attach_as_it_is, after=side.clear, repeats=repeats)
    return found


def load(side: Side, options: Mapping[str, Any]) -> Found:
    """From disk onto a model in memory: the first time, and again; and what reading the file alone takes."""
    repeats = _repeats(options)
    with _folder() as place:
        folder = place / "saved"
        side.attach()
        side.fill()
        found: Found = {"save": timed(lambda: side.save(_fresh(place)), repeats=repeats)}
        side.save(folder)
        side.clear()
        file = _largest(folder)
        found["bytes"] = float(file.stat().st_size)

        def again() -> None:
            side.load(folder)

        found["load"] = timed(again, after=side.clear, repeats=repeats)
        if isinstance(side, Ours):
            again()  # the backbone is hashed now: what follows is the package alone
            side.clear()
            found["load, first time"] = timed(again, before=side.forget, after=side.clear, repeats=repeats)
            found |= _floors(file, repeats)
        if isinstance(side, Peft):
            lean = side.load_lean
            found["load, leanest options"] = timed(lambda: lean(folder), after=side.clear, repeats=repeats)
    return found


def _largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _fresh(place: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=place)) / "written"


def _floors(file: Path, repeats: int) -> Found:
    from deltahub.tensors import TensorFile

    def objects() -> object:
        import torch

        data = bytearray(file.stat().st_size)
        with file.open("rb", buffering=0) as stream:
            stream.readinto(data)
        places = entries.values()
        return [torch.frombuffer(data, dtype=torch.uint8, offset=at.begin, count=at.end - at.begin) for at in places]

    entries = dict(TensorFile.open(file).items())
    with file.open("rb") as stream:
        content = stream.read()
    return {
        "floor: reading the file, a tensor object each": timed(objects, repeats=repeats),
        "floor: SHA-256 of the file": timed(lambda: hashlib.sha256(content).digest(), repeats=repeats),
    }


def _inputs(side: Side, rows: int, tokens: int) -> torch.Tensor:
    import torch

    vocabulary = int(side.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))


def forward(side: Side, options: Mapping[str, Any]) -> Found:
    """A forward pass: bare, with the delta live, and merged; eager, and compiled."""
    import torch

    found: Found = {}
    cells = [tuple(cell) for cell in options["cells"]]
    forms: dict[str, Callable[[Any], Any]] = {"": lambda model: model}
    if options.get("compiled"):
        forms["compiled, "] = torch.compile
    for label, form in forms.items():
        for state in ("bare", "live") if isinstance(side, Peft) else ("bare", "live", "merged"):
            if state == "live":
                side.attach()
                side.fill()
            if state == "merged":
                _merge(side)
            model = form(side.live)
            for rows, tokens in cells:
                ids = _inputs(side, rows, tokens)
                with torch.no_grad():
                    call = _pass(model, ids)
                    repeats = max(3, _repeats(options) * (4 if rows * tokens < 16 else 1))
                    found[f"{label}{rows}×{tokens}, {state}"] = timed(call, repeats=repeats)
        side.clear()
        torch.compiler.reset()
    return found


def _merge(side: Side) -> None:
    from deltahub.composition import deltas

    deltas(side.model)[FIRST].merge()


def _pass(model: Any, ids: torch.Tensor, **more: Any) -> Callable[[], object]:
    return lambda: model(input_ids=ids, use_cache=False, **more).logits


def training(side: Side, options: Mapping[str, Any]) -> Found:
    """A step: forward, backward, AdamW; time, and memory beyond the model's and the delta's."""
    import torch

    side.attach()
    side.live.train()
    optimizer = torch.optim.AdamW(side.trainable(), lr=1e-4)
    found: Found = {}
    for rows, tokens in options["cells"]:
        ids = _inputs(side, rows, tokens)

        def step(ids: torch.Tensor = ids) -> None:
            side.live(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        found[f"{rows}×{tokens}, step"] = timed(step, repeats=_repeats(options))
        peak = peak_during(step)
        if peak is not None:
            found[f"{rows}×{tokens}, bytes of a step"] = float(peak)
    return found


def switch(side: Side, options: Mapping[str, Any]) -> Found:
    """One delta in the place of another, with several resident."""
    found: Found = {}
    side.attach("d0")
    resident = 1
    for wanted in options["resident"]:
        for i in range(resident, wanted):
            side.add(f"d{i}")
        resident = wanted
        side.switch("d1")
        turn = iter(range(1, 10_000))
        found[f"{wanted} resident"] = timed(lambda w=wanted, t=turn: side.switch(f"d{next(t) % w}"), repeats=15)  # type: ignore[misc]
    return found


def resident(side: Side, options: Mapping[str, Any]) -> Found:
    """How long the next one takes to load, and what all of them take in memory."""
    from deltahub.benching.stopwatch import _status

    found: Found = {}
    with _folder() as place:
        side.attach()
        side.fill()
        side.save(place / "saved")
        side.clear()
        folder = place / "saved"
        size = _largest(folder).stat().st_size
        side.load(folder, "d0")
        side.load_further(folder, "d1")
        before, count = _status("VmRSS"), 2
        for wanted in options["resident"]:
            last = Timing()
            while count < wanted:
                one = timed(lambda c=count: side.load_further(folder, f"d{c}"), repeats=1, warmup=0)  # type: ignore[misc]
                last.cpu.append(one.cpu[0])
                last.wall.append(one.wall[0])
                count += 1
            if last.cpu:
                tail = Timing(cpu=last.cpu[-5:], wall=last.wall[-5:])
                found[f"loading the last of {wanted}"] = tail
                found[f"{wanted} resident, memory over the files' bytes"] = (_status("VmRSS") - before) / (
                    (count - 2) * size
                )
    return found


def mixed(side: Side, options: Mapping[str, Any]) -> Found:
    """A batch with another delta in every row, beside one delta for all rows and one forward pass for each delta."""
    import torch

    found: Found = {}
    count = int(options["deltas"])
    side.attach("d0")
    for i in range(1, count):
        side.add(f"d{i}")
    side.fill()
    side.live.eval()  # peft's wrapper is fresh, and takes names for rows in this mode only
    side.switch("d0")
    names = [f"d{i}" for i in range(count)]
    for tokens in options["tokens"]:
        ids = _inputs(side, count, tokens)
        repeats = max(3, _repeats(options) * (3 if tokens == 1 else 1))
        with torch.no_grad():
            found[f"{count}×{tokens}, one for all"] = timed(_pass(side.live, ids), repeats=repeats)
            block, more = side.rows(names)
            with block:
                found[f"{count}×{tokens}, one for each row"] = timed(_pass(side.live, ids, **more), repeats=repeats)

            def each(ids: torch.Tensor = ids) -> None:
                for i, name in enumerate(names):
                    side.switch(name)
                    side.live(input_ids=ids[i : i + 1], use_cache=False)

            found[f"{count}×{tokens}, a pass for each"] = timed(each, repeats=3, warmup=1)
            side.switch("d0")
    return found


TASKS: dict[str, Task] = {
    "attach": attach,
    "load": load,
    "forward": forward,
    "training": training,
    "switch": switch,
    "resident": resident,
    "mixed": mixed,
}
