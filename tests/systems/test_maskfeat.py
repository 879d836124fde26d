"""MaskFeat's essence (Wei et al. 2022)."""
from math import atan2, floor, hypot, pi

import numpy as np
import pytest
import torch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.hog import HOGTarget, hog
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
