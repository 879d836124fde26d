"""The sets that have a name: where their files lie under the data folder, what they offer, and how a sample of each reads."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polysense.base.errors import UserError
from polysense.data.sources import ListSource, Sample, Source, held_out, offered

Make = Callable[[str, str, Path, "Named", dict[str, str]], Source]


@dataclass(frozen=True)
class Named:
    """One set: `splits` maps a split to its files; {} means that the set has none of its own, so a tenth is held out by a hash."""
    says: str
    kind: str
    offers: tuple[str, ...]
    make: Make
    splits: dict[str, tuple[str, ...]]
    folder: str = ""
    classes: tuple[str, ...] = ()
    largest: int | None = None
    rate: int | None = None
    files: tuple[str, ...] = ()                         # of a set without splits
    annotate: Callable[[Any], Sample] = lambda record: {}


def data_root(root: str | Path | None = None) -> Path:
    """The folder of the named sets: `root`, else $POLYSENSE_DATA, else polysense/data in the user's cache folder."""
    if root or os.environ.get("POLYSENSE_DATA"):
        return Path(root or os.environ["POLYSENSE_DATA"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "polysense" / "data"


def split_of(name: str, split: str, splits: tuple[str, ...]) -> str:
    """The split of a set that is meant: "val", "dev" and "test" stand for each other where the set has only one of them."""
    if split in splits:
        return split
    others = [s for s in splits if s != "train"]
    if split in ("val", "dev", "test") and len(others) == 1:
        return others[0]
    raise UserError(f"{name} has no split {split!r}", f"it has {', '.join(splits)}")


def named_source(name: str, split: str, root: str | Path | None, options: dict[str, str]) -> Source:
    """The named set, opened; UserError says where its files should lie when they are missing."""
    entry, place = NAMED[name], data_root(root)
    folder = place / (entry.folder or name)
    chosen = split_of(name, split, tuple(entry.splits)) if entry.splits else split
    missing = [f for f in (entry.splits.get(chosen, ()) if entry.splits else entry.files) if not (folder / f).exists()]
    if missing:
        raise UserError(f"the set {name!r} is not on this machine ({folder / missing[0]} is missing)",
                        f"put its folder into {place}, or set POLYSENSE_DATA to the folder that holds it")
    source = entry.make(name, chosen, folder, entry, options)
    return source if entry.splits else held_out(source, split)


# How each layout is opened. All reader imports happen here, so that the table below costs nothing to list.

def _tar(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    from polysense.data.readers import TarSource

    paths = [folder / f for f in (e.splits[split] if e.splits else e.files)]
    return TarSource(name, paths, e.offers, e.annotate, split=split, classes=e.classes, largest=e.largest, rate=e.rate)


def _tar_by_fold(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    from polysense.data.sources import Subset

    source = _tar(name, split, folder, e, options)
    return Subset(source, [i for i in range(len(source)) if (source.about(i)["fold"] == 4) == (split == "val")])


def _named_tar(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    """Tars whose members are called WNID_class.jpg: the classes are those of the files."""
    source = _tar(name, split, folder, e, options)
    keys = sorted(r.key for r in source.records)  # type: ignore[attr-defined]
    number = {key: i for i, key in enumerate(keys)}
    source.classes = tuple(key.partition("_")[2].replace("_", " ") for key in keys)
    source.annotate = lambda r: {"label": number[r.key]}  # type: ignore[attr-defined]
    return source


def _grocery(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    from polysense.data.readers import read_json

    kinds = read_json(folder / "classes.json")
    source = _tar(name, split, folder, e, options)
    source.classes = tuple(k["name"].replace("-", " ") for k in kinds)

    def annotate(record: Any) -> Sample:
        kind = kinds[int(record.key[:2])]
        return {"label": kind["id"], "captions": [f"a photo of {kind['name'].replace('-', ' ')}", kind["description"]]}

    source.annotate = annotate  # type: ignore[attr-defined]
    return source


def _segmented(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    from polysense.data.readers import SegmentedTar

    return SegmentedTar(name, [folder / f for f in e.splits[split]], e.offers, e.annotate, split=split, classes=e.classes, largest=e.largest)


def _npz(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    import numpy as np

    from polysense.data.readers import NpzSource

    with np.load(folder / e.splits[split][0]) as d:
        if f"x_{split}" in d:
            return NpzSource(name, d[f"y_{split}"], d["names"], split=split, images=d[f"x_{split}"], largest=e.largest)
        boxes = None
        if f"{split}_boxes_xyxy" in d:
            corners = d[f"{split}_boxes_xyxy"].astype(np.float32) + np.asarray([0, 0, 1, 1], np.float32)     # inclusive pixel corners
            boxes = (corners / np.float32(64)).clip(0, 1)
        return NpzSource(name, d[f"{split}_labels"], d["names"], split=split, data=d[f"{split}_bytes"], offsets=d[f"{split}_offsets"], boxes=boxes,
                         largest=e.largest)


def _views(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    from polysense.data.rays import npz_views

    return npz_views(name, split, folder / e.splits[split][0])


def _coco(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    from polysense.data.readers import CocoSource, Files

    *annotations, pictures = e.splits[split] if e.splits else e.files
    only = [k for k in options.get("only", "").split(",") if k]
    return CocoSource(name, [folder / a for a in annotations], Files(folder / pictures), split=split, only=only, largest=e.largest)


def _questions(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    from polysense.data.readers import Files, QuestionSource, read_lines

    rows, notes = read_lines(folder / e.splits[split][0])
    source = QuestionSource(name, rows, Files(folder / e.splits[split][1]), split=split, largest=e.largest)
    source.notes = notes
    return source


def _triples(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    from polysense.data.clips import read_sound
    from polysense.data.readers import read_json

    class Triples(ListSource):
        def _load(self, i: int, key: str) -> Any:
            return read_sound((folder / self.samples[i]["audio"]).read_bytes(), self.rate) if key == "audio" else super()._load(i, key)

    rows = [{"id": r["key"], "image": folder / r["image"], "audio": r["audio"], "captions": [r["text"]]}
            for r in read_json(folder / "index.json") if "image" in r]
    return Triples(name, rows, e.offers, largest=e.largest, rate=e.rate)


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_SAYINGS = ("a handwritten digit {}", "a picture of the number {}", "the digit {} written by hand", "{}", "somebody wrote a {}")


def _digits(name: str, split: str, folder: Path, e: Named, options: dict[str, str]) -> Source:
    """scikit-learn's 1,797 digits of 8x8 pixels; every fifth is the test part."""
    import numpy as np
    from sklearn.datasets import load_digits

    plain: Any = load_digits()
    images = np.repeat((plain.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
    samples = [{"id": f"digit_{i:04d}", "image": images[i], "label": int(t), "captions": [s.format(DIGITS[t]) for s in DIGIT_SAYINGS]}
               for i, t in enumerate(plain.target) if (i % 5 == 4) == (split == "test")]
    return ListSource(name, samples, e.offers, split=split, classes=DIGITS, largest=8)


# What the files say about a sample.

def _captions(record: Any) -> Sample:
    return {"captions": record.json()["captions"]}


UCM = ("agricultural", "airplane", "baseball diamond", "beach", "buildings", "chaparral", "dense residential", "forest", "freeway", "golf course",
       "harbor", "intersection", "medium residential", "mobile home park", "overpass", "parking lot", "river", "runway", "sparse residential",
       "storage tanks", "tennis court")


def _ucm(record: Any) -> Sample:
    m = record.json()
    return {"captions": m["captions"], "label": m["group"]}


PRODUCTS = (
    "Accessory Gift Set", "Backpacks", "Bangle", "Belts", "Bracelet", "Capris", "Caps", "Casual Shoes", "Clutches", "Cufflinks", "Dresses",
    "Duffel Bag", "Dupatta", "Earrings", "Flats", "Flip Flops", "Formal Shoes", "Handbags", "Heels", "Jackets", "Jeans", "Kurta Sets", "Kurtas",
    "Kurtis", "Laptop Bag", "Leggings", "Necklace and Chains", "Pendant", "Ring", "Sandals", "Sarees", "Scarves", "Shirts", "Shorts", "Skirts",
    "Socks", "Sports Sandals", "Sports Shoes", "Stoles", "Sunglasses", "Sweaters", "Sweatshirts", "Ties", "Tops", "Track Pants", "Trousers",
    "Tunics", "Wallets", "Watches")


def _product(record: Any) -> Sample:
    """The shop's title first, then sentences made of the attributes; words that are missing are left out."""
    m = record.json()
    colour, usage, kind, who = m["colour"].lower(), m["usage"].lower(), m["type"].lower(), m["gender"].lower()
    words = " ".join(w for w in (colour, usage, kind) if w)
    captions = [m["title"], f"{words} for {who}", f"a photo of {' '.join(w for w in (colour, kind) if w)}"]
    if m["season"]:
        captions.append(f"{m['title']}, {' '.join(w for w in (colour, kind) if w)} for {m['season'].lower()}")
    about: Sample = {"captions": captions, "attributes": {k: m[k] for k in ("gender", "category", "subcategory", "colour", "season", "usage")}}
    return about | ({"label": PRODUCTS.index(m["type"])} if m["type"] in PRODUCTS else {"label": -1})


def _emoji(record: Any) -> Sample:
    m = record.json()
    return {"captions": [*m["captions"], *([f"{m['captions'][0]}: {', '.join(m['tags'])}"] if m["tags"] else [])], "keywords": m["tags"]}


def _labelled(record: Any) -> Sample:
    m = record.json()
    return {"label": m["label_id"], "captions": [m["label"]], "fold": m.get("fold")}


def _spoken(record: Any) -> Sample:
    digit = int(record.key[0])
    return {"label": digit, "captions": [DIGITS[digit]], "speaker": record.key.split("_")[1]}


def _clip(record: Any) -> Sample:
    m = record.json()
    said = m["captions"] or [m.get("transcript") or m.get("label") or "a video"]
    return {"captions": said, "qa": [(q["question"], q["answer"]) for q in m.get("qa", ())]}


def _statement(record: Any) -> Sample:
    m = record.json()
    return {"question": m["statement"], "answer": str(m["label"]).lower(), "label": int(m["label"])}


def _parts(*names: str, ending: str) -> dict[str, tuple[str, ...]]:
    return {n: (n + ending,) for n in names}


NAMED: dict[str, Named] = {
    "digits": Named("handwritten digits of scikit-learn, 8x8 pixels", "picture, label, caption", ("image", "text", "label"), _digits,
                    {"train": (), "test": ()}, classes=DIGITS),
    "natural_captions": Named("photographs with human sentences (COCO, Flickr8k)", "picture, captions", ("image", "text"), _tar,
                              _parts("train", "dev", ending=".tar.gz"), annotate=_captions),
    "ucm_captions": Named("aerial photographs with five sentences", "picture, captions, label", ("image", "text", "label"), _tar,
                          _parts("train", "val", ending=".tar.gz"), classes=UCM, largest=112, annotate=_ucm),
    "fashion_products": Named("shop photographs with titles and attributes", "picture, captions, label", ("image", "text", "label"), _tar,
                              _parts("train", "dev", ending=".tar.gz"), classes=PRODUCTS, largest=80, annotate=_product),
    "emoji": Named("emoji with names and keywords", "picture, captions", ("image", "text"), _tar, _parts("train", "dev", ending=".tar.gz"),
                   largest=136, annotate=_emoji),
    "grocery_store": Named("groceries in shops, with written descriptions of the kinds", "picture, captions, label", ("image", "text", "label"),
                           _grocery, {"train": ("train.tar.gz",), "val": ("val.tar.gz",), "test": ("test_public.tar.gz",)}),
    "mnist": Named("handwritten digits, 28x28 pixels", "picture, label", ("image", "label"), _npz,
                   {"train": ("mnist.npz",), "test": ("mnist.npz",)}, largest=28),
    "cifar10": Named("small photographs of ten kinds", "picture, label", ("image", "label"), _npz,
                     {"train": ("cifar10_jpeg.npz",), "test": ("cifar10_jpeg.npz",)}, largest=32),
    "tiny_imagenet40": Named("small photographs of 40 kinds, with a box", "picture, label, box", ("image", "label", "boxes", "box_label"), _npz,
                             {"train": ("tiny_imagenet40_jpeg.npz",), "test": ("tiny_imagenet40_jpeg.npz",)}, largest=64),
    "imagenet_samples": Named("one photograph for each ImageNet class", "picture, label", ("image", "label"), _named_tar, {}, files=("images.tar",)),
    "coco_mini": Named("photographs with boxes; ?only=mask or ?only=text for those with masks or captions", "picture, boxes, masks, captions",
                       ("image", "boxes", "box_label", "tags"), _coco, {}, files=("instances.json", "captions.json", "images.tar")),
    "bccd": Named("blood cells under a microscope", "picture, boxes", ("image", "boxes", "box_label", "tags"), _coco,
                  {"train": ("train.json", "train_images.tar"), "val": ("val.json", "val_images.tar")}, largest=320),
    "camvid": Named("road scenes with a class for every pixel", "picture, masks", ("image", "mask", "boxes", "box_label"), _segmented,
                    _parts("train", "val", ending=".tar"), largest=256,
                    classes=("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")),
    "daquar": Named("questions about photographs of rooms", "picture, question, answer", ("image", "question", "answer"), _questions,
                    {"train": ("train.jsonl", "train_images.tar"), "test": ("test_public.jsonl", "test_public_images.tar")}),
    "nerf_lego100": Named("the lego scene of NeRF from 100 places, 100 pixels", "views", ("origin", "direction", "rgb"), _views,
                          {"train": ("lego100.npz",), "test": ("lego100.npz",)}),
    "nlvr": Named("statements about drawn shapes, true or false", "picture, question, label", ("image", "question", "answer", "label"), _tar,
                  _parts("train", "dev", ending=".tar.gz"), classes=("false", "true"), largest=400, annotate=_statement),
    "fsdd": Named("spoken digits, 8 kHz", "sound, label", ("audio", "text", "label"), _tar, _parts("train", "test", ending=".tar"), classes=DIGITS,
                  rate=8000, annotate=_spoken),
    "esc10": Named("sounds of the surroundings, 16 kHz; fold 4 is held out", "sound, label", ("audio", "text", "label"), _tar_by_fold,
                   {"train": ("folds1-4.tar",), "val": ("folds1-4.tar",)}, rate=16000, annotate=_labelled,
                   classes=("dog bark", "rain", "sea waves", "baby cry", "clock tick", "person sneeze", "helicopter", "chainsaw", "rooster",
                            "fire crackling")),
    "trimodal_demo": Named("three pictures with sound and caption", "picture, sound, caption", ("image", "audio", "text"), _triples,
                           {"train": ("index.json",)}, rate=16000),
    "surveillance_action": Named("clips of fixed cameras: fight or not", "video, label", ("video", "text", "label"), _tar,
                                 _parts("train", "val", ending=".tar"), classes=("no fight", "fight"), annotate=_labelled),
    "video_clips": Named("short clips with sentences, questions, transcripts", "video, captions", ("video", "text"), _tar, {}, files=("clips.tar",),
                         annotate=_clip),
}


def offers_of(name: str) -> tuple[str, ...]:
    """What a named set offers, without opening it."""
    return offered(NAMED[name].offers)
