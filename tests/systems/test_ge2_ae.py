"""Ge2-AE's essence (Liu et al. 2023)."""
import pytest
import torch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.fourier import from_spectrum, spectrum
from polysense.nn.patch import patchify, unpatchify
from polysense.objectives.masked import masked_mse
from polysense.objectives.spectrum import focal_frequency, focus
from polysense.train.fit import fit

recipe, mae = polysense.load("ge2_ae"), polysense.load("mae")
TOY = {"config.encoder.body": recipe.tower(32, 2, 2), "config.encoder.image_size": 32}
DECODER = recipe.tower(16, 2, 2)


@pytest.fixture()
def ge2():
    torch.manual_seed(0)
    return preset_of("ge2_ae").but(**TOY, **{"config.decoder.pixel": DECODER, "config.decoder.frequency": DECODER}).config.build().eval()


@pytest.fixture()
def image():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# -- spectra ----------------------------------------------------------------------------------------------------------------------------

def test_spectrum_is_the_centred_orthonormal_transform_and_comes_back(image):
    found = spectrum(image)
    want = torch.fft.fft2(image, norm="ortho")
    assert found.shape == (3, 6, 32, 32)
    torch.testing.assert_close(found[:, :3, 16, 16], image.sum((2, 3)) / 32, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 3:, 16 + 2, 16 - 5], want[:, :, 2, -5].imag)
    torch.testing.assert_close(from_spectrum(found), image, rtol=0, atol=1e-5)
    real, imaginary = found.roll((-16, -16), (2, 3)).chunk(2, 1)                 # Hermitian, as the picture is real
    back = lambda x: x.flip(2, 3).roll((1, 1), (2, 3))
    torch.testing.assert_close(back(real), real, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back(imaginary), -imaginary, atol=1e-5, rtol=1e-4)
    assert from_spectrum(torch.randn(1, 6, 8, 8)).dtype == torch.float32, "of a spectrum of no real picture, the real part"


def test_without_the_focal_weight_the_loss_is_that_of_the_pixels(image):
    other = torch.randn_like(image)
    plain, focal = (focal_frequency(spectrum(other), spectrum(image), a) for a in (0.0, 1.0))
    torch.testing.assert_close(plain, (other - image).square().mean())
    assert float(focal) < 0.9 * float(plain), "so with it, it says something else"


def test_the_focal_weight_lies_between_0_and_1_and_has_no_gradient(image):
    squared = torch.rand(2, 3, 4, 4, requires_grad=True)
    weight = focus(squared, 1.0)
    assert not weight.requires_grad and weight.min() >= 0 and torch.equal(weight.amax((2, 3)), torch.ones(2, 3))
    assert torch.equal(focus(torch.zeros(1, 1, 2, 2), 1.0), torch.zeros(1, 1, 2, 2))
    guess, truth = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 4)
    focal_frequency(guess, truth).backward()
    w = focus((guess - truth).detach()[:, :1] ** 2 + (guess - truth).detach()[:, 1:] ** 2, 1.0)
    torch.testing.assert_close(guess.grad, 2 * w * (guess - truth).detach() / 16)
    with pytest.raises(UserError, match="same pictures"):
        focal_frequency(guess, truth[..., :2])


# -- the model --------------------------------------------------------------------------------------------------------------------------

def test_with_no_weight_on_frequencies_it_is_mae(ge2, image):
    torch.manual_seed(7)
    theirs = preset_of("mae").but(**TOY, **{"config.decoder.body": DECODER}).config.build().eval()
    state = {k.replace("decoder.pixel.", "decoder."): v for k, v in ge2.state_dict().items() if not k.startswith("decoder.frequency")}
    theirs.load_state_dict(state)
    losses = []
    for system, weights in ((ge2, recipe.lambdas(0.0, 0.0, 0.0)), (theirs, ())):
        torch.manual_seed(3)
        loss = system.losses({"image": image}).total(weights)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    mine = dict(ge2.named_parameters())
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(mine[name.replace("decoder.", "decoder.pixel.")].grad, p.grad, rtol=1e-4, atol=1e-6)


def test_two_decoders_of_their_own_over_one_encoder_of_a_quarter_of_the_patches(ge2, image):
    seen = []
    ge2.encoder.body.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    masking = ge2.masking(image)
    both = ge2.decoder(ge2.see(image, masking), masking)
    assert seen == [1 + 4] and both.patches.shape == (3, 12, 192) and both.spectrum.shape == (3, 6, 32, 32)
    names = {k.split(".")[0] for k, _ in ge2.decoder.named_parameters()}
    assert names == {"pixel", "frequency"} and all(f"{n}.token" in dict(ge2.decoder.named_parameters()) for n in names)
    assert ge2.decoder.pixel.token.data_ptr() != ge2.decoder.frequency.token.data_ptr()


def test_each_drawing_is_judged_in_both_domains(ge2, image):
    torch.manual_seed(4)
    masking = ge2.masking(image)
    seen, d = ge2.see(image, masking), ge2.decoder
    drawn = d.pixel.whole(seen, masking)
    parts = unpatchify(d.frequency.whole(seen, masking), (4, 4), 8)
    truth = masking.at_hidden(patchify(image, 8))
    want = {"pixels": masked_mse(masking.at_hidden(drawn), truth), "frequency": focal_frequency(parts, spectrum(image)),
            "pixels_in_frequency": focal_frequency(spectrum(unpatchify(drawn, (4, 4), 8)), spectrum(image)),
            "frequency_in_pixels": masked_mse(masking.at_hidden(patchify(from_spectrum(parts), 8)), truth)}
    torch.manual_seed(4)
    got = ge2.losses({"image": image})
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], msg=name)
        only = torch.autograd.grad(value, [d.pixel.head.weight, d.frequency.head.weight], retain_graph=True, allow_unused=True)
        assert [g is not None for g in only] == [name.startswith("pixels"), name.startswith("frequency")]


def test_hidden_pixels_change_nothing_and_it_draws_and_learns(ge2, image):
    masking = ge2.masking(image)
    hidden = masking.mask.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, torch.randn_like(image), image)
    assert torch.equal(ge2.see(image, masking), ge2.see(other, masking))
    drawn = ge2.reconstruct(image, masking)
    torch.testing.assert_close(drawn, ge2.reconstruct(other, masking))
    torch.testing.assert_close(drawn.masked_fill(hidden, 0), image.masked_fill(hidden, 0))
    stage = preset_of("ge2_ae").stages[0].but(steps=15, **{"optim.warmup": 1})
    steps = list(fit(ge2, stage, iter([{"image": image}] * 15)))
    assert steps[-1].total < 0.97 * steps[0].total
    with pytest.raises(UserError, match="a mask over 36"):
        ge2.losses({"image": torch.randn(1, 3, 48, 48)})
