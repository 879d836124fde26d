"""Asking a photo index, seeing why, and showing the answer.

`search(index, pipeline, query, k=10, by="dense", why=True, rerank=0, out=None) -> list[Hit]`, `contact_sheet(hits, query="") -> PIL.Image`,
`write_results(hits, path, query="") -> Path` (`.html` or a picture format).
"""
import base64
import html
import io
import os
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from polysense.app.files import Progress, place
from polysense.app.photos import Found, PhotoIndex
from polysense.app.ways import Parts, able, ranked
from polysense.base.errors import UserError
from polysense.data.images import ENDINGS, decode
from polysense.pipeline import Explanation, overlay
from polysense.pipeline.words import explain_words


@dataclass(frozen=True)
class Hit:
    """A picture found: `rank` from 1, `score` the cosine with the query, `why` its heat-maps (None where the system has none, the file cannot
    be read any more, or nobody asked), `heat` the file of the overlay where one was written; `terms` what met in a sparse search: (token, weight in
    the text, weight in the picture), the most important first."""
    rank: int
    path: str
    score: float
    why: Explanation | None = None
    heat: str | None = None
    terms: tuple[tuple[str, float, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"rank": self.rank, "path": self.path, "score": self.score, "heat": self.heat, "why": self.why and self.why.to_json(),
                "terms": [{"term": t, "text": a, "picture": b} for t, a, b in self.terms]}


def is_picture(query: Any) -> bool:
    """Whether a query is a picture rather than a text: a PIL picture, array or Path, a web address, or the name of an existing picture file."""
    if not isinstance(query, str):
        return True
    return query.startswith(("http://", "https://")) or (os.path.splitext(query)[1].lower() in ENDINGS and os.path.isfile(query))


def search(index: PhotoIndex, pipeline: Any, query: Any, k: int = 10, *, of: str = "", by: str = "dense", why: bool = True, rerank: int = 0,
           out: str | Path | None = None, progress: Progress | None = None) -> list[Hit]:
    """The k pictures that fit a text, a picture, a sound or a video best.

    `of`: "audio", "video", "depth" or "thermal" where the query is the path of one, for systems whose space holds those too. `by`: one of
    `ways.WAYS`, for texts; scores are then those of that way, and sparse search says which terms met. `why` draws heat-maps where the system can
    encode patches or ground a text; with `out` their overlays are written there as PNG files. `rerank`: so many of the best by cosine are judged
    once more by a system that reads text and picture together; their scores are then its probabilities. UserError where the index was made by
    another model, the query is empty, or the system cannot do what is asked.
    """
    index.check(pipeline)
    pictured = bool(of) or is_picture(query)                 # not in words
    if by != "dense" and pictured:
        raise UserError(f"a {of or 'picture'} cannot be looked for by {by}", "--by is for queries in words")
    if not pictured and not query.strip():
        raise UserError("the query is empty", "say what to look for, or give a picture")
    drawn = why and ((pipeline.can("encode_patches") and pipeline.can("encode_text")) or (pipeline.can("ground_text") and not pictured))
    if rerank and pictured:
        raise UserError(f"a {of or 'picture'} cannot be looked for twice", "--rerank is for queries in words")
    deep = max(k, rerank)
    with nullcontext() if by == "dense" else closing(Parts(index, pipeline)) as parts:
        vector = _vector(pipeline, query, of, pictured) if parts is None else None
        found_first = ranked(index, pipeline, query, deep, by=by, progress=progress, parts=parts) if vector is None else index.search(vector, deep)
        if rerank:
            found_first = looked_again(pipeline, found_first[:rerank], query) + found_first[rerank:]
        hits = []
        for rank, found in enumerate(found_first[:k], 1):
            reason = explain(pipeline, found.path, query if vector is None or not pictured else vector, by) if drawn else None
            file = None
            if reason and out:
                file = Path(out) / f"{rank:03d}-{Path(found.path).stem}.png"
                with place(file) as beside:
                    reason.overlay().save(beside, "png")
            terms = parts.shared(query, found.path) if parts is not None and by == "sparse" else ()
            hits.append(Hit(rank, found.path, found.score, reason, str(file) if file else None, terms))
    return hits


def _vector(pipeline: Any, query: Any, of: str, pictured: bool) -> np.ndarray:
    """The query's feature [D]."""
    if of:
        if of not in ("audio", "video", "depth", "thermal"):
            raise UserError(f"a query cannot be of {of!r}", "it is words, a picture, audio, video, depth or thermal")
        if not Path(query).is_file():
            raise UserError(f"no file {str(query)!r}", "check the path")
        if of in ("depth", "thermal"):
            return pipeline.encode_planes([query], of)[0]
        return pipeline.encode(audios=[query])[0] if of == "audio" else pipeline.encode(videos=[query])[0]
    if pictured:
        return pipeline.encode(images=[decode(query)])[0]
    return pipeline.encode(texts=[query])[0]


def looked_again(pipeline: Any, found: Sequence[Found], query: str) -> list[Found]:
    """The same pictures, likeliest first, with the probability that the text belongs to them; those that have gone since come last, with 0."""
    chance = []
    for one in found:
        try:
            chance.append(float(pipeline.match([one.path], [query])[0, 0]))
        except UserError:
            if not isinstance(_thumbnail(one.path, 8), str):
                raise
            chance.append(0.0)
    return sorted((Found(one.path, p) for one, p in zip(found, chance, strict=True)), key=lambda f: -f.score)


def explain(pipeline: Any, path: str, query: str | np.ndarray, by: str = "dense") -> Explanation | None:
    """Heat-maps of one picture, or None where the file has gone or cannot be read since it was indexed."""
    try:
        if by in ("late", "fused") and isinstance(query, str) and able(pipeline, "late"):
            return explain_words(pipeline, path, query)
        if not pipeline.can("encode_patches") and isinstance(query, str):
            return pipeline.ground(path, query)
        return pipeline.explain(path, query)
    except UserError:
        if os.path.exists(path) and not isinstance(_thumbnail(path, 8), str):
            raise
        return None


def contact_sheet(hits: Sequence[Hit], query: str = "", *, columns: int = 5, side: int = 224) -> Image.Image:
    """The hits as one picture: thumbnails in reading order, under each its heat-map (where there is one), rank, score, words and name."""
    if columns < 1 or side < 32:
        raise UserError(f"a sheet of {columns} columns of {side} pixels cannot be drawn", "use at least 1 column of 32 pixels")
    gap, line, font = 8, 16, ImageFont.load_default(12)
    rows, columns = -(-len(hits) // columns), max(1, min(columns, len(hits)))
    deep = side * (2 if any(h.why for h in hits) else 1) + 2 * line + gap
    top = line + 2 * gap if query or not hits else gap
    sheet = Image.new("RGB", (columns * (side + gap) + gap, top + rows * deep), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), _short(query if hits else f"{query}: nothing found", font, sheet.width), "black", font)
    for i, hit in enumerate(hits):
        x, y = gap + i % columns * (side + gap), top + i // columns * deep
        seen = hit.why.image if hit.why else _thumbnail(hit.path, side)
        if isinstance(seen, str):
            draw.text((x + 4, y + side // 2), seen, "grey", font)
        else:
            large = ImageOps.contain(seen, (side, side), Image.Resampling.BICUBIC)
            for i, picture in enumerate([large, overlay(large, hit.why.whole.map)] if hit.why else [large]):
                sheet.paste(picture, (x + (side - large.width) // 2, y + i * side + (side - large.height) // 2))
        y += deep - 2 * line - gap
        words = ", ".join(t for t, *_ in hit.terms[:4]) or (", ".join(h.word for h in hit.why.words) if hit.why else "")
        draw.text((x, y + 1), _short(f"{hit.rank}. {hit.score:.3f} {words}", font, side), "black", font)
        draw.text((x, y + 1 + line), _short(Path(hit.path).name, font, side), "dimgrey", font)
    return sheet


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body{{font:15px system-ui,sans-serif;margin:2rem;background:#fafafa;color:#222}}main{{display:flex;flex-wrap:wrap;gap:1rem}}
figure{{margin:0;background:#fff;border:1px solid #ddd;border-radius:8px;padding:.6rem;width:236px}}
img{{width:100%;border-radius:4px;display:block;margin-bottom:4px}}
figcaption{{font-size:13px;overflow-wrap:anywhere}}b{{font-variant-numeric:tabular-nums}}small{{color:#666}}</style>
<h1>{title}</h1><p>{count}</p><main>{body}</main></html>
"""


def write_results(hits: Sequence[Hit], path: str | Path, query: str = "") -> Path:
    """The answer as a file: one self-contained page for `.html`, else a contact sheet in the format of the suffix."""
    path = Path(path)
    if path.suffix.lower() not in {".html", ".htm", ".png", ".jpg", ".jpeg", ".webp"}:
        raise UserError(f"cannot write results as {path.suffix or path.name!r}", "use .html, .png or .jpg")
    with place(path) as beside:
        if path.suffix.lower() in {".html", ".htm"}:
            body = "".join(_figure(hit) for hit in hits)
            count = f"{len(hits)} pictures" if hits else "nothing found"
            beside.write_text(PAGE.format(title=html.escape(_sayable(query) or "search"), count=count, body=body), encoding="utf-8")
        else:
            contact_sheet(hits, query).save(beside, {".png": "png", ".webp": "webp"}.get(path.suffix.lower(), "jpeg"))
    return path


def _figure(hit: Hit) -> str:
    pictures = [(hit.why.image, "picture")] if hit.why else [(_thumbnail(hit.path, 320), "picture")]
    if hit.why:
        pictures += [(hit.why.overlay(), "where it matches"), *((hit.why.overlay(h.word), h.word) for h in hit.why.words[:3])]
    shown = "".join(f"<small>{html.escape(p)}</small>" if isinstance(p, str) else
                    f'<img src="{_data(p)}" alt="{html.escape(t)}"><small>{html.escape(t)}</small>' for p, t in pictures)
    terms = "".join(f"<br><small>{html.escape(t)} {a:.2f} × {b:.2f}</small>" for t, a, b in hit.terms[:6])
    return f"<figure>{shown}<figcaption><b>{hit.rank}. {hit.score:.3f}</b> {html.escape(_sayable(hit.path))}{terms}</figcaption></figure>\n"


def _data(picture: Image.Image) -> str:
    small, out = picture.copy(), io.BytesIO()
    small.thumbnail((320, 320))
    small.save(out, "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _thumbnail(path: str, side: int) -> Image.Image | str:
    """The picture made small, or what to say in its place."""
    try:
        picture = decode(path)
    except UserError:
        return "unreadable" if os.path.exists(path) else "gone since indexed"
    picture.thumbnail((side, side))
    return picture


def _sayable(text: str) -> str:
    """File names may hold bytes that are no text: shown, not written."""
    return text.encode("utf-8", "backslashreplace").decode()


def _short(text: str, font: Any, most: int) -> str:
    """As much of a text as `most` pixels hold, on one line."""
    text = " ".join(_sayable(text)[:most].split())
    if font.getlength(text) <= most:
        return text
    return text[:bisect_right(range(len(text)), most, key=lambda n: font.getlength(text[:n] + "…")) - 1] + "…"
