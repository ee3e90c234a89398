"""What a layer of peft holds, as kinds, configs and tensors of ours: one function for each of its methods.

What peft stores is mapped as an importer maps it: scales become one effective number, convolutions' flattened kernels
get their axes back, and methods that are low-rank maps in disguise become ``lora``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Entry = tuple[str, dict[str, Any], dict[str, Tensor]]
"""A kind, its config, its tensors."""


def one(kind: str, tensors: dict[str, Tensor], **config: Any) -> list[Entry]:
    return [(kind, config, tensors)]


def w(module: Any, name: str) -> Tensor:
    """The tensor of the adapter called default."""
    value = getattr(module, name)["default"]
    return value.weight if isinstance(value, nn.Module) else value


def lora(down: Tensor, up: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> list[Entry]:
    extra = {} if bias is None else {"bias": bias}
    config = {"rank": down.shape[0], "scale": scale, "biased": bias is not None}
    return one("lora", {"down": down, "up": up, **extra}, **config)


def upper(skew: Tensor) -> Tensor:
    """The strict upper triangle of skew matrices, row by row."""
    i, j = torch.triu_indices(skew.shape[-1], skew.shape[-1], 1)
    return skew[..., i, j]


# ------------------------------------------------------------------------------------------------ low rank


def dora(m: Any) -> list[Entry]:
    if hasattr(m, "lora_embedding_A") and m.lora_embedding_A:
        down, up = w(m, "lora_embedding_A"), w(m, "lora_embedding_B")
    else:
        down, up = w(m, "lora_A"), w(m, "lora_B").flatten(1)
    magnitude = w(m, "lora_magnitude_vector").flatten()
    return one("dora", {"down": down, "up": up, "magnitude": magnitude}, rank=4, scale=m.scaling["default"])


def hira(m: Any) -> list[Entry]:
    if m.hira_embedding_A:
        return one("hira", {"down": w(m, "hira_embedding_A"), "up": w(m, "hira_embedding_B")}, rank=4)
    return one("hira", {"down": w(m, "hira_A"), "up": w(m, "hira_B").flatten(1)}, rank=4)


def adalora(m: Any) -> list[Entry]:
    tensors = {"down": w(m, "lora_A"), "values": w(m, "lora_E")[:, 0], "up": w(m, "lora_B")}
    return one("adalora", tensors, rank=4, scale=m.scaling["default"] / (float(m.ranknum["default"]) + 1e-5))


def loha(m: Any) -> list[Entry]:
    shape = m.base_layer.weight.shape
    tensors: dict[str, Tensor] = {}
    tucker = "default" in m.hada_t1
    for i in (1, 2):
        a, b = w(m, f"hada_w{i}_a"), w(m, f"hada_w{i}_b")
        if tucker:
            tensors |= {f"up_{i}": a.T, f"core_{i}": w(m, f"hada_t{i}"), f"inner_{i}": b}
        else:
            tensors |= {f"up_{i}": a, f"down_{i}": b.reshape(-1, *shape[1:])}
    return one("loha", tensors, rank=2, scale=m.scaling["default"], tucker=tucker)


def lokr(m: Any) -> list[Entry]:
    shape = m.base_layer.weight.shape
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {"first": "whole", "second": "whole"}
    if "default" in m.lokr_w1:
        tensors["w1"] = w(m, "lokr_w1")
        rows, columns = tensors["w1"].shape
    else:
        config["first"] = "low-rank"
        tensors |= {"w1_up": w(m, "lokr_w1_a"), "w1_down": w(m, "lokr_w1_b")}
        rows, columns = len(tensors["w1_up"]), tensors["w1_down"].shape[1]
    if "default" in m.lokr_w2:
        tensors["w2"] = w(m, "lokr_w2")
    elif "default" in m.lokr_t2:
        config["second"] = "tucker"
        tensors |= {"w2_up": w(m, "lokr_w2_a").T, "w2_core": w(m, "lokr_t2"), "w2_inner": w(m, "lokr_w2_b")}
    else:
        config["second"] = "low-rank"
        down = w(m, "lokr_w2_b").reshape(-1, shape[1] // columns, *shape[2:])
        tensors |= {"w2_up": w(m, "lokr_w2_a"), "w2_down": down}
    config |= {"rows": rows, "columns": columns, "rank": m.r["default"], "scale": m.scaling["default"]}
    return one("lokr", tensors, **config)


def vera(m: Any) -> list[Entry]:
    down, up = m.vera_A["default"][:, : m.in_features], m.vera_B["default"][: m.out_features]
    return one("vera", {"down": down, "up": up, "inner": w(m, "vera_lambda_d"), "outer": w(m, "vera_lambda_b")}, rank=4)


def pvera(m: Any) -> list[Entry]:
    """Outside training the latent is its mean: the first half of the rows."""
    up = m.pvera_B["default"][: m.out_features]
    rank = up.shape[1]
    down = m.pvera_A["default"][:rank, : m.in_features]
    inner = w(m, "pvera_lambda_d")[:rank]
    return one("vera", {"down": down, "up": up, "inner": inner, "outer": w(m, "pvera_lambda_b")}, rank=rank)


def randlora(m: Any) -> list[Entry]:
    n, rank = m.num_bases, m.r["default"]
    low, high = min(m.in_features, m.out_features), max(m.in_features, m.out_features)
    small = m.randlora_A["default"][:, 0, :low]
    # peft flattens the two sides in different orders; the pairs that meet are these.
    large = m.randlora_B["default"][:high, :n].flatten(1).reshape(high, rank, n)
    gamma, coefficients = w(m, "randlora_gamma"), w(m, "randlora_lambda")
    tensors = {"coefficients": coefficients}
    if low == m.in_features:
        tensors |= {"large_out": large, "small_in": small, "gamma_in": gamma}
    else:
        tensors |= {"large_in": large.movedim(0, -1), "small_out": small.T, "gamma_out": gamma.T}
    narrow = "in" if low == m.in_features else "out"
    return one("randlora", tensors, rank=rank, bases=n, narrow=narrow, scale=m.scaling["default"])


def gralora(m: Any) -> list[Entry]:
    a, b = w(m, "gralora_A"), w(m, "gralora_B")
    k, rank, scale = a.shape[0], a.shape[2], m.scaling["default"]
    down = a.reshape(*a.shape[:2], k, rank // k)
    up = b.reshape(k, k, rank // k, -1)
    entries = one("gralora", {"down": down, "up": up}, rank=rank, blocks=k, scale=scale)
    if m.hybrid_r["default"]:
        entries += lora(w(m, "gralora_A_general"), w(m, "gralora_B_general"), scale)
    return entries


def delora(m: Any) -> list[Entry]:
    tensors = {"down": w(m, "delora_A"), "up": w(m, "delora_B"), "strength": w(m, "delora_lambda")}
    return one("delora", {**tensors, "gain": w(m, "delora_w_norm")}, rank=4)


def tinylora(m: Any) -> list[Entry]:
    # An embedding's A is of the outputs, and its B has a row for every token: the other way round than ours.
    a, b, p = m.tinylora_A["default"], m.tinylora_B["default"], m.tinylora_P["default"]
    v = m.tinylora_v["default"][m._tinylora_v_key["default"]]
    if isinstance(m.base_layer, nn.Embedding):
        a, b, p = b.T, a.T, p.transpose(1, 2)
    return one("tinylora", {"down": a, "up": b, "projection": p, "values": v}, rank=2, count=len(v))


def psoft(m: Any) -> list[Entry]:
    a, b = m._get_psoft_ab_cache_buffers("default")
    r = m.psoft_R["default"]
    ones = torch.ones(len(a))
    tensors = {
        "down": a,
        "up": b * m.scaling["default"],
        "rotation": r.weight,
        "before": ones if r.vector_a is None else r.vector_a,
        "after": ones if r.vector_b is None else r.vector_b,
    }
    return one("psoft", tensors, rank=len(a), terms=5 if r.use_cayley_neumann else 0)


def vblora(m: Any) -> list[Entry]:
    return lora(*m._get_lora_matrices("default"))


def adamss(m: Any) -> list[Entry]:
    new, scatter = m.adamss_newB["default"], m.scatter_index["default"]
    rows = torch.cat([b @ a for a, b in zip(m.adamss_A["default"], m.adamss_B["default"], strict=True)])
    up = torch.zeros(m.base_layer.out_features, new.shape[0]).index_copy(0, scatter, rows)
    return lora(new[:, : m.base_layer.in_features], up, bias=up @ new[:, -1])


def osf(m: Any) -> list[Entry]:
    svd = m.osf_svd_params["default"]
    was = [getattr(m, f"_osf_{n}_low_init")["default"] for n in "USV"]
    up = torch.cat([svd["U_low"] * svd["S_low"], -was[0] * was[1]], 1)
    return lora(torch.cat([svd["V_low"], was[2]]), up)


# ------------------------------------------------------------------------------------------------ products


def oft(m: Any) -> list[Entry]:
    if m.oft_embedding_R:
        # What is rotated there is the rows that come out.
        r = m.oft_embedding_R["default"]
        return one("diag-oft", {"rotation": r.weight}, block=r.block_size)
    r = m.oft_R["default"]
    exact = not r.use_cayley_neumann
    rotation = -r.weight if exact else r.weight  # peft's inverse and its series turn in opposite directions
    config = {"block": r.block_size, "terms": 0 if exact else r.num_cayley_neumann_terms, "shared": r.block_share}
    return one("oft", {"shared_rotation": rotation[0]} if r.block_share else {"rotation": rotation}, **config)


def boft(m: Any) -> list[Entry]:
    r = w(m, "boft_R")
    rotation = -upper((r - r.mT) / 2)
    gain = w(m, "boft_s").flatten()
    return one("boft", {"rotation": rotation, "gain": gain}, block=r.shape[-1], factors=len(r))


def ia3(m: Any) -> list[Entry]:
    gain = w(m, "ia3_l").flatten()
    if m.is_feedforward:
        return one("ia3", {"gain_in": gain}, axis="in")
    return one("ia3", {"gain": gain})


def road(m: Any) -> list[Entry]:
    variant = int(m.variant["default"].removeprefix("road_"))
    tensors = {"theta": w(m, "road_theta"), "alpha": w(m, "road_alpha")}
    return one("road", tensors, size=m.group_size["default"], variant=variant)


def miss(m: Any) -> list[Entry]:
    block = w(m, "miss_block")
    if m.miss_fn == "bat":
        return one("miss", {"square": block}, rank=block.shape[-1], variant="affine")
    if m.miss_fn == "mini":
        return one("miss", {"mini_block": block}, rank=len(block), variant="mini", width=block.shape[1])
    return one("miss", {"block": block}, rank=len(block))


def hra(m: Any) -> list[Entry]:
    u = w(m, "hra_u")
    return one("hra", {"vectors": u}, rank=u.shape[1], orthogonal=m.hra_apply_GS["default"])


def glora(m: Any) -> list[Entry]:
    a, b = m.glora_A["default"], m.glora_B["default"]
    out = m.base_layer.out_features
    tensors: dict[str, Tensor] = {}
    if hasattr(a, "Xd"):
        tensors |= {"a_down": a.Xu, "a_up": a.Xd, "b_down": b.Xu, "b_up": b.Xd}
    else:
        tensors |= {"a": a().flatten().expand(out).clone(), "b_rows": b().flatten().expand(out).clone()}
    if m.base_layer.bias is not None:
        tensors["c"] = m.glora_C["default"]().flatten()
        tensors |= {n: getattr(m, f"glora_{n.upper()}")["default"]().expand(out).clone() for n in "de"}
    return one("glora", tensors, rank=4, paths="low-rank" if hasattr(a, "Xd") else "rows")


def peanut(m: Any) -> list[Entry]:
    tensors = {"down": w(m, "peanut_A"), "up": w(m, "peanut_B")}
    for name in ("encoders", "decoders"):
        layers = getattr(m, f"peanut_{name}")["default"]
        if len(layers):
            tensors[name] = torch.stack([layer.weight for layer in layers])
    config = {"depth": m.depth["default"], "activation": m.act_fn["default"], "scale": m.scaling["default"]}
    return one("peanut", tensors, rank=4, **config)


def deft(m: Any) -> list[Entry]:
    p, _ = m._project(w(m, "deft_P"), "default")
    if m.deft_para["default"]:
        content = torch.zeros(p.shape[1], m.in_features)
    else:
        content = w(m, "deft_R")
    config = {"rank": p.shape[1], "scale": m.deft_scaling["default"]}
    if m.deft_decomposition["default"] == "qr":
        return one("deft", {"subspace": p, "content": content}, projection="orthonormal", **config)
    return one("deft", {"subspace": p, "content": content}, **config)


# ------------------------------------------------------------------------------------------------ spectra, places


def flat(indices: Tensor, columns: int) -> Tensor:
    return (indices[0] * columns + indices[1]).int()


def fourierft(m: Any) -> list[Entry]:
    places = flat(m.indices["default"], m.in_features)
    spectrum = w(m, "fourierft_spectrum")
    scale = m.fourierft_scaling["default"]
    return one("fourierft", {"places": places, "spectrum": spectrum}, count=len(places), scale=scale)


def waveft(m: Any) -> list[Entry]:
    from peft.tuners.waveft.waverec2d import minimal_wavelet

    values, scale = w(m, "waveft_spectrum"), m.waveft_scaling["default"]
    indices = m.waveft_indices["default"]
    if not m.waveft_use_idwt["default"]:
        return one("sparse", {"places": flat(indices, m.in_features), "values": values}, count=len(values), scale=scale)
    wavelet = minimal_wavelet(m.waveft_wavelet_family["default"])
    filters = torch.tensor([wavelet.rec_lo, wavelet.rec_hi])
    length = filters.shape[1]
    high, wide = ((n + length - 1) // 2 * 2 for n in (m.out_features, m.in_features))
    offset = torch.tensor([[(high - m.out_features) // 2], [(wide - m.in_features) // 2]])
    tensors = {"filters": filters, "places": flat(indices + offset, wide), "spectrum": values}
    return one("waveft", tensors, count=len(values), length=length, scale=scale)


def c3a(m: Any) -> list[Entry]:
    return one("c3a", {"kernel": w(m, "c3a_kernel")}, block=m.block_size["default"])


def shira(m: Any) -> list[Entry]:
    places = flat(m.shira_indices["default"], m.in_features)
    tensors = {"places": places, "values": w(m, "shira_weight")}
    return one("sparse", tensors, count=len(places), scale=m.scaling["default"])


def supertuning(m: Any) -> list[Entry]:
    places = m.supertuning_indices["default"].int()
    entries = one("sparse", {"places": places, "values": w(m, "supertuning_values")}, count=len(places))
    if m.supertuning_rank["default"]:
        scale = m.supertuning_lora_alpha["default"] / m.supertuning_rank["default"]
        entries += lora(w(m, "supertuning_lora_A"), w(m, "supertuning_lora_B"), scale)
    return entries


# ------------------------------------------------------------------------------------------------ whole parameters


def beft(m: Any) -> list[Entry]:
    return one("bias", {"value": w(m, "beft_bias").flatten()})


def ln_tuning(m: Any) -> list[Entry]:
    own = m.ln_tuning_layers["default"]
    return one("assign", {"weight": own.weight, "bias": own.bias})


def trainable_tokens(m: Any) -> list[Entry]:
    places = torch.tensor(m.token_indices["default"], dtype=torch.int32)
    return one("tokens", {"places": places, "rows": w(m, "trainable_tokens_delta")}, count=len(places))
