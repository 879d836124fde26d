"""Random, block-wise and tube masks, and the two ways to hide."""
import pytest
import torch

from polysense.base.errors import UserError
from polysense.mechanisms.mask_sampler import BlockMask, DropHidden, FillHidden, RandomMask, TubeMask, masking_of
from polysense.nn.transformer import Transformer
from polysense.towers.vit import ViT


def test_random_mask_keeps_the_least_noise_and_restores():
    noise = torch.rand(3, 12)
    got = RandomMask.Config(ratio=0.75).build()(3, (3, 4), noise=noise)
    assert got.keep.shape == (3, 3) and got.hidden.shape == (3, 9) and torch.equal(got.mask.sum(1), torch.full((3,), 9))
    assert torch.equal(got.keep, noise.argsort(1)[:, :3]) and not got.mask.gather(1, got.keep).any() and got.mask.gather(1, got.hidden).all()
    x = torch.randn(3, 12, 2)
    both = torch.cat([got.at_visible(x), got.at_hidden(x)], 1)
    assert torch.equal(both.gather(1, got.restore[..., None].expand_as(x)), x)
    assert torch.equal(got.restore.gather(1, got.order), torch.arange(12).expand(3, -1))


def test_samples_have_masks_of_their_own_and_seeds_repeat_them():
    sampler = RandomMask.Config().build()
    torch.manual_seed(3)
    one, two = sampler(64, (8, 8)), sampler(64, (8, 8))
    torch.manual_seed(3)
    assert torch.equal(sampler(64, (8, 8)).mask, one.mask) and not torch.equal(one.mask, two.mask)
    assert len(one.mask.unique(dim=0)) == 64
    assert 0.5 < one.mask.float().mean(0).min() < one.mask.float().mean(0).mean() == 0.75


def test_tubes_are_the_same_at_all_times():
    got = TubeMask.Config(ratio=0.9).build()(4, (8, 14, 14))
    rows = got.mask.view(4, 8, 196)
    assert (rows == rows[:, :1]).all() and (rows.sum(2) == int(0.9 * 196)).all() and got.keep.shape == (4, 8 * 20)
    assert (got.keep.diff(dim=1) > 0).all() and (got.hidden.diff(dim=1) > 0).all()


def test_blocks_of_beit():
    torch.manual_seed(0)
    got = BlockMask.Config().build()(256, (14, 14))
    counts = got.mask.sum(1)
    assert counts.max() <= 75 and counts.min() > 40 and counts.float().mean() > 70
    grid = got.mask.view(-1, 1, 14, 14).float()
    lonely = (grid * (torch.nn.functional.conv2d(grid, torch.ones(1, 1, 3, 3), padding=1) == 1)).sum()
    assert lonely < 0.005 * counts.sum(), "hidden patches come in rectangles"
    assert len(got.mask.unique(dim=0)) == 256


def test_blocks_can_be_filled_up_so_that_all_samples_hide_as_many():
    got = BlockMask.Config(fill="exact", hidden=30, least=6).build()(32, (10, 10))
    assert got.visible == 70 and (got.mask.sum(1) == 30).all()
    uneven = masking_of(torch.tensor([[True, False, False], [True, True, False]]))
    with pytest.raises(UserError, match="different numbers of hidden"):
        _ = uneven.keep


@pytest.mark.parametrize("make", [lambda: RandomMask.Config(ratio=1.0).build(), lambda: TubeMask.Config(ratio=-0.1).build(),
                                  lambda: BlockMask.Config(fill="some").build(), lambda: BlockMask.Config(hidden=20).build()(1, (4, 4))])
def test_impossible_masks_are_refused(make):
    with pytest.raises(UserError):
        make()


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return ViT.Config(image_size=16, patch=4, body=Transformer.Config(width=16, depth=1, heads=2)).build().eval()


def test_dropped_patches_are_neither_computed_nor_seen(tower):
    masking, image = RandomMask.Config(ratio=0.5).build()(2, (4, 4)), torch.randn(2, 3, 16, 16)
    got = DropHidden.Config().build()(tower, image, masking)
    noisy = torch.where(masking.mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3), torch.randn_like(image), image)
    assert got.shape == (2, 1 + 8, 16) and torch.equal(got, DropHidden.Config().build()(tower, noisy, masking))


def test_filled_patches_keep_their_place_but_not_their_content(tower):
    hide, image = FillHidden.Config(width=16).build(), torch.randn(2, 3, 16, 16)
    masking = masking_of(torch.rand(2, 16) < 0.4)
    got = hide(tower, image, masking)
    noisy = torch.where(masking.mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3), torch.randn_like(image), image)
    assert got.shape == (2, 17, 16) and torch.equal(got, hide(tower, noisy, masking))
    none = masking_of(torch.zeros(2, 16, dtype=torch.bool))
    torch.testing.assert_close(hide(tower, image, none), tower(image).tokens)
    embedded = tower.embed(image, fill=(masking.mask, hide.token))[0][:, 1:]
    torch.testing.assert_close(embedded[masking.mask], (hide.token + tower.position[:, 1:]).expand(2, -1, -1)[masking.mask])
