"""Learned words as they are shared: `{word: vectors}` of a few kilobytes, to be read into any model with the same text tower."""
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.weights.files import write_state


def read_concept(path: str | Path, width: int = 0) -> dict[str, Tensor]:
    """Word -> vectors [N,D] of `learned_embeds.bin` or .safetensors ({word: [D] or [N,D]}) or `embeddings.pt` (string_to_param).

    Pickles are read without running anything they contain. UserError for other files, and for vectors that are not `width` wide where it is given.
    """
    place = Path(path)
    if not place.is_file():
        raise UserError(f"no file {str(path)!r}", "check the path")
    if not place.stat().st_size:
        raise UserError(f"{place.name} is empty", "fetch it again")
    if place.suffix == ".safetensors":
        from polysense.weights.files import read_state
        loaded: Any = read_state(place)
    else:
        try:
            loaded = torch.load(place, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise UserError(f"{place.name} is damaged, or would run code and was not read", "get it as .safetensors") from error
    table: Any = loaded if hasattr(loaded, "items") else {}
    table = table.get("string_to_param", table)
    items = cast(list[tuple[Any, Any]], list(table.items()))
    out = {str(k): v.detach().float().reshape(-1, v.shape[-1]) for k, v in items if isinstance(v, Tensor) and v.ndim in (1, 2)}
    if not out:
        raise UserError(f"{place.name} holds no learned words", "it should be {word: vector} or have string_to_param")
    if wrong := [k for k, v in out.items() if width and v.shape[1] != width]:
        raise UserError(f"{wrong[0]!r} is {out[wrong[0]].shape[1]} wide, the text tower {width}", "it was learned on another kind of model")
    return out


def write_concept(path: str | Path, words: dict[str, Tensor]) -> Path:
    """Writes {word: [D] (one vector) or [N,D]}, as .bin or .safetensors; returns the path."""
    place = Path(path)
    if place.suffix not in (".bin", ".safetensors"):
        raise UserError(f"cannot write {place.name!r}", "give a name that ends in .bin or .safetensors")
    place.parent.mkdir(parents=True, exist_ok=True)
    write_state(place, {k: v[0] if len(v) == 1 else v for k, v in words.items()})
    return place
