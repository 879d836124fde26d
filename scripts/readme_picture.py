"""Draws docs/images/search.png: searches in drawn scenes with heat-maps. Nobody's photographs are in it.

    polysense train clip --data scenes:single --steps 3000 --minutes 30 --out runs/scenes
    polysense data get scenes:single pictures --split val -n 500 && polysense index pictures -m runs/scenes
    python scripts/readme_picture.py runs/scenes pictures "a red ring" "an orange crescent" "a purple heart"
"""
from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import polysense
from polysense.app.index import NAME, Index
from polysense.app.search import search

SIDE, GAP, LEFT, SHOWN = 124, 8, 250, 5
OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "search.png"


def main(run: str, pictures: str, queries: list[str]) -> None:
    model = polysense.open(run)
    row = 2 * SIDE + 3 * GAP
    sheet = Image.new("RGB", (LEFT + SHOWN * (SIDE + GAP) + GAP, len(queries) * (row + 2 * GAP)), "white")
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(19), ImageFont.load_default(13)
    with Index.open(Path(pictures) / NAME) as index:
        for i, query in enumerate(queries):
            y = i * (row + 2 * GAP) + GAP
            if i:
                draw.line([(GAP, y - GAP), (sheet.width - GAP, y - GAP)], "#d8dde3")
            draw.text((16, y + SIDE // 2 - 12), f"“{query}”", "#1c2430", font)
            draw.text((16, y + SIDE // 2 + 16), f"best {SHOWN} of {len(index)} pictures", "#5b6675", small)
            draw.text((16, y + SIDE + GAP + SIDE // 2 - 8), "where the words match", "#5b6675", small)
            for j, hit in enumerate(search(index, model, query, SHOWN)):
                assert hit.why is not None, "the run cannot encode patches"
                x = LEFT + j * (SIDE + GAP)
                sheet.paste(hit.why.image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
                sheet.paste(hit.why.overlay().resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y + SIDE + GAP))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.FLOYDSTEINBERG).save(OUT, optimize=True)
    print(f"{OUT}: {OUT.stat().st_size // 1000} kB")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
