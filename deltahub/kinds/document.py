"""A kind as a document: read strictly, from TOML in ``spec/kinds`` or from a package's manifest, by the same code."""

from __future__ import annotations

import hashlib
import json
import keyword
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from textwrap import dedent
from types import MappingProxyType
from typing import Any, TypeVar, cast

from deltahub.errors import KindError
from deltahub.kinds.fields import MISSING, Case, ConfigField, Dim, Initial, TensorField, When
from deltahub.kinds.host_shape import FAMILIES
from deltahub.kinds.language import parse
from deltahub.kinds.ops import nearest
from deltahub.kinds.ports import CONTEXT, DTYPES, FACTS, INITIALISERS, LIVE_PORTS, MERGED_PORTS, PORTS
from deltahub.kinds.tables import MAX_ITEMS, Table, plain
from deltahub.kinds.tree import Binary, Items, Name, Negative, Number, Program, references, walk

__all__ = ["CONTEXT", "FACTS", "INITIALISERS", "LIVE_PORTS", "MERGED_PORTS", "PORTS", "Document"]

T = TypeVar("T")

MAX_BYTES = 65536
MAX_RANK = 8
_SIZES = {"d_in", "d_out", "spatial"}
_RESERVED = {"x", "y", "scores", "W", "b", "host", "base", "in", "out", *_SIZES, *CONTEXT}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,63}(\.[a-z0-9][a-z0-9_-]{0,63}){0,8}")
_INIT = re.compile(r"\s*([a-z_]+)\s*(?:\((.*)\)\s*)?", re.DOTALL)
_IN = re.compile(r"\bin\b")
_IN_STAND_IN = "iN"
"""Python reads ``in`` as a keyword; this takes its place in shapes, and no document can spell it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Document:
    """A kind document that was read and checked. Two documents are equal when their content is.

    Attributes:
        name: ``lora`` for the kinds of the specification, ``com.example.gate`` for others.
        version: whole number; a version never changes its meaning.
        title: one line for people.
        reference: the paper, such as ``arXiv:2106.09685``, or empty.
        hosts: families of modules that it can act on.
        identity: whether a fresh one leaves its host as it is: always, never, or when.
        strength: the config number that a user's scale multiplies, or None.
        targets: where an author puts it who names no targets: roles, or whatever else authors may write.
        inputs: where an author gets what those targets read in place of their own inputs, if not there.
        fold: config values under which it is saved: its tensors are then what its ``kv``, ``past`` or ``prompt`` gives.
        context: what its equations ask of the surroundings.
        config: config values by name.
        tensors: tensors by name, in order.
        equations: cases by port.
        source: the document as it was read, for writing it into a package.
        digest: SHA-256 of ``source``.
    """

    name: str
    version: int
    title: str
    reference: str
    hosts: frozenset[str]
    identity: bool | When
    strength: str | None
    targets: tuple[str, ...]
    inputs: tuple[str, ...]
    fold: Mapping[str, object]
    context: tuple[str, ...]
    config: Mapping[str, ConfigField]
    tensors: Mapping[str, TensorField]
    equations: Mapping[str, tuple[Case[Program], ...]]
    source: Mapping[str, Any] = field(repr=False)
    digest: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Document) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[object, ...]:
        return (_reread, (dict(self.source),))

    def __deepcopy__(self, memo: dict[int, object]) -> Document:
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str | None = None) -> Document:
        """Read a document's data model, as TOML or JSON gives it.

        Args:
            data: the document.
            where: what to call it in messages; its own name by default.

        Raises:
            KindError: ``E_KIND_DOCUMENT`` for its structure, ``E_KIND_NAME`` for its names, and the codes of
                :func:`deltahub.kinds.language.parse` for its equations.
        """
        name = data.get("kind") if isinstance(data, dict) else None
        return _Reader(data, where or (f"kind {name}" if isinstance(name, str) else "kind document")).document()

    @classmethod
    def from_toml(cls, text: str, *, where: str) -> Document:
        """Read a document from TOML.

        Raises:
            KindError: as :meth:`parse`, and ``E_KIND_DOCUMENT`` if the text is not TOML.
        """
        if len(text) > MAX_BYTES:
            raise KindError("E_KIND_DOCUMENT", f"the document is longer than {MAX_BYTES} characters", where=where)
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise KindError("E_KIND_DOCUMENT", f"the document is not valid TOML: {error}", where=where) from None
        return cls.parse(data, where=where)


def _reread(source: Mapping[str, Any]) -> Document:
    return Document.parse(source)


class _Reader:
    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.top = Table(data, where, "")
        if not plain(data):
            raise self.top.error(
                "must hold tables, arrays, strings, booleans and finite numbers, at most 8 levels deep"
            )
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        if len(text) > MAX_BYTES:
            raise self.top.error(f"is longer than {MAX_BYTES} characters")
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self.source = json.loads(text)
        self.config: dict[str, ConfigField] = {}
        self.tensors: dict[str, TensorField] = {}

    def document(self) -> Document:
        top = self.top
        name = top.take("kind", str, "a name")
        if not _KIND.fullmatch(name):
            raise top.error(
                "must be a lower-case name, or a reverse domain name such as com.example.gate", name, "kind"
            )
        version = top.take("version", int, "a whole number of at least 1")
        if not 1 <= version <= 2**31:
            raise top.error("must be a whole number of at least 1", version, "version")
        title, reference = top.take("title", str, "a string", ""), top.take("reference", str, "a string", "")
        top.take("description", str, "a string", "")
        hosts = self.strings("hosts", FAMILIES)
        if not hosts:
            raise top.error("must name at least one family", key="hosts")
        self.context = self.strings("context", CONTEXT, default=[])
        for key, table in top.table("config").items():
            self.config[self.name(key, table)] = self.config_field(key, table)
        for key, table in top.table("tensors").items():
            self.tensors[self.name(key, table)] = self.tensor_field(key, table)
        equations = self.equations()
        identity: Any = top.take("identity", (bool, dict), "true, false or a table of conditions", default=False)
        strength: Any = top.take("strength", str, "the name of a config number", None)
        if strength is not None and (strength not in self.config or self.config[strength].type != "number"):
            raise top.error("must be the name of a config number", strength, "strength")
        fold = self.fold(equations)
        targets, inputs = self.targets("targets"), self.targets("inputs")
        top.finish()
        self.check_used(equations, identity)
        return Document(
            name=name,
            version=version,
            title=title,
            reference=reference,
            hosts=frozenset(hosts),
            identity=identity if isinstance(identity, bool) else self.when(identity, "identity"),
            strength=strength,
            targets=targets,
            inputs=inputs,
            fold=MappingProxyType(fold),
            context=self.context,
            config=MappingProxyType(self.config),
            tensors=MappingProxyType(self.tensors),
            equations=MappingProxyType(equations),
            source=MappingProxyType(self.source),
            digest=self.digest,
        )

    def strings(self, key: str, known: tuple[str, ...], default: object = MISSING) -> tuple[str, ...]:
        values: list[object] = self.top.take(key, list, f"an array of {', '.join(known)}", default)
        for value in values:
            if not isinstance(value, str) or value not in known or values.count(value) > 1:
                raise self.top.error(f"must be an array of {', '.join(known)}, each once", value, key)
        return tuple(cast("list[str]", values))

    def targets(self, key: str) -> tuple[str, ...]:
        values: list[object] = self.top.take(key, list, "an array of strings", [])
        for value in values:
            if not isinstance(value, str) or not value or values.count(value) > 1:
                raise self.top.error("must be an array of strings, each once", value, key)
        return tuple(cast("list[str]", values))

    def fold(self, equations: Mapping[str, object]) -> dict[str, object]:
        table = Table(self.top.take("fold", dict, "a table of config values", {}), self.where, "fold")
        for name, value in table.data.items():
            if name not in self.config:
                raise table.error(f"is no config value{nearest(name, list(self.config))}", key=name)
            try:
                self.config[name].check(value, self.where)
            except KindError as error:
                raise table.error(f"can never hold: {error.what}", error.found, name) from None
        if table.data and not {"kv", "past", "prompt"} & set(equations):
            raise self.top.error("has a meaning only beside kv, past or prompt", key="fold")
        return dict(table.data)

    def name(self, name: str, table: Table) -> str:
        why = None
        if not _NAME.fullmatch(name) or keyword.iskeyword(name):
            why = "must be a lower-case name of at most 32 letters, digits and underscores"
        elif name in _RESERVED:
            why = "is a name that the language keeps for itself"
        elif name in self.config or (name in FACTS and table.path.startswith("config")):
            why = "is a name that is already taken"
        if why:
            raise KindError("E_KIND_NAME", f"{table.path} {why}", where=self.where, found=repr(name))
        return name

    def config_field(self, name: str, table: Table) -> ConfigField:
        kind: Any = table.take("type", str, "integer, number, boolean or string")
        if kind not in {"integer", "number", "boolean", "string"}:
            raise table.error("must be integer, number, boolean or string", kind, "type")
        table.take("description", str, "a string", "")
        bounds: dict[str, Any] = {}
        for key in (
            ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if kind in {"integer", "number"} else ()
        ):
            bounds[key.replace("M", "_m")] = table.take(key, (int, float), "a number", None)
        enum: list[object] = table.take("enum", list, "an array", [])
        default = table.data.pop("default", MISSING)
        table.known.append("default")
        table.finish()
        if len(enum) > MAX_ITEMS:
            raise table.error(f"has more than {MAX_ITEMS} entries", key="enum")
        try:
            plain = ConfigField(name=name, type=kind, **bounds)
            whole = ConfigField(name=name, type=kind, **bounds, enum=tuple(plain.check(v, self.where) for v in enum))
            checked = MISSING if default is MISSING else whole.check(default, self.where)
        except KindError as error:
            raise table.error(f"contradicts itself: {error.what}", error.found) from None
        return ConfigField(name=name, type=kind, **bounds, enum=whole.enum, default=checked)

    def when(self, data: object, path: str) -> When:
        table = Table(data, self.where, path)
        result = []
        for name, value in table.data.items():
            known = [*self.config, *FACTS]
            if name not in known:
                raise table.error(f"is neither a config value nor a fact of the host{nearest(name, known)}", key=name)
            allowed = value if isinstance(value, list) else [value]
            if not allowed or any(isinstance(v, dict | list) for v in allowed):
                raise table.error("must be a value or a list of values", value, name)
            if name in self.config:
                try:
                    allowed = [self.config[name].check(v, self.where) for v in allowed]
                except KindError as error:
                    raise table.error(f"can never hold: {error.what}", error.found, name) from None
            elif any(not (v in FAMILIES if name == "family" else isinstance(v, bool)) for v in allowed):
                raise table.error(
                    "must be a family of hosts" if name == "family" else "must be true or false", value, name
                )
            result.append((name, tuple(allowed)))
        return tuple(result)

    def cases(self, value: object, path: str, key: str, read: Callable[[str, str], T]) -> tuple[Case[T], ...]:
        """A string, a table ``{when, key}``, or an array of such tables."""
        if isinstance(value, str):
            return (Case((), read(value, path)),)
        items = value if isinstance(value, list) else [value]
        if not items or len(items) > MAX_ITEMS:
            raise Table({}, self.where, path).error(f"must have 1 to {MAX_ITEMS} cases")
        result = []
        for i, item in enumerate(items):
            at = f"{path}[{i}]" if isinstance(value, list) else path
            table = Table(item, self.where, at)
            text = table.take(key, str, "a string")
            when = self.when(table.take("when", dict, "a table of conditions", {}), f"{at}.when")
            table.finish()
            result.append(Case(when, read(text, at)))
        return tuple(result)

    def tensor_field(self, name: str, table: Table) -> TensorField:
        shape: list[object] = table.take("shape", list, "an array of lengths")
        if len(shape) > MAX_RANK:
            raise table.error(f"has more than {MAX_RANK} axes", key="shape")
        dims = tuple(self.dim(d, f"{table.path}.shape[{i}]") for i, d in enumerate(shape))
        init: Any = table.take("init", (str, dict, list), "an initialiser", "zeros")
        dtype = table.take("dtype", str, "a dtype", "float")
        if dtype not in DTYPES:
            raise table.error(f"must be one of {', '.join(DTYPES)}", dtype, "dtype")
        trainable = table.take("trainable", bool, "true or false", dtype.startswith(("float", "bfloat")))
        if trainable and not dtype.startswith(("float", "bfloat")):
            raise table.error("can only be true for floating types", key="trainable")
        when = self.when(table.take("when", dict, "a table of conditions", {}), f"{table.path}.when")
        table.take("description", str, "a string", "")
        table.finish()
        cases = self.cases(init, f"{table.path}.init", "init", self.initial)
        return TensorField(name=name, dims=dims, init=cases, dtype=dtype, trainable=trainable, when=when)

    def numbers(self, text: str, path: str) -> Program:
        """An expression over config numbers and the host's sizes."""
        shown = dedent(text).strip()
        names = frozenset(
            {n for n, f in self.config.items() if f.type in {"integer", "number"}} | {"out", _IN_STAND_IN}
        )
        program = parse(_IN.sub(_IN_STAND_IN, shown), where=f"{self.where}, {path}", names=names, shown=shown)
        nodes = walk(*(program.result.items if isinstance(program.result, Items) else program.nodes))
        wrong = next((n for n in nodes if not isinstance(n, Number | Name | Negative | Binary)), None)
        if wrong is not None or program.steps:
            place = program.place if wrong is None else wrong.place
            raise place.error("E_KIND_NUMBER", "only numbers and arithmetic can stand here")
        return program

    def dim(self, value: object, path: str) -> Dim:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise Table({}, self.where, path).error("must be a whole number or an expression", value)
        if value in {"*kernel", "*weight"}:
            return Dim(str(value), str(value)[1:], None)
        program = self.numbers(str(value), path)
        if isinstance(program.result, Items):
            raise Table({}, self.where, path).error("must be one length", value)
        return Dim(str(value), None, program)

    def initial(self, text: str, path: str) -> Initial:
        match = _INIT.fullmatch(text)
        if not match or match[1] not in INITIALISERS:
            names = frozenset({"W", "b", *(n for n, f in self.config.items() if f.type != "boolean")})
            return Initial(text, None, parse(dedent(text).strip(), where=f"{self.where}, {path}", names=names))
        name, inside = match[1], (match[2] or "").strip()
        program = self.numbers(f"({inside},)", path) if inside else None
        count = 0 if program is None else len(getattr(program.result, "items", ()))
        fewest, most = INITIALISERS[name]
        if not fewest <= count <= most:
            words = str(fewest) if fewest == most else f"{fewest} to {most}"
            raise Table({}, self.where, path).error(f"takes {words} arguments", text)
        return Initial(text, name, program)

    def equations(self) -> dict[str, tuple[Case[Program], ...]]:
        self.top.known.append("equations")
        table = Table(self.top.data.pop("equations", {}), self.where, "equations")
        result = {}
        for port in [p for p in PORTS if p in table.data]:
            value = table.take(port, (str, dict, list), "an expression, or cases")
            names = {*PORTS[port], "W", "b", *self.tensors, *self.config, *_SIZES, *self.context}
            names -= {n for n, f in self.config.items() if f.type == "boolean"}

            def read(text: str, at: str, port: str = port, names: frozenset[str] = frozenset(names)) -> Program:
                program = parse(dedent(text).strip(), where=f"{self.where}, {at}", names=names)
                self.check_ops(program, port)
                return program

            result[port] = self.cases(value, f"equations.{port}", "expr", read)
        table.known = list(PORTS)
        table.finish()
        if not result:
            raise self.top.error(f"must have at least one of {', '.join(PORTS)}", key="equations")
        return result

    def check_used(self, equations: Mapping[str, tuple[Case[Program], ...]], identity: object) -> None:
        """Whether every tensor and config value has an effect; one that has none was meant otherwise."""
        programs = [case.value for cases in equations.values() for case in cases]
        whens = [case.when for cases in equations.values() for case in cases]
        for entry in self.tensors.values():
            programs += [d.program for d in entry.dims if d.program]
            programs += [case.value.program for case in entry.init if case.value.program]
            whens += [entry.when, *(case.when for case in entry.init)]
        used = {name for program in programs for name in references(program)[0]} | {
            n for when in whens for n, _ in when
        }
        used |= set(identity) if isinstance(identity, dict) else set()
        for part, names in (("tensors", self.tensors), ("config", self.config)):
            for name in names:
                if name not in used:
                    raise self.top.error("is used by no equation, shape or condition", key=f"{part}.{name}")

    def check_ops(self, program: Program, port: str) -> None:
        _, ops = references(program)
        if "host" in ops and port in MERGED_PORTS:
            raise program.place.error("E_KIND_OP", f"host(x, w) has no meaning in the equation of {port}")
        if "base" in ops and port != "replace":
            raise program.place.error("E_KIND_OP", "base(x) has a meaning in the equation of replace only")
