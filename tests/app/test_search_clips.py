"""Searching videos and sounds by words: encoded once, again when changed or when another model asks; damaged files are left out and told."""
import json
import os
import pathlib

import numpy as np
import pytest

from polysense.app.clips import read, search_clips
from polysense.base.errors import UserError
from polysense.cli import main
from polysense.data.clips import BadClip


class Toy:
    """A pipeline whose vectors are known: a file's content names them, a text is the axis of its first letter."""
    id = "toy"

    def __init__(self, digest: str = "one", can=("encode_video", "encode_audio", "encode_text")):
        self.digest, self.able, self.read = digest, can, []

    def can(self, capability):
        return capability in self.able

    def axis(self, letter):
        return np.eye(26, dtype=np.float32)[ord(letter) - ord("a")]

    def encode_video_parts(self, path):
        text = pathlib.Path(path).read_text()
        self.read.append(os.path.basename(path))
        if text == "torn":
            raise BadClip("torn", path)
        return np.stack([self.axis(c) for c in text])

    def encode(self, texts=None, audios=None):
        return np.stack([self.axis(t[0]) for t in texts]) if texts else self.encode_video_parts(audios[0])[:1]


@pytest.fixture()
def folder(tmp_path):
    for name, letters in (("one.mp4", "ab"), ("sub/two.mkv", "c"), ("three.wav", "b")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(letters)
    return tmp_path


def names(found):
    return [os.path.basename(h.path) for h in found.hits]


def test_the_nearest_of_a_videos_vectors_counts(folder):
    found = search_clips(Toy(), folder, "b")
    assert names(found) == ["one.mp4", "two.mkv"] and found.hits[0].score == 1 and (found.clips, found.encoded) == (2, 2)
    assert names(search_clips(Toy(), folder, "c", count=1)) == ["two.mkv"]


def test_sounds_are_a_search_of_their_own(folder):
    assert names(search_clips(Toy(), folder, "b", kind="sounds")) == ["three.wav"]


def test_only_new_and_changed_files_are_encoded_again(folder):
    search_clips(Toy(), folder, "a")
    toy = Toy()
    assert search_clips(toy, folder, "a").encoded == 0 and toy.read == []
    (folder / "one.mp4").write_text("zz")
    os.utime(folder / "one.mp4", (1, 1))
    (folder / "new.mov").write_text("y")
    (folder / "sub" / "two.mkv").unlink()
    toy = Toy()
    found = search_clips(toy, folder, "z")
    assert sorted(toy.read) == ["new.mov", "one.mp4"] and names(found) == ["one.mp4", "new.mov"]
    assert search_clips(Toy("another model"), folder, "a").encoded == 2


def test_torn_files_are_left_out_and_a_torn_store_is_made_anew(folder):
    (folder / "torn.mp4").write_text("torn")
    found = search_clips(Toy(), folder, "a")
    assert [os.path.basename(p) for p, _ in found.skipped] == ["torn.mp4"] and found.clips == 2
    store = folder / ".polysense-videos.npz"
    for damage in (b"", store.read_bytes()[:50], b"PK\x03\x04 no archive"):
        store.write_bytes(damage)
        assert read(store, "one") == {} and search_clips(Toy(), folder, "a").encoded == 2


@pytest.mark.parametrize("change, says", [({"text": " "}, "empty"), ({"kind": "smells"}, "videos or sounds"), ({"folder": "none"}, "no folder")])
def test_what_cannot_be_searched_says_so(folder, change, says):
    asked = {"pipeline": Toy(), "folder": folder, "text": "a"} | change
    with pytest.raises(UserError, match=says):
        search_clips(**asked)
    with pytest.raises(UserError, match="cannot encode_audio"):
        search_clips(Toy(can=("encode_text",)), folder, "a", kind="sounds")


def test_from_files_by_the_command_line(tmp_path, capsys):
    """Flat colours; a CLIP of random weights: the score must be what the pipeline says of these files."""
    av = pytest.importorskip("av")
    import polysense
    from polysense.base.catalogue import preset_of
    from polysense.train.run import shortened, train_preset
    base = shortened(preset_of("clip"), 1).but(data="scenes:single?n=8").but(**{"stages.0.batch_size": 4})
    list(train_preset("clip", base, ("image", "text"), out=tmp_path / "clip"))
    plan = preset_of("clip_frame_aggregation").but(starts=())
    run = json.loads((tmp_path / "clip" / "run.json").read_text())
    (tmp_path / "clip" / "run.json").write_text(json.dumps(run | {"system": "clip_frame_aggregation", "plan": plan.to_dict()}))
    (tmp_path / "films").mkdir()
    for k in range(2):
        with av.open(str(tmp_path / "films" / f"{k}.mp4"), "w") as out:
            stream = out.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 64
            for _ in range(3):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 200 * k, np.uint8), format="rgb24")))
            out.mux(stream.encode())
    assert main(["clips", str(tmp_path / "films"), "a red circle", "-m", str(tmp_path / "clip"), "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    pipeline = polysense.open(tmp_path / "clip")
    want = pipeline.encode(videos=[h["path"] for h in hits]) @ pipeline.encode(texts=["a red circle"])[0]
    np.testing.assert_allclose([h["score"] for h in hits], want, atol=1e-5)
    assert main(["clips", str(tmp_path / "clip"), "a", "-m", str(tmp_path / "clip")]) == 2 and "no videos" in capsys.readouterr().err
