"""A user's own data: folders of pictures, tables, WebDataset tars, COCO annotations, Hugging Face data sets.

A spec is a path, with options behind a question mark: `photos/`, `data.csv?image=path&caption=title`, `shards/{000..009}.tar`,
`https://host/shard.tar`, `boxes.json?images=pictures/`, `hf:NAME?image=photo`.
"""
from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from polysense.base.errors import UserError, need_extra
from polysense.data.conversations import Conversations, talks
from polysense.data.readers import PICTURES, CocoSource, Files, Record, TarSource, read_lines
from polysense.data.sources import BadSample, ListSource, Sample, Source, held_out, offered
from polysense.data.text_views import in_views

ENDINGS = (*("." + e for e in PICTURES), ".jfif", ".avif")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "dev", "test": "test"}
COLUMNS = {
    "image": ("image", "file_name", "filename", "image_path", "filepath", "path", "file", "img", "image_file", "image_url", "url", "photo",
              "picture"),
    "caption": ("caption", "captions", "text", "texts", "title", "sentence", "sentences", "description", "alt", "prompt"),
    "rewrites": ("rewrites", "rewrite", "rewritten", "paraphrases", "paraphrase"),
    "label": ("label", "labels", "class", "category", "target", "type"),
    "question": ("question",), "answer": ("answer",), "split": ("split",),
}
SERIES = {"caption": r"(caption|text|sentence)s?_?\d+", "rewrites": r"(rewrite|paraphrase)s?_?\d+"}        # columns of a kind: caption_0, caption_1
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def user_source(spec: str, split: str, options: dict[str, str]) -> Any:
    """The source that a path or address names. Raises UserError when there is none, with the nearest named sets."""
    if spec.startswith("hf:"):
        from polysense.data.hub import hf_source

        return hf_source(spec[3:], split, options)
    if spec.startswith(("http://", "https://")) or re.search(r"\.(tar|tgz|tar\.gz)$", spec):
        return tar_source(spec, split, options)
    path = Path(spec).expanduser()
    if path.is_dir():
        return folder_source(path, split, options)
    if path.suffix in TABLES and path.is_file():
        return table_source(path, split, options)
    if path.suffix == ".json" and path.is_file():
        if talks(path):
            return held_out(Conversations(path, Path(options.get("images", path.parent))), split)
        return coco_source(path, split, options)
    if path.suffix == ".txt" and path.is_file():
        from polysense.data.sentences import text_source

        return held_out(text_source(path, split), split)
    if path.exists():
        raise UserError(f"cannot read {spec!r} as data", "give a folder, .csv, .tsv, .jsonl, .parquet, COCO .json, .tar, or .txt of sentences")
    from polysense.data.named import NAMED

    close = get_close_matches(spec, [*NAMED, "scenes"], 3)
    raise UserError(f"no data called {spec!r}, and no such file", f"did you mean {' or '.join(close)}?" if close else "see `polysense data list`")


# Folders

def folder_source(path: Path, split: str, options: dict[str, str]) -> Source:
    """A folder: with train/val/test sub-folders, or metadata.csv / .jsonl / .parquet, or tars, or class sub-folders, or just pictures.

    A picture `x.jpg` beside `x.txt` takes the lines of that file as captions where every picture has one, and those of `x.rewrites.txt`, where
    there is one, as the same in other words.
    """
    inside = [d for d in sorted(path.iterdir()) if d.is_dir() and not d.name.startswith(".")]
    parts = {SPLITS[d.name.lower()]: d for d in inside if d.name.lower() in SPLITS}
    if "train" in parts and len(parts) == len(inside):         # "train" among other names is a class of vehicles
        from polysense.data.named import split_of

        if split == "all":
            from polysense.data.sources import ConcatSource

            return ConcatSource([_folder(d, k, options) for k, d in parts.items()])
        chosen = split_of(str(path), split, tuple(parts)) if len(parts) > 1 or split in parts else None
        if chosen is None:
            return held_out(_folder(parts["train"], "train", options), split)
        source = _folder(parts[chosen], chosen, options)
        if chosen != "train" and source.classes:
            _renumber(source, _folder(parts["train"], "train", options).classes, parts[chosen])
        return source
    for name in ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet"):
        if (path / name).exists():
            return table_source(path / name, split, options)
    return held_out(_folder(path, "train", options), split)


def _folder(path: Path, split: str, options: dict[str, str]) -> Source:
    for name in ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet"):
        if (path / name).exists():
            return _table(path / name, split, options)
    found = sorted(_walk(path))
    if not found:
        if tars := sorted(p for p in path.iterdir() if re.search(r"\.(tar|tgz|tar\.gz)$", p.name)):
            return _indexed(path.name, [str(p) for p in tars], split)
        raise UserError(f"no pictures in {str(path)!r}", f"it should hold files ending in {', '.join(ENDINGS[:5])}, ..., or sub-folders with them")
    kinds = sorted({f.split("/")[0] for f in found if "/" in f})
    labelled = bool(kinds) and all("/" in f for f in found)
    number = {k: i for i, k in enumerate(kinds)}
    sidecar = all((path / f).with_suffix(".txt").exists() for f in found)
    samples: list[Sample] = []
    for f in found:
        sample: Sample = {"id": f, "image": path / f}
        if labelled:
            sample["label"] = number[f.split("/")[0]]
        if sidecar:
            sample["captions"] = _lines((path / f).with_suffix(".txt"))
            if (beside := (path / f).with_suffix(".rewrites.txt")).exists():
                sample["rewrites"] = _lines(beside)
        samples.append(sample)
    offers = ("image", *(["label"] if labelled else []), *(["text"] if sidecar else []))
    return ListSource(str(path), samples, offers, split=split, classes=kinds if labelled else ())


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()]


def _walk(path: Path) -> Iterator[str]:
    """Paths of the pictures below a folder, with forward slashes; hidden files are left out."""
    for place, folders, files in os.walk(path):
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        for f in files:
            if f.lower().endswith(ENDINGS) and not f.startswith("."):
                yield (Path(place) / f).relative_to(path).as_posix()


def _renumber(source: Source, classes: Sequence[str], path: Path) -> None:
    """Give the labels of a held-out part the numbers of the training part."""
    if extra := set(source.classes) - set(classes):
        raise UserError(f"{str(path)!r} has classes that the training part lacks: {', '.join(sorted(extra)[:5])}", "check the sub-folders")
    if isinstance(source, ListSource):
        number = {name: i for i, name in enumerate(classes)}
        source.samples = [s | {"label": number[source.classes[s["label"]]]} if s.get("label", -1) >= 0 else s for s in source.samples]
        source.classes = tuple(classes)


# Tables

def table_source(path: Path, split: str, options: dict[str, str]) -> Source:
    """CSV, TSV, JSON lines or Parquet with a column for the picture's path and columns for captions or a label.

    Columns are found by their usual names (COLUMNS) or named by options: `?image=path&caption=title`; several caption columns
    as `caption=a,b` or caption_0, caption_1; captions in other words as `rewrites`, or rewrite_0, rewrite_1. Paths are relative to
    the table, to `?root=`, absolute, or addresses. A `split` column chooses the rows; without one a tenth is held out.
    """
    return _table(path, split, options, held=True)


def _table(path: Path, split: str, options: dict[str, str], held: bool = False) -> Source:
    rows, notes = _rows(path)
    if not rows:
        raise UserError(f"{path} has no rows", "; ".join(f"{n}: {why}" for n, why in notes[:2]) or "the first line names the columns")
    source, by_column = rows_source(str(path), rows, split, options, Path(options.get("root") or path.parent))
    source.notes = [*notes, *source.notes]
    return source if by_column or not held else held_out(source, split)


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    if path.suffix == ".parquet":
        parquet = need_extra("pyarrow.parquet", "parquet")
        try:
            return parquet.read_table(path).to_pylist(), []
        except Exception as error:  # pyarrow's own errors
            raise UserError(f"cannot read {path}", str(error)) from error
    if path.suffix in (".jsonl", ".ndjson"):
        rows, notes = read_lines(path)
        return [r for r in rows if isinstance(r, dict)], notes
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        head = file.readline()
        file.seek(0)
        between = "\t" if path.suffix == ".tsv" else max(",;\t|", key=head.count)
        return [{k: v for k, v in row.items() if k} for row in csv.DictReader(file, delimiter=between)], []


def columns(names: Sequence[str], options: dict[str, str], where: str) -> dict[str, list[str]]:
    """Role -> columns, by the options first, else by the usual names. Raises UserError for a column that is not there."""
    lower = {n.lower(): n for n in names}
    out: dict[str, list[str]] = {}
    for role, usual in COLUMNS.items():
        if role in options:
            chosen = options[role].split(",")
            if missing := [c for c in chosen if c not in names]:
                raise UserError(f"{where} has no column {missing[0]!r}", f"it has {', '.join(names)}")
            out[role] = chosen
        elif role in SERIES:
            series = [lower[n] for n in sorted(lower, key=lambda n: (len(n), n)) if re.fullmatch(SERIES[role], n)]
            out[role] = series or [lower[u] for u in usual if u in lower][:1]
        else:
            out[role] = [lower[u] for u in usual if u in lower][:1]
    if unknown := set(options) - set(COLUMNS) - {"root", "stream", "only", "images"}:
        raise UserError(f"unknown option {sorted(unknown)[0]!r} for {where}", f"the options are {', '.join(COLUMNS)}, root")
    if not out["image"]:
        raise UserError(f"{where} has no column for the pictures (it has {', '.join(names)})", "name it: data.csv?image=COLUMN")
    return {k: v for k, v in out.items() if v}


def rows_source(name: str, rows: Sequence[dict[str, Any]], split: str, options: dict[str, str], root: Path) -> tuple[ListSource, bool]:
    """Table rows as samples (rows without a picture become notes), and whether a column chose the rows of the split."""
    at = columns(list(dict.fromkeys(k for r in rows[:1000] for k in r)), options, name)
    kept = list(rows)
    if "split" in at and split != "all":
        from polysense.data.named import split_of

        said = [SPLITS.get(str(r.get(at["split"][0])).lower(), str(r.get(at["split"][0]))) for r in rows]
        chosen = split_of(name, split, tuple(sorted(set(said))))
        kept = [r for r, s in zip(rows, said) if s == chosen]
    label = at.get("label", [None])[0]
    classes, number = classes_of([r.get(label) for r in rows] if label else [])
    samples: list[Sample] = []
    notes: list[tuple[str, str]] = []
    used: dict[str, int] = {}
    for n, row in enumerate(kept, 1):
        picture = row.get(at["image"][0])
        if not picture:
            notes.append((f"{Path(name).name}: row {n}", "names no picture"))
            continue
        image, called = picture_of(picture, root, n)
        used[called] = used.get(called, 0) + 1
        sample: Sample = {"id": called if used[called] == 1 else f"{called}#{used[called]}", "image": image}
        if "caption" in at:
            sample["captions"] = [c for column in at["caption"] for c in captions_of(row.get(column))]
        if "rewrites" in at:
            sample["rewrites"] = [c for column in at["rewrites"] for c in captions_of(row.get(column))]
        if label and row.get(label) not in (None, ""):
            sample["label"] = number[str(row[label])]
        sample |= {role: str(row.get(at[role][0]) or "") for role in ("question", "answer") if role in at}
        samples.append(sample)
    offers = ["image", *(["text"] if "caption" in at else []), *(["label"] if label else []), *(r for r in ("question", "answer") if r in at)]
    source = ListSource(name, samples, offers, split=split, classes=classes)
    source.notes = notes
    return source, "split" in at


def picture_of(cell: Any, root: Path, n: int) -> tuple[Any, str]:
    """What to decode, and what to call it: a path, an address, bytes, or Hugging Face's {"bytes", "path"}."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, (bytes, bytearray)):
        return bytes(cell), f"row {n}"
    if not isinstance(cell, str):
        return cell, f"row {n}"
    return (cell if cell.startswith(("http://", "https://")) else root / cell), cell


def captions_of(cell: Any) -> list[str]:
    """The captions in a cell: a string, a list, an object of texts by origin (see `text_views`), or JSON of the latter two written as a string."""
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        try:
            cell = json.loads(cell)
        except ValueError:
            pass
    if isinstance(cell, dict):
        cell = cell.get("raw") or cell.get("text") or in_views(cell)
    return [str(c).strip() for c in (cell if isinstance(cell, (list, tuple)) else [cell]) if c is not None and str(c).strip()]


def classes_of(values: Sequence[Any]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names in sorted order (numbers by value), and the number of each."""
    said = {str(v) for v in values if v not in (None, "")}
    whole = all(re.fullmatch(r"-?\d+", s) for s in said)
    names = tuple(sorted(said, key=int) if whole else sorted(said))
    return names, {n: i for i, n in enumerate(names)}


# COCO, tars

def coco_source(path: Path, split: str, options: dict[str, str]) -> Source:
    """A COCO annotation file; pictures in `?images=FOLDER or .tar`, else beside it, in images/, or in a folder of its stem."""
    stem = path.stem.removeprefix("instances_").removeprefix("captions_")
    usual = [path.parent / n for n in (stem, "images", f"{stem}_images.tar", "images.tar")]
    place = path.parent / options["images"] if "images" in options else next((p for p in usual if p.exists()), path.parent)
    if not place.exists():
        raise UserError(f"no pictures at {str(place)!r}", f"say where they are: {path.name}?images=FOLDER")
    only = [k for k in options.get("only", "").split(",") if k]
    return held_out(CocoSource(str(path), [path], Files(place), split=split, only=only), split)


def annotate(record: Record) -> Sample:
    """Captions, their rewrites and label of a WebDataset sample by the usual endings: txt, caption, rewrites.txt, cls, json."""
    about: Sample = {}
    if "json" in record.parts:
        m = record.json()
        if isinstance(m, dict):
            found = next((m[k] for k in COLUMNS["caption"] if m.get(k)), None)
            about |= {"captions": captions_of(found)} if found is not None else {}
            about |= {"label": m["label"]} if isinstance(m.get("label"), int) else {}
            about |= {"rewrites": captions_of(m["rewrites"])} if m.get("rewrites") else {}
    for ending in ("txt", "caption"):
        if ending in record.parts:
            about["captions"] = [line for line in record.text(ending).splitlines() if line.strip()]
    if "rewrites.txt" in record.parts:
        about["rewrites"] = [line for line in record.text("rewrites.txt").splitlines() if line.strip()]
    if "cls" in record.parts:
        about["label"] = int(record.text("cls"))
    return about


def offers_of_samples(abouts: Sequence[Sample], endings: Sequence[set[str]]) -> tuple[str, ...]:
    """What all of these samples offer."""
    held = [{"text" if a.get("captions") else "", "label" if "label" in a else "", "image" if e & set(PICTURES) else ""}
            for a, e in zip(abouts, endings)]
    return offered(k for k in ("image", "text", "label") if held and all(k in h for h in held))


def tar_source(spec: str, split: str, options: dict[str, str]) -> Any:
    """WebDataset tars: local ones are indexed (or streamed with `?stream=1`), addresses are streamed."""
    if spec.startswith("pipe:"):
        raise UserError("shell commands are not read as data", "give files or http(s) addresses")
    from webdataset.shardlists import expand_urls

    urls = [u for one in expand_urls(spec) for u in (sorted(glob.glob(one)) if "://" not in one and glob.has_magic(one) else [one])]
    if not urls:
        raise UserError(f"no tars match {spec!r}", "check the path")
    if missing := [u for u in urls if "://" not in u and not Path(u).exists()]:
        raise UserError(f"no file {missing[0]!r}", "check the path")
    if any("://" in u for u in urls) or options.get("stream", "") not in ("", "0"):
        from polysense.data.streams import StreamSource

        return StreamSource(spec, urls, split=split)
    return held_out(_indexed(spec, urls, split), split)


def _indexed(name: str, paths: list[str], split: str) -> TarSource:
    source = TarSource(name, paths, ("image",), annotate, split=split)
    step = max(1, len(source) // 16)
    probe = [(source.records[i], _try(source, i)) for i in range(0, len(source), step)]
    good = [(r, a) for r, a in probe if a is not None]
    source.offers = offers_of_samples([a for _, a in good], [set(r.parts) for r, _ in good])
    return source


def _try(source: Source, i: int) -> Sample | None:
    try:
        return source.about(i)
    except BadSample:
        return None
