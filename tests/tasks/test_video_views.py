"""Several clips and crops of a video: which frames and squares they are, and what the exams of videos make of them."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import VideoPlan
from polysense.data import source
from polysense.data.clips import picked, several, spread
from polysense.data.sources import BadSample, ListSource
from polysense.pipeline import Pipeline
from polysense.systems.selfsup.videomae import NormHead
from polysense.tasks import exams_for, take


def ramp(frames: int, height: int = 8, width: int = 8) -> np.ndarray:
    """A video whose frame i is of colour (i, column, row)."""
    i, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([i, x, y], -1).astype(np.uint8)


def test_windows_from_the_beginning_to_the_end():
    plan = VideoPlan(frames=4, sample="stride", stride=3)               # a window of ten frames
    assert spread(30, plan, 3).tolist() == [[0, 3, 6, 9], [10, 13, 16, 19], [20, 23, 26, 29]]
    assert spread(30, plan, 1).tolist() == [picked(30, plan).tolist()]
    assert spread(6, plan, 2).tolist() == [[0, 3, 5, 5]] * 2, "a short video has one window"
    every = spread(24, VideoPlan(frames=4), 2)
    assert sorted(every.ravel()) == np.linspace(0, 23, 8).round().tolist() and (np.diff(every, axis=1) > 3).all() and (every[1] > every[0]).all()
    with pytest.raises(UserError, match="every frame is read"):
        spread(9, VideoPlan(sample="all"), 2)
    with pytest.raises(UserError, match="0 clips"):
        spread(9, plan, 0)
    clips = several(ramp(30), plan, 3)
    assert [[f[0, 0, 0] for f in clip] for clip in clips] == spread(30, plan, 3).tolist()


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    plan = preset_of("videomae").but(**{"feed.image.size": 8, "feed.video.frames": 4, "config.encoder.image_size": 8, "config.encoder.frames": 4,
                                        "config.encoder.patch": 4, "config.target.patch": 4, "config.head": NormHead.Config(into=96, out=3)})
    return Pipeline(plan.config.build().eval(), plan, id="videomae")


def colours(pipeline, views):
    """uint8 values again."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (pipeline.preset.feed.image.mean, pipeline.preset.feed.image.std))
    return ((views * std + mean) * 255).round()


def test_squares_along_the_longer_side_of_every_clip(pipeline):
    views = colours(pipeline, pipeline.read_video_views(ramp(16, 8, 20), clips=2, crops=3))
    assert views.shape == (6, 4, 3, 8, 8)
    assert views[:, 0, 1, 0, 0].tolist() == [0, 6, 12] * 2, "left, middle, right"
    assert (views[:3, :, 0] != views[3:, :, 0]).any(-1).all(), "the second clip has other frames"
    tall = colours(pipeline, pipeline.read_video_views(ramp(16, 20, 8), crops=3))
    assert tall[:, 0, 2, 0, 0].tolist() == [0, 6, 12]
    clip = ramp(16, 8, 20)
    torch.testing.assert_close(pipeline.read_video_views(clip), pipeline.read_videos([clip]))
    with pytest.raises(UserError, match="crops of frames"):
        Pipeline(pipeline.system, pipeline.preset.but(**{"feed.image.fit": "squash"}), id="videomae").read_video_views(clip, crops=3)
    with pytest.raises(UserError, match="crops of frames"):
        pipeline.read_video_views(clip, crops=0)


class Videos(ListSource):
    def __init__(self, n=12, name="ramps", classes=("one", "two", "three"), bad=()):
        self.bad = bad
        super().__init__(name, [{"id": f"v{i}", "video": ramp(12 + i, 8, 16) // 4 + 90 * (i % 3), "label": i % 3} for i in range(n)],
                         ("video", "label"), split="test", classes=classes)

    def __getitem__(self, i):
        if i in self.bad:
            raise BadSample(f"v{i}", "torn")
        return super().__getitem__(i)


def test_recognition_is_the_mean_of_the_probabilities_of_all_views(pipeline):
    videos = Videos(bad=(4,))
    result = take("video_recognition", pipeline, videos, clips=2, crops=3)
    with torch.inference_mode():
        views = [pipeline.system.classify_video(pipeline.read_video_views(videos[i]["video"], 2, 3)).softmax(-1).mean(0) for i in range(12) if i != 4]
    right = np.mean([int(p.argmax()) == i % 3 for p, i in zip(views, [i for i in range(12) if i != 4], strict=True)])
    assert result.n == 11 and result.value == pytest.approx(right) and result.chance == pytest.approx(1 / 3)
    assert result.notes["skipped"] == [["v4", "torn"]] and (result.notes["clips"], result.notes["crops"]) == (2, 3)
    with pytest.raises(UserError, match="knows 3 classes"):
        take("video_recognition", pipeline, Videos(classes=("a", "b", "c", "d")))
    bare = Pipeline(preset_of("videomae").config.build(), preset_of("videomae"), id="videomae")
    with pytest.raises(UserError, match="no classes"):
        take("video_recognition", bare, source("scenes:clips?n=2&size=32&frames=16", "test"))


def test_probes_read_the_mean_of_the_views(pipeline):
    train, test = Videos(30, name="others"), Videos()
    assert {"video_knn_probe", "video_linear_probe", "video_recognition"} <= set(exams_for(pipeline.system))
    for exam in ("video_knn_probe", "video_linear_probe"):
        result = take(exam, pipeline, test, train, clips=2, **({"k": 5} if "knn" in exam else {}))
        assert result.exam == exam and result.value == 1.0 and result.notes["clips"] == 2, "dark, grey and bright are told apart"
    from polysense.tasks.video_probes import means

    with torch.inference_mode():
        each = pipeline.system.encode_video(pipeline.read_video_views(test[3]["video"], 2, 3))
    torch.testing.assert_close(means(pipeline, test, 2, 3).features[3], F.normalize(each.mean(0), dim=0))


def test_a_fine_tuned_system_is_examined_from_its_run(tmp_path):
    """From training on named motions to the exam."""
    data = "scenes:clips?size=32&frames=16&n=24"
    tuned = preset_of("videomae", "finetune")
    classes = source(data).classes
    small = preset_of("videomae").but(config=preset_of("videomae").config.but(**{
        "encoder.body.width": 24, "encoder.body.depth": 1, "decoder": tuned.config.decoder, "head": NormHead.Config(into=24, out=len(classes))}))
    stage = tuned.stages[0].but(steps=2, batch_size=4, **{"optim.warmup": 1})
    from polysense.train.run import train_preset

    for _ in train_preset("videomae", small.but(stages=(stage,), data=data), ("video", "label"), out=tmp_path / "run", workers=0):
        pass
    opened, unseen = polysense.open(tmp_path / "run"), source(data.replace("24", "6"), "test")
    result = take("video_recognition", opened, unseen, clips=2)
    with torch.inference_mode():
        said = [opened.system.classify_video(opened.read_video_views(unseen[i]["video"], 2)).softmax(-1).mean(0) for i in range(6)]
    assert result.n == 6 and result.value == pytest.approx(np.mean([int(p.argmax()) == unseen[i]["label"] for i, p in enumerate(said)]))
