"""Samples drawn, counted and written to a folder."""
from __future__ import annotations

import json
import random
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from polysense.base.errors import UserError
from polysense.data.sources import BadSample, Sample, Source

SIDE, GAP, LINE = 192, 10, 15


def describe(source: Source) -> dict[str, Any]:
    """What a source holds, from the cheap part of its samples (a thousand at most, evenly spread)."""
    seen = list(range(0, len(source), max(1, len(source) // 1000)))
    captions: list[list[str]] = []
    labels: Counter[int] = Counter()
    for i in seen:
        try:
            about = source.about(i)
        except BadSample:
            continue
        captions.append(list(about.get("captions", ())))
        if "label" in about:
            labels[int(about["label"])] += 1
    words = [len(c.split()) for cs in captions for c in cs]
    out: dict[str, Any] = {"name": source.name, "split": source.split, "samples": len(source), "offers": list(source.offers)}
    if words:
        out |= {"captions": f"{len(words) / max(1, len(captions)):.1f} a sample, {min(words)} to {max(words)} words (mean {np.mean(words):.1f})"}
    if labels or source.classes:
        names = [source.classes[k] if 0 <= k < len(source.classes) else str(k) for k, _ in labels.most_common(9) if k >= 0]
        out |= {"classes": len(source.classes) or len(labels), "frequent": names}
    if source.notes:
        out |= {"notes": [f"{name}: {reason}" for name, reason in list(source.notes)[:5]]}
    return out


def picked(source: Source, count: int, seed: int) -> tuple[list[Sample], list[BadSample]]:
    """`count` samples drawn without repetition, and those that could not be read on the way."""
    if not len(source):
        raise UserError(f"{source.name} ({source.split}) is empty", "try another --split")
    order = random.Random(seed).sample(range(len(source)), len(source)) if len(source) < 10**6 else \
        [random.Random(seed + i).randrange(len(source)) for i in range(4 * count)]
    good: list[Sample] = []
    bad: list[BadSample] = []
    for i in order:
        try:
            good.append(source[i])
        except BadSample as error:
            bad.append(error)
        if len(good) == count or len(bad) > 100:
            break
    return good, bad


def picture(sample: Sample, key: str = "image") -> Image.Image:
    """A sample's picture as RGB."""
    value = sample[key]
    return (value if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value))).convert("RGB")


def caption_of(sample: Sample, classes: Sequence[str]) -> str:
    if captions := sample.get("captions"):
        return captions[0]
    label = int(sample.get("label", -1))
    return classes[label] if 0 <= label < len(classes) else sample["id"]


def draw_samples(samples: Sequence[Sample], classes: Sequence[str], path: Path, columns: int = 6) -> None:
    """A contact sheet: each picture with its boxes, caption and id."""
    shown = [s for s in samples if "image" in s]
    columns = min(columns, len(shown))
    deep = SIDE + 4 * LINE + GAP
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, -(-len(shown) // columns) * deep + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, sample in enumerate(shown):
        x, y = GAP + i % columns * (SIDE + GAP), GAP + i // columns * deep
        small = picture(sample)
        scale = min(SIDE / small.width, SIDE / small.height)
        small = small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))),
                             Image.Resampling.NEAREST if scale > 3 else Image.Resampling.LANCZOS)
        left, top = x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2
        sheet.paste(small, (left, top))
        for box in np.asarray(sample.get("boxes", np.zeros((0, 4)))):
            if box.min() >= 0:
                corners = box * np.array([small.width, small.height] * 2) + np.array([left, top] * 2)
                draw.rectangle([tuple(corners[:2]), tuple(corners[2:])], outline="#e4572e")
        lines = textwrap.wrap(caption_of(sample, classes), SIDE // 6)[:3]
        for j, line in enumerate(lines):
            draw.text((x, y + SIDE + 2 + j * LINE), line, "black", font)
        draw.text((x, y + SIDE + 2 + 3 * LINE), sample["id"][-SIDE // 6:], "grey", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


PLAIN = ("captions", "label", "tags", "boxes", "box_label", "question", "answer", "qa")


def export(source: Source, out: Path, count: int | None = None, progress: Callable[[int, int], object] | None = None,
           ) -> tuple[int, list[BadSample]]:
    """Pictures as files and one metadata.jsonl beside them: the folder layout that `source` reads back.

    Pictures that are lossless stay so (PNG), others become JPEG of quality 95. Unreadable samples are left out and returned.
    """
    if "image" not in source.offers:
        raise UserError(f"{source.name} holds no pictures", "only pictures and what is said about them can be written to a folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty", "give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    total, written, damaged = min(count or len(source), len(source)), 0, []
    with open(out / ".metadata.part", "w", encoding="utf-8") as lines:
        for i in range(total):
            try:
                about, image = source.about(i), source.load(i, "image")
            except BadSample as error:
                damaged.append(error)
                continue
            stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in str(about["id"]))[-100:] or str(i)
            name = f"{stem}.jpg" if getattr(image, "format", None) == "JPEG" or stem_is_photo(image) else f"{stem}.png"
            if (out / name).exists():
                name = f"{i:07d}_{name}"
            picture({"image": image}).save(out / name, quality=95)      # PNG ignores it
            row: dict[str, Any] = {"file_name": name} | {k: _plain(about[k]) for k in PLAIN if k in about}
            if "label" in row and 0 <= row["label"] < len(source.classes):
                row["label"] = source.classes[row["label"]]
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
            if progress:
                progress(i + 1, total)
    (out / ".metadata.part").rename(out / "metadata.jsonl")
    return written, damaged


def stem_is_photo(image: Any) -> bool:
    """Whether a picture came from a photograph-sized array: those are stored as JPEG, small and drawn ones losslessly."""
    return isinstance(image, Image.Image) and image.mode == "RGB" and min(image.size) >= 256


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
