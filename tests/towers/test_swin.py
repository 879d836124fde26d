"""The Swin tower against timm, and what its windows mean."""
import pytest
import torch
from reference import reference, shake

from polysense.towers.swin import Swin, from_windows, into_windows, regions
from polysense.weights.keymap import load_into
from polysense.weights.swin_timm import TIMM, sizes

SMALL = Swin.Config(patch=4, base=16, depths=(2, 2, 2), heads=(1, 2, 4), window=4)


@pytest.mark.parametrize("size", [64, 56])
@torch.no_grad()
def test_maps_and_pooled_are_timms(size):
    """At 56 pixels the maps are 14 and 7 wide: padded for their windows, and for the halving."""
    timm = reference("timm.models.swin_transformer")
    theirs = shake(timm.SwinTransformer(img_size=size, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2, 2), num_heads=(1, 2, 4),
                                        num_classes=0))
    state = theirs.state_dict()
    assert Swin.Config(**sizes(state, "")) == SMALL
    ours = SMALL.build().eval()
    load_into(ours, TIMM, state)
    image = torch.randn(2, 3, size, size)
    maps, x = ours.features(image), theirs.patch_embed(image)
    for layer, got in zip(theirs.layers, maps, strict=True):
        x = layer(x)
        torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(image).pooled, theirs(image), rtol=1e-4, atol=1e-4)
    back = TIMM.save(ours.state_dict())
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())


def test_windows_there_and_back():
    x = torch.randn(2, 8, 12, 3)
    assert into_windows(x, 4).shape == (2 * 6, 16, 3) and torch.equal(from_windows(into_windows(x, 4), 4, (8, 12)), x)


def test_a_plain_block_looks_no_further_than_its_window_and_a_shifted_one_does():
    torch.manual_seed(0)
    tower = SMALL.build().eval()
    plain, shifted = tower.stages[0].blocks
    x = torch.randn(1, 8, 8, 16)
    y = x.clone()
    y[0, 3, 3] += 1.0
    for block, rows in ((plain, range(4)), (shifted, range(2, 6))):
        moved = (block.look(y) - block.look(x)).abs().amax(-1)[0] > 1e-7
        assert sorted({int(r) for r in moved.nonzero()[:, 0]}) == list(rows) == sorted({int(c) for c in moved.nonzero()[:, 1]})


def test_what_a_shift_brings_together_from_two_edges_stays_apart():
    apart = regions((8, 8), 4, 2, torch.device("cpu"))
    assert apart.shape == (4, 1, 16, 16) and (apart[0] == 0).all() and (apart[3, 0] != 0).any()
    tower = SMALL.build().eval()
    x = torch.randn(1, 8, 8, 16)
    y = x.clone()
    y[0, 0, 0] += 1.0
    moved = (tower.stages[0].blocks[1].look(y) - tower.stages[0].blocks[1].look(x)).abs().amax(-1)[0] > 1e-6
    assert int(moved.nonzero().max()) == 1, "the far edge shares the window, and is not seen"
