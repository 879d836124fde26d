"""Frames and samples: what plans ask for, how files are read, and what damaged ones say."""
import io

import numpy as np
import pytest
import torch

from polysense.base.batch import check_batch
from polysense.base.errors import UserError
from polysense.base.plan import AudioPlan, Feed, ImagePlan, VideoPlan
from polysense.data.clips import BadClip, chosen, cut, decoded, picked, read_sound, resampled
from polysense.data.loader import Loader
from polysense.data.sources import ListSource

av, soundfile = pytest.importorskip("av"), pytest.importorskip("soundfile")


def film(frames: int, side: int = 32) -> np.ndarray:
    """Frame t is of one grey, 4 t."""
    return np.broadcast_to((np.arange(frames, dtype=np.uint8) * 4)[:, None, None, None], (frames, side, side, 3)).copy()


def movie(path, frames: np.ndarray):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = frames.shape[2], frames.shape[1], "yuv420p", 4_000_000
        for f in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        out.mux(stream.encode())
    return path


def greys(frames) -> list[float]:
    return [round(float(np.asarray(f).mean()) / 4) for f in frames]


@pytest.mark.parametrize("plan, total, at, want", [
    (VideoPlan(frames=4), 10, 0.5, [0, 3, 6, 9]), (VideoPlan(frames=4), 2, 0.5, [0, 0, 1, 1]), (VideoPlan(frames=0, sample="all"), 3, 0.5, [0, 1, 2]),
    (VideoPlan(frames=2, sample="all"), 3, 0.5, [0, 1]), (VideoPlan(frames=3, sample="stride", stride=2), 9, 0.0, [0, 2, 4]),
    (VideoPlan(frames=3, sample="stride", stride=2), 9, 0.5, [2, 4, 6]), (VideoPlan(frames=3, sample="stride", stride=2), 9, 0.999, [4, 6, 8]),
    (VideoPlan(frames=4, sample="stride", stride=2), 3, 0.7, [0, 2, 2, 2])])
def test_a_plan_picks_its_frames(plan, total, at, want):
    assert picked(total, plan, at).tolist() == want


@pytest.mark.parametrize("plan", [VideoPlan(frames=0), VideoPlan(sample="some"), VideoPlan(sample="stride", stride=0)])
def test_a_plan_that_cannot_be_met_is_refused(plan):
    with pytest.raises(UserError, match="no plan for a video"):
        picked(5, plan)


def test_frames_of_a_file_are_those_of_the_array(tmp_path):
    frames = film(12)
    path = movie(tmp_path / "a.mp4", frames)
    assert greys(decoded(path)) == greys(decoded(path.read_bytes())) == greys(frames) == list(range(12))
    for plan in (VideoPlan(frames=5), VideoPlan(frames=0, sample="all"), VideoPlan(frames=3, sample="stride", stride=3), VideoPlan(frames=20)):
        assert greys(chosen(path, plan)) == greys(chosen(frames, plan)) == picked(12, plan).tolist()


def test_damaged_videos_say_so_in_one_line(tmp_path):
    good = movie(tmp_path / "a.mp4", film(12)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(good[:len(good) // 3])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    for name in ("cut.mp4", "text.mp4", "empty.mp4", "absent.mp4"):
        with pytest.raises(BadClip) as caught:
            list(decoded(tmp_path / name))
        assert "\n" not in str(caught.value) and name in str(caught.value)
    for thing in (3, np.zeros((2, 4, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)):
        with pytest.raises(BadClip):
            list(decoded(thing))


def tone(rate: int, hertz: float, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate, to", [(8000, 16000), (44100, 16000), (16000, 8000), (48000, 44100)])
def test_resampling_keeps_a_tone_and_removes_what_would_fold(rate, to):
    got, want = resampled(tone(rate, 440.0), rate, to), tone(to, 440.0)
    assert abs(len(got) - len(want)) <= 1 and got.dtype == np.float32
    inner = slice(to // 20, min(len(got), len(want)) - to // 20)
    assert np.abs(got[inner] - want[inner]).max() < 2e-3
    if to < rate:
        assert np.abs(resampled(tone(rate, 0.58 * to), rate, to)[inner]).max() < 0.02, "above the new Nyquist frequency"
    assert resampled(got, to, to) is got


def test_sounds_are_read_mono_at_the_rate_asked_for(tmp_path):
    stereo = np.stack([tone(8000, 300), -0.5 * tone(8000, 300)], 1)
    soundfile.write(tmp_path / "a.wav", stereo, 8000)
    plain = read_sound(tmp_path / "a.wav")
    assert np.abs(plain - stereo.mean(1)).max() < 1e-3
    assert len(read_sound(tmp_path / "a.wav", 16000)) == 2 * len(plain)
    buffer = io.BytesIO()
    soundfile.write(buffer, stereo, 8000, format="FLAC")
    assert np.abs(read_sound(buffer.getvalue()) - plain).max() < 1e-3


def test_damaged_sounds_say_so_in_one_line(tmp_path):
    (tmp_path / "text.wav").write_text("no sound at all")
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 8000)
    soundfile.write(tmp_path / "nan.wav", np.full(9, np.nan, np.float32), 8000, subtype="FLOAT")
    for name in ("text.wav", "empty.wav", "none.wav", "nan.wav", "absent.wav"):
        with pytest.raises(BadClip) as caught:
            read_sound(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_missing_extra_names_itself(monkeypatch, tmp_path):
    import sys
    (tmp_path / "a.mp4").write_bytes(b"x")
    for module, extra, read in (("av", "video", lambda: list(decoded(tmp_path / "a.mp4"))), ("soundfile", "audio", lambda: read_sound(b"x"))):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"polysense\[{extra}\]"):
            read()


def test_cut_pads_with_silence_and_places_its_window():
    wave = np.arange(10, dtype=np.float32)
    assert cut(wave, 4).tolist() == [3, 4, 5, 6] and cut(wave, 4, 0).tolist() == [0, 1, 2, 3] and cut(wave, 4, 0.999).tolist() == [6, 7, 8, 9]
    assert cut(wave[:2], 4).tolist() == [0, 1, 0, 0] and cut(wave, None) is wave


def clips_source(lengths=(5, 9, 12)) -> ListSource:
    items = [{"id": str(i), "video": film(n, 16), "audio": np.arange(1, 1 + 100 * n, dtype=np.float32) / 2000} for i, n in enumerate(lengths)]
    return ListSource("clips", items, ("video", "audio"), rate=8000)


def read_one(feed: Feed, train: bool = False, **options):
    return next(iter(Loader(clips_source(), feed, batch_size=3, train=train, needs=("video", "audio"), **options)))


def test_every_frame_comes_with_a_mask_for_the_padding():
    feed = Feed(video=VideoPlan(frames=0, sample="all", image=ImagePlan(size=8)))
    batch = next(iter(Loader(clips_source(), feed, batch_size=3, train=False, needs=("video", "video_mask"))))
    check_batch(batch, ("video", "video_mask"))
    assert batch["video"].shape == (3, 12, 3, 8, 8) and batch["video_mask"].sum(1).tolist() == [5, 9, 12]
    assert (batch["video"][~batch["video_mask"]] == 0).all()


def test_windows_move_in_training_and_stand_still_outside():
    feed = Feed(image=ImagePlan(size=8, mean=(0.0,) * 3, std=(1.0,) * 3), audio=AudioPlan(rate=8000, seconds=0.05, train_seconds=0.025),
                video=VideoPlan(frames=3, sample="stride", stride=2))
    still, again = read_one(feed), read_one(feed)
    assert all(torch.equal(still[k], again[k]) for k in still) and still["audio"].shape == (3, 400) and still["video"].shape == (3, 3, 3, 8, 8)
    loader = iter(Loader(clips_source(), feed, batch_size=3, train=True, needs=("video", "audio"), seed=3))
    batches = [next(loader) for _ in range(6)]
    assert batches[0]["audio"].shape == (3, 200)
    firsts = {round(float(v[0, 0, 0, 0]) * 255 / 4) for b in batches for v, i in zip(b["video"], b["index"]) if i == 2}
    assert len(firsts) > 1, "the window of the longest clip never moved"
    twin = iter(Loader(clips_source(), feed, batch_size=3, train=True, needs=("video", "audio"), seed=3, cache_bytes=0))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(batches, [next(twin) for _ in range(6)]) for k in a)


def test_sounds_are_resampled_to_the_plan():
    assert read_one(Feed(image=ImagePlan(size=8), audio=AudioPlan(rate=16000)))["audio"].shape == (3, 2400)
    assert read_one(Feed(image=ImagePlan(size=8)))["audio"].shape == (3, 1200), "no plan: at the source's rate, padded to the longest"


def test_a_clip_plan_cuts_several_clips_of_every_video_it_reads_each_with_a_crop_of_its_own():
    from polysense.base.plan import ClipPlan, ViewPlan
    reads = []

    class Counted(ListSource):
        def load(self, i, key):
            reads.append(i)
            return super().load(i, key)

    slope = np.linspace(0, 255, 40, dtype=np.uint8)[None, None, :, None]                  # brightness tells the column
    films = [np.broadcast_to(slope, (12, 40, 40, 3)) // 2 + 10 * k for k in range(3)]
    source = Counted("films", [{"id": str(k), "video": f.astype(np.uint8)} for k, f in enumerate(films)], ("video",))
    view = ViewPlan(size=16, scale=(0.3, 0.6), flip=0.5)
    feed = Feed(image=ImagePlan(size=16, mean=(0,) * 3, std=(1,) * 3), video=ClipPlan(frames=4, sample="stride", stride=2, repeat=4, view=view))
    loader = iter(Loader(source, feed, None, batch_size=8, seed=0, needs=("video",), cache_bytes=0, prefetch=0, workers=0))
    one = next(loader)
    assert one["video"].shape == (8, 4, 3, 16, 16) and len(one["index"].unique()) == 2 and len(reads) == 2, "read once, shown four times"
    assert [len(set(part.tolist())) for part in one["index"].split(4)] == [1, 1]
    profile = one["video"].mean((2, 3))                                                   # [8,4,16]
    assert (profile - profile[:, :1]).abs().max() < 1e-4, "all frames of a clip share crop and mirror"
    turned = profile[:, 0, 0] > profile[:, 0, -1]
    assert 0 < int(turned.sum()) < 8 and len({round(float(p), 3) for p in profile[:4, 0, 3]}) == 4, "each clip has its own"
    again = next(iter(Loader(source, feed, None, batch_size=8, seed=0, needs=("video",), prefetch=0)))
    assert torch.equal(again["video"], one["video"])
    half = next(iter(Loader(source, feed, None, batch_size=8, seed=0, needs=("video",), rank=1, world=2, prefetch=0)))
    assert torch.equal(half["video"], one["video"][4:]), "the same clips, however many ranks share them"
    plain = next(iter(Loader(source, feed, None, batch_size=3, train=False, needs=("video",), prefetch=0)))
    assert plain["video"].shape == (3, 4, 3, 16, 16) and plain["index"].tolist() == [0, 1, 2], "outside training every video once, whole"
