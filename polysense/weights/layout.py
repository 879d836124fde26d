"""A published layout: how a library names weights and configuration. It is named by the user, never guessed."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.files import HUB_ID, KINDS, download, find_weights, read_json, read_state, write_files, write_state
from polysense.weights.keymap import KeyMap, State
from polysense.weights.signs import bears, hint


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`keymap(config)`: the table for a system's configuration. `read(their config, their state) -> (preset name, dotted overrides of the
    preset)`. `write(config) -> their config`. All three raise UserError for what this layout or our system cannot express.

    `feed(feed) -> their config` adds how pictures are read. Files of `beside` are read into, and written from, their config under the name
    of the file without its ending. `folders`: a checkpoint of several models, each in its own folder; names of weights begin with the
    folder's, and their config, read from `config_file` at the top, holds one object more for each of them. `also`: (file beside the weights,
    name of a part) pairs, read where the weights lack that part, and below its name; written into the one weights file.
    """
    of: str                                                  # system
    name: str
    keymap: Callable[[Any], KeyMap]
    read: Callable[[dict[str, Any], State], tuple[str, dict[str, Any]]]
    write: Callable[[Any], dict[str, Any]]
    feed: Callable[[Feed], dict[str, Any]] = lambda feed: {}
    config_file: str = "config.json"                         # "": this layout has none
    weights_file: str = "model.safetensors"
    beside: tuple[str, ...] = ()
    folders: tuple[tuple[str, str, str], ...] = ()           # (folder, its configuration file, its weights file or "")
    also: tuple[tuple[str, str], ...] = ()


def read_checkpoint(path: str | Path, layout: Layout) -> tuple[dict[str, Any], State]:
    """(their config, their state) of a folder, a weights file (with its configuration beside it) or a hub id.

    Raises UserError for what is not there, cannot be read safely, or is plainly of another layout.
    """
    place = Path(path)
    if not place.exists():
        if not HUB_ID.fullmatch(str(path)) or place.suffix in KINDS:
            raise UserError(f"no checkpoint at {str(path)!r}", "give a folder, a weights file, or a hub id such as owner/name")
        place = download(str(path))
    if layout.folders:
        return _read_folders(place, layout)
    weights = find_weights(place, layout.weights_file)
    state = read_state(weights)
    if not bears(state, layout.of, layout.name):
        raise UserError(f"{weights.name} is not {layout.of} in the layout {layout.name!r}", hint(state))
    for file, part in layout.also:
        if (weights.parent / file).is_file() and not any(k.startswith(f"{part}.") for k in state):
            state = {**state, **{f"{part}.{k}": v for k, v in read_state(weights.parent / file).items()}}
    config: dict[str, Any] = {}
    if layout.config_file and (weights.parent / layout.config_file).is_file():
        config = read_json(weights.parent / layout.config_file)
    for name in layout.beside:
        if (weights.parent / name).is_file():
            config[Path(name).stem] = read_json(weights.parent / name)
    return config, state


def _read_folders(place: Path, layout: Layout) -> tuple[dict[str, Any], State]:
    if not place.is_dir():
        raise UserError(f"{place.name} is one file", f"the layout {layout.name!r} is a folder with {', '.join(f for f, *_ in layout.folders)}")
    config: dict[str, Any] = read_json(place / layout.config_file) if (place / layout.config_file).is_file() else {}
    state = State()
    for folder, about, file in layout.folders:
        if not (place / folder).is_dir():
            raise UserError(f"{place} has no folder {folder!r}", f"the layout {layout.name!r} has {', '.join(f for f, *_ in layout.folders)}")
        config[folder] = read_json(place / folder / about) if (place / folder / about).is_file() else {}
        if file:
            state |= {f"{folder}.{k}": v for k, v in read_state(find_weights(place / folder, file)).items()}
    if not bears(state, layout.of, layout.name):
        raise UserError(f"{place} is not {layout.of} in the layout {layout.name!r}", hint(state))
    return config, state


def write_checkpoint(path: str | Path, config: dict[str, Any], state: State, layout: Layout) -> Path:
    """Writes their config and their state in the published shape, atomically; returns the folder or file.

    A folder of `config_file`, `weights_file` and `beside`; or, for a path that ends like a weights file, that file alone (only for a layout
    without configuration).
    """
    place = Path(path)
    if place.suffix in KINDS:
        if layout.config_file:
            raise UserError(f"the layout {layout.name!r} needs {layout.config_file} beside its weights", "give a folder, not a file")
        place.parent.mkdir(parents=True, exist_ok=True)
        write_state(place, state)
        return place
    if layout.folders:
        texts = {f"{folder}/{about}": config[folder] for folder, about, _ in layout.folders}
        texts[layout.config_file] = {k: v for k, v in config.items() if k not in {f for f, *_ in layout.folders}}
        write_files(place, texts, {f"{folder}/{file}": {k.removeprefix(f"{folder}."): v for k, v in state.items() if k.startswith(f"{folder}.")}
                                   for folder, _, file in layout.folders if file})
        return place
    texts = {name: config[Path(name).stem] for name in layout.beside if Path(name).stem in config}
    if layout.config_file:
        texts[layout.config_file] = {k: v for k, v in config.items() if f"{k}.json" not in layout.beside}
    write_files(place, texts, {layout.weights_file: state})
    return place
