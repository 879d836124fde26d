"""Finding what `polysense.open` was asked for: a run folder, an official checkpoint folder or file, or a hub id."""
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from polysense.base.catalogue import load, preset_of
from polysense.base.errors import UserError
from polysense.base.plan import Preset

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.bin", "*.pt")


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


def download(hub_id: str) -> Path:
    """A snapshot of a hub repository (`owner/name` or `owner/name@revision`) in the local cache."""
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the client raises a dozen kinds for "no such repository", "no network", "no permission"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot fetch {hub_id!r} from the hub ({reason})", "check the name and the network, or give a local folder") from error


def read_official(path: Path, system: str, layout: str) -> tuple[Any, Preset, Any]:
    """(system, preset, tokenizer) of a published checkpoint in a named layout; the layout is never guessed."""
    from polysense.data.tokenizer import load_tokenizer
    from polysense.weights.layout import read_checkpoint

    layouts = getattr(load(system), "weights", {})
    if layout not in layouts:
        raise UserError(f"{system} has no layout {layout!r}", f"it has {', '.join(layouts)}" if layouts else "it reads only its own run folders")
    config, state = read_checkpoint(path, layout)
    name, overrides = layouts[layout].read(config, state)
    preset = preset_of(system, name).but(**overrides)
    built = preset.config.build()
    built.load_state_dict(layouts[layout].keymap(preset.config).load(state), strict=True)
    folder = path if path.is_dir() else path.parent
    return built, preset, load_tokenizer(folder, preset.feed.text) if preset.feed.text else None


def find(path: str | Path, system: str | None, layout: str | None) -> tuple[str, Any, Preset, Any, str]:
    """(id, system, preset, tokenizer, where it was found) of anything that `open_pipeline` takes."""
    place = Path(path)
    if (place / "run.json").is_file():
        from polysense.train.run import load_run

        run = load_run(place)
        if system and system != run.id:
            raise UserError(f"{place} is a run of {run.id}, not of {system}", "leave system= out: a run knows what it is")
        return run.id, run.system, run.preset, run.tokenizer, str(place)
    if not place.exists() and not HUB_ID.fullmatch(str(path)):
        raise UserError(f"no run or checkpoint at {str(path)!r}", "give a run folder, a checkpoint folder or file, or a hub id such as owner/name")
    if not system or not layout:
        raise UserError(f"{str(path)!r} has no run.json, so it is not a run of polysense",
                        f"for a published checkpoint say system={system or '(such as clip; see `polysense list`)'} and layout=(such as hf or openai)")
    place = place if place.exists() else download(str(path))
    return system, *read_official(place, system, layout), str(path)
