"""SAM's essence (Kirillov et al. 2023)."""
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.connectors.prompt import FIRST, INSIDE, OUTSIDE, PADDING, SECOND, PromptEncoder, places
from polysense.objectives.segment import boxes_of
from polysense.towers.sam_vit import GridAttention, SamViT, joined, windows
from polysense.train.fit import fit

recipe = polysense.load("sam")


@pytest.fixture()
def sam():
    torch.manual_seed(0)
    return preset_of("sam").config.build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(preset_of("sam"), ("image", "mask"), n=2)


def counting(module, method="forward"):
    """How often a method of a module is called, as a list that grows."""
    calls, plain = [], getattr(module, method)

    def wrapped(*args, **kwargs):
        calls.append((args, kwargs))
        return plain(*args, **kwargs)
    setattr(module, method, wrapped)
    return calls


def test_one_encoding_serves_eleven_rounds_of_prompts(sam, batch):
    looks, answers = counting(sam.vision, "map"), counting(sam, "answer")
    sam.train().interact(batch)
    assert len(looks) == 1 and len(answers) == 11


def test_rounds_start_with_one_prompt_add_eight_points_and_feed_logits_back(sam, batch):
    answers = counting(sam, "answer")
    sam.train().interact(batch)
    widths = [args[1].shape[1] for args, _ in answers]
    assert widths[0] == 2 and widths[-1] == 10 and sum(b - a for a, b in pairwise(widths)) == 8
    assert widths[-1] == widths[-2], "no point is added before the last round"
    blanks = [i for i in range(1, 10) if widths[i] == widths[i - 1]]
    assert len(blanks) == 1, "nor before one other round"
    assert answers[0][0][2] is None and all(args[2] is not None for args, _ in answers[1:])
    assert all(not args[2].requires_grad and args[2].min() < 0 for args, _ in answers[1:]), "unthresholded logits, without gradient"
    assert [kw["single"] for _, kw in answers] == [w > 2 for w in widths], "candidates while there is one prompt, then one answer"


def test_the_logits_fed_back_are_those_of_the_best_predicted_iou(sam, batch):
    said, plain = [], sam.answer

    def answer(*args, **kwargs):
        out = plain(*args, **kwargs)
        said.append((args[2] if len(args) > 2 else None, out))
        return out
    sam.answer = answer
    sam.train().interact(batch)
    (_, (logits, score)), (fed, _) = said[:2]
    best = score.argmax(1)
    assert logits.shape[1] == 3 and torch.equal(fed, logits[torch.arange(len(best)), best].detach())


def test_first_prompt_is_a_click_inside_or_a_noisy_box_with_equal_chance(sam, batch):
    truth = batch["mask"][0, :1].expand(600, -1, -1)
    place, kind = sam.first(truth)
    boxed = kind[:, 0] == FIRST
    assert 0.4 < boxed.float().mean() < 0.6
    assert (kind[boxed] == torch.tensor([FIRST, SECOND])).all() and (kind[~boxed] == torch.tensor([INSIDE, PADDING])).all()
    pixel = (place[~boxed, 0] * 64).round().long()
    assert truth[0][pixel[:, 1], pixel[:, 0]].all() and len(pixel.unique(dim=0)) > 100
    gap = place[boxed].flatten(1) - boxes_of(truth[:1])
    assert gap.abs().max() <= sam.jitter + 1e-6 and 0.005 < gap.std() < 0.04


def test_points_are_drawn_from_the_error_region_with_their_side():
    truth, logits = torch.zeros(400, 8, 8, dtype=torch.bool), torch.full((400, 8, 8), -1.0)
    truth[:, 2:6, 2:6], logits[:, 4:8, 2:6] = True, 1.0          # rows 2-3 missed, rows 6-7 added by mistake
    place, inside = recipe.error_point(logits, truth)
    row = (place[:, 1] * 8).round().long()
    assert set(row.tolist()) == {2, 3, 6, 7} and torch.equal(inside == 1, row < 4)
    place, inside = recipe.error_point(torch.where(truth, 1.0, -1.0), truth)
    assert (inside == 1).all(), "nowhere wrong: another place inside"


def test_point_order_does_not_change_masks(sam):
    sam.eval()
    image, points, label = torch.randn(1, 3, 64, 64), torch.rand(1, 2, 4, 2), torch.tensor([[[1, 0, 1, 1], [0, 1, 1, -1]]])
    with torch.no_grad():
        one, other = sam.segment(image, points, label), sam.segment(image, points.flip(2), label.flip(2))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_the_best_candidate_of_each_object_receives_gradient(sam, batch):
    logits, score = torch.randn(3, 3, 64, 64, requires_grad=True), torch.rand(3, 3)
    truth = batch["mask"].flatten(0, 1)[:3]
    sam.judged(logits, score, truth)[:2].sum().backward()
    assert (logits.grad.flatten(2).abs().sum(-1) > 0).sum(1).tolist() == [1, 1, 1]
    tokens = []                              # and through the decoder: one kernel of the three candidates for each object
    sam.decoder.kernels.register_forward_hook(lambda m, args, out: tokens.append(out) or out.retain_grad())
    place, kind = sam.first(truth)
    out, score = sam.answer(sam.look(batch["image"])[[0, 0, 1]], sam.prompt.tokens(place, kind), single=False)
    sam.judged(out, score, recipe.shrunk(truth, (32, 32)))[:2].sum().backward()
    assert (tokens[0].grad.abs().sum(-1) > 0).sum(1).tolist() == [1, 1, 1]


def test_iou_head_learns_the_iou_of_every_candidate(sam, batch):
    truth = batch["mask"].flatten(0, 1)[:1]
    full = torch.where(truth, 5.0, -5.0)[:, None].expand(-1, 3, -1, -1)
    assert sam.judged(full, torch.ones(1, 3), truth)[2] == 0
    assert sam.judged(full, torch.tensor([[1.0, 0.5, 1.0]]), truth)[2].item() == pytest.approx(0.25 / 3)


def test_no_mask_is_the_learned_vector_and_a_zero_mask_encoder_reproduces_it(sam):
    seen = torch.randn(2, 128, 8, 8)
    want = sam.prompt.dense(seen)
    torch.testing.assert_close(want, seen + sam.prompt.no_mask[None, :, None, None])
    with torch.no_grad():
        sam.prompt.mask.conv3.weight.zero_()
        sam.prompt.mask.conv3.bias.copy_(sam.prompt.no_mask)
    torch.testing.assert_close(sam.prompt.dense(seen, torch.randn(2, 32, 32)), want)


def test_fourier_frequencies_are_not_trained(sam, batch):
    before = sam.prompt.frequencies.clone()
    assert "prompt.frequencies" in sam.state_dict() and "prompt.frequencies" not in dict(sam.named_parameters())
    stage = preset_of("sam").stages[0].but(steps=2, batch_size=2)
    steps = list(fit(sam, stage, iter([batch] * 2)))
    assert len(steps) == 2 and torch.equal(before, sam.prompt.frequencies)


def test_what_a_place_is_weighs_as_much_as_where_it_is(sam):
    """A click inside and one outside, at one place, must differ as much as two places do: else the first lesson is to overlook the side."""
    place = torch.rand(200, 1, 2)
    inside, outside = (sam.prompt.tokens(place, torch.full((200, 1), k)) for k in (INSIDE, OUTSIDE))
    elsewhere = sam.prompt.tokens(torch.rand(200, 1, 2), torch.full((200, 1), INSIDE))
    side, move = (inside - outside).square().mean().sqrt(), (inside - elsewhere).square().mean().sqrt()
    assert side > 0.5 * move
    tokens = sam.decoder.mask_tokens
    assert torch.cdist(tokens, tokens).fill_diagonal_(9e9).min() > 0.5 * tokens.shape[1] ** 0.5, "and answers begin as different questions"


def test_position_code_is_that_of_the_paper():
    prompt = PromptEncoder(PromptEncoder.Config(width=8, image_size=10))
    x, y = 3, 7                              # pixels
    angle = 2 * torch.pi * (torch.tensor([2 * (x + 0.5) / 10 - 1, 2 * (y + 0.5) / 10 - 1]) @ prompt.frequencies)
    want = torch.cat([angle.sin(), angle.cos()])
    token = prompt.tokens(torch.tensor([[[x / 10, y / 10]]]), torch.tensor([[1]]))[0, 0]
    torch.testing.assert_close(token, want + prompt.kinds[2])
    torch.testing.assert_close(prompt.grid(10, 10)[y * 10 + x], want)
    box = prompt.tokens(*places(None, None, torch.tensor([[x / 10, y / 10, 1.0, 1.0]])))
    torch.testing.assert_close(box[0, 0], want + prompt.kinds[3])
    torch.testing.assert_close(prompt.tokens(torch.rand(1, 1, 2), torch.tensor([[-1]]))[0, 0], prompt.kinds[0])
    assert places(torch.rand(1, 2, 2), torch.ones(1, 2), None)[1].tolist() == [[1, 1, -1]], "points alone are followed by a padding point"


def test_windows_hide_the_rest_of_the_picture_from_all_but_the_global_blocks():
    torch.manual_seed(0)
    image, other = torch.randn(1, 3, 40, 40), None
    for whole, reaches in (((), False), ((1,), True)):
        tower = SamViT(SamViT.Config(image_size=40, patch=4, body=16, depth=2, heads=2, window=4, whole=whole, width=8)).eval()
        tower.neck = torch.nn.Identity()     # its 3x3 convolution looks over the border
        other = image.clone()
        other[..., 36:, 36:] += 1.0
        gap = (tower.map(image) - tower.map(other)).abs().amax(1)[0]
        assert (gap[:8, :8].max() > 1e-6) == reaches and gap[9, 9] > 0


def test_windows_come_back_where_they_were():
    x = torch.randn(2, 5, 7, 3)
    assert windows(x, 4).shape == (2 * 2 * 2, 4, 4, 3) and torch.equal(joined(windows(x, 4), (5, 7)), x)


def test_relative_positions_are_decomposed_as_the_plain_loops_say():
    attn = GridAttention(GridAttention.Config(width=8, heads=2, side=3))
    torch.nn.init.normal_(attn.rows)
    torch.nn.init.normal_(attn.columns)
    x = torch.randn(1, 3, 3, 8)
    q, k, v = (f(x).view(9, 2, 4).transpose(0, 1) for f in (attn.q, attn.k, attn.v))
    score = torch.zeros(2, 9, 9)
    for n in range(2):
        for i in range(9):
            for j in range(9):
                dy, dx = i // 3 - j // 3, i % 3 - j % 3
                score[n, i, j] = q[n, i] @ k[n, j] / 2 + q[n, i] @ attn.rows[dy + 2] + q[n, i] @ attn.columns[dx + 2]
    want = attn.out((score.softmax(-1) @ v).transpose(0, 1).reshape(1, 3, 3, 8))
    torch.testing.assert_close(attn(x), want)


def test_paper_shapes_are_those_of_the_paper():
    paper = preset_of("sam", "paper")
    with torch.device("meta"):
        sam = paper.config.build()
        seen = sam.vision.neck(torch.empty(1, 1280, 64, 64))
    with torch.no_grad():
        mask, score = paper.config.decoder.build()(torch.randn(1, 256, 64, 64), torch.randn(1, 2, 256), torch.randn(64 * 64, 256), single=False)
    assert seen.shape == (1, 256, 64, 64) and mask.shape == (1, 3, 256, 256) and score.shape == (1, 3)
    assert [i for i, b in enumerate(sam.vision.blocks) if not b.window] == [7, 15, 23, 31] and sam.vision.blocks[0].window == 14
    assert sam.decoder.blocks[0].to_image.q.out_features == 128 and sam.decoder.blocks[0].mlp.up.out_features == 2048
    assert sam.decoder.kernels.layers[-1].weight.shape == (4, 32, 256) and dict(paper.stages[0].weights) == {"focal": 20.0}
    assert paper.feed.image.fit == "corner" and paper.feed.image.size == 1024


def test_pictures_are_encoded_once_and_again_when_they_or_the_weights_change(sam):
    sam.eval()
    looks, image, boxes = counting(sam.vision, "map"), torch.randn(1, 3, 64, 64), torch.tensor([[[0.1, 0.1, 0.5, 0.5]]])
    with torch.inference_mode():
        first = sam.segment(image, boxes=boxes)[0]
        sam.segment(image, torch.rand(1, 1, 1, 2), torch.ones(1, 1, 1))
        assert len(looks) == 1
        sam.segment(image + 1e-3, boxes=boxes)
        assert len(looks) == 2
    with torch.no_grad():
        sam.vision.neck.conv1.weight.mul_(2.0)
        assert not torch.allclose(sam.segment(image, boxes=boxes)[0], first) and len(looks) == 3
    sam.segment(image, boxes=boxes)[0].sum().backward()
    assert sam._seen is None, "weights may change after that, unseen: fused optimisers do not count versions"
    assert sam.vision.neck.conv1.weight.grad is not None, "with gradient nothing is remembered"


def test_words_are_read_as_clip_features_of_the_crop_in_training_and_of_a_text_at_test():
    torch.manual_seed(0)
    preset = preset_of("sam", "words")
    sam = preset.config.build()
    batch = fake_batch(preset, ("image", "mask"), n=2)
    with pytest.raises(UserError, match="no CLIP"):
        preset_of("sam").config.build().speak(batch)
    seen = counting(sam.clip, "image")
    sam.choose_trainable(preset.stages[0].trainable)
    losses = sam.train().speak(batch)
    losses.total(preset.stages[0].weights).backward()
    assert len(seen) == 1 and seen[0][0][0].shape == (3, 3, 64, 64) and sam.prompt.words.weight.grad.abs().sum() > 0
    assert not sam.clip.training and all(p.grad is None for p in sam.clip.parameters())
    text = torch.tensor([[[1, 7, 9, 2]]])
    said = counting(sam.clip, "said")
    with torch.no_grad():
        mask, score = sam.eval().segment_text(batch["image"][:1], text)
        other, _ = sam.segment_text(batch["image"][:1], text + torch.tensor([0, 1, 1, 0]))
    assert mask.shape == (1, 1, 3, 32, 32) and score.shape == (1, 1, 3) and len(said) == 2 and not torch.allclose(mask, other)


def test_crops_show_the_object_in_their_middle():
    image = torch.zeros(1, 1, 32, 32)
    image[..., 8:16, 4:12] = 1.0
    crop = recipe.crops(image, torch.tensor([[4 / 32, 8 / 32, 12 / 32, 16 / 32]]), 16)
    rows = (crop[0, 0] > 0.5).any(1).nonzero().flatten()
    assert crop[0, 0, 8, 8] == 1 and abs(rows.float().mean() - 7.5) < 0.6 and 8 <= len(rows) <= 16


def test_tiny_learns_to_answer_a_prompt():
    """A handful of steps on one batch: the loss falls by a good part."""
    torch.manual_seed(0)
    preset = preset_of("sam").but(**{"config.rounds": 4, "config.objects": 2, "stages.0.steps": 20, "stages.0.optim.warmup": 3})
    batch = fake_batch(preset, ("image", "mask"), n=2)
    losses = [step.total for step in fit(preset.config.build(), preset.stages[0], iter([batch] * 20))]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), losses


@pytest.mark.parametrize(("prompts", "says"), [
    ({}, "nothing says what"),
    ({"points": torch.rand(1, 2, 2)}, "points has shape"),
    ({"boxes": torch.rand(1, 1, 3)}, "boxes has shape"),
    ({"point_label": torch.ones(1, 1, 1)}, "without points"),
    ({"points": torch.rand(1, 1, 2, 2), "boxes": torch.rand(1, 2, 4)}, "different numbers"),
    ({"points": torch.rand(1, 1, 1, 2), "point_label": torch.full((1, 1, 1), 7)}, "none of 1, 0 and -1"),
    ({"boxes": torch.tensor([[[0.1, float("nan"), 0.2, 0.3]]])}, "not finite"),
    ({"boxes": torch.rand(1, 1, 4), "mask": torch.rand(1, 1, 9, 9)}, "mask prompt of 9x9"),
])
def test_prompts_of_another_form_are_refused(sam, prompts, says):
    with pytest.raises(UserError, match=says):
        sam.eval().segment(torch.randn(1, 3, 64, 64), **prompts)


def test_pictures_of_another_form_and_batches_without_masks_are_refused(sam, batch):
    boxes = torch.rand(1, 1, 4)
    for image in (torch.randn(1, 1, 64, 64), torch.randn(1, 3, 32, 32), torch.randn(3, 64, 64)):
        with pytest.raises(UserError):
            sam.segment(image, boxes=boxes)
    with pytest.raises(UserError, match="no picture of this batch"):
        sam.interact({**batch, "mask": torch.zeros_like(batch["mask"])})


def test_objects_of_a_picture_are_limited_by_lot():
    torch.manual_seed(0)
    sam = preset_of("sam").but(**{"config.objects": 2}).config.build()
    mask = torch.zeros(2, 5, 8, 8, dtype=torch.bool)
    mask[0, :, 1, 1] = mask[1, 0, 2, 2] = True
    seen = {tuple(sorted(F.one_hot(sam.chosen(mask)[0], 2).sum(0).tolist())) for _ in range(3)}
    assert seen == {(1, 2)}
