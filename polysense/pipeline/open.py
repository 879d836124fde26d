"""Finding what `polysense.open` was asked for: a run folder, an official checkpoint folder or file, or a hub id."""
import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from polysense.base.catalogue import load, preset_of
from polysense.base.errors import UserError
from polysense.base.plan import Preset


class Speechless:
    """Stands where a checkpoint came without its vocabulary: pictures still work, and whoever gives a text is told why it does not."""

    def __init__(self, why: UserError):
        self.why = why

    def __call__(self, texts: list[str]) -> NoReturn:
        raise UserError(f"this checkpoint came without its tokenizer ({self.why.what})", f"put it beside the weights: {self.why.advice}")


def best_device(name: str | None = None) -> torch.device:
    """The device asked for, else cuda, mps, cpu in this order."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here", "use cpu, or leave it out") from error


def digest_of(system: torch.nn.Module, preset: Preset) -> str:
    """Sixteen hex digits of the weights (names, shapes, bytes) and of how pictures and texts are read: two pipelines with the same digest
    give the same features, so an index made with one can be searched with the other."""
    h = hashlib.blake2b("\n".join(preset.feed.lines()).encode(), digest_size=8)
    for name, value in sorted(system.state_dict().items()):
        h.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


def read_official(path: Path, system: str, layout: str) -> tuple[Any, Preset, Any]:
    """(system, preset, tokenizer) of a published checkpoint in a named layout; the layout is never guessed."""
    from polysense.data.tokenizer import load_tokenizer
    from polysense.weights.convert import import_

    layouts = getattr(load(system), "weights", {})
    if layout not in layouts:
        raise UserError(f"{system} has no layout {layout!r}", f"it has {', '.join(layouts)}" if layouts else "it reads only its own run folders")
    built, preset = import_(path, layouts[layout], partial(preset_of, system))
    tokenizer: Any = None
    if preset.feed.text:
        try:
            beside = path if path.is_dir() else path.parent
            tokenizer = load_tokenizer(beside / "tokenizer" if (beside / "tokenizer").is_dir() else beside, preset.feed.text)
        except UserError as error:
            tokenizer = Speechless(error)
    return built, preset, tokenizer


def find(path: str | Path, system: str | None, layout: str | None) -> tuple[str, Any, Preset, Any, str]:
    """(id, system, preset, tokenizer, where it was found) of anything that `open_pipeline` takes."""
    from polysense.weights.files import HUB_ID, download

    place = Path(path).expanduser()
    if (place / "run.json").is_file():
        from polysense.train.folder import AVERAGED
        from polysense.train.run import load_run

        run = load_run(place, averaged=(place / AVERAGED).is_file())         # where a run has an average of its weights, that is what is used
        if system and system != run.id:
            raise UserError(f"{place} is a run of {run.id}, not of {system}", "leave system= out: a run knows what it is")
        return run.id, run.system, run.preset, run.tokenizer, str(place.absolute())
    if (place / "adapter_config.json").is_file() and system is None:
        from polysense.train.adapting import open_adapter

        run = open_adapter(place)
        return run.id, run.system, run.preset, run.tokenizer, str(place.absolute())
    if not place.exists() and not HUB_ID.fullmatch(str(path)):
        raise UserError(f"no run or checkpoint at {str(path)!r}", "give a run folder, a checkpoint folder or file, or a hub id such as owner/name")
    if not system or not layout:
        what = "has no run.json, so it is not a run of polysense" if place.exists() else "is no folder or file here, so it can only be a hub id"
        raise UserError(f"{str(path)!r} {what}",
                        f"for a published checkpoint say system={system or '(such as clip; see `polysense list`)'} and layout=(such as hf or openai)")
    here = place.exists()
    return system, *read_official(place if here else download(str(path)), system, layout), str(place.absolute() if here else path)
