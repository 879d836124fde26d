"""ViT-VQGAN's essence (Yu et al. 2022)."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.code_writer import CodeWriter
from polysense.decoders.perceptual import Perceptual, vgg_rows
from polysense.decoders.style_critic import StyleCritic
from polysense.decoders.vit_codec import CosineQuantizer, ViTDecoder, ViTEncoder
from polysense.decoders.vq_codec import VectorQuantizer, VQCodec
from polysense.nn.head import Nothing
from polysense.nn.transformer import Transformer
from polysense.objectives.codes import logit_laplace, map_pixels
from polysense.train.fit import fit

recipe = polysense.load("vit_vqgan")
TINY = preset_of("vit_vqgan")
TOY = TINY.but(config=recipe.ViTVQGAN.Config(
    codec=recipe.codec(8, 2, recipe.body(16, 2, 2), recipe.body(24, 1, 2), 16, 4),
    prior=CodeWriter.Config(codes=16, side=4, body=recipe.body(16, 3, 2)),
    critic=StyleCritic.Config(size=8, widths=(4, 8)), perceptual=Perceptual.Config(rows=vgg_rows((1, 1), base=4), seen=(0, 1))),
    starts=(), **{"feed.image.size": 8, "feed.train_image.size": 8})


def made(**change):
    torch.manual_seed(0)
    return TOY.config.but(**change).build()


@pytest.fixture()
def system():
    return made()


@pytest.fixture(scope="module")
def batch():
    return {"image": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1}


def test_paper_is_the_papers():
    c = preset_of("vit_vqgan", "paper").config
    for half in (c.codec.encoder, c.codec.decoder):
        assert (half.patch, half.side ** 2, half.body.width, half.body.depth, half.body.heads) == (8, 1024, 768, 12, 12)
        assert int(half.body.block.mlp.ratio * half.body.width) == 3072
    assert (c.codec.quantizer.codes, c.codec.quantizer.width) == (8192, 32)
    assert (c.laplace, c.perceptual_weight, c.critic_weight, c.beta, c.form) == (0.1, 0.1, 0.1, 0.25, "log")
    of = {name: preset_of("vit_vqgan", name).config.codec for name in ("small", "small_base", "large")}
    sizes = {n: [(h.body.depth, h.body.width, h.body.heads) for h in (v.encoder, v.decoder)] for n, v in of.items()}
    assert sizes == {"small": [(8, 512, 8)] * 2, "small_base": [(8, 512, 8), (12, 768, 12)], "large": [(32, 1280, 16)] * 2}
    assert all(v.quantizer.width == 32 for v in of.values()), "the search is in 32 dimensions whatever the width"
    optim = preset_of("vit_vqgan", "paper").stages[0]
    assert (optim.batch_size, optim.optim.betas, optim.optim.lr, optim.optim.final, optim.optim.weight_decay) == (256, (0.9, 0.99), 1e-4, 0.5, 1e-4)


def test_both_sides_have_positions_and_project_by_two_layers_with_tanh(system, batch):
    for half in (system.codec.encoder, system.codec.decoder):
        assert half.position.shape == (1, 16, half.body.blocks[0].norm1.weight.numel())
        x = torch.randn(2, half.project.pre.in_features)
        torch.testing.assert_close(half.project(x), half.project.out(torch.tanh(half.project.pre(x))))
    before = system.codec.encode(batch["image"])
    with torch.no_grad():
        system.codec.encoder.position.add_(torch.randn_like(system.codec.encoder.position))
    assert not torch.allclose(system.codec.encode(batch["image"]), before, atol=1e-3)
    assert system.codec.decoder.spread.in_features == 4 and system.codec.decoder.spread.out_features == 24


# -- codes ------------------------------------------------------------------------------------------------------------------------------

def test_lengths_do_not_matter_neither_of_vectors_nor_of_codes(system, batch):
    q, z = system.codec.quantizer, torch.randn(5, 4)
    one, two = q(z), q(z * torch.rand(5, 1) * 7 + 0 * z)
    assert torch.equal(one.ids, two.ids)
    torch.testing.assert_close(one.passed, two.passed)
    out, ids = system.reconstruct(batch["image"]), system.encode_codes(batch["image"])
    with torch.no_grad():
        q.codebook.mul_(torch.rand(16, 1) * 9 + 0.1)
    assert torch.equal(system.encode_codes(batch["image"]), ids)
    torch.testing.assert_close(system.reconstruct(batch["image"]), out)
    torch.testing.assert_close(one.vectors.norm(dim=-1), torch.ones(5))


def test_nearest_of_unit_vectors_is_the_largest_cosine():
    torch.manual_seed(0)
    q, z = CosineQuantizer.Config(codes=12, width=6).build(), torch.randn(40, 6)
    near = torch.cdist(F.normalize(z, dim=-1), F.normalize(q.codebook, dim=-1)).argmin(1)
    assert torch.equal(q(z).ids, near) and torch.equal(near, F.cosine_similarity(z[:, None], q.codebook[None], dim=-1).argmax(1))
    plain = VectorQuantizer.Config(codes=12, width=6, std=1.0).build()
    plain.codebook.data.copy_(q.codebook * torch.rand(12, 1) * 5)
    assert not torch.equal(plain(z).ids, near), "which without normalisation it is not"


def test_each_term_of_the_codes_moves_its_own_side_and_the_picture_goes_straight_through(system, batch):
    losses = system.compress(batch)
    for name, reached in (("codebook", {"quantizer"}), ("commit", {"encoder"}), ("squares", {"encoder", "decoder"})):
        grads = torch.autograd.grad(losses[name], list(system.codec.parameters()), retain_graph=True, allow_unused=True)
        moved = {n.split(".")[0] for (n, _), g in zip(system.codec.named_parameters(), grads, strict=True) if g is not None and float(g.abs().sum())}
        assert moved == reached, name


def test_decoding_the_codes_is_the_reconstruction_of_the_forward_pass(system, batch):
    out, _, quantized = system.codec(batch["image"])
    assert torch.equal(system.encode_codes(batch["image"]), quantized.ids)
    torch.testing.assert_close(system.decode_codes(quantized.ids), out)


def test_patches_in_and_out_are_exact_where_codes_are_enough():
    """No layers, no positions, each patch its own code: the picture comes back."""
    body = Transformer.Config(width=12, depth=0, heads=1, norm=None)
    side = dict(patch=2, side=4, body=body, code=12, project=Nothing.Config())
    codec = VQCodec.Config(encoder=ViTEncoder.Config(**side), decoder=ViTDecoder.Config(**side),
                           quantizer=CosineQuantizer.Config(codes=16, width=12)).build()
    patches = F.normalize(torch.rand(1, 16, 12, generator=torch.Generator().manual_seed(0)), dim=-1)
    image = F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (4, 4)), 2)
    with torch.no_grad():
        codec.encoder.patch.weight.copy_(torch.eye(12).view(12, 3, 2, 2))
        codec.decoder.spread.weight.copy_(torch.eye(12))
        codec.quantizer.codebook.copy_(patches[0] * torch.arange(1, 17)[:, None])
        for p in (codec.encoder.position, codec.decoder.position, codec.encoder.patch.bias, codec.decoder.spread.bias):
            p.zero_()
    torch.testing.assert_close(codec(image)[0], image)
    assert codec.ids(image).flatten().tolist() == list(range(16))


def test_more_codes_stay_in_use_than_with_wide_ones_of_any_length():
    """The same network, from the same seed, for as many steps (squared errors and the codes' terms)."""
    generator, used = torch.Generator().manual_seed(0), {}
    image = F.interpolate(torch.rand(64, 3, 4, 4, generator=generator), scale_factor=2.0, mode="bilinear") * 2 - 1
    for name, codec in (("short", recipe.codec(8, 2, recipe.body(16, 1, 2), recipe.body(16, 1, 2), 64, 4)), ("wide", recipe.codec(
            8, 2, recipe.body(16, 1, 2), recipe.body(16, 1, 2), 64, 16).but(quantizer=VectorQuantizer.Config(codes=64, width=16)))):
        torch.manual_seed(0)
        net = codec.build()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(60):
            out, z, q = net(image[:32])
            z = F.normalize(z, dim=-1) if name == "short" else z
            loss = F.mse_loss(out, image[:32]) + F.mse_loss(q.vectors, z.detach()) + 0.25 * F.mse_loss(z, q.vectors.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        used[name] = len(net.ids(image[32:]).unique())
    assert used["short"] > used["wide"], used


# -- the loss ---------------------------------------------------------------------------------------------------------------------------

def test_terms_are_the_papers(system, batch):
    losses, drawn = system.rebuild(batch)
    image, b = batch["image"], torch.tensor([0.1, -0.2, 0.3])
    with torch.no_grad():
        system.codec.decoder.log_scale.copy_(b)
    again = system.rebuild(batch)[0]
    seen, made_ = (v / 2 + 0.5 for v in (image, drawn))
    want = logit_laplace(map_pixels(seen), torch.logit(map_pixels(made_.clamp(0, 1))), b.view(3, 1, 1)).mean()
    torch.testing.assert_close(again["laplace"], 0.1 * want)
    torch.testing.assert_close(losses["squares"], (made_ - seen).square().mean())
    torch.testing.assert_close(losses["perceptual"], 0.1 * system.perceptual(image, drawn).mean())
    _, z, q = system.codec(image)
    torch.testing.assert_close(losses["commit"] / 0.25, F.mse_loss(F.normalize(z, dim=-1), q.vectors))
    torch.testing.assert_close(losses["codebook"], losses["commit"] / 0.25)
    fooled = F.softplus(-system.critic(drawn)).mean()
    torch.testing.assert_close(system.deceive(batch)["fool"], 0.1 * fooled)
    with torch.no_grad():
        want = 0.5 * (F.softplus(-system.critic(image)).mean() + F.softplus(system.critic(drawn)).mean())
    torch.testing.assert_close(system.judge(batch)["critic"], want)


def test_the_critic_is_stylegan2s():
    torch.manual_seed(0)
    critic = StyleCritic.Config(size=16, widths=(4, 6, 8)).build()
    x = torch.randn(4, 3, 16, 16)
    assert critic(x).shape == (4,) and float(critic.first.weight.detach().std()) == pytest.approx(1, abs=0.4)
    alone = critic(x[:1].expand(4, -1, -1, -1))
    assert not torch.allclose(alone[0], critic(x)[0], atol=1e-4), "a batch of one picture shows in the deviation"
    flat = torch.ones(1, 4, 16, 16)
    torch.testing.assert_close(critic.blocks[0].blurred(flat, 2)[..., 4:-4, 4:-4], torch.ones(1, 4, 9, 9)), "blurring keeps the level"
    frozen = critic.looked_at(x.requires_grad_()).sum()
    frozen.backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in critic.parameters())
    for wrong in (lambda: critic(torch.randn(1, 3, 8, 8)), lambda: StyleCritic.Config(size=16, widths=(4, 6)).build()):
        with pytest.raises(UserError):
            wrong()


# -- the second stage -------------------------------------------------------------------------------------------------------------------

def test_the_feature_is_the_mean_of_a_layer_a_third_of_the_way_up(system, batch):
    ids, prior = system.encode_codes(batch["image"]), system.prior
    hidden = prior.body.layers(prior.stream(ids, None), causal=True)[1]
    torch.testing.assert_close(system.encode_image(batch["image"]), F.normalize(hidden.mean(1), dim=-1))
    assert system.look == 1 and made(look=3).look == 3
    with pytest.raises(UserError, match="look"):
        made(look=4)


def test_a_class_stands_in_front_where_the_prior_knows_classes(batch):
    system = made(**{"prior.told": 3})
    labelled = {**batch, "label": torch.tensor([0, 1, 2, 0])}
    other = {**batch, "label": torch.tensor([1, 2, 0, 1])}
    assert not torch.equal(system.fit_prior(labelled)["codes"], system.fit_prior(other)["codes"])
    assert system.sample_image(2, steps=1).shape == (2, 3, 8, 8) and system.encode_image(batch["image"]).shape == (4, 16)


def test_three_stages_train_in_turn(batch):
    system = made()
    for stage in TOY.stages:
        before = {n: p.clone() for n, p in system.named_parameters()}
        steps = list(fit(system, stage.but(steps=8, batch_size=4, **{"optim.warmup": 0}), iter([batch] * 8)))
        name = "codes" if stage.name == "prior" else "squares"
        assert min(s.losses[name] for s in steps) < steps[0].losses[name]
        moved = {n.split(".")[0] for n, p in system.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {"codec": {"codec"}, "sharpen": {"codec", "critic"}, "prior": {"prior"}}[stage.name]
        assert stage.name == "prior" or not torch.equal(system.codec.decoder.log_scale, before["codec.decoder.log_scale"])


@pytest.mark.parametrize("ask", [
    lambda s: s.encode_codes(torch.rand(1, 3, 9, 8)), lambda s: s.encode_image(torch.rand(1, 1, 8, 8)),
    lambda s: s.encode_image(torch.rand(1, 3, 16, 16)), lambda s: s.decode_codes(torch.full((1, 4, 4), 99)),
    lambda s: s.decode_codes(torch.zeros(4, 4, dtype=torch.long)), lambda s: CosineQuantizer.Config(codes=0, width=2).build()])
def test_what_it_cannot_read_is_one_line(system, ask):
    with pytest.raises(UserError) as caught:
        ask(system)
    assert "\n" not in str(caught.value)


def test_other_sizes_are_read_and_drawn(system):
    assert system.reconstruct(torch.rand(1, 3, 8, 12)).shape == (1, 3, 8, 12)
