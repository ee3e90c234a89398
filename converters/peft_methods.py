"""PEFT's other methods: what each stores, and the kind that computes the same. LoRA has a room of its own.

A method is a line of a table: the endings of its keys, the configuration it reads, and a function that turns one
module's tensors into a site. Whatever its configuration holds beside that and the keys that never matter is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, Keys
from deltahub.converters.parameters import whole
from deltahub.converters.peft_config import Scales, Wanted
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

    from deltahub.kinds import HostShape

__all__ = ["METHODS", "Method", "tokens"]

_INERT = frozenset(
    """
    auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out feedforward_modules inference_mode
    init_alpha init_beta init_ia3_weights init_scale init_weights layers_pattern layers_to_transform module_dropout
    modules_to_save peft_type peft_version rank_dropout rank_dropout_scale revision runtime_config target_modules
    task_type
    """.split()  # noqa: SIM905
)

_Part = Mapping[str, "Tensor"]
_Make = Callable[[str, _Part, Mapping[str, Any], "Scales | None", "HostShape"], Entry]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One of PEFT's methods.

    Attributes:
        endings: of its keys, and the name of each tensor here.
        reads: the parts of its configuration that matter, all of which ``make`` looks at.
        make: the site that one module's tensors are.
        needed: tensors without which there is no site.
        scaled: whether it has an alpha, a rank and patterns of both, as LoRA has.
    """

    endings: Mapping[str, str]
    reads: frozenset[str]
    make: _Make
    needed: frozenset[str] = frozenset()
    scaled: bool = False

    def read(self, config: Mapping[str, Any], keys: Keys, base: Base) -> list[Entry]:
        """All sites of an adapter.

        Raises:
            ConverterError: as :func:`deltahub.converters.peft.import_`.
        """
        patterns = {"rank_pattern", "alpha_pattern", "r", "alpha"} if self.scaled else set()
        unknown = sorted(k for k, v in config.items() if v and k not in _INERT and k not in self.reads | patterns)
        if unknown or config.get("bias") not in {None, "none"}:
            raise ConverterError(
                "E_CONVERT_CONFIG",
                "the configuration has keys that are not known here; one of them may change what is computed",
                where=config.get("peft_type"),
                found=", ".join(unknown) or f"bias={config.get('bias')}",
            )
        scales = None
        if self.scaled:
            scales = Scales({**config, "lora_alpha": config.get("alpha"), "use_rslora": False})
        sites: dict[str, dict[str, Tensor]] = {}
        plain = []
        for key in keys:
            ending = next((end for end in self.endings if key.endswith(end)), None)
            if ending is None:
                plain.append(key)
            else:
                sites.setdefault(key.removesuffix(ending), {})[self.endings[ending]] = keys.take(key)
        entries = whole(plain, keys, base)
        keys.finish()
        for path, part in sites.items():
            missing = sorted(self.needed - part.keys())
            if missing:
                raise ConverterError("E_CONVERT_MISSING", "tensors are missing", where=path, found=", ".join(missing))
            entries.append(self.make(path, part, config, scales, base.arch.host(path).shape))
        if scales is not None:
            scales.finish(sites)
        Wanted(config, base).check(sites, keys.where)
        return entries


def _scale(scales: Scales | None, path: str, rank: int) -> float:
    assert scales is not None
    return scales.of(path, rank)


def _ia3(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    value = part["l"]
    if value.ndim != 2 or 1 not in value.shape:
        raise ConverterError("E_CONVERT_SHAPE", "this is no vector of multipliers", where=path, found=list(value.shape))
    inner = value.shape[0] == 1 and value.shape[1] != 1
    axis, name = ("in", "gain_in") if inner else ("out", "gain")
    return Entry(path=path, kind="ia3", config={"axis": axis}, tensors={name: value.reshape(-1)})


def _loha(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    rank = int(part["w1_a"].shape[1])
    tensors = {"up_1": part["w1_a"], "down_1": part["w1_b"], "up_2": part["w2_a"], "down_2": part["w2_b"]}
    values = {"rank": rank, "scale": _scale(scales, path, rank)}
    return Entry(path=path, kind="loha", config=values, tensors=tensors)


def _lokr(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    first = "whole" if "w1" in part else "low-rank"
    second = "whole" if "w2" in part else "low-rank"
    names = {"w1": "w1", "w1_a": "w1_up", "w1_b": "w1_down", "w2": "w2", "w2_a": "w2_up", "w2_b": "w2_down"}
    tensors = {names[name]: value for name, value in part.items()}
    try:
        rows = tensors["w1"].shape[0] if first == "whole" else tensors["w1_up"].shape[0]
        columns = tensors["w1"].shape[1] if first == "whole" else tensors["w1_down"].shape[1]
    except KeyError as error:
        raise ConverterError("E_CONVERT_MISSING", "a tensor is missing", where=path, found=error) from None
    found = [int(tensors[n].shape[1]) for n in ("w1_up", "w2_up") if n in tensors]
    rank = found[0] if found else int(config.get("r") or 1)
    values = {
        "rows": int(rows),
        "columns": int(columns),
        "rank": rank,
        "first": first,
        "second": second,
        "scale": _scale(scales, path, rank),
    }
    return Entry(path=path, kind="lokr", config=values, tensors=tensors)


def _hira(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    rank = int(part["A"].shape[0])
    return Entry(
        path=path, kind="hira", config={"rank": rank, "scale": 1.0}, tensors={"down": part["A"], "up": part["B"]}
    )


def _hra(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    values = {"rank": int(part["u"].shape[1]), "orthogonal": bool(config.get("apply_GS"))}
    return Entry(path=path, kind="hra", config=values, tensors={"vectors": part["u"]})


def _oft(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    rows = part["R"]
    width = round((1 + (1 + 8 * rows.shape[1]) ** 0.5) / 2)
    shared = bool(config.get("block_share"))
    terms = int(config.get("num_cayley_neumann_terms") or 5) if config.get("use_cayley_neumann", True) else 0
    values = {"block": width, "terms": terms, "shared": shared}
    if terms == 0:
        rows = -rows  # PEFT's two ways to the rotation turn in opposite directions
    tensors = {"shared_rotation": rows.reshape(-1)} if shared else {"rotation": rows}
    return Entry(path=path, kind="oft", config=values, tensors=tensors)


def _boft(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    """PEFT keeps whole matrices and uses what is skew in them: their upper triangles say that."""
    import torch

    whole_ = part["R"]
    factors, _, block, _ = whole_.shape
    skew = (whole_.transpose(-1, -2) - whole_) / 2
    rows, columns = torch.triu_indices(block, block, 1)
    values = {"block": int(block), "factors": int(factors), "side": "in"}
    tensors = {"rotation": skew[..., rows, columns].contiguous(), "gain": part["s"].reshape(-1)}
    return Entry(path=path, kind="boft", config=values, tensors=tensors)


def _road(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    variant = str(config.get("variant", "road_1")).removeprefix("road_")
    if not variant.isdigit():
        raise ConverterError("E_CONVERT_CONFIG", "this variant is not known", where=path, found=config.get("variant"))
    values = {"size": config.get("group_size"), "variant": int(variant)}
    return Entry(path=path, kind="road", config=values, tensors={"theta": part["theta"], "alpha": part["alpha"]})


def _miss(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    block, start = part["block"], config.get("init_weights")
    if start == "bat":
        values, tensors = {"rank": int(block.shape[-1]), "variant": "affine"}, {"square": block}
    elif start == "mini":
        values = {"rank": int(block.shape[0]), "variant": "mini", "width": int(block.shape[1])}
        tensors = {"mini_block": block}
    else:
        values, tensors = {"rank": int(block.shape[0]), "variant": "tile"}, {"block": block}
    return Entry(path=path, kind="miss", config=values, tensors=tensors)


def _delora(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    values = {"rank": int(part["A"].shape[0]), "bound": float(config.get("delora_lambda") or 0)}
    tensors = {"down": part["A"], "up": part["B"], "strength": part["lambda"], "gain": part["w_norm"]}
    return Entry(path=path, kind="delora", config=values, tensors=tensors)


def _c3a(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    kernel = part["kernel"]
    return Entry(path=path, kind="c3a", config={"block": int(kernel.shape[2])}, tensors={"kernel": kernel})


def _ln(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    return Entry(path=path, kind="assign", tensors=dict(part), group="norms")


def _adalora(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    """What its allocation left of the rank is in the file already; alpha is over that, and a hundred-thousandth."""
    rank, alpha = int(part["A"].shape[0]), config.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise ConverterError(
            "E_CONVERT_CONFIG", "lora_alpha is missing or no number", where=path, found=repr(alpha)[:60]
        )
    values = {"rank": rank, "scale": float(alpha if alpha > 0 else rank) / (rank + 1e-5)}
    tensors = {"down": part["A"], "values": part["E"].reshape(-1), "up": part["B"]}
    return Entry(path=path, kind="adalora", config=values, tensors=tensors)


def _shira(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    import torch

    rows, columns = part["indices"].to(torch.int64)
    limits = (shape.d_out or 0, shape.d_in or 0)
    if any(bool((one < 0).any() | (one >= size).any()) for one, size in zip((rows, columns), limits, strict=True)):
        raise ConverterError("E_CONVERT_SHAPE", "a place lies outside the weight", where=path, expected=list(limits))
    places = (rows * limits[1] + columns).to(torch.int32)
    values = {"count": len(places), "scale": 1.0}
    return Entry(path=path, kind="sparse", config=values, tensors={"places": places, "values": part["weight"]})


def _beft(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    return Entry(path=path, kind="bias", config={"scale": 1.0}, tensors={"value": part["bias"].reshape(-1)})


def _gralora(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    a, b, alpha = part["A"], part["B"], config.get("alpha")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or config.get("hybrid_r"):
        raise ConverterError(
            "E_CONVERT_CONFIG", "alpha is no number, or there is a second update for all blocks", where=path,
            found=f"alpha={alpha!r}, hybrid_r={config.get('hybrid_r')!r}"[:80],
        )  # fmt: skip
    blocks, rank = int(a.shape[0]), int(a.shape[2])
    tensors = {
        "down": a.reshape(*a.shape[:2], blocks, rank // blocks),
        "up": b.reshape(blocks, blocks, rank // blocks, -1),
    }
    values = {"rank": rank, "blocks": blocks, "scale": float(alpha) / rank}
    return Entry(path=path, kind="gralora", config=values, tensors=tensors)


def _tokens(path: str, part: _Part, config: Mapping[str, Any], scales: Scales | None, shape: HostShape) -> Entry:
    return tokens(path, part["rows"], config.get("token_indices"))


def tokens(path: str, rows: Tensor, places: object) -> Entry:
    """Rows of an embedding that take the place of the backbone's.

    Raises:
        ConverterError: ``E_CONVERT_CONFIG`` where the places are no list of as many different rows.
    """
    import torch

    if (
        not isinstance(places, list)
        or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in places)
        or len(set(places)) != len(places) != 0
        or len(places) != rows.shape[0]
    ):
        raise ConverterError(
            "E_CONVERT_CONFIG",
            "the rows that are replaced are not named, or not as many as the file has",
            where=path,
            expected=int(rows.shape[0]),
            found=repr(places)[:80],
        )
    tensors = {"places": torch.tensor(places, dtype=torch.int32), "rows": rows}
    return Entry(path=path, kind="tokens", config={"count": len(places)}, tensors=tensors)


def _all(*names: str) -> frozenset[str]:
    return frozenset(names)


METHODS: Mapping[str, Method] = {
    "ADALORA": Method(
        endings={".lora_A": "A", ".lora_B": "B", ".lora_E": "E"},
        reads=_all(
            "lora_alpha",
            "rank_pattern",
            "r",
            "init_r",
            "target_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "total_step",
            "lora_dropout",
            "init_lora_weights",
            "loftq_config",
            "megatron_core",
            "qalora_group_size",
            "use_rslora",
        ),
        needed=_all("A", "B", "E"),
        make=_adalora,
    ),
    "BEFT": Method(endings={".beft_bias": "bias"}, reads=_all(), make=_beft),
    "BOFT": Method(
        endings={".boft_R": "R", ".boft_s": "s"},
        reads=_all("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"),
        needed=_all("R", "s"),
        make=_boft,
    ),
    "C3A": Method(endings={".c3a_kernel": "kernel"}, reads=_all("block_size"), make=_c3a),
    "DELORA": Method(
        endings={".delora_A": "A", ".delora_B": "B", ".delora_lambda": "lambda", ".delora_w_norm": "w_norm"},
        reads=_all("r", "delora_lambda"),
        needed=_all("A", "B", "lambda", "w_norm"),
        make=_delora,
    ),
    "GRALORA": Method(
        endings={".gralora_A": "A", ".gralora_B": "B"},
        reads=_all("r", "alpha", "gralora_k", "hybrid_r", "gralora_dropout"),
        needed=_all("A", "B"),
        make=_gralora,
    ),
    "HIRA": Method(endings={".hira_A": "A", ".hira_B": "B"}, reads=_all("r"), needed=_all("A", "B"), make=_hira),
    "HRA": Method(endings={".hra_u": "u"}, reads=_all("r", "apply_GS"), make=_hra),
    "IA3": Method(endings={".ia3_l": "l"}, reads=_all(), make=_ia3),
    "LN_TUNING": Method(
        endings={".ln_tuning_layers.weight": "weight", ".ln_tuning_layers.bias": "bias"}, reads=_all(), make=_ln
    ),
    "LOHA": Method(
        endings={f".hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        reads=_all(),
        needed=_all("w1_a", "w1_b", "w2_a", "w2_b"),
        make=_loha,
        scaled=True,
    ),
    "LOKR": Method(
        endings={f".lokr_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "w1", "w2")},
        reads=_all("decompose_both", "decompose_factor"),
        make=_lokr,
        scaled=True,
    ),
    "MISS": Method(endings={".miss_block": "block"}, reads=_all("r", "mini_r", "miss_dropout"), make=_miss),
    "OFT": Method(
        endings={".oft_R.weight": "R"},
        reads=_all("r", "oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "eps"),
        make=_oft,
    ),
    "ROAD": Method(
        endings={".road_theta": "theta", ".road_alpha": "alpha"},
        reads=_all("variant", "group_size"),
        needed=_all("theta", "alpha"),
        make=_road,
    ),
    "SHIRA": Method(
        endings={".shira_weight": "weight", ".shira_indices": "indices"},
        reads=_all("r", "mask_type", "random_seed"),
        needed=_all("weight", "indices"),
        make=_shira,
    ),
    "TRAINABLE_TOKENS": Method(
        endings={".token_adapter.trainable_tokens_delta": "rows", ".trainable_tokens_delta": "rows"},
        reads=_all("token_indices"),
        make=_tokens,
    ),
}
