"""What the page shows, as data inside it, and the page itself."""

from __future__ import annotations

__all__ = ["data_of", "page"]

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from deltahub.errors import printable
from deltahub.explorer.equations import equation_rows
from deltahub.inspecting import Inspection, Node, Structure

if TYPE_CHECKING:
    import numpy as np

    from deltahub.manifest import Manifest

_BINS = 48
_MOST = 1 << 24
"""Numbers of one histogram; of more tensors than that, the first are taken."""


def page(found: Inspection | Structure) -> str:
    """One self-contained page of HTML: no request is made when it is opened."""
    folder = files("deltahub.explorer")
    parts = {name: folder.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    text = json.dumps(data_of(found), ensure_ascii=False, separators=(",", ":"))
    for raw in "<>&\u2028\u2029":  # nothing in it can end the element that holds it
        text = text.replace(raw, f"\\u{ord(raw):04x}")
    html = parts["html"].replace("{{title}}", escape(printable(found.source) or "deltahub"))
    return html.replace("{{css}}", parts["css"]).replace("{{js}}", parts["js"]).replace("{{data}}", text)


def data_of(found: Inspection | Structure) -> dict[str, Any]:
    """What the page shows, as JSON."""
    data: dict[str, Any] = {
        "source": found.source,
        "commit": found.commit,
        "root": _node(found.root),
        "kinds": _kinds(),
        "parameters": found.parameters,
    }
    if isinstance(found, Structure):
        return data | {
            "what": found.what,
            "class": found.class_name,
            "trainable": found.trainable,
            "size": found.size,
            "dtypes": found.dtypes,
            "notes": found.notes,
            "deltas": [
                {"name": d.name, "kinds": d.kinds, "sites": d.sites, "count": d.parameters} for d in found.deltas
            ],
            "equations": [],
            "histograms": [],
        }
    return data | {"what": "package", "notes": (), "deltas": (), **_package(found)}


def _node(node: Node) -> dict[str, Any]:
    """A module; keys are short, for a page may hold thousands."""
    full: dict[str, Any] = {
        "n": node.name,
        "t": node.type,
        "f": node.family,
        "s": node.shape,
        "h": node.host,
        "p": [[p.name, p.shape, p.dtype, p.trainable, p.count, p.tied] for p in node.parameters],
        "d": [
            {
                "module": site.module,
                "delta": site.delta,
                "kind": site.kind,
                "config": site.config,
                "ports": site.ports,
                "tensors": site.tensors,
                "count": site.parameters,
                "share": site.share,
            }
            for site in node.sites
        ],
        "c": [_node(child) for child in node.children],
        "same": node.same,
    }
    return {key: _plain(value) for key, value in full.items() if value or key in {"n", "c"}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [_plain(inside) for inside in value]
    return value


def _kinds() -> list[dict[str, Any]]:
    from deltahub import kinds

    found = []
    for name in kinds.names():
        document = kinds.get(name).document
        entry = _entry(document.source)
        found.append(entry | {"hosts": sorted(document.hosts)})
    return found


def _sources() -> list[Mapping[str, Any]]:
    from deltahub import kinds

    return [kinds.get(name).document.source for name in kinds.names()]


def _entry(source: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = _plain(source)
    wanted = ("kind", "version", "title", "reference", "description", "hosts", "config", "tensors")
    return {key: plain[key] for key in wanted if key in plain} | {
        "equations": equation_rows(plain.get("equations", {}))
    }


def _package(found: Inspection) -> dict[str, Any]:
    from deltahub.manifest import Manifest

    manifest = Manifest.parse((found.path / "delta.json").read_bytes(), where=str(found.path / "delta.json"))
    origin = found.backbone.get("source") or {}
    known = {(document["kind"], document["version"]): document for document in [*_sources(), *(manifest.kinds or ())]}
    equations = [
        {"module": module.name, "kind": f"{module.kind}@{module.version}", "config": module.config}
        | {"rows": equation_rows(_plain(known[module.kind, module.version]["equations"]), _plain(module.config))}
        for module in found.modules
        if (module.kind, module.version) in known
    ]
    return {
        "class": origin.get("class", ""),
        "backbone": origin.get("hub", ""),
        "size": sum(found.files.values()),
        "modules": [
            {"name": m.name, "kind": m.kind, "targets": m.targets, "count": m.parameters} for m in found.modules
        ],
        "equations": equations,
        "histograms": _histograms(found, manifest),
    }


def _histograms(found: Inspection, manifest: Manifest) -> list[dict[str, Any]]:
    """How the numbers of each module's tensors are spread, over all its sites."""
    import numpy as np

    from deltahub.tensors import TensorFile

    values: dict[tuple[str, str], list[np.ndarray[Any, Any]]] = {}
    for path in found.files:
        if not path.endswith(".safetensors") or (manifest.probe and path == manifest.probe.file):
            continue
        with TensorFile.read(found.path / path) as file:
            for name in file:
                array = file.numpy(name)
                if array.dtype.kind == "f":
                    key = (name.partition("/")[0], name.rpartition("/")[2])
                    values.setdefault(key, []).append(array.astype(np.float32).ravel())
    return [_histogram(module, tensor, arrays) for (module, tensor), arrays in sorted(values.items())]


def _histogram(module: str, tensor: str, arrays: list[np.ndarray[Any, Any]]) -> dict[str, Any]:
    import numpy as np

    every = np.concatenate(arrays)[:_MOST]
    finite = every[np.isfinite(every)]
    counts, edges = np.histogram(finite, bins=_BINS) if finite.size else (np.zeros(1, int), np.zeros(2))
    return {
        "module": module,
        "tensor": tensor,
        "count": int(every.size),
        "mean": float(finite.mean()) if finite.size else 0.0,
        "std": float(finite.std()) if finite.size else 0.0,
        "zeros": int((finite == 0).sum()),
        "bins": [int(n) for n in counts],
        "low": float(edges[0]),
        "high": float(edges[-1]),
    }
