"""The resolver for vLLM: against vLLM's published interface, and against vLLM itself where it is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import deltahub
from deltahub.converters import vllm as plugin
from deltahub.errors import DeltaHubError
from tests.converters import tiny


@pytest.fixture
def published(hub: Any, tmp_path: Path) -> dict[str, Any]:
    """A backbone and a package for it on a Hub of its own; the options to reach it."""
    from huggingface_hub import HfApi

    tiny.make_model("llama").save_pretrained(tmp_path / "base")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("org/base")
    commit = api.upload_folder(repo_id="org/base", folder_path=tmp_path / "base").oid
    model = tiny.load_model("llama", tmp_path / "base")
    for name, kind in (("lora", "lora"), ("dora", "dora")):
        delta = deltahub.attach(model, kind, targets=["q_proj"], rank=2, name=name)
        tiny.randomise(delta)
        delta.save(tmp_path / name)
        delta.detach()
        manifest = json.loads((tmp_path / name / "delta.json").read_text(encoding="utf-8"))
        manifest["backbone"]["source"] |= {"hub": "org/base", "commit": commit}
        (tmp_path / name / "delta.json").write_text(json.dumps(manifest), encoding="utf-8")
        deltahub.push(tmp_path / name, f"user/{name}", endpoint=hub.url, token=hub.token)
    return {"endpoint": hub.url, "token": hub.token, "cache_dir": tmp_path / "cache"}


def test_an_adapter_is_made_once_and_checked(published: dict[str, Any], tmp_path: Path) -> None:
    folder = plugin.adapter_for("user/lora", "org/base", cache=tmp_path / "adapters", **published)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "org/base"
    assert config["lora_alpha"] == config["r"] == 2
    before = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    assert plugin.adapter_for("user/lora", "org/base", cache=tmp_path / "adapters", **published) == folder
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert plugin.adapter_for("user/lora", str(tmp_path / "base"), cache=tmp_path / "adapters", **published) == folder


def test_a_copy_under_another_name_is_known_by_its_tensors(published: dict[str, Any], tmp_path: Path) -> None:
    """The server has the model in its cache; what is in there is compared, whatever it is called."""
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi(endpoint=published["endpoint"], token=published["token"])
    tiny.make_model("llama", 7).save_pretrained(tmp_path / "other")
    for repo, folder in (("me/copy", tmp_path / "base"), ("me/else", tmp_path / "other")):
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=folder)
        snapshot_download(repo, **published)
    assert plugin.adapter_for("user/lora", "me/copy", cache=tmp_path / "adapters", **published).is_dir()
    with pytest.raises(DeltaHubError) as caught:
        plugin.adapter_for("user/lora", "me/else", cache=tmp_path / "adapters", **published)
    assert caught.value.code == "E_BACKBONE_MISMATCH"


@pytest.mark.parametrize(
    ("name", "served", "code"),
    [
        ("user/lora", "org/other", "E_CONVERT_SERVED"),
        ("user/lora", "{tmp}/other", "E_BACKBONE_MISMATCH"),
        ("user/dora", "org/base", "E_CONVERT_EXPORT"),
        ("user/none", "org/base", "E_HUB_REPO_NOT_FOUND"),
        ("/etc", "org/base", "E_CONVERT_SERVED"),
        ("../lora", "org/base", "E_CONVERT_SERVED"),
    ],
)
def test_the_rest_is_not_served(name: str, served: str, code: str, published: dict[str, Any], tmp_path: Path) -> None:
    tiny.make_model("llama", 7).save_pretrained(tmp_path / "other")
    with pytest.raises(DeltaHubError) as caught:
        plugin.adapter_for(name, served.format(tmp=tmp_path), cache=tmp_path / "adapters", **published)
    assert caught.value.code == code
    assert not list((tmp_path / "adapters").glob("*/adapter_config.json"))


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The interface as vLLM documents it: an abstract resolver, its registry, and a request."""
    from abc import ABC, abstractmethod

    class LoRAResolver(ABC):
        @abstractmethod
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any: ...

    class Registry:
        def __init__(self) -> None:
            self.resolvers: dict[str, LoRAResolver] = {}

        def get_supported_resolvers(self) -> set[str]:
            return set(self.resolvers)

        def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
            self.resolvers[resolver_name] = resolver

        def get_resolver(self, resolver_name: str) -> LoRAResolver:
            return self.resolvers[resolver_name]

    @dataclass(kw_only=True)
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str

    registry = Registry()
    for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver"):
        module: Any = ModuleType(name)
        module.LoRARequest, module.LoRAResolver, module.LoRAResolverRegistry = LoRARequest, LoRAResolver, registry
        monkeypatch.setitem(sys.modules, name, module)
    return registry


def asked(registry: Any, published: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAHUB_CACHE", str(tmp_path / "deltahub"))
    monkeypatch.setattr(plugin, "adapter_for", _with(plugin.adapter_for, published))
    plugin.register()
    plugin.register()  # vLLM calls its plugins in every process, and some of them twice
    resolver = registry.get_resolver("DeltaHub")
    request = asyncio.run(resolver.resolve_lora("org/base", "user/lora"))
    assert request.lora_name == "user/lora"
    assert request.lora_int_id > 0
    assert (Path(request.lora_path) / "adapter_model.safetensors").is_file()
    assert asyncio.run(resolver.resolve_lora("org/other", "user/lora")) is None
    assert asyncio.run(resolver.resolve_lora("org/base", "user/nothing")) is None


def _with(run: Any, options: dict[str, Any]) -> Any:
    return lambda name, served: run(name, served, **options)


def test_the_published_interface(published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(stand_in(monkeypatch), published, tmp_path, monkeypatch)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_itself(published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.resolver import LoRAResolverRegistry

    asked(LoRAResolverRegistry, published, tmp_path, monkeypatch)
    folder = plugin.adapter_for("user/lora", "org/base")
    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
    assert helper.r == helper.lora_alpha == 2


def test_the_entry_point_is_ours() -> None:
    import tomllib

    document = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert document["project"]["entry-points"]["vllm.general_plugins"] == {
        "deltahub": "deltahub.converters.vllm:register"
    }
