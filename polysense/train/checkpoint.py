"""Checkpoints: written whole or not at all, checked when read, the last two kept. No pickle: safetensors, torch's sharded format, JSON.

A checkpoint is a folder named by its step, holding `state.safetensors` (or torch.distributed.checkpoint files where weights are sharded),
`rank{r}.json` (random states of each rank) and `state.json` (the rest, with the size and CRC-32 of every other file). It is filled under a
hidden name, flushed to disk and renamed, so a kill at any moment leaves the last whole one in place.
"""
import base64
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.train.parallel import World, local

KEEP = 2
TENSORS, FACTS = "state.safetensors", "state.json"


@dataclass
class Found:
    """A whole checkpoint. `facts` is what the run stored beside the tensors."""
    path: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.path.name)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full disk or a read-only folder raises into the one line a user needs."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write {path} ({reason})", "free space or choose another folder; what was saved before is whole") from error


def flush(path: Path) -> None:
    """Makes the system put a file or folder on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one move. Raises UserError where it cannot be written."""
    with writing(path):
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8")
        flush(part)
        os.replace(part, path)
        flush(path.parent)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replaces a safetensors file in one move. Raises UserError where it cannot be written."""
    with writing(path):
        part = path.with_name(f".{path.name}.part")
        save_file(storable(tensors), part, metadata)
        flush(part)
        os.replace(part, path)
        flush(path.parent)


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: detached, contiguous, no two in the same memory (tied weights are written twice)."""
    out, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().contiguous()
        place = (value.device, value.untyped_storage().data_ptr())
        out[name] = value.clone() if place in seen and value.numel() else value
        seen.add(place)
    return out


def check_finite(tensors: dict[str, Tensor], world: World) -> None:
    """Refuses weights that are not numbers, whichever rank holds them: they must never replace good ones on disk. Every rank calls it."""
    floats = {k: local(v) for k, v in tensors.items() if v.is_floating_point()}
    floats = {k: v for k, v in floats.items() if v.numel()}
    norms = torch._foreach_norm(list(floats.values()), float("inf")) if floats else ()
    good = torch.stack([n.float() for n in norms]).isfinite().tolist() if floats else []
    if bad := [*chain(*world.gathered([k for k, fine in zip(floats, good) if not fine]))]:
        raise UserError(f"{bad[0]} holds values that are not finite, so nothing was saved", "lower optim.lr or set optim.clip")


def save(root: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], world: World) -> Path:
    """Writes checkpoint `step` into `root` and drops all but the last two. Every rank calls it. Returns its folder.

    Raises UserError for weights that are not finite and for a folder that cannot be written.
    """
    check_finite({k: v for k, v in tensors.items() if k.startswith(("model.", "ema."))}, world)
    part, final = root / f".{step:09d}.part", root / f"{step:09d}"
    with writing(final):
        if world.first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        world.barrier()
        (part / f"rank{world.rank}.json").write_text(json.dumps(random_states()), encoding="utf-8")
        if world.sharded:
            from torch.distributed.checkpoint import save as save_sharded
            save_sharded(tensors, checkpoint_id=part)
        elif world.first:
            save_file(storable(tensors), part / TENSORS)
        world.barrier()
        if world.first:
            sums = {p.name: checksum(p) for p in sorted(part.iterdir())}
            facts = {**facts, "step": step, "ranks": world.size, "sharded": world.sharded, "files": sums}
            text = json.dumps(facts)
            (part / FACTS).write_text(json.dumps({"crc": zlib.crc32(text.encode()), "facts": text}), encoding="utf-8")
            for path in (*part.iterdir(), part):
                flush(path)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            flush(root)
            for old in [p for p in whole_names(root) if p != final][KEEP - 1:]:
                shutil.rmtree(old, ignore_errors=True)
        world.barrier()
    return final


def whole_names(root: Path) -> list[Path]:
    """Folders that were renamed into place, newest first."""
    return sorted((p for p in root.glob("[0-9]*") if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name), reverse=True)


def checksum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint all of whose files are as they were written; ValueError says what is not."""
    try:
        outer = json.loads((path / FACTS).read_text(encoding="utf-8"))
        if zlib.crc32(outer["facts"].encode()) != outer["crc"]:
            raise ValueError(f"{FACTS} was changed")
        facts = json.loads(outer["facts"])
        for name, (size, crc) in facts["files"].items():
            if not (path / name).is_file():
                raise ValueError(f"{name} is missing")
            if (path / name).stat().st_size != size or checksum(path / name) != [size, crc]:
                raise ValueError(f"{name} is not what was written")
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{FACTS} cannot be read") from error
    return facts


def latest(root: Path, say: Callable[[str], None] = lambda text: None) -> Found | None:
    """The newest whole checkpoint; damaged ones are passed over, and said so. None where there is none at all.

    Raises UserError where there are some and all are damaged.
    """
    damaged = []
    for path in whole_names(root):
        try:
            found = Found(path, read_facts(path))
        except ValueError as error:
            damaged.append(f"checkpoint {path.name} is damaged ({error})")
            continue
        for line in damaged:
            say(f"{line}: going on from {path.name}")
        return found
    if damaged:
        raise UserError("; ".join(damaged), "no whole checkpoint is left, start the run again in another folder")
    return None


def load_tensors(found: Found, like: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """All tensors of a checkpoint. Sharded ones are read into the layout of the tensors `like` them (every rank calls)."""
    if not found.facts["sharded"]:
        return load_file(found.path / TENSORS)
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint import load as read_sharded
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    sizes = {k: v for k, v in FileSystemReader(found.path).read_metadata().state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    out: dict[str, Tensor] = {}
    for key, about in sizes.items():
        twin = like.get(key, next((v for k, v in like.items() if k.startswith("model.") and key.endswith("." + k.removeprefix("model."))), None))
        fits = twin is not None and twin.shape == about.size
        out[key] = torch.empty_like(twin) if fits and twin is not None else torch.empty(about.size, dtype=about.properties.dtype)
    read_sharded(out, checkpoint_id=found.path, no_dist=world.size == 1)
    return out


def load_model(found: Found, system: nn.Module, world: World) -> dict[str, Tensor]:
    """Puts the weights of a checkpoint into the system; returns the other tensors. Raises UserError where they do not fit."""
    like = {f"model.{k}": v for k, v in system.state_dict().items()}
    tensors = load_tensors(found, like, world)
    model = {k: v for k, v in tensors.items() if k.startswith("model.")}
    if wrong := {k for k in like.keys() | model.keys() if k not in like or k not in model or like[k].shape != model[k].shape}:
        raise UserError(f"checkpoint {found.path.name} does not fit the system ({sorted(wrong)[0].removeprefix('model.')})",
                        "was it made by another version of polysense?")
    with torch.no_grad():
        for key, value in like.items():
            value.copy_(model[key])
    return {k: v for k, v in tensors.items() if not k.startswith("model.")}


def restore_random_states(found: Found, world: World) -> None:
    """The random states of this rank; those of a run with fewer ranks are left to the seed."""
    path = found.path / f"rank{world.rank}.json"
    if path.is_file():
        set_random_states(json.loads(path.read_text(encoding="utf-8")))


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, JSON-ready."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))  # noqa: NPY002  (augmentations of others may use the global one)
    version, numbers, gauss = random.getstate()
    out = {"python": [version, list(numbers), gauss], "numpy": [kind, pack(torch.from_numpy(keys.view(np.uint8))), *rest],
           "torch": pack(torch.get_rng_state())}
    if torch.cuda.is_available():
        out["cuda"] = [pack(s) for s in torch.cuda.get_rng_state_all()]
    return out


def set_random_states(states: dict[str, Any]) -> None:
    """Inverse of `random_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, unpack(keys).numpy().view(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(unpack(states["torch"]))
    if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([unpack(s) for s in states["cuda"]])


def pack(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def unpack(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
