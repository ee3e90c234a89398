"""The sorts of values that a manifest is made of; each is checked the same way by the model and by its JSON Schema."""

from __future__ import annotations

__all__ = [
    "ClassName",
    "Commit",
    "Digest",
    "ExtensionName",
    "FieldPath",
    "HubId",
    "Model",
    "ModuleName",
    "NonEmpty",
    "Optional",
    "Printable",
    "Subfolder",
    "Target",
    "TensorFilePath",
    "Text",
    "Tuple",
    "Version",
    "problems_of",
    "tidy",
]

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
)
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import TypeAliasType

from deltahub.limits import DEFAULT
from deltahub.manifest.filenames import problem_of
from deltahub.manifest.strict_json import Problem, Step

T = TypeVar("T")


class Model(BaseModel):
    """Base of all parts of a manifest: nothing is converted, nothing changes, unknown members are kept."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="allow", protected_namespaces=(), hide_input_in_errors=True
    )

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        for name, field in type(self).model_fields.items():
            if field.default is None and getattr(self, name) is None:
                written.pop(field.alias or name, None)
        return written


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Metadata for a string: what the JSON Schema says of it, and what the model does.

    Attributes:
        pattern: regular expression, in the subset that Python and ECMAScript read alike, for the whole string.
        expected: what the string should be, for a message.
        code: the error's code.
        problem: says what is wrong with a string, or None; used by the model in place of the pattern, where a
            pattern cannot say everything or would not take linear time.
    """

    pattern: str
    expected: str
    code: str = "E_MANIFEST_FIELD"
    problem: Callable[[str], str | None] | None = None

    def _check(self, value: str) -> str:
        if self.problem is not None:
            what = self.problem(value)
        else:
            fits = re.fullmatch(self.pattern, value, re.ASCII) is not None
            what = None if fits else "this is not what may stand here"
        if what is not None:
            raise PydanticCustomError(self.code, "{what}", {"what": what, "expected": self.expected, "found": value})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        # `$` would let Python's readers accept a newline at the end.
        return {**handler(schema), "pattern": f"^(?:{self.pattern})(?![\\s\\S])"}


def _prints(value: str) -> str | None:
    if not 0 < len(value) <= DEFAULT.manifest_text_length:
        return f"a name has 1 to {DEFAULT.manifest_text_length} characters"
    return None if value.isprintable() else "a character of a name does not print"


def _is_tensor_path(value: str) -> str | None:
    what = problem_of(value)
    if what is not None:
        return f"this path is refused: {what}"
    return None if value.endswith(".safetensors") else "a listed file holds tensors and nothing else"


_UNPRINTED = r"\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
_LABEL = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_DEVICE = r"(?:[cC][oO][nN]|[pP][rR][nN]|[aA][uU][xX]|[nN][uU][lL]|(?:[cC][oO][mM]|[lL][pP][tT])[1-9])(?:[./]|$)"
_CHAR = rf"""[^\s./{{}},*?\[\]()|\\^$+"'`{_UNPRINTED}]"""
_RANGE = r"(?:0|[1-9][0-9]*)\.\.(?:0|[1-9][0-9]*)"
_ITEM = rf"(?:{_RANGE}|{_CHAR}+)"
_ELEMENT = rf"(?!__)(?:{_CHAR}|\{{(?:{_RANGE}|{_ITEM}(?:,{_ITEM})+)\}})+"

Digest = TypeAliasType(
    "Digest", Annotated[str, Text(pattern=r"[0-9a-f]{64}", expected="64 lower-case hexadecimal digits")]
)
Commit = TypeAliasType(
    "Commit",
    Annotated[str, Text(pattern=r"[0-9a-f]{40}", expected="40 lower-case hexadecimal digits; no branch, no tag")],
)
Version = TypeAliasType(
    "Version",
    Annotated[str, Text(pattern=r"1\.(?:0|[1-9][0-9]*)", expected="MAJOR.MINOR", code="E_MANIFEST_VERSION")],
)
ModuleName = TypeAliasType(
    "ModuleName",
    Annotated[
        str,
        Text(
            pattern=rf"[A-Za-z][A-Za-z0-9_-]{{0,{DEFAULT.manifest_name_length - 1}}}",
            expected=f"1 to {DEFAULT.manifest_name_length} letters, digits, _ and -, beginning with a letter",
        ),
    ],
)
HubId = TypeAliasType(
    "HubId",
    Annotated[
        str,
        Text(
            pattern=rf"(?![\s\S]*(?:--|\.\.))(?:{_PART}/)?{_PART}",
            expected="namespace/name or name: never a path, never a URL",
        ),
    ],
)
Subfolder = TypeAliasType(
    "Subfolder",
    Annotated[
        str,
        Text(
            pattern=rf"(?![\s\S]*\.\.)(?![\s\S]*(?:^|/)(?:{_DEVICE})){_PART}(?:/{_PART})*",
            expected="names joined by /, inside the repository",
        ),
    ],
)
ClassName = TypeAliasType(
    "ClassName",
    Annotated[str, Text(pattern=r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*", expected="a dotted name")],
)
FieldPath = TypeAliasType(
    "FieldPath",
    Annotated[
        str,
        Text(
            pattern=r"[A-Za-z][A-Za-z0-9_]*(?:\.[A-Za-z][A-Za-z0-9_]*)*",
            expected="identifiers joined by dots, none beginning with _",
        ),
    ],
)
ExtensionName = TypeAliasType(
    "ExtensionName",
    Annotated[
        str,
        Text(
            pattern=rf"(?!deltahub\.){_LABEL}(?:\.{_LABEL})+",
            expected="a reverse-DNS name such as com.example.training; deltahub. is reserved",
            code="E_MANIFEST_EXTENSION",
        ),
    ],
)
Printable = TypeAliasType(
    "Printable",
    Annotated[
        str,
        Text(
            pattern=rf"[^{_UNPRINTED}]{{1,{DEFAULT.manifest_text_length}}}",
            expected="characters that print",
            problem=_prints,
        ),
    ],
)
TensorFilePath = TypeAliasType(
    "TensorFilePath",
    Annotated[
        str,
        Text(
            pattern=rf"(?!(?:[^/]*/)*(?:{_DEVICE}|/|[^/]*[. ](?:/|$)))(?!/)[^\\:{_UNPRINTED}]+\.safetensors",
            expected="a relative path inside the package, with / between names and .safetensors at the end",
            code="E_MANIFEST_PATH",
            problem=_is_tensor_path,
        ),
    ],
)
Target = TypeAliasType(
    "Target",
    Annotated[
        str,
        Text(
            pattern=rf"{_ELEMENT}(?:\.{_ELEMENT})*",
            expected="a path with {a,b} and {0..11}",
            problem=lambda _: None,  # the manifest expands them, which says more than yes or no
        ),
    ],
)


def _not_null(value: Any, info: ValidationInfo) -> Any:
    if value is None and info.context is not None:
        raise PydanticCustomError("E_MANIFEST_FIELD", "{what}", {"what": "null is not an absent member"})
    return value


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _Some:
    """Metadata for an array that is not empty.

    Pydantic's own ``min_length`` counts the items that passed, and so blames a good list for a bad item.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "minItems": 1}

    @staticmethod
    def _check(value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise PydanticCustomError("E_MANIFEST_FIELD", "{what}", {"what": "this list is empty"})
        return value


Optional = Annotated[T | None, BeforeValidator(_not_null)]
"""A member that may be absent. In Python None says so; in JSON null does not."""
Tuple = Annotated[tuple[T, ...], BeforeValidator(_listed)]
"""A JSON array; in Python a tuple, or a list that becomes one."""
NonEmpty = Annotated[tuple[T, ...], BeforeValidator(_listed), _Some()]
"""As :data:`Tuple`, with something in it."""


def problems_of(error: ValidationError) -> list[Problem]:
    """Say in our words what pydantic found, one problem per place."""
    found: dict[tuple[Step, ...], Problem] = {}
    for item in error.errors(include_url=False, include_input=True):
        path = tuple(step for step in item["loc"] if step != "[key]")
        kind, context = item["type"], item.get("ctx", {})
        if kind == "missing":
            problem = Problem(path=path, code="E_MANIFEST_FIELD", what=f"{path[-1]!r} is missing")
        elif kind.startswith("E_"):
            problem = Problem(
                path=path, code=kind, what=context["what"], expected=context.get("expected"), found=context.get("found")
            )
        else:
            problem = Problem(path=path, code="E_MANIFEST_FIELD", what=item["msg"], found=_shown(item["input"]))
        found.setdefault(path, problem)
    return list(found.values())


def _shown(value: Any) -> str:
    kinds = {dict: "an object", list: "an array", type(None): "null"}
    return kinds.get(type(value)) or repr(value)


def tidy(schema: Any) -> Any:
    """Take null, which JSON may not use for an absent member, and pydantic's titles and defaults out of a schema.

    What pydantic says of an object's names by ``patternProperties`` is said by ``propertyNames``, which also refuses.
    """
    if isinstance(schema, list):
        return [tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: tidy(item) for name, item in value.items()}
        elif key == "anyOf" and {"type": "null"} in value:
            (only,) = [item for item in value if item != {"type": "null"}]
            made.update(tidy(only))
        elif key == "patternProperties":
            ((pattern, item),) = value.items()
            made["propertyNames"] = {"pattern": pattern}
            made["additionalProperties"] = tidy(item)
        elif key != "title" and not (key == "default" and value is None):
            made[key] = tidy(value)
    return made
