"""What a PEFT configuration says: which of it matters to the arithmetic, the scale of each module, what is targeted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from deltahub.converters.base import Base

__all__ = ["EXTENSION", "Scales", "Wanted", "check_config", "kept", "literal"]

EXTENSION = "co.huggingface.peft"
"""Where a package keeps the configuration that it was made from, for the way back."""

# Keys that say nothing about what is computed from the tensors in the file.
_INERT = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config enable_lora ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config
    lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core merge_weights modules_to_save
    peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_rslora
    """.split()  # noqa: SIM905
)
# Keys that change the arithmetic in a way that no tensor of the file shows, and the value that means "not used".
_ACTIVE = {
    "alora_invocation_tokens": "the update acts only after certain tokens",
    "arrow_config": "a router mixes several adapters",
    "kasa_config": "the backbone itself was cut to its largest singular values before training",
    "layer_replication": "layers of the backbone are repeated",
    "monteclora_config": "the update is sampled",
    "target_parameters": "parameters without a module are targeted, and the file does not say which",
    "trainable_token_indices": "",
    "use_bdlora": "the factors are block-diagonal",
    "use_dora": "",
    "use_qalora": "inputs are pooled first",
    "velora_config": "the update is trained on sketched inputs",
}
# Initialisations that also change the backbone: the file alone does not say what it is added to.
_MUTATING = ("pissa", "olora", "loftq", "corda", "lora_ga")


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse what would change the arithmetic and is not done here.

    Raises:
        ConverterError: ``E_CONVERT_CONFIG`` for unknown keys and wrong types, ``E_CONVERT_UNSUPPORTED``.
    """
    unknown = [key for key, value in config.items() if key not in _INERT and key not in _ACTIVE and value]
    if unknown:
        raise ConverterError(
            "E_CONVERT_CONFIG",
            "the configuration has keys that are not known here; one of them may change what is computed",
            where=where,
            found=", ".join(sorted(unknown)),
            hint="it was written by a newer PEFT; a newer DeltaHub may know them",
        )
    for key, why in _ACTIVE.items():
        if config.get(key) and why:
            _unsupported(where, key, config[key], why)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_MUTATING):
        _unsupported(
            where,
            "init_lora_weights",
            start,
            "this initialisation changed the backbone too, so the adapter does not belong to the backbone as published",
            hint="convert it to a plain LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion=…)",
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            if key == "lora_alpha" and isinstance(value, (int, float)) and value <= 0 and not isinstance(value, bool):
                continue  # a zero or negative alpha is odd and means what it says
            raise ConverterError(
                "E_CONVERT_CONFIG",
                f"{key} is missing or no number; it is not guessed",
                where=where,
                found=repr(value)[:60],
            )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ConverterError("E_CONVERT_CONFIG", f"{key} is no object", where=where, found=config[key])


def _unsupported(where: object, key: str, value: object, why: str, *, hint: str | None = None) -> None:
    raise ConverterError(
        "E_CONVERT_UNSUPPORTED", f"{key}: {why}", where=where, found=repr(value)[:80], hint=hint or "merge it with PEFT"
    )


def kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration for a package's extensions: lists that PEFT writes out of sets are put in order."""
    found = dict(config)
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(found.get(key), list):
            found[key] = sorted(found[key])
    return {"config": found}


def literal(pattern: str) -> tuple[str, bool] | None:
    """A pattern that is only a name: the name, and whether it is anchored at the root; ``None`` for a real one.

    PEFT looks for the pattern at the end of a path and at a dot: a name means every module whose path ends in it.
    """
    anchored = pattern.startswith("^")
    text = pattern.removeprefix("^").removesuffix("$")
    text = re.sub(r"\\([.\-_])", r"\1", text)
    if text.startswith(".*."):
        text = text.removeprefix(".*.")
    return (text, anchored) if re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", text) else None


class Scales:
    """The one factor of each module, out of alpha, rank, their patterns, and the choice of a square root.

    Raises:
        ConverterError: ``E_CONVERT_PATTERN`` for a pattern that is a regular expression.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.rank, self.alpha = config["r"], config["lora_alpha"]
        self.root = bool(config.get("use_rslora"))
        self.patterns: dict[str, list[tuple[str, str, bool, Any]]] = {"rank_pattern": [], "alpha_pattern": []}
        for key, table in self.patterns.items():
            for pattern, value in (config.get(key) or {}).items():
                name = literal(pattern)
                if name is None:
                    raise ConverterError(
                        "E_CONVERT_PATTERN",
                        "a pattern is a regular expression; those out of a stranger's file are never run",
                        where=key,
                        found=pattern,
                        hint="replace it by the names of the modules it stands for",
                    )
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ConverterError("E_CONVERT_CONFIG", f"{key} is no number", where=pattern, found=value)
                table.append((pattern, *name, value))
        self._used: set[tuple[str, str]] = set()

    def _look(self, key: str, path: str, default: Any) -> Any:
        for pattern, name, anchored, value in self.patterns[key]:
            if path == name or (not anchored and path.endswith(f".{name}")):
                self._used.add((key, pattern))
                return value
        return default

    def of(self, path: str, rank: int) -> float:
        """The factor of a module whose pair of tensors has this rank.

        Raises:
            ConverterError: ``E_CONVERT_RANK`` where the configuration says another rank than the tensors have.
        """
        declared = self._look("rank_pattern", path, self.rank)
        if declared != rank:
            raise ConverterError(
                "E_CONVERT_RANK",
                "the tensors have another rank than the configuration says, so its scale cannot be trusted",
                where=path,
                expected=declared,
                found=rank,
            )
        alpha = self._look("alpha_pattern", path, self.alpha)
        return float(alpha / math.sqrt(rank) if self.root else alpha / rank)

    def finish(self, paths: Iterable[str]) -> None:
        """Refuse a pattern that no module matched: whoever wrote it meant one.

        Raises:
            ConverterError: ``E_CONVERT_PATTERN``.
        """
        left = [f"{key}: {p}" for key, table in self.patterns.items() for p, *_ in table if (key, p) not in self._used]
        if left:
            raise ConverterError(
                "E_CONVERT_PATTERN", "a pattern matches none of the adapted modules", found=left[0], also=left[1:]
            )


class Wanted:
    """The modules that a configuration targets, where it names them and not a regular expression."""

    def __init__(self, config: Mapping[str, Any], base: Base) -> None:
        self.config, self.base = config, base

    def check(self, adapted: Iterable[str], where: object) -> None:
        """Refuse a file that adapts fewer modules than its configuration targets, or others.

        Raises:
            ConverterError: ``E_CONVERT_INCOMPLETE``, naming the modules.
        """
        targets = self.config.get("target_modules")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            return  # a regular expression, or all linear layers: what the file holds is what there is
        found = set(adapted)
        unmet = sorted(t for t in targets if not any(_ends(path, t) for path in found))
        if unmet:
            self._fail("a target is met by no tensor of the file", unmet, where)
        strange = sorted(path for path in found if not any(_ends(path, t) for t in targets))
        if strange:
            self._fail("the file adapts modules that the configuration does not target", strange, where)
        missing = sorted(set(self._expected(targets)) - found)
        if missing:
            self._fail("modules of the backbone are targeted, and the file has nothing for them", missing, where)

    def _fail(self, what: str, names: list[str], where: object) -> None:
        raise ConverterError(
            "E_CONVERT_INCOMPLETE",
            what,
            where=where,
            found=names[0],
            hint="is this the backbone it was made for, with as many layers?",
            also=names[1:],
        )

    def _expected(self, targets: list[str]) -> Iterable[str]:
        excluded = self.config.get("exclude_modules")
        if isinstance(excluded, str):
            return
        skip = [*(excluded or ()), *(self.config.get("modules_to_save") or ())]
        layers = self.config.get("layers_to_transform")
        chosen = {layers} if isinstance(layers, int) else None if layers is None else set(layers)
        for path, module in self.base.arch.model.named_modules():
            if not path or any(True for _ in module.children()):
                continue
            if not any(_ends(path, t) for t in targets) or any(_ends(path, s) or f".{s}." in f".{path}." for s in skip):
                continue
            numbers = [int(part) for part in path.split(".") if part.isdigit()]
            if chosen is not None and not (numbers and numbers[0] in chosen):
                continue
            yield path


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
