"""The quantizer against diffusers (paper form and legacy form) and transformers' Chameleon (legacy form): equal codebook, equal vectors."""
from types import SimpleNamespace

import pytest
import torch
from reference import reference

from polysense.decoders.vq_codec import VectorQuantizer
from polysense.objectives.codes import codebook_loss, commitment_loss


@pytest.fixture()
def ours():
    torch.manual_seed(0)
    return VectorQuantizer.Config(codes=12, width=6, std=1.0).build()


@pytest.fixture()
def z():
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(3))


def assert_agree(ours, z, theirs, loss_of):
    mine, his = z.clone().requires_grad_(), z.clone().requires_grad_()
    quantized = ours(mine)
    out, loss, ids = theirs(his.permute(0, 3, 1, 2))
    torch.testing.assert_close(quantized.passed, out.permute(0, 2, 3, 1), rtol=0, atol=1e-5)
    assert torch.equal(quantized.ids.flatten(), ids.flatten())
    my_loss = loss_of(mine, quantized.vectors)
    torch.testing.assert_close(my_loss, loss, rtol=0, atol=1e-5)
    (my_loss + quantized.passed.sin().sum()).backward()
    (loss + out.sin().sum()).backward()
    torch.testing.assert_close(mine.grad, his.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_diffusers(ours, z, legacy):
    reference("transformers")                # torchvision, which both import, needs its operators declared
    module = reference("diffusers.models.autoencoders.vae")
    theirs = module.VectorQuantizer(12, 6, beta=0.25, legacy=legacy)
    theirs.embedding.weight.data.copy_(ours.codebook.data)

    def call(x):
        out, loss, (_, _, ids) = theirs(x)
        return out, loss, ids

    first, second = (0.25, 1.0) if legacy else (1.0, 0.25)
    assert_agree(ours, z, call, lambda e, v: first * codebook_loss(e, v) + second * commitment_loss(e, v))


def test_chameleon_is_of_the_legacy_form(ours, z):
    reference("transformers")
    module = reference("transformers.models.chameleon.modeling_chameleon")
    theirs = module.ChameleonVQVAEVectorQuantizer(SimpleNamespace(num_embeddings=12, embed_dim=6, beta=0.25))
    theirs.embedding.weight.data.copy_(ours.codebook.data)
    assert_agree(ours, z, theirs, lambda e, v: 0.25 * codebook_loss(e, v) + commitment_loss(e, v))
