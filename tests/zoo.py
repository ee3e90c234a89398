"""Hosts and configs for tests over every kind: one small module per host type, one config per way a kind can be set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltahub import contexts, kinds, prompting
from deltahub.attending import check_bias, shape_of
from deltahub.errors import DeltaHubError
from deltahub.hosts import view_of
from deltahub.kinds.fields import MISSING

__all__ = ["CASES", "HOSTS", "Case", "Host", "configs", "fits", "model_of", "randomise"]


class RMSNorm(nn.Module):
    """As Llama's: a gain without bias, and a forward that no view knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states.float() * torch.rsqrt(variance + 1e-6)).to(hidden_states.dtype)


class ScaledEmbedding(nn.Embedding):
    """As BART's and Gemma's: the rows are scaled in ``forward``."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * 3.0


class Block(nn.Module):
    """A residual MLP that returns a tuple, as a transformer block does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        inner = torch.tanh(self.up(hidden_states)) * scale
        return hidden_states + self.down(inner), inner


class Attention(nn.Module):
    """Self-attention over the tokens of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden_states).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class TokenMap(nn.Module):
    """A model that sees a map, and shows its tokens to a host."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor, extra: dict[str, Any] | None = None) -> Tensor:
        return self.host(tokens(x), **(extra or {}))


def tokens(x: Tensor) -> Tensor:
    """A map as a sequence."""
    return x.flatten(2).mT


contexts.register(contexts.Provider(name="tests.TokenMap", argument="x", carrier="extra", blocks=("tests.Attention",)))


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(10, 6)


def _attention() -> nn.Module:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention

    config = BertConfig(hidden_size=6, num_attention_heads=2, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "eager"
    return BertSelfAttention(config)


def _transformer() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=11, hidden_size=6, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


@dataclass(frozen=True, kw_only=True)
class Host:
    """A way to make a small module and an input for it."""

    name: str
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    wrap: Callable[[nn.Module], nn.Module] | None = None
    grid: tuple[int, int] | None = None

    def inner(self, x: Tensor) -> Tensor:
        """What the host itself sees of the model's input."""
        return x if self.grid is None else tokens(x)


def _ids() -> Tensor:
    return torch.randint(0, 11, (2, 5))


HOSTS = [
    Host(name="linear", make=lambda: nn.Linear(6, 10), input=lambda: torch.randn(2, 3, 6)),
    Host(name="linear-square", make=lambda: nn.Linear(8, 8), input=lambda: torch.randn(3, 8)),
    Host(name="linear-no-bias", make=lambda: nn.Linear(6, 10, bias=False), input=lambda: torch.randn(4, 6)),
    Host(name="gpt2-conv1d", make=_conv1d, input=lambda: torch.randn(2, 3, 6)),
    Host(name="conv1d", make=lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), input=lambda: torch.randn(2, 4, 9)),
    Host(
        name="conv2d",
        make=lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2)),
        input=lambda: torch.randn(2, 4, 8, 7),
    ),
    Host(
        name="conv2d-circular",
        make=lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
        input=lambda: torch.randn(2, 4, 5, 5),
    ),
    Host(name="conv2d-grouped", make=lambda: nn.Conv2d(4, 6, 3, groups=2), input=lambda: torch.randn(2, 4, 6, 6)),
    Host(name="conv3d", make=lambda: nn.Conv3d(2, 4, 3, padding=1), input=lambda: torch.randn(1, 2, 4, 5, 4)),
    Host(name="embedding", make=lambda: nn.Embedding(11, 6), input=_ids),
    Host(name="embedding-scaled", make=lambda: ScaledEmbedding(11, 6), input=_ids),
    Host(name="layer-norm", make=lambda: nn.LayerNorm(6), input=lambda: torch.randn(2, 3, 6)),
    Host(name="rms-norm", make=lambda: RMSNorm(6), input=lambda: torch.randn(2, 3, 6)),
    Host(name="group-norm", make=lambda: nn.GroupNorm(2, 6), input=lambda: torch.randn(2, 6, 4, 4)),
    Host(name="transformer", make=_transformer, input=_ids),
    Host(name="self-attention", make=_attention, input=lambda: torch.randn(2, 3, 6)),
    Host(name="block", make=lambda: Block(6), input=lambda: torch.randn(2, 3, 6)),
    Host(
        name="attention",
        make=lambda: Attention(8),
        input=lambda: torch.randn(2, 8, 5, 4),
        wrap=TokenMap,
        grid=(5, 4),
    ),
]


class Wrapper(nn.Module):
    """A model of one host, so that the host has a path and the model keeps parameters of its own."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Tensor:
        y = self.host(x)
        return y if isinstance(y, Tensor) else y[0]


def model_of(host: Host, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A frozen-in-time model and an input: the same for the same seed."""
    torch.manual_seed(seed)
    model = (host.wrap or Wrapper)(host.make()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return model, host.input()


def configs(name: str) -> Iterator[dict[str, Any]]:
    """Every required option at a small value; then each boolean turned and each choice taken once."""
    document = kinds.get(name).document
    base: dict[str, Any] = {}
    for key, option in document.config.items():
        if option.default is MISSING:
            low = option.minimum
            base[key] = (
                option.enum[0]
                if option.enum
                else {
                    "integer": int(low) if low is not None and low > 2 else 2,
                    "number": 0.7,
                    "boolean": True,
                    "string": "",
                }[option.type]
            )
    yield base
    for key, option in document.config.items():
        if option.type == "boolean":
            yield {**base, key: not option.default}
        elif option.enum:
            yield {**base, key: option.enum[-1]}


def fits(name: str, config: Mapping[str, Any], host: Host) -> bool:
    """Whether a kind goes on a host with this config; a refusal is an error of ours and nothing else."""
    kind = kinds.get(name)
    if kind.document.context and host.grid is None:
        return False
    if host.name == "transformer" and "transformer" not in kind.hosts:
        return False  # a block like any other
    module = host.make()
    view = view_of(module)
    try:
        shape = shape_of(module, type(module), kind.hosts, view.shape(module, type(module)))
        shape = prompting.shape_of(module, type(module), kind.hosts, shape)
        checked = kind.check_config(config)
        kind.fits(shape, checked)
        kind.tensors(checked, shape)
        check_bias(kind.ports(checked, shape), module, type(module), host.name)
    except DeltaHubError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind with a config on a host."""

    kind: str
    config: tuple[tuple[str, Any], ...]
    host: Host

    @property
    def family(self) -> str:
        module = self.host.make()
        return view_of(module).shape(module, type(module)).family

    @property
    def id(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.config)
        return f"{self.kind}[{options}]-{self.host.name}"


CASES = [
    Case(kind=name, config=tuple(config.items()), host=host)
    for name in kinds.names()
    for config in configs(name)
    for host in HOSTS
    if fits(name, config, host)
]


def randomise(parameters: Any, seed: int = 1) -> None:
    """Give tensors of a fresh delta values as if trained, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.3)
