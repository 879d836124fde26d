"""Pix2Seq v2's essence (Chen et al. 2022)."""
import numpy as np
import pytest
import torch
from fake import fake_batch
from PIL import Image

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.outline import outline
from polysense.nn.coords import (
    CAPTION,
    DETECT,
    END,
    FAKE,
    HIDDEN,
    KEYPOINTS,
    SEGMENT,
    SEPARATOR,
    Vocabulary,
    dequantise,
    filled,
    noise_boxes,
    quantise,
)
from polysense.nn.position import sincos_2d
from polysense.pipeline import Pipeline
from polysense.tasks import take
from polysense.tasks.detection import precision
from polysense.train.fit import fit

recipe = polysense.load("pix2seq_v2")
NEEDS = ("image", "boxes", "box_label", "polygon", "keypoints", "text")


@pytest.fixture()
def system():
    torch.manual_seed(0)
    return preset_of("pix2seq_v2").config.build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(preset_of("pix2seq_v2"), NEEDS)


def watched(system, batch):
    """What `score` was given for each task, by its prompt's first token, and the losses."""
    seen, plain = {}, system.score

    def score(tiled, prompt, read, written, weight):
        seen[int(prompt[0, 0])] = (tiled, prompt, read, written, weight)
        return plain(tiled, prompt, read, written, weight)
    system.score = score
    losses = system.write(batch)
    system.score = plain
    return seen, losses


def test_vocabulary_is_laid_out_as_released():
    v = preset_of("pix2seq_v2", "paper").config.vocabulary
    assert (END, DETECT, SEGMENT, KEYPOINTS, CAPTION, FAKE, SEPARATOR, HIDDEN) == (0, 10, 11, 12, 13, 30, 40, 41)
    assert (v.class_from, v.bins_from, v.bins, v.text_from, v.words, v.size) == (100, 1000, 1000, 3000, 32_000, 35_000)
    with pytest.raises(UserError, match="overlap"):
        Vocabulary(classes=("a",) * 60, class_from=100, bins_from=150).check()


@pytest.mark.parametrize("bins", [10, 100, 1000])
def test_numbers_come_back_within_half_a_bin(bins):
    value = torch.cat([torch.rand(5000), torch.tensor([0.0, 1.0])])
    token = quantise(value, bins)
    assert token.min() == 0 and token.max() == bins - 1 and (dequantise(token, bins) - value).abs().max() <= 0.5 / bins + 1e-6


def test_boxes_are_written_ymin_xmin_ymax_xmax_and_places_y_x():
    v = Vocabulary(classes=("a",), bins=100, bins_from=150, text_from=300)
    assert v.box_tokens(torch.tensor([0.1, 0.2, 0.3, 0.4])).tolist() == [170, 160, 190, 180]
    box, place = torch.rand(3, 4), torch.rand(3, 5, 2)
    assert (v.boxes(v.box_tokens(box)) - box).abs().max() <= 0.0051 and (v.places(v.place_tokens(place)) - place).abs().max() <= 0.0051
    assert v.place_tokens(torch.tensor([[0.1, 0.2]])).tolist() == [170, 160]


def test_detection_sequences_hold_all_objects_then_noise_of_class_fake(system, batch):
    read, written, weight = (t.unflatten(1, (8, 5)) for t in system.detection(batch["boxes"], batch["box_label"]))
    real = written[..., 4] != FAKE
    assert real.sum(1).tolist() == [2, 2, 2, 1] and real[:, :2].sum(1).tolist() == [2, 2, 2, 1], "true ones first"
    for i in range(4):
        pairs = zip(batch["boxes"][i], batch["box_label"][i], strict=True)
        want = {(*system.v.box_tokens(b).tolist(), 100 + int(k)) for b, k in pairs if k >= 0}
        assert {tuple(row.tolist()) for row in written[i][real[i]]} == want
    assert (weight[..., 4] == 1).all() and torch.equal(weight[..., :4], real[..., None].float().expand(-1, -1, 4))
    assert torch.equal(read[..., :4], written[..., :4]), "coordinates are read as they are"
    assert (written[~real][:, 4] == FAKE).all()


def test_read_classes_are_noise_that_tells_nothing(system):
    boxes, label = torch.rand(300, 4, 4).sort(-1).values, torch.full((300, 4), 3)
    read, written, _ = (t.unflatten(1, (8, 5)) for t in system.detection(boxes, label))
    said, true = read[..., 4], written[..., 4] == 103
    for side in (true, ~true):
        assert 0.42 < (said[side] == FAKE).float().mean() < 0.58 and len(said[side].unique()) == len(system.classes) + 1


def test_noise_boxes_are_random_or_moved_copies():
    torch.manual_seed(0)
    boxes, real = torch.full((200, 8, 4), -1.0), torch.zeros(200, 8, dtype=torch.bool)
    boxes[:100, 0], real[:100, 0] = torch.tensor([0.4, 0.4, 0.5, 0.5]), True
    noise = noise_boxes(boxes, real)
    near = (noise[:100] - boxes[:100, :1]).abs().amax(-1) <= 0.0501
    assert 0.4 < near.float().mean() < 0.6 and noise.min() >= 0 and noise.max() <= 1
    assert (noise[100:, :, 2:] >= noise[100:, :, :2]).all(), "nothing to copy: all random"


def test_gradient_at_coordinates_of_noise_is_exactly_zero(system, batch):
    kept = []
    system.decoder.head.register_forward_hook(lambda m, args, out: kept.append(out) or out.retain_grad())
    torch.manual_seed(3)
    seen, losses = watched(system, batch)
    losses["detect"].backward()
    grad, written = kept[0].grad.unflatten(1, (8, 5)), seen[DETECT][3].unflatten(1, (8, 5))
    fake = written[..., 4] == FAKE
    assert (grad[fake][:, :4] == 0).all() and (grad[fake][:, 4].abs().sum(-1) > 0).all() and (grad[~fake].abs().sum(-1) > 0).all()


def test_prompts_never_contribute_to_the_loss(system, batch):
    """Logits at places whose next token is still of the prompt are not even made: what is predicted is exactly what was written."""
    kept = []
    system.decoder.head.register_forward_hook(lambda m, args, out: kept.append(out))
    seen, _ = watched(system, batch)
    assert set(seen) == {DETECT, SEGMENT, KEYPOINTS, CAPTION}
    assert [k.shape[1] for k in kept] == [seen[t][3].shape[1] for t in (DETECT, SEGMENT, KEYPOINTS, CAPTION)]
    for task in (SEGMENT, KEYPOINTS):
        assert seen[task][1].shape[1] == 6 and (seen[task][1][:, 5] >= 100).all(), "task, box, class"
    assert seen[DETECT][1].shape[1] == seen[CAPTION][1].shape[1] == 1


def test_loss_is_the_weighted_mean_of_token_entropies(system, batch):
    seen, losses = watched(system, batch)
    for name, task in (("detect", DETECT), ("keypoints", KEYPOINTS), ("caption", CAPTION)):
        tiled, prompt, read, written, weight = seen[task]
        total = 0.0
        for i in range(written.shape[1]):    # token by token, as it would be written
            x = torch.cat([prompt, read[:, :i]], 1)
            logp = system.decoder.logits(system.decoder.read(system.decoder.embed(x), source=tiled)[:, -1]).log_softmax(-1)
            total = total - (logp.gather(1, written[:, i:i + 1])[:, 0] * weight[:, i]).sum()
        assert losses[name].item() == pytest.approx((total / weight.sum()).item(), rel=1e-4)


def test_several_instances_share_one_encoding_and_a_prompt_never_changes_it(system, batch):
    looks = []
    system.vision.register_forward_hook(lambda m, args, out: looks.append(1))
    plain, calls = system.vision.dense, []
    system.vision.dense = lambda image: calls.append(1) or plain(image)
    seen, _ = watched(system, batch)
    assert len(calls) == 1, "one encoding for four tasks"
    assert len(seen[SEGMENT][0]) == 7 and torch.equal(seen[SEGMENT][0][0], seen[SEGMENT][0][1]), "tiled over the instances of a picture"
    with torch.no_grad():
        system.eval()
        one = system.look(batch["image"])
        system.segment(batch["image"], boxes=batch["boxes"].clamp(0, 1))
        assert torch.equal(one, system.look(batch["image"]))


def test_hidden_points_are_a_token_of_little_weight(system, batch):
    seen, _ = watched(system, batch)
    written, weight = seen[KEYPOINTS][3], seen[KEYPOINTS][4]
    assert written.shape[1] == 10 and ((written == HIDDEN) == (weight < 1)).all()
    assert (weight[written == HIDDEN] - 0.1).abs().max() < 1e-6 and (written[:, 4:6] == HIDDEN).all()


def test_captions_end_lightly_and_padding_weighs_nothing(system):
    written, weight = system.sentence(torch.tensor([[1, 7, 9, 2, 0, 0]]))
    assert written.tolist() == [[307, 309, END, END, END]] and torch.allclose(weight, torch.tensor([[1.0, 1.0, 0.1, 0.0, 0.0]]))


def test_outlines_begin_anywhere_and_keep_their_shape(system):
    polygon = torch.rand(1, 128, 2)
    firsts = {tuple(system.outline(polygon)[0, :2].tolist()) for _ in range(20)}
    assert len(firsts) > 10 and system.outline(polygon).shape == (1, 32)


def test_shuffled_objects_are_another_sequence_but_the_same_set(system, batch):
    torch.manual_seed(0)
    written = torch.stack([system.detection(batch["boxes"], batch["box_label"])[1][0] for _ in range(10)]).unflatten(1, (8, 5))
    firsts = {tuple(w[0].tolist()) for w in written}
    assert len(firsts) == 2 and len({frozenset(tuple(r.tolist()) for r in w[:2]) for w in written}) == 1
    rows, truth = np.array([[0, 0.9, 1, 0], [1, 0.8, 0, 0], [0, 0.7, 1, 1]]), np.array([[0, 0], [1, 0], [0, 1]])
    assert precision(rows, truth, np.ones(2)) == precision(rows[::-1], truth[::-1], np.ones(2)) == 0.5


def test_fake_is_never_returned_and_all_objects_are_written(system, batch):
    with torch.no_grad():                    # a decoder that would say fake everywhere
        system.decoder.head.bias.fill_(-5.0)
        system.decoder.head.bias[FAKE] = 50.0
    boxes, kind, score = system.eval().detect(batch["image"])
    assert boxes.shape == (4, 8, 4) and kind.max() < len(system.classes) and kind.min() >= -1
    assert score.max() < 1e-6 and boxes.min() >= 0 and boxes.max() <= 1


def test_a_list_without_noise_ends_where_the_end_is_likelier_than_any_number(batch):
    torch.manual_seed(0)
    plain = preset_of("pix2seq_v2").config.but(fill="end").build().eval()
    said = []
    start = plain.decoder.start

    def ending(*args, **kw):                 # END is certain from the third object on
        logits, writer = start(*args, **kw)

        def write(token):
            said.append(token)
            out = writer(token).clone()
            out[:, END] = 50.0 if len(said) >= 10 else -50.0
            return out
        return logits, write
    plain.decoder.start = ending
    _, kind, score = plain.detect(batch["image"])
    assert (score[:, 2:] == 0).all() and (kind[:, 2:] == -1).all() and (score[:, :2] > 0).any()


def test_tasks_that_are_left_out_are_not_learned_and_change_no_other(batch):
    base = preset_of("pix2seq_v2").config
    torch.manual_seed(0)
    one = base.but(tasks=("detect",)).build()
    torch.manual_seed(0)
    all_ = base.build()
    torch.manual_seed(5)
    alone = one.write(batch)
    torch.manual_seed(5)
    assert set(alone) == {"detect"} and torch.equal(alone["detect"], all_.write(batch)["detect"])
    for wrong in ((), ("detect", "depth")):
        with pytest.raises(UserError, match="some of detect"):
            base.but(tasks=wrong).build()


def test_bins_born_in_order_are_like_their_neighbours_and_nothing_else_is_touched():
    v = Vocabulary(classes=("a",), bins=32, bins_from=150, text_from=200, words=20)
    torch.manual_seed(0)
    table = torch.randn(v.size, 64) * 0.02
    before = table.clone()
    v.order(table)
    assert torch.equal(table[:150], before[:150]) and torch.equal(table[182:], before[182:])
    rows = torch.nn.functional.normalize(table[150:182], dim=1)
    near, far = (rows @ rows.T).diagonal(1), (rows @ rows.T).diagonal(16)
    assert near.min() > 0.9 and far.max() < 0.7 and float(table[150:182].std()) == pytest.approx(0.02, rel=0.2)


def test_places_are_born_as_sines_so_that_what_is_seen_says_where_it_is(system):
    assert system.position.requires_grad
    torch.testing.assert_close(system.position.detach(), sincos_2d(128, (8, 8)))


def test_score_is_the_probability_of_the_class_and_best_comes_first(system, batch):
    boxes, kind, score = system.eval().detect(batch["image"])
    real = torch.where(kind >= 0, score, -1.0)
    assert (real.diff(dim=1) <= 1e-6).all() and (score <= 1).all()
    again = system.detect(batch["image"])
    assert torch.equal(boxes, again[0]), "drawn with its own seed"


def test_key_points_are_the_likeliest_numbers_or_hidden(system, batch):
    """A decoder that always writes the same five points, the third of them hidden."""
    places = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.5], [0.6, 0.7], [0.8, 0.9]])
    written = system.v.place_tokens(places)
    written[5] = HIDDEN                      # half a point is none

    def tokens(seen, prompt, count, choose):
        assert count == 10 and (prompt[:, 0] == KEYPOINTS).all()
        logits = torch.zeros(1, system.v.size)
        logits[0, HIDDEN] = 1.0
        assert choose(logits).item() == HIDDEN
        logits[0, system.v.bins_from + 7], logits[0, 5] = 2.0, 9.0
        assert choose(logits).item() == system.v.bins_from + 7, "nothing but numbers and hidden"
        return written[None].expand(len(seen), -1)
    system.tokens = tokens
    got = system.eval().keypoints(batch["image"], batch["boxes"].clamp(0, 1))
    assert got.shape == (4, 2, 5, 3) and got[0, 0, :, 2].tolist() == [1, 1, 0, 1, 1] and (got[0, 0, 2] == 0).all()
    assert (got[0, 0, [0, 1, 3, 4], :2] - places[[0, 1, 3, 4]]).abs().max() <= 0.0051


def test_masks_are_the_share_of_drawn_outlines(system, batch):
    """A decoder that always writes the same square gives that square, in full agreement."""
    square = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]]).repeat_interleave(4, 0)
    calls = []

    def tokens(seen, prompt, count, choose):
        calls.append((len(seen), prompt))
        return system.v.place_tokens(square)[None].expand(len(seen), -1)
    system.tokens = tokens
    logits, agree = system.eval().segment(batch["image"], boxes=batch["boxes"].clamp(0, 1))
    assert calls[0][0] == 4 * 2 * 8 and (calls[0][1][:, 0] == SEGMENT).all() and logits.shape == (4, 2, 1, 32, 32)
    assert torch.equal(logits[0, 0, 0] > 0, filled(square, 32, 32)) and (agree == 1).all()
    half = torch.stack([square * 0.0, square]).repeat(4, 1, 1)
    system.tokens = lambda seen, prompt, count, choose: system.v.place_tokens(half).repeat(len(seen) // 8, 1)
    assert not (system.segment(batch["image"], boxes=batch["boxes"].clamp(0, 1))[0] > 0).any(), "half of them is no majority"
    for wrong in ({}, {"points": torch.rand(4, 1, 1, 2)}, {"boxes": torch.rand(4, 4)}):
        with pytest.raises(UserError):
            system.segment(batch["image"], **wrong)


def test_polygons_are_filled_by_the_even_odd_rule():
    star = torch.tensor([[0.513, 0.057], [0.811, 0.943], [0.049, 0.411], [0.937, 0.397], [0.203, 0.931]])
    inside = filled(star, 40, 40)
    for y in range(0, 40, 3):
        for x in range(0, 40, 3):
            px, py, n = (x + 0.5) / 40, (y + 0.5) / 40, 0
            for k in range(5):
                (x0, y0), (x1, y1) = star[k].tolist(), star[(k + 1) % 5].tolist()
                if (y0 > py) != (y1 > py) and x0 + (py - y0) * (x1 - x0) / (y1 - y0) > px:
                    n += 1
            assert inside[y, x] == (n % 2 == 1)


def test_outlines_of_masks_give_the_masks_back():
    data = source("scenes?n=6&seed=4&digits=0&shapes=circle,square,star,heart,cross")
    for i in range(6):
        for mask in data[i]["mask"]:
            again = filled(torch.from_numpy(outline(mask)), 64, 64).numpy()
            largest = again.sum() / max(1, mask.sum())
            assert (again & mask).sum() / (again | mask).sum() > 0.85 or largest < 0.9, "the largest piece"
    assert (outline(np.zeros((4, 4), bool)) == -1).all()


def test_loader_makes_polygons_and_keypoints_in_the_frame():
    preset = preset_of("pix2seq_v2")
    keys = ("image", "boxes", "box_label", "mask", "polygon", "keypoints")
    made = next(iter(Loader(source("scenes?n=4"), preset.feed, None, batch_size=4, train=False, needs=keys)))
    assert made["polygon"].shape[2:] == (128, 2) and made["keypoints"].shape[2:] == (5, 3)
    real = made["box_label"] >= 0
    low, high = made["polygon"][real].amin(1), made["polygon"][real].amax(1)
    assert (low >= made["boxes"][real][:, :2] - 0.02).all() and (high <= made["boxes"][real][:, 2:] + 0.02).all()
    shown = made["keypoints"][..., 2] > 0
    column, row = ((made["keypoints"][..., k] * 64).long().clamp(0, 63) for k in (0, 1))
    for b, n, k in shown.nonzero():
        assert made["mask"][b, n, row[b, n, k], column[b, n, k]]
    assert (made["keypoints"][~real] == -1).all() and shown.any()


def test_a_few_steps_lower_all_four_losses(system, batch):
    stage = preset_of("pix2seq_v2").stages[0].but(**{"steps": 8, "batch_size": 4, "optim.warmup": 2})
    steps = list(fit(system, stage, iter([batch] * 8)))
    assert all(steps[-1].losses[k] < 0.9 * steps[0].losses[k] for k in ("detect", "segment", "keypoints", "caption"))


def test_pipeline_finds_outlines_and_describes(system, tmp_path):
    class Words:
        pad = 0

        def __call__(self, texts):
            return torch.tensor([[1, 5, 2]] * len(texts))

        def decode(self, row):
            return " ".join(str(int(i)) for i in row if i > 2)
    pipeline = Pipeline(system, preset_of("pix2seq_v2"), Words(), id="pix2seq_v2")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    found = pipeline.detect(tmp_path / "a.png", threshold=0.0)
    marked = pipeline.keypoints(tmp_path / "a.png", found)
    assert [(m.label, m.box) for m in marked] == [(d.label, d.box) for d in found] and all(len(m.points) == 5 for m in marked)
    assert all(p is None or (0 <= p[0] <= 1 and 0.1 <= p[1] <= 0.9) for m in marked for p in m.points), "in the square that is read"
    assert pipeline.keypoints(tmp_path / "a.png", []) == [] and "points" in marked[0].to_json() and "points" not in found[0].to_json()
    assert found and all(d.label in system.classes for d in found)
    assert pipeline.segment(tmp_path / "a.png", box=(0.2, 0.2, 0.7, 0.6)).masks.shape == (1, 80, 64)
    assert isinstance(pipeline.caption([tmp_path / "a.png"], max_new=4)[0], str)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match="no bytes"):
        pipeline.detect(tmp_path / "empty.png")


def test_detection_exam_is_one_for_the_truth_and_less_for_less():
    test = source("scenes?n=8&seed=3")
    preset = preset_of("pix2seq_v2")
    made = next(iter(Loader(test, preset.feed, None, batch_size=8, train=False, needs=("image", "boxes", "box_label"))))

    class Known(torch.nn.Module):
        shift = 0.0

        def detect(self, image):
            return made["boxes"] + self.shift, made["box_label"], torch.rand(made["box_label"].shape)
    subject = Pipeline(Known(), preset)
    result = take("detection", subject, test)
    assert result.metrics["ap50"].value == pytest.approx(1.0) and result.metrics["recall"].value == 1
    subject.system.shift = 0.3
    assert take("detection", subject, test).metrics["ap50"].value < 0.2
    with pytest.raises(UserError, match="overlap"):
        take("detection", subject, test, overlap=0.0)


def test_damaged_weights_are_one_clear_error(system, batch):
    with torch.no_grad():
        system.decoder.head.weight[5] = float("nan")
    boxes, said = batch["boxes"].clamp(0, 1), torch.ones(4, 1, dtype=torch.long)
    for call in (lambda: system.detect(batch["image"]), lambda: system.segment(batch["image"], boxes=boxes),
                 lambda: system.keypoints(batch["image"], boxes), lambda: system.generate_text(batch["image"], said, max_new=3)):
        with pytest.raises(UserError, match="not finite"):
            call()


def test_batches_without_objects_are_refused(system, batch):
    with pytest.raises(UserError, match="no picture of this batch"):
        system.write({**batch, "box_label": torch.full_like(batch["box_label"], -1)})
    with pytest.raises(UserError):
        system.detect(torch.randn(1, 1, 64, 64))
