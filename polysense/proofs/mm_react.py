"""Chained experts answer what no single one can: totals over two receipts, and which sign is beside a ball.

Receipts and scenes of two signs and a coloured ball are drawn with type of random size, a little turned and noisy. The agent works with the rule
planner, tesseract, the calculator, and a detector of coloured balls in its seat. Against it, on the same pictures: the reader alone (the largest
amount it finds; the first sign it reads) and a true caption alone (what is in the picture but not what is written; it guesses among the amounts
and words that occur). Beside the score: the same loop led by written traces, as a language model would write them, on the receipts.

Sizes and noise were chosen on pictures of other seeds (100 and above).
"""
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from polysense.base.agent import Message
from polysense.mechanisms.experts import read_text
from polysense.pipeline import Detection
from polysense.proofs.harness import Outcome
from polysense.systems.agent import mm_react

METRIC, HIGHER_IS_BETTER = "share of questions answered exactly (12 about two receipts, 12 about signs)", True
DATA = "drawn receipts and signs"
EACH = 12
GOODS = ("Bread", "Milk", "Tea", "Coffee", "Apples", "Cheese", "Rice", "Soap", "Paper", "Honey")
SIGNS = ("OPEN", "CLOSED", "EXIT", "BAKERY", "HOTEL", "PARKING", "MUSEUM", "STATION", "MARKET", "LIBRARY")
BALLS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200), "orange": (240, 140, 30)}


class Balls:
    """Finds coloured balls: connected regions of strong colour, named by the nearest of four."""
    tokenizer = None
    id = "balls"

    @property
    def system(self) -> "Balls":
        return self

    def detect(self, image: str, labels: Sequence[str] | None = None) -> list[Detection]:
        pixels = np.asarray(Image.open(image).convert("RGB")).astype(int)
        regions = np.asarray(ndimage.label(pixels.max(2) - pixels.min(2) > 60)[0])  # type: ignore[index]
        out = []
        for k, (rows, columns) in enumerate(ndimage.find_objects(regions)):
            inside = regions[rows, columns] == k + 1
            if inside.sum() > 200:
                mean = pixels[rows, columns][inside].mean(0)
                name = min(BALLS, key=lambda c: float(np.abs(mean - np.array(BALLS[c])).sum()))
                h, w = pixels.shape[:2]
                out.append(Detection(f"{name} ball", 1.0, (columns.start / w, rows.start / h, columns.stop / w, rows.stop / h)))
        return out


@dataclass
class Puzzle:
    """A question about pictures, its answer, and what the two baselines would say."""
    question: str
    paths: list[str]
    answer: str
    caption_guess: str


def letters(rng: np.random.Generator) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), int(rng.integers(17, 27)))


def finished(picture: Image.Image, rng: np.random.Generator, path: Path) -> str:
    """Turned by up to a degree and a half, noise added, saved."""
    turned = np.asarray(picture.rotate(float(rng.uniform(-1.5, 1.5)), Image.Resampling.BICUBIC, fillcolor="white")).astype(float)
    Image.fromarray((turned + rng.normal(0, 8, turned.shape)).clip(0, 255).astype(np.uint8)).save(path)
    return str(path)


def receipt(rng: np.random.Generator, path: Path) -> tuple[str, float]:
    """(path, total in cents) of a receipt of one to four goods."""
    goods, font = rng.choice(GOODS, int(rng.integers(1, 5)), replace=False), letters(rng)
    cents = rng.integers(50, 2500, len(goods))
    picture = Image.new("RGB", (360, 60 + 40 * (len(goods) + 2)), "white")
    draw = ImageDraw.Draw(picture)
    for k, (name, price) in enumerate([*zip(goods, cents, strict=True), ("", 0), ("TOTAL", cents.sum())]):
        if name:
            draw.text((20, 30 + 40 * k), name, "black", font=font)
            draw.text((230, 30 + 40 * k), f"{price / 100:.2f}", "black", font=font)
    return finished(picture, rng, path), int(cents.sum())


def puzzles(seed: int, folder: Path) -> list[Puzzle]:
    rng, out = np.random.default_rng([seed, 11]), []
    for k in range(EACH):
        (one, a), (two, b) = receipt(rng, folder / f"r{k}a.png"), receipt(rng, folder / f"r{k}b.png")
        out.append(Puzzle("What is the total of the two receipts?", [one, two], f"{(a + b) / 100:.2f}", f"{rng.integers(100, 10000) / 100:.2f}"))
    for k in range(EACH):
        left, right = rng.choice(SIGNS, 2, replace=False)
        colour, side, font = str(rng.choice(list(BALLS))), str(rng.choice(["left", "right"])), letters(rng)
        picture = Image.new("RGB", (560, 200), "white")
        draw, y = ImageDraw.Draw(picture), int(rng.integers(60, 120))
        draw.text((25, y), left, "black", font=font)
        draw.text((380, y + int(rng.integers(-15, 16))), right, "black", font=font)
        draw.ellipse((250, y - 10, 300, y + 40), BALLS[colour])
        out.append(Puzzle(f"Which sign is {side} of the {colour} ball?", [finished(picture, rng, folder / f"s{k}.png")],
                          str(left if side == "left" else right), str(rng.choice(SIGNS))))
    return out


def same(said: str, truth: str) -> bool:
    """Whether the answer is the truth: the same number, or the same word."""
    numbers = re.findall(r"\d+(?:\.\d+)?", said)
    if re.fullmatch(r"\d+\.\d\d", truth):
        return len(numbers) == 1 and abs(float(numbers[0]) - float(truth)) < 0.005
    return said.strip(" .").upper() == truth


def reader_alone(puzzle: Puzzle) -> str:
    """The largest amount on the receipts, or the first sign, as the reader finds them."""
    lines = [f.name for p in puzzle.paths for f in read_text(p)]
    if "total" in puzzle.question:
        return max(re.findall(r"\d+\.\d\d", " ".join(lines)), key=float, default="")
    return next((line for line in lines if re.fullmatch(r"[A-Za-z]{3,}", line)), "")


class Traces:
    """What a language model would write about two receipts, step by step: no rules but the order of its lines."""

    def complete(self, messages: Sequence[Message]) -> str:
        prompt, seen = messages[-1]["content"], [m["content"] for m in messages if m["content"].startswith("Observation of")]
        paths = next(m["content"] for m in messages if m["content"].startswith("Human: ")).split("\n")[1:]
        if prompt == mm_react.OBJECTS_FIRST:
            return "No, the pictures are receipts."
        if len([s for s in seen if "Observation of text" in s]) < 2:
            return "\n".join(["1. I need the text of both.", *(f"Assistant, what text is in the image? {p}" for p in paths)])
        if not any("Observation of calculator" in s for s in seen):
            totals = [re.findall(r"\| (?:TOTAL )?(\d+\.\d\d) ", s)[-1:] for s in seen if "Observation of text" in s]
            return f"2. I add them.\nAssistant, calculate {' + '.join(t for each in totals for t in each)}"
        return f"AI: The total is {seen[-1].rpartition('= ')[2]}."


def run(seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        asked = puzzles(seed, Path(place))
        agent = mm_react.tiny().config.build().seat("detector", Balls())
        told = []
        for puzzle in asked:
            agent.reset()
            told.append(same(agent.ask(puzzle.question, puzzle.paths), puzzle.answer))
        agent.planner, traced = Traces(), []
        for puzzle in asked[:EACH]:
            agent.reset()
            traced.append(same(agent.ask(puzzle.question, puzzle.paths), puzzle.answer))
        share = lambda hits: float(np.mean(hits))
        return Outcome(share(told), {"reader alone": share([same(reader_alone(p), p.answer) for p in asked]),
                                     "caption alone": share([same(p.caption_guess, p.answer) for p in asked])},
                       {"receipts": share(told[:EACH]), "signs": share(told[EACH:]), "receipts by written traces": share(traced)})
