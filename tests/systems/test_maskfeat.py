"""MaskFeat's essence (Wei et al. 2022)."""
from math import atan2, floor, hypot, pi

import numpy as np
import pytest
import torch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.hog import HOGTarget, hog
from polysense.mechanisms.cube_mask import CubeMask
from polysense.train.fit import fit

recipe = polysense.load("maskfeat")
TOY = {"config.encoder.body.width": 24, "config.encoder.body.depth": 2, "config.encoder.body.heads": 2}


@pytest.fixture()
def maskfeat():
    torch.manual_seed(0)
    return preset_of("maskfeat").but(**TOY).config.build().eval()


@pytest.fixture()
def image():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def slow(image: np.ndarray, bins: int, cell: int) -> np.ndarray:
    """The definition, pixel by pixel: image [C,H,W] -> [C,K,h,w]."""
    c, height, width = image.shape
    x = np.pad(image.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    out = np.zeros((c, bins, height // cell, width // cell))
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    for k in range(c):
        for i in range(height):
            for j in range(width):
                near = x[k, i:i + 3, j:j + 3]
                gx, gy = float((near * kernel).sum()), float((near * kernel.T).sum())
                out[k, floor(atan2(gx, gy) / pi * bins) % bins, i // cell, j // cell] += hypot(gx, gy)
    length = np.sqrt((out ** 2).sum(1, keepdims=True))
    return out / np.where(length > 0, length, 1)


# -- the histograms ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bins, cell", [(9, 8), (9, 4), (6, 4)])
def test_hog_is_the_definition(bins, cell):
    picture = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(bins))
    want = np.stack([slow(p.numpy(), bins, cell) for p in picture])
    np.testing.assert_allclose(hog(picture, bins, cell).numpy(), want, atol=1e-5)


def test_hog_knows_neither_brightness_nor_contrast(image):
    torch.testing.assert_close(hog(image + 3), hog(image), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hog(image * 2.5), hog(image), atol=1e-5, rtol=1e-4)


def test_every_cell_has_length_one_or_is_flat(image):
    flat = image.clone()
    flat[:, :, :32] = 0.5
    lengths = hog(flat).norm(dim=2)
    assert torch.equal(lengths[:, :, :3], torch.zeros_like(lengths[:, :, :3])), "flat cells are zero"
    torch.testing.assert_close(lengths[:, :, 4:], torch.ones_like(lengths[:, :, 4:]))
    leaf = flat.requires_grad_()
    hog(leaf).square().sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_an_edge_lies_in_one_bin_and_a_quarter_turn_moves_it_by_half_of_them():
    edge = torch.zeros(1, 1, 16, 16)
    edge[..., 8:] = 1
    upright, lying = (hog(x)[0, 0].sum((1, 2)) for x in (edge, edge.transpose(2, 3)))
    assert (upright > 1e-6).sum() == (lying > 1e-6).sum() == 1
    apart = int(abs(upright.argmax() - lying.argmax()))
    assert apart in (4, 5), apart
    assert torch.equal(hog(1 - edge).argmax(2), hog(edge).argmax(2)), "a direction and its opposite are one"


def test_a_patch_of_16_pixels_is_108_numbers_in_the_order_channel_bin_cell():
    target = HOGTarget.Config(patch=16)
    assert target.width == 108
    picture = torch.randn(2, 3, 32, 48)
    whole, cells = target.build().whole(picture), hog(picture)
    assert whole.shape == (2, 6, 108)
    for patch, (row, column) in ((0, (0, 0)), (4, (1, 1))):
        got = whole[1, patch].view(3, 9, 2, 2)
        torch.testing.assert_close(got, cells[1, :, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2])
    with pytest.raises(UserError, match="cells divide the patch"):
        HOGTarget.Config(patch=16, cell=5).build()
    with pytest.raises(UserError, match="does not divide into cells"):
        hog(torch.randn(1, 3, 20, 20))


# -- the model --------------------------------------------------------------------------------------------------------------------------

def test_hidden_patches_are_a_token_and_the_target_is_of_the_whole_picture(maskfeat, image):
    masking = maskfeat.masking(image)
    tokens = maskfeat.see(image, masking)
    assert tokens.shape == (3, 65, 24), "all tokens pass the encoder"
    hidden = masking.mask.view(3, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, torch.randn_like(image), image)
    assert torch.equal(maskfeat.decoder(tokens, masking), maskfeat.decoder(maskfeat.see(other, masking), masking))
    assert not torch.equal(maskfeat.target(image, masking), maskfeat.target(other, masking))
    assert maskfeat.encoder.position is not None and maskfeat.encoder.position.requires_grad


def test_the_loss_is_one_linear_layer_against_the_histograms_of_hidden_patches(maskfeat, image):
    torch.manual_seed(2)
    masking = maskfeat.masking(image)
    said, truth = maskfeat.decoder.head(maskfeat.see(image, masking)[:, 1:]), maskfeat.target.whole(image)
    errors = [(said[b, n] - truth[b, n]).square().mean() for b in range(3) for n in range(64) if masking.mask[b, n]]
    torch.manual_seed(2)
    torch.testing.assert_close(maskfeat.losses({"image": image})["features"], torch.stack(errors).mean())
    assert {n for n, _ in maskfeat.decoder.named_parameters()} == {"head.weight", "head.bias"} and not list(maskfeat.target.parameters())


def test_published_settings():
    paper = preset_of("maskfeat", "paper")
    sampler, stage = paper.config.sampler, paper.stages[0]
    assert (sampler.hidden, sampler.least) == (78, 15) and paper.config.target.width == 108 and stage.optim.clip == 0.02
    assert (paper.feed.image.mean, paper.feed.image.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert stage.optim.lr == pytest.approx(2e-4 * stage.batch_size / 256) and paper.feed.train_image.scale == (0.5, 1.0)


def test_it_learns(maskfeat, image):
    stage = preset_of("maskfeat").stages[0].but(steps=15, **{"optim.warmup": 1})
    steps = list(fit(maskfeat, stage, iter([{"image": image}] * 15)))
    assert steps[-1].total < 0.95 * steps[0].total


def test_features_of_a_frozen_tower_in_place_of_histograms(image):
    torch.manual_seed(0)
    plan = preset_of("maskfeat", "tiny_dino").but(**TOY, **{"config.target.tower.body.depth": 1})
    system = plan.config.build()
    masking = system.masking(image)
    truth = system.target(image, masking)
    torch.testing.assert_close(truth.mean(-1), torch.zeros(len(truth)), atol=1e-5, rtol=0)
    before = {k: v.clone() for k, v in system.target.state_dict().items()}
    steps = list(fit(system, plan.stages[0].but(steps=10, **{"optim.warmup": 1}), iter([{"image": image}] * 10)))
    assert steps[-1].total < steps[0].total and all(torch.equal(v, before[k]) for k, v in system.target.state_dict().items())
    assert not system.target.tower.training, "a frozen teacher does not drop anything"
    with pytest.raises(UserError, match="the teacher has 16 patches"):
        plan.but(**{"config.target.tower.image_size": 16, "config.target.size": 16}).config.build().losses({"image": image})


# -- clips ------------------------------------------------------------------------------------------------------------------------------

SMALL = {"config.encoder.base": 16, "config.encoder.depth": 3, "config.encoder.doubled": (1, 2), "config.encoder.halved": (1,)}


@pytest.fixture()
def of_clips():
    torch.manual_seed(0)
    return preset_of("maskfeat", "tiny_video").but(**SMALL).config.build().eval()


@pytest.fixture()
def video():
    return torch.randn(3, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_boxes_of_space_and_time_hide_two_fifths_of_the_cells():
    torch.manual_seed(0)
    masks = CubeMask.Config().build()(200, (8, 14, 14)).mask.view(200, 8, 14, 14)
    cells = masks[:, :, ::2, ::2]
    assert torch.equal(cells.repeat_interleave(2, 2).repeat_interleave(2, 3), masks), "cells are two patches wide: a window of 8 x 7 x 7"
    hidden = cells.flatten(1).sum(1)
    assert hidden.max() <= round(0.4 * 8 * 49) and hidden.float().mean() > 0.95 * 0.4 * 8 * 49
    together = (cells[:, 1:] & cells[:, :-1]).float().mean() / cells.float().mean() ** 2
    assert together > 1.5, "what is hidden stays so for a while"
    frames = cells.flatten(2).sum(2)
    assert (frames.amax(1) > frames.amin(1)).float().mean() > 0.95, "but not, as a tube, for the whole clip"
    assert len(cells.flatten(1).unique(dim=0)) == 200
    with pytest.raises(UserError, match="does not divide into cells"):
        CubeMask.Config().build()(1, (8, 7, 7))


def test_the_target_of_a_cube_is_the_histograms_of_the_first_of_its_two_frames(of_clips, video):
    truth = of_clips.target.whole(video)
    assert truth.shape == (3, 8 * 4 * 4, 108)
    for time in (0, 5):
        one = HOGTarget.Config(patch=8, cell=4).build().whole(video[:, 2 * time])
        torch.testing.assert_close(truth[:, 16 * time:16 * (time + 1)], one)
    other = video.clone()
    other[:, 1::2] = torch.randn_like(other[:, 1::2])
    assert torch.equal(of_clips.target.whole(other), truth)


def test_the_loss_of_clips_is_one_linear_layer_at_hidden_cubes(of_clips, video):
    torch.manual_seed(2)
    masking = of_clips.masking(video)
    said, truth = of_clips.decoder.head(of_clips.see(video, masking)[:, 1:]), of_clips.target.whole(video)
    errors = [(said[b, n] - truth[b, n]).square().mean() for b in range(3) for n in range(128) if masking.mask[b, n]]
    torch.manual_seed(2)
    torch.testing.assert_close(of_clips.losses({"video": video})["features"], torch.stack(errors).mean())
    with pytest.raises(UserError, match="no clips"):
        of_clips.losses({"image": video[:, 0]})


def test_what_is_hidden_of_a_clip_is_not_seen_but_for_the_margin_of_the_first_convolution(of_clips, video):
    torch.manual_seed(3)
    assert not list(of_clips.doubts({"video": video}))
    masking = of_clips.masking(video)
    everything = torch.zeros_like(masking.mask)
    of_clips.hide.token.data.fill_(7.0)
    first = of_clips.encoder.embed(video, fill=(masking.mask, of_clips.hide.token))[:, 1:].unflatten(1, (8, 8, 8))
    plain = of_clips.encoder.embed(video, fill=(everything, of_clips.hide.token))[:, 1:].unflatten(1, (8, 8, 8))
    fine = masking.mask.view(3, 8, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (first[fine] == 7.0).all() and torch.equal(first[~fine], plain[~fine])


def test_the_grid_grows_coarser_as_blocks_grow_wider(of_clips, video):
    encoder, sizes, x, grid = of_clips.encoder, [], of_clips.encoder.embed(video), of_clips.encoder.first
    for block in encoder.blocks:
        x, grid = block(x, grid)
        sizes.append((grid, x.shape[-1], block.attn.heads))
    assert sizes == [((8, 8, 8), 32, 1), ((8, 4, 4), 64, 2), ((8, 4, 4), 64, 4)], "`mlp` widens a block before the heads double"
    assert [b.attn.pool_k.conv.stride[-1] for b in encoder.blocks] == [4, 2, 2] and encoder.blocks[1].attn.pool_q.conv.stride == (1, 2, 2)
    released = [preset_of("maskfeat", name).config.encoder for name in ("mvit_s", "mvit_l")]
    with torch.device("meta"):
        assert [e.build().grid for e in released] == [(8, 14, 14)] * 2, "the last stage keeps its grid"
    for wrong in ({"frames": 15}, {"image_size": 36}, {"widens": "both"}, {"halved": (0, 1)}, {"doubled": (9,)}):
        with pytest.raises(UserError, match="do not go together"):
            preset_of("maskfeat", "tiny_video").config.encoder.but(**wrong).build()


def test_scores_and_sums_know_where_things_are(of_clips, video):
    """Without relative positions and the pooled queries' own part a block would not tell one place from another."""
    attn, grid = of_clips.encoder.blocks[2].attn, (8, 4, 4)
    x = torch.randn(1, 1 + 128, 64)
    q = torch.randn(1, 4, 129, 16)
    bias = attn.apart(q, grid, (8, 2, 2))
    assert bias.shape == (1, 4, 129, 33) and (bias[..., 0] == 0).all() and (bias[:, :, 0] == 0).all(), "the class token has no place"
    time, row, column = 3, 2, 1                     # against the key at time 6, row 1, column 0 of a grid half as fine
    here = q[0, 2, 1 + time * 16 + row * 4 + column]
    want = here @ (attn.times[time - 6 + 7] + attn.rows[row - 2 * 1 + 2 * 1] + attn.columns[column - 0 + 2 * 1])
    torch.testing.assert_close(bias[0, 2, 1 + time * 16 + row * 4 + column, 1 + 6 * 4 + 1 * 2 + 0], want)
    with torch.no_grad():
        attn.out.weight.copy_(torch.eye(64)), attn.out.bias.zero_()
        full = attn(x, grid)[0]
        values = attn.qkv.weight[128:]
        attn.qkv.weight[128:], attn.qkv.bias[128:] = torch.zeros_like(values), 0.0
        attn.pool_v.norm.weight.zero_(), attn.pool_v.norm.bias.zero_()
        alone = attn(x, grid)[0]
        pooled = attn.pool_q((attn.qkv(x)[..., :64]).unflatten(-1, (4, 16)).transpose(1, 2), grid)[0].transpose(1, 2).flatten(2)
    assert not torch.allclose(full, alone)
    torch.testing.assert_close(alone[:, 1:], pooled[:, 1:])


def test_clips_are_learnt_and_encoded(of_clips, video):
    stage = preset_of("maskfeat", "tiny_video").stages[0].but(steps=15, **{"optim.warmup": 1})
    steps = list(fit(of_clips, stage, iter([{"video": video}] * 15)))
    assert steps[-1].total < 0.97 * steps[0].total
    of_clips.zero_grad(set_to_none=True)
    of_clips.losses({"video": video}).total().backward()
    assert not [n for n, p in of_clips.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    said = of_clips.eval().encode_video(video)
    torch.testing.assert_close(said.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(said[1:2], of_clips.encode_video(video[1:2]), rtol=1e-4, atol=1e-5)
    for wrong in (video[:, :8], video[..., :16, :16], video[:, 0], video[:, :, :1]):
        with pytest.raises(UserError, match="this tower reads"):
            of_clips.encode_video(wrong)


def test_published_settings_of_clips():
    plan = preset_of("maskfeat", "mvit_s")
    stage, encoder = plan.stages[0], plan.config.encoder
    assert (stage.batch_size, stage.optim.clip, stage.optim.lr) == (512, 0.02, pytest.approx(8e-4 * 512 / 256))
    assert (encoder.base, encoder.depth, encoder.halved, encoder.doubled, encoder.widens, encoder.frames) == (96, 16, (1, 3), (1, 3, 14), "mlp", 16)
    assert (plan.config.sampler.ratio, plan.config.target.patch, plan.config.target.cell, plan.feed.video.stride) == (0.4, 16, 8, 4)
