"""Write the vectors whose bytes and numbers are computed, and keep all vector files in one layout.

    python spec/conformance/generate.py            # rewrite
    python spec/conformance/generate.py --check    # exit status 1 if a file would change

Expected values come from plain NumPy and hashlib below, written from SPEC.md; nothing of an implementation is
imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import attention
import composition
import documents
import expressions
import hosts
import methods
import numpy as np
import packages
import refusals

__all__ = ["dump", "main"]

HERE = Path(__file__).resolve().parent
WIDTH = 110


def dump(value: Any, indent: int = 0) -> str:
    """JSON with whatever fits on one line kept there, so that a vector reads like a sentence."""
    flat = json.dumps(value, ensure_ascii=True)
    if not isinstance(value, dict | list) or not value or len(flat) + indent <= WIDTH:
        return flat
    pad, end = " " * (indent + 2), " " * indent
    if isinstance(value, list):
        if all(isinstance(item, int | float) for item in value):
            return flat
        return "[\n" + ",\n".join(pad + dump(item, indent + 2) for item in value) + f"\n{end}]"
    members = (f"{pad}{json.dumps(key)}: {dump(item, indent + 2)}" for key, item in value.items())
    return "{\n" + ",\n".join(members) + f"\n{end}}}"


def write(path: str, op: str, title: str, cases: list[dict[str, Any]], **extra: Any) -> dict[Path, str]:
    """One vector file: where it belongs and what stands in it."""
    head = {"$schema": "../cases.schema.json", "format": 1, "spec": "1.0", "op": op, "title": title}
    return {HERE / path: dump({**head, **extra, "cases": cases}) + "\n"}


# ------------------------------------------------------------------------------------------- identity (section 8)

Stored = tuple[str, tuple[int, ...], bytes]  # dtype, shape, bytes
WIDTHS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def to_bf16(dtype: str, data: bytes) -> bytes:
    """Section 8.1: through F32 to the nearest BF16, ties to even, every NaN to 7FC0."""
    with np.errstate(over="ignore"):
        wide = np.frombuffer(data, WIDTHS[dtype]).astype("<f4")
    bits = wide.view("<u4").astype("u8")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    rounded[np.isnan(wide)] = 0x7FC0
    return bytes(rounded.tobytes())


def leaf(tensor: Stored, *, bf16: bool = False) -> bytes:
    """Section 8.1."""
    dtype, shape, data = tensor
    if bf16 and dtype in WIDTHS:
        dtype, data = "BF16", to_bf16(dtype, data)
    head = b"deltahub:tensor:1\0" + dtype.encode() + b"\0" + struct.pack(f"<B{len(shape)}Q", len(shape), *shape)
    return hashlib.sha256(head + data).digest()


def entry(name: str, leaf_hash: bytes) -> bytes:
    """Section 8.2."""
    raw = name.encode()
    return hashlib.sha256(b"\0" + struct.pack("<I", len(raw)) + raw + leaf_hash).digest()


def tree(hashes: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, over leaf hashes."""
    if len(hashes) < 2:
        return hashes[0] if hashes else hashlib.sha256().digest()
    split = 1 << ((len(hashes) - 1).bit_length() - 1)
    return hashlib.sha256(b"\1" + tree(hashes[:split]) + tree(hashes[split:])).digest()


def identity(
    tensors: dict[str, Stored], tied: dict[str, str] | None = None, excluded: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The members of ``backbone.identity``."""
    names = sorted((n for n in tensors if n not in (tied or {}) and n not in excluded), key=str.encode)
    lines = (f"{n}\0{tensors[n][0]}\0{','.join(map(str, tensors[n][1]))}\n" for n in names)
    found: dict[str, Any] = {
        "algorithm": "sha256-tree-1",
        "exact": tree([entry(n, leaf(tensors[n])) for n in names]).hex(),
        "bf16": tree([entry(n, leaf(tensors[n], bf16=True)) for n in names]).hex(),
        "structure": hashlib.sha256("".join(lines).encode()).hexdigest(),
        "tensors": len(names),
    }
    return found | ({"tied": tied} if tied else {}) | ({"excluded": list(excluded)} if excluded else {})


def stored(dtype: str, values: Any, shape: tuple[int, ...] | None = None) -> Stored:
    """A tensor as it lies in a file."""
    if dtype == "BF16":
        array = np.asarray(values, "<f4")
        return dtype, array.shape if shape is None else shape, to_bf16("F32", array.tobytes())
    array = np.asarray(values, {**WIDTHS, "I64": "<i8", "U8": "u1", "I8": "i1", "BOOL": "u1"}[dtype])
    return dtype, array.shape if shape is None else shape, array.tobytes()


def listed(tensors: dict[str, Stored]) -> list[dict[str, Any]]:
    """Tensors as a request carries them."""
    return [
        {"name": n, "dtype": d, "shape": list(s), "base64": base64.b64encode(b).decode()}
        for n, (d, s, b) in tensors.items()
    ]


def golden() -> dict[str, Stored]:
    return {"a": stored("F32", 1.0), "b.w": stored("BF16", [1.0, 2.0]), "é": stored("I64", [], (0, 4))}


HARD = [0.0, -0.0, 1.0, -1.0, 1.00390625, 1.01171875, 1.0078125, 3.3895313892515355e38, 1e-40, -1e-45, 65504.0, 0.1]
"""Values whose rounding to BF16 ties, overflows or is denormal."""


def identity_vectors() -> dict[Path, str]:
    cases: list[dict[str, Any]] = []

    def case(description: str, clause: str | list[str], tensors: dict[str, Stored], **more: Any) -> None:
        found = identity(tensors, more.get("tied"), tuple(more.get("excluded", ())))
        expect = {k: found[k] for k in ("exact", "bf16", "structure", "tensors")}
        kept = [n for n in tensors if n not in more.get("tied", {}) and n not in more.get("excluded", ())]
        expect["leaves"] = {n: leaf(tensors[n]).hex() for n in kept[:8]}
        cases.append(
            {
                "description": description,
                "clause": clause,
                "tensors": listed(tensors),
                **more,
                "valid": True,
                "expect": expect,
            }
        )

    nan = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000], "<u4").view("<f4")
    master = {"w": stored("F32", HARD), "n": stored("F32", [1.5, -2.25])}
    half = {n: ("BF16", s, to_bf16(d, b)) for n, (d, s, b) in master.items()}
    again = {n: ("F32", s, (np.frombuffer(b, "<u2").astype("<u4") << 16).tobytes()) for n, (_, s, b) in half.items()}
    case(
        "three tensors of different ranks, one without elements",
        ["DH-8.1-1", "DH-8.2-1", "DH-8.2-2", "DH-8.2-3"],
        golden(),
    )
    case("the same, given in another order", "DH-8.2-1", dict(reversed(golden().items())))
    case("no tensors", "DH-8.2-1", {})
    case("one tensor", "DH-8.2-1", {"a": stored("U8", [1, 2, 3])})
    for n in (2, 3, 4, 5, 7, 8, 9):
        case(f"{n} tensors", "DH-8.2-1", {f"layer.{i}": stored("U8", [i]) for i in range(n)})
    case(
        "names are sorted by their bytes, not as text or numbers",
        "DH-8.2-1",
        {n: stored("U8", [i]) for i, n in enumerate(["b", "B", "a.10", "a.2", "é", "e\u0301", "\uff21", "\U0001f600"])},
    )
    case(
        "equal bytes of different dtypes and shapes have different leaves",
        "DH-8.1-1",
        {
            "a": stored("U8", [0, 0, 0, 0]),
            "b": stored("I8", [0, 0, 0, 0]),
            "c": stored("F32", 0.0),
            "d": stored("U8", [[0, 0], [0, 0]]),
        },
    )
    case(
        "renamed and tied tensors share a leaf, and bytes never imply a tie",
        ["DH-8.1-1", "DH-8.3-3"],
        {"a": stored("F32", [1.0, 1.0]), "b": stored("F32", [1.0, 1.0])},
    )
    case("F32 into BF16: ties, overflow, denormals", "DH-8.1-2", master)
    case("its BF16 copy has the same bf16 root", "DH-8.1-2", half)
    case("the F32 copy of that has it too", "DH-8.1-2", again)
    case("NaN of every sort becomes 7FC0; infinities stay", "DH-8.1-2", {"w": stored("F32", nan)})
    case("F16 goes through F32", "DH-8.1-2", {"w": stored("F16", [0.1, 65504.0, 6e-8, -1.5])})
    case("F64 goes through F32", "DH-8.1-2", {"w": stored("F64", [0.1, 1e300, 1.00390625000001, 1e-300])})
    case(
        "integers stay as they are in bf16 mode", "DH-8.1-2", {"w": stored("I64", [1, -1]), "b": stored("BOOL", [0, 1])}
    )
    two = {"embed": stored("F32", [[1.0, 2.0]]), "head": stored("F32", [[1.0, 2.0]])}
    case("a tied alias that is there is left out", "DH-8.3-1", two, tied={"head": "embed"})
    case("a tied alias that is not there changes nothing", "DH-8.3-1", {"embed": two["embed"]}, tied={"head": "embed"})
    case("excluded tensors are left out", "DH-8.3-2", two, excluded=["head"])
    case("excluded names are no patterns", "DH-8.3-2", {**two, "h*": stored("U8", [1])}, excluded=["h*"])
    cases.append({
        "description": "a tied alias that differs", "clause": "DH-8.3-1",
        "tensors": listed({**two, "head": stored("F32", [[1.0, 2.5]])}), "tied": {"head": "embed"},
        "valid": False, "error_code": "E_BACKBONE_TIED",
    })  # fmt: skip
    cases.append({
        "description": "a tied alias of another dtype", "clause": "DH-8.3-1",
        "tensors": listed({**two, "head": stored("F64", [[1.0, 2.0]])}), "tied": {"head": "embed"},
        "valid": False, "error_code": "E_BACKBONE_TIED",
    })  # fmt: skip
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    hashes = [hashlib.sha256(b"\0" + bytes.fromhex(i)).digest() for i in inputs]
    trees = [
        {"description": f"the first {n} leaves of the public test vector of Certificate Transparency", "clause": "DH-8.2-1",
         "hashes": [h.hex() for h in hashes[:n]], "valid": True, "expect": {"root": tree(hashes[:n]).hex()}}
        for n in range(9)
    ]  # fmt: skip
    assert trees[8]["expect"] == {"root": "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"}
    assert identity(golden())["exact"] == "ab9a3cdd808b2280b6ef2a9a9f94bb67e94ea515796a18f49bbcb74244263c61"
    assert identity(golden())["structure"] == "f5a12cf06470f663605058a4596794c8bfc743f69a5c875e99e1da236337de03"
    return {
        **write("identity/identity.json", "identity", "tensors, and the identity of the backbone they make", cases),
        **write("identity/tree.json", "tree", "the Merkle tree hash of RFC 6962 over hashes of leaves", trees),
        **backbone_vectors(),
    }


def backbone_vectors() -> dict[Path, str]:
    """What a loader says of a backbone that is, or is not, the one that was declared."""
    cases: list[dict[str, Any]] = []
    base = {
        "embed": stored("F32", [[0.5, -1.25], [3.0, 0.1]]),
        "layer.0.weight": stored("F32", [[1.0, 2.0], [3.0, 4.0]]),
        "layer.1.weight": stored("F32", [[5.0, 6.0], [7.0, 8.1]]),
    }
    touched = base["layer.0.weight"]
    declared = {
        "identity": identity(base),
        "leaves": {"layer.0.weight": leaf(touched).hex()},
        "leaves_bf16": {"layer.0.weight": leaf(touched, bf16=True).hex()},
    }
    root = {"identity": identity(base)}

    def case(description: str, clause: str, tensors: dict[str, Stored], level: str, result: Any, **more: Any) -> None:
        said = more.get("declared", declared)
        outcome = (
            {"valid": True, "expect": result}
            if isinstance(result, dict)
            else {"valid": False, "error_code": more.get("code", "E_BACKBONE_MISMATCH"), "expect": {"tensors": result}}
        )
        body = {"declared": said, "tensors": listed(tensors), "level": level}
        cases.append({"description": description, "clause": clause, **body, **outcome})

    flipped = {
        **base,
        "layer.0.weight": ("F32", (2, 2), bytes([base["layer.0.weight"][2][0] ^ 1]) + base["layer.0.weight"][2][1:]),
    }
    other = {**base, "embed": stored("F32", [[0.5, -1.25], [3.0, 0.25]])}
    half = {n: ("BF16", s, to_bf16(d, b)) for n, (d, s, b) in base.items()}
    double = {n: ("F64", s, np.frombuffer(b, "<f4").astype("<f8").tobytes()) for n, (d, s, b) in base.items()}
    for level in ("L2", "L3", "L4"):
        case(f"the backbone itself, {level}", "DH-8.4-1", base, level, {"equal": "exact"})
    case("one bit of a touched tensor, seen by L3", "DH-8.4-2", flipped, "L3", ["layer.0.weight"])
    case("one bit of a touched tensor, seen by L4", "DH-8.4-2", flipped, "L4", ["layer.0.weight"])
    case("another value in a tensor that is not touched passes L3", "DH-8.4-1", other, "L3", {"equal": "exact"})
    case("another value in a tensor that is not touched, seen by L4", "DH-8.4-2", other, "L4", [])
    case("without leaves, L4 takes the place of L3", "DH-8.4-1", other, "L3", [], declared=root)
    case(
        "a tensor is missing",
        "DH-8.4-2",
        {n: t for n, t in base.items() if n != "layer.0.weight"},
        "L3",
        ["layer.0.weight"],
    )
    case("a tensor more", "DH-8.4-2", {**base, "more": stored("U8", [1])}, "L2", [])
    case(
        "another shape",
        "DH-8.4-2",
        {**base, "layer.0.weight": stored("F32", [[1.0, 2.0, 3.0, 4.0]])},
        "L3",
        ["layer.0.weight"],
    )
    case(
        "a quantised copy",
        "DH-8.4-2",
        {**base, "layer.0.weight": stored("I8", [[1, 2], [3, 4]])},
        "L3",
        ["layer.0.weight"],
        code=["E_BACKBONE_MISMATCH", "E_BACKBONE_QUANTISED"],
    )
    case("the BF16 copy of an F32 backbone, by its root", "DH-8.4-3", half, "L4", {"equal": "bf16"})
    case("the BF16 copy of an F32 backbone, by its touched tensors", "DH-8.4-3", half, "L3", {"equal": "bf16"})
    case("the F64 copy of an F32 backbone, by its root", "DH-8.4-3", double, "L4", {"equal": "bf16"})
    case(
        "the BF16 copy with one bit changed",
        "DH-8.4-3",
        {**half, "embed": ("BF16", (2, 2), b"\1" + half["embed"][2][1:])},
        "L4",
        [],
    )
    small = {**base, "layer.0.weight": stored("I8", [[1, 2], [3, 4]]), "layer.0.scale": stored("F32", [0.5])}
    listed_root = {**root, "compatible": [{"root": identity(small)["exact"], "relation": "quantised", "method": "awq"}]}
    case(
        "a quantised backbone that the producer lists as compatible",
        "DH-8.4-4",
        small,
        "L4",
        {"equal": "compatible"},
        declared=listed_root,
    )
    same = {**root, "compatible": [{"root": identity(flipped)["exact"], "relation": "repaired"}]}
    for level in ("L3", "L4"):
        case(
            f"a backbone of the same structure that the producer lists as compatible, {level}",
            "DH-8.4-4",
            flipped,
            level,
            {"equal": "compatible"},
            declared={**declared, **same},
        )
    case("a backbone that is neither it nor listed", "DH-8.4-4", flipped, "L4", [], declared=listed_root)
    return write("identity/backbone.json", "backbone", "a declared identity against the tensors of a backbone", cases)


def numeric_vectors() -> dict[Path, str]:
    return {
        **write("expression/valid.json", "apply", "programs, and what they compute", expressions.valid()),
        **write("expression/invalid.json", "kind", "programs that a reader refuses", refusals.refusals()),
        **write(
            "kinds/documents.json", "kind", "kind documents that a reader accepts or refuses", documents.documents()
        ),
        **write("packages/packages.json", "package", "packages, sound and hostile", packages.packages()),
        **write("kinds/builtin.json", "apply", "the built-in kinds on every family of hosts", hosts.kinds()),
        **write(
            "kinds/methods.json", "apply", "the methods of the literature, each on a host or two", methods.methods()
        ),
        **write("kinds/attention.json", "apply", "what takes the place of attention", attention.attentions()),
        **write(
            "composition/forward.json", "forward", "deltas on one host, live and merged", composition.compositions()
        ),
    }


def main() -> int:
    """Write the files, or say which would change."""
    files = {**identity_vectors(), **numeric_vectors()}
    changed = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    check = "--check" in sys.argv[1:]
    for path in changed:
        print(f"{'would change' if check else 'wrote'}: {path.relative_to(HERE)}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
