"""MAE-ST's essence (Feichtenhofer et al. 2022)."""
import numpy as np
import pytest
import torch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import ClipPlan
from polysense.data import source
from polysense.data.loader import Loader
from polysense.decoders.pixels import FramePixels
from polysense.mechanisms.mask_sampler import Masking
from polysense.nn.masking import masking_of
from polysense.nn.patch import patchify
from polysense.pipeline import Pipeline
from polysense.train.fit import fit

recipe = polysense.load("mae_st")
PRESET = preset_of("mae_st").but(**{"config.encoder.body.width": 24, "config.encoder.body.depth": 2, "config.encoder.body.heads": 2,
                                    "config.decoder.body.width": 16, "config.decoder.body.depth": 2, "config.decoder.body.heads": 2})


@pytest.fixture()
def system():
    torch.manual_seed(0)
    made = PRESET.config.build()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made.eval()


@pytest.fixture(scope="module")
def video():
    return torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_nine_tenths_are_hidden_with_no_regard_for_space_or_time():
    torch.manual_seed(0)
    sampler = preset_of("mae_st", "paper").config.sampler.build()
    masking = sampler(50, (8, 14, 14))
    assert masking.visible == 156 and (masking.mask.sum(1) == 1568 - 156).all()
    each = masking.mask.view(50, 8, 196).sum(2)
    assert int(each.float().std(0).min() > 1) and len(each.unique()) > 10, "every time has its own share: no tubes"
    frames = masking.mask.view(50, 8, 196)
    assert not (frames == frames[:, :1]).flatten(1).all(1).any()


def test_the_encoder_computes_the_visible_cubes_and_a_class_token_alone(system, video):
    masking = system.masking(video)
    tokens = system.see(video, masking)
    assert tokens.shape == (2, 1 + 12, 24) and system.encoder.grid == (8, 4, 4)
    covered = masking.mask.view(2, 8, 4, 4).repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, None]
    other = torch.where(covered, torch.randn_like(video), video)
    assert torch.equal(system.see(other, masking), tokens)
    assert not torch.allclose(system.see(torch.where(covered, video, torch.randn_like(video)), masking), tokens)
    assert torch.equal(system.decoder(tokens, masking), system.decoder(system.see(other, masking), masking))


def test_positions_of_space_and_time_are_added_up_and_given_to_what_is_left(system, video):
    place, masking = system.encoder.place, system.masking(video)
    for t, y, x in ((0, 0, 0), (3, 1, 2), (7, 3, 3)):
        torch.testing.assert_close(place()[0, t * 16 + y * 4 + x], place.time[0, t] + place.space[0, y * 4 + x])
    embedded = system.encoder.embed(video, masking.keep)
    patches = patchify(video, 8, 2)
    weight = system.encoder.patch.weight.permute(0, 2, 3, 4, 1).flatten(1)
    for k, n in enumerate(masking.keep[0].tolist()):
        torch.testing.assert_close(embedded[0, 1 + k], weight @ patches[0, n] + system.encoder.patch.bias + place()[0, n], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedded[0, 0], (system.encoder.cls + place.first)[0, 0])
    assert {n for n, p in system.encoder.place.named_parameters()} == {"first", "space", "time"} and place.space.requires_grad


def test_frames_may_change_places_together_with_their_times(system, video):
    want = system.encoder(video).tokens
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    moved = video.unflatten(1, (8, 2))[:, order].flatten(1, 2)
    with torch.no_grad():
        system.encoder.place.time.copy_(system.encoder.place.time[:, order])
    got = system.encoder(moved).tokens
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got[:, 1:].unflatten(1, (8, 16)), want[:, 1:].unflatten(1, (8, 16))[:, order], rtol=1e-3, atol=1e-4)


def test_the_decoder_has_a_class_token_and_positions_of_its_own(system, video):
    masking = system.masking(video)
    seen = system.see(video, masking)
    other = seen.clone()
    other[:, 0] += 1
    assert torch.equal(system.decoder(other, masking), system.decoder(seen, masking)), "the encoder's class token is not read"
    before = system.decoder(seen, masking)
    with torch.no_grad():
        system.encoder.place.space.add_(1)
    assert torch.equal(system.decoder(seen, masking), before)
    for p in (system.decoder.cls, system.decoder.place.time):
        kept = p.detach().clone()
        with torch.no_grad():
            p.add_(torch.randn_like(p))
        assert not torch.allclose(system.decoder(seen, masking), before)
        with torch.no_grad():
            p.copy_(kept)
    assert before.shape == (2, 116, 192), "one frame of every cube"
    whole = system.decoder.whole(seen, masking)
    torch.testing.assert_close(masking.at_hidden(whole), before, rtol=1e-3, atol=1e-4)


def test_one_frame_of_a_cube_is_said_in_the_released_order(video):
    target = FramePixels.Config(patch=8, said=8).build()
    assert target.chosen(16).tolist() == [0, 2, 4, 6, 8, 10, 12, 15]
    masking = masking_of(torch.rand(2, 128).argsort(1) < 116)
    said = target(video, masking)
    assert said.shape == (2, 116, 1 * 8 * 8 * 3) and preset_of("mae_st", "paper").config.target.width == 768
    n = int(masking.hidden[1, 5])
    t, y, x = n // 16, n // 4 % 4, n % 4
    want = video[1, [0, 2, 4, 6, 8, 10, 12, 15][t], :, y * 8:y * 8 + 8, x * 8:x * 8 + 8].permute(1, 2, 0).flatten()
    assert torch.equal(said[1, 5], want)
    both = FramePixels.Config(patch=8, said=16, frames=2).build()
    assert both(video, masking).shape[-1] == 2 * 8 * 8 * 3, "all frames, two of them to a cube"
    normed = FramePixels.Config(patch=8, said=8, norm="patch").build()(video, masking)
    torch.testing.assert_close(normed[1, 5], (want - want.mean()) / (want.var() + 1e-6).sqrt(), rtol=1e-4, atol=1e-5)


def test_the_loss_is_of_hidden_cubes_and_the_order_of_the_mask_does_not_matter(system, video):
    masking = system.masking(video)
    said, truth = system.pairs(video, masking)
    sorted_ = system.pairs(video, masking_of(masking.mask))
    torch.testing.assert_close((said - truth).square().mean(), (sorted_[0] - sorted_[1]).square().mean(), rtol=1e-4, atol=1e-5)
    torch.manual_seed(4)
    loss = system.losses({"video": video})["pixels"]
    torch.manual_seed(4)
    one, two = system.pairs(video, system.masking(video))
    torch.testing.assert_close(loss, (one - two).square().mean())


def test_every_video_gives_four_clips_that_are_cropped_and_mirrored():
    for name in ("tiny", "paper"):
        clip = preset_of("mae_st", name).feed.video
        assert isinstance(clip, ClipPlan) and clip.repeat == 4 and (clip.view.scale, clip.view.flip, clip.view.jitter) == ((0.5, 1.0), 0.5, 0.0)
    loader = Loader(source("scenes:clips?n=3&size=48&frames=20"), PRESET.feed, None, batch_size=8, needs=("video",))
    batch = next(iter(loader))
    assert batch["video"].shape == (8, 16, 3, 32, 32) and [len(i.unique()) for i in batch["index"].split(4)] == [1, 1]
    assert not torch.equal(batch["video"][0], batch["video"][1])


def test_tiny_learns_through_the_one_loop():
    torch.manual_seed(0)
    stage = PRESET.stages[0].but(steps=14, batch_size=8, **{"optim.warmup": 1, "optim.lr": 8e-3})
    batch = next(iter(Loader(source("scenes:clips?n=3&size=48&frames=20"), PRESET.feed, None, batch_size=8, needs=("video",))))
    losses = [s.total for s in fit(PRESET.config.build(), stage, [batch] * 14)]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


def test_drawing_keeps_what_is_seen_and_reads_nothing_else(system, video):
    masking = system.masking(video)
    drawn = system.draw(video, masking)
    assert drawn.shape == (2, 8, 3, 32, 32)
    chosen = video[:, [0, 2, 4, 6, 8, 10, 12, 15]]
    covered = masking.mask.view(2, 8, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, None].expand_as(drawn)
    assert torch.equal(drawn[~covered], chosen[~covered]) and not torch.equal(drawn[covered], chosen[covered])


def test_without_a_class_token_it_works_too(video):
    made = PRESET.but(**{"config.encoder.prefix": 0, "config.decoder.prefix": 0}).config.build().eval()
    masking = made.masking(video)
    assert made.see(video, masking).shape[1] == 12 and made.pairs(video, masking)[0].shape == (2, 116, 192)


def test_pipeline_encodes_clips_and_wrong_ones_are_refused_in_one_line(system, video, tmp_path):
    pipeline = Pipeline(system, PRESET, id="mae_st")
    clip = np.random.default_rng(0).integers(0, 255, (20, 40, 48, 3), dtype=np.uint8)
    vector = pipeline.encode(videos=[clip])
    assert vector.shape == (1, 24) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-4)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError) as caught:
        pipeline.encode(videos=[tmp_path / "a.mp4"])
    assert "\n" not in str(caught.value)
    for wrong in (video[:, :4], video[..., :24], video[:, :, :1], video[0], video.long()):
        with pytest.raises(UserError, match="this tower reads"):
            system.encode_video(wrong)
    with pytest.raises(UserError, match="fills in a grid"):
        system.decoder(torch.randn(1, 4, 24), Masking(torch.ones(1, 9, dtype=torch.bool), torch.arange(9)[None], 3))
