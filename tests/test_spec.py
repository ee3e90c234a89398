"""SPEC.md is held to its own rules: numbered clauses, examples that validate, tables that say what the code does.

``python tests/test_spec.py`` rewrites the tables that are drawn from data.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

SPEC = ROOT / "SPEC.md"
CLAUSE = re.compile(r"\*\*\[(DH-[0-9.]+-[0-9]+)\]\*\*")
HEADING = re.compile(r"^#{2,3} ([0-9]+(?:\.[0-9]+)?) ", re.MULTILINE)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text() -> str:
    return SPEC.read_text(encoding="utf-8")


def clauses() -> list[str]:
    return CLAUSE.findall(text())


def prose() -> str:
    return FENCE.sub("", text())


# ------------------------------------------------------------------------------------------------ tables from data


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def limits_table() -> str:
    source = (ROOT / "spec" / "limits.toml").read_text(encoding="utf-8")
    notes, room = {}, ""
    for line in source.splitlines():
        if line.startswith("["):
            room = line.strip("[]")
        elif match := re.match(r"(\w+) = [\d_]+ +# (.*)", line):
            notes[room, match[1]] = match[2]
    rows = [
        f"| `{room}.{name}` | {spaced(value)} | {notes[room, name]} |"
        for room, table in tomllib.loads(source).items()
        for name, value in table.items()
    ]
    from deltahub.kinds import check, document, fields, language, layout

    rows += [
        f"| `kinds.{name}` | {spaced(value)} | {what} |"
        for name, value, what in (
            ("document", document.MAX_BYTES, "characters of a document, as compact JSON"),
            ("items", document.MAX_ITEMS, "config values, tensors, cases, or values of an `enum`"),
            ("text", language.MAX_TEXT, "characters of one program"),
            ("nodes", language.MAX_NODES, "names, numbers, operators and calls in one program"),
            ("unrolled", language.MAX_UNROLLED, "the same, with loops unrolled"),
            ("depth", language.MAX_DEPTH, "expressions inside one another, and open brackets"),
            ("tensor", layout.MAX_ELEMENTS, "elements of one tensor of a delta"),
            (
                "merged_value",
                check.MERGED_FLOOR,
                f"elements of a value in `weight`, `bias`, or {check.MERGED_GROWTH} times those of weight and tensors",
            ),
            (
                "live_value",
                check.LIVE_FLOOR,
                f"elements of a value in the other ports, or {check.LIVE_GROWTH} times those of the activations",
            ),
            ("string", language.MAX_STRING, "characters of a string in a program"),
            ("config_integer", fields.MAX_CONFIG_INTEGER, "greatest integer in a config"),
            ("config_string", fields.MAX_CONFIG_STRING, "characters of a string in a config"),
        )
    ]
    return "\n".join(["| limit | | of |", "|---|---:|---|", *rows])


def ops_table() -> str:
    from deltahub.kinds.ops import OPS

    def cell(value: str) -> str:
        return value.replace("|", "\\|")

    rows = [f"| `{cell(op.signature)}` | {cell(op.doc)} |" for op in OPS.values()]
    return "\n".join(["| op | what it computes |", "|---|---|", *rows])


def kinds_table() -> str:
    rows = []
    for path in sorted((ROOT / "spec" / "kinds").glob("*.toml")):
        kind = tomllib.loads(path.read_text(encoding="utf-8"))
        ports = ", ".join(f"`{port}`" for port in kind["equations"])
        link = f"[`{kind['kind']}`](spec/kinds/{path.name}) {kind['version']}"
        rows.append(f"| {link} | {kind.get('title', '')} | {', '.join(kind['hosts'])} | {ports} |")
    return "\n".join(["| kind | | hosts | ports |", "|---|---|---|---|", *rows])


TABLES = {"limits": limits_table, "ops": ops_table, "kinds": kinds_table}


def with_tables(source: str) -> str:
    for name, table in TABLES.items():
        body = f"<!-- {name}:begin -->\n{table()}\n<!-- {name}:end -->"
        source = re.sub(f"<!-- {name}(:begin -->.*?<!-- {name}:end)? -->", lambda _, b=body: b, source, flags=re.DOTALL)
    return source


def test_tables_are_drawn_from_the_data() -> None:
    assert with_tables(text()) == text(), "run `python tests/test_spec.py`"


# ----------------------------------------------------------------------------------------------------------- clauses


def test_clauses_are_numbered_once_and_where_they_stand() -> None:
    twice = [clause for clause, n in Counter(clauses()).items() if n > 1]
    assert not twice
    section = ""
    for line in prose().splitlines():
        if heading := HEADING.match(line):
            section = heading[1]
        for clause in CLAUSE.findall(line):
            assert clause.removeprefix("DH-").rsplit("-", 1)[0] == section, f"{clause} stands in section {section}"


def test_every_must_belongs_to_a_clause() -> None:
    body = re.sub(r"^## 2 .*?(?=^## 3 )", "", prose(), flags=re.MULTILINE | re.DOTALL)
    items = re.split(r"\n(?=- |\n|#|\|)", body)
    loose = [item.strip() for item in items if re.search(r"\bMUST\b", item) and not CLAUSE.search(item)]
    assert not loose
    tight = [item.strip() for item in items if CLAUSE.search(item) and not re.search(r"\bMUST\b", item)]
    assert not tight, "a clause says MUST or MUST NOT"


def test_error_descriptions_name_clauses_that_exist() -> None:
    known = set(clauses())
    for path in sorted((ROOT / "spec" / "errors").glob("*.toml")):
        for code, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
            assert entry.get("clause") is None or entry["clause"] in known, f"{path.name}: {code}: {entry['clause']}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text()):
        assert (ROOT / target).exists(), target


# ---------------------------------------------------------------------------------------------------------- examples


def examples(kind: str) -> list[str]:
    return [body for info, body in FENCE.findall(text()) if info.split()[1:] == [kind]]


def test_example_manifests_are_valid() -> None:
    import jsonschema

    from deltahub.manifest import Manifest

    schema = json.loads((ROOT / "spec" / "manifest.schema.json").read_text(encoding="utf-8"))
    found = examples("manifest")
    assert found
    for example in found:
        jsonschema.Draft202012Validator(schema).validate(json.loads(example))
        Manifest.parse(example.encode())


def test_example_kinds_are_valid() -> None:
    from deltahub.kinds.document import Document

    found = examples("kind")
    assert found
    for example in found:
        Document.from_toml(example, where="SPEC.md")


def test_every_example_in_json_or_toml_is_marked() -> None:
    for info, _ in FENCE.findall(text()):
        assert info in {"text", "ebnf", "json manifest", "json kind", "toml kind", "json lock", "toml policy"}, info


def test_example_lock_and_policy_are_read(tmp_path: Path) -> None:
    from deltahub.hub import Lock
    from deltahub.sign import Policy

    (lock,) = examples("lock")
    (tmp_path / "deltahub.lock").write_text(lock, encoding="utf-8")
    assert Lock.read(tmp_path / "deltahub.lock").packages[0].source == "hf://user/delta"
    (policy,) = examples("policy")
    (tmp_path / "policy.toml").write_text(policy, encoding="utf-8")
    (tmp_path / "acme.pub").write_bytes(b"a key")
    (tmp_path / "sigstore.json").write_bytes(b"roots")
    read = Policy.read(tmp_path / "policy.toml")
    assert read.demands("acme/delta")
    assert not read.demands("other/one-repository")
    assert read.signers[0].covers("other/one-repository")
    assert (read.signers[1].key, read.signers[1].trust_root) == (b"", b"roots")


if __name__ == "__main__":
    SPEC.write_text(with_tables(text()), encoding="utf-8")
