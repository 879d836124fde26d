"""Outlines and boxes from files: coordinates there and back, what is refused."""
import numpy as np
import pytest
import torch
from PIL import Image

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan
from polysense.data import source
from polysense.pipeline import Pipeline
from polysense.pipeline.mask import unframed
from polysense.tasks import take
from polysense.tasks.segmentation import depth_in, next_click

polysense.load("sam")


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    preset = preset_of("sam")
    return Pipeline(preset.config.build(), preset, id="sam")


def photo(size=(120, 60)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


class Echo(torch.nn.Module):
    """Answers with the pixel that was clicked and the inside of the box, so that coordinates can be followed."""
    def segment(self, image, points=None, point_label=None, boxes=None, mask=None):
        size = image.shape[-1]
        at = (torch.arange(size) + 0.5) / size
        out = torch.full((1, 1, 2, size, size), -1.0)
        if points is not None:
            x, y = (points[0, 0, 0] * size).round().long()
            out[0, 0, 1, y, x] = 20.0
        if boxes is not None:
            x0, y0, x1, y1 = boxes[0, 0]
            out[0, 0, 1][((at > y0) & (at < y1))[:, None] & (at > x0) & (at < x1)] = 1.0
        return out, torch.tensor([[[0.1, 0.9]]])


@pytest.mark.parametrize(("fit", "size"), [
    ("squash", (120, 60)), ("corner", (120, 60)), ("corner", (50, 90)), ("pad", (120, 60)), ("crop", (64, 64))])
def test_places_are_those_of_the_picture_however_it_is_fitted(fit, size):
    preset = preset_of("sam").but(**{"feed.image": ImagePlan(size=64, fit=fit)})
    got = Pipeline(Echo(), preset).segment(photo(size), box=(0.25, 0.5, 0.75, 0.9))
    assert got.masks.shape == (2, size[1], size[0]) and got.scores[0] == pytest.approx(0.9), "best first"
    x0, y0, x1, y1 = got.boxes()[0]
    assert np.allclose((x0, y0, x1, y1), (0.25, 0.5, 0.75, 0.9), atol=2.1 / 60)
    got = Pipeline(Echo(), preset).segment(photo(size), points=[(0.4, 0.6)])
    x0, y0, x1, y1 = got.boxes()[0]
    assert x0 - 0.04 <= 0.4 <= x1 + 0.04 and y0 - 0.04 <= 0.6 <= y1 + 0.04 and x1 - x0 < 0.15


def test_what_a_crop_does_not_show_cannot_be_asked_for_and_is_in_no_mask():
    preset = preset_of("sam").but(**{"feed.image": ImagePlan(size=64, fit="crop")})
    with pytest.raises(UserError, match="outside the middle"):
        Pipeline(Echo(), preset).segment(photo(), points=[(0.05, 0.5)])
    mask = Pipeline(Echo(), preset).segment(photo(), box=(0.25, 0.0, 0.75, 1.0)).mask
    assert mask[:, 32:88].all() and not mask[:, :29].any() and not mask[:, 91:].any()


def test_maps_are_put_where_they_belong():
    full = unframed(torch.ones(1, 4, 4), (8, 4), (0.5, 0.0, 1.0, 1.0))
    assert full.shape == (1, 4, 8) and (full[..., :4] < -100).all() and (full[..., 4:] == 1).all()


def test_a_real_system_answers_and_reuses_its_encoding(pipeline, tmp_path):
    photo().save(tmp_path / "a.png")
    one = pipeline.segment(tmp_path / "a.png", points=[(0.3, 0.4)])
    assert one.masks.shape == (3, 60, 120) and sorted(one.scores, reverse=True) == list(one.scores)
    seen = pipeline.system._seen
    two = pipeline.segment(tmp_path / "a.png", points=[(0.3, 0.4), (0.9, 0.9)], labels=[1, 0], box=(0.1, 0.1, 0.6, 0.9))
    assert two.masks.shape == (1, 60, 120) and pipeline.system._seen is seen
    assert one.overlay().size == (120, 60) and {"score", "share", "box"} == set(one.to_json()["masks"][0])


@pytest.mark.parametrize(("prompt", "says"), [
    ({}, "nothing says"), ({"points": [(1.4, 0.2)]}, "not in the picture"), ({"points": [(0.4, 0.2)], "labels": [2]}, "labels for"),
    ({"box": (0.5, 0.5, 0.5, 0.9)}, "no inside"), ({"text": "a dog"}, "does not read words"),
    ({"text": "a", "box": (0, 0, 1, 1)}, "prompt of its own")])
def test_bad_prompts_are_refused_in_one_line(pipeline, prompt, says):
    with pytest.raises(UserError, match=says) as caught:
        pipeline.segment(photo(), **prompt)
    assert "\n" not in str(caught.value)


def test_bad_pictures_and_damaged_weights_are_refused(pipeline, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match="no bytes"):
        pipeline.segment(tmp_path / "empty.png", points=[(0.5, 0.5)])
    broken = preset_of("sam").config.build()
    broken.decoder.mask_tokens.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        Pipeline(broken, preset_of("sam")).segment(photo(), points=[(0.5, 0.5)])
    with pytest.raises(UserError, match="cannot segment"):
        Pipeline(preset_of("supervised").config.build(), preset_of("supervised")).segment(photo(), points=[(0.5, 0.5)])


def test_words_reach_a_system_that_reads_them():
    preset = preset_of("sam", "words")
    pipeline = Pipeline(preset.config.build(), preset, lambda texts: torch.tensor([[1, 5 + len(t), 2] for t in texts]))
    assert pipeline.segment(photo((64, 64)), text="a red circle").masks.shape == (3, 64, 64)


class Finder(torch.nn.Module):
    classes = ("cat", "dog")

    def detect(self, image):
        return torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.25, 1.0, 0.75], [0.0] * 4]]), torch.tensor([[1, 0, -1]]), torch.tensor([[0.9, 0.4, 0.0]])


def test_detectors_answer_in_the_coordinates_of_the_picture():
    pipeline = Pipeline(Finder(), preset_of("sam").but(**{"feed.image": ImagePlan(size=64, fit="crop")}))
    found = pipeline.detect(photo(), threshold=0.3)
    assert [(d.label, round(d.score, 2)) for d in found] == [("dog", 0.9), ("cat", 0.4)]
    assert found[0].box == pytest.approx((0.25, 0.0, 0.5, 1.0), abs=0.01)
    assert [d.label for d in pipeline.detect(photo(), ["cat"], threshold=0.3)] == ["cat"] and len(pipeline.detect(photo())) == 1
    with pytest.raises(UserError, match="knows no 'bird'"):
        pipeline.detect(photo(), ["bird"])


def test_patient_user_clicks_the_middle_of_the_largest_error():
    truth, answer = torch.zeros(2, 16, 16, dtype=torch.bool), torch.zeros(2, 16, 16, dtype=torch.bool)
    truth[:, 2:9, 2:9] = True
    answer[1] = truth[1]
    answer[1, 9:16, 3:12] = True
    place, inside = next_click(answer, truth)
    assert (place[0] * 16).tolist() == [5, 5] and inside.tolist() == [1, 0] and 11 <= place[1, 1] * 16 <= 13
    assert depth_in(truth)[0, 5, 5] == 4 and depth_in(truth)[0, 2, 2] == 1


def test_clicks_exam_counts_perfect_answers_as_one_and_feeds_them_back(pipeline):
    test = source("scenes:nested?n=6", "test")

    class Oracle(torch.nn.Module):
        def segment(self, image, points=None, point_label=None, boxes=None, mask=None):
            self.fed = mask
            out = torch.stack([~self.truth, self.truth], 2).float() * 2 - 1
            return out, torch.tensor([0.9, 0.1] if points.shape[2] == 1 else [0.1, 0.9]).expand(*out.shape[:3])
    subject = Pipeline(Oracle(), preset_of("sam"))
    from polysense.data.loader import Loader
    subject.system.truth = next(iter(Loader(test, subject.preset.feed, train=False, batch_size=6, needs=("image", "mask"))))["mask"]
    result = take("clicks", subject, test, clicks=(1, 2))
    assert result.metrics["oracle@1"].value == 1 and result.metrics["iou@1"].value == 0 and result.metrics["iou@2"].value == 1
    assert subject.system.fed is not None
    real = take("clicks", pipeline, test, clicks=(1, 2))
    assert 0 < real.metrics["iou@1"].value <= real.metrics["oracle@1"].value < 1 and real.n == 6
    with pytest.raises(UserError, match="nothing to measure"):
        take("clicks", pipeline, test, clicks=())


@pytest.mark.parametrize(("size", "frame"), [((40, 23), (0.0, 0.0, 1.0, 1.6)), ((16, 30), (0.2, 0.1, 0.8, 0.7)), ((9, 9), (0.0, 0.0, 1.0, 1.0)),
                                             ((12, 5), (-0.3, 0.0, 1.3, 1.0))])
def test_maps_are_interpolated_as_a_grid_of_samples_would_be(size, frame):
    torch.manual_seed(0)
    logits = torch.randn(3, 8, 8)
    x, y = ((torch.arange(n) + 0.5) / n for n in size)
    x, y = (x - frame[0]) / (frame[2] - frame[0]), (y - frame[1]) / (frame[3] - frame[1])
    grid = torch.stack(torch.broadcast_tensors(2 * x[None] - 1, 2 * y[:, None] - 1), -1)
    want = torch.nn.functional.grid_sample(logits[None], grid[None], align_corners=False, padding_mode="border")[0]
    torch.testing.assert_close(unframed(logits, size, frame), want.masked_fill((grid.abs() > 1).any(-1), -1e4), atol=1e-5, rtol=1e-5)


def test_the_next_prompt_on_a_picture_reads_nothing_again_unless_the_picture_changed(pipeline, monkeypatch):
    reads, looks, picture = [], [], photo((90, 50))
    monkeypatch.setattr(pipeline, "read_images", lambda images, read=pipeline.read_images: reads.append(1) or read(images))
    see = pipeline.system.vision.map
    monkeypatch.setattr(pipeline.system.vision, "map", lambda image: looks.append(1) or see(image))
    first = pipeline.segment(picture, [(0.5, 0.5)])
    pipeline.segment(picture, [(0.2, 0.7)])
    again = pipeline.segment(picture.copy(), [(0.5, 0.5)])
    assert len(reads) == len(looks) == 1 and np.array_equal(first.masks, again.masks)
    picture.paste((255, 0, 0), (0, 0, 60, 50))
    changed = pipeline.segment(picture, [(0.5, 0.5)])
    assert len(reads) == len(looks) == 2 and changed.scores != first.scores


def test_many_prompts_leave_the_encoding_in_the_order_that_the_decoder_reads(pipeline, monkeypatch):
    system, seen = pipeline.system.eval(), []
    answer = system.answer
    monkeypatch.setattr(system, "answer", lambda image, *rest, **more: seen.append(image) or answer(image, *rest, **more))
    image, points = torch.randn(2, 3, 64, 64), torch.rand(2, 3, 1, 2)
    with torch.inference_mode():
        many = system.segment(image, points)[0]
        each = [system.segment(image, points[:, i:i + 1])[0] for i in range(3)]
        torch.testing.assert_close(many, torch.cat(each, 1), atol=1e-4, rtol=1e-4)
        kept = system.look(image)
    order = kept.permute(0, 2, 3, 1).is_contiguous()
    assert all(x.permute(0, 2, 3, 1).is_contiguous() == order for x in seen) and [len(x) for x in seen] == [6, 2, 2, 2]
