"""Weights and configuration files on disk, read without running anything they contain, written atomically."""
import json
import os
import pickle
import re
import secrets
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from polysense.base.errors import UserError
from polysense.weights.torchscript import is_torchscript, read_torchscript

PICKLES = (".pt", ".pth", ".pyth", ".bin", ".ckpt", ".tar")
ARRAYS = ".npz"                              # of flax; the steps of a name are parted by / there and by . here
KINDS = (".safetensors", ARRAYS, *PICKLES)
PREFERRED = ("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
             "pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.bin", "*.pt")


def find_weights(place: Path, first: str = "") -> Path:
    """The weights of a folder (`first`, then the usual names, then the only file of a known kind), or the file itself.

    Raises UserError where there is none or more than one.
    """
    if place.is_file():
        return place
    for name in (first, *PREFERRED):
        if name and (place / name).is_file():
            return place / name
    found = sorted(p for p in place.iterdir() if p.suffix in KINDS)
    if len(found) != 1:
        raise UserError(f"{place} holds {'no weights' if not found else 'several weights: ' + ', '.join(p.name for p in found[:4])}",
                        "give a folder with model.safetensors, or one file (.safetensors, .npz, .pt, .pth or .bin)")
    return found[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError where the file holds something else."""
    try:
        out: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is not JSON ({error})", "fetch it again") from error
    if not isinstance(out, dict):
        raise UserError(f"{path.name} does not hold a configuration", "it should be one JSON object")
    return cast(dict[str, Any], out)


def read_state(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a .safetensors file, its index of shards, arrays (.npz), or a pickled state (.pt, .pth, .bin, .ckpt), on the CPU.

    Pickles are read with `weights_only=True`, TorchScript archives without their code (see `read_torchscript`); training wrappers
    (`state_dict`, `model`) and the `module.` of data parallelism are taken off. Raises UserError for an empty, damaged or foreign file and
    for a pickle that would run code.
    """
    if not path.is_file():
        raise UserError(f"no file {path}", "check the path")
    if path.name.endswith(".index.json"):
        shards = cast(dict[str, str], read_json(path).get("weight_map", {}))
        out: dict[str, Tensor] = {}
        for name in sorted(set(shards.values())):
            if Path(name).name != name:
                raise UserError(f"{path.name} points outside its folder ({name})", "fetch the checkpoint again")
            out |= read_state(path.parent / name)
        if absent := [k for k in shards if k not in out]:
            raise UserError(f"the shards of {path.name} lack {absent[0]} and {len(absent) - 1} more", "fetch the checkpoint again")
        return out
    if not path.stat().st_size:
        raise UserError(f"{path.name} is empty", "fetch it again")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path.name} is damaged or cut short ({error})", "fetch it again") from error
    if path.suffix == ARRAYS:
        return _read_arrays(path)
    if path.suffix not in PICKLES:
        raise UserError(f"{path.name} is not a kind of weights file known here", f"the kinds are {', '.join(KINDS)}")
    return _bare(read_torchscript(path) if is_torchscript(path) else _read_pickle(path), path)


def _read_arrays(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as held:
            out = {name.replace("/", "."): torch.from_numpy(held[name]) for name in held.files}  # pyright: ignore[reportUnknownMemberType]
    except (ValueError, TypeError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path.name} is damaged, cut short, or holds something else than numbers", "fetch it again") from error
    if not out:
        raise UserError(f"{path.name} holds no tensors by name", "it should be a file of named arrays")
    return out


def _write_arrays(path: Path, state: dict[str, Tensor]) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name.replace(".", "/"): value.numpy() for name, value in state.items()})  # type: ignore[arg-type]


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([Namespace]):       # parsed arguments, a plain record, stand in many training checkpoints
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (named := re.search(r"(?:GLOBAL|global|class) `?'?([\w.]+(?: [\w.]+)?)", str(error))) or "weights_only" in str(error).lower():
            what = f" ({named[1]})" if named else ""
            raise UserError(f"{path.name} is a pickle that would run code or build objects{what}, it was not read",
                            "get the weights as .safetensors, or re-save the bare state dict where you trust the file") from error
        raise UserError(f"{path.name} is damaged or not a weights file", "fetch it again") from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{path.name} is damaged or cut short", "fetch it again") from error


def _bare(loaded: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model_state_dict", "model_state", "model", "module"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):  # type: ignore[union-attr]
            loaded = cast(dict[str, Any], loaded)[wrapper]
    out = {str(k): v for k, v in cast(dict[Any, Any], loaded).items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    if not out and isinstance(loaded, dict):                  # several states side by side, such as a student and its teacher
        for name, part in cast(dict[Any, Any], loaded).items():
            held = {str(k): v for k, v in cast(dict[Any, Any], part).items() if isinstance(v, Tensor)} if isinstance(part, dict) else {}
            bare = all(k.startswith("module.") for k in held)
            out |= {f"{name}.{k.removeprefix('module.') if bare else k}": v for k, v in held.items()}
    if not out:
        raise UserError(f"{path.name} holds no tensors by name", "it should be a state dict")
    return {k.removeprefix("module."): v for k, v in out.items()} if all(k.startswith("module.") for k in out) else out


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the target, then renames: a reader sees the old file or the new one, never half of it."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_state(path: Path, state: dict[str, Tensor]) -> None:
    """A .safetensors file, a pickle of the bare tensors where the name ends in .pt (what OpenAI's loader reads), or arrays where it ends in .npz."""
    # a copy each: views of one storage (a split qkv) may not be written as they are
    bare = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    if path.suffix == ARRAYS:
        _replace(path, lambda p: _write_arrays(p, bare))
    elif path.suffix in PICKLES:
        _replace(path, lambda p: torch.save(bare, p))
    else:
        _replace(path, lambda p: save_file(bare, p, metadata={"format": "pt"}))


def write_files(folder: Path, texts: dict[str, dict[str, Any]], weights: dict[str, dict[str, Tensor]]) -> None:
    """Writes JSON and weights files into `folder`: a new folder appears complete or not at all, in an old one each file is replaced at once."""
    new = not folder.exists()
    if not new and not folder.is_dir():
        raise UserError(f"{folder} is a file", "give a folder to write into")
    target = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part") if new else folder
    target.mkdir(parents=True, exist_ok=True)
    try:
        for name in (*weights, *texts):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        for name, state in weights.items():
            write_state(target / name, state)
        for name, text in texts.items():
            plain = json.dumps(text, indent=2, ensure_ascii=False) + "\n"
            _replace(target / name, lambda p, plain=plain: p.write_text(plain, encoding="utf-8"))
        if new:
            os.replace(target, folder)
    finally:
        if new:
            shutil.rmtree(target, ignore_errors=True)


def download(hub_id: str, patterns: Iterable[str] = HUB_FILES) -> Path:
    """A snapshot of a hub repository (`owner/name` or `owner/name@revision`) in the local cache. Raises UserError where it cannot be had."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    name, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as error:  # the client raises a dozen kinds for "no such repository", "no network", "no permission"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot fetch {hub_id!r} from the hub ({reason})", "check the name and the network, or give a local folder") from error
