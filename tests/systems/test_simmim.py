"""SimMIM's essence (Xie et al. 2022)."""
from math import ceil

import pytest
import torch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.shuffle import ShuffleHead
from polysense.mechanisms.mask_sampler import CellMask
from polysense.nn.masking import masking_of
from polysense.nn.patch import patchify
from polysense.towers.beit import shared_bias
from polysense.towers.swin import Swin
from polysense.train.fit import fit

recipe = polysense.load("simmim")
TOY = {"config.encoder.base": 16, "config.encoder.depths": (1, 2)}


@pytest.fixture()
def simmim():
    torch.manual_seed(0)
    return preset_of("simmim").but(**TOY).config.build().eval()


@pytest.fixture()
def image():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def under(image, masking, patch=4):
    """True on hidden pixels, [B,1,H,W]."""
    side = image.shape[-1] // patch
    return masking.mask.view(-1, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def test_cells_are_hidden_whole_and_do_not_depend_on_the_encoders_patches():
    for side, grid in ((8, 48), (2, 12)):                                        # a Swin of patch 4 and a ViT of patch 16, of 192 px
        masking = CellMask.Config(side=side).build()(50, (grid, grid))
        cells = masking.mask.view(50, 6, side, 6, side).transpose(2, 3).flatten(3)
        assert torch.equal(cells.any(-1), cells.all(-1)) and (cells.all(-1).sum((1, 2)) == ceil(0.6 * 36)).all()
        assert masking.visible == (36 - ceil(0.6 * 36)) * side ** 2 and len(masking.mask.unique(dim=0)) == 50
    with pytest.raises(UserError, match="cells of 5x5"):
        CellMask.Config(side=5).build()(1, (12, 12))
    with pytest.raises(UserError):
        CellMask.Config(side=0).build()
    for name, side in (("paper", 8), ("vit_b_16", 2)):
        plan = preset_of("simmim", name).config
        assert plan.sampler.side * plan.target.patch == 32 and plan.sampler.side == side and plan.sampler.ratio == 0.6


def test_the_token_replaces_normed_embeddings_and_every_token_is_computed(simmim, image):
    masking, seen = simmim.masking(image), []
    x = simmim.encoder.embed(image, fill=(masking.mask, simmim.hide.token)).flatten(1, 2)
    assert torch.equal(x[masking.mask], simmim.hide.token[0].expand(int(masking.mask.sum()), -1)) and simmim.hide.token.shape == (1, 1, 16)
    assert torch.equal(x[~masking.mask], simmim.encoder.embed(image).flatten(1, 2)[~masking.mask])
    for block in (b for s in simmim.encoder.stages for b in s.blocks):
        block.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1:3].numel()))
    assert simmim.see(image, masking).shape == (3, 64, 32) and seen == [256, 64, 64], "MAE's encoder would compute a part of them"
    vit = shared_bias(64, 8, 32, 1, 2, 0.1).build()
    vit.body.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    vit(image, fill=(torch.ones(3, 64, dtype=torch.bool), torch.zeros(1, 1, 32)))
    assert seen[-1] == 65


def test_what_is_hidden_does_not_change_what_is_drawn_and_windows_carry_what_is_seen(simmim, image):
    masking = simmim.masking(image)
    other = torch.where(under(image, masking), torch.randn_like(image), image)
    assert torch.equal(simmim.decoder(simmim.see(image, masking), masking), simmim.decoder(simmim.see(other, masking), masking))
    drawn = simmim.reconstruct(image, masking)
    torch.testing.assert_close(torch.where(under(image, masking), 0, drawn), torch.where(under(image, masking), 0, image))
    assert list(simmim.doubts({"image": image})) == []


def test_one_linear_layer_and_pixelshuffle(image):
    head = ShuffleHead.Config(stride=8, patch=4, into=5).build()
    tokens = torch.randn(2, 4, 5)
    drawn = head.draw(tokens)
    want = torch.nn.functional.pixel_shuffle(head.conv(tokens.transpose(1, 2).unflatten(2, (2, 2))), 8)
    torch.testing.assert_close(drawn, want)
    moved = tokens.clone()
    moved[:, 1] += 1                                                             # place (0, 1)
    changed = (head.draw(moved) != drawn).any(1)
    assert changed[:, :8, 8:].all() and not changed[:, 8:].any() and not changed[:, :, :8].any()
    masking = masking_of(torch.rand(2, 16) < 2)
    torch.testing.assert_close(head(tokens, masking), patchify(drawn, 4))
    assert sum(1 for m in recipe.SimMIM(preset_of("simmim").config).decoder.modules() if list(m.parameters(recurse=False))) == 1
    with pytest.raises(UserError, match="patches divide the stride"):
        ShuffleHead.Config(stride=8, patch=3, into=5).build()


def test_the_loss_is_the_mean_absolute_error_of_hidden_pixels(simmim, image):
    torch.manual_seed(3)
    masking = simmim.masking(image)
    hidden = under(image, masking).float()
    drawn = simmim.decoder.draw(simmim.see(image, masking))
    by_hand = ((drawn - image).abs() * hidden).sum() / (hidden.sum() + 1e-5) / 3
    torch.manual_seed(3)
    torch.testing.assert_close(simmim.losses({"image": image})["pixels"], by_hand)
    _, target = simmim.pairs(image, masking)
    torch.testing.assert_close(target, masking.at_hidden(patchify(image, 4)))
    perfect = torch.where(hidden > 0, image, torch.randn_like(image))            # right where it is hidden, anything elsewhere
    assert recipe.masked_l1(masking.at_hidden(patchify(perfect, 4)), target) == 0


def test_distance_is_that_of_every_hidden_pixel_to_its_nearest_visible_one(simmim, image):
    masking = simmim.masking(image[:2])
    far = [torch.cdist(one.nonzero().float(), (~one).nonzero().float()).amin(1) for one in under(image[:2], masking)[:, 0]]
    torch.testing.assert_close(simmim.distance(image[:2], masking), torch.cat(far).mean(), rtol=1e-4, atol=1e-4)
    beside = masking_of(torch.arange(256)[None] % 16 == 0)                       # one column of patches of 4 px: 4, 3, 2 and 1 px away
    assert float(simmim.distance(image[:1], beside)) == pytest.approx(2.5)
    cells = [float(simmim.distance(image, CellMask.Config(side=s).build()(3, (16, 16)))) for s in (1, 4)]
    assert cells[0] < 0.6 * cells[1], "small cells lie beside what is visible"


def test_published_settings():
    paper, vit = preset_of("simmim", "paper"), preset_of("simmim", "vit_b_16")
    stage = paper.stages[0]
    assert stage.optim.lr == pytest.approx(1e-4 * 2048 / 512) and stage.optim.schedule == "step" and stage.optim.milestones == (700 / 800,)
    assert stage.optim.clip == 5.0 and paper.config.encoder.window == 6 and paper.config.decoder.stride == 32 and paper.feed.image.size == 192
    assert vit.config.encoder.position == "none" and vit.config.encoder.body.block.layer_scale == 0.1 and vit.config.decoder.stride == 16
    view = paper.feed.train_image
    assert view.scale == (0.67, 1.0) and view.flip == 0.5 and (view.jitter, view.grey, view.blur) == (0, 0, 0)


def test_it_learns_and_reads_other_sizes(simmim, image):
    stage = preset_of("simmim").stages[0].but(steps=12, **{"optim.warmup": 1})
    steps = list(fit(simmim, stage, iter([{"image": image}] * 12)))
    assert steps[-1].total < steps[0].total
    assert simmim.encode_image(torch.randn(1, 3, 96, 96)).shape == (1, 32) and Swin.Config().width == 768
    with pytest.raises(UserError, match="divide"):
        simmim.losses({"image": torch.randn(1, 3, 62, 62)})
