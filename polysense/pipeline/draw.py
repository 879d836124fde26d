"""Pictures that a system draws: out of words, out of nothing, along a map."""
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan
from polysense.data.hints import extracted
from polysense.data.images import read_images
from polysense.pipeline.pictures import to_pictures
from polysense.train.precision import autocast

Progress = Callable[[int, int], object]


def generate(pipeline: Any, texts: Sequence[str] = (), count: int = 1, *, steps: int = 20, guidance: float | None = None, seed: int = 0,
             hints: Sequence[Any] = (), extract: str = "", strength: float | Sequence[float] = (), guess: bool = False, weighting: bool = False,
             sampler: str | None = None, batch_size: int = 16, progress: Progress | None = None) -> list[Image.Image]:
    """`count` pictures of each text (or, for systems that draw without words and `texts` empty, `count` pictures), text by text.

    steps: of the sampler, where the system has one. guidance: how much the words count, where the system can weigh them. seed: equal seeds
    draw equal pictures on one machine. hints: pictures of a map to follow, one, or one for each text (a system that follows several kinds of map
    takes one of each kind, in their order, where others take one); with `extract` (canny, lines, scribble) photographs from which that map is taken.
    strength: how much the map counts, 1 as learned, 0 not at all; one number, or one for each kind. guess: the map says what to draw, texts can be
    left out. weighting: coarse features of the map count more than fine ones. Both leave the side of guidance without words alone. sampler:
    another one than the preset's. UserError where the system cannot draw in this way.
    """
    if count < 1 or steps < 1:
        raise UserError(f"{count} pictures in {steps} steps", "both are at least 1")
    strengths = [float(s) for s in ([strength] if isinstance(strength, int | float) else strength)]
    kinds = _kinds(pipeline, hints, strengths, guess, weighting)
    if guess and not texts:
        texts = [""] * max(1, len(hints) // kinds)
    elif blank := [t for t in texts if not t.strip()]:
        raise UserError(f"a text is empty ({len(blank)} of {len(texts)})", "say what to draw")
    capability = "generate_image" if pipeline.can("generate_image") and (texts or not pipeline.can("sample_image")) else "sample_image"
    pipeline._need(capability)
    if capability == "sample_image" and (texts or guidance is not None or len(hints)):
        raise UserError(f"{pipeline.id or 'this system'} draws without words", "leave the text, --guidance and --hint out")
    if capability == "generate_image" and not texts:
        raise UserError(f"{pipeline.id or 'this system'} draws what it is told", 'say what, for instance "a red circle"')
    if len(hints) not in (0, kinds, kinds * len(texts)):
        raise UserError(f"{len(hints)} hints for {len(texts)} texts", "give one, or one for each text" if kinds == 1 else
                        f"this system follows {kinds} kinds of map: give {kinds}, one of each kind, or {kinds} for each text")
    plan, control = pipeline._image_plan(), dict[str, torch.Tensor]()
    if guidance is not None:
        control["guidance"] = torch.tensor(float(guidance), device=pipeline.device)
    ids = pipeline.read_texts(texts).repeat_interleave(count, 0) if texts else None
    if extract and not hints:
        raise UserError(f"nothing to take the map {extract!r} from", "give a photograph as hint")
    control |= {name: torch.tensor(1) for name, on in (("guess", guess), ("weighting", weighting)) if on}
    if strengths:
        control["strength"] = torch.tensor(strengths if len(strengths) > 1 else strengths[0], device=pipeline.device)
    each = list(hints) if len(hints) == kinds * len(texts) else list(hints) * len(texts)
    maps = read_hints(plan, each, count, extract, kinds).to(pipeline.device) if hints else None
    total, out, usual = count if ids is None else len(ids), list[Image.Image](), getattr(pipeline.system, "sampler", None)
    if sampler is not None:
        if usual is None or not hasattr(usual, "name"):
            raise UserError(f"{pipeline.id or 'this system'} has no sampler to choose", "leave --sampler out")
        pipeline.system.sampler = usual.but(name=sampler)
    devices = [pipeline.device] if pipeline.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(), autocast("auto", pipeline.device)(True):
            torch.manual_seed(seed)
            for start in range(0, total, batch_size):
                at = slice(start, min(start + batch_size, total))
                if ids is None:
                    drawn = pipeline.system.sample_image(at.stop - at.start, steps=steps)
                else:
                    drawn = pipeline.system.generate_image(ids[at], steps=steps, **control, **({"hint": maps[at]} if maps is not None else {}))
                out += to_pictures(drawn.float(), plan)
                if progress:
                    progress(at.stop, total)
    finally:
        if sampler is not None:
            pipeline.system.sampler = usual
    return out


def _kinds(pipeline: Any, hints: Sequence[Any], strengths: Sequence[float], guess: bool, weighting: bool) -> int:
    """How many kinds of map the system follows. UserError where it follows none, or not in the way that is asked for."""
    follows = "strength" in getattr(pipeline.system, "hears", ())
    kinds = pipeline.system.kinds if follows else 1
    if not (strengths or guess or weighting):
        return kinds
    if not follows:
        raise UserError(f"{pipeline.id or 'this system'} has no control net", "leave --strength, --guess and --weighting out, or take a ControlNet")
    if not len(hints):
        raise UserError("no map is given that --strength, --guess or --weighting could be about", "give one with --hint")
    if len(strengths) not in (0, 1, kinds):
        raise UserError(f"{len(strengths)} strengths for {kinds} kind{'s' * (kinds > 1)} of map",
                        "give one" if kinds == 1 else f"give one, or {kinds}, one for each kind")
    if wrong := [s for s in strengths if not 0 <= s < math.inf]:
        raise UserError(f"a strength of {wrong[0]}", "0 is without the map, 1 as learned")
    return kinds


def read_hints(plan: ImagePlan, hints: Sequence[Any], count: int, extract: str = "", kinds: int = 1) -> torch.Tensor:
    """Pictures of maps, or with `extract` photographs to take them from -> [N/kinds*count,3*kinds,H,W] in [0,1], at the size of the pictures."""
    maps = read_images(plan.but(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), list(hints))
    maps = extracted(extract, maps.clamp(0, 1)) if extract else maps
    return maps.unflatten(0, (-1, kinds)).flatten(1, 2).repeat_interleave(count, 0)


def grid(pictures: Sequence[Image.Image], columns: int = 0, gap: int = 2) -> Image.Image:
    """One picture of all, row by row; columns 0: as square as can be. `gap` white pixels between them."""
    columns = columns or max(1, round(len(pictures) ** 0.5))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet
