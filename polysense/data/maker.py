"""One batch from its number: reading samples, keeping the pictures that were read, and putting tensors together.

Everything here is a pure function of (source, feed, seed, step), so any process may make any batch and gets the same bits.
"""
from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polysense.base.batch import VOCABULARY, Batch
from polysense.base.errors import UserError
from polysense.base.plan import (
    ChatPlan,
    ClipPlan,
    CropFeed,
    DropoutPlan,
    EpisodePlan,
    Feed,
    ImagePlan,
    MirrorPlan,
    PackPlan,
    PairPlan,
    VideoPlan,
    ViewPlan,
)
from polysense.data import clips, images, views
from polysense.data.bpe_dropout import Splitter
from polysense.data.chat import Chat, episodes
from polysense.data.eda import eda
from polysense.data.outline import outlines
from polysense.data.sentences import Sentences
from polysense.data.sources import BadSample, Sample, Source, name_of

LEFT = 0.1                                              # share of a box that a crop must leave for it to count as in view
BESIDE = {"mask", "depth", "hint", "edited"}            # what lies over a picture pixel by pixel
# keys made through a picture's geometry
PIXELS = ("image", "images", "views", "crops", "mask", "depth", "hint", "edited", "boxes", "box_label", "polygon", "keypoints")
PAIR = {"segment", "follows"}                           # what is known of two sentences in one text: as a PairPlan says
TALK = {"chat", "chat_reply", "brief", "brief_reply"}   # conversations: made of questions and captions as a ChatPlan says
EPISODE = {"episode", "images"}                         # several samples in one: as an EpisodePlan says
MADE_OF = {"segment": "text", "follows": "text",
           "crops": "views", "chat": "question", "chat_reply": "question", "brief": "text", "brief_reply": "text", "episode": "text",
           "images": "image", "retold": "text", "word": "text", "names": "label"}
TEXTS = {*PAIR, "text", "text_mask", "retold", "word", "names", "question", "answer", "episode"} | TALK                    # what takes a tokenizer
FILM = 1000                                             # the number of the view that clips are, apart from those of pictures
RECENT = 64                                             # batches whose ids are kept for `names`


Read = tuple[int, Sample, dict[str, np.ndarray]]        # position, what is known, decoded arrays


@dataclass
class Made:
    """A batch with what the loader tells about it: ids of its samples, samples left out, and the position after it."""
    batch: Batch
    ids: list[str]
    skipped: list[tuple[str, str]]
    seen: int                                           # samples drawn for it, and how many of them could not be read
    bad: int
    after: dict[str, Any] = field(default_factory=dict)


def makeable(feed: Feed, train: bool) -> set[str]:
    """The batch keys that a feed says how to make."""
    picture = (feed.image or (feed.train_image if train else None)) is not None
    texts = {"text", "text_mask", "retold", "word", "names", "question", "answer"} | (TALK if isinstance(feed.text, ChatPlan) else set())
    geometry, moving = {"image", "boxes", "box_label", "polygon", "keypoints", "mask", "depth", "hint", "edited"}, {"video", "video_mask"}
    return ({k for k in VOCABULARY if k not in PAIR | TALK | EPISODE | texts | geometry | moving | {"views", "crops"}}
            | (geometry if picture else set())
            | (moving if picture or (feed.video and feed.video.image) else set()) | (texts if feed.text else set())
            | (EPISODE if picture and isinstance(feed.text, EpisodePlan) else set()) | (PAIR if isinstance(feed.text, PairPlan) else set())
            | ({"views"} if feed.views else set()) | ({"crops"} if crops_of(feed) else set()))


def crops_of(feed: Feed) -> tuple[ViewPlan, ...]:
    """The small views of a multi-crop feed."""
    return feed.crops if isinstance(feed, CropFeed) else ()


def check_needs(needs: Iterable[str], offers: Iterable[str], feed: Feed | None = None, name: str = "the data", train: bool = True) -> tuple[str, ...]:
    """The batch keys to make so that `needs` is met; of alternatives "a|b" the first that can be had.

    Raises UserError naming the sources that do offer what is missing, or the part of the feed that says nothing about it.
    """
    offers, can, chosen = tuple(offers), makeable(feed, train) if feed else set(VOCABULARY), []
    for need in needs:
        options = need.split("|")
        held = [k for k in options if MADE_OF.get(k, k) in offers or k == "index"]
        if not held:
            raise UserError(f"{name} offers no {' or '.join(options)} (only {', '.join(k for k in offers if k != 'index')})", _who_offers(options))
        ready = [k for k in held if k in can]
        if not ready:
            raise UserError(f"the preset's feed does not say how to read {' or '.join(held)}", "give it an image, views or text plan")
        chosen.append(ready[0])
    return tuple(dict.fromkeys(chosen))


def _who_offers(options: Sequence[str]) -> str:
    from polysense.data import list_sources

    found = [s.name for s in list_sources() if any(k in s.offers for k in options)]
    return f"sources that do: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}" if found else "no named source does: bring your own"


class Maker:
    """Makes batch number `step` of a source: `make(step)` for sources with a length, `assemble` for samples already read."""

    def __init__(self, source: Any, feed: Feed, tokenizer: Any, keys: Sequence[str], *, batch_size: int, seed: int, train: bool, rank: int,
                 world: int, cache_bytes: int):
        self.source, self.feed, self.tokenizer, self.asked = source, feed, tokenizer, tuple(keys)
        alone = bool(BESIDE & set(keys)) and "image" not in keys             # a map is cut as its picture is, wanted or not
        self.keys = (*self.asked, "image") if alone else self.asked
        self.batch_size, self.seed, self.train, self.rank, self.world = batch_size, seed, train, rank, world
        self.cache_bytes = cache_bytes
        self.exact = feed.image if feed.image and not (train and feed.train_image) else None
        self.view = feed.train_image if train else None
        self.clip = feed.video or VideoPlan()
        alive = train and isinstance(self.clip, ClipPlan) and bool({"video", "video_mask"} & set(keys))
        self.film, self.repeat = (self.clip.view, self.clip.repeat) if alive and isinstance(self.clip, ClipPlan) else (None, 1)
        self.samples = clips.samples_of(feed.audio, train)
        self.plans = [p for p, key in ([(self.view, "image")] if self.view else []) + [(v, "views") for v in feed.views] + [
            (v, "crops") for v in crops_of(feed)] if key in keys]
        self.work = views.working_side(self.plans) if self.plans else 0
        largest = getattr(source, "largest", None)
        self.canvas = min(views.canvas_side(self.work), -(-largest // 8) * 8) if self.plans and largest else views.canvas_side(self.work)
        self.reads = self._reads()
        self.names = self._names() if "names" in self.keys else torch.empty(0)
        self.split = Splitter(tokenizer, feed.text.dropout) if train and tokenizer and isinstance(feed.text, DropoutPlan) else None
        told = isinstance(feed.text, PairPlan | PackPlan) and {"text", "text_mask", *PAIR}.intersection(self.keys)
        self.sentences = Sentences(feed.text, tokenizer, source) if told else None
        self._start()

    def _names(self) -> Tensor:
        """Token ids [1,C,L] of the names of all classes, each put as the feed says."""
        if not getattr(self.source, "classes", ()):
            raise UserError(f"{self.source.name} has labels without names", "take data whose classes have names")
        template = getattr(self.feed.text, "template", "{}")
        return self.tokenizer([template.replace("{}", c.replace("_", " ")) for c in self.source.classes])[None]

    def _start(self) -> None:
        self._kept: dict[int, tuple[Sample, dict[str, np.ndarray]]] = {}
        self._bytes, self._lock, self._pool = 0, threading.Lock(), None
        self._orders: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_kept", "_bytes", "_lock", "_pool", "_orders")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()

    def _reads(self) -> tuple[str, ...]:
        """Which decoded keys of a sample the batch keys ask for."""
        reads = [k for k in ("edited", "hint", "depth", "mask", "audio", "video") if k in self.keys or (k == "video" and "video_mask" in self.keys)
                 or (k == "mask" and "polygon" in self.keys)]
        return (*(["image"] if any(k in self.keys for k in PIXELS) else []), *reads)

    def bytes_a_sample(self) -> int:
        """About what one sample takes in memory once read."""
        exact = 3 * self.exact.size ** 2 if self.exact and {"image", "images"} & set(self.keys) else 0
        exact += 3 * self._frame_plan().size ** 2 * (64 if self.clip.sample != "uniform" else self.clip.frames) if "video" in self.reads else 0
        return exact + (3 * min(self.work * self.work * 4 // 3, self.canvas ** 2) if self.plans else 0) + 512

    # One sample: read, shrunk to what the views need, kept while there is room.

    def sample(self, i: int) -> tuple[Sample, dict[str, np.ndarray]]:
        """(what is known about sample i, its arrays ready to be put together). Raises BadSample."""
        if i in self._kept:
            return self._kept[i]
        if isinstance(self.source, Source):
            made = self.ready(self.source.about(i), lambda key: self.source.load(i, key))
        else:
            whole = self.source[i]
            made = self.ready({k: v for k, v in whole.items() if k not in self.reads}, lambda key: _held(whole, key))
        size = sum(a.nbytes for a in made[1].values()) + 512
        with self._lock:
            if self._bytes + size <= self.cache_bytes and i not in self._kept:
                self._kept[i] = made
                self._bytes += size
        return made

    def ready(self, about: Sample, load: Callable[[str], Any]) -> tuple[Sample, dict[str, np.ndarray]]:
        """Decodes what the batch keys ask for and shrinks it, so that it is small to keep and quick to use."""
        out: dict[str, np.ndarray] = {}
        reduce = images.AT_LEAST.set(2 * self.work if self.plans and not (self.exact and {"image", "images"} & set(self.keys)) else None)
        try:
            for key in self.reads:
                thing = load(key)
                if key == "audio":
                    rate, to = getattr(self.source, "rate", None), self.feed.audio and self.feed.audio.rate
                    out[key] = clips.resampled(np.asarray(thing, np.float32), rate, to) if rate and to else np.asarray(thing, np.float32)
                elif key == "video":
                    # A window that moves from epoch to epoch is cut when the batch is made, so all frames are kept for it.
                    moves = self.train and self.clip.sample == "stride"
                    frames = thing if moves else np.asarray(thing)[clips.picked(len(thing), self.clip)]
                    out[key] = np.stack([images.pixels(images.fit(images.decode(f), self._frame_plan())) for f in frames])
                elif key == "mask":
                    self._keep(out, key, np.asarray(thing).astype(bool))
                elif key == "depth":
                    self._keep(out, key, Image.fromarray(np.asarray(thing, np.float32).squeeze()))
                else:
                    picture = images.decode(thing)
                    about = about | {"size": picture.size} if key == "image" else about
                    self._keep(out, key, picture)
        except images.BadPicture as error:
            raise BadSample(about["id"], error.advice or error.what) from error
        finally:
            images.AT_LEAST.reset(reduce)
        return about, out

    def _frame_plan(self) -> ImagePlan:
        plan = self.clip.image or self._plan()
        return plan.but(size=views.working_side([self.film])) if self.film else plan

    def _plan(self) -> ImagePlan:
        if self.feed.image:
            return self.feed.image
        assert self.feed.train_image is not None
        return ImagePlan(size=self.feed.train_image.size)

    def _keep(self, out: dict[str, np.ndarray], key: str, thing: Any) -> None:
        """Stores a picture-like thing read exactly (`key`) and at working size (`key` + "@work"), as the plans ask for."""
        size = (thing.shape[-1], thing.shape[-2]) if key == "mask" else thing.size
        how = "bilinear" if key == "depth" else None
        if self.exact and {"image", "images"} & set(self.keys):
            if key == "mask":
                x0, y0, x1, y1 = images.window(size, self.exact)
                out[key] = _nearest(thing, (x0 * size[0], y0 * size[1], x1 * size[0], y1 * size[1]), (self.exact.size, self.exact.size))
            else:
                out[key] = np.asarray(images.fit(thing, self.exact, how))
        if self.plans and (key == "image" or (self.view and "image" in self.keys)):
            small = views.working_size(size, self.work)
            if key == "mask":
                out[key + "@work"] = _nearest(thing, (0, 0, *size), small)
            else:
                shrunk = thing if size == small else thing.resize(small, images.RESAMPLE[how or "bicubic"])
                out[key + "@work"] = np.asarray(shrunk)

    # Which samples make up a batch.

    def order(self, epoch: int) -> np.ndarray:
        """The order of the samples in an epoch: a permutation seeded by (seed, epoch); outside training their own order."""
        if epoch not in self._orders:
            if len(self._orders) > 2:
                self._orders.pop(min(self._orders), None)
            n, rng = len(self.source), np.random.default_rng([self.seed, epoch])
            kinds = self.source.kinds() if self.train and isinstance(self.source, Source) else None
            own = getattr(self.source, "arrange", None)                               # a source may have an order of its own: weblike.Mixture
            self._orders[epoch] = (np.arange(n) if not self.train else own(rng) if own else rng.permutation(n) if kinds is None
                                   else grouped(kinds, self.batch_size, rng))
        return self._orders[epoch]

    def rows(self, step: int) -> np.ndarray:
        """Source positions of this rank's slice of batch `step`. In training the stream of epochs has no seams: batches cross borders."""
        n, local = len(self.source), self.batch_size // self.world
        first = step * self.batch_size + self.rank * local
        if not self.train:
            return np.arange(first, min(first + local, n))
        n, place = len(self.order(0)), np.arange(first, first + local) // self.repeat
        return np.asarray([self.order(int(p) // n)[int(p) % n] for p in place])

    def make(self, step: int) -> Made:
        """Batch number `step`, this rank's slice. In training an unreadable sample is replaced by the next good one of the source, else left out."""
        rows, skipped = self.rows(step), []
        once = list(dict.fromkeys(rows.tolist()))                                     # several clips of a video are cut from one reading
        read = dict(zip(once, self._read(once, skipped)))
        got = [read[i] for i in rows.tolist()]
        bad = sum(g is None for g in got)
        if self.train:
            for k, item in enumerate(got):
                if item is None:
                    got[k] = self._next_good(int(rows[k]), skipped)
        good = [g for g in got if g is not None]
        made = self.assemble(good, step, skipped, len(rows), bad)
        if EPISODE & set(self.keys) and good:
            made.batch |= self._episodes(good, step, skipped)
        return made

    def _episodes(self, got: list[Read], step: int, skipped: list[tuple[str, str]]) -> Batch:
        """Each sample as the last of an episode; the others are drawn by (seed, step, place in the global batch), outside training those before."""
        plan, n, local = self.feed.text, len(self.source), self.batch_size // self.world
        if not isinstance(plan, EpisodePlan) or self.exact is None:
            raise UserError("episodes are made as an EpisodePlan says, of pictures as feed.image says", "leave train_image out")
        rngs = [np.random.default_rng([self.seed, step, 3, self.rank * local + k]) if self.train else None for k in range(len(got))]
        flat = [int(rng.integers(n)) if rng else (i - 1 - j) % n for rng, (i, _, _) in zip(rngs, got) for j in range(plan.shots - 1)]
        read = iter([g if g is not None else self._next_good(i, skipped) for i, g in zip(flat, self._read(flat, skipped))])
        rows = [[*(next(read) for _ in range(plan.shots - 1)), one] for one in got]
        pictures = torch.from_numpy(np.stack([a["image"] for row in rows for _, _, a in row]))
        out = {"images": images.normalised(pictures, self.exact).unflatten(0, (len(rows), plan.shots)),
               "episode": episodes(plan, self.tokenizer, [[about for _, about, _ in row] for row in rows], rngs) if self.tokenizer else None}
        return {k: v for k, v in out.items() if k in self.keys and v is not None}

    def _read(self, rows: list[int], skipped: list[tuple[str, str]]) -> list[tuple[int, Sample, dict[str, np.ndarray]] | None]:
        def one(i: int) -> tuple[int, Sample, dict[str, np.ndarray]] | BadSample:
            try:
                return (i, *self._good(i))
            except BadSample as bad:
                return bad

        fresh = sum(i not in self._kept for i in rows)
        if fresh > 4 and torch.utils.data.get_worker_info() is None:
            self._pool = self._pool or ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="polysense-read")
            got = list(self._pool.map(one, rows))
        else:
            got = [one(i) for i in rows]
        skipped += [(g.id, g.reason) for g in got if isinstance(g, BadSample)]
        return [None if isinstance(g, BadSample) else g for g in got]

    def _good(self, i: int) -> tuple[Sample, dict[str, np.ndarray]]:
        """The sample, checked for what the batch needs of it."""
        about, arrays = self.sample(i)
        self.check(about)
        return about, arrays

    def check(self, about: Sample) -> None:
        """Raises BadSample where the sample lacks the captions, label or question that the batch needs."""
        captioned = {"text", "text_mask", "retold", "word", "brief", "brief_reply", "episode"}
        if captioned & set(self.keys) and not any(c.strip() for c in about.get("captions") or ()):
            raise BadSample(about["id"], "has no caption")
        if "label" in self.keys and about.get("label") is None:
            raise BadSample(about["id"], "has no label")
        if {"question", "answer", "chat", "chat_reply"} & set(self.keys) and not (about.get("chat") or about.get("qa") or "question" in about):
            raise BadSample(about["id"], "has no question")

    def _next_good(self, i: int, skipped: list[tuple[str, str]]) -> tuple[int, Sample, dict[str, np.ndarray]]:
        n = len(self.source)
        for j in ((i + k) % n for k in range(1, min(n, 1000))):
            got = self._read([j], skipped)[0]
            if got is not None:
                return got
        raise UserError(f"none of {min(n, 1000)} samples of {self.source.name} in a row can be read", f"the last: {': '.join(skipped[-1])}")

    # From samples to tensors.

    def assemble(self, got: list[tuple[int, Sample, dict[str, np.ndarray]]], step: int, skipped: list[tuple[str, str]], seen: int,
                 bad: int = 0) -> Made:
        """Tensors of the keys, for samples (position, about, arrays)."""
        abouts, arrays = [a for _, a, _ in got], [x for _, _, x in got]
        batch: Batch = {"index": torch.tensor([i for i, _, _ in got], dtype=torch.int64)}
        ids = [str(a["id"]) for a in abouts]
        if got:
            self._pictures(batch, abouts, arrays, step)
            self._words(batch, abouts, step)
            self._rest(batch, abouts, arrays)
            self._clips(batch, arrays, step)
        return Made({k: batch[k] for k in VOCABULARY if k in batch and (k in self.asked or k == "index")}, ids, skipped, seen, bad)

    def _part(self, step: int, view: int, n: int) -> views.Draw:
        local = self.batch_size // self.world
        return views.draw(self.seed, step, view, self.batch_size).part(self.rank * local, self.rank * local + n)

    def _pictures(self, batch: Batch, abouts: list[Sample], arrays: list[dict[str, np.ndarray]], step: int) -> None:
        if "image" not in self.reads:
            return
        plan, n, mirror = self._plan() if "image" in self.keys else None, len(arrays), torch.zeros(len(arrays), dtype=torch.bool)
        frame = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(n, 4)
        none = torch.empty(0)
        canvas, sizes = views.lay([a["image@work"] for a in arrays], self.canvas) if self.plans else (none, none)
        if self.view and plan:
            drawn = self._part(step, 0, n)
            picture, boxes, mirror = views.view(self.view, drawn, canvas, sizes)
            batch["image"] = images.normalised(picture, plan)
            frame = (boxes / torch.cat([sizes, sizes], 1)).float()
            for key in (k for k in ("mask", "depth", "hint", "edited") if k in self.reads):
                batch[key] = self._companion(key, self.view, drawn, [a[key + "@work"] for a in arrays], boxes, sizes, mirror, plan)
        elif plan:
            batch["image"] = images.normalised(torch.from_numpy(np.stack([a["image"] for a in arrays])), plan)
            frame = torch.tensor([images.window(a["size"], plan) for a in abouts])
            for key in (k for k in ("mask", "depth", "hint", "edited") if k in self.reads):
                held = [a[key] for a in arrays]
                batch[key] = (_padded([torch.from_numpy(m) for m in held], False) if key == "mask" else
                              torch.from_numpy(np.stack(held))[:, None] if key == "depth" else
                              images.normalised(torch.from_numpy(np.stack(held)), plan) if key == "edited" else
                              torch.from_numpy(np.stack(held)).permute(0, 3, 1, 2).float() / 255)
        first = 1
        for key, plans in (("views", self.feed.views), ("crops", crops_of(self.feed))):
            if key in self.keys:
                plan = self.feed.image or ImagePlan(size=plans[0].size)
                made = [views.view(p, self._part(step, first + k, n), canvas, sizes)[0] for k, p in enumerate(plans)]
                batch[key] = torch.stack([images.normalised(v, plan) for v in made], 1)
            first += len(plans)
        if "boxes" in self.keys or "box_label" in self.keys:
            batch["boxes"], batch["box_label"] = _framed(abouts, frame, mirror)
        if "polygon" in self.keys:
            batch["polygon"] = torch.from_numpy(outlines(batch["mask"].numpy()))
        if "keypoints" in self.keys:
            batch["keypoints"] = _placed(abouts, frame, mirror)

    def _companion(self, key: str, plan: ViewPlan, drawn: views.Draw, held: list[np.ndarray], boxes: Tensor, sizes: Tensor, mirror: Tensor,
                   normal: ImagePlan) -> Tensor:
        """What belongs to `image` pixel by pixel, through the same crop and mirror."""
        if key == "mask":
            most = max(len(m) for m in held)
            held = [np.pad(m, ((0, most - len(m)), (0, 0), (0, 0))).transpose(1, 2, 0).astype(np.uint8) * 255 for m in held]
            return views.cut(views.lay(held, self.canvas)[0], boxes, sizes, plan.size, mirror) > 0.5
        if key == "depth":
            held = [d.clip(0, 1)[..., None] for d in held]
        out = views.cut(views.lay(held, self.canvas)[0], boxes, sizes, plan.size, mirror).clamp_(0, 1)
        return images.normalised(views.colours(plan, drawn, out), normal) if key == "edited" else out

    def _words(self, batch: Batch, abouts: list[Sample], step: int) -> None:
        local = self.batch_size // self.world
        chance = np.random.default_rng([self.seed, step, 1]).random(self.batch_size)[self.rank * local:self.rank * local + len(abouts)]
        pick = lambda options, u: options[int(u * len(options)) if self.train else 0]
        if self.sentences is not None:
            rngs = [np.random.default_rng([self.seed, step, 5, self.rank * local + k]) for k in range(len(abouts))]
            batch |= self.sentences(batch["index"].tolist(), abouts, rngs)
        elif {"text", "text_mask", "retold", "word"} & set(self.keys):
            said = [pick([c for c in a["captions"] if c.strip()], u) for a, u in zip(abouts, chance)]
            if isinstance(self.feed.text, MirrorPlan) and self.view and self.train:
                mirror = views.flips(self.view, self._part(step, 0, len(said)).u).tolist()
                said = [swapped(t, self.feed.text.swaps) if m else t for t, m in zip(said, mirror)]
            if self.split is None:
                batch["text"], batch["text_mask"] = self.tokenizer.encode(said)
            else:
                batch["text"], batch["text_mask"] = self.split.encode(said, [
                    np.random.default_rng([self.seed, step, 3, self.rank * local + i]) for i in range(len(said))])
            if "retold" in self.keys:
                draws = [np.random.default_rng([self.seed, step, 4, self.rank * local + i]) for i in range(len(said))]
                batch["retold"] = self.tokenizer([eda(t, rng) for t, rng in zip(said, draws)])
        if "word" in self.keys:
            batch["word"] = self.tokenizer.words(batch["text"])
        if "names" in self.keys:
            batch["names"] = self.names.expand(len(abouts), -1, -1)
        if "question" in self.keys or "answer" in self.keys:
            asked = [pick(a.get("qa") or [(a["question"], a.get("answer", ""))], u) for a, u in zip(abouts, chance)]
            batch["question"], batch["answer"] = self.tokenizer([q for q, _ in asked]), self.tokenizer([str(a) for _, a in asked])
        if TALK & set(self.keys):
            chat = Chat(self.feed.text, self.tokenizer)
            draws = [np.random.default_rng([self.seed, step, 2, self.rank * local + i]) if self.train else None for i in range(len(abouts))]
            for key, make in (("chat", chat.of_questions), ("brief", chat.of_captions)):
                if {key, f"{key}_reply"} & set(self.keys):
                    batch[key], batch[f"{key}_reply"] = chat.batch([make(a, rng) for a, rng in zip(abouts, draws)])

    def _rest(self, batch: Batch, abouts: list[Sample], arrays: list[dict[str, np.ndarray]]) -> None:
        if "label" in self.keys:
            batch["label"] = torch.tensor([int(a["label"]) for a in abouts], dtype=torch.int64)
        if "has" in self.keys:
            batch["has"] = torch.tensor([a["has"] for a in abouts], dtype=torch.int64)
        if "tags" in self.keys:
            batch["tags"] = torch.zeros(len(abouts), len(self.source.tag_names))
            rows = [r for r, a in enumerate(abouts) for _ in a["tags"]]
            batch["tags"][rows, [t for a in abouts for t in a["tags"]]] = 1.0
        for key in ("regions", "thermal", "imu", "origin", "direction", "rgb"):
            if key in self.keys:
                batch[key] = _padded([torch.as_tensor(np.asarray(a[key], np.float32)) for a in abouts], 0.0)


    def _clips(self, batch: Batch, arrays: list[dict[str, np.ndarray]], step: int) -> None:
        """`audio` and `video`: in training, windows lie where (seed, step) says; outside, in the middle."""
        if not {"audio", "video"}.intersection(self.reads):
            return
        local = self.batch_size // self.world
        place = np.random.default_rng([self.seed, step, 2]).random(self.batch_size)[self.rank * local:self.rank * local + len(arrays)]
        at = place if self.train else np.full(len(arrays), 0.5)
        if "audio" in self.keys:
            batch["audio"] = _padded([torch.from_numpy(clips.cut(a["audio"], self.samples, u)) for a, u in zip(arrays, at)], 0.0)
        if "video" in self.reads:
            moves = self.train and self.clip.sample == "stride"
            films = [a["video"][clips.picked(len(a["video"]), self.clip, u)] if moves else a["video"] for a, u in zip(arrays, at)]
            flat = views.moving(self.film, self._part(step, FILM, len(films)), films) if self.film else torch.from_numpy(np.concatenate(films))
            flat = images.normalised(flat, self._frame_plan())
            batch["video"] = _padded(list(flat.split([len(f) for f in films])), 0.0)
            batch["video_mask"] = torch.arange(batch["video"].shape[1]) < torch.tensor([[len(f)] for f in films])


def swapped(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A text in which the two words of each pair have changed places, whole words in any case."""
    other = {a.lower(): b for one, two in pairs for a, b in ((one, two), (two, one))}

    def put(found: re.Match[str]) -> str:
        word, new = found[0], other[found[0].lower()]
        return new.upper() if word.isupper() else new.capitalize() if word[0].isupper() else new

    return re.sub(rf"\b({'|'.join(map(re.escape, other))})\b", put, text, flags=re.IGNORECASE) if other else text


def grouped(kinds: Sequence[int], size: int, rng: np.random.Generator) -> np.ndarray:
    """An order of samples in which every batch of `size` is of one kind (pictures with text, text alone), each sample at least once.

    The last batch of a kind is filled up with others of that kind; the batches come in random order (Liu et al. 2024, LLaVA-1.5, appendix).
    """
    batches: list[np.ndarray] = []
    for kind in sorted(set(kinds)):
        members = rng.permutation(np.flatnonzero(np.asarray(kinds) == kind))
        whole = -(-len(members) // size) * size
        batches += list(np.resize(members, whole).reshape(-1, size))
    return np.concatenate([batches[i] for i in rng.permutation(len(batches))])


def _held(whole: Sample, key: str) -> Any:
    if key not in whole:
        raise BadSample(str(whole.get("id")), f"has no {key}")
    return whole[key]


def _nearest(mask: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """mask [N,H,W], a box in its pixels -> the nearest pixels [N,h,w] of size (w, h); False beyond the picture."""
    x = np.floor(box[0] + (np.arange(size[0]) + 0.5) * (box[2] - box[0]) / size[0]).astype(int)
    y = np.floor(box[1] + (np.arange(size[1]) + 0.5) * (box[3] - box[1]) / size[1]).astype(int)
    there = ((y >= 0) & (y < mask.shape[1]))[:, None] & (x >= 0) & (x < mask.shape[2])             # no mask reaches into padding
    return mask[:, y.clip(0, mask.shape[1] - 1)[:, None], x.clip(0, mask.shape[2] - 1)] & there


def _padded(rows: list[Tensor], value: float | bool) -> Tensor:
    """Tensors of different first size, stacked, padded to the longest."""
    out = rows[0].new_full((len(rows), max(len(r) for r in rows), *rows[0].shape[1:]), value)
    for place, row in zip(out, rows):
        place[:len(row)] = row
    return out


def _framed(abouts: list[Sample], frame: Tensor, mirror: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [B,N,4] as they lie in the kept frame [B,4] of each picture, and their classes; what the crop cut away becomes -1."""
    boxes = _padded([torch.as_tensor(np.asarray(a["boxes"], np.float32)).reshape(-1, 4) for a in abouts], -1.0)
    kinds = _padded([torch.as_tensor(np.asarray(a.get("box_label", [0] * len(a["boxes"])), np.int64)) for a in abouts], -1)
    real = boxes[..., 2] > boxes[..., 0]
    low, extent = frame[:, None, :2].repeat(1, 1, 2), (frame[:, None, 2:] - frame[:, None, :2]).repeat(1, 1, 2)
    moved = (boxes - low) / extent
    moved = torch.where(mirror[:, None, None], torch.stack([1 - moved[..., 2], moved[..., 1], 1 - moved[..., 0], moved[..., 3]], -1), moved)
    seen = moved.clamp(0, 1)
    area = lambda b: (b[..., 2] - b[..., 0]).clamp(min=0) * (b[..., 3] - b[..., 1]).clamp(min=0)
    real &= (area(seen) >= LEFT * area(moved)) & (area(seen) > 0)
    return torch.where(real[..., None], seen, -1.0), torch.where(real, kinds, -1)


def _placed(abouts: list[Sample], frame: Tensor, mirror: Tensor) -> Tensor:
    """Key points [B,N,K,3] as they lie in the kept frame [B,4] of each picture; those that the crop cut away are hidden."""
    points = _padded([torch.as_tensor(np.asarray(a["keypoints"], np.float32)) for a in abouts], -1.0)
    place = (points[..., :2] - frame[:, None, None, :2]) / (frame[:, None, None, 2:] - frame[:, None, None, :2])
    place = torch.where(mirror[:, None, None, None], torch.stack([1 - place[..., 0], place[..., 1]], -1), place)
    seen = (points[..., 2] > 0) & ((place >= 0) & (place <= 1)).all(-1)
    return torch.where((points[..., 2:] >= 0), torch.cat([place.clamp(0, 1), seen[..., None].float()], -1), -1.0)


def recent_names(recent: deque[Made], source: Any, index: Tensor) -> list[str]:
    """Ids of the samples at these positions: from the source, or for streams from the batches handed out last."""
    if hasattr(source, "__len__"):
        return [name_of(source, int(i)) for i in index.flatten().tolist()]
    known = {int(i): name for made in recent for i, name in zip(made.batch["index"].tolist(), made.ids)}
    return [known.get(int(i), f"sample {int(i)} of the stream") for i in index.flatten().tolist()]
