"""``deltahub kinds``: all of them in a table, or one as a page."""

from __future__ import annotations

__all__: list[str] = []

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import typer

from deltahub.cli.base import Json, app, as_plain, as_table, show


@app.command()
def kinds(
    name: Annotated[str | None, typer.Argument(help="One kind; all of them by default.")] = None, as_json: Json = False
) -> None:
    """List the kinds of delta, or show one: equations, tensors, hosts, and what others call it."""
    from deltahub import kinds as room

    if name is not None:
        show(room.get(name).document.source, as_json, lambda source: _page(source, room.also_called(name)))
        return
    documents = [room.get(known).document for known in room.names()]
    rows = [
        {"kind": d.name, "version": d.version, "hosts": sorted(d.hosts), "title": d.title, "reference": d.reference}
        | {"also": room.also_called(d.name)}
        for d in documents
    ]
    show(rows, as_json, lambda r: as_table((d["kind"], ", ".join(d["hosts"]), d["title"]) for d in r))


def _page(source: Mapping[str, Any], also: Mapping[str, str]) -> Iterator[str]:
    yield f"{source['kind']}@{source['version']}  {source.get('title', '')}"
    if source.get("description"):
        yield str(source["description"])
    yield ""
    facts = [("hosts", ", ".join(source["hosts"])), ("paper", source.get("reference", "")), ("needs", _needs(source))]
    yield from _rows((label, text) for label, text in facts if text)
    if also:
        yield from _section("what others call it", also.items())
    from deltahub.explorer.equations import equation_rows

    yield from _section("equations", _equations(equation_rows(as_plain(source["equations"]))))
    yield from _section("tensors", ((key, *_tensor(tensor)) for key, tensor in source.get("tensors", {}).items()))
    yield from _section("config", ((key, *_field(field)) for key, field in source.get("config", {}).items()))


def _needs(source: Mapping[str, Any]) -> str:
    return ", ".join(map(str, as_plain(source.get("context", ()))))


def _equations(rows: Iterable[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    for row in rows:
        when = f"   where {row['when']}" if row["when"] else ""
        first, *more = row["text"].strip().splitlines()
        yield row["port"], first + ("" if more else when)
        for n, line in enumerate(more):
            yield "", line + (when if n == len(more) - 1 else "")


def _tensor(tensor: Mapping[str, Any]) -> tuple[str, str]:
    said = [f"where {key} = {_value(value)}" for key, value in tensor.get("when", {}).items()]
    starts = as_plain(tensor.get("init", ""))
    if isinstance(starts, str) and starts:
        said.append(f"starts as {starts}")
    elif starts:
        said.append("starts as " + ", else ".join(str(case["init"]) for case in starts))
    if not tensor.get("trainable", True):
        said.append("not trained")
    return f"[{', '.join(map(str, tensor['shape']))}]", "; ".join(said)


def _field(field: Mapping[str, Any]) -> tuple[str, str]:
    said = [f"{word} {field[key]}" for key, word in (("minimum", "at least"), ("maximum", "at most")) if key in field]
    if "enum" in field:
        said.append("one of " + ", ".join(map(_value, field["enum"])))
    said.append(f"default {_value(field['default'])}" if "default" in field else "must be given")
    if field.get("description"):
        said.append(str(field["description"]))
    return str(field["type"]), "; ".join(said)


def _value(value: Any) -> str:
    return json.dumps(as_plain(value), ensure_ascii=False)


def _section(title: str, rows: Iterable[Iterable[object]]) -> Iterator[str]:
    listed = list(_rows(rows))
    if listed:
        yield ""
        yield title
        yield from listed


def _rows(rows: Iterable[Iterable[object]]) -> Iterator[str]:
    return (f"  {line}" for line in as_table(rows))
