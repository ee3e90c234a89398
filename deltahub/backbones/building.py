"""Building: a library makes the module from vetted files; what the checkpoint did not hold is reported."""

from __future__ import annotations

__all__ = ["Built", "build", "require_covered"]

import logging
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.backbones.files import BackboneFiles, architecture, read_json, staged
from deltahub.backbones.libraries import Library, find_class, imported, library_of
from deltahub.backbones.settings import Setting, build_fields, configure
from deltahub.errors import BackboneError, DeltaHubError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Built:
    """A backbone as it was built.

    Attributes:
        model: the module, in evaluation mode.
        missing: its parameters and buffers that the checkpoint does not hold; they are random until a delta sets them.
        unused: tensors of the checkpoint that this class has no place for.
        notes: what was left out of the backbone's configuration, and the like; worth showing to the caller.
    """

    model: nn.Module
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Order:
    """What a library's builder needs to know."""

    library: Library
    name: str
    stage: Path
    files: BackboneFiles
    settings: tuple[Setting, ...]
    dtype: torch.dtype | str | None
    device_map: Any
    safetensors: bool


def build(
    source: Mapping[str, object],
    backbone: BackboneFiles | nn.Module,
    *,
    settings: Sequence[Setting] = (),
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    device_map: Any = None,
) -> Built:
    """Build the backbone of a package, or take the live one.

    Args:
        source: a manifest's ``backbone.source``. Without a ``class``, the configuration's own architecture is taken.
        backbone: its files, from :func:`resolve`; or the module itself, which is taken as it is.
        settings: the manifest's settings; those that shape the model are applied before it is built.
        dtype: as the library's ``from_pretrained`` takes it; ``None`` keeps the checkpoint's.
        device: where to put the whole model.
        device_map: where to put its parts; passed to the library.

    Raises:
        BackboneError: the class is not allowed or unknown, a setting does not fit, or the library cannot build it.
        UsageError: ``E_BACKBONE_DEVICE`` when both ``device`` and ``device_map`` are given.
    """
    if device is not None and device_map is not None:
        raise UsageError("E_BACKBONE_DEVICE", "device and device_map exclude each other", where="deltahub.load")
    if not isinstance(backbone, BackboneFiles):
        model = backbone if dtype is None else backbone.to(_torch_dtype(dtype))
        return Built(model=model if device is None else model.to(device))
    class_name = source.get("class") or architecture(backbone.folder)
    library, name = library_of(class_name)
    imported(library)  # before `_quiet`: a library sets up its logger when it is imported
    with ExitStack() as stack:
        stage, notes = stack.enter_context(staged(backbone, library))
        stack.enter_context(_quiet())
        order = _Order(
            library=library,
            name=name,
            stage=stage,
            files=backbone,
            settings=tuple(settings),
            dtype=dtype,
            device_map=device_map,
            safetensors=backbone.files[0].suffix == ".safetensors",
        )
        try:
            built = _BUILDERS[library.name](order)
        except DeltaHubError:
            raise
        except Exception as error:
            raise BackboneError(
                "E_BACKBONE_BUILD",
                f"{library.name} cannot build {name} from these files: {type(error).__name__}: {error}",
                where=backbone.folder,
            ) from error
        if "disk" in (getattr(built.model, "hf_device_map", None) or {}).values():
            # Weights left on disk are read through the stage: it lives as long as the model.
            weakref.finalize(built.model, stack.pop_all().close)
    model = built.model.eval()
    return Built(
        model=model if device is None else model.to(device),
        missing=built.missing,
        unused=built.unused,
        notes=notes + built.notes,
    )


def require_covered(built: Built, names: Collection[str]) -> None:
    """Refuse half a model: each parameter that the checkpoint lacks must be set by the delta.

    Args:
        built: from :func:`build`.
        names: full names of the parameters that the delta sets as a whole, such as ``classifier.weight``.

    Raises:
        BackboneError: ``E_BACKBONE_HALF``, naming them.
    """
    left = sorted(set(built.missing) - set(names))
    if left:
        raise BackboneError(
            "E_BACKBONE_HALF",
            f"{len(left)} parameter(s) are neither in the backbone's checkpoint nor in the package",
            where=left[0],
            hint="they would be random: the package must hold them, or its class or settings do not fit the backbone",
            also=left[1:],
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries print a report of missing weights; it is returned as data instead."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers", "sentence_transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise UsageError("E_BACKBONE_DTYPE", "this is not a dtype", found=dtype, expected="such as torch.bfloat16")
    return found


def _config(order: _Order) -> dict[str, Any]:
    config = read_json(order.stage / "config.json")
    if not isinstance(config, dict):
        raise BackboneError(
            "E_BACKBONE_CONFIG", "a configuration is a JSON object", where=order.files.folder / "config.json"
        )
    return config


def _transformers(order: _Order) -> Built:
    cls = find_class(order.library, order.name)
    declared = _config(order).get("model_type")
    config = cls.config_class.from_pretrained(str(order.stage), local_files_only=True)
    shaping = build_fields(order.settings, order.library)
    configure(config, shaping)
    model, report = cls.from_pretrained(
        str(order.stage),
        config=config,
        dtype=_dtype_argument(order.dtype) or "auto",
        device_map=order.device_map,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=order.safetensors,
        output_loading_info=True,
        # What a setting makes larger or smaller is a parameter that the checkpoint does not have.
        ignore_mismatched_sizes=bool(shaping),
    )
    # The stage is gone in a moment; the origin is what `describe` reads.
    model.config._name_or_path = model.name_or_path = str(order.files.folder)
    notes: tuple[str, ...] = ()
    if declared and declared != (wanted := cls.config_class.model_type):
        notes = (f"the backbone's configuration is of type {declared}, its class of type {wanted}",)
    return Built(
        model=model,
        missing=tuple(sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})),
        unused=tuple(sorted(report["unexpected_keys"])),
        notes=notes,
    )


def _dtype_argument(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    return dtype if dtype is None or dtype == "auto" else _torch_dtype(dtype)


def _diffusers(order: _Order) -> Built:
    cls = find_class(order.library, order.name)
    dtype = _dtype_argument(order.dtype)
    model, report = cls.from_pretrained(
        str(order.stage),
        torch_dtype=_stored_dtype(order.files) if dtype in {None, "auto"} else dtype,
        device_map=order.device_map,
        local_files_only=True,
        use_safetensors=order.safetensors,
        output_loading_info=True,
    )
    model.register_to_config(_name_or_path=str(order.files.folder))
    return Built(
        model=model, missing=tuple(sorted(report["missing_keys"])), unused=tuple(sorted(report["unexpected_keys"]))
    )


def _stored_dtype(files: BackboneFiles) -> torch.dtype | None:
    """Diffusers casts to float32 unless told otherwise; keep the dtype of the checkpoint's first float tensor."""
    from deltahub.tensors import TensorFile, torch_dtype

    if files.files[0].suffix != ".safetensors":
        return None
    with TensorFile.open(files.files[0]) as file:
        found = (torch_dtype(info.dtype) for info in file.values())
        return next((dtype for dtype in found if dtype.is_floating_point), None)


def _timm(order: _Order) -> Built:
    timm = imported(order.library)
    if not timm.is_model(order.name):
        raise BackboneError(
            "E_BACKBONE_CLASS", "timm has no architecture of this name", where="backbone.source.class", found=order.name
        )
    config = _config(order)
    arguments = dict(config.get("model_args") or {})
    arguments |= {k: config[k] for k in ("num_classes", "global_pool") if k in config}
    for setting, _ in build_fields(order.settings, order.library):
        if arguments.get(setting.path) != setting.was:
            raise BackboneError(
                "E_BACKBONE_SETTING_WAS",
                "this field of the backbone does not have the value that the package says it replaces",
                where=f"config.{setting.path}",
                expected=setting.was,
                found=arguments.get(setting.path),
            )
        arguments[setting.path] = setting.value
    model = timm.create_model(order.name, pretrained=False, **arguments)
    state = _state(order.files)
    own = model.state_dict()
    # A head of another size is a head that the checkpoint does not have.
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fits, strict=False)
    if (dtype := _dtype_argument(order.dtype)) not in {None, "auto"}:
        model.to(dtype)
    # timm names the repository of its own weights, wherever these came from.
    known = getattr(model, "pretrained_cfg", None) or {}
    model.pretrained_cfg = {**known, "architecture": order.name, "hf_hub_id": order.files.hub}
    return Built(
        model=model,
        missing=tuple(sorted(own.keys() - fits.keys())),
        unused=tuple(sorted(state.keys() - fits.keys())),
    )


def _state(files: BackboneFiles) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in memory that is their own."""
    import torch

    from deltahub.tensors import TensorFile

    state: dict[str, torch.Tensor] = {}
    for path in files.files:
        if path.suffix == ".safetensors":
            with TensorFile.open(path) as file:
                state |= {name: file.torch(name).clone() for name in file}
        else:
            state |= torch.load(path, map_location="cpu", weights_only=True)
    return state


def _sentence_transformers(order: _Order) -> Built:
    cls = find_class(order.library, order.name)
    modules = read_json(order.stage / "modules.json")
    for entry in modules if isinstance(modules, list) else [None]:
        kind = entry.get("type") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or not kind.startswith(order.library.module_types):
            raise BackboneError(
                "E_BACKBONE_CODE",
                "the backbone names a module that is not part of sentence-transformers",
                where=order.files.folder / "modules.json",
                expected=" or ".join(f"{prefix}…" for prefix in order.library.module_types),
                found=kind,
                hint="code from a repository is never run; build the model yourself and pass it",
            )
    placed = {} if order.device_map is None else {"device_map": order.device_map}
    model = cls(
        str(order.stage),
        device="cpu" if order.device_map is None else None,
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs={
            "dtype": _dtype_argument(order.dtype) or "auto",
            "use_safetensors": order.safetensors,
            "trust_remote_code": False,
            **placed,
        },
    )
    inner = model[0].auto_model
    inner.config._name_or_path = inner.name_or_path = str(order.files.folder)
    return Built(model=model)


_BUILDERS: Mapping[str, Callable[[_Order], Built]] = {
    "transformers": _transformers,
    "diffusers": _diffusers,
    "timm": _timm,
    "sentence_transformers": _sentence_transformers,
}
