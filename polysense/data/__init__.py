"""Data: sources that say what they offer, readers, views, tokenisers, and the loader that makes batches of them. Listing imports no torch."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polysense.base.errors import UserError

if TYPE_CHECKING:
    from polysense.data.sources import Source

__all__ = ["SourceInfo", "data_root", "list_sources", "source"]


@dataclass(frozen=True)
class SourceInfo:
    """One line of `polysense data list`. `size`: bytes on disk, None where the set is missing; `where`: its folder, or "built in"."""
    name: str
    kind: str
    offers: tuple[str, ...]
    splits: tuple[str, ...]
    size: int | None
    where: str
    says: str


def data_root(root: str | Path | None = None) -> Path:
    """The folder of the named sets: `root`, else $POLYSENSE_DATA, else polysense/data in the user's cache folder."""
    from polysense.data import named

    return named.data_root(root)


def source(name_or_path: str | Path, split: str = "train", root: str | Path | None = None) -> Source:
    """Open samples by name or path; `"a+b"` joins sources, `"a?beside=b"` puts a sample of b, of what a lacks, beside each of a.

    Names: see `list_sources()`. Paths: a folder of pictures (class sub-folders, or metadata.csv / .jsonl with captions, or flat), a
    .csv .tsv .jsonl .parquet table, a COCO .json, WebDataset .tar files (glob and brace patterns, addresses), `hf:NAME` for Hugging
    Face datasets (`hf:/folder` for one saved to disk). Options follow a question mark: `data.csv?image=path&caption=title`.
    Splits: those the data has; "val", "dev" and "test" stand for each other where there is only one; data without splits hold out
    a fixed tenth as "val" ("all" is everything). Raises UserError.
    """
    text = str(name_or_path).strip()
    parts = [text] if text and Path(text).exists() else [p for p in text.split("+") if p]
    if not parts:
        raise UserError("no data named", "give a name or a path; `polysense data list` shows the names")
    made = [_one(part.strip(), split, root) for part in parts]
    if len(made) == 1:
        return made[0]
    from polysense.data.sources import ConcatSource

    return ConcatSource(made)


def _one(text: str, split: str, root: str | Path | None) -> Any:
    from polysense.data.named import NAMED, named_source

    name, options = (text, {}) if Path(text).exists() else split_options(text)
    if "beside" in options:
        from urllib.parse import quote

        from polysense.data.beside import BesideSource

        other = options.pop("beside")
        rest = "&".join(f"{k}={quote(v, safe='/,:')}" for k, v in options.items())
        return BesideSource(_one(f"{name}?{rest}" if rest else name, split, root), _one(other, split, root))
    if name in NAMED:
        return named_source(name, split, root, options)
    if name.partition(":")[0] == "scenes":
        from polysense.data.scenes import scenes_source

        return scenes_source(text, split)
    if name == "solids":
        from polysense.data.solids import solids_source

        return solids_source(options, split)
    from polysense.data.user import user_source

    return user_source(name, split, options)


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """`data.csv?image=path&caption=title` -> ("data.csv", {"image": "path", "caption": "title"}). Addresses keep their own query."""
    from urllib.parse import unquote

    name, _, query = text.rpartition("?")
    if "://" in text or "=" not in query or not name:      # a question mark may also stand in a file pattern
        return text, {}
    pairs = [p.partition("=") for p in query.split("&") if p]
    if bad := [k for k, eq, _ in pairs if not eq]:
        raise UserError(f"cannot read the option {bad[0]!r} in {text!r}", "options look like data.csv?image=path&caption=title")
    return name, {k: unquote(v) for k, _, v in pairs}


def list_sources(root: str | Path | None = None) -> list[SourceInfo]:
    """All named sets, with what they offer and whether they are here."""
    from polysense.data.named import NAMED
    from polysense.data.scenes.options import VARIANTS
    from polysense.data.scenes.world import SPLITS
    from polysense.data.sources import offered

    out, place = [], data_root(root)
    for name, e in NAMED.items():
        folder = place / (e.folder or name)
        files = sorted({f for fs in e.splits.values() for f in fs} | set(e.files))
        here = all((folder / f).exists() for f in files)
        size = sum((folder / f).stat().st_size for f in files) if here and files else (0 if not files else None)
        splits = tuple(e.splits) if e.splits else ("train", "val", "all")
        out.append(SourceInfo(name, e.kind, offered(e.offers), splits, size, str(folder) if files else "built in", e.says))
    for variant, v in VARIANTS.items():
        out.append(SourceInfo(f"scenes:{variant}".rstrip(":"), "drawn", offered(v.offers), SPLITS, 0, "built in", v.says))
    out.append(SourceInfo("solids", "views", offered(("origin", "direction", "rgb")), SPLITS, 0, "built in",
                          "camera rays around three traced solids, with exact colours and distances"))
    return out
