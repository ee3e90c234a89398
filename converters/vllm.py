"""A resolver for vLLM: a request that names a package of DeltaHub is served, without a restart.

vLLM calls :func:`register` as a general plugin (entry point ``vllm.general_plugins``), in every process it starts. It
asks the resolver for names it does not know. The package is pulled at a commit and its backbone compared with the
served one; the adapter is written into a cache, once for each version of the package, in the layout that vLLM reads.

    VLLM_PLUGINS=deltahub VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve org/base --enable-lora --max-lora-rank 64
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.errors import ConverterError, DeltaHubError

if TYPE_CHECKING:
    from deltahub.package import Package

__all__ = ["adapter_for", "register"]

logger = logging.getLogger("deltahub")

NAME = "DeltaHub"


def adapter_for(name: str, served: str, *, cache: str | os.PathLike[str] | None = None, **client: Any) -> Path:
    """An adapter in vLLM's layout for a package, made once for each of its versions.

    Args:
        name: ``user/delta``, ``user/delta@revision``; never a path on this machine, for a request names it.
        served: the model that vLLM serves: a folder, or a name on the Hub.
        cache: where adapters are kept; ``vllm`` in DeltaHub's cache by default.
        client: ``endpoint``, ``token``, ``cache_dir`` and ``local_files_only`` for the Hub.

    Returns:
        The adapter's folder.

    Raises:
        ConverterError: ``E_CONVERT_EXPORT`` where vLLM cannot serve what the package computes; ``E_CONVERT_SERVED``
            where the package is for another backbone, or nobody can tell.
        HubError: there is no such package.
    """
    from deltahub import hub
    from deltahub.converters.peft_writing import export_
    from deltahub.package import Package

    if hub.parse_source(name, endpoint=client.get("endpoint")).kind != "hub":
        raise ConverterError("E_CONVERT_SERVED", "a request may only name a package on the Hub", found=name)
    pulled = hub.pull(name, **client)
    package = Package.open(pulled.path, root=pulled.root)
    _check_served(package, served, name, client)
    key = hashlib.sha256(f"{pulled.sha256} {_exporter()}".encode()).hexdigest()[:32]
    folder = Path(cache or _cache()) / key
    if not (folder / "adapter_config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            export_(package, folder, target="vllm")
        except ConverterError as error:
            if error.code != "E_MERGE_OUTPUT" or not (folder / "adapter_config.json").is_file():
                raise  # another process of the same server may have been faster
    return folder


def _exporter() -> str:
    from deltahub import __version__

    return f"vllm {__version__}"


def _cache() -> Path:
    return Path(os.environ.get("DELTAHUB_CACHE") or Path.home() / ".cache" / "deltahub") / "vllm"


def _check_served(package: Package, served: str, name: str, client: dict[str, Any]) -> None:
    """Compare the declared backbone with the served one: its tensors where they are on this machine, else its name.

    The server has read its weights long ago; this says that they were those of the declared repository, or the very
    files.
    """
    from deltahub import identity
    from deltahub.backbones import resolve
    from deltahub.errors import BackboneError

    section = package.manifest.backbone
    source = {} if section.source is None else {"class": section.source.class_}
    kept = {key: client[key] for key in ("endpoint", "token", "cache_dir") if key in client}
    try:
        override = Path(served) if Path(served).is_dir() else served
        files = resolve(source, override=override, local_files_only=True, **kept)
    except BackboneError:
        declared = section.source.hub if section.source is not None else None
        if not Path(served).is_dir() and declared == served.partition("@")[0]:
            return
        raise ConverterError(
            "E_CONVERT_SERVED",
            "the package is for another backbone than the one that is served, or its tensors cannot be compared",
            where=name,
            expected=declared or "a backbone that has no name on the Hub",
            found=served,
            hint="serve the backbone from a folder of safetensors, or by the name that the package says",
        ) from None
    identity.check(section, files=list(files.files), level=identity.Level.L3)


def register() -> None:
    """Tell vLLM of the resolver; called by vLLM itself.

    Raises:
        ImportError: vLLM is not installed, or has no resolvers (before 0.8.5).
    """
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class DeltaHubResolver(LoRAResolver):  # type: ignore[misc]
        """Finds adapters on the Hub by the names of packages."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """The adapter of a package, or nothing: another resolver is asked then, and at last the client told."""
            try:
                folder = await asyncio.to_thread(adapter_for, lora_name, base_model_name)
            except DeltaHubError as error:
                logger.warning("%s is not served: %s", lora_name, error)
                return None
            number = int(hashlib.sha256(lora_name.encode()).hexdigest()[:8], 16) % 0x7FFFFFFE + 1
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(folder))

    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, DeltaHubResolver())
