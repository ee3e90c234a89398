"""The manifest: strict bytes, strict JSON, strict members, nothing lost on a rewrite, schema and code agree."""

from __future__ import annotations

import copy
import json
import pickle
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltahub.errors import DeltaHubError, ManifestError, TargetError
from deltahub.manifest import Manifest, Source, json_schema, schema_text

ROOT = Path(__file__).resolve().parents[1]
HEX = "ab9a3cdd808b2280b6ef2a9a9f94bb67e94ea515796a18f49bbcb74244263c61"
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def minimal() -> dict[str, Any]:
    return {
        "spec_version": "1.0",
        "backbone": {
            "identity": {"algorithm": "sha256-tree-1", "exact": HEX, "bf16": HEX, "structure": HEX, "tensors": 3}
        },
        "modules": [{"name": "m", "kind": "lora", "version": 1, "config": {"rank": 8}, "targets": ["l.{0..3}.{q,v}"]}],
        "files": [{"path": "delta.safetensors", "size": 100, "sha256": HEX}],
    }


def full() -> dict[str, Any]:
    document = minimal()
    document["requires"] = []
    document["backbone"]["source"] = {"hub": "org/name", "commit": "0" * 40, "class": "transformers.BertModel"}
    document["backbone"]["identity"] |= {"tied": {"lm_head.weight": "embed.weight"}, "excluded": ["rotary.inv_freq"]}
    document["backbone"]["files"] = [{"path": "pytorch_model.bin", "size": 5, "sha256": HEX}]
    document["backbone"]["leaves"] = {"l.0.q.weight": HEX}
    document["backbone"]["leaves_bf16"] = {"l.0.q.weight": HEX}
    document["backbone"]["compatible"] = [{"root": HEX, "relation": "quantised", "method": "awq"}]
    document["modules"][0]["removes"] = ["l.0.old.weight"]
    document["kinds"] = [{"kind": "com.example.gate", "version": 1}]
    document["settings"] = [{"on": "config", "path": "a.b", "was": None, "value": [1, None, "x"]}]
    document["files"].append({"path": "probe.safetensors", "size": 9, "sha256": HEX})
    document["probe"] = {"file": "probe.safetensors", "tolerance": {"float32": 1e-5, "bfloat16": 2}}
    document["extensions"] = {"com.example.training": {"epochs": 3, "lines": "a\nb"}}
    return document


def changed(path: str, value: Any = ..., *, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A full manifest with one member set, or removed for ``...``; ``/`` between steps."""
    document = full() if base is None else base
    *steps, last = path.split("/")
    here: Any = document
    for step in steps:
        here = here[int(step)] if isinstance(here, list) else here[step]
    key: Any = int(last) if isinstance(here, list) else last
    if value is ...:
        del here[key]
    else:
        here[key] = value
    return document


def parse(document: Any) -> Manifest:
    return Manifest.parse(json.dumps(document).encode())


def refused(data: bytes | dict[str, Any]) -> DeltaHubError:
    start = time.process_time()
    with pytest.raises(DeltaHubError) as caught:
        Manifest.parse(data if isinstance(data, bytes) else json.dumps(data).encode())
    assert time.process_time() - start < 3
    return caught.value


# ----------------------------------------------------------------------------------------------------------- bytes


def raw(member: str) -> bytes:
    return json.dumps(minimal()).encode()[:-1] + b', "extensions": {"com.example.x": ' + member.encode() + b"}}"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "E_MANIFEST_JSON"),
        (b"[]", "E_MANIFEST_JSON"),
        (b"null", "E_MANIFEST_JSON"),
        (b"{", "E_MANIFEST_JSON"),
        (b"{} x", "E_MANIFEST_JSON"),
        (b"{}\0", "E_MANIFEST_JSON"),
        (b'{"a": 01}', "E_MANIFEST_JSON"),
        (b'{"a": "\n"}', "E_MANIFEST_JSON"),
        (b"\xef\xbb\xbf{}", "E_MANIFEST_ENCODING"),
        (b"\xff\xfe{\0}\0", "E_MANIFEST_ENCODING"),
        (b'{"a": "\xc0\xaf"}', "E_MANIFEST_ENCODING"),
        (b'{"a": "\xed\xa0\x80"}', "E_MANIFEST_ENCODING"),
        (raw('"\\ud800"'), "E_MANIFEST_ENCODING"),
        (raw('{"\\uDFFF": 1}'), "E_MANIFEST_ENCODING"),
        (raw("NaN"), "E_MANIFEST_NUMBER"),
        (raw("-Infinity"), "E_MANIFEST_NUMBER"),
        (raw("[1e999]"), "E_MANIFEST_NUMBER"),
        (raw("9" * 5000), "E_MANIFEST_NUMBER"),
        (raw("9007199254740992"), "E_MANIFEST_NUMBER"),
        (raw('{"a": 1, "a": 1}'), "E_MANIFEST_DUPLICATE_KEY"),
        (raw('{"a": 1, "\\u0061": 1}'), "E_MANIFEST_DUPLICATE_KEY"),
        (b"[" * 100_000, "E_MANIFEST_DEPTH"),
        (b'{"a":' * 100_000, "E_MANIFEST_DEPTH"),
        (raw("[" * 63 + "]" * 63), "E_MANIFEST_DEPTH"),
        (b'"' + b'\\"' * 500_000, "E_MANIFEST_JSON"),
        (b" " * 1_048_577, "E_MANIFEST_SIZE"),
        (b"{" + b",".join(b'"%d":0,"%d":0' % (i, i) for i in range(40_000)) + b"}", "E_MANIFEST_DUPLICATE_KEY"),
    ],
)
def test_bytes_that_are_refused(data: bytes, code: str) -> None:
    assert refused(data).code == code


@pytest.mark.parametrize(
    "member",
    ["9007199254740991", "1.7976931348623157e308", '"\\ud83d\\ude00"', "[" * 62 + "]" * 62, '"[[[[{{{{\\""', "1e-999"],
)
def test_bytes_at_the_edge_are_accepted(member: str) -> None:
    Manifest.parse(raw(member))


def test_every_problem_of_one_step_is_listed_in_order_of_place() -> None:
    error = refused(raw('[1e999, {"b": 1, "b": 2}, NaN]'))
    assert str(error) == (
        "[E_MANIFEST_NUMBER] a number is out of bounds\n"
        '  where:    delta.json: extensions["com.example.x"][0]\n'
        "  expected: a finite number; integers within ±(2^53 - 1)\n"
        "  found:    1e999\n"
        "  also:     [E_MANIFEST_DUPLICATE_KEY] extensions[\"com.example.x\"][1].b: 'b' is given twice\n"
        '  also:     [E_MANIFEST_NUMBER] extensions["com.example.x"][2]: a number is out of bounds'
    )
    document = changed("modules/0/version", "1")
    document["files"][10:] = [{"path": "a"}]
    document["modules"][0]["name"] = "a b"
    error = refused(document)
    assert str(error.where) == "delta.json: files[2].path"
    assert [line.split(" ")[1] for line in error.also] == [
        "files[2].sha256:",
        "files[2].size:",
        "modules[0].name:",
        "modules[0].version:",
    ]


# --------------------------------------------------------------------------------------------------------- members

TYPES = [
    "spec_version", "requires", "backbone", "modules", "kinds", "settings", "files", "probe", "extensions",
    "backbone/source", "backbone/source/hub", "backbone/source/commit", "backbone/source/class",
    "backbone/identity", "backbone/identity/algorithm", "backbone/identity/exact", "backbone/identity/tensors",
    "backbone/identity/tied", "backbone/identity/excluded", "backbone/identity/excluded/0", "backbone/files",
    "backbone/files/0/size", "backbone/leaves", "backbone/leaves/l.0.q.weight", "backbone/compatible",
    "backbone/compatible/0/root", "backbone/compatible/0/relation", "modules/0", "modules/0/name", "modules/0/kind",
    "modules/0/version", "modules/0/config", "modules/0/targets", "modules/0/targets/0", "modules/0/removes",
    "kinds/0", "settings/0", "settings/0/on", "settings/0/path", "files/0", "files/0/path", "files/0/size",
    "files/0/sha256", "probe/file", "probe/tolerance", "probe/tolerance/float32",
]  # fmt: skip
NEEDED = [
    "spec_version", "backbone", "backbone/identity", "backbone/identity/algorithm", "backbone/identity/exact",
    "backbone/identity/bf16", "backbone/identity/structure", "backbone/identity/tensors", "backbone/files/0/sha256",
    "backbone/compatible/0/root", "backbone/compatible/0/relation", "modules", "modules/0/name", "modules/0/kind",
    "modules/0/version", "modules/0/config", "modules/0/targets", "settings/0/on", "settings/0/path", "settings/0/was",
    "settings/0/value", "files", "files/0/path", "files/0/size", "files/0/sha256", "probe/file", "probe/tolerance",
]  # fmt: skip


@pytest.mark.parametrize("path", TYPES)
def test_nothing_of_another_type_is_taken_for_a_value(path: str) -> None:
    right = type(json.loads(json.dumps(_at(full(), path))))
    for wrong in (None, True, 8.5, "8", [["x"]], {"x": "y"}):
        if type(wrong) is right or (right is float and isinstance(wrong, int) and not isinstance(wrong, bool)):
            continue
        document = changed(path, wrong)
        error = refused(document)
        assert error.code == "E_MANIFEST_FIELD", (path, wrong)
        assert str(error.where).startswith(f"delta.json: {path.split('/')[0]}")
        assert not VALIDATOR.is_valid(document), (path, wrong)


def _at(document: Any, path: str) -> Any:
    for step in path.split("/"):
        document = document[int(step)] if isinstance(document, list) else document[step]
    return document


@pytest.mark.parametrize("path", NEEDED)
def test_what_is_needed_is_missed(path: str) -> None:
    document = changed(path)
    error = refused(document)
    assert error.code == "E_MANIFEST_FIELD"
    assert "is missing" in error.what
    assert not VALIDATOR.is_valid(document)


@pytest.mark.parametrize(
    ("path", "values", "code"),
    [
        ("backbone/source/hub", ["/home/me", "./m", "a/b/c", "https://x/y", "org/n@main", "a/..", "..", "a--b", "é",
                                 "~/m", "C:\\m", "org/", "", "a\n", "n" * 97], "E_MANIFEST_FIELD"),
        ("backbone/source/commit", ["main", "0" * 39, "0" * 41, "A" * 40, "refs/pr/1", "0" * 40 + "\n"],
         "E_MANIFEST_FIELD"),
        ("backbone/source/class", ["", "a b", "a.", "os;x", "a()"], "E_MANIFEST_FIELD"),
        ("backbone/identity/algorithm", ["sha256", "blake3", "SHA256-TREE-1"], "E_MANIFEST_FIELD"),
        ("backbone/identity/exact", [HEX[1:], HEX + "0", HEX.upper(), "sha256:" + HEX, "../" + HEX[3:], "０" * 64],
         "E_MANIFEST_FIELD"),
        ("backbone/leaves/l.0.q.weight", [HEX.upper(), HEX[1:]], "E_MANIFEST_FIELD"),
        ("backbone/leaves", [{"a\u202eb": HEX}, {"": HEX}, {"a\x1bb": HEX}, {"a" * 1025: HEX}], "E_MANIFEST_FIELD"),
        ("backbone/identity/tensors", [-1], "E_MANIFEST_FIELD"),
        ("modules", [[]], "E_MANIFEST_FIELD"),
        ("modules/0/name", ["", "1a", "_a", "a.b", "a/b", "a b", "a" * 65, "é", "a\u202eb", "a\n", "__class__"],
         "E_MANIFEST_FIELD"),
        ("modules/0/version", [0, -1], "E_MANIFEST_FIELD"),
        ("modules/0/targets", [[]], "E_MANIFEST_FIELD"),
        ("modules/0/removes", [["a\x1b[2J"], ["a\u202eb"]], "E_MANIFEST_FIELD"),
        ("settings/0/on", ["model", "__class__", "Config"], "E_MANIFEST_FIELD"),
        ("settings/0/path", ["", "a..b", ".a", "__class__", "a._b", "a[0]", "a b", "1a"], "E_MANIFEST_FIELD"),
        ("files/0/size", [-1], "E_MANIFEST_FIELD"),
        ("files/0/path", ["../a.safetensors", "/a.safetensors", "C:/a.safetensors", "C:a.safetensors",
                          "\\\\s\\a.safetensors",
                          "a\\..\\b.safetensors", "a//b.safetensors", "./a.safetensors", "a/../b.safetensors", "",
                          "a\0.safetensors", "a\u202e.safetensors", "a./b.safetensors", "a /b.safetensors",
                          "CON.safetensors", "con/a.safetensors", "a/lpt9.x.safetensors", "nul.safetensors",
                          "delta.bin", "delta.pkl", "a.safetensors.bin", "a.SAFETENSORS", "delta.json", "safetensors"],
         "E_MANIFEST_PATH"),
        ("probe/tolerance/float32", [0, -1e-5], "E_MANIFEST_FIELD"),
        ("extensions", [{"training": 1}, {"Com.Example": 1}, {"com..x": 1}, {"deltahub.x": 1}, {"": 1}, {"com.-x": 1}],
         "E_MANIFEST_EXTENSION"),
    ],
)  # fmt: skip
def test_values_that_are_refused_by_schema_and_code(path: str, values: list[Any], code: str) -> None:
    for value in values:
        document = changed(path, value)
        assert refused(document).code == code, value
        assert not VALIDATOR.is_valid(document), value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("backbone/source/hub", "gpt2"),
        ("backbone/source/hub", "Org_1-x/na.me-2_B"),
        ("backbone/source", {}),
        ("modules/0/name", "aZ_0-9"),
        ("modules/0/config", {"rank": -1, "anything": [None, {"x": "é"}]}),
        ("files/0/path", "über uns/delta.v1 final.safetensors"),
        ("files/0/path", "console/com10.safetensors"),
        ("extensions", {"io.github.some-one": [1, 2]}),
        ("probe/tolerance", {"float16": 0.5}),
    ],
)
def test_values_that_are_accepted_by_schema_and_code(path: str, value: Any) -> None:
    document = changed(path, value)
    assert json.loads(parse(document).to_bytes()) == document
    assert VALIDATOR.is_valid(document)


# ------------------------------------------------------------------------------------------- what only code can say


def test_two_of_one_name() -> None:
    document = full()
    document["modules"].append(document["modules"][0] | {"version": 2})
    document["settings"].append(document["settings"][0] | {"value": 1})
    document["kinds"].append(document["kinds"][0] | {"title": "other"})
    error = refused(document)
    assert error.code == "E_MANIFEST_DUPLICATE"
    assert str(error.where) == "delta.json: kinds[1]"
    assert [line.split(":")[0] for line in error.also] == [
        "[E_MANIFEST_DUPLICATE] modules[1].name",
        "[E_MANIFEST_DUPLICATE] settings[1]",
    ]


@pytest.mark.parametrize("other", ["delta.safetensors", "DELTA.safetensors", "dėlta.safetensors"])
def test_paths_that_some_file_system_takes_for_one(other: str) -> None:
    document = full()
    if other.startswith("dė"):
        document["files"][0]["path"] = "d\u0117lta.safetensors"
        other = "de\u0307lta.safetensors"
    document["files"].append({"path": other, "size": 1, "sha256": HEX})
    error = refused(document)
    assert (error.code, str(error.where)) == ("E_MANIFEST_PATH", "delta.json: files[2].path")


def test_a_probe_must_be_listed() -> None:
    error = refused(changed("probe/file", "other.safetensors"))
    assert (error.code, str(error.where)) == ("E_MANIFEST_FIELD", "delta.json: probe.file")


def test_ties_lead_to_a_tensor_that_is_kept() -> None:
    assert refused(changed("backbone/identity/tied", {"a": "b", "b": "c"})).code == "E_MANIFEST_FIELD"
    assert refused(changed("backbone/identity/tied", {"a": "a"})).code == "E_MANIFEST_FIELD"


@pytest.mark.parametrize(
    ("targets", "code", "place"),
    [
        (["a", "b.*"], "E_TARGET_REGEXP", "modules[0].targets[1]"),
        (["a", r"(\w+\.?)+X"], "E_TARGET_REGEXP", "modules[0].targets[1]"),
        (["a", "a"], "E_TARGET_TWICE", "modules[0].targets[1]"),
        (["a.__class__"], "E_TARGET_SYNTAX", "modules[0].targets[0]"),
        (["a.{0..99999999}"], "E_TARGET_EXPANSION", "modules[0].targets[0]"),
    ],
)
def test_targets_are_expanded_and_the_place_is_named(targets: list[str], code: str, place: str) -> None:
    error = refused(changed("modules/0/targets", targets))
    assert isinstance(error, TargetError)
    assert (error.code, str(error.where)) == (code, f"delta.json: {place}")


def test_the_limit_of_targets_holds_over_all_modules() -> None:
    document = full()
    document["modules"] = [
        {"name": f"m{i}", "kind": "bias", "version": 1, "config": {}, "targets": ["a.{0..59999}"]} for i in range(2)
    ]
    error = refused(document)
    assert (error.code, str(error.where)) == ("E_TARGET_EXPANSION", "delta.json: modules[1].targets[0]")


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "99999999999999999999.0"])
def test_another_major_is_refused_before_its_members_are_read(version: str) -> None:
    error = refused({"spec_version": version, "everything": "else"})
    assert error.code == "E_MANIFEST_VERSION"
    assert error.expected == "1.x"


@pytest.mark.parametrize("version", ["1", "1.0.0", "v1.0", "01.0", "1.00", " 1.0", "1.0\n", "١.0", ""])
def test_a_version_is_two_numbers(version: str) -> None:
    assert refused(changed("spec_version", version)).code == "E_MANIFEST_VERSION"


def test_a_newer_minor_is_accepted_unless_it_requires_what_nobody_knows() -> None:
    document = full() | {"spec_version": "1.12", "licences": ["MIT", None]}
    assert json.loads(parse(document).to_bytes()) == document
    error = refused(document | {"requires": ["time-travel"], "modules": "of another shape"})
    assert (error.code, error.found) == ("E_MANIFEST_REQUIRES", ["time-travel"])


# --------------------------------------------------------------------------------------------------------- rewrite


def test_a_rewrite_loses_nothing_and_adds_nothing() -> None:
    for document in (minimal(), full()):
        assert json.loads(parse(document).to_bytes()) == document
    document = full()
    for path in ("", "backbone", "backbone/source", "backbone/identity", "backbone/files/0", "backbone/compatible/0",
                 "modules/0", "settings/0", "files/0", "probe"):  # fmt: skip
        here = _at(document, path) if path else document
        here |= {
            "note": [1, None, {"a": 1.5}],
            "paths": "mine",
            "model_config": 1,
            "class_": "x",
            "__class__": 2,
            "copy": 3,
        }
    manifest = parse(document)
    assert json.loads(manifest.to_bytes()) == document
    assert manifest.modules[0].paths[0] == "l.0.q"
    assert Manifest.parse(manifest.to_bytes()) == manifest
    assert Manifest.parse(manifest.to_bytes()).to_bytes() == manifest.to_bytes()


def test_the_bytes_are_the_same_for_the_same_content() -> None:
    document = full()
    upside_down = {key: document[key] for key in reversed(document)}
    assert parse(upside_down).to_bytes() == parse(document).to_bytes()
    assert parse(document).to_bytes().endswith(b"}\n")


def test_a_manifest_is_built_in_python_as_well() -> None:
    manifest = Manifest.model_validate(full())
    assert json.loads(manifest.to_bytes()) == full()
    source = Source(hub="gpt2", class_="transformers.GPT2Model", commit=None)  # type: ignore[call-arg]
    assert source.class_ == "transformers.GPT2Model"
    assert manifest.model_copy(update={"probe": None, "kinds": None}).to_bytes()
    assert b"null" not in manifest.model_copy(update={"probe": None, "settings": ()}).to_bytes()


def test_what_no_reader_would_accept_is_not_written() -> None:
    for update in ({"extensions": {"com.example.x": float("nan")}}, {"extensions": {"com.example.x": object()}}):
        with pytest.raises(ManifestError, match="E_MANIFEST_FIELD"):
            parse(full()).model_copy(update=update).to_bytes()
    with pytest.raises(ManifestError, match="E_MANIFEST_NUMBER"):
        parse(full()).model_copy(update={"extensions": {"com.example.x": 2**60}}).to_bytes()


def test_a_manifest_is_a_value() -> None:
    manifest = parse(full())
    assert pickle.loads(pickle.dumps(manifest)) == copy.deepcopy(manifest) == manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.spec_version = "1.1"  # type: ignore[misc]
    assert manifest.modules[0].paths == tuple(f"l.{i}.{n}" for i in range(4) for n in "qv")
    assert manifest.module("m") is manifest.modules[0]
    assert [file.path for file in manifest.tensor_files] == ["delta.safetensors"]


def test_ten_thousand_leaves_and_targets_parse_quickly() -> None:
    document = minimal()
    document["backbone"]["leaves"] = {f"model.layers.{i}.self_attn.q_proj.weight": HEX for i in range(8000)}
    document["modules"][0]["targets"] = ["model.layers.{0..7999}.self_attn.q_proj"]
    data = json.dumps(document).encode()
    start = time.process_time()
    assert len(Manifest.parse(data).modules[0].paths) == 8000
    assert time.process_time() - start < 1


# ---------------------------------------------------------------------------------------------------------- schema


def test_the_schema_on_disk_is_the_models() -> None:
    command = "python -c 'from deltahub.manifest import schema_text; print(schema_text(), end=\"\")'"
    assert (ROOT / "spec/manifest.schema.json").read_text(encoding="utf-8") == schema_text(), f"run {command}"
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert "null" not in json.dumps([v.get("type") for v in json_schema()["$defs"].values()])


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([0.5, "", "a", "8", HEX, "a\u202e", "x.safetensors"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "hub", "path"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted({*TYPES, *NEEDED})), JSON_VALUES)
def test_schema_and_code_agree_on_any_change(path: str, value: Any) -> None:
    document = changed(path, value)
    accepted = VALIDATOR.is_valid(document)
    try:
        manifest = parse(document)
    except DeltaHubError as error:
        only_code = error.code in {"E_MANIFEST_DUPLICATE", "E_TARGET_TWICE"} or "among the files" in error.what
        assert not accepted or only_code
    else:
        assert accepted
        assert json.loads(manifest.to_bytes()) == document


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_bytes_raise_anything_but_our_errors(data: bytes) -> None:
    with pytest.raises(DeltaHubError):
        Manifest.parse(data)
