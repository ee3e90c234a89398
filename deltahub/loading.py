"""From a package to a ready model: fetch, verify, fetch the backbone, verify it, inject.

Everything that can be refused is refused before a module is touched; a live model that was passed is as it was when
an error is raised.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltahub import identity
from deltahub.attaching import attach_parts
from deltahub.backbones import DENOISERS, apply_settings, assemble, build, denoiser_of, require_covered, resolve
from deltahub.composition import REGISTRY, registry, using
from deltahub.effects import effect_of
from deltahub.errors import PackageError, printable
from deltahub.hub import PulledPackage, pull
from deltahub.package import Package, Probe
from deltahub.places import Rows
from deltahub.saving import make_probe
from deltahub.sites import Part

if TYPE_CHECKING:
    from deltahub.delta import Delta
    from deltahub.hub import Lock
    from deltahub.manifest import Manifest
    from deltahub.sign import Policy, Signature

__all__ = ["LoadReport", "VerifyReport", "load", "replay", "verify"]

logger = logging.getLogger("deltahub")

_LEVELS = {"touched": identity.Level.L3, "full": identity.Level.L4, "structure": identity.Level.L2}


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How a delta came onto a model.

    Attributes:
        source: what was asked for.
        path: the package's folder on this machine.
        commit: of a Hub; empty for a folder.
        sha256: of the manifest.
        kinds: kinds whose documents the package brought along, ``name@version``; they are data, nothing was imported.
        ignored: files in the package's folder that its manifest does not list; none of them was opened.
        identity: which levels the backbone was checked at; ``None`` where the caller turned checking off.
        signature: who signed the package; ``None`` where nobody did, or no policy asked.
        policy: whether a trust policy asked for a signature.
        notes: what else a reader should know.
    """

    source: str
    path: Path
    commit: str
    sha256: str
    kinds: tuple[str, ...]
    ignored: tuple[str, ...]
    identity: identity.IdentityReport | None
    signature: Signature | None = None
    policy: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"loaded {self.source}" + (f" at {self.commit}" if self.commit else "")]
        lines.append(f"backbone {self.identity}" if self.identity else "backbone NOT checked")
        if self.signature:
            lines.append(f"signed by {printable(self.signature.signer)}, key {self.signature.fingerprint[:16]}")
        elif self.policy:
            lines.append("unsigned, which the policy allows")
        if self.kinds:
            lines.append(f"the package brings its own kinds, as data: {', '.join(self.kinds)}")
        if self.ignored:
            lines.append(f"not part of the package, never opened: {', '.join(self.ignored)}")
        return "\n".join([*lines, *self.notes])


def load(
    source: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str] | None = None,
    revision: str | None = None,
    verify: str | None = "touched",
    device: torch.device | str | int | None = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    merge: bool = False,
    name: str | None = None,
    active: bool = True,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    lock: Lock | None = None,
    policy: Policy | None = None,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
) -> nn.Module:
    """Load a delta with its backbone, or onto a model that is there already.

    Args:
        source: ``user/delta``, ``user/delta@revision``, ``hf://user/delta@revision/sub/folder``, a local folder, or a
            URL of a mirror. An adapter of PEFT in a folder or on the Hub will do: it becomes a package on the way,
            and the report says what of it nobody can check.
        backbone: a live model, a folder, or another Hub id; by default the manifest's own source.
        revision: branch, tag or commit of the package.
        verify: how the backbone is checked: ``"touched"`` (the tensors the delta sits on), ``"full"``,
            ``"structure"``, or ``None`` for not at all, which the report says.
        device: where to put the model; not together with ``device_map``.
        device_map: passed to the backbone's library.
        dtype: of the backbone and the delta; by default each keeps what it was stored in.
        merge: compute the delta into the weights and return a plain model.
        name: the delta's name on the model; by default the last part of ``source``.
        active: whether it acts at once.
        token: for the Hub.
        endpoint: another Hub than the client's own.
        cache_dir: where downloads are kept.
        local_files_only: ask no Hub.
        lock: refuse what is not exactly what the lock names.
        policy: who must have signed what.
        allow_pickle: accept a backbone that has no safetensors files.
        allow_nonfinite: accept NaN and infinities in the delta's tensors.

    A package's file of a megabyte or more is hashed when it is first loaded, and again only when its path, inode, size
    or times are others; with ``verify="full"``, ``lock`` or ``policy``, and by :func:`verify`, it always is.

    Returns:
        The backbone itself, in evaluation mode, with the delta attached; see :func:`deltahub.deltas`. A delta that was
        published for a pipeline of diffusers gives that pipeline, with the delta in its denoiser; so does a live
        pipeline as ``backbone``.

    Raises:
        DeltaHubError: each step has its own subclass and code; nothing is half done.
    """
    fetching = {"endpoint": endpoint, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    model, delta, package = _load(
        source,
        backbone=backbone,
        revision=revision,
        verify=verify,
        device=device,
        device_map=device_map,
        dtype=dtype,
        name=name,
        active=active,
        token=token,
        endpoint=endpoint,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        lock=lock,
        policy=policy,
        allow_pickle=allow_pickle,
        allow_nonfinite=allow_nonfinite,
        remember=verify != "full" and lock is None and policy is None,
    )
    if merge:
        try:
            delta.merge(permanently=True)
        except BaseException:
            delta.detach()
            raise
    found: nn.Module = _pipeline(package.manifest, backbone, model, fetching)
    return found


def _load(
    source: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str] | None = None,
    revision: str | None = None,
    verify: str | None = "touched",
    device: torch.device | str | int | None = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    name: str | None = None,
    active: bool = True,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    lock: Lock | None = None,
    policy: Policy | None = None,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    remember: bool = False,
) -> tuple[nn.Module, Delta, Package]:
    """The work of :func:`load`, with the handle and the package.

    With ``remember``, a large file of the package is hashed once and not again while it is the same file.
    """
    pulled = pull(
        source,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        endpoint=endpoint,
        local_files_only=local_files_only,
        lock=lock,
        policy=policy,
        hash_local=False,
    )
    package = Package.open(
        pulled.path,
        root=pulled.root,
        allow_nonfinite=allow_nonfinite,
        parsed=(pulled.manifest, pulled.sha256),
        remember=remember,
    )
    if package.manifest != pulled.manifest:  # signatures and locks speak of what was read first
        raise PackageError("E_PACKAGE_CHANGED", "the manifest was changed while it was loaded", where=pulled.path)
    fetching = {"endpoint": endpoint, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    backbone = _beside(pulled, backbone)
    model, report, notes = _backbone(
        package.manifest, backbone, verify, fetching, device=device, device_map=device_map, dtype=dtype,
        allow_pickle=allow_pickle,
    )  # fmt: skip
    delta = _inject(model, package, name or _name(pulled), dtype, active=active)
    own = tuple(f"{kind.name}@{kind.version}" for kind in package.registry.own)
    delta.report = LoadReport(
        source=str(pulled.source),
        path=pulled.path,
        commit=pulled.commit,
        sha256=pulled.sha256,
        kinds=own,
        ignored=package.ignored,
        identity=report,
        signature=pulled.signature,
        policy=policy is not None,
        notes=notes,
    )
    if own:
        logger.warning("%s brings its own kinds, as data; nothing was imported: %s", pulled.source, ", ".join(own))
    if report is None:
        logger.warning("the backbone of %s was not checked", pulled.source)
    return model, delta, package


def _beside(
    pulled: PulledPackage, given: nn.Module | str | os.PathLike[str] | None
) -> nn.Module | str | os.PathLike[str] | None:
    """The caller's backbone; or that of a baked package, which names no repository: it lies beside the manifest."""
    source = pulled.manifest.backbone.source
    if given is not None or (source is not None and source.hub is not None):
        return given
    if pulled.repo_id and not pulled.source.subfolder:
        return f"{pulled.repo_id}@{pulled.commit}"
    return pulled.path if any((pulled.path / name).is_file() for name in ("config.json", "model_index.json")) else None


def _name(pulled: PulledPackage) -> str:
    """A delta's name from where it came from, with what a name may not hold replaced."""
    text = pulled.source.subfolder or pulled.repo_id or pulled.path.resolve().name
    last = text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-_").lstrip("0123456789-_")[:64] or "delta"


def _backbone(
    manifest: Manifest,
    given: nn.Module | str | os.PathLike[str] | None,
    verify: str | None,
    fetching: Mapping[str, Any],
    *,
    device: torch.device | str | int | None,
    device_map: Any,
    dtype: torch.dtype | str | None,
    allow_pickle: bool,
) -> tuple[nn.Module, identity.IdentityReport | None, tuple[str, ...]]:
    """The backbone, checked: its files before they are read into a model, or the tensors of a live one."""
    level = None if verify is None else _LEVELS.get(verify) or identity.Level.named(verify)
    section = manifest.backbone
    report = None
    live = denoiser_of(given, None if section.source is None else section.source.subfolder)
    given = given if live is None else live[1]
    if isinstance(given, nn.Module):
        if level is not None:
            report = identity.check(section, module=given, level=level)
        built = build({}, given, dtype=dtype, device=device, device_map=device_map)
        return built.model, report, built.notes
    source = {} if section.source is None else section.source.model_dump(by_alias=True, exclude_unset=True)
    override = given if given is None or isinstance(given, Path) else os.fspath(given)
    files = resolve(source, override=override, allow_pickle=allow_pickle, **fetching)
    if level is not None:
        at_hand = {"hub": files.hub, "commit": files.commit} if files.hub else None
        report = identity.check(
            section, files=list(files.files), level=level, source=at_hand, allow_pickle=allow_pickle
        )
    built = build(source, files, settings=manifest.settings or (), dtype=dtype, device=device, device_map=device_map)
    require_covered(built, _overwritten(manifest, built.model))
    return built.model, report, built.notes


def _pipeline(manifest: Manifest, given: Any, model: nn.Module, fetching: Mapping[str, Any]) -> Any:
    """The model itself; or the pipeline around it, where the delta was published for one or one was given."""
    source = {} if manifest.backbone.source is None else manifest.backbone.source.model_dump(by_alias=True)
    live = denoiser_of(given, source.get("subfolder"))
    if live is None and (isinstance(given, nn.Module) or not source.get("pipeline")):
        return model
    found = assemble(source, model, **fetching) if live is None else given
    if source.get("subfolder") in DENOISERS or REGISTRY not in found.__dict__:  # a text encoder's deltas are its own
        found.__dict__[REGISTRY] = model.__dict__.get(REGISTRY)  # so that `deltas` and `using` take the pipeline
    return found


def _overwritten(manifest: Manifest, model: nn.Module) -> set[str]:
    """Parameters that the package holds in full, so that the checkpoint need not."""
    named = dict(model.named_modules())
    found: set[str] = set()
    for module in manifest.modules:
        whole = module.kind == "assign" and module.rows is None
        for path in module.paths if whole else ():
            if path in named:
                found |= {f"{path}.{name}" for name, value in named[path]._parameters.items() if value is not None}
        found |= set(module.removes or ())
    return found


def _inject(model: nn.Module, package: Package, name: str, dtype: torch.dtype | str | None, *, active: bool) -> Delta:
    """Attach a package's modules, and apply its settings; both or neither."""
    parts = [
        Part(
            name=module.name,
            kind=package.kind(module.name),
            config=package.config(module.name),
            paths=module.paths,
            tensors=package.tensors(module.name),
            removes=module.removes or (),
            rows=None if module.rows is None else Rows.of(module.rows.numbers),
            stack=module.stack or 0,
            inputs=module.sources,
        )
        for module in package.manifest.modules
    ]
    cast = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    undo = apply_settings(model, package.manifest.settings or ())
    try:
        delta = attach_parts(model, name, parts, dtype=cast, active=active)
    except BaseException:
        undo()
        raise
    home = registry(model)
    assert home is not None
    home.undo.append(undo)
    home.backbone = package.manifest.backbone
    return delta


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a verification found; only made when nothing was wrong.

    Attributes:
        load: how the delta was loaded, with the levels of checking.
        files: files that were hashed, with their bytes.
        probe: greatest difference per output of the publisher's own forward pass; ``None`` without a probe.
        effect: greatest change that the delta makes to an output of the probe, or to a module's weight or output.
    """

    load: LoadReport
    files: Mapping[str, int]
    probe: Mapping[str, float] | None
    effect: float

    def __str__(self) -> str:
        lines = [str(self.load), f"{len(self.files)} file(s), {sum(self.files.values())} bytes, every digest right"]
        if self.probe is None:
            lines.append("no probe in the package: the publisher's outputs were not replayed")
        else:
            lines += [f"probe {name}: differs by {value:.3g}, within tolerance" for name, value in self.probe.items()]
        return "\n".join([*lines, f"the delta has an effect: {self.effect:.3g}"])


def verify(
    source: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str] | None = None,
    level: str = "touched",
    **options: Any,
) -> VerifyReport:
    """Load a package, replay its probe, and prove that the delta does something.

    Args:
        source: as for :func:`load`.
        backbone: as for :func:`load`.
        level: as ``verify`` of :func:`load`.
        options: further options of :func:`load`.

    Raises:
        PackageError: ``E_PACKAGE_PROBE_DIFFERS`` where the publisher's numbers do not come out, ``E_PACKAGE_NO_EFFECT``
            where the delta changes nothing.
        DeltaHubError: as :func:`load`.
    """
    model, delta, package = _load(source, backbone=backbone, verify=level, **options)
    report = delta.report
    assert isinstance(report, LoadReport)
    try:
        probe = package.probe()
        differences = None if probe is None else replay(model, probe)
        effect = _effect(model, delta, probe)
    finally:
        if isinstance(backbone, nn.Module):
            delta.detach()
    if effect == 0.0:
        raise PackageError(
            "E_PACKAGE_NO_EFFECT", "the delta changes nothing", where=report.source, hint="was it trained?"
        )
    files = {entry.path: entry.size for entry in package.manifest.files}
    return VerifyReport(load=report, files=files, probe=differences, effect=effect)


def replay(model: nn.Module, probe: Probe) -> dict[str, float]:
    """Run a probe's inputs through a model and compare with the publisher's numbers.

    Args:
        model: the backbone with its delta, live or merged.
        probe: of the package.

    Returns:
        The greatest difference per output.

    Raises:
        PackageError: ``E_PACKAGE_PROBE_DIFFERS``.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in probe.inputs.items()}
    now = make_probe(model, inputs, None).outputs
    found: dict[str, float] = {}
    for name, expected in probe.outputs.items():
        value = now.get(name)
        dtype = str(value.dtype).removeprefix("torch.") if value is not None else "float32"
        tolerance = probe.tolerance.get(dtype, max(probe.tolerance.values()))
        shapes = value is not None and value.shape == expected.shape
        difference = float((value.float() - expected.float()).abs().max()) if shapes and value is not None else None
        if difference is None or not difference <= tolerance:
            raise PackageError(
                "E_PACKAGE_PROBE_DIFFERS",
                f"the publisher's output {name!r} does not come out",
                expected=f"within {tolerance:g} ({dtype})",
                found="no such output" if difference is None else f"{difference:.3g}",
                hint="another library version can compute otherwise; compare with the publisher's",
            )
        found[name] = difference
    return found


def _effect(model: nn.Module, delta: Delta, probe: Probe | None) -> float:
    """How much the delta changes: on the probe's outputs where there is one, else on its own tensors' sites."""
    if probe is None:
        return effect_of(model, delta)
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in probe.inputs.items()}
    acting = make_probe(model, inputs, None).outputs
    with using(model):
        resting = make_probe(model, inputs, None).outputs
    return max(float((acting[n].float() - resting[n].float()).abs().max()) for n in acting if n in resting)
