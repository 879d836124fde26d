"""Latent diffusion's essence (Rombach et al. 2022)."""
import pytest
import torch
from fake import fake_batch

import polysense
from polysense.archetypes.denoiser import Sampler
from polysense.archetypes.stable_diffusion import unet
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import After
from polysense.decoders.kl_vae import KLVAE, kl_to_normal
from polysense.decoders.patch_critic import PatchCritic
from polysense.decoders.perceptual import Perceptual, vgg_rows
from polysense.nn.maps import mixing, recorded
from polysense.nn.norm import GroupNorm
from polysense.systems.generate.latent_diffusion import StableDiffusion
from polysense.towers.clip import body
from polysense.towers.clip_text import ClipText
from polysense.train.fit import fit
from polysense.weights.lpips import write_perceptual

polysense.load("latent_diffusion")
TINY = preset_of("latent_diffusion")
SMALL = TINY.but(config=TINY.config.but(
    vae=KLVAE.Config(widths=(8, 16), depth=1, norm=GroupNorm.Config(groups=4, eps=1e-6)), size=16,
    unet=unet((16, 32), (0, 1), 24, depth=1, heads=2, groups=8),
    text=ClipText.Config(vocab=64, length=10, body=body(24, 1, 2), end=2))).but(**{"feed.image.size": 16, "feed.train_image.size": 16})


def made(**change):
    torch.manual_seed(0)
    system = SMALL.config.but(**change).build()
    with torch.no_grad():                                    # beyond birth, where the U-Net says nothing
        for p in system.unet.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return system


@pytest.fixture()
def system():
    return made()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(SMALL, ("image", "text"), n=4)


def test_latents_are_small_and_of_four_channels(batch):
    assert TINY.config.vae.stride == 4 and preset_of("latent_diffusion", "paper").config.vae.stride == 8
    mean, log = made().vae.moments(batch["image"])
    assert mean.shape == log.shape == (4, 4, 8, 8)
    paper = preset_of("latent_diffusion", "paper").config
    assert 3 * 512 ** 2 / (4 * (512 // paper.vae.stride) ** 2) == 48, "48 times fewer numbers than RGB"
    assert (paper.scale, paper.guidance, paper.drop, paper.schedule, paper.text.length) == (0.18215, 7.5, 0.1, "scaled_linear", 77)


def test_scale_is_applied_before_noise_and_taken_off_before_decoding(system, batch):
    system.scale.fill_(3.0)
    torch.manual_seed(1)
    z = system.latents(batch["image"])
    torch.manual_seed(1)
    torch.testing.assert_close(z, 3 * system.vae.encode(batch["image"]))
    torch.testing.assert_close(system.picture(z), system.vae.decode(z / 3))


def test_the_divergence_is_the_closed_form():
    mean, log = torch.randn(2, 3), torch.randn(2, 3)
    p, q = torch.distributions.Normal(mean, (0.5 * log).exp()), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(kl_to_normal(mean, log), torch.distributions.kl_divergence(p, q).sum(1))


def test_the_scale_is_measured_while_the_auto_encoder_trains():
    pictures = [fake_batch(SMALL, ("image", "text"), n=16, seed=i) for i in range(12)]
    system = made(scale=None)
    list(fit(system, SMALL.stages[0].but(steps=12, batch_size=16), iter(pictures)))
    z = torch.cat([system.latents(b["image"]) for b in pictures])
    assert float(z.std()) == pytest.approx(1, abs=0.1) and float(system.scale) != 1
    fixed = made(scale=0.18215)
    list(fit(fixed, SMALL.stages[0].but(steps=1, batch_size=16), iter(pictures)))
    assert float(fixed.scale) == pytest.approx(0.18215)


def test_in_the_second_stage_only_the_unet_gets_a_gradient(system, batch):
    before = {n: p.clone() for n, p in system.named_parameters()}
    list(fit(system, SMALL.stages[1].but(steps=2, batch_size=4), iter([batch] * 2)))
    moved = {n for n, p in system.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(n.startswith("unet.") for n in moved) and any("cross" in n for n in moved)
    assert all(p.grad is None for n, p in system.named_parameters() if not n.startswith("unet."))


def test_words_reach_the_unet_through_cross_attention_alone(system, batch):
    """Another tau(y) changes what the first cross-attention says, and nothing before it."""
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    names = ["down.0.blocks.0", "down.0.attn.0.body.blocks.0.attn", "down.0.attn.0.body.blocks.0.cross"]
    seen = []
    for context in (system.context(batch["text"][:2]), system.context(batch["text"][2:])):
        here = {}
        hooks = [system.unet.get_submodule(n).register_forward_hook(lambda m, a, out, n=n, here=here: here.setdefault(n, out)) for n in names]
        system.unet(z, t, context)
        seen.append(here)
        for h in hooks:
            h.remove()
    assert [torch.equal(seen[0][n], seen[1][n]) for n in names] == [True, True, False]


def test_attention_maps_are_places_by_tokens_and_rows_sum_to_one(system, batch):
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), system.context(batch["text"][:2])
    plain = system.unet(z, t, context)
    with recorded(system.unet, lambda n: n.endswith("cross")) as maps:
        torch.testing.assert_close(system.unet(z, t, context), plain)
    assert maps["down.0.attn.0.body.blocks.0.cross"][0].shape == (2, 2, 64, 10) and maps["mid.attn.body.blocks.0.cross"][0].shape == (2, 2, 16, 10)
    for kept in maps.values():
        torch.testing.assert_close(kept[0].sum(-1), torch.ones(kept[0].shape[:-1]))


def test_attention_can_be_replaced_from_outside(system, batch):
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), system.context(batch["text"][:2])
    plain = system.unet(z, t, context)
    with mixing(system.unet, lambda name, q, k, v, mask: torch.zeros_like(q), lambda n: n.endswith("cross")):
        assert not torch.allclose(system.unet(z, t, context), plain)
        torch.testing.assert_close(system.unet(z, t, context), system.unet(z, t, context * 0 + 7.0))       # words count no more
    torch.testing.assert_close(system.unet(z, t, context), plain)


def test_the_order_of_tokens_matters_only_through_their_states(system, batch):
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), system.context(batch["text"][:2])
    torch.testing.assert_close(system.unet(z, t, context[:, torch.randperm(10)]), system.unet(z, t, context), rtol=1e-4, atol=1e-5)
    flipped = torch.cat([batch["text"][:2, :1], batch["text"][:2, 1:-1].flip(1), batch["text"][:2, -1:]], 1)
    assert not torch.allclose(system.unet(z, t, system.context(flipped)), system.unet(z, t, context), atol=1e-3)


def test_all_states_are_read_padding_too(system, batch):
    text = batch["text"]
    assert system.context(text).shape == (4, 10, 24)
    torch.testing.assert_close(system.context(text), system.text(torch.cat([text, torch.full((4, 2), 2)], 1)).tokens)
    torch.testing.assert_close(system.empty(text), torch.tensor([[1, 2]] * 4))
    assert made(pad=0).whole(text)[0].tolist()[-2:] == [0, 0]


def test_one_caption_in_ten_is_dropped(system, batch):
    text = batch["text"].repeat(500, 1)
    torch.manual_seed(0)
    gone = (system.dropped(text)[:, 1] == 2).float().mean()
    assert float(gone) == pytest.approx(0.1, abs=0.02) and torch.equal(system.dropped(text, 0.0), text)


def test_guidance_weighs_the_words(system, batch):
    text, noise = batch["text"][:2], torch.randn(2, 4, 8, 8)

    def one_step(guidance, **control):
        return system.generate_image(text, steps=1, guidance=torch.tensor(guidance), noise=noise, **control)
    free = system.generate_image(system.empty(text), steps=1, guidance=torch.tensor(1.0), noise=noise)
    torch.testing.assert_close(one_step(0.0), free, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one_step(1.0), one_step(6.0), atol=1e-3)
    torch.testing.assert_close(one_step(6.0, negative=text), one_step(1.0), atol=1e-4, rtol=1e-4)


def test_drawing_is_seeded_differentiable_and_of_the_right_size(system, batch):
    def draw(seed):
        torch.manual_seed(seed)
        return system.generate_image(batch["text"][:2], steps=2)
    assert draw(0).shape == (2, 3, 16, 16) and torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    context = system.context(batch["text"][:1])
    out = system.drawn(z, lambda z, t: system.says({}, z, t, context), 2, Sampler(name="ddim"))
    assert torch.autograd.grad(out.sum(), z)[0].abs().sum() > 0, "a gradient passes through the steps"


def test_the_critic_joins_late_and_minds_its_own_gradient(batch):
    torch.manual_seed(0)
    config = SMALL.config.but(critic=PatchCritic.Config(width=8, depth=2), critic_from=2)
    system = StableDiffusion(config).train()
    def step(number):
        system.zero_grad()
        losses = system.compress(batch)
        losses.total((("kl", 1e-6),)).backward()
        system.after_step(After(number, 0.1, None, losses.keep))
        return losses, {n for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    first, reached = step(1)
    assert float(first["fooled"].detach()) == 0 == float(first["critic"].detach()) and not any(n.startswith("critic") for n in reached)
    step(2)
    third, reached = step(3)
    assert float(third["critic"].detach()) > 0 and float(third["fooled"].detach()) != 0 and any(n.startswith("critic") for n in reached)
    system.zero_grad()
    system.compress(batch)["fooled"].backward()
    got = {n.split(".")[0] for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got == {"vae"}, "what fools the critic does not move it"
    system.zero_grad()
    system.compress(batch)["critic"].backward()
    assert {n.split(".")[0] for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == {"critic"}


def test_pixels_differ_by_size_or_square(batch):
    """The paper's L1; `tiny` takes squares."""
    def detail(**change):
        torch.manual_seed(0)
        system = StableDiffusion(SMALL.config.but(**change)).train()
        torch.manual_seed(1)
        said = system.compress(batch)["detail"]
        torch.manual_seed(1)
        mean, log = system.vae.moments(batch["image"])
        return said, batch["image"] - system.vae.decode(mean + (0.5 * log).exp() * torch.randn_like(mean))
    said, off = detail(apart="absolute")
    torch.testing.assert_close(said, off.abs().mean())
    said, off = detail()
    torch.testing.assert_close(said, off.square().mean())
    assert preset_of("latent_diffusion", "autoencoder").config.apart == "absolute"
    with pytest.raises(UserError, match="absolute or squares"):
        StableDiffusion(SMALL.config.but(apart="cubes"))


SEEN = Perceptual.Config(rows=vgg_rows((1, 1), base=4), seen=(0, 1))


def test_the_auto_encoder_minds_what_a_network_sees(batch):
    """|x - D(z)| + weight * d(x, D(z)), and with it a gradient for the auto-encoder alone."""
    def detail(**change):
        torch.manual_seed(0)
        system = StableDiffusion(SMALL.config.but(**change)).train()
        torch.manual_seed(1)
        return system, system.compress(batch)["detail"]
    torch.manual_seed(0)
    (_, plain), (_, none), (system, one) = detail(), detail(perceptual=SEEN, perceptual_weight=0.0), detail(perceptual=SEEN, perceptual_weight=2.0)
    torch.testing.assert_close(plain, none)
    torch.manual_seed(1)
    mean, log = system.vae.moments(batch["image"])
    drawn = system.vae.decode(mean + (0.5 * log).exp() * torch.randn_like(mean))
    torch.testing.assert_close(one, plain + 2 * system.perceptual(batch["image"], drawn).mean())
    one.backward()
    assert {n.split(".")[0] for n, p in system.named_parameters() if p.grad is not None} == {"vae", "log_noise"}
    assert TINY.config.perceptual is None and preset_of("latent_diffusion", "autoencoder").config.perceptual == Perceptual.Config()


def test_the_perceptual_network_comes_from_published_files(tmp_path):
    torch.manual_seed(3)
    other = SEEN.build()
    other.weigh[0].fill_(0.25)
    torch.save(write_perceptual(other, SEEN), tmp_path / "lpips.pth")
    system = StableDiffusion(SMALL.config.but(perceptual=SEEN, perceptual_files=(str(tmp_path / "lpips.pth"),)))
    system.after_start()
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in system.perceptual.state_dict().items())
    with pytest.raises(UserError, match="no file"):
        StableDiffusion(SMALL.config.but(perceptual=SEEN, perceptual_files=("absent.pth",))).after_start()
    with pytest.raises(UserError, match="without a perceptual network"):
        StableDiffusion(SMALL.config.but(perceptual_files=("lpips.pth",)))


def test_the_learned_noise_weighs_the_detail(system, batch):
    torch.manual_seed(0)
    one = system.compress(batch)["detail"]
    with torch.no_grad():
        system.log_noise.fill_(1.0)
    torch.manual_seed(0)
    torch.testing.assert_close(system.compress(batch)["detail"], one * torch.tensor(-1.0).exp() + 1)


@pytest.mark.parametrize("control, said", [({"hint": torch.zeros(1)}, "hint"), ({"colour": torch.zeros(1)}, "does not hear")])
def test_unknown_control_is_refused(system, batch, control, said):
    with pytest.raises(UserError, match=said):
        system.generate_image(batch["text"], steps=1, **control)


def test_sizes_that_cannot_be_are_refused(system):
    with pytest.raises(UserError, match="multiple of 4"):
        SMALL.config.but(size=18).build()
    with pytest.raises(UserError, match="multiples of 2"):
        system.reconstruct(torch.randn(1, 3, 15, 15))
    with pytest.raises(UserError, match="reads 24"):
        system.unet(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 3, 25))
