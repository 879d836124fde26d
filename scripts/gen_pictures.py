"""Draws docs/images/systems/ID.png: what a small run of a system does with pictures it has not seen. All of them are drawn scenes of this library or
handwritten digits of scikit-learn: nobody's photographs are in them.

    python scripts/gen_pictures.py mae clip --seconds 60        # trains `tiny` for a minute each (and, once, what it stands on), then draws
    python scripts/gen_pictures.py mae --run runs/mae           # draws with weights that are there

What was trained, and for how long, is written under each picture. Runs are kept in --runs and used again.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import polysense
from polysense.base.catalogue import card_of, preset_of
from polysense.data import source
from polysense.data.images import decode
from polysense.pipeline.pictures import covered, to_pictures

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "systems"
WIDE, SIDE, GAP, LEFT, INK, PALE = 900, 112, 8, 150, "#1c2430", "#5b6675"
Picture = Image.Image


class Row(NamedTuple):
    """Pictures side by side: what they are, and words under each."""
    says: str
    pictures: Sequence[Any]
    under: Sequence[str] = ()
    side: int = SIDE


# -- training -----------------------------------------------------------------------------------------------------------------------------

def learn(id: str, place: Path, seconds: float, batch: int, preset: str = "tiny") -> Path:
    """A run of a preset in batches of at most `batch`, stopped after so many seconds; what it stands on is trained as long, once."""
    from polysense.train.run import train
    from polysense.train.starts import place_of

    if not (place / "weights.safetensors").exists():
        plan = preset_of(id, preset)
        for start in plan.starts:
            learn(start.from_, place_of(start), seconds, batch, start.preset)
        sizes = {f"stages.{i}.batch_size": min(batch, stage.batch_size) for i, stage in enumerate(plan.stages)}
        print(f"training {id} {preset}", flush=True)
        for _ in train(id, preset, overrides=sizes, out=place, resume=place.exists(), time_budget_s=seconds, device="cpu", workers=0):
            pass
    return place


def trained_how(run: Path) -> str:
    """The size of a training, as its folder has it."""
    facts, log = json.loads((run / "run.json").read_text()), [json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()]
    seconds = sum(x["seconds"] for x in log)
    count = sum(p.numel() for p in polysense.open(run).system.parameters())
    return (f"{facts['system']} {facts['preset']}: {count / 1e6:.2f} million parameters, {len(log)} steps on {facts['data']}, "
            f"{seconds:.0f} s on a shared processor")


# -- kinds of pictures: (pipeline, data) -> rows --------------------------------------------------------------------------------------------

def some(data: str, n: int, skip: int = 0) -> list[dict[str, Any]]:
    """Held-out samples."""
    held = source(data, "test")
    return [held[i] for i in range(skip, skip + n)]


def again(model: Any, data: str) -> list[Row]:
    """Reconstructions; of masked models also what they were shown."""
    pictures = [s["image"] for s in some(data, 6)]
    rows = [Row("unseen picture", to_pictures(model.read_images(pictures), model.preset.feed.image))]
    if hasattr(model.system, "cover"):
        torch.manual_seed(0)
        rows.append(Row("what it is shown", covered(model, pictures)))
    torch.manual_seed(0)
    rows.append(Row("drawn again", model.reconstruct(pictures)))
    if model.can("encode_codes"):
        with torch.inference_mode():
            codes = model.system.encode_codes(model.read_images(pictures))
        rows.insert(1, Row(f"its codes, a colour each ({codes.shape[1]} by {codes.shape[2]})", [coloured(c) for c in codes]))
    return rows


def coloured(ids: torch.Tensor) -> Picture:
    """ids [h,w] -> a square with a colour for each id, always the same."""
    rgb = np.stack([ids.cpu().numpy().astype(np.uint32) * k % 2 ** 16 // 256 for k in (40503, 30011, 52361)], -1).astype(np.uint8)
    return Image.fromarray(rgb).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def edges_named(model: Any, data: str) -> list[Row]:
    """MaskFeat: which way edges run, in truth and as it says behind the mask."""
    plan, system = model.preset.feed.image, model.system
    image, target = model.read_images([s["image"] for s in some(data, 6)]), system.target.c
    torch.manual_seed(0)
    with torch.inference_mode():
        masking = system.masking(image)
        said, _ = system.pairs(image, masking)
        whole, grid = system.target.whole(image), system.encoder.grid_of(image)
        told = whole.masked_scatter(masking.mask[..., None], said.to(whole))
    hidden = F.interpolate(masking.mask.view(-1, 1, *grid).float(), image.shape[-2:]) > 0
    cells = target.patch // target.cell
    size, kinds = tuple(g * cells for g in grid), (target.channels, target.bins)
    fold = lambda v: F.fold(v.transpose(1, 2), size, cells, stride=cells).unflatten(1, kinds).sum(1)
    return [Row("unseen picture", to_pictures(image, plan)), Row("what it is shown", to_pictures(image.masked_fill(hidden, 0.0), plan)),
            Row("its histograms of gradients", [strokes(v) for v in fold(whole)]),
            Row("the same, named where it sees nothing", [strokes(v) for v in fold(told)])]


def strokes(bins: torch.Tensor) -> Picture:
    """bins [K,h,w] -> a square in which every cell has a stroke along its edges for each direction, the brighter the more of it there is."""
    k, h, w = bins.shape
    level, out = bins.clamp(min=0) / bins.amax().clamp(min=1e-6), Image.new("RGB", (SIDE * 2, SIDE * 2))
    pen, step = ImageDraw.Draw(out), SIDE * 2 / h
    for b, y, x in sorted(np.ndindex(k, h, w), key=lambda at: float(level[at])):
        if (bright := int(255 * float(level[b, y, x]))) < 24:
            continue
        angle = (b + 0.5) * np.pi / k                    # of the gradient's (x, y) as atan2(gx, gy); the edge runs across it
        dx, dy = np.cos(angle) * step * 0.45, -np.sin(angle) * step * 0.45
        cx, cy = (x + 0.5) * step, (y + 0.5) * step
        pen.line((cx - dx, cy - dy, cx + dx, cy + dy), fill=(bright,) * 3, width=2)
    return out


def principal(features: torch.Tensor, count: int) -> torch.Tensor:
    """features [n,D] -> their first `count` principal components [n,count]."""
    x = features.float() - features.float().mean(0)
    return x @ torch.linalg.svd(x, full_matrices=False)[2][:count].T


def patch_colours(model: Any, data: str) -> list[Row]:
    """Three principal components of patch features as red, green and blue; nothing where no tower tells of places."""
    tower = next((m for m in model.system.modules() if callable(getattr(m, "dense", None))), None)
    if tower is None:
        return []
    image = model.read_images([s["image"] for s in some(data, 6)])
    with torch.inference_mode():
        dense = tower.dense(image)
    main = principal(dense.flatten(0, 2), 3)
    low, high = main.quantile(0.02, 0), main.quantile(0.98, 0)
    rgb = ((main - low) / (high - low)).clamp(0, 1).view(*dense.shape[:3], 3)
    squares = [Image.fromarray((x * 255).byte().numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST) for x in rgb]
    return [Row("unseen picture", to_pictures(image, model.preset.feed.image)),
            Row("features of its patches: three main components as colours", squares)]


def constellation(model: Any, data: str) -> list[Row]:
    """The first two principal components of features, a colour for each class, of the trained system and as it was born."""
    from polysense.tasks.probes import untrained

    held = source(data, "test")
    samples = [held[i] for i in range(min(400, len(held)))]
    if "label" not in samples[0] or not held.classes:
        return []
    kinds = sorted({int(s["label"]) for s in samples})[:8]
    samples = [s for s in samples if int(s["label"]) in kinds]
    clouds = [principal(torch.as_tensor(m.encode(images=[s["image"] for s in samples])), 2) for m in (model, untrained(model, 0))]
    return [Row(f"features of {len(samples)} unseen pictures of {len(kinds)} classes: two main components",
                [scatter(cloud, [kinds.index(int(s["label"])) for s in samples]) for cloud in clouds], ("trained", "as it was born"), 2 * SIDE)]


def scatter(points: torch.Tensor, kinds: Sequence[int], side: int = 4 * SIDE) -> Picture:
    out = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(out)
    pen.rectangle((0, 0, side - 1, side - 1), outline=PALE, width=2)
    low, high = points.amin(0), points.amax(0)
    colours = ("#1b6ca8", "#d1495b", "#2e933c", "#edae49", "#6a4c93", "#00798c", "#8d6a4f", "#444b54")
    for (x, y), kind in zip(((points - low) / (high - low).clamp(min=1e-9)).tolist(), kinds, strict=True):
        cx, cy = 12 + x * (side - 24), 12 + y * (side - 24)
        pen.ellipse((cx - 6, cy - 6, cx + 6, cy + 6), fill=colours[kind])
    return out


def learned_alone(model: Any, data: str) -> list[Row]:
    """What learned without labels: what it draws or looks at, the colours of its patches, and where its features lie."""
    own = KINDS.get(model.id) or next((f for k, f in BY_CAPABILITY.items() if model.can(k)), neighbours)
    rows = own(model, data)
    places = patch_colours(model, data)
    return [*rows, *places[rows[0].says == "unseen picture":], *(constellation(model, data) if model.can("encode_image") else [])]


def hidden_codes(model: Any, data: str) -> list[Row]:
    """BEiT and CAE: the codes they name at hidden places, as their codec draws them."""
    plan, system = model.preset.feed.image, model.system
    target = getattr(system.target, "truth", system.target)
    image, codec = model.read_images([s["image"] for s in some(data, 6)]), target.codec
    torch.manual_seed(0)
    with torch.inference_mode():
        masking = system.masking(image)
        said = system.decoder(system.see(image, masking), masking)
        logits = said[0] if isinstance(said, tuple) else said            # CAE's regressor says features as well
        grid, ids = system.encoder.grid_of(image), target.ids(image)
        truth = ids.flatten(1)[masking.mask]
        named = ids.flatten(1).masked_scatter(masking.mask, logits.argmax(-1)).view(ids.shape)
        true, guessed = codec.decode(ids), codec.decode(named)
    hidden = F.interpolate(masking.mask.view(-1, 1, *grid).float(), image.shape[-2:]) > 0
    half = plan.but(mean=target.c.codec_mean, std=target.c.codec_std)
    right = f"the codes it names there, drawn ({(logits.argmax(-1) == truth).float().mean():.0%} are right)"
    return [Row("unseen picture", to_pictures(image, plan)), Row("what it is shown", to_pictures(image.masked_fill(hidden, 0.0), plan)),
            Row(right, to_pictures(guessed, half)), Row("the true codes, drawn", to_pictures(true, half))]


def clip_again(model: Any, data: str) -> list[Row]:
    """VideoMAE and MAE-ST: frames of two clips."""
    video = model.read_videos([s["video"] for s in some(data, 2)])
    torch.manual_seed(0)
    with torch.inference_mode():
        masking = model.system.masking(video)
        drawn, shown = model.system.draw(video, masking), model.system.target.cover(video, masking, model.system.encoder.grid_of(video))
    frames = lambda clip: to_pictures(clip[[round(i * (len(clip) - 1) / 5) for i in range(6)]], model.preset.feed.image)
    return [Row(says, frames(clip)) for k in range(2) for says, clip in (("unseen clip", video[k]), ("what it is shown", shown[k]),
                                                                          ("drawn again", drawn[k]))]


def looks(model: Any, data: str) -> list[Row]:
    """Attention of the class token, head by head."""
    from polysense.pipeline.attention import attention_sheet

    rows = []
    for sample in some(data, 4):
        sheet = attention_sheet(model, sample["image"], SIDE)
        rows.append(Row(sample["captions"][0], [sheet.crop((x, 0, x + SIDE, SIDE)) for x in range(0, min(sheet.width, 6 * SIDE), SIDE)]))
    rows[-1] = rows[-1]._replace(under=["picture", "mean of heads", *(f"head {i + 1}" for i in range(len(rows[-1].pictures) - 2))])
    return rows


def drawn(model: Any, data: str) -> list[Row]:
    """Samples, of texts where the system reads them."""
    if not model.can("generate_image"):
        pictures = model.generate(count=18, seed=1)
        return [Row("drawn out of nothing" if not i else "", pictures[i:i + 6]) for i in range(0, 18, 6)]
    texts = list(dict.fromkeys(min(s["captions"], key=len) for s in some(data, 12)))[:4]
    pictures = model.generate(texts, 6, seed=1)
    return [Row(f"“{text}”", pictures[6 * i:6 * i + 6]) for i, text in enumerate(texts)]


def steered(model: Any, data: str) -> list[Row]:
    """Samples along a map."""
    rows = []
    for sample in some(data + "&hint=edges", 4):
        text = min(sample["captions"], key=len)
        rows.append(Row(f"“{text}”", [sample["hint"], *model.generate([text], 4, seed=1, hints=[sample["hint"]]), sample["image"]]))
    rows[-1] = rows[-1]._replace(under=["the map", *["drawn along it"] * 4, "where it is from"])
    return rows


def new_word(model: Any, data: str) -> list[Row]:
    """What the word was learned from, and what it draws."""
    seen, held = source(data), "seen in training"
    return [Row(held, [seen[i]["image"] for i in range(len(seen))][:6])] + [
        Row(f"“{text}”", model.generate([text], 6, seed=1)) for text in ("a <it>", "two of <it>")]


def outlined(model: Any, data: str) -> list[Row]:
    """Masks for one click: the readings; then more clicks on the last thing."""
    from polysense.tasks.segmentation import next_click

    rows = []
    for sample in some(data, 4, skip=2):
        part = sample["mask"][int(sample["mask"].reshape(len(sample["mask"]), -1).sum(1).argmin())]
        truth, answer, places, labels, cells, under = torch.from_numpy(part)[None], torch.zeros(1, *part.shape, dtype=torch.bool), [], [], [], []
        for k in (1, 2, 3):
            place, inside = next_click(answer, truth)
            places.append(tuple(place[0].tolist()))
            labels.append(int(inside[0]))
            said = model.segment(large(sample["image"]), [(x + 0.5 / part.shape[1], y + 0.5 / part.shape[0]) for x, y in places], labels)
            cells += [clicked(said.overlay(j), said.points) for j in range(len(said.masks) if k == 1 else 1)]
            under += [f"{k} click{'s' * (k > 1)}, says IoU {said.scores[j]:.2f}" for j in range(len(said.masks) if k == 1 else 1)]
            small = np.asarray(Image.fromarray(said.mask).resize(part.shape[::-1], Image.Resampling.NEAREST))
            answer = torch.from_numpy(small.copy())[None]
        rows.append(Row("three readings of one click, then clicks where it errs" if not rows else "", cells, under))
    return rows


def clicked(picture: Picture, points: Sequence[tuple[float, float, int]], r: int = 7) -> Picture:
    """Clicks large enough to be seen: green inside, red outside."""
    pen = ImageDraw.Draw(picture)
    for x, y, inside in points:
        x, y = x * picture.width, y * picture.height
        pen.ellipse((x - r, y - r, x + r, y + r), fill="#20c840" if inside else "#dc2020", outline="white", width=2)
    return picture


def boxed(model: Any, data: str) -> list[Row]:
    """Boxes and their names."""
    from polysense.pipeline.mask import boxed as with_boxes

    samples = some(data, 12)
    pictures = [with_boxes(large(s["image"], 224), model.detect(large(s["image"], 224), threshold=0.3)) for s in samples]
    return [Row("what it finds in unseen pictures" if not i else "", pictures[i:i + 6]) for i in range(0, 12, 6)]


def told(model: Any, data: str) -> list[Row]:
    """Captions, or answers where the data have questions."""
    rows, samples = [], [s for s in some(data, 24) if "qa" in s][:12] or some(data, 12)
    for i in range(0, 12, 6):
        part = samples[i:i + 6]
        if "chat" in " ".join(card_of(model.id).needs) or "question" in str(card_of(model.id).needs):
            asked = [s["qa"][0] for s in part]
            under = [f"{q} {model.ask(s['image'], q, max_new=8)} (truth: {a})" for s, (q, a) in zip(part, asked, strict=True)]
        else:
            under = model.caption([s["image"] for s in part], max_new=20)
        rows.append(Row("what it says of unseen pictures" if not i else "", [s["image"] for s in part], under))
    return rows


def searched(model: Any, data: str) -> list[Row]:
    """The nearest of 300 unseen pictures to texts."""
    held = source(data, "test")
    samples = [held[i] for i in range(300)]
    features = model.encode(images=[s["image"] for s in samples])
    texts = list(dict.fromkeys(min(s["captions"], key=len) for s in samples))[:4]
    return [Row(f"“{text}” in {len(samples)} pictures", [samples[j]["image"] for j in np.argsort(-row)[:6]])
            for text, row in zip(texts, model.encode(texts=texts) @ features.T, strict=True)]


def clips_searched(model: Any, data: str) -> list[Row]:
    """The nearest clip to texts, as its frames."""
    samples = some(data, 60)
    features = model.encode(videos=[s["video"] for s in samples])
    texts = [samples[i]["captions"][0] for i in range(4)]
    return [Row(f"“{text}” in {len(samples)} clips", list(samples[int(row.argmax())]["video"][::max(1, len(samples[0]["video"]) // 6)][:6]))
            for text, row in zip(texts, model.encode(texts=texts) @ features.T, strict=True)]


def heard(model: Any, data: str) -> list[Row]:
    """The nearest pictures to sounds."""
    samples = some(data, 200)
    features, rows = model.encode(images=[s["image"] for s in samples]), []
    for sample in samples[:4]:
        near = np.argsort(-(model.encode(audios=[sample["audio"]]) @ features.T)[0])[:6]
        rows.append(Row(f"the sound of: {sample['captions'][0]}", [samples[j]["image"] for j in near]))
    return rows


def neighbours(model: Any, data: str) -> list[Row]:
    """The nearest of 400 unseen pictures to some."""
    held = source(data, "test")
    samples = [held[i] for i in range(min(400, len(held)))]
    features = model.encode(images=[s["image"] for s in samples])
    pick = lambda i: [samples[j]["image"] for j in np.argsort(-(features @ features[i]))[:6]]
    rows = [Row(f"the nearest of {len(samples)} unseen pictures to the first" if not i else "", pick(i)) for i in range(4)]
    rows[-1] = rows[-1]._replace(under=["the picture", *(f"nearest {k}" for k in range(1, 6))])
    return rows


def classified(model: Any, data: str) -> list[Row]:
    """The likeliest class."""
    held = source(data, "test")
    samples = [held[i] for i in range(12)]
    said = [x.labels[0] for x in model.classify([s["image"] for s in samples], held.classes)]
    under = [f"{name} {chance:.2f}" + ("" if name == held.classes[s["label"]] else f" (is {held.classes[s['label']]})")
             for (name, chance), s in zip(said, samples, strict=True)]
    return [Row("what it takes unseen pictures for" if not i else "", [s["image"] for s in samples[i:i + 6]], under[i:i + 6]) for i in (0, 6)]


def views(model: Any, data: str) -> list[Row]:
    """Rendered views beside the truth."""
    cameras: Any = source(data, "test").cameras  # type: ignore[attr-defined]
    h, w = cameras.size
    truth = [Image.fromarray((v * 255).round().astype(np.uint8)) for v in cameras.image[:6]]
    with torch.inference_mode():
        seen = [model.system.render_view(*(torch.from_numpy(r) for r in cameras.rays(v))) for v in range(len(truth))]
    picture = [Image.fromarray((x.view(h, w, 3).clamp(0, 1) * 255).round().byte().numpy()) for x in seen]
    error = [f"PSNR {-10 * np.log10(np.mean((np.asarray(a) / 255.0 - np.asarray(b) / 255.0) ** 2)):.1f} dB"
             for a, b in zip(picture, truth, strict=True)]
    return [Row("views not trained on", truth), Row("rendered", picture, error)]


KINDS: dict[str, Callable[[Any, str], list[Row]]] = {
    "beit": hidden_codes, "cae": hidden_codes, "maskfeat": edges_named, "videomae": clip_again, "mae_st": clip_again, "controlnet": steered,
    "textual_inversion": new_word, "imagebind": heard, "clip_frame_aggregation": clips_searched, "vlmo": neighbours,
    "vl_beit": neighbours, "beit_3": neighbours}
BY_CAPABILITY: dict[str, Callable[[Any, str], list[Row]]] = {
    "render_view": views, "detect": boxed, "segment": outlined, "attend": looks, "generate_image": drawn, "reconstruct": again,
    "sample_image": drawn, "generate_text": told, "encode_text": searched, "classify": classified, "encode_image": neighbours}


def rows_of(model: Any, data: str) -> list[Row]:
    kind = KINDS.get(model.id) or next((f for k, f in BY_CAPABILITY.items() if model.can(k)), None)
    if kind is None:
        raise SystemExit(f"{model.id}: no kind of picture fits what it can do")
    return (learned_alone if card_of(model.id).family == "selfsup" else kind)(model, data)


# -- paper --------------------------------------------------------------------------------------------------------------------------------

def large(picture: Any, side: int = 2 * SIDE) -> Picture:
    return decode(picture).resize((side, side), Image.Resampling.NEAREST)


def sheet(rows: Sequence[Row], foot: str) -> Picture:
    """Rows of pictures with their words, and a line below."""
    font, small = ImageFont.load_default(14), ImageFont.load_default(11)
    wrap = lambda text, width: textwrap.wrap(text, width)
    heights = [row.side + GAP + max([13 * len(wrap(u, 19)) for u in row.under], default=0) for row in rows]
    out = Image.new("RGB", (WIDE, sum(heights) + 2 * GAP + 18 * len(wrap(foot, 140))), "white")
    pen, y = ImageDraw.Draw(out), GAP
    for row, height in zip(rows, heights, strict=True):
        for i, line in enumerate(wrap(row.says, 19)):
            pen.text((GAP, y + 30 + 17 * i), line, INK, font)
        for i, picture in enumerate(row.pictures):
            x = LEFT + i * (row.side + GAP)
            out.paste(decode(picture).resize((row.side, row.side), Image.Resampling.BICUBIC), (x, y))
            for k, line in enumerate(wrap(row.under[i], 19) if i < len(row.under) else ()):
                pen.text((x, y + row.side + 1 + 13 * k), line, PALE, small)
        y += height
    for i, line in enumerate(wrap(foot, 140)):
        pen.text((GAP, y + 4 + 16 * i), line, PALE, small)
    return out


def transcript(lines: Sequence[tuple[str, str]], pictures: Sequence[Any], foot: str) -> Picture:
    """A log: kinds at the left, what was said beside them, pictures above."""
    font, y = ImageFont.load_default(13), SIDE + 3 * GAP
    wrapped = [(kind, line if not i else "   " + line) for kind, text in lines
               for i, line in enumerate([w for part in text.split("\n") for w in textwrap.wrap(part, 100) or [""]])]
    out = Image.new("RGB", (WIDE, y + 17 * (len(wrapped) + 2)), "white")
    pen, x = ImageDraw.Draw(out), GAP
    for picture in map(decode, pictures):
        picture.thumbnail((3 * SIDE, SIDE))
        out.paste(picture, (x, GAP))
        x += picture.width + GAP
    for kind, text in wrapped:
        pen.text((GAP, y), kind if not text.startswith("   ") else "", PALE, font)
        pen.text((LEFT - 40, y), text, INK, font)
        y += 17
    pen.text((GAP, y + 8), foot, PALE, ImageFont.load_default(11))
    return out


def agent_log() -> Picture:
    """MM-ReAct at work on two drawn receipts."""
    from polysense.proofs.mm_react import Balls, puzzles

    with tempfile.TemporaryDirectory() as place:
        puzzle = puzzles(0, Path(place))[0]
        agent = preset_of("mm_react").config.build().seat("detector", Balls())
        agent.ask(puzzle.question, puzzle.paths)
        plain = lambda text: re.sub(rf"{re.escape(place)}/", "", text)
        lines = [(e.kind, plain(e.text if len(e.text) < 420 else e.text[:400] + " ...")) for e in agent.log]
        return transcript(lines, [Image.open(p).convert("RGB") for p in puzzle.paths], f"mm_react tiny: rules plan, tesseract reads; "
                          f"{len(agent.log)} entries of its log; the true total is {puzzle.answer}")


def save(picture: Picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for colours in (256, 128, 64):
        picture.quantize(colours, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= 150_000:
            break
    print(f"{path}: {path.stat().st_size // 1000} kB", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("ids", nargs="+")
    ask.add_argument("--seconds", type=float, default=60.0, help="of training, each")
    ask.add_argument("--batch", type=int, default=32, help="largest batch: more steps in the time")
    ask.add_argument("--runs", type=Path, default=Path("runs/pictures"), help="where runs are kept")
    ask.add_argument("--run", type=Path, help="a run that is there")
    ask.add_argument("--out", type=Path, default=OUT)
    said = ask.parse_args(words)
    os.environ["POLYSENSE_CACHE"] = str(said.runs / "stands-on")
    for id in said.ids:
        if id == "mm_react":
            save(agent_log(), said.out / f"{id}.png")
            continue
        run = said.run or learn(id, said.runs / id, said.seconds, said.batch)
        model = polysense.open(run)
        save(sheet(rows_of(model, model.preset.data), trained_how(run)), said.out / f"{id}.png")


if __name__ == "__main__":
    main()
