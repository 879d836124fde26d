"""VideoMAE's essence (Tong et al. 2022)."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data import source
from polysense.data.loader import Loader
from polysense.decoders.pixels import PixelTarget
from polysense.mechanisms.mask_sampler import Masking, TubeMask, masking_of
from polysense.nn.patch import patchify
from polysense.objectives.masked import masked_mse
from polysense.pipeline import Pipeline
from polysense.train.fit import fit

recipe = polysense.load("videomae")
PRESET = preset_of("videomae").but(**{"config.encoder.body": recipe.body(24, 2, 2), "config.decoder.body": recipe.body(16, 2, 2)})


@pytest.fixture()
def system():
    torch.manual_seed(0)
    return PRESET.config.build()


@pytest.fixture()
def video():
    return torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def noisy(video, masking):
    """Other pixels in the hidden cubes."""
    hidden = masking.mask.view(-1, 8, 1, 4, 4).repeat_interleave(2, 1).repeat_interleave(8, 3).repeat_interleave(8, 4)
    return torch.where(hidden, torch.randn_like(video), video)


def test_published_sizes():
    paper = preset_of("videomae", "paper")
    c = paper.config
    grid = (c.encoder.frames // c.encoder.tubelet) * (c.encoder.image_size // c.encoder.patch) ** 2
    assert grid == 1568 and c.sampler.ratio == 0.9 and c.target.width == 1536 and c.target.norm == "channel"
    assert (c.decoder.body.width, c.decoder.body.depth, c.decoder.body.heads, c.decoder.bias, c.decoder.prefix) == (384, 4, 6, "head", 0)
    assert (paper.feed.video.frames, paper.feed.video.stride) == (16, 4)
    tuned = preset_of("videomae", "finetune")
    assert tuned.stages[0].optim.layer_decay == 0.75 and tuned.config.encoder.body.norm is None
    assert paper.feed.video.view.sides == (224, 340) and paper.feed.video.repeat == 1, "cut anywhere, at several sizes"
    assert tuned.feed.video.repeat == 2 and tuned.feed.video.view.flip == 0.5, "repeated augmentation"


def test_tubes_hide_the_same_cells_at_all_times():
    mask = TubeMask.Config(ratio=0.9).build()(3, (8, 14, 14)).mask.view(3, 8, 196)
    assert (mask == mask[:, :1]).all() and (mask.sum(2) == int(0.9 * 196)).all()


def test_the_encoder_computes_visible_cubes_only_and_nothing_else_reaches_it(system, video):
    system.eval()
    masking, seen = system.masking(video), []
    for block in system.encoder.body.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    tokens = system.see(video, masking)
    assert seen == [8 * 4] * 2, "no class token"
    assert torch.equal(tokens, system.see(noisy(video, masking), masking))
    torch.testing.assert_close(system.draw(video, masking), system.draw(noisy(video, masking), masking))
    with torch.device("meta"):
        big = preset_of("videomae", "paper").config
        sampler = big.sampler.build()
    assert 8 * (196 - int(sampler.ratio * 196)) == 160


def test_cubes_are_a_three_dimensional_convolution_plus_one_line_of_sines(system, video):
    got = system.encoder.embed(video)
    conv = system.encoder.patch(video.transpose(1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, conv + system.encoder.position, rtol=1e-4, atol=1e-5)
    place, column = np.arange(128)[:, None], np.arange(24)
    angle = place / 10000 ** (2 * (column // 2) / 24)
    table = np.where(column % 2 == 0, np.sin(angle), np.cos(angle))
    torch.testing.assert_close(system.encoder.position[0], torch.from_numpy(table).float(), rtol=1e-4, atol=1e-5)
    keep = torch.randperm(128)[:9].expand(2, -1)
    torch.testing.assert_close(system.encoder.embed(video, keep), got[:, keep[0]], rtol=1e-4, atol=1e-5)
    assert not any("position" in n for n, _ in system.named_parameters())


def test_keys_have_no_bias_queries_and_values_have(system):
    for body in (system.encoder.body, system.decoder.body):
        assert all(b.attn.k.bias is None and b.attn.q.bias is not None and b.attn.v.bias is not None for b in body.blocks)
    assert system.decoder.embed.bias is None and system.decoder.head.bias is not None


def test_the_decoder_does_not_mind_the_order_of_visible_cubes(system, video):
    system.eval()
    masking = system.masking(video)
    tokens = system.see(video, masking)
    swapped = torch.arange(32)
    swapped[[3, 11]] = swapped[[11, 3]]
    order = torch.cat([masking.order[:, :32][:, swapped], masking.order[:, 32:]], 1)
    other = system.decoder(tokens[:, swapped], Masking(masking.mask, order, masking.visible))
    torch.testing.assert_close(other, system.decoder(tokens, masking), rtol=1e-4, atol=1e-5)
    assert other.shape == (2, 96, 384)


def test_targets_are_normalised_by_cube_and_channel(system, video):
    masking = system.masking(video)
    target = system.target(video, masking).unflatten(-1, (-1, 3))
    torch.testing.assert_close(target.mean(-2), torch.zeros(2, 96, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(target.std(-2, unbiased=True), torch.ones(2, 96, 3), atol=1e-3, rtol=0)
    cubes = masking.at_hidden(patchify(video, 8, 2)).unflatten(-1, (-1, 3)) * torch.tensor(recipe.STD) + torch.tensor(recipe.MEAN)
    want = (cubes - cubes.mean(-2, keepdim=True)) / (cubes.var(-2, keepdim=True).sqrt() + 1e-6)
    torch.testing.assert_close(target, want, rtol=1e-4, atol=1e-5)
    flat = torch.randn(1, 1, 3, 1, 1).expand(1, 16, 3, 32, 32)
    one = system.masking(flat)
    assert system.target(flat, one).abs().max() < 0.3, "a coloured flat cube has nothing to draw"
    whole = PixelTarget.Config(patch=8, frames=2, norm="patch").build()(flat, one)
    assert whole.abs().max() > 0.5, "normalised over all channels it would have its colour"


def test_the_loss_is_of_hidden_cubes(system, video):
    system.eval()
    masking = system.masking(video)
    prediction, target = system.pairs(video, masking)
    torch.testing.assert_close(masked_mse(prediction, target), F.mse_loss(prediction, system.target.normalised(patchify(video, 8, 2))[masking.mask]
                                                                         .view(2, 96, -1)))
    assert torch.equal(masking.hidden, masking.mask.nonzero()[:, 1].view(2, -1)), "in the order of the clip, as boolean indexing gives them"


def test_tiny_learns_through_the_one_loop():
    torch.manual_seed(0)
    system, stage = PRESET.config.build(), PRESET.stages[0].but(steps=25, batch_size=4, **{"optim.warmup": 2, "optim.lr": 5e-3})
    batch = next(iter(Loader(source("scenes:clips?n=4&size=32&frames=16"), PRESET.feed, None, batch_size=4, needs=("video",))))
    losses = [s.total for s in fit(system, stage, [batch] * 25)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.parametrize("norm", ["none", "range", "channel"])
def test_painting_undoes_the_target(video, norm):
    target, masking = PixelTarget.Config(patch=8, frames=2, norm=norm, mean=recipe.MEAN, std=recipe.STD).build(), masking_of(
        torch.rand(2, 128).argsort(1) < 64)
    drawn = target.paint(video, masking, target(video, masking), (8, 4, 4))
    assert drawn.shape == video.shape
    if norm != "channel":                                     # which has given up brightness and contrast
        torch.testing.assert_close(drawn, video, rtol=1e-4, atol=1e-5)


def test_fine_tuning_reads_the_normed_mean_of_all_tokens(video):
    base = preset_of("videomae", "finetune")
    torch.manual_seed(0)
    system = base.config.but(**{"encoder": PRESET.config.encoder.but(**{"body.norm": None}), "head.into": 24, "head.out": 3}).build()
    system.choose_trainable(base.stages[0].trainable)
    system.recognise({"video": video, "label": torch.tensor([0, 2])}).total().backward()
    assert all(p.grad is not None for p in system.parameters())
    tokens = system.eval().encoder.body(system.encoder.embed(video))
    torch.testing.assert_close(system.classify_video(video), system.head.out(F.layer_norm(tokens.mean(1), (24,))), rtol=1e-4, atol=1e-5)


def test_pipeline_encodes_clips(system):
    pipeline = Pipeline(system.eval(), PRESET, id="videomae")
    clip = np.random.default_rng(0).integers(0, 255, (20, 40, 48, 3), dtype=np.uint8)
    vector = pipeline.encode(videos=[clip])
    assert vector.shape == (1, 24) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-4)


def test_broken_files_and_wrong_clips_are_refused_in_one_line(system, video, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError) as caught:
        Pipeline(system.eval(), PRESET, id="videomae").encode(videos=[tmp_path / "a.mp4"])
    assert "\n" not in str(caught.value)
    for wrong in (video[:, :4], video[..., :24], video[:, :, :1], video[0], video.long()):
        with pytest.raises(UserError, match="this tower reads"):
            system.encode_video(wrong)
    with pytest.raises(UserError, match="no classes"):
        system.classify_video(video)
    with pytest.raises(UserError, match="different numbers"):
        system.see(video, masking_of(torch.rand(2, 128) < torch.tensor([[0.3], [0.8]])))
    bad = video.clone()
    bad[1, 3, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"diverged.*1 hold values"):
        list(fit(system, PRESET.stages[0].but(batch_size=2, steps=1), [{"video": bad, "index": torch.arange(2)}]))
