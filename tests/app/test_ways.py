"""Sparse, late and fused search, with a system of colours: pictures and words have terms, patches and words."""
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import RGB, WORDS, feature, paint, pipeline, preset
from PIL import Image
from torch import Tensor

from polysense.app.index import NAME, open_index
from polysense.app.photos import Found
from polysense.app.search import search, write_results
from polysense.app.ways import Parts, fuse, prepare_ways, ranked
from polysense.base.errors import UserError
from polysense.base.system import Spec, System, final
from polysense.pipeline import Pipeline
from polysense.pipeline.words import encode_terms, encode_words, late_scores

TABLE = torch.tensor([(128, 128, 128), *RGB.values()]) / 255


@final
class Terms(System):
    """The share of each colour in a picture are its terms; patches and words are colours."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        grid: int = 4

    def __init__(self, c: Config):
        super().__init__()
        self.grid, self.scale, self.looked = c.grid, 20.0, 0
        self.gain = torch.nn.Parameter(torch.ones(()))

    def encode_image_terms(self, image: Tensor) -> Tensor:
        self.looked += len(image)
        near = (image.permute(0, 2, 3, 1)[..., None, :] - TABLE).abs().sum(-1).argmin(-1)
        share = F.one_hot(near, len(WORDS)).float().mean((1, 2))
        share[:, 0] = 0
        return torch.log1p(share * (share > 0.05))

    def encode_text_terms(self, text: Tensor) -> Tensor:
        counts = F.one_hot(text, len(WORDS)).float().sum(1)
        counts[:, 0] = 0
        return torch.log1p(counts)

    def encode_image(self, image: Tensor) -> Tensor:
        return feature(image.mean((2, 3)))

    def encode_text(self, text: Tensor) -> Tensor:
        return feature(TABLE[text].mean(1))

    def encode_patches(self, image: Tensor) -> Tensor:
        self.looked += len(image)
        return feature(F.adaptive_avg_pool2d(image, self.grid).permute(0, 2, 3, 1))

    def encode_words(self, text: Tensor) -> Tensor:
        return feature(TABLE[text]) * (text > 0)[..., None]


class Spoken:
    """Colour words and their places in a text."""

    def __call__(self, texts):
        ids = [[WORDS.index(w) for w in t.lower().split() if w in RGB] or [0] for t in texts]
        return torch.tensor([row + [0] * (max(map(len, ids)) - len(row)) for row in ids])

    def spans(self, text):
        at, out = 0, []
        for word in text.lower().split():
            at = text.lower().index(word, at)
            out += [(at, at + len(word))] if word in RGB else []
        return out

    def token(self, i):
        return WORDS[i]


@pytest.fixture
def asked(tmp_path):
    """(index, pipeline, photos): plain pictures, one half red half blue, and a grey one with two small patches of red and blue."""
    plan = preset(Terms.Config())
    eye, photos = Pipeline(plan.config.build(), plan, Spoken(), id="terms", source="terms", device="cpu"), tmp_path / "photos"
    for i, colour in enumerate(["red", "green", "blue", "yellow"]):
        paint(photos / f"{colour}.png", colour, salt=i)
    paint(photos / "purple.png", (128, 0, 128))
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16, 0], half[:, 16:, 2] = 255, 255
    Image.fromarray(half).save(photos / "half.png")
    spots = np.full((32, 32, 3), 128, np.uint8)
    spots[:8, :8], spots[24:, 24:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(spots).save(photos / "spots.png")
    with open_index(photos / NAME, eye) as index:
        index.update(photos, eye)
        yield index, eye, photos


def names(found):
    return [Path(f.path).stem for f in found]


def test_the_inverted_index_scores_as_the_dot_product_and_says_what_met(asked):
    index, eye, photos = asked
    found = ranked(index, eye, "red blue", 10, by="sparse")
    paths = [str(photos / f"{n}.png") for n in names(found)]
    dense = encode_terms(eye, images=paths) @ encode_terms(eye, texts=["red blue"])[0]
    np.testing.assert_allclose([f.score for f in found], dense, rtol=1e-5)
    assert names(found)[0] == "half" and set(names(found)) == {"half", "red", "blue", "spots"}, "green and yellow share no term"
    assert names(ranked(index, eye, "red blue", 1, by="sparse")) == ["half"]
    hit = search(index, eye, "red", 1, by="sparse")[0]
    (term, text, picture), = hit.terms
    assert term == "red" and text * picture == pytest.approx(hit.score, rel=1e-5) and hit.to_json()["terms"][0]["term"] == "red"
    assert ranked(index, eye, "nothing", 5, by="sparse") == []


def test_late_interaction_finds_small_things_that_the_mean_hides(asked):
    index, eye, photos = asked
    dense, late = names(ranked(index, eye, "red blue", 7)), ranked(index, eye, "red blue", 7, by="late")
    assert set(names(late)[:2]) == {"half", "spots"} and dense.index("spots") > dense.index("purple")
    words = encode_words(eye, "red blue")
    assert words.shape == (2, 4)
    with torch.no_grad():
        patches = eye.system.encode_patches(eye.read_images([photos / "spots.png"]))[0].reshape(-1, 4).numpy()
    slow = np.mean([max(float(p @ w) for p in patches) for w in words])
    assert {n: f.score for n, f in zip(names(late), late, strict=True)}["spots"] == pytest.approx(slow, abs=1e-3)
    assert late_scores(patches[None], words)[0] == pytest.approx(slow, abs=1e-6)
    hit = next(h for h in search(index, eye, "red blue", 2, by="late") if "spots" in h.path)
    assert hit.why is not None
    heat = {h.word: h.peak for h in hit.why.words}
    assert max(heat["red"]) < 0.5 < min(heat["blue"]), "each word glows where its best patch is"


def test_reciprocal_ranks_are_added(asked, tmp_path):
    a, b = [Found("x", 9.0), Found("y", 8.0)], [Found("y", 0.2), Found("z", 0.1)]
    assert [(f.path, f.score) for f in fuse([a, b])] == [("y", 1 / 62 + 1 / 61), ("x", 1 / 61), ("z", 1 / 62)]
    index, eye, _ = asked
    hits = search(index, eye, "red blue", 3, by="fused")
    assert hits[0].score <= 3 / 61 and Path(hits[0].path).stem == "half"
    assert "half.png" in write_results(hits, tmp_path / "a.html", "red blue").read_text()


def test_pictures_are_looked_at_once_and_follow_the_index(asked):
    index, eye, photos = asked
    assert prepare_ways(index, eye) == {"sparse": 7, "late": 7}
    before = eye.system.looked
    ranked(index, eye, "red", 3, by="sparse")
    ranked(index, eye, "red", 3, by="late")
    assert eye.system.looked == before
    (photos / "red.png").unlink()
    paint(photos / "green.png", "red", salt=9)
    index.update(photos, eye)
    assert names(ranked(index, eye, "red", 1, by="sparse")) == ["green"] and eye.system.looked == before + 1
    assert "red" not in names(ranked(index, eye, "red", 9, by="late"))
    with Parts_of(index, eye) as db:
        assert db.execute("select count(*) from pictures").fetchone() == (6,)
    eye.system.gain.data.fill_(2.0)                      # another model: what the old one saw is thrown away
    eye.__dict__.pop("digest")
    parts = Parts(index, eye)
    assert parts.db.execute("select count(*) from terms").fetchone() == (0,)
    parts.close()


def Parts_of(index, eye):
    return sqlite3.connect(index.folder / "parts.sqlite")


@pytest.fixture
def read_only(asked, tmp_path, monkeypatch):
    """The same index where nothing may be written into its folder; the cache is another folder."""
    index, eye, photos = asked
    monkeypatch.setenv("POLYSENSE_CACHE", str(tmp_path / "cache"))
    may = os.access
    monkeypatch.setattr("polysense.app.ways.os.access", lambda path, mode: not str(path).startswith(str(index.folder)) and may(path, mode))
    return index, eye, photos


def test_of_a_read_only_index_the_parts_lie_in_the_users_cache(read_only, tmp_path):
    index, eye, _ = read_only
    hit, = search(index, eye, "red", 1, by="sparse")
    assert [t for t, *_ in hit.terms] == ["red"], "what met is told as ever"
    assert not (index.folder / "parts.sqlite").exists() and len(list((tmp_path / "cache" / "parts").glob("*.sqlite"))) == 1
    before = eye.system.looked
    assert [h.path for h in search(index, eye, "red", 1, by="sparse", why=False)] == [hit.path]
    assert eye.system.looked == before, "no picture is looked at twice"


def test_parts_that_a_read_only_index_brings_are_taken_over(asked, tmp_path, monkeypatch, request):
    index, eye, _ = asked
    prepare_ways(index, eye)
    before = eye.system.looked
    request.getfixturevalue("read_only")
    assert search(index, eye, "red", 1, by="sparse", why=False)[0].terms and ranked(index, eye, "red blue", 3, by="late")
    assert eye.system.looked == before
    index.birth = "another"                              # an index that nobody can write and a cache that nobody can write
    monkeypatch.setattr("polysense.app.ways.os.access", lambda path, mode: False)
    assert search(index, eye, "red", 1, by="sparse", why=False)[0].terms, "in memory all the same"
    assert len(list((tmp_path / "cache" / "parts").glob("*.sqlite"))) == 1


def test_a_query_is_encoded_once_and_the_parts_are_opened_once(asked, monkeypatch):
    index, eye, _ = asked
    prepare_ways(index, eye)
    calls: list[str] = []
    for name in ("encode_text", "encode_text_terms", "encode_words"):
        encode = getattr(eye.system, name)
        monkeypatch.setattr(eye.system, name, lambda text, name=name, encode=encode: calls.append(name) or encode(text))
    opened: list[int] = []
    begin = Parts.__init__
    monkeypatch.setattr(Parts, "__init__", lambda self, *args: opened.append(1) or begin(self, *args))
    assert len(search(index, eye, "red blue", 4, by="sparse", why=False)) == 4
    assert calls == ["encode_text_terms"] and len(opened) == 1
    calls.clear()
    search(index, eye, "red blue", 4, by="fused", why=False)
    assert sorted(calls) == ["encode_text", "encode_text_terms", "encode_words"] and len(opened) == 2
    with pytest.raises(UserError, match="query is empty"):
        search(index, eye, " ", 4, by="sparse")


def test_wrong_ways(asked, tmp_path):
    index, eye, photos = asked
    with pytest.raises(UserError, match="no way 'sideways'"):
        ranked(index, eye, "red", 1, by="sideways")
    with pytest.raises(UserError, match="queries in words"):
        search(index, eye, photos / "red.png", 1, by="late")
    (index.folder / "parts.sqlite").unlink(missing_ok=True)
    (index.folder / "parts.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 30)
    with pytest.raises(UserError, match="delete it"):
        ranked(index, eye, "red", 1, by="sparse")
    plain = pipeline()
    for i, colour in enumerate(("red", "blue")):
        paint(tmp_path / "other" / f"{colour}.png", colour, salt=i)
    with open_index(tmp_path / "other" / NAME, plain) as other:
        other.update(tmp_path / "other", plain)
        for by, says in (("sparse", "cannot encode_image_terms"), ("late", "cannot encode_words"), ("fused", "only search by dense")):
            with pytest.raises(UserError, match=says):
                ranked(other, plain, "red", 1, by=by)
