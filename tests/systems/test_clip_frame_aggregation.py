"""The essence of CLIP frame aggregation (Portillo-Quintero et al. 2021): an untouched CLIP, three ways to make a video of frames."""
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.cli import main
from polysense.pipeline import Pipeline
from polysense.pipeline.clips import similarities
from polysense.train import starts
from polysense.train.run import load_run, shortened, train_preset

recipe = polysense.load("clip_frame_aggregation")
SMALL = recipe.tiny().but(config=recipe.CLIPFrameAggregation.Config(**recipe.vit_pair(
    16, 8, recipe.body(16, 1, 2), recipe.body(16, 1, 2), dim=12, vocab=60, length=8, end=2))).but(**{"feed.image.size": 16})


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def whole(frames: torch.Tensor) -> torch.Tensor:
    return torch.ones(frames.shape[:2], dtype=torch.bool)


def system(aggregate=None):
    torch.manual_seed(0)
    config = SMALL.config if aggregate is None else SMALL.config.but(aggregate=aggregate)
    return config.build().eval()


ALL = [recipe.SingleFrame.Config(), recipe.SingleFrame.Config(index=2), recipe.Mean.Config(), recipe.KMeans.Config(k=3)]


def test_every_frame_is_encoded_by_clips_image_tower_and_normalised():
    model, video = system(), torch.randn(2, 70, 3, 16, 16)
    seen = []
    model.aggregate.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.inference_mode():
        model.encode_video(video)
        want = F.normalize(model.image_head(model.vision(video.flatten(0, 1)).pooled), dim=-1).unflatten(0, (2, 70))
    torch.testing.assert_close(seen[0], want, rtol=1e-4, atol=1e-5)


def test_single_frame_is_the_thirtieth_or_the_last_of_a_shorter_clip():
    part, frames = recipe.SingleFrame.Config().build(), unit(1, 40, 6)
    assert torch.equal(part(frames, whole(frames))[0, 0], frames[0, 29])
    assert torch.equal(part(frames[:, :5], whole(frames[:, :5]))[0, 0], frames[0, 4])
    mask = whole(frames)
    mask[0, 12:] = False
    assert torch.equal(part(frames, mask)[0, 0], frames[0, 11]), "padding is no frame"


def test_mean_is_normalised_after_averaging():
    frames = unit(2, 7, 6)
    got, want = recipe.Mean.Config().build()(frames, whole(frames)), frames.numpy().mean(1)
    np.testing.assert_allclose(got[:, 0], want / np.linalg.norm(want, axis=-1, keepdims=True), atol=1e-6)


def test_mean_does_not_see_the_order_nor_a_repeated_clip():
    part, frames = recipe.Mean.Config().build(), unit(1, 9, 6)
    want = part(frames, whole(frames))
    for other in (frames[:, torch.randperm(9)], frames.repeat(1, 2, 1), frames.repeat_interleave(3, 1)):
        torch.testing.assert_close(part(other, whole(other)), want, rtol=0, atol=1e-6)


def test_one_centroid_is_the_mean():
    frames = unit(3, 8, 6)
    one, mean = (c.build()(frames, whole(frames)) for c in (recipe.KMeans.Config(k=1), recipe.Mean.Config()))
    torch.testing.assert_close(one, mean, rtol=0, atol=1e-6)


def test_centroids_are_a_fixed_point_of_lloyds_rule_and_find_planted_clusters():
    centres = unit(3, 16, seed=4)
    frames = F.normalize(centres.repeat_interleave(10, 0) + 0.05 * torch.randn(30, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    frames = frames[torch.randperm(30, generator=torch.Generator().manual_seed(2))]
    part = recipe.KMeans.Config(k=3).build()
    both = torch.stack([frames, unit(30, 16, seed=9)])
    got = part.centroids(both, whole(both))
    assert (unit_rows(got[0]) @ centres.T).amax(0).min() > 0.99
    for points, found in zip(both.numpy(), got.numpy()):                        # numpy twin: each centroid is the mean of the frames nearest to it
        near = ((points[:, None] - found[None]) ** 2).sum(-1).argmin(1)
        for k in range(3):
            np.testing.assert_allclose(found[k], points[near == k].mean(0), atol=1e-5)


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=-1)


def test_clusters_are_those_of_each_video_alone_and_padding_is_in_none():
    part, frames = recipe.KMeans.Config(k=3).build(), unit(2, 12, 6)
    mask = whole(frames)
    mask[1, 7:] = False
    dirty = frames.clone()
    dirty[1, 7:] = 100.0
    together = part(dirty, mask)
    torch.testing.assert_close(together[0], part(frames[:1], mask[:1])[0])
    torch.testing.assert_close(together[1], part(frames[1:, :7], mask[1:, :7])[0])
    few = part(frames[:1, :2], mask[:1, :2])
    assert few.shape == (1, 3, 6) and few.isfinite().all(), "a clip of fewer frames than clusters repeats some"


def test_a_text_meets_the_nearest_centroid_and_one_more_can_only_help():
    parts, texts = [unit(4, 6, seed=s).numpy() for s in (1, 2)], unit(5, 6, seed=3).numpy()
    got = similarities(parts, texts)
    for m in range(5):
        for n in range(2):
            assert got[m, n] == pytest.approx(max(float(texts[m] @ c) for c in parts[n])), "the LARGEST cosine"
    assert (got >= similarities([p[:3] for p in parts], texts) - 1e-7).all()


@pytest.mark.parametrize("aggregate", ALL, ids=lambda c: type(c).owner.__name__)
@pytest.mark.parametrize("pieces", [1, 4, 50])
def test_a_stream_gives_what_the_whole_gives(aggregate, pieces):
    model, video = system(aggregate), torch.randn(1, 41, 3, 16, 16)
    with torch.inference_mode():
        want = model.encode_video_parts(video)[0]
        torch.testing.assert_close(model.encode_stream(iter(video[0].split(pieces))), want, rtol=0, atol=1e-6)


def test_a_streamed_mean_holds_no_frames_and_a_streamed_single_frame_stops_reading():
    import gc
    import weakref
    alive: list = []

    def chunks():
        for _ in range(20):
            chunk = unit(5, 6)
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk
            gc.collect()
            assert sum(r() is not None for r in alive) <= 2

    recipe.Mean.Config().build().stream(chunks())
    read = []
    recipe.SingleFrame.Config(index=7).build().stream(read.append(i) or unit(5, 6, seed=i) for i in range(20))
    assert len(read) == 2


def test_several_videos_of_different_lengths_are_each_as_alone():
    model, video = system(recipe.KMeans.Config(k=2)), torch.randn(2, 6, 3, 16, 16)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    with torch.inference_mode():
        both = model.encode_video_parts(video, mask)
        torch.testing.assert_close(both[1], model.encode_video_parts(video[1:, :3])[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_video(video, mask).norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("video, mask", [(torch.randn(2, 3, 16, 16), None), (torch.randn(1, 0, 3, 16, 16), None),
                                         (torch.randn(1, 2, 3, 16, 16), torch.zeros(1, 2, dtype=torch.bool)), (torch.randn(1, 2, 1, 16, 16), None)])
def test_bad_videos_are_refused_in_one_line(video, mask):
    with pytest.raises(UserError) as caught:
        system().encode_video(video, mask)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no frames"):
        system().encode_stream([])


def test_bad_settings_are_refused():
    for config in (recipe.KMeans.Config(k=0), recipe.SingleFrame.Config(index=-1)):
        with pytest.raises(UserError):
            config.build()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of clip of one step in an own cache, and the run that stands on it, trained by the one command."""
    patch, place = pytest.MonkeyPatch(), tmp_path_factory.mktemp("frames")
    patch.setenv("POLYSENSE_CACHE", str(place / "cache"))
    base = shortened(preset_of("clip"), 1).but(data="scenes:single?n=16").but(**{"stages.0.batch_size": 4})
    list(train_preset("clip", base, ("image", "text"), out=starts.place_of(recipe.tiny().starts[0])))
    assert main(["train", "clip_frame_aggregation", "--data", "scenes:clips?n=4", "--out", str(place / "run")]) == 0
    yield place
    patch.undo()


def test_training_it_is_taking_clip_as_it_is(run):
    theirs = load_file(starts.place_of(recipe.tiny().starts[0]) / "weights.safetensors")
    ours = load_file(run / "run" / "weights.safetensors")
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours), "untouched, bit for bit"
    assert load_run(run / "run").tokenizer is not None
    assert main(["train", "clip_frame_aggregation", "--steps", "3", "--out", str(run / "no")]) == 2 and not (run / "no").exists()


def film(path, frames: np.ndarray):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for f in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        out.mux(stream.encode())
    return path


def test_videos_from_files_through_pipeline_and_command_line(run, capsys):
    folder = run / "films"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, length in (("a.mp4", 40), ("b.mp4", 5)):
        film(folder / name, rng.integers(0, 255, (length, 32, 48, 3), dtype=np.uint8))
    pipeline = polysense.open(run / "run")
    vectors = pipeline.encode(videos=[folder / "a.mp4", folder / "b.mp4"])
    assert vectors.shape == (2, 192) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    from polysense.data.clips import decoded
    frames = pipeline.encode(images=list(decoded(folder / "b.mp4")))
    mean = frames.mean(0)
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), atol=1e-5)
    (folder / "torn.mp4").write_bytes(b"torn")
    assert main(["encode", str(folder), "-m", str(run / "run"), "--out", str(run / "v.npz"), "--json"]) == 0
    out = capsys.readouterr().out
    assert '"encoded": 2' in out and "torn.mp4" in out
    written = np.load(run / "v.npz")
    np.testing.assert_allclose(written["vector"], vectors, atol=1e-5)
    assert main(["encode", str(folder / "torn.mp4"), "-m", str(run / "run"), "--out", str(run / "w.npz")]) == 2
    assert "torn.mp4" in capsys.readouterr().err and not (run / "w.npz").exists()
    with pytest.raises(UserError, match="one of them"):
        pipeline.encode(videos=[folder / "a.mp4"], texts=["a"])
    with pytest.raises(UserError):
        pipeline.encode(audios=[io.BytesIO()])


def test_it_takes_the_exam_on_videos_of_different_lengths(run):
    from polysense.data.sources import ListSource
    from polysense.tasks import take

    rng = np.random.default_rng(0)
    items = [{"id": str(i), "video": rng.integers(0, 255, (3 + i, 20, 20, 3), dtype=np.uint8), "captions": [f"clip {i}", "a clip"][:1 + i % 2]}
             for i in range(4)]
    for plan in (recipe.tiny(), recipe.tiny_kmeans()):
        pipeline = polysense.open(run / "run")
        subject = Pipeline(plan.config.build(), plan, pipeline.tokenizer, id="x")
        result = take("video_retrieval", subject, ListSource("clips", items, ("video", "text")))
        assert result.n == 4 and result.notes["captions"] == 6 and 0 <= result.value <= 1
