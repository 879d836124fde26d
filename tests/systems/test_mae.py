"""MAE's essence (He et al. 2022)."""
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
from polysense.decoders.pixels import PixelTarget
from polysense.nn.patch import patchify, unpatchify
from polysense.objectives.masked import masked_mse
from polysense.pipeline import Pipeline
from polysense.train.fit import fit

recipe = polysense.load("mae")
TOY = {"config.encoder.body": recipe.tower(32, 2, 2), "config.decoder.body": recipe.tower(16, 2, 2), "config.encoder.image_size": 32}


@pytest.fixture(scope="module")
def preset():
    return preset_of("mae").but(**TOY)


@pytest.fixture()
def mae(preset):
    torch.manual_seed(0)
    return preset.config.build()


@pytest.fixture()
def image():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def noisy(image, masking):
    """Other pixels under the mask."""
    hidden = masking.mask.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return torch.where(hidden, torch.randn_like(image), image)


def test_masking_is_by_noise_and_restore_undoes_the_shuffle(mae):
    noise = torch.rand(3, 16)
    masking = mae.sampler(3, (4, 4), noise=noise)
    assert masking.visible == int(16 * 0.25) == masking.keep.shape[1] and (masking.mask.sum(1) == 12).all()
    assert torch.equal(masking.order, noise.argsort(1)) and torch.equal(masking.restore, masking.order.argsort(1))
    assert torch.equal(torch.arange(16).expand(3, -1).gather(1, masking.order).gather(1, masking.restore), torch.arange(16).expand(3, -1))


def test_the_encoder_computes_visible_patches_and_class_token_only(mae, image):
    seen = []
    for block in mae.encoder.body.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    mae.losses({"image": image})
    assert seen == [1 + int(16 * 0.25)] * 2
    assert {n for n, _ in mae.named_parameters() if "token" in n} == {"decoder.token"}, "no mask token enters the encoder"
    with torch.device("meta"):
        big = preset_of("mae", "vit_b_16").config
        assert (big.encoder.image_size // big.encoder.patch) ** 2 == 196 and int(196 * (1 - big.sampler.ratio)) == 49


def test_what_is_hidden_changes_nothing_in_the_encoder_or_the_drawing(mae, image):
    mae.eval()
    masking = mae.masking(image)
    other = noisy(image, masking)
    assert torch.equal(mae.see(image, masking), mae.see(other, masking))
    assert torch.equal(mae.decoder(mae.see(image, masking), masking), mae.decoder(mae.see(other, masking), masking))
    drawn = mae.reconstruct(image, masking)
    torch.testing.assert_close(drawn, mae.reconstruct(other, masking))
    torch.testing.assert_close(masking.at_visible(patchify(drawn, 8)), masking.at_visible(patchify(image, 8)))


def test_positions_are_added_before_the_masking_and_are_no_parameters(mae, image):
    masking = mae.masking(image)
    tokens, _ = mae.encoder.embed(image, masking.keep)
    everything, _ = mae.encoder.embed(image)
    torch.testing.assert_close(tokens[:, 1:], masking.at_visible(everything[:, 1:]))
    assert not any("position" in n for n, _ in mae.named_parameters()) and not mae.encoder.position.requires_grad
    assert {"encoder.position", "decoder.position"} <= set(mae.state_dict())
    mae.choose_trainable(("*",))
    assert not mae.encoder.position.requires_grad and not mae.decoder.position.requires_grad


def test_the_decoder_is_the_unshuffling_one_of_the_paper(mae, image):
    """Ours never unshuffles and computes the last block for hidden tokens only; the slow way gives the same numbers."""
    mae.eval()
    masking, d = mae.masking(image), mae.decoder
    x = d.embed(mae.see(image, masking))
    grid = torch.cat([x[:, 1:], d.token.expand(3, 12, -1)], 1).gather(1, masking.restore[..., None].expand(-1, -1, 16))
    whole = d.head(d.body(torch.cat([x[:, :1], grid], 1) + d.position))[:, 1:]
    torch.testing.assert_close(d.whole(mae.see(image, masking), masking), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d(mae.see(image, masking), masking), masking.at_hidden(whole), rtol=1e-4, atol=1e-5)


def test_published_decoder_and_optimiser():
    paper, base = preset_of("mae", "paper"), preset_of("mae", "vit_b_16").config
    body = paper.config.decoder.body
    assert (body.width, body.depth, body.heads) == (512, 8, 16) and base.encoder.body.width == 768
    optim, stage = paper.stages[0].optim, paper.stages[0]
    assert optim.lr == pytest.approx(1.5e-4 * stage.batch_size / 256) and optim.betas == (0.9, 0.95) and optim.weight_decay == 0.05
    assert paper.config.target.norm == "patch" and paper.config.sampler.ratio == 0.75
    view = paper.feed.train_image
    assert (view.jitter, view.grey, view.blur, view.solarize) == (0, 0, 0, 0) and view.flip == 0.5 and view.scale == (0.2, 1.0)


def test_the_loss_reads_hidden_patches_only(mae, image):
    mae.eval()
    masking = mae.masking(image)
    prediction, target = mae.pairs(image, masking)
    whole, patches = mae.decoder.whole(mae.see(image, masking), masking), patchify(image, 8)
    by_hand = (((whole - patches) ** 2).mean(-1) * masking.mask).sum() / masking.mask.sum()
    torch.testing.assert_close(masked_mse(prediction, target), by_hand)
    other = whole.masked_fill(~masking.mask[..., None], 1e3)
    torch.testing.assert_close(masked_mse(masking.at_hidden(other), target), by_hand)
    assert not target.requires_grad


def test_patches_are_row_column_channel_and_come_back(image):
    patches = patchify(image, 8)
    assert torch.equal(patches[1, 6].view(8, 8, 3)[2, 5], image[1, :, 8 + 2, 16 + 5])
    assert torch.equal(unpatchify(patches, (4, 4), 8), image)
    clip = torch.randn(2, 4, 3, 16, 24)
    cubes = patchify(clip, 8, 2)
    assert cubes.shape == (2, 2 * 2 * 3, 2 * 64 * 3) and torch.equal(unpatchify(cubes, (2, 2, 3), 8, 2), clip)


def test_normalised_targets(mae, image):
    target, masking = PixelTarget.Config(patch=8, norm="patch").build(), mae.masking(image)
    got = target(image, masking)
    torch.testing.assert_close(got.mean(-1), torch.zeros(3, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.var(-1, unbiased=True), torch.ones(3, 12), atol=1e-4, rtol=0)
    torch.testing.assert_close(target(3 * image - 2, masking), got, atol=1e-4, rtol=1e-4)
    patches = masking.at_hidden(patchify(image, 8))
    torch.testing.assert_close(got, (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5)
    drawn = target.paint(image, masking, got, (4, 4))
    assert drawn.shape == image.shape and drawn.isfinite().all()
    torch.testing.assert_close(drawn, target.paint(noisy(image, masking), masking, got, (4, 4)))


def test_mask_sampler_is_a_part_of_its_own(mae, image):
    """Token dropping at another ratio, without the decoder (FLIP, LanguageBind)."""
    half = recipe.RandomMask.Config(ratio=0.5).build()(3, (4, 4))
    assert mae.encoder(image, keep=half.keep).tokens.shape == (3, 1 + 8, 32)


def test_reconstruction_and_cover_draw_the_same_mask(mae, image):
    mae.eval()
    torch.manual_seed(5)
    drawn = mae.reconstruct(image)
    torch.manual_seed(5)
    covered = mae.cover(image)
    hidden = (covered == 0).all(1)
    assert hidden.float().mean() == 0.75
    assert torch.equal(drawn.permute(0, 2, 3, 1)[~hidden], image.permute(0, 2, 3, 1)[~hidden])


def test_tiny_learns_through_the_one_loop(preset):
    torch.manual_seed(0)
    system, stage = preset.config.build(), preset.stages[0].but(steps=25, batch_size=16, **{"optim.warmup": 2})
    feed = preset.feed.but(**{"image.size": 32, "train_image.size": 32})
    losses = [s.total for s in fit(system, stage, Loader(source("scenes:single?n=64"), feed, None, batch_size=16, needs=("image",)))]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_pipeline_reads_files_and_refuses_broken_ones(preset, mae, tmp_path):
    pipeline = Pipeline(mae.eval(), preset.but(**{"feed.image.size": 32}), id="mae")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert pipeline.encode(images=[tmp_path / "a.png"]).shape == (1, 32)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match="no bytes"):
        pipeline.encode(images=[tmp_path / "empty.png"])


@pytest.mark.parametrize("wrong, says", [(torch.randn(2, 1, 32, 32), "1 channels"), (torch.randn(3, 32, 32), "shape"),
                                         (torch.randn(2, 3, 30, 32), "does not divide|do not divide"), (torch.randn(2, 3, 48, 48), "a mask over 36")])
def test_wrong_pictures_are_refused_in_one_line(mae, wrong, says):
    with pytest.raises(UserError, match=says) as caught:
        mae.losses({"image": wrong})
    assert "\n" not in str(caught.value)


def test_pixels_that_are_no_numbers_stop_training_by_name(preset, mae):
    batch = fake_batch(preset.but(**{"feed.train_image.size": 32}), ("image",)) | {"index": torch.arange(4)}
    batch["image"][2, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"diverged.*2 hold values"):
        list(fit(mae, preset.stages[0].but(batch_size=4, steps=1), [batch]))
