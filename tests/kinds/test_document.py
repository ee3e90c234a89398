"""Kind documents are read strictly; the schema and the code agree on what they take."""

from __future__ import annotations

import copy
import json
import pickle
import time
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from deltahub.errors import KindError
from deltahub.kinds import Document, Registry, get, names

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "spec" / "kind.schema.json").read_text(encoding="utf-8"))
BUILT_IN = sorted((ROOT / "spec" / "kinds").glob("*.toml"))
SCHEMA_VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

GATE: dict[str, Any] = {
    "kind": "com.example.gate",
    "version": 1,
    "title": "A gate per channel",
    "hosts": ["linear", "conv", "block"],
    "identity": {"open": True},
    "strength": "scale",
    "config": {
        "scale": {"type": "number", "exclusiveMinimum": 0, "default": 1},
        "open": {"type": "boolean", "default": True},
        "act": {"type": "string", "enum": ["tanh", "relu"], "default": "tanh"},
        "extra": {"type": "integer", "minimum": 1, "maximum": 9, "default": 2},
    },
    "tensors": {
        "gate": {
            "shape": ["out"],
            "init": [{"when": {"open": True}, "init": "zeros"}, {"init": "normal(0.1 * scale)"}],
        },
        "mix": {"shape": ["extra", "extra * 2", 3], "init": "xavier_uniform(2)", "trainable": False},
    },
    "equations": {
        "output": [
            {"when": {"open": True}, "expr": "y * (1 + scale * channel(activation(gate, act)))"},
            {"expr": "y * channel(gate) + sum(mix, axis=(0, 1, 2))"},
        ]
    },
}


def changed(path: str, value: object = None) -> dict[str, Any]:
    """The gate with one entry set, or removed where no value is given."""
    data = copy.deepcopy(GATE)
    *parents, last = path.split("/")
    at: Any = data
    for part in parents:
        at = at[int(part) if part.isdigit() else part]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return data


# What both the schema and the code refuse.
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown key": (changed("tittle", "x"), "E_KIND_DOCUMENT", "tittle is unknown; did you mean title?"),
    "unknown key of a tensor": (changed("tensors/gate/inti", "x"), "E_KIND_DOCUMENT", "tensors.gate.inti is unknown"),
    "unknown key of a config": (changed("config/scale/max", 1), "E_KIND_DOCUMENT", "config.scale.max is unknown"),
    "unknown key of a case": (
        changed("equations/output", {"expr": "y", "x": 1}),
        "E_KIND_DOCUMENT",
        "equations.output.x",
    ),
    "unknown port": (changed("equations/outptu", "y"), "E_KIND_DOCUMENT", "did you mean output?"),
    "no name": (changed("kind"), "E_KIND_DOCUMENT", "kind is missing"),
    "bad name": (changed("kind", "Com.Example"), "E_KIND_DOCUMENT", "kind must be a lower-case name"),
    "path in name": (changed("kind", "../lora"), "E_KIND_DOCUMENT", "kind must be"),
    "version 0": (changed("version", 0), "E_KIND_DOCUMENT", "version must be"),
    "version true": (changed("version", True), "E_KIND_DOCUMENT", "version must be"),
    "version text": (changed("version", "1"), "E_KIND_DOCUMENT", "version must be"),
    "no hosts": (changed("hosts", []), "E_KIND_DOCUMENT", "hosts must name"),
    "unknown host": (changed("hosts", ["lstm"]), "E_KIND_DOCUMENT", "hosts must be"),
    "host twice": (changed("hosts", ["conv", "conv"]), "E_KIND_DOCUMENT", "hosts must be"),
    "unknown context": (changed("context", ["clock"]), "E_KIND_DOCUMENT", "context must be"),
    "no equations": (changed("equations", {}), "E_KIND_DOCUMENT", "equations must have at least one"),
    "equation is a number": (changed("equations/output", 1), "E_KIND_DOCUMENT", "equations.output must be"),
    "no case": (changed("equations/output", []), "E_KIND_DOCUMENT", "equations.output must have"),
    "case without expr": (changed("equations/output", {"when": {}}), "E_KIND_DOCUMENT", "expr is missing"),
    "empty list of values": (
        changed("equations/output/0/when", {"open": []}),
        "E_KIND_DOCUMENT",
        "must be a value or a list",
    ),
    "no shape": (changed("tensors/gate/shape"), "E_KIND_DOCUMENT", "tensors.gate.shape is missing"),
    "shape is a string": (changed("tensors/gate/shape", "out"), "E_KIND_DOCUMENT", "tensors.gate.shape must be"),
    "length is a float": (changed("tensors/gate/shape", [1.5]), "E_KIND_DOCUMENT", "tensors.gate.shape[0] must be"),
    "too many axes": (changed("tensors/gate/shape", [1] * 9), "E_KIND_DOCUMENT", "more than 8 axes"),
    "unknown dtype": (changed("tensors/gate/dtype", "complex64"), "E_KIND_DOCUMENT", "tensors.gate.dtype must be"),
    "trainable is a string": (changed("tensors/gate/trainable", "yes"), "E_KIND_DOCUMENT", "trainable must be"),
    "unknown type": (changed("config/scale/type", "float"), "E_KIND_DOCUMENT", "config.scale.type must be"),
    "bound of a string": (changed("config/act/minimum", 1), "E_KIND_DOCUMENT", "config.act.minimum is unknown"),
    "default is an array": (changed("config/scale/default", [1]), "E_KIND_DOCUMENT", "contradicts itself"),
    "tensor name": (changed("tensors/Gate", {"shape": [1]}), "E_KIND_NAME", "tensors.Gate must be a lower-case name"),
    "underscore name": (changed("tensors/__class__", {"shape": [1]}), "E_KIND_NAME", "must be a lower-case name"),
    "long name": (changed("tensors/" + "a" * 33, {"shape": [1]}), "E_KIND_NAME", "at most 32"),
    "long equation": (changed("equations/output", "y" * 9000), "E_KIND_LIMIT", "more than 8192 characters"),
}

# What only the code can see.
CONTRADICTORY: dict[str, tuple[dict[str, Any], str, str]] = {
    "reserved name": (changed("tensors/x", {"shape": [1]}), "E_KIND_NAME", "keeps for itself"),
    "keyword": (changed("tensors/lambda", {"shape": [1]}), "E_KIND_NAME", "must be a lower-case name"),
    "reserved config": (changed("config/in", {"type": "integer"}), "E_KIND_NAME", "must be a lower-case name"),
    "fact as config": (changed("config/bias", {"type": "boolean"}), "E_KIND_NAME", "already taken"),
    "name twice": (changed("tensors/scale", {"shape": [1]}), "E_KIND_NAME", "already taken"),
    "unused tensor": (changed("tensors/spare", {"shape": [1]}), "E_KIND_DOCUMENT", "tensors.spare is used by"),
    "unused config": (changed("config/alpha", {"type": "number"}), "E_KIND_DOCUMENT", "config.alpha is used by no"),
    "default out of bounds": (changed("config/scale/default", 0), "E_KIND_DOCUMENT", "must be greater than 0"),
    "default not in enum": (changed("config/act/default", "gelu"), "E_KIND_DOCUMENT", "must be one of"),
    "enum of another type": (changed("config/act/enum", [1]), "E_KIND_DOCUMENT", "contradicts itself"),
    "when of nothing": (changed("equations/output/0/when", {"opne": True}), "E_KIND_DOCUMENT", "did you mean open?"),
    "when never": (changed("equations/output/0/when", {"act": "gelu"}), "E_KIND_DOCUMENT", "can never hold"),
    "when 1 for true": (changed("equations/output/0/when", {"open": 1}), "E_KIND_DOCUMENT", "can never hold"),
    "when of a fact": (changed("equations/output/0/when", {"bias": "yes"}), "E_KIND_DOCUMENT", "must be true or false"),
    "when of a family": (changed("equations/output/0/when", {"family": "lstm"}), "E_KIND_DOCUMENT", "must be a family"),
    "strength is no number": (changed("strength", "act"), "E_KIND_DOCUMENT", "strength must be"),
    "strength of nothing": (changed("strength", "alpha"), "E_KIND_DOCUMENT", "strength must be"),
    "unknown initialiser": (changed("tensors/gate/init", "zeroes"), "E_KIND_NAME", "unknown name 'zeroes'"),
    "argument too many": (changed("tensors/gate/init", "zeros(1)"), "E_KIND_DOCUMENT", "takes 0 arguments"),
    "argument missing": (changed("tensors/gate/init", "normal"), "E_KIND_DOCUMENT", "takes 1 arguments"),
    "trainable indices": (
        changed("tensors/mix", {"shape": [1], "dtype": "int64", "trainable": True}),
        "E_KIND_DOCUMENT",
        "only be true for floating types",
    ),
    "length of nothing": (changed("tensors/gate/shape", ["width"]), "E_KIND_NAME", "unknown name 'width'"),
    "length by name of a string": (changed("tensors/gate/shape", ["act"]), "E_KIND_NAME", "unknown name 'act'"),
    "length by an operation": (changed("tensors/gate/shape", ["relu(out)"]), "E_KIND_NUMBER", "only numbers"),
    "lengths as a tuple": (changed("tensors/gate/shape", ["out, 2"]), "E_KIND_DOCUMENT", "must be one length"),
    "assignment in a length": (changed("tensors/gate/shape", ["h = out\nh"]), "E_KIND_NUMBER", "only numbers"),
    "boolean in an equation": (changed("equations/output", "y * open"), "E_KIND_NAME", "unknown name 'open'"),
    "y in replace": (changed("equations", {"replace": "y"}), "E_KIND_NAME", "unknown name 'y'"),
    "x in weight": (changed("equations", {"weight": "W * x"}), "E_KIND_NAME", "unknown name 'x'"),
    "context not declared": (changed("equations/output", "y * grid[0]"), "E_KIND_NAME", "unknown name 'grid'"),
    "host in weight": (changed("equations", {"weight": "host(W, W)"}), "E_KIND_OP", "host(x, w) has no meaning"),
    "base in output": (changed("equations/output", "base(x)"), "E_KIND_OP", "replace only"),
    "deep": (changed("description", json.loads('{"a":' * 9 + "1" + "}" * 9)), "E_KIND_DOCUMENT", "8 levels"),
    "infinite": (changed("config/scale/maximum", float("inf")), "E_KIND_DOCUMENT", "finite numbers"),
    "long": (changed("description", "x" * 70000), "E_KIND_DOCUMENT", "longer than 65536"),
}  # fmt: skip


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda p: p.stem)
def test_built_in_documents_are_valid(path: Path) -> None:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    SCHEMA_VALIDATOR.validate(data)
    document = Document.from_toml(path.read_text(encoding="utf-8"), where=path.name)
    assert document == get(document.name, document.version).document
    assert path.stem in {document.name, f"{document.name}@{document.version}"}
    assert document.title
    assert document == Document.parse(json.loads(json.dumps(data)))


def test_the_schema_itself_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_built_in_names() -> None:
    assert {"lora", "bias", "assign", "adapter", "diff"} <= set(names())


def test_a_whole_document() -> None:
    SCHEMA_VALIDATOR.validate(GATE)
    document = Document.parse(GATE)
    assert (document.name, document.version, document.strength) == ("com.example.gate", 1, "scale")
    assert document.identity == (("open", (True,)),)
    assert list(document.tensors) == ["gate", "mix"]
    assert document.tensors["gate"].trainable
    assert not document.tensors["mix"].trainable
    assert document.config["scale"].default == 1.0
    assert len(document.equations["output"]) == 2
    assert document.source == GATE


@pytest.mark.parametrize("case", WRONG)
def test_wrong_documents_are_refused_by_code_and_schema(case: str) -> None:
    data, code, says = WRONG[case]
    with pytest.raises(KindError) as caught:
        Document.parse(data)
    assert caught.value.code == code, str(caught.value)
    assert says in str(caught.value)
    assert not SCHEMA_VALIDATOR.is_valid(data)


@pytest.mark.parametrize("case", CONTRADICTORY)
def test_contradictory_documents_are_refused(case: str) -> None:
    data, code, says = CONTRADICTORY[case]
    start = time.process_time()
    with pytest.raises(KindError) as caught:
        Document.parse(data)
    assert caught.value.code == code, str(caught.value)
    assert says in str(caught.value)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("data", [None, [], "lora", 1, {"kind": "a.b", "version": 1, "hosts": "linear"}])
def test_what_is_no_document_at_all(data: Any) -> None:
    with pytest.raises(KindError, match="E_KIND_DOCUMENT"):
        Document.parse(data)


@pytest.mark.parametrize("text", ["kind = ", "a = 1\na = 2", "[" * 5000, "x" * 70000, "kind = 1979-05-27"])
def test_what_is_no_toml(text: str) -> None:
    with pytest.raises(KindError, match="E_KIND_DOCUMENT"):
        Document.from_toml(text, where="demo.toml")


def test_messages_name_document_and_entry() -> None:
    with pytest.raises(KindError) as caught:
        Document.parse(changed("equations/output", "y * gaet"))
    assert caught.value.where == "kind com.example.gate, equations.output, line 1, column 5"
    assert caught.value.what == "unknown name 'gaet'; did you mean gate?\n    y * gaet\n        ^"


def test_in_is_a_length_and_shown_as_written() -> None:
    Document.parse(changed("tensors/gate/shape", ["in // 2"]))
    with pytest.raises(KindError) as caught:
        Document.parse(changed("tensors/gate/shape", ["in * witdh"]))
    assert caught.value.what.split("\n")[1] == "    in * witdh"


def test_equality_is_of_content() -> None:
    first, second = Document.parse(GATE), Document.parse(json.loads(json.dumps(GATE)))
    assert first == second
    assert hash(first) == hash(second)
    assert first != Document.parse(changed("version", 2))
    assert copy.deepcopy(first) is first
    assert pickle.loads(pickle.dumps(first)) == first


def test_a_registry_takes_a_package_s_own_kinds() -> None:
    registry = Registry([GATE, changed("version", 3)])
    assert registry.get("com.example.gate").version == 3
    assert registry.get("com.example.gate", 1).document == Document.parse(GATE)
    assert registry.get("lora") == get("lora")
    assert [kind.version for kind in registry.own] == [1, 3]
    assert registry.names() == sorted([*names(), "com.example.gate"])
    assert "com.example.gate" not in names()


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([changed("kind", "lora")], "must have a reverse domain name"),
        ([changed("kind", "gate")], "must have a reverse domain name"),
        ([GATE, GATE], "is given twice"),
    ],
)
def test_a_package_cannot_take_a_name(documents: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(KindError, match=says) as caught:
        Registry(documents)
    assert caught.value.code == "E_KIND_NAME"


def test_unknown_kinds() -> None:
    with pytest.raises(KindError, match="unknown kind 'loraa'; did you mean lora") as caught:
        get("loraa")
    assert caught.value.code == "E_KIND_UNKNOWN"
    with pytest.raises(KindError, match="has no version 7 here"):
        get("lora", 7)
