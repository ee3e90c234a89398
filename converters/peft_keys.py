"""Keys of adapters as they are really written: with wrappers' names in them, adapters' names, other prefixes, or none.

PEFT writes ``base_model.model.`` before a module's path and leaves the adapter's name out. What trains with it
(Unsloth, Axolotl, FSDP, torch.compile, a plain ``torch.save`` of the state) writes less or more. Whatever is taken
away or put before a path is said, and every tensor has to land on a module of the backbone, or the import fails.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from deltahub.converters.base import Base
from deltahub.converters.naming import tables
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fitted", "live_names"]

logger = logging.getLogger("deltahub")

_PREFIX = "base_model.model."
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
# The last words of PEFT's keys, after which the adapter's name stands in a model's own state.
_ADAPTER = re.compile(
    r"\.(?P<word>lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)|modules_to_save|ia3_l|hada_\w+|lokr_\w+"
    r"|trainable_tokens_delta|ln_tuning_layers|oft_R|boft_[Rs]|hra_u|miss_block|hira_[AB]|vera_lambda_[bd])"
    r"\.(?P<name>(?!weight$|bias$)[^.]+)(?=\.|$)"
)


def live_names(tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """Keys without PEFT's prefix, the names of wrappers, and the adapter's name.

    Raises:
        ConverterError: ``E_CONVERT_KEY`` where two keys are one tensor, only some have the prefix, or there are several
            adapters; ``E_CONVERT_SHAPE`` for an empty tensor, as a sharded model leaves them behind.
    """
    found: dict[str, Tensor] = {}
    prefixed = sum(key.startswith(_PREFIX) for key in tensors)
    adapters: set[str] = set()
    for key, value in tensors.items():
        if value.numel() == 0:
            raise ConverterError(
                "E_CONVERT_SHAPE",
                "a tensor is empty: the adapter was saved while the model was sharded",
                where=where,
                found=key,
                hint="save it again after gathering the weights (DeepSpeed: stage3_gather_16bit_weights_on_model_save)",
            )
        name = key
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if name.startswith(_PREFIX):
            name = name.removeprefix(_PREFIX)
        elif prefixed:
            raise ConverterError(
                "E_CONVERT_KEY",
                "a key does not begin as the others do, so PEFT itself would ignore it",
                where=where,
                expected=f"{_PREFIX}…",
                found=key,
            )
        named = _ADAPTER.search(name)
        if named is not None:
            adapters.add(named["name"])
            cut = named.start("word") if named["word"] == "modules_to_save" else named.start("name")
            name = name[:cut].removesuffix(".") + name[named.end("name") :]
        if name in found:
            raise ConverterError("E_CONVERT_KEY", "two keys are one tensor", where=where, found=key)
        found[name] = value
    if len(adapters) > 1:
        raise ConverterError(
            "E_CONVERT_KEY",
            "there are several adapters in one file",
            where=where,
            found=", ".join(sorted(adapters)),
            hint="save each of them by itself",
        )
    if not prefixed and found:
        logger.warning("the keys of %s do not begin with %s: PEFT itself would ignore them", where, _PREFIX)
    return found


def fitted(tensors: Mapping[str, Tensor], base: Base, where: object) -> dict[str, Tensor]:
    """Keys with another beginning, where no key fits the backbone as it is and all of them do with that.

    Libraries rename the first levels of a model from one version to the next, and tools save parts of it.
    """
    paths = {name for name, _ in base.arch.model.named_modules() if name}
    if not tensors or any(_known(key, paths) for key in tensors):
        return dict(tensors)
    for old, new in tables()["beginnings"]["pairs"]:
        if all(key.startswith(old) for key in tensors):
            made = {new + key.removeprefix(old): value for key, value in tensors.items()}
            if all(_known(key, paths) for key in made):
                logger.warning("the keys of %s begin with %r where the backbone has %r", where, old, new)
                return made
    return dict(tensors)


def _known(key: str, paths: Iterable[str]) -> bool:
    """Whether a key lies under a module with a parameter of its own: some beginning of it, of two words at least."""
    words = key.split(".")
    return any(".".join(words[:end]) in paths for end in range(len(words) - 1, max(0, len(words) - 4), -1))
