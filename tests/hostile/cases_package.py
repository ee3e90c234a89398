"""1 to 11: the package's folder, its paths, and what lies in it."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deltahub
from tests.hostile.corpus import ACCEPTED, Room, case, cases

TERABYTE = 1 << 40


@case(1, "manifest over 1 MiB", "E_MANIFEST_SIZE")
def _(room: Room) -> Any:
    (room.package / "delta.json").write_text(room.text() + " " * (1 << 20))
    data = (room.package / "delta.json").read_bytes()
    from deltahub.manifest import Manifest

    return [*room.refuse(), lambda: Manifest.parse(data), lambda: deltahub.inspect(room.package)]


@case(1, "manifest of a terabyte", "E_MANIFEST_SIZE")
def _(room: Room) -> Any:
    os.truncate(room.package / "delta.json", TERABYTE)
    return room.refuse()


PATHS = {
    "parent": "../delta.safetensors",
    "inner parent": "a/../../delta.safetensors",
    "absolute": "/etc/delta.safetensors",
    "drive": "C:\\delta.safetensors",
    "drive without a root": "C:delta.safetensors",
    "UNC": "\\\\server\\share\\delta.safetensors",
    "backslashes": "a\\..\\b.safetensors",
    "NUL": "delta\0.safetensors",
    "trailing dot": "a./delta.safetensors",
    "trailing space": "a /delta.safetensors",
    "trailing dot at the end": "delta.safetensors.",
    "device": "CON.safetensors",
    "device in a folder": "nul/delta.safetensors",
    "empty name": "a//delta.safetensors",
    "dot": "./delta.safetensors",
    "stream": "delta.safetensors:x",
    "bidi": "delta\u202e.safetensors",
    "too long": "a" * 5000 + ".safetensors",
}


@cases(2, {f"path, {name}": (path, "E_MANIFEST_PATH") for name, path in PATHS.items()})
def _(room: Room, path: str) -> Any:
    room.edit(lambda document: document["files"][0].update(path=path), rehash=False)
    return room.refuse()


@cases(
    3,
    {
        "the same path twice": ("delta.safetensors", "E_MANIFEST_PATH"),
        "equal but for case": ("Delta.safetensors", "E_MANIFEST_PATH"),
        "equal after NFC": ("e\u0301.safetensors", "E_MANIFEST_PATH"),
        "equal after folding": ("stra\u00dfe.safetensors", "E_MANIFEST_PATH"),
    },
)
def _(room: Room, path: str) -> Any:
    other = {"e\u0301.safetensors": "\u00e9.safetensors", "stra\u00dfe.safetensors": "STRASSE.safetensors"}

    def change(document: dict[str, Any]) -> None:
        entry = document["files"][0]
        document["files"] = [{**entry, "path": other.get(path, "delta.safetensors")}, {**entry, "path": path}]

    room.edit(change, rehash=False)
    return room.refuse()


def _moved(room: Room, name: str = "outside.safetensors") -> Path:
    return room.weights.rename(room.folder / name)


@case(4, "symlink out of the package", "E_PACKAGE_OUTSIDE")
def _(room: Room) -> Any:
    room.weights.symlink_to(_moved(room))
    return room.refuse()


@case(4, "folder that is a symlink out", "E_PACKAGE_OUTSIDE")
def _(room: Room) -> Any:
    (room.folder / "elsewhere").mkdir()
    room.weights.rename(room.folder / "elsewhere" / "delta.safetensors")
    (room.package / "inner").symlink_to(room.folder / "elsewhere")
    room.edit(lambda d: d["files"][0].update(path="inner/delta.safetensors"), rehash=False)
    return room.refuse()


@case(4, "manifest that is a symlink out", "E_PACKAGE_OUTSIDE")
def _(room: Room) -> Any:
    outside = (room.package / "delta.json").rename(room.folder / "delta.json")
    (room.package / "delta.json").symlink_to(outside)
    return room.refuse()


@case(4, "hard link out of the package", "E_PACKAGE_OUTSIDE")
def _(room: Room) -> Any:
    room.weights.hardlink_to(_moved(room))
    return room.refuse()


@case(4, "symlink loop", "E_PACKAGE_FILE")
def _(room: Room) -> Any:
    room.weights.unlink()
    room.weights.symlink_to("delta.safetensors")
    return room.refuse()


@case(4, "manifest in a loop", "E_HUB_NOT_A_PACKAGE")
def _(room: Room) -> Any:
    (room.package / "delta.json").unlink()
    (room.package / "delta.json").symlink_to("delta.json")
    return room.refuse()


@case(4, "card that is a symlink out is not published", "E_PACKAGE_OUTSIDE")
def _(room: Room) -> Any:
    hub = room.hub()
    (room.folder / "secret").write_text("my key")
    (room.package / "README.md").symlink_to(room.folder / "secret")
    return lambda: deltahub.push(room.package, "acme/other", endpoint=hub.url, token=hub.token)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket may not be long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


SORTS: dict[str, tuple[object, str]] = {
    "FIFO": (_fifo, "E_PACKAGE_FILE"),
    "socket": (_socket, "E_PACKAGE_FILE"),
    "directory": (Path.mkdir, "E_PACKAGE_FILE"),
    "device": (_device, "E_PACKAGE_OUTSIDE"),
}


@cases(5, {f"{name} as a weight file": sort for name, sort in SORTS.items()})
def _(room: Room, make: Callable[[Path], None]) -> Any:
    room.weights.unlink()
    make(room.weights)
    return room.refuse()


@cases(5, {f"{name} as the manifest": (sort[0], "E_HUB_NOT_A_PACKAGE") for name, sort in SORTS.items()})
def _(room: Room, make: Callable[[Path], None]) -> Any:
    (room.package / "delta.json").unlink()
    make(room.package / "delta.json")
    return room.refuse()


@case(5, "FIFO as the signature", "E_TENSORS_NOT_REGULAR")
def _(room: Room) -> Any:
    from deltahub.sign import Policy

    os.mkfifo(room.package / "model.sig")
    return room.refuse(policy=Policy(require=("*",)))


@case(5, "FIFO as the card", ACCEPTED)
def _(room: Room) -> Any:
    os.mkfifo(room.package / "README.md")
    return lambda: ignored(room, {"README.md"})


@case(6, "listed and missing", "E_PACKAGE_MISSING")
def _(room: Room) -> Any:
    room.weights.unlink()
    return room.refuse()


@case(6, "present and not listed", ACCEPTED)
def _(room: Room) -> Any:
    (room.package / "more.safetensors").write_bytes(b"hidden")
    return lambda: ignored(room, {"more.safetensors"})


def ignored(room: Room, names: set[str]) -> None:
    """Loading names these files and never opens one."""
    import copy

    model = copy.deepcopy(room.model)
    deltahub.load(room.package, backbone=model)
    (delta,) = deltahub.deltas(model).values()
    assert set(delta.report.ignored) == names, delta.report.ignored
    touched = {path.relative_to(room.package).as_posix() for path in room.opened if path.is_relative_to(room.package)}
    assert touched == {"delta.json", "delta.safetensors"}, touched


ALTERED = {
    "another size": ("size", "E_TENSORS_SIZE"),
    "another digest": ("sha256", "E_TENSORS_SHA256"),
    "one bit of the file": ("bit", "E_TENSORS_SHA256"),
    "cut by one byte": ("cut", "E_TENSORS_SIZE"),
    "one byte more": ("more", "E_TENSORS_SIZE"),
}


def _altered(room: Room, what: str) -> None:
    data = bytearray(room.weights.read_bytes())
    if what == "size":
        room.edit(lambda d: d["files"][0].update(size=len(data) + 1))
    elif what == "sha256":
        room.edit(lambda d: d["files"][0].update(sha256="0" * 64))
    else:
        data[-1] ^= 1
        room.weights.write_bytes({"bit": data, "cut": data[:-1], "more": data + b"\0"}[what])


@cases(7, ALTERED)
def _(room: Room, what: str) -> Any:
    _altered(room, what)
    return room.refuse()


def _pulled(room: Room) -> Any:
    return lambda: deltahub.pull(room.package)


@cases(7, {f"{name}, pulled": (what, "E_HUB_DIGEST") for name, (what, _) in ALTERED.items()})
def _(room: Room, what: str) -> Any:
    _altered(room, what)
    return _pulled(room)


@case(4, "symlink out of the package, pulled", "E_HUB_PATH")
def _(room: Room) -> Any:
    room.weights.symlink_to(_moved(room))
    return _pulled(room)


@case(4, "symlink loop, pulled", "E_HUB_PATH")
def _(room: Room) -> Any:
    room.weights.unlink()
    room.weights.symlink_to("delta.safetensors")
    return _pulled(room)


@case(5, "FIFO, pulled", "E_TENSORS_NOT_REGULAR")
def _(room: Room) -> Any:
    room.weights.unlink()
    os.mkfifo(room.weights)
    return _pulled(room)


@case(6, "listed and missing, pulled", "E_HUB_FILE_NOT_FOUND")
def _(room: Room) -> Any:
    room.weights.unlink()
    return _pulled(room)


INDEXES: dict[str, tuple[object, str]] = {
    "parent": ("../../secret.safetensors", "E_BACKBONE_INDEX"),
    "absolute": ("/etc/passwd", "E_BACKBONE_INDEX"),
    "missing": ("model-2.safetensors", "E_TENSORS_MISSING"),
    "pickle": ("pytorch_model.bin", "E_BACKBONE_INDEX"),
    "not a string": (3, "E_BACKBONE_INDEX"),
}


@cases(8, {f"index of the backbone, {name}": given for name, given in INDEXES.items()})
def _(room: Room, name: object) -> Any:
    from deltahub.tensors import TensorFile

    weights = room.backbone / "model.safetensors"
    with TensorFile.open(weights) as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(file, name)}
    weights.rename(room.folder / "secret.safetensors")
    (room.backbone / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    (room.backbone / "model.safetensors.index.json").write_text(json.dumps(index))
    return lambda: room.load(backbone=room.backbone)


@case(8, "index in a package", ACCEPTED)
def _(room: Room) -> Any:
    index = {"weight_map": {"lora/model.layers.0.self_attn.q_proj/up": "../../etc/passwd"}}
    (room.package / "delta.safetensors.index.json").write_text(json.dumps(index))
    return lambda: ignored(room, {"delta.safetensors.index.json"})


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch pwned",))


CODE = (
    "delta.bin",
    "delta.pt",
    "delta.pkl",
    "modeling_delta.py",
    "delta.so",
    "delta.zip",
    "__init__.py",
    "conftest.py",
)


@case(9, "pickles, code and archives beside it", ACCEPTED)
def _(room: Room) -> Any:
    for name in CODE:
        (room.package / name).write_bytes(pickle.dumps(_Evil()) if not name.endswith("py") else b"raise SystemExit")
    os.chdir(room.package)
    sys.path.insert(0, "")
    return lambda: ignored(room, set(CODE))


@cases(9, {f"listed, {name}": (name, "E_MANIFEST_PATH") for name in CODE})
def _(room: Room, name: str) -> Any:
    (room.package / name).write_bytes(room.weights.read_bytes())
    room.edit(lambda d: d["files"].append({**d["files"][0], "path": name}), rehash=False)
    return room.refuse()


@cases(9, {f"pickle as {name}": (name, "E_BACKBONE_WEIGHTS") for name in ("pytorch_model.bin", "model.pt")})
def _(room: Room, name: str) -> Any:
    (room.backbone / "model.safetensors").unlink()
    (room.backbone / name).write_bytes(pickle.dumps(_Evil()))
    return lambda: room.load(backbone=room.backbone)


@case(9, "pickle that runs code, asked for", "E_IDENTITY_PICKLE")
def _(room: Room) -> Any:
    (room.backbone / "model.safetensors").unlink()
    buffer = io.BytesIO()
    import torch

    torch.save(_Evil(), buffer)
    (room.backbone / "pytorch_model.bin").write_bytes(buffer.getvalue())
    return lambda: room.load(backbone=room.backbone, allow_pickle=True)


def _with_code(room: Room, **members: object) -> None:
    path = room.backbone / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}
    path.write_text(json.dumps(config | members))
    (room.backbone / "modeling_evil.py").write_text("raise SystemExit")


@case(9, "backbone that brings code for a class that is known", ACCEPTED)
def _(room: Room) -> Any:
    _with_code(room)
    backbone = room.backbone

    def act() -> None:
        room.load(backbone=backbone)
        assert "modeling_evil" not in sys.modules
        assert backbone / "modeling_evil.py" not in room.opened

    return act


@case(9, "backbone that brings code for a class that is not", "E_BACKBONE_CLASS")
def _(room: Room) -> Any:
    _with_code(room, model_type="evil", architectures=["Evil"])
    room.edit(lambda d: d["backbone"].pop("source", None))
    backbone = room.backbone
    return lambda: room.load(backbone=backbone, verify=None)


@cases(9, {f"class {name}": (name, code) for name, code in {
    "os.system": "E_BACKBONE_LIBRARY",
    "builtins.eval": "E_BACKBONE_LIBRARY",
    "transformers.pipeline": "E_BACKBONE_CLASS",
    "transformers.utils.subprocess.Popen": "E_BACKBONE_SOURCE",
    "transformers.os": "E_BACKBONE_CLASS",
}.items()})  # fmt: skip
def _(room: Room, name: str) -> Any:
    room.edit(lambda d: d["backbone"].update(source={"hub": "org/base", "commit": "0" * 40, "class": name}))
    backbone = room.backbone
    return lambda: room.load(backbone=backbone)


@cases(10, {f"pickle, protocol {n}": (n, "E_TENSORS_NOT_SAFETENSORS") for n in (2, 3, 4, 5)})
def _(room: Room, protocol: int) -> Any:
    room.bytes(pickle.dumps(_Evil(), protocol=protocol))
    return room.refuse()


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        bundle.writestr("archive/data.pkl", pickle.dumps(_Evil()))
    return buffer.getvalue()


@case(10, "zip archive", "E_TENSORS_NOT_SAFETENSORS")
def _(room: Room) -> Any:
    room.bytes(_archive())
    return room.refuse()


@case(10, "zip behind a valid file", "E_TENSORS_LAYOUT")
def _(room: Room) -> Any:
    room.bytes(room.weights.read_bytes() + _archive())
    return room.refuse()


def _swapped(room: Room, path: Path, evil: bytes, act: Callable[[], object]) -> Any:
    """Call something while another file takes a file's place as it is opened for the second time."""
    kept, at = path.read_bytes(), path.stat()
    seen: list[str] = []

    def swap(event: str, args: tuple[Any, ...]) -> None:
        if seen != ["done"] and event == "open" and str(args[0]) == str(path):
            seen.append(event)
            if len(seen) == 2:
                seen[:] = ["done"]
                path.write_bytes(evil)

    def act_swapped() -> None:
        sys.addaudithook(swap)
        try:
            act()
        finally:  # the exchange is the attacker's: it is not held against the call
            seen[:] = ["done"]
            path.write_bytes(kept)
            os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))

    room.forgiven.add(path)
    return act_swapped


@case(11, "weights exchanged after they were pulled", "E_TENSORS_SHA256")
def _(room: Room) -> Any:
    hub = room.hub()
    room.pull(hub)
    (link,) = room.cache.glob("models--*/snapshots/*/delta.safetensors")
    path = link.resolve()
    path.chmod(0o644)
    evil = bytearray(path.read_bytes())
    evil[-1] ^= 1
    return _swapped(room, path, evil, room.from_hub(hub)[1])


@case(11, "manifest exchanged after its signature was checked", "E_PACKAGE_CHANGED")
def _(room: Room) -> Any:
    from deltahub.sign import Policy

    path = room.package / "delta.json"
    evil = path.read_bytes().replace(b'"scale": 2.0', b'"scale": 9.0')
    return _swapped(room, path, evil, lambda: room.load(policy=Policy()))


@case(11, "changed after loading", ACCEPTED)
def _(room: Room) -> Any:
    import copy

    import torch

    from tests.models import ids

    def act() -> None:
        first, second = copy.deepcopy(room.model), copy.deepcopy(room.model)
        deltahub.load(room.package, backbone=first)
        deltahub.load(room.package, backbone=second)
        with torch.no_grad():
            before = first(input_ids=ids()).logits
            kept = room.weights.read_bytes()
            at = room.weights.stat()
            with room.weights.open("r+b") as file:
                file.write(bytes(len(kept)))
            assert torch.equal(second(input_ids=ids()).logits, before)
        room.weights.write_bytes(kept)
        os.utime(room.weights, ns=(at.st_atime_ns, at.st_mtime_ns))

    room.forgiven.add(room.weights)
    return act
