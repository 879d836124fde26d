"""FLIP's essence (Li et al. 2023): each test fails if its mechanism is replaced by a shortcut."""
import pytest
import torch

import polysense
from polysense.base.catalogue import preset_of
from polysense.nn.masking import masking_of
from polysense.objectives.contrastive import info_nce

recipe = polysense.load("flip")
SMALL = recipe.config(32, 8, (32, 2, 2), (24, 2, 2), 16, 100, 12, 0.5)


@pytest.fixture()
def flip():
    torch.manual_seed(0)
    return SMALL.build()


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(5, 60, (6, 8), generator=g)
    text[2, 5:] = 0
    return {"image": torch.randn(6, 3, 32, 32, generator=g), "text": text}


def lengths(system, run) -> list[int]:
    """Tokens that each block of the image tower computes."""
    seen: list[int] = []
    hooks = [b.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1])) for b in system.vision.body.blocks]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("ratio, kept", [(0.5, 8), (0.75, 4), (0.0, 16), (0.3, 11)])
def test_the_tower_computes_the_kept_patches_and_the_class_token_alone(ratio, kept, batch):
    flip = SMALL.but(**{"sampler.ratio": ratio}).build()
    assert lengths(flip, lambda: flip.embed_masked(batch)) == [1 + kept] * 2
    assert lengths(flip.eval(), lambda: flip.encode_image(batch["image"])) == [17] * 2, "whole pictures at test time"
    assert lengths(flip.train(), lambda: flip.embed(batch)) == [17] * 2, "and in unmasked tuning"


def test_the_cost_of_the_image_tower_falls_by_about_the_ratio(batch):
    from torch.utils.flop_counter import FlopCounterMode

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops()

    flip = recipe.config(64, 8, (64, 4, 2), (24, 1, 2), 16, 100, 12, 0.75).build()
    image = torch.randn(2, 3, 64, 64)
    whole = flops(lambda: flip.encode_image(image))
    part = flops(lambda: flip.encode_part(image, flip.sampler(2, (8, 8))))
    assert 0.2 < part / whole < 0.35


def test_kept_patches_carry_the_position_of_where_they_were(flip, batch):
    masking = flip.sampler(6, (4, 4))
    part, whole = (flip.vision.embed(batch["image"], keep)[0] for keep in (masking.keep, None))
    torch.testing.assert_close(part[:, 1:], whole[:, 1:].gather(1, masking.keep[..., None].expand(-1, -1, 32)))
    torch.testing.assert_close(part[:, 0], whole[:, 0], msg="the class token is never dropped")


def test_masks_differ_between_samples_and_steps_and_patches_are_equally_likely(flip):
    one, two = flip.sampler(64, (4, 4)).mask, flip.sampler(64, (4, 4)).mask
    assert not torch.equal(one, two) and len({tuple(m.tolist()) for m in one}) > 60
    often = torch.stack([flip.sampler(64, (4, 4)).mask.float().mean(0) for _ in range(30)]).mean(0)
    assert (often - 0.5).abs().max() < 0.05


def test_nothing_masked_is_the_plain_tower(flip, batch):
    nothing = masking_of(torch.zeros(6, 16, dtype=torch.bool))
    torch.testing.assert_close(flip.encode_part(batch["image"], nothing), flip.encode_image(batch["image"]))
    free = SMALL.but(**{"sampler.ratio": 0.0}).build().eval()
    free.load_state_dict(flip.state_dict())
    torch.testing.assert_close(free.embed_masked(batch)["image"], flip.eval().encode_image(batch["image"]))


def test_pixels_of_dropped_patches_get_no_gradient(flip, batch):
    image = batch["image"].clone().requires_grad_()
    masking = flip.sampler(6, (4, 4))
    flip.encode_part(image, masking).sum(1).square().sum().backward()
    hidden = masking.mask.view(6, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    assert (image.grad[hidden] == 0).all() and (image.grad[~hidden] != 0).float().mean() > 0.99


def test_there_is_no_mask_token_decoder_or_second_loss(flip, batch):
    assert not any("token" in n or "decoder" in n for n, _ in flip.named_parameters())
    seen = flip.embed_masked(batch)
    losses = flip.compare(seen)
    assert list(losses) == ["contrast"]
    torch.testing.assert_close(losses["contrast"], info_nce(seen["image"], seen["text"], flip.scale))


def test_the_last_stage_sees_whole_pictures_at_a_small_rate():
    for name in ("tiny", "paper"):
        masked, tuned = preset_of("flip", name).stages
        assert masked.embed is recipe.FLIP.embed_masked and tuned.embed is recipe.FLIP.embed
        assert tuned.optim.lr < masked.optim.lr / 5 and tuned.steps < masked.steps / 9


def test_towers_are_plain(flip, batch):
    v = flip.vision
    assert v.norm_pre is None and "position" not in dict(v.named_parameters()) and "position" in dict(v.named_buffers())
    encoded = v(batch["image"])
    torch.testing.assert_close(encoded.pooled, encoded.tokens.mean(1), msg="the mean of all tokens, the class token among them")
    assert flip.image_head.bias is None and flip.text_head.bias is None
    whole = flip.text(batch["text"])
    torch.testing.assert_close(whole.pooled, whole.tokens[:, 0])
    changed = batch["text"].clone()
    changed[:, 4] = 61
    assert (flip.text(changed).pooled - whole.pooled).abs().amax(1).min() > 1e-4, "a later word changes the first token: no causal mask"
    short = flip.encode_text(batch["text"][2:3, :5])
    torch.testing.assert_close(flip.encode_text(batch["text"])[2:3], short, rtol=1e-4, atol=1e-5, msg="padding is not looked at")


def test_temperature_starts_at_one_over_007_and_is_bounded(flip):
    assert flip.scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        flip.log_scale.fill_(9.0)
    assert flip.scale.item() <= 100.001


def test_big_g_has_as_many_parameters_as_open_clips():
    with torch.device("meta"):
        assert sum(p.numel() for p in recipe.big_g().config.build().parameters()) == 2_539_567_105
