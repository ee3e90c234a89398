"""The model card: metadata that the Hub understands and a page that says what the delta is, from the manifest.

The generated part stands between two HTML comments; what a user wrote before and after them is kept, and so are
metadata fields that are not ours. Cards are only ever read as text and YAML: nothing in them is rendered or run.
"""

from __future__ import annotations

__all__ = ["CardDetails", "kind_tag", "render_card", "root_tags", "split_card"]

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltahub.errors import HubError, printable
from deltahub.hub.picture import draw
from deltahub.hub.plan import PICTURE

if TYPE_CHECKING:
    from deltahub.manifest import Manifest
    from deltahub.manifest import Source as BackboneSource

BEGIN, END = "<!-- deltahub:begin -->", "<!-- deltahub:end -->"
_LONGEST_CARD, _LONGEST_FRONT, _MOST_BRACKETS = 1 << 20, 1 << 17, 500
_TAG_DIGITS = 16
_ORDER = (  # of the metadata, so that the same card comes out whatever was known when
    "library_name",
    "base_model",
    "base_model_relation",
    "license",
    "language",
    "datasets",
    "pipeline_tag",
    "metrics",
    "model-index",
    "tags",
)
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "StableDiffusionPipeline": "text-to-image",
    "SentenceTransformer": "sentence-similarity",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CardDetails:
    """What a manifest does not hold and training knows.

    Attributes:
        license: an identifier of the Hub's list, e.g. ``apache-2.0``.
        language: ISO codes.
        datasets: Hub ids of the training data.
        metrics: name to value, e.g. ``{"accuracy": 0.91}``.
        evaluated_on: what the metrics were measured on.
        summary: a sentence or two for the top of the page.
        tags: further tags.
    """

    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated_on: str | None = None
    summary: str | None = None
    tags: tuple[str, ...] = ()


def kind_tag(kind: str) -> str:
    return f"deltahub-kind-{kind}"


def root_tags(roots: Mapping[str, str]) -> list[str]:
    """Short forms of a backbone's roots (``exact``, ``bf16``, ``structure``) by which its deltas are found."""
    return [f"deltahub-{name}-{root[:_TAG_DIGITS]}" for name, root in roots.items() if root]


def render_card(
    manifest: Manifest,
    *,
    repo_id: str,
    existing: str | None = None,
    details: CardDetails | None = None,
    parameters: Mapping[str, int] | None = None,
) -> str:
    """The README of a package.

    Args:
        manifest: the package's.
        repo_id: where it is published, for the title and the example.
        existing: the card so far; its own text and metadata are kept.
        details: what the manifest does not know.
        parameters: how many numbers each module holds, by module name.

    Raises:
        HubError: ``E_HUB_CARD`` where the existing card's metadata cannot be read.
    """
    details = details or CardDetails()
    metadata, text = split_card(existing or "")
    metadata = _merged(metadata, manifest, details, _title(repo_id))
    generated = f"{BEGIN}\n{_page(manifest, repo_id, _results(metadata), parameters or {})}\n{END}"
    before, found, rest = text.partition(BEGIN)
    if found and END in rest:
        text = before + generated + rest.partition(END)[2]
    elif text.strip():
        text = f"{text.rstrip()}\n\n{generated}\n"
    else:
        summary = f"{details.summary}\n\n" if details.summary else ""
        text = f"# {_title(repo_id)}\n\n{summary}{generated}\n"
    return f"---\n{_dump(metadata)}---\n\n{text.lstrip()}"


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text.

    Raises:
        HubError: ``E_HUB_CARD`` for metadata that are not a plain YAML mapping.
    """
    import yaml

    if len(card) > _LONGEST_CARD:
        raise _bad_card(f"{len(card)} characters")
    match = _FRONT.match(card)
    if match is None:
        return {}, card
    if len(match[1]) > _LONGEST_FRONT or match[1].count("[") + match[1].count("{") > _MOST_BRACKETS:
        raise _bad_card("it is too long or too deep")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same reader, in C where it was built
    try:
        # Aliases make a small text mean a huge one; no card needs them.
        if any(isinstance(token, (yaml.AliasToken, yaml.AnchorToken)) for token in yaml.scan(match[1], loader)):
            raise _bad_card("it uses anchors")
        metadata = yaml.load(match[1], loader) or {}  # noqa: S506 - it is one of the two safe ones
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _bad_card(str(error)) from None
    if not isinstance(metadata, dict):
        raise _bad_card("it is not a mapping")
    return metadata, card[match.end() :].lstrip("\r\n")


def _bad_card(found: str) -> HubError:
    return HubError(
        "E_HUB_CARD", "the metadata at the head of README.md cannot be read", where="README.md", found=found
    )


def _dump(metadata: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, default_flow_style=False))


def _merged(given: Mapping[str, Any], manifest: Manifest, details: CardDetails, name: str) -> dict[str, Any]:
    """Our fields first, then the user's; the user's win where they are a matter of opinion."""
    ours: dict[str, Any] = {"library_name": "deltahub"}
    hub_id = _source(manifest).hub or ""
    if _HUB_ID.fullmatch(hub_id):
        ours |= {"base_model": hub_id, "base_model_relation": "adapter"}
    optional: dict[str, Any] = {
        "license": details.license,
        "language": list(details.language),
        "datasets": list(details.datasets),
        "pipeline_tag": _task(manifest),
    }
    ours |= {key: given.get(key) or value for key, value in optional.items() if given.get(key) or value}
    if details.metrics:
        ours |= {"metrics": list(details.metrics), "model-index": _index(details, name, ours.get("pipeline_tag"))}
    kept = [tag for tag in given.get("tags") or [] if isinstance(tag, str) and not tag.startswith("deltahub")]
    ours["tags"] = list(dict.fromkeys([*_tags(manifest), *details.tags, *kept]))
    merged = {**given, **ours}
    return {
        key: merged[key]
        for key in [*(key for key in _ORDER if key in merged), *(key for key in merged if key not in _ORDER)]
    }


def _index(details: CardDetails, name: str, task: str | None) -> list[dict[str, Any]]:
    """The metrics in the form that the Hub shows and compares; the next push reads them back from there."""
    metrics = [{"type": key, "value": float(value)} for key, value in details.metrics.items() if math.isfinite(value)]
    on = details.evaluated_on or next(iter(details.datasets), "unknown")
    kind = re.sub(r"[^a-z0-9/]+", "-", on.lower()).strip("-") or "unknown"
    result = {"task": {"type": task or "other"}, "dataset": {"name": on, "type": kind}, "metrics": metrics}
    return [{"name": name, "results": [result]}]


def _results(metadata: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Data set, metric and value of every result in the metadata; what has another form is left out."""
    found = []
    try:
        for model in metadata.get("model-index") or []:
            for result in model["results"]:
                on = str(result["dataset"]["name"])
                found += [(on, str(metric["type"]), float(metric["value"])) for metric in result["metrics"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    return found


def _source(manifest: Manifest) -> BackboneSource:
    from deltahub.manifest import Source as BackboneSource

    return manifest.backbone.source or BackboneSource()


def _tags(manifest: Manifest) -> list[str]:
    kinds = list(dict.fromkeys(module.kind for module in manifest.modules))
    identity = manifest.backbone.identity
    roots = {"exact": identity.exact, "bf16": identity.bf16, "structure": identity.structure}
    return ["deltahub", *map(kind_tag, kinds), *root_tags({name: root or "" for name, root in roots.items()})]


def _task(manifest: Manifest) -> str | None:
    name = _source(manifest).class_ or ""
    return next((task for suffix, task in _TASKS.items() if name.endswith(suffix)), None)


# ---- the page


def _title(repo_id: str) -> str:
    return printable(repo_id.rpartition("/")[2])


def _page(
    manifest: Manifest, repo_id: str, results: list[tuple[str, str, float]], parameters: Mapping[str, int]
) -> str:
    source = _source(manifest)
    kinds = _listed(dict.fromkeys(module.kind for module in manifest.modules))
    base = f"[`{source.hub}`](https://huggingface.co/{source.hub})" if source.hub else "a backbone"
    parts = [f"A DeltaHub package: {kinds} for {base}."]
    example = f'import deltahub\n\nmodel = deltahub.load("{repo_id}")'
    parts.append(f"```python\n{example}\n```")
    parts.append(
        "This fetches the package and the backbone, checks both, and returns the backbone with the delta in it."
    )
    parts.append(f"## Where it sits\n\n![Layers from left to right; in colour where the delta acts]({PICTURE})")
    parts.append("```text\n" + draw(manifest) + "\n```")
    parts.append(_table(manifest, parameters))
    parts.append(_numbers(manifest, parameters))
    if manifest.kinds:
        own = _listed(str(document.get("kind")) for document in manifest.kinds)
        parts.append(f"The package brings the kind {own} with it, as data: equations, no code.")
    parts.append(_identity(manifest))
    if results:
        parts.append(_metrics(results))
    return "\n\n".join(part for part in parts if part)


def _table(manifest: Manifest, parameters: Mapping[str, int]) -> str:
    lines = ["| module | kind | config | places | numbers |", "|---|---|---|---:|---:|"]
    for module in manifest.modules:
        config = ", ".join(f"{key} = {value}" for key, value in module.config.items()) or "none"
        count = f"{parameters[module.name]:,}" if module.name in parameters else ""
        cells = (_code(module.name), _code(f"{module.kind} {module.version}"), _cell(config))
        lines.append(f"| {' | '.join(cells)} | {len(module.paths):,} | {count} |")
    return "\n".join(lines)


def _numbers(manifest: Manifest, parameters: Mapping[str, int]) -> str:
    size = sum(file.size for file in manifest.files)
    text = f"{sum(parameters.values()):,} numbers, {_bytes(size)}" if parameters else _bytes(size)
    backbone = sum(file.size for file in manifest.backbone.files or ())
    if backbone:
        text += f"; {100 * size / backbone:.3g} % of the backbone's {_bytes(backbone)}"
    return text + "."


def _identity(manifest: Manifest) -> str:
    source, identity = _source(manifest), manifest.backbone.identity
    rows = [("class", source.class_), ("commit", source.commit), ("exact", identity.exact), ("bf16", identity.bf16)]
    lines = [
        f"| {name} | `{printable(value)}` |" for name, value in [*rows, ("structure", identity.structure)] if value
    ]
    return "## The backbone it belongs to\n\nAnother one is refused.\n\n| | |\n|---|---|\n" + "\n".join(lines)


def _metrics(results: list[tuple[str, str, float]]) -> str:
    lines = [f"| {_cell(on)} | {_cell(metric)} | {value:.4g} |" for on, metric, value in results]
    return "## Results\n\n| data | metric | value |\n|---|---|---:|\n" + "\n".join(lines)


def _listed(names: Iterable[str]) -> str:
    names = [_code(name) for name in names]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _cell(value: object) -> str:
    """Text that cannot leave its cell: no pipes, no line ends, no markup."""
    text = printable(value).replace("\n", " ").replace("\\", "\\\\")
    return re.sub(r"([|`<>\[\]*_])", r"\\\1", text)


def _code(value: object) -> str:
    text = printable(value).replace("\n", " ").replace("`", "'").replace("|", "\\|")
    return f"`{text}`"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
