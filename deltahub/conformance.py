"""This implementation as the runner of ``spec/conformance`` sees it: one request in, one verdict out.

    python spec/conformance/runner.py --stream -- python -m deltahub.conformance --stream

The protocol is in ``spec/conformance/README.md``. Nothing is decided here: every operation calls the room that
is responsible for it and says what came of it.
"""

from __future__ import annotations

__all__ = ["OPERATIONS", "answer", "kind_of", "main", "shape_of"]

import base64
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.errors import DeltaHubError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.kinds import HostShape, Kind
    from deltahub.manifest import Manifest

Request = Mapping[str, Any]
Result = dict[str, Any]


def _bytes(request: Request) -> bytes:
    return base64.b64decode(request["data"], validate=True)


# ------------------------------------------------------------------------------------------------- manifest, targets


def _modules(manifest: Manifest) -> list[Result]:
    return [{"name": m.name, "kind": m.kind, "version": m.version, "targets": list(m.paths)} for m in manifest.modules]


def _manifest(request: Request) -> Result:
    from deltahub.kinds import Registry
    from deltahub.manifest import Manifest

    manifest = Manifest.parse(_bytes(request))
    registry = Registry(manifest.kinds or ())
    for module in manifest.modules:
        registry.get(module.kind, module.version).check_config(module.config)
    return {"modules": _modules(manifest)}


def _rewrite(request: Request) -> Result:
    from deltahub.manifest import Manifest

    return {"manifest": json.loads(Manifest.parse(_bytes(request)).to_bytes())}


def _targets(request: Request) -> Result:
    from deltahub.targets import expand_all

    paths = expand_all(request["patterns"])
    return {"paths": paths, "count": len(paths), "first": paths[0], "last": paths[-1]}


# ------------------------------------------------------------------------------------------------ tensors, identity


def _safetensors(request: Request) -> Result:
    from deltahub.tensors import TensorFile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.safetensors"
        path.write_bytes(_bytes(request))
        with TensorFile.read(path) as file:
            tensors = {
                name: {
                    "dtype": info.dtype,
                    "shape": list(info.shape),
                    "sha256": hashlib.sha256(file.data(name)).hexdigest(),
                }
                for name, info in file.items()
            }
            return {"metadata": file.metadata, "tensors": tensors}


def _write_backbone(folder: str, tensors: list[Request]) -> Path:
    """The backbone of a case as a checkpoint: a tensor file put together by hand, byte for byte as the case has it."""
    header: dict[str, Any] = {}
    body = b""
    for item in tensors:
        data = base64.b64decode(item["base64"], validate=True)
        offsets = [len(body), len(body) + len(data)]
        header[item["name"]] = {"dtype": item["dtype"], "shape": item["shape"], "data_offsets": offsets}
        body += data
    raw = json.dumps(header).encode()
    path = Path(folder) / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    return path


def _identity(request: Request) -> Result:
    from deltahub.identity import from_files, leaves

    with tempfile.TemporaryDirectory() as folder:
        path = _write_backbone(folder, request["tensors"])
        found = from_files(path, tied=request.get("tied", {}), excluded=tuple(request.get("excluded", ())), cache=False)
        digests = leaves(path, [item["name"] for item in request["tensors"]], cache=False)
    return {
        "exact": found.exact,
        "bf16": found.bf16,
        "structure": found.structure,
        "tensors": found.tensors,
        "leaves": dict(digests),
    }


def _backbone(request: Request) -> Result:
    from deltahub.identity import Level, check

    with tempfile.TemporaryDirectory() as folder:
        path = _write_backbone(folder, request["tensors"])
        try:
            report = check(request["declared"], files=path, level=Level.named(request["level"]), cache=False)
        except DeltaHubError as error:
            named = [name for part in str(error.found).split("; ") for name in part.partition(": ")[2].split(", ")]
            raise _Refused(error, {"tensors": [name for name in named if name]}) from None
    return {"equal": report.root}


def _tree(request: Request) -> Result:
    from deltahub.identity.tree import merkle_root

    return {"root": merkle_root([bytes.fromhex(h) for h in request["hashes"]]).hex()}


# ------------------------------------------------------------------------------------------------------------ kinds


def kind_of(request: Request) -> Kind:
    """The kind that a case names, or brings along."""
    from deltahub.kinds import Registry, get

    document = request.get("document")
    if document is None:
        return get(request["kind"], request["version"])
    return Registry([document]).get(document["kind"], document["version"])


def shape_of(host: Request) -> HostShape:
    """The facts of the host that a case describes."""
    from deltahub.kinds import HostShape

    kernel = tuple(host.get("kernel", ()))
    family = host["family"]
    return HostShape(
        family=family,
        d_in=host.get("in"),
        d_out=host.get("out"),
        kernel=kernel,
        bias=bool(host.get("bias", False)),
        spatial=len(kernel),
        channels_first=family == "conv",
        grouped=host.get("groups", 1) > 1,
    )


def _kind(request: Request) -> Result:
    kind = kind_of(request)
    if "host" not in request:
        return {"name": kind.name, "version": kind.version}
    config, shape = kind.check_config(request.get("config", {})), shape_of(request["host"])
    kind.fits(shape, config)
    specs = kind.tensors(config, shape)
    kind.compile(config, shape)
    return {"tensors": {name: list(spec.shape) for name, spec in specs.items()}}


def _tensor(value: Request) -> Tensor:
    import torch

    dtype = torch.int64 if value.get("dtype") == "I64" else torch.float32
    return torch.tensor(value["data"], dtype=dtype).reshape(value["shape"])


def _written(tensor: Tensor) -> Result:
    integer = not tensor.is_floating_point()
    return {"shape": list(tensor.shape), "data": tensor.detach().flatten().tolist()} | (
        {"dtype": "I64"} if integer else {}
    )


def _module(host: Request, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """A module of the backbone as a case describes it."""
    import torch
    from torch import nn

    family, out, biased = host["family"], int(host.get("out", 0)), bool(host.get("bias", False))
    module: nn.Module
    if host.get("stack"):
        return _maps(weight, bias)
    if family == "linear":
        module = nn.Linear(host["in"], out, bias=biased)
    elif family == "conv":
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(host["kernel"]) - 1]
        options = {name: host[name] for name in ("stride", "padding", "groups")}
        module = make(host["in"] * host["groups"], out, tuple(host["kernel"]), bias=biased, **options)
    elif family == "embedding":
        module = nn.Embedding(host["in"], out)
    elif family == "norm":
        module = nn.LayerNorm(out, bias=biased)
    else:
        return nn.Identity()
    assert weight is not None
    own = dict(module.named_parameters())
    with torch.no_grad():
        own["weight"].copy_(weight.T if family == "embedding" else weight)
        if bias is not None:
            own["bias"].copy_(bias)
    return module


def _maps(weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """A module that uses a stack of linear maps by itself, each for an input of its own."""
    from torch import nn

    assert weight is not None
    assert bias is not None
    maps, shifts = nn.Parameter(weight), nn.Parameter(bias)

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = maps
            self.maps_bias = shifts

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.maps.mT + self.maps_bias.unsqueeze(1)

    return Maps()


class _Host:
    """A module as the equations of one port see it."""

    def __init__(self, module: nn.Module, context: Request) -> None:
        from deltahub.hosts import view_of

        self.module, self.view, self.context = module, view_of(module), context

    def deltahub_context(self, name: str) -> Any:
        value = self.context[name]
        return tuple(value) if isinstance(value, list) else value

    def deltahub_base(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def deltahub_apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.view.partial(self.module, type(self.module), x, weight)

    def deltahub_weight(self) -> Tensor:
        return self.view.weight(self.module)

    def deltahub_bias(self) -> Tensor | None:
        return self.view.bias(self.module)


def _apply(request: Request) -> Result:
    import torch

    from deltahub.kinds.document import PORTS

    kind, shape = kind_of(request), shape_of(request["host"])
    config = kind.check_config(request["config"])
    given = {name: _tensor(value) for name, value in request.get("tensors", {}).items()}
    kind.fits(shape, config)
    specs = kind.tensors(config, shape, known={name: tuple(t.shape) for name, t in given.items()})
    port = kind.compile(config, shape)[request["port"]]
    known = ("x", "y", "W", "b", "scores")
    values = {name: _tensor(request[name]) if name in request else None for name in known}
    if request["port"] == "bias" and values["b"] is None:
        values["b"] = torch.zeros(request["host"]["out"])
    names = PORTS[request["port"]]
    module = _module(request["host"], values["W"], values["b"] if request["host"].get("bias") else None)
    host = _Host(module, request.get("context", {}))
    with torch.no_grad():
        value = port.fn(host, *(values[name] for name in names), *(given[name] for name in specs))
    return {"value": _written(value)}


# ---------------------------------------------------------------------------------------------------------- packages


def _package(request: Request) -> Result:
    from deltahub.package import Package

    package = Package.open(request["directory"])
    package.verify()
    names = [
        f"{module.name}/{path}/{name}"
        for module in package.manifest.modules
        for path, tensors in package.tensors(module.name).items()
        for name in tensors
    ]
    return {"modules": _modules(package.manifest), "tensors": sorted(names), "ignored": list(package.ignored)}


# ------------------------------------------------------------------------------------------------------ composition


def _forward(request: Request) -> Result:
    import torch
    from torch import nn

    bias = _tensor(request["b"]) if "b" in request else None
    model = nn.Sequential(_module(request["host"], _tensor(request["W"]) if "W" in request else None, bias))
    if "then" in request:
        after = request["then"]
        model.append(_module(after["host"], _tensor(after["W"]), _tensor(after["b"])))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attached: list[Any] = []
    try:
        for index, delta in enumerate(request["deltas"]):
            attached.append(_attach(model, f"d{index}", delta))
        with torch.no_grad():
            return {"y": _written(model(_tensor(request["x"])))}
    except DeltaHubError as error:
        for delta in reversed(attached):
            delta.detach()
        after = model.state_dict()
        same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        raise _Refused(
            error, {"unchanged": same and type(model[0]).__mro__[0].__module__.startswith("torch.")}
        ) from None


def _attach(model: nn.Module, name: str, delta: Request) -> Any:
    from deltahub.attaching import attach_parts
    from deltahub.places import Rows
    from deltahub.sites import Part

    parts = []
    for index, module in enumerate(delta["modules"]):
        kind = kind_of(module)
        path, inputs = ("1", ["0"]) if module.get("span") else ("0", [])
        rows, stack = module.get("rows"), module.get("stack", 0)
        path = "0.maps" if getattr(model[0], "maps", None) is not None else path  # type: ignore[index]
        tensors = {path: {n: _tensor(t) for n, t in module.get("tensors", {}).items()}}
        removes = tuple(f"0.{parameter}" for parameter in module.get("removes", ()))
        config = kind.check_config(module["config"])
        part = Part(
            name=f"m{index}",
            kind=kind,
            config=config,
            paths=[path],
            tensors=tensors,
            removes=removes,
            inputs=inputs,
            rows=None if rows is None else Rows(**rows),
            stack=stack,
        )
        parts.append(part)
    made = attach_parts(model, name, parts)
    try:
        made.scale = delta.get("strength", 1.0)
        if delta.get("merged"):
            made.merge()
    except DeltaHubError:
        made.detach()
        raise
    return made


class _Refused(Exception):  # noqa: N818 - a refusal with something to say, never seen outside
    def __init__(self, error: DeltaHubError, result: Result) -> None:
        super().__init__(error)
        self.error, self.result = error, result


OPERATIONS: Mapping[str, Callable[[Request], Result]] = {
    "manifest": _manifest,
    "rewrite": _rewrite,
    "targets": _targets,
    "safetensors": _safetensors,
    "identity": _identity,
    "tree": _tree,
    "backbone": _backbone,
    "kind": _kind,
    "apply": _apply,
    "forward": _forward,
    "package": _package,
}


def answer(request: Request) -> Result:
    """The verdict on one request."""
    operation = OPERATIONS.get(request["op"])
    if operation is None:
        return {"skipped": f"no operation {request['op']!r}"}
    try:
        return {"valid": True, "result": operation(request)}
    except _Refused as refused:
        return {**_refusal(refused.error), "result": refused.result}
    except DeltaHubError as error:
        return _refusal(error)


def _refusal(error: DeltaHubError) -> Result:
    return {"valid": False, "error_code": error.code, "message": str(error)}


def main(arguments: list[str] | None = None) -> int:
    """Answer one request from standard input, or one per line with ``--stream``."""
    options = sys.argv[1:] if arguments is None else arguments
    if options == ["--stream"]:
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), flush=True)  # noqa: T201 - the protocol is on standard output
        return 0
    verdict = answer(json.load(sys.stdin))
    print(json.dumps(verdict))  # noqa: T201
    return 2 if "skipped" in verdict else 0 if verdict["valid"] else 1


if __name__ == "__main__":
    sys.exit(main())
