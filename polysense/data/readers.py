"""Sources over the file layouts in which public sets come: WebDataset tars, arrays in npz, COCO annotations, question lists."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from polysense.base.errors import UserError
from polysense.data.clips import decoded, read_sound
from polysense.data.sources import BadSample, Blob, Sample, Source, offered

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
SOUNDS = ("flac", "wav", "ogg", "mp3")
MOVIES = ("mp4", "mkv", "webm", "avi", "mov")
MOST_FRAMES = 512                                       # of a video, from its start


class Record:
    """The files of one sample in a tar, by extension; read when asked for."""

    def __init__(self, key: str, parts: dict[str, tuple[Blob, int, int]]):
        self.key, self.parts = key, parts

    def bytes(self, *endings: str) -> bytes:
        for e in endings:
            if e in self.parts:
                blob, offset, size = self.parts[e]
                return blob.read(offset, size)
        raise BadSample(self.key, f"has no .{endings[0]} (it has {', '.join(self.parts) or 'nothing'})")

    def json(self) -> Any:
        return json.loads(self.bytes("json"))

    def text(self, *endings: str) -> str:
        return self.bytes(*endings).decode("utf-8", "replace").strip()


class TarSource(Source):
    """Tars of files that belong together by name (WebDataset), or of single pictures; read in place by an index of offsets.

    `annotate(record) -> dict` gives captions, labels and so on; `mask_as_objects` reads `.png` beside `.jpg` as a class-index map and
    gives one mask, box and class an object kind, leaving out classes from len(classes) on.
    """

    def __init__(self, name: str, paths: Iterable[str | Path], offers: Iterable[str], annotate: Callable[[Record], Sample], *, split: str = "train",
                 classes: Sequence[str] = (), largest: int | None = None, rate: int | None = None):
        self.name, self.split, self.offers, self.classes = name, split, offered(offers), tuple(classes)
        self.annotate, self.largest, self.rate = annotate, largest, rate
        self.records, self.notes = index_tars(paths)
        if not self.records:
            raise UserError(f"{name} ({split}) holds no samples", "; ".join(why for _, why in self.notes) or "is the file complete?")

    def __len__(self) -> int:
        return len(self.records)

    def id(self, i: int) -> str:
        return self.records[i].key

    def _about(self, i: int) -> Sample:
        return self.annotate(self.records[i])

    def _load(self, i: int, key: str) -> Any:
        from polysense.data.images import decode

        record = self.records[i]
        if key == "image":
            return decode(record.bytes(*PICTURES))
        if key == "audio":
            return read_sound(record.bytes(*SOUNDS), self.rate)
        if key == "video":
            return np.stack(list(islice(decoded(record.bytes(*MOVIES)), MOST_FRAMES)))
        return super()._load(i, key)


class SegmentedTar(TarSource):
    """Pictures (.jpg) with a map of class numbers (.png): one mask, box and class for each kind of thing in view."""

    def _map(self, i: int) -> tuple[np.ndarray, list[int]]:
        from PIL import Image

        classes = np.asarray(Image.open(BytesIO(self.records[i].bytes("png"))))
        return classes, [int(c) for c in np.unique(classes) if c < len(self.classes)]

    def _about(self, i: int) -> Sample:
        classes, found = self._map(i)
        boxes = [_box_of(classes == c) for c in found]
        return self.annotate(self.records[i]) | {"box_label": found, "boxes": np.asarray(boxes, np.float32).reshape(-1, 4)}

    def _load(self, i: int, key: str) -> Any:
        if key == "mask":
            classes, found = self._map(i)
            return classes[None] == np.asarray(found, classes.dtype)[:, None, None]
        return super()._load(i, key)


def _box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    (h, w), rows, columns = mask.shape, np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0] / w, rows[0] / h, (columns[-1] + 1) / w, (rows[-1] + 1) / h


def index_tars(paths: Iterable[str | Path]) -> tuple[list[Record], list[tuple[str, str]]]:
    """Records of all tars, in order, and what was damaged. Members are grouped by their path up to the first dot of the file name."""
    records: list[Record] = []
    notes: list[tuple[str, str]] = []
    for path in paths:
        blob, here = Blob(path), {}
        for member, offset, size in blob.members():
            folder, _, file = member.removeprefix("./").rpartition("/")
            stem, _, ending = file.partition(".")
            if stem:
                key = f"{folder}/{stem}" if folder else stem
                here.setdefault(key, {})[ending.lower()] = (blob, offset, size)
        records += [Record(key, parts) for key, parts in here.items()]
        if blob.damage:
            notes.append((Path(path).name, blob.damage))
    return records, notes


class NpzSource(Source):
    """Pictures in an npz: an array `images` [N,H,W(,3)], or encoded files joined in `data` with `offsets` [N+1]."""

    def __init__(self, name: str, labels: np.ndarray, classes: Sequence[str], *, split: str, images: np.ndarray | None = None,
                 data: np.ndarray | None = None, offsets: np.ndarray | None = None, boxes: np.ndarray | None = None, largest: int | None = None):
        self.name, self.split, self.classes = name, split, tuple(str(c) for c in classes)
        self._labels, self._images, self._data, self._offsets, self._boxes = labels, images, data, offsets, boxes
        self.offers, self.largest = offered(("image", "label") + (("boxes", "box_label") if boxes is not None else ())), largest

    def __len__(self) -> int:
        return len(self._labels)

    def id(self, i: int) -> str:
        return f"{self.split}_{i:05d}"

    def labels(self) -> list[int]:
        return [int(x) for x in self._labels]

    def _about(self, i: int) -> Sample:
        label = int(self._labels[i])
        return {"label": label} | ({} if self._boxes is None else {"boxes": self._boxes[i:i + 1], "box_label": [label]})

    def _load(self, i: int, key: str) -> Any:
        from polysense.data.images import decode

        if key != "image":
            return super()._load(i, key)
        if self._images is not None:
            return decode(self._images[i])
        assert self._data is not None and self._offsets is not None
        return decode(self._data[self._offsets[i]:self._offsets[i + 1]].tobytes())


class Files:
    """Files by name: a folder, or a tar with an index of offsets."""

    def __init__(self, place: str | Path):
        self.place = Path(place)
        self._index: dict[str, tuple[int, int]] | None = None
        self._blob: Blob | None = None
        if not self.place.is_dir():
            self._blob = Blob(place)
            self._index = {name.removeprefix("./"): (offset, size) for name, offset, size in self._blob.members()}

    def read(self, name: str) -> bytes:
        if self._blob is None:
            return (self.place / name).read_bytes()
        assert self._index is not None
        if name not in self._index:
            raise BadSample(name, f"is not in {self.place.name}")
        return self._blob.read(*self._index[name])


class CocoSource(Source):
    """COCO annotations: boxes, classes, tags (all classes in view), masks where there are polygons or run lengths, captions.

    Pictures without any of the keys in `only` ("boxes", "mask", "text") are left out; a key that not every remaining picture has
    is not offered.
    """

    def __init__(self, name: str, annotations: Sequence[str | Path], files: Files, *, split: str = "train", only: Sequence[str] = (),
                 largest: int | None = None):
        self.name, self.split, self.files, self.largest = name, split, files, largest
        images: dict[Any, dict[str, Any]] = {}
        kinds: dict[Any, str] = {}
        self._objects: dict[Any, list[dict[str, Any]]] = {}
        self._captions: dict[Any, list[str]] = {}
        for path in annotations:
            plain = read_json(path)
            if not isinstance(plain, dict) or not isinstance(plain.get("images"), list) or not isinstance(plain.get("annotations"), list):
                raise UserError(f"{path} is not a COCO file", "it needs lists called images and annotations")
            images |= {im["id"]: im for im in plain["images"] if im["id"] not in images}
            kinds |= {c["id"]: c["name"] for c in plain.get("categories", ())}
            for a in plain["annotations"]:
                if "caption" in a:
                    self._captions.setdefault(a["image_id"], []).append(a["caption"].strip())
                elif "bbox" in a:
                    self._objects.setdefault(a["image_id"], []).append(a)
        self.classes = self.tag_names = tuple(kinds.values())
        self._number = {k: i for i, k in enumerate(kinds)}
        has = {"boxes": self._objects.__contains__, "text": self._captions.__contains__,
               "mask": lambda k: k in self._objects and all(a.get("segmentation") for a in self._objects[k])}
        if unknown := set(only) - set(has):
            raise UserError(f"only={','.join(unknown)!r} is not known here", f"choose from {', '.join(has)}")
        self._images = [im for k, im in images.items() if all(has[key](k) for key in only)]
        if not self._images:
            raise UserError(f"{name} has no pictures{' with ' + ' and '.join(only) if only else ''}", "check the annotation file")
        whole = [key for key in has if all(has[key](im["id"]) for im in self._images)]
        objects = ("boxes", "box_label", "tags") if "boxes" in whole else ()
        self.offers = offered(("image", *objects, *(k for k in ("mask", "text") if k in whole)))

    def __len__(self) -> int:
        return len(self._images)

    def id(self, i: int) -> str:
        return str(self._images[i]["file_name"])

    def _about(self, i: int) -> Sample:
        im = self._images[i]
        found = self._objects.get(im["id"], [])
        boxes = np.asarray([a["bbox"] for a in found], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes /= np.asarray([im["width"], im["height"]] * 2, np.float32)
        kinds = [self._number[a["category_id"]] for a in found]
        about: Sample = {"boxes": boxes.clip(0, 1), "box_label": kinds, "tags": sorted(set(kinds))}
        return about | ({"captions": self._captions[im["id"]]} if im["id"] in self._captions else {})

    def _load(self, i: int, key: str) -> Any:
        from polysense.data.images import decode

        im = self._images[i]
        if key == "image":
            return decode(self.files.read(im["file_name"]))
        if key == "mask":
            shape = (int(im["height"]), int(im["width"]))
            return np.stack([segment_mask(a["segmentation"], shape) for a in self._objects[im["id"]]])
        return super()._load(i, key)


def segment_mask(segmentation: Any, shape: tuple[int, int]) -> np.ndarray:
    """COCO segmentation (polygons, or run lengths plain or compressed) -> bool [H,W]."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        runs = np.asarray(_unpacked(counts) if isinstance(counts, (str, bytes)) else counts, np.int64)
        h, w = segmentation["size"]
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return flat.reshape(w, h).T                                        # run lengths go down the columns
    from PIL import Image, ImageDraw

    canvas = Image.new("1", (shape[1], shape[0]))
    draw = ImageDraw.Draw(canvas)
    for polygon in segmentation:
        if len(polygon) >= 6:
            draw.polygon([tuple(p) for p in np.asarray(polygon, float).reshape(-1, 2)], fill=1)
    return np.asarray(canvas, dtype=bool)


def _unpacked(counts: str | bytes) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character with sign, from the third run on as the difference to the run before last."""
    text, runs, value, shift = counts.encode() if isinstance(counts, str) else counts, [], 0, 0
    for byte in text:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs


class QuestionSource(Source):
    """One question about a picture a sample: rows with `image`, `question`, `answer`."""

    def __init__(self, name: str, rows: Sequence[dict[str, Any]], files: Files, *, split: str, largest: int | None = None):
        self.name, self.rows, self.files, self.split, self.largest = name, rows, files, split, largest
        self.offers = offered(("image", "question", "answer"))

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, i: int) -> str:
        return str(self.rows[i].get("question_id", i))

    def _about(self, i: int) -> Sample:
        row = self.rows[i]
        return {"question": row["question"], "answer": row["answer"].replace("_", " "), "picture": row["image"]}

    def _load(self, i: int, key: str) -> Any:
        from polysense.data.images import decode

        return decode(self.files.read(self.rows[i]["image"])) if key == "image" else super()._load(i, key)


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; UserError where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"no file {str(path)!r}", "check the path") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON", str(error)) from error


def read_lines(path: str | Path) -> tuple[list[Any], list[tuple[str, str]]]:
    """The objects of a JSON-lines file and (line, reason) of each line that is broken."""
    rows, notes = [], []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                notes.append((f"{Path(path).name}:{n}", f"not JSON: {error}"))
    return rows, notes
