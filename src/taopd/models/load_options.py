"""Options of transformers' `from_pretrained`: by the names that it reads, and those that are refused."""

from collections.abc import Mapping
from typing import Any

from taopd.errors import DataError

NO_PICKLES = "pickles (.bin, .pt) are never read, save it again with safetensors"
_SAFE = {"trust_remote_code": False, "use_safetensors": True}


def current_names(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options with `dtype` for `torch_dtype`, its older name, which counts only where no other is given.

    Defaults of ours hold a `dtype`: beside it the older name would be passed over without a word.
    """
    named = dict(options or {})
    older = named.pop("torch_dtype", None)
    return named if older is None else {"dtype": older} | named


def safe_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that run no code and read no pickle.

    Raises:
        DataError: an option that asks for either.
    """
    options = current_names(options)
    # Refused, not overwritten: who asked for it must know that it did not happen.
    for name, safe in _SAFE.items():
        if options.setdefault(name, safe) != safe:
            raise DataError(
                f"{name}={options[name]!r}: taopd runs no code of a model repository and reads weights "
                "from safetensors only"
            )
    attention = str(options.get("attn_implementation") or "")
    if "/" in attention or options.get("use_kernels"):
        raise DataError(
            f"attn_implementation={attention!r}: kernels from a hub are code, and are never run; use "
            "eager, sdpa or flash_attention_2"
        )
    return options
