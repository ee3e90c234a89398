"""Packages on disk: what is written is what is read, whole or not at all; what is hostile is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltahub.errors import DeltaHubError, KindError, PackageError, TensorFileError
from deltahub.limits import DEFAULT
from deltahub.manifest import Manifest
from deltahub.package import Package, Probe, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEX = "ab9a3cdd808b2280b6ef2a9a9f94bb67e94ea515796a18f49bbcb74244263c61"
BACKBONE = {"identity": {"algorithm": "sha256-tree-1", "exact": HEX, "bf16": HEX, "structure": HEX, "tensors": 3}}
GATE = {
    "kind": "com.example.gate",
    "version": 1,
    "title": "A gate",
    "hosts": ["linear"],
    "identity": True,
    "tensors": {"gate": {"shape": ["out"], "init": "zeros"}, "half": {"shape": ["out / 2"], "init": "zeros"}},
    "equations": {"output": "y + channel(gate) * y + mean(half, axis=0)"},
}


def module(
    kind: str = "lora", targets: tuple[str, ...] = ("l.{0,1}.q",), name: str = "m", **config: Any
) -> dict[str, Any]:
    config = config or ({"rank": 2, "scale": 2.0} if kind == "lora" else {})
    return {"name": name, "kind": kind, "version": 1, "config": config, "targets": list(targets)}


def members(*modules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"backbone": BACKBONE, "modules": list(modules) or [module()], **more}


def lora(rank: int = 2, d_in: int = 6, d_out: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for path in ("l.0.q", "l.1.q"):
        made[f"m/{path}/down"] = torch.randn(rank, d_in, generator=generator).to(dtype)
        made[f"m/{path}/up"] = torch.randn(d_out, rank, generator=generator).to(dtype)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "p", members(), lora())
    return tmp_path / "p"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None, *, rehash: bool = True) -> None:
    """Change a manifest in place; by default its files are what they are on the disk."""
    document = json.loads((folder / "delta.json").read_bytes())
    if rehash:
        for entry in document["files"]:
            data = (folder / entry["path"]).read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(document)
    (folder / "delta.json").write_text(json.dumps(document))


def with_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "delta.safetensors")
    rewrite(folder)


def refused(path: Path, **options: Any) -> DeltaHubError:
    start = time.process_time()
    with pytest.raises(DeltaHubError) as caught:
        Package.open(path, **options)
    assert time.process_time() - start < 3
    return caught.value


# ------------------------------------------------------------------------------------------------------ round trips


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = lora(dtype=torch.bfloat16)
    package = write(tmp_path / "p", members(), tensors, readme="# Mine\n")
    again = Package.open(tmp_path / "p")
    assert package.manifest == again.manifest
    assert again.names == tuple(sorted(tensors))
    assert list(again.tensors("m")) == ["l.0.q", "l.1.q"]
    for path, held in again.tensors("m").items():
        assert list(held) == ["down", "up"]
        for name, tensor in held.items():
            assert torch.equal(tensor, tensors[f"m/{path}/{name}"])
            assert tensor.dtype == torch.bfloat16
    assert again.shapes("m")["l.0.q"] == {"down": (2, 6), "up": (4, 2)}
    assert {"rank": 2, "scale": 2.0}.items() <= again.config("m").items()
    assert again.kind("m").name == "lora"
    assert again.ignored == ("README.md",)
    assert (tmp_path / "p/README.md").read_text() == "# Mine\n"
    assert sorted(load_file(tmp_path / "p/delta.safetensors")) == sorted(tensors)
    assert again.verify() == {"delta.safetensors": again.manifest.files[0].sha256}
    assert again.probe() is None
    assert "lora@1 × 2" in repr(again)


CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "bias": (module("bias", ("a",)), {"m/a/value": (5,)}),
    "assign linear": (module("assign", ("a",)), {"m/a/weight": (5, 3), "m/a/bias": (5,)}),
    "assign without a bias": (module("assign", ("a",)), {"m/a/weight": (5, 3)}),
    "assign norm": (module("assign", ("a",)), {"m/a/weight": (5,), "m/a/bias": (5,)}),
    "assign conv": (module("assign", ("a",)), {"m/a/weight": (5, 3, 2, 2), "m/a/bias": (5,)}),
    "diff conv without a bias": (module("diff", ("a",)), {"m/a/weight": (5, 3, 7)}),
    "lora conv": (module("lora", ("a",)), {"m/a/down": (2, 6, 3, 3), "m/a/up": (4, 2)}),
    "adapter": (
        module("adapter", ("a",), bottleneck=2),
        {"m/a/down": (2, 5), "m/a/down_bias": (2,), "m/a/up": (5, 2), "m/a/up_bias": (5,)},
    ),
    "sizes differ between targets": (module("bias", ("a", "b")), {"m/a/value": (5,), "m/b/value": (7,)}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_is_consistent_with_some_host(case: str, tmp_path: Path) -> None:
    entry, shapes = CASES[case]
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    assert write(tmp_path / "p", members(entry), tensors).names == tuple(sorted(shapes))
    for name in shapes:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        if name.endswith("/bias"):
            continue  # without it the host simply has none
        with pytest.raises(PackageError, match="E_PACKAGE_TENSORS"):
            write(tmp_path / "q", members(entry), rest)
        with pytest.raises((PackageError, KindError)):
            write(tmp_path / "q", members(entry), tensors | {name: torch.ones(1, 1, 1, 1, 1, 1, 1)})
    assert not (tmp_path / "q").exists()


def test_a_package_brings_its_own_kind_as_data(tmp_path: Path) -> None:
    tensors = {"m/a/gate": torch.ones(6), "m/a/half": torch.ones(3)}
    package = write(tmp_path / "p", members(module("com.example.gate", ("a",)), kinds=[GATE]), tensors)
    assert [kind.name for kind in package.registry.own] == ["com.example.gate"]
    with pytest.raises(KindError, match="E_KIND_SHAPE"):
        write(
            tmp_path / "q",
            members(module("com.example.gate", ("a",)), kinds=[GATE]),
            tensors | {"m/a/half": torch.ones(4)},
        )


def test_a_length_that_cannot_be_read_backwards_is_left_to_the_host(tmp_path: Path) -> None:
    half = {
        "tensors": {"half": {"shape": ["out / 2"], "init": "zeros"}},
        "equations": {"output": "y + mean(half, axis=0)"},
    }
    entry = members(module("com.example.gate", ("a",)), kinds=[GATE | half])
    assert write(tmp_path / "p", entry, {"m/a/half": torch.ones(3)}).names == ("m/a/half",)
    for wrong in ({"m/a/half": torch.ones(3, 1)}, {"m/a/other": torch.ones(3)}, {}):
        with pytest.raises(PackageError, match="E_PACKAGE_TENSORS"):
            write(tmp_path / "q", entry, wrong)


def test_several_modules_share_a_target(tmp_path: Path) -> None:
    tensors = lora() | {"n/l.0.q/value": torch.ones(4)}
    package = write(tmp_path / "p", members(module(), module("bias", ("l.0.q",), "n")), tensors)
    assert list(package.tensors("n")) == ["l.0.q"]
    assert len(package.tensors("m")) == 2


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = lora()
    for name, order in (("a", list(tensors)), ("b", list(reversed(tensors)))):
        write(tmp_path / name, members(), {key: tensors[key] for key in order}, readme="x")
    for file in ("delta.json", "delta.safetensors", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_tensors_go_into_shards(tmp_path: Path) -> None:
    from dataclasses import replace

    package = write(tmp_path / "p", members(), lora(), limits=replace(DEFAULT, package_shard_bytes=100))
    assert [entry.path for entry in package.manifest.files] == [
        "delta-00001-of-00002.safetensors",
        "delta-00002-of-00002.safetensors",
    ]
    assert torch.equal(package.tensors("m")["l.1.q"]["up"], lora()["m/l.1.q/up"])


def test_a_probe_travels_along(tmp_path: Path) -> None:
    probe = Probe(inputs={"input_ids": torch.tensor([[1, 2]])}, outputs={"logits": torch.randn(1, 3)})
    package = write(tmp_path / "p", members(), lora(), probe=probe)
    found = Package.open(tmp_path / "p").probe()
    assert found is not None
    assert torch.equal(found.inputs["input_ids"], probe.inputs["input_ids"])
    assert torch.equal(found.outputs["logits"], probe.outputs["logits"])
    assert found.tolerance == {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
    assert package.names == tuple(sorted(lora()))
    for inputs, outputs in (
        ({}, {"y": torch.ones(1)}),
        ({"x": torch.ones(1)}, {}),
        ({"": torch.ones(1)}, {"y": torch.ones(1)}),
    ):
        with pytest.raises(PackageError, match="E_PACKAGE_PROBE"):
            write(tmp_path / "q", members(), lora(), probe=Probe(inputs=inputs, outputs=outputs))


def test_a_manifest_of_another_package_can_be_written_again(folder: Path, tmp_path: Path) -> None:
    old = Package.open(folder)
    tensors = {name: old.tensor(name) for name in old.names}
    new = write(tmp_path / "q", old.manifest, tensors)
    assert new.manifest == old.manifest
    assert isinstance(new.manifest, Manifest)


def test_the_bytes_that_were_hashed_are_the_bytes_that_are_used(folder: Path) -> None:
    package = Package.open(folder)
    before = package.tensor("m/l.0.q/up").clone()
    data = bytearray((folder / "delta.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "delta.safetensors").write_bytes(data)
    assert torch.equal(package.tensor("m/l.0.q/up"), before)
    with pytest.raises(PackageError, match="E_PACKAGE_CHANGED"):
        package.verify()
    with pytest.raises(TensorFileError, match="E_TENSORS_SHA256"):
        Package.open(folder)


def test_a_changed_manifest_is_noticed(folder: Path) -> None:
    package = Package.open(folder)
    rewrite(folder, lambda d: d["modules"][0]["config"].update(scale=3.0))
    with pytest.raises(PackageError, match="the manifest was changed"):
        package.verify()


def test_tensors_outlive_their_package(folder: Path) -> None:
    with Package.open(folder) as package:
        tensors = package.tensors("m")
    assert torch.equal(tensors["l.0.q"]["up"], lora()["m/l.0.q/up"])
    with pytest.raises(TensorFileError, match="E_TENSORS_CLOSED"):
        package.tensors("m")


# ------------------------------------------------------------------------------------------------------------ files


def test_unlisted_files_are_named_and_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.bin").write_bytes(b"\x80\x04pickle")
    (folder / "setup.py").write_text("raise SystemExit")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("a")
    (folder / "away").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    with (folder / "huge.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    assert Package.open(folder).ignored == (
        ".git/", "away", "huge.safetensors", "loop", "model.bin", "notes/a.txt", "pipe", "setup.py",
    )  # fmt: skip


def test_very_many_unlisted_files_are_not_all_named(folder: Path) -> None:
    from dataclasses import replace

    for i in range(20):
        (folder / f"{i:02d}").touch()
    assert Package.open(folder, limits=replace(DEFAULT, package_entries=5)).ignored == (
        "00",
        "01",
        "02",
        "03",
        "04",
        "…",
    )


def test_a_manifest_must_be_a_small_regular_file(folder: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").code == "E_PACKAGE_MISSING"
    assert refused(folder / "delta.json").code == "E_PACKAGE_MISSING"
    (folder / "delta.json").unlink()
    assert refused(folder).code == "E_PACKAGE_MISSING"
    os.mkfifo(folder / "delta.json")
    assert refused(folder).code == "E_PACKAGE_FILE"
    (folder / "delta.json").unlink()
    (folder / "delta.json").mkdir()
    assert refused(folder).code == "E_PACKAGE_FILE"
    (folder / "delta.json").rmdir()
    with (folder / "delta.json").open("wb") as file:
        file.truncate(1 << 40)
    assert refused(folder).code == "E_MANIFEST_SIZE"


def replaced(folder: Path, make: Callable[[Path], object]) -> DeltaHubError:
    """Put something else where the tensor file was, and keep that beside the package."""
    file = folder / "delta.safetensors"
    file.rename(folder.parent / "outside.safetensors")
    make(file)
    return refused(folder)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def test_a_listed_file_must_be_a_regular_file_of_the_package(folder: Path) -> None:
    assert replaced(folder, lambda _: None).code == "E_PACKAGE_MISSING"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: path.mkdir(), "E_PACKAGE_FILE"),
        (os.mkfifo, "E_PACKAGE_FILE"),
        (lambda path: path.symlink_to("delta.safetensors"), "E_PACKAGE_FILE"),
        (lambda path: path.symlink_to("../outside.safetensors"), "E_PACKAGE_OUTSIDE"),
        (lambda path: path.symlink_to(path.parent.parent / "outside.safetensors"), "E_PACKAGE_OUTSIDE"),
        (lambda path: path.hardlink_to(path.parent.parent / "outside.safetensors"), "E_PACKAGE_OUTSIDE"),
        (lambda path: path.symlink_to("/dev/zero"), "E_PACKAGE_OUTSIDE"),
        (lambda path: path.symlink_to("/etc/passwd"), "E_PACKAGE_OUTSIDE"),
        (lambda path: path.symlink_to("nowhere"), "E_PACKAGE_MISSING"),
    ],
    ids=["folder", "pipe", "loop", "link", "absolute link", "hard link", "device", "a file of the system", "dangling"],
)
def test_links_and_special_files(folder: Path, make: Callable[[Path], object], code: str) -> None:
    error = replaced(folder, make)
    assert error.code == code
    assert isinstance(error, PackageError)
    assert "delta.safetensors" in str(error)


def test_a_socket_is_no_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # a socket's path may not be long
        write(Path(short) / "p", members(), lora())
        assert replaced(Path(short) / "p", _socket).code == "E_PACKAGE_FILE"


def test_links_inside_are_fine_and_a_store_is_named_by_the_caller(folder: Path, tmp_path: Path) -> None:
    file = folder / "delta.safetensors"
    file.rename(folder / "real.safetensors")
    file.symlink_to("real.safetensors")
    assert Package.open(folder).ignored == ("real.safetensors",)
    store = tmp_path / "cache" / "blobs"
    store.mkdir(parents=True)
    snapshot = tmp_path / "cache" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for name, source in (("delta.json", folder / "delta.json"), ("delta.safetensors", folder / "real.safetensors")):
        source.rename(store / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert refused(snapshot).code == "E_PACKAGE_OUTSIDE"
    assert Package.open(snapshot, root=tmp_path / "cache").names
    assert refused(snapshot, root=tmp_path / "p").code == "E_PACKAGE_OUTSIDE"


def test_size_and_digest_are_held_against_the_manifest(folder: Path) -> None:
    file = folder / "delta.safetensors"
    whole = file.read_bytes()
    for data, code in (
        (whole[:-1], "E_TENSORS_SIZE"),
        (whole + b"\0", "E_TENSORS_SIZE"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "E_TENSORS_SHA256"),
        (whole[:9] + bytes([whole[9] ^ 1]) + whole[10:], "E_TENSORS_SHA256"),
    ):
        file.write_bytes(data)
        assert refused(folder).code == code
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert refused(folder).code == "E_TENSORS_SIZE"


@pytest.mark.parametrize(
    "data", [b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00", b"PK\x03\x04" + b"\0" * 40, b"", b"\0" * 7]
)
def test_a_pickle_or_an_archive_called_safetensors(folder: Path, data: bytes) -> None:
    (folder / "delta.safetensors").write_bytes(data)
    rewrite(folder)
    assert isinstance(refused(folder), TensorFileError)


def test_a_polyglot_of_tensors_and_an_archive(folder: Path) -> None:
    import io
    import zipfile

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("data.pkl", b"x")
    with (folder / "delta.safetensors").open("ab") as file:
        file.write(archive.getvalue())
    rewrite(folder)
    assert isinstance(refused(folder), TensorFileError)


def test_steps_come_in_the_order_of_the_specification(folder: Path) -> None:
    (folder / "delta.safetensors").write_bytes(b"nothing of the sort")
    rewrite(folder, lambda d: d["modules"][0].update(kind="no-such-kind"), rehash=False)
    error = refused(folder)
    assert error.code == "E_KIND_UNKNOWN"
    assert str(error.where).endswith("delta.json: modules[0].kind")
    rewrite(folder, lambda d: d["modules"][0].update(kind="lora"), rehash=False)
    assert refused(folder).code == "E_TENSORS_SIZE"


# ---------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("name", ["m/l.0.q/extra", "m/l.2.q/up", "n/l.0.q/up", "up", "m/l.0.q", "m//up",
                                  "m/l.0.q/up/up", "base_model.model.l.0.q.lora_A.weight", "m/l.0.q/"])  # fmt: skip
def test_every_tensor_is_used(folder: Path, name: str) -> None:
    with_tensors(folder, lora() | {name: torch.ones(2)})
    assert refused(folder).code in {"E_PACKAGE_TENSORS", "E_KIND_TENSOR"}


def test_every_tensor_is_there(folder: Path) -> None:
    tensors = lora()
    del tensors["m/l.0.q/down"], tensors["m/l.1.q/down"], tensors["m/l.1.q/up"]
    with_tensors(folder, tensors | {"other/x/y": torch.ones(1)})
    error = refused(folder)
    assert error.code == "E_PACKAGE_TENSORS"
    lines = [error.what, *error.also]
    assert len(lines) == 4
    for part in ("'other/x/y'", "'m/l.0.q/down' is missing", "'m/l.1.q/down' is missing", "'m/l.1.q/up' is missing"):
        assert any(part in line for line in lines)


def test_a_tensor_in_two_files(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes((folder / "delta.safetensors").read_bytes())
    rewrite(folder, lambda d: d["files"].append(d["files"][0] | {"path": "b.safetensors"}))
    assert refused(folder).code == "E_PACKAGE_TENSORS"


@pytest.mark.parametrize(
    "change",
    [
        {"m/l.0.q/down": (3, 6)},
        {"m/l.0.q/down": (1, 6)},
        {"m/l.0.q/down": (12,)},
        {"m/l.0.q/up": (2, 4)},
        {"m/l.0.q/up": (4, 2, 1)},
        {"m/l.0.q/up": (4, 1)},
        {"m/l.0.q/up": ()},
    ],
)
def test_shapes_agree_and_are_never_merely_broadcastable(folder: Path, change: dict[str, tuple[int, ...]]) -> None:
    with_tensors(folder, lora() | {name: torch.ones(shape) for name, shape in change.items()})
    error = refused(folder)
    assert error.code in {"E_KIND_SHAPE", "E_PACKAGE_TENSORS"}
    assert "l.0.q" in str(error)


@pytest.mark.parametrize(
    ("rank", "code"),
    [(10**9, "E_KIND_CONFIG"), (0, "E_KIND_CONFIG"), (-1, "E_KIND_CONFIG"), (True, "E_KIND_CONFIG"),
     ("8", "E_KIND_CONFIG"), (65_536, "E_KIND_SHAPE"), (3, "E_KIND_SHAPE")],
)  # fmt: skip
def test_a_rank_that_the_file_does_not_bear_out_takes_no_memory(folder: Path, rank: Any, code: str) -> None:
    rewrite(folder, lambda d: d["modules"][0]["config"].update(rank=rank))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(folder).code == code
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_factors_are_floats(folder: Path, dtype: torch.dtype) -> None:
    with_tensors(folder, {name: tensor.to(dtype) for name, tensor in lora().items()})
    error = refused(folder)
    assert error.code == "E_PACKAGE_TENSORS"
    assert error.expected == "BF16 or F16 or F32 or F64"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_are_finite_unless_the_caller_says_otherwise(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensors = lora(dtype=dtype)
    tensors["m/l.1.q/up"][3, 1] = value
    tensors["m/l.0.q/down"][0, 0] = value
    with pytest.raises(PackageError) as caught:
        write(tmp_path / "p", members(), tensors)
    assert caught.value.code == "E_PACKAGE_VALUES"
    assert "m/l.0.q/down" in caught.value.what + caught.value.also[0]
    assert "m/l.1.q/up" in caught.value.what + caught.value.also[0]
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "p", members(), tensors, allow_nonfinite=True)
    assert refused(tmp_path / "p").code == "E_PACKAGE_VALUES"
    assert Package.open(tmp_path / "p", allow_nonfinite=True).names


def test_values_that_only_their_sum_overflows_are_finite(tmp_path: Path) -> None:
    big = {name: torch.full_like(tensor, 3e38) for name, tensor in lora().items()}
    assert write(tmp_path / "p", members(), big).names


def test_every_wrong_module_of_a_manifest_is_named(folder: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["modules"].append(module("nope", ("a",), "n"))
        document["modules"].append(module("lora", ("b",), "o", rank=0))

    rewrite(folder, change)
    error = refused(folder)
    assert str(error.where).endswith("modules[1].kind")
    assert "modules[2].config" in error.also[0]


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.fixture
def no_large_files() -> Iterator[None]:
    """The system refuses to make any file longer than 300 bytes, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def tree(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_no_space_leaves_nothing(tmp_path: Path, no_large_files: None) -> None:
    with pytest.raises(PackageError) as caught:
        write(tmp_path / "deep" / "p", members(), lora())
    assert caught.value.code == "E_PACKAGE_WRITE"
    assert list(tmp_path.iterdir()) == []


def test_an_old_package_stays_when_a_new_one_fails(folder: Path) -> None:
    before = tree(folder.parent)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, old[1]))
    try:
        with pytest.raises(PackageError, match="E_PACKAGE_WRITE"):
            write(folder, members(), lora(rank=2), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert tree(folder.parent) == before


@pytest.mark.parametrize("step", ["mkdir", "rename"])
def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = tree(folder.parent)
    real = getattr(Path, step)

    def fails(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name.endswith(".part"):
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, step, fails)
    for target, overwrite in ((folder, True), (folder.parent / "new", False)):
        with pytest.raises(PackageError) as caught:
            write(target, members(), lora(), overwrite=overwrite)
        assert caught.value.code == "E_PACKAGE_WRITE"
        assert "Permission denied" in caught.value.what
    assert tree(folder.parent) == before


def test_what_a_reader_would_refuse_is_not_written(tmp_path: Path) -> None:
    for manifest, tensors in (
        (members(module("lora", rank=3, scale=1.0)), lora()),
        (members(), lora() | {"x": torch.ones(1)}),
        (members(module("nope")), lora()),
        (members(module(targets=("l.*",))), lora()),
        ({"modules": [module()]}, lora()),
        (members(extensions={"bad": 1}), lora()),
        (members(), {name: tensor.to("meta") for name, tensor in lora().items()}),
    ):
        with pytest.raises(DeltaHubError) as caught:
            write(tmp_path / "p", manifest, tensors)
        assert ".part" not in str(caught.value), "the place is named as the caller named it"
        assert list(tmp_path.iterdir()) == []


def test_overwriting(folder: Path) -> None:
    with pytest.raises(PackageError, match="overwrite=True replaces a package"):
        write(folder, members(), lora())
    (folder / "README.md").write_text("by hand")
    new = write(folder, members(), lora(rank=2, d_in=9), overwrite=True)
    assert new.shapes("m")["l.0.q"]["down"] == (2, 9)
    assert (folder / "README.md").read_text() == "by hand"
    write(folder, members(), lora(), overwrite=True, readme="new")
    assert (folder / "README.md").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == ["p"]


def test_nothing_but_a_package_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (folder / ".git").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(folder)
    for name in ("p", "thesis", "file", "link"):
        before = tree(tmp_path)
        with pytest.raises(PackageError, match="E_PACKAGE_EXISTS"):
            write(tmp_path / name, members(), lora(), overwrite=True)
        assert tree(tmp_path) == before


def test_an_empty_folder_is_a_place(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    assert write(tmp_path / "p", members(), lora()).path == tmp_path / "p"


def test_a_thousand_sites_open_quickly(tmp_path: Path) -> None:
    tensors = {f"m/l.{i}.q/{name}": torch.ones(2, 2) for i in range(1000) for name in ("down", "up")}
    write(tmp_path / "p", members(module(targets=("l.{0..999}.q",))), tensors)
    start = time.process_time()
    Package.open(tmp_path / "p")
    assert time.process_time() - start < 1


def test_no_torch_is_loaded_to_open_a_package(folder: Path) -> None:
    code = (
        "import sys; from deltahub.package import Package; p = Package.open(sys.argv[1]); p.verify();"
        "assert p.names and p.shapes('m'); assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=root)
