"""VQ-VAE's essence (van den Oord et al. 2017)."""
from math import log

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import After
from polysense.decoders.pixelcnn import PixelCNN
from polysense.decoders.vq_codec import VectorQuantizer
from polysense.objectives.codes import codebook_loss, commitment_loss, perplexity
from polysense.train.fit import fit

recipe = polysense.load("vq_vae")


def toy(**changes):
    config = recipe.VQVAE.Config(codec=recipe.codec(16, 8, 16, 16, 2, decay=None, idle=0.0, std=0.3),
                                 prior=PixelCNN.Config(codes=16, width=8, depth=2, side=4))
    return config.but(**changes)


@pytest.fixture()
def system():
    torch.manual_seed(0)
    return toy().build()


@pytest.fixture(scope="module")
def image():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_nearest_code_is_chosen_as_a_loop_would(system, image):
    z, book = system.codec.encode(image), system.codec.quantizer.codebook
    ids = system.encode_codes(image)
    assert ids.shape == (3, 4, 4)
    for b, y, x in ((0, 0, 0), (1, 2, 3), (2, 3, 1)):
        assert int(ids[b, y, x]) == min(range(16), key=lambda k: float((z[b, y, x] - book[k]).detach().square().sum()))


def test_decoding_the_codes_is_the_reconstruction_of_the_forward_pass_bit_for_bit(system, image):
    out, _, quantized = system.codec(image)
    assert torch.equal(system.decode_codes(system.encode_codes(image)), out)
    assert torch.equal(system.reconstruct(image), out) and torch.equal(quantized.ids, system.encode_codes(image))


def test_gradient_passes_straight_through_and_leaves_the_codebook_alone(system, image):
    z = system.codec.encode(image).detach().requires_grad_()
    quantized = system.codec.quantizer(z)
    passed = quantized.passed
    passed.retain_grad()
    F.mse_loss(system.codec.draw(passed), image).backward()
    assert torch.equal(z.grad, passed.grad) and z.grad.abs().sum() > 0
    assert system.codec.quantizer.codebook.grad is None
    assert torch.equal(passed, quantized.vectors), "the very code, without the rounding of z + (e - z)"


def test_each_term_moves_its_own_part(system, image):
    def reached(term):
        system.zero_grad(set_to_none=True)
        system.losses({"image": image})[term].backward()
        return {n.split(".")[1] for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    assert reached("reconstruct") == {"encoder", "decoder"}
    assert reached("codebook") == {"quantizer"}
    assert reached("commit") == {"encoder"}


def test_beta_weighs_the_commitment_and_its_legacy_place_the_codebook(image):
    systems = [toy(beta=b, beta_on=on).build() for b, on in ((0.25, "commitment"), (0.25, "codebook"), (1.0, "commitment"))]
    for s in systems[1:]:
        s.load_state_dict(systems[0].state_dict())
    paper, legacy, one = (s.losses({"image": image}) for s in systems)
    assert paper["commit"].item() == pytest.approx(one["commit"].item() / 4) and paper["codebook"].item() == one["codebook"].item()
    assert legacy["codebook"].item() == pytest.approx(one["codebook"].item() / 4) and legacy["commit"].item() == one["commit"].item()
    with pytest.raises(UserError, match="beta_on"):
        toy(beta_on="both").build()
    with pytest.raises(UserError, match="running means"):
        toy(**{"beta_on": "codebook", "codec.quantizer.decay": 0.99}).build()
    assert preset_of("vq_vae", "paper").config.beta_on == "commitment" and preset_of("vq_vae", "paper").config.beta == 0.25


def test_a_codebook_vector_is_its_own_code_at_no_loss(system):
    quantizer = system.codec.quantizer
    quantized = quantizer(quantizer.codebook.detach())
    assert quantized.ids.tolist() == list(range(16))
    assert codebook_loss(quantizer.codebook, quantized.vectors) == 0 == commitment_loss(quantizer.codebook, quantized.vectors)


def test_one_code_encodes_everything_alike(image):
    one = toy(**{"codec.quantizer.codes": 1, "prior.codes": 1}).build()
    out = one.reconstruct(image)
    assert torch.equal(out[0], out[1]) and one.encode_codes(image).unique().tolist() == [0]


def test_running_means_move_only_the_code_that_was_chosen_and_by_the_papers_rule():
    torch.manual_seed(0)
    q = VectorQuantizer.Config(codes=5, width=3, decay=0.9).build()
    before, z = q.codebook.clone(), torch.randn(7, 3)
    q.move(z, torch.full((7,), 2))
    assert torch.equal(q.codebook[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    n, m = 0.9 * 1 + 0.1 * 7, 0.9 * before[2] + 0.1 * z.sum(0)
    torch.testing.assert_close(q.codebook[2], m / n)
    for _ in range(200):
        q.move(z, torch.full((7,), 2))
    torch.testing.assert_close(q.codebook[2], z.mean(0), rtol=1e-4, atol=1e-4)


def test_with_running_means_there_is_no_codebook_term_and_only_after_step_moves_it(image):
    ema = toy(**{"codec.quantizer.decay": 0.9}).build()
    assert "codec.quantizer.codebook" not in dict(ema.named_parameters())
    losses, before = ema.losses({"image": image}), ema.codec.quantizer.codebook.clone()
    losses.total().backward()
    assert set(losses) == {"reconstruct", "commit"} and torch.equal(ema.codec.quantizer.codebook, before)
    ema.after_step(After(1, 0.1, torch.optim.SGD(ema.parameters(), 0.1), losses.keep))
    assert not torch.equal(ema.codec.quantizer.codebook, before)


def test_idle_codes_are_born_again_on_encoder_outputs():
    q = VectorQuantizer.Config(codes=4, width=2, decay=0.5, idle=0.2).build()
    z = torch.full((6, 2), 3.0) + torch.arange(12).view(6, 2) / 10
    twin = VectorQuantizer.Config(codes=4, width=2, decay=0.5).build()
    for step in range(6):
        q.move(z, torch.zeros(6, dtype=torch.long), step)
        twin.move(z, torch.zeros(6, dtype=torch.long), step)
    assert all((row == z).all(1).any() for row in q.codebook[1:]), "each is one of the encoder's outputs"
    assert (twin.codebook[1:].abs() <= 0.25).all(), "without it they stay where they were born"


def test_perplexity_counts_the_codes_in_even_use():
    assert perplexity(torch.tensor([5, 5, 5, 5])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0, 0])).item() == pytest.approx(1)


def test_prior_sees_every_earlier_place_and_no_later_one():
    torch.manual_seed(0)
    prior = PixelCNN.Config(codes=5, width=8, depth=6, side=5).build().double()
    x = F.one_hot(torch.randint(5, (1, 5, 5)), 5).double().requires_grad_()
    prior.embed.forward = lambda ids: x @ prior.embed.weight
    for y, c in ((0, 0), (0, 3), (2, 2), (3, 0), (4, 4)):
        grad = torch.autograd.grad(prior(torch.zeros(1, 5, 5, dtype=torch.long))[0, y, c].sum(), x)[0].abs().sum(-1).flatten()
        seen = grad > 0
        assert seen.tolist() == [i < y * 5 + c for i in range(25)], f"at {y, c}: no blind spot, nothing of itself or later"


def test_prior_stage_reads_the_frozen_codec_and_its_loss_begins_at_log_k(system, image):
    system.choose_trainable(("prior.*",))
    before = {k: v.clone() for k, v in system.codec.state_dict().items()}
    losses = [s.losses["codes"] for s in fit(system, recipe.tiny().stages[1].but(steps=60, **{"optim.lr": 0.02}), iter([{"image": image}] * 60))]
    assert losses[0] == pytest.approx(log(16), abs=0.5) and losses[-1] < losses[0] / 2
    assert all(torch.equal(v, before[k]) for k, v in system.codec.state_dict().items())
    torch.manual_seed(0)
    drawn = system.sample_image(2, steps=1)
    torch.manual_seed(0)
    assert drawn.shape == (2, 3, 16, 16) and torch.equal(drawn, system.sample_image(2, steps=1))


def test_tiny_stages_train_through_the_one_loop():
    preset = preset_of("vq_vae").but(**{"config.codec.encoder.width": 16, "config.codec.decoder.width": 16})
    system = preset.config.build()
    batch = fake_batch(preset, ("image",), n=4)
    for stage in preset.stages:
        steps = list(fit(system, stage.but(steps=12, **{"optim.warmup": 0}), iter([batch] * 12)))
        assert steps[-1].total < steps[0].total


@pytest.mark.parametrize("call", [
    lambda s: s.encode_codes(torch.randn(1, 1, 16, 16)), lambda s: s.encode_codes(torch.randn(1, 3, 18, 16)),
    lambda s: s.decode_codes(torch.full((1, 4, 4), 16)), lambda s: s.decode_codes(torch.zeros(1, 4, 4)),
    lambda s: s.decode_codes(torch.zeros(4, 4, dtype=torch.long)), lambda s: s.prior(torch.full((1, 4, 4), 99))])
def test_what_is_no_picture_and_no_code_is_refused(system, call):
    with pytest.raises(UserError) as caught:
        call(system)
    assert "\n" not in str(caught.value)


def test_paper_is_the_papers():
    codec = preset_of("vq_vae", "paper").config.codec
    assert (codec.quantizer.codes, codec.encoder.width, codec.encoder.hidden, codec.encoder.halvings, codec.encoder.depth) == (512, 256, 256, 2, 2)
    with torch.device("meta"):
        assert codec.build().encode(torch.randn(1, 3, 128, 128)).shape == (1, 32, 32, 64)
