from pathlib import Path

import numpy as np
import pytest
from colours import Blind, paint, pipeline, preset, tokenizer
from PIL import Image

from polysense.app.index import NAME, open_index
from polysense.app.search import contact_sheet, is_picture, search, write_results
from polysense.base.errors import UserError
from polysense.pipeline import Pipeline


@pytest.fixture
def asked(tmp_path):
    """(index, pipeline, photos): plain pictures, and one that is half red, half blue."""
    eye, photos = pipeline(), tmp_path / "photos"
    for i, colour in enumerate(["red", "green", "blue", "yellow"]):
        paint(photos / f"{colour}.png", colour, salt=i)
    half = np.zeros((40, 60, 3), np.uint8)
    half[:, :30, 0], half[:, 30:, 2] = 255, 255
    Image.fromarray(half).save(photos / "half <b>&.png")
    with open_index(photos / NAME, eye) as index:
        index.update(photos, eye)
        yield index, eye, photos


def test_text_and_picture_queries_agree_with_the_encoder(asked, tmp_path):
    index, eye, _ = asked
    hits = search(index, eye, "a red thing", 2)
    assert [Path(h.path).name for h in hits] == ["red.png", "half <b>&.png"] and [h.rank for h in hits] == [1, 2]
    assert abs(hits[0].score - float(eye.similarity([hits[0].path], ["a red thing"])[0, 0])) < 1e-5
    other = paint(tmp_path / "query.png", (10, 240, 20))
    for query in (other, str(other), Image.open(other), np.asarray(Image.open(other))):
        assert Path(search(index, eye, query, 1)[0].path).name == "green.png"
    assert len(search(index, eye, "blue", 99)) == 5
    assert is_picture(str(other)) and not is_picture("red.png") and not is_picture("two dogs")


def test_why_shows_the_half_that_matched(asked, tmp_path):
    index, eye, _ = asked
    (half,) = [h for h in search(index, eye, "red and blue", 5, out=tmp_path / "heat") if "half" in Path(h.path).name]
    heat = {h.word: h for h in half.why.words}
    assert heat["red"].peak[0] < 0.5 < heat["blue"].peak[0] and heat["red"].map[:, :20].mean() > 0.9 > 0.1 > heat["red"].map[:, 40:].mean()
    assert Image.open(half.heat).size == (60, 40) and f"{half.rank:03d}-half" in half.heat
    assert half.to_json()["why"]["words"] and half.to_json()["heat"] == half.heat
    assert search(index, eye, "red", 1, why=False)[0].why is None
    by_picture = search(index, eye, Image.new("RGB", (8, 8), "blue"), 2)
    assert "half" in Path(by_picture[1].path).name and by_picture[1].why.whole.peak[0] > 0.5


def test_a_system_without_patches_still_searches(asked):
    index, eye, _ = asked
    eye.can = lambda capability: capability not in ("encode_patches", "ground_text")
    assert search(index, eye, "red", 1)[0].why is None


def test_wrong_queries(asked):
    index, eye, photos = asked
    for query, says in (("  ", "empty"), (photos / "none.png", "no file")):
        with pytest.raises(UserError, match=says):
            search(index, eye, query)
    with pytest.raises(UserError, match="made with model"):
        search(index, pipeline(gain=0.5), "red")
    plan = preset(Blind.Config())
    blind = Pipeline(plan.config.build(), plan, tokenizer, id="blind", device="cpu")
    blind.digest = index.digest
    with pytest.raises(UserError, match="cannot encode_image"):
        search(index, blind, photos / "red.png")


def test_pictures_that_vanish_or_break_are_shown_as_such(asked, tmp_path):
    index, eye, photos = asked
    (photos / "red.png").unlink()
    (photos / "blue.png").write_bytes(b"broken")
    hits = search(index, eye, "red blue", 5)
    assert {Path(h.path).name for h in hits if h.why is None} == {"red.png", "blue.png"}
    page = write_results(hits, tmp_path / "out" / "page.html", "red blue").read_text(encoding="utf-8")
    assert "gone since indexed" in page and "unreadable" in page
    contact_sheet(hits, "red blue")


def test_results_as_page_and_sheet(asked, tmp_path):
    index, eye, _ = asked
    hits = search(index, eye, "red & <blue>", 5)
    page = write_results(hits, tmp_path / "page.html", "red & <blue>").read_text(encoding="utf-8")
    assert "red &amp; &lt;blue&gt;" in page and "half &lt;b&gt;&amp;.png" in page and "<blue>" not in page and "<b>&" not in page
    assert page.count("<figure>") == 5 and page.count("data:image/jpeg;base64,") >= 10 and "http" not in page
    sheet = contact_sheet(hits, "red", columns=3, side=64)
    assert sheet.width == 3 * 72 + 8 and sheet.height == 32 + 2 * (2 * 64 + 40)
    seen = np.asarray(sheet).astype(int)
    first = Path(hits[0].path).stem
    centre = seen[32 + 32, 8 + 32]
    assert first.startswith("half") or centre[{"red": 0, "green": 1, "blue": 2}[first]] > 200, "the first hit stands first"
    assert Image.open(write_results(hits, tmp_path / "sheet.png", "red")).size == contact_sheet(hits, "red").size
    assert "nothing found" in write_results([], tmp_path / "none.html", "x").read_text(encoding="utf-8")
    assert contact_sheet([], "nothing like it").width > 0
    with pytest.raises(UserError, match="html"):
        write_results(hits, tmp_path / "page.docx")
