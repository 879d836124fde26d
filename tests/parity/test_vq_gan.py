"""VQ-GAN against diffusers' VQModel and transformers' ChameleonVQVAE (whose names are taming's): through files, both ways. Tolerance 1e-4."""
import json

import pytest
import torch
from reference import reference, shake
from safetensors.torch import save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.patch_critic import PatchCritic
from polysense.decoders.perceptual import Perceptual
from polysense.objectives.codes import codebook_loss, commitment_loss
from polysense.systems.generate import vq_gan
from polysense.weights.convert import export, import_
from polysense.weights.files import read_state

PRIOR = vq_gan.writer(12, 4, 8, 1, 1)


def presets(name):
    """The published ones with a prior that is quickly built; a VGG-16 is not."""
    look = Perceptual.Config(rows=vq_gan.vgg_rows((1,), base=4), seen=(0,))
    return preset_of("vq_gan", name).but(**{"config.prior": PRIOR, "config.perceptual": look, "config.critic": PatchCritic.Config(width=4, depth=2)})


@pytest.fixture()
def image():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def vq_model():
    reference("transformers")
    return shake(reference("diffusers").VQModel(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=6, vq_embed_dim=4, num_vq_embeddings=12, norm_num_groups=32,
        sample_size=16, down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D")))


@torch.no_grad()
def test_diffusers_vq_model_in_and_out(tmp_path, image):
    theirs = vq_model()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", vq_gan.weights["diffusers"], presets)
    ours.eval()
    assert preset.config.codec.encoder.attend == (1,) and preset.feed.image.size == 16
    latents = theirs.encode(image).latents
    torch.testing.assert_close(ours.codec.encode(image).permute(0, 3, 1, 2), latents, rtol=0, atol=1e-4)
    _, loss, (_, _, ids) = theirs.quantize(latents)
    assert torch.equal(ours.encode_codes(image).flatten(), ids.flatten())
    torch.testing.assert_close(ours.reconstruct(image), theirs(image).sample, rtol=0, atol=1e-4)
    out, z, quantized = ours.codec(image)
    torch.testing.assert_close(out, theirs.decode(latents).sample, rtol=0, atol=1e-4)
    torch.testing.assert_close(0.25 * codebook_loss(z, quantized.vectors) + commitment_loss(z, quantized.vectors), loss, rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, vq_gan.weights["diffusers"], tmp_path / "back", preset.feed)
    back = read_state(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert back.keys() == theirs.state_dict().keys() and all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())
    again = reference("diffusers").VQModel.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(again(image).sample, theirs(image).sample, rtol=0, atol=1e-6)


def chameleon():
    reference("transformers")
    module = reference("transformers.models.chameleon.modeling_chameleon")
    config = module.ChameleonVQVAEConfig(embed_dim=4, num_embeddings=12, latent_channels=6, resolution=16, base_channels=32,
                                         channel_multiplier=[1, 2], num_res_blocks=1, attn_resolutions=[8])
    return shake(module.ChameleonVQVAE(config))


@torch.no_grad()
def test_taming_names_with_chameleons_encoder_and_diffusers_decoder(tmp_path, image):
    """Chameleon has taming's encoder and no decoder; diffusers' own weights, under taming's names, complete the file."""
    theirs, decoder = chameleon(), vq_model()
    decoder.save_pretrained(tmp_path / "theirs")
    lender, lent = import_(tmp_path / "theirs", vq_gan.weights["diffusers"], presets)
    mine = {**lender.state_dict(), **shake(lender.critic).state_dict(prefix="critic.")}
    export(mine, lent.config, vq_gan.weights["taming"], tmp_path / "lent.safetensors")
    file = read_state(tmp_path / "lent.safetensors")
    assert "decoder.up.1.attn.0.q.weight" in file and file["decoder.up.1.attn.0.q.weight"].ndim == 4
    assert {k for k in file if not k.startswith(("decoder.", "loss."))} == set(theirs.state_dict())
    file |= theirs.state_dict()
    post = {k: file[f"post_quant_conv.{k}"] for k in ("weight", "bias")}
    torch.save({"state_dict": {k: v for k, v in file.items() if not k.startswith("loss.perceptual")}, "epoch": 3}, tmp_path / "last.ckpt")
    ours, preset = import_(tmp_path / "last.ckpt", vq_gan.weights["taming"], presets)
    ours.eval()
    seen = theirs.encode(image)
    torch.testing.assert_close(ours.codec.encoder.quant(torch.zeros(1, 6, 1, 1)).flatten(), theirs.quant_conv.bias, rtol=0, atol=1e-6)
    assert torch.equal(ours.encode_codes(image).flatten(), seen.image_tokens.flatten())
    torch.testing.assert_close(ours.codec.encode(image).permute(0, 3, 1, 2), theirs.quant_conv(seen.last_hidden_state), rtol=0, atol=1e-4)
    _, z, quantized = ours.codec(image)
    torch.testing.assert_close(0.25 * codebook_loss(z, quantized.vectors) + commitment_loss(z, quantized.vectors), seen.embedding_loss,
                               rtol=0, atol=1e-4)
    decoder.post_quant_conv.load_state_dict(post)
    torch.testing.assert_close(ours.reconstruct(image), decoder.decode(seen.quantized_last_hidden_state, force_not_quantize=True).sample,
                               rtol=0, atol=1e-4)
    assert all(torch.equal(v, mine[f"critic.{k}"]) for k, v in ours.critic.state_dict().items())
    export(ours.state_dict(), preset.config, vq_gan.weights["taming"], tmp_path / "back.safetensors")
    back = read_state(tmp_path / "back.safetensors")
    assert back.keys() == file.keys() and all(torch.equal(back[k], v) for k, v in file.items() if not k.startswith("loss.perceptual"))
    theirs.load_state_dict({k: v for k, v in back.items() if not k.startswith(("decoder.", "loss."))})


@torch.no_grad()
def test_the_gumbel_variant_by_its_published_names(tmp_path, image):
    """Shapes as in vqgan_gumbel_f8: `quantize.proj` is a 1x1 convolution to the logits, `quantize.embed` holds the codes."""
    config = presets("gumbel").config.but(codec=vq_gan.codec((32, 64), 1, 6, 12, 4, attend=(1,)).but(
        quantizer=vq_gan.GumbelQuantizer.Config(codes=12, width=4)))
    ours = shake(config.build())
    export(ours.state_dict(), config, vq_gan.weights["taming"], tmp_path / "gumbel.safetensors")
    file = read_state(tmp_path / "gumbel.safetensors")
    assert file["quantize.proj.weight"].shape == (12, 4, 1, 1) and file["quantize.embed.weight"].shape == (12, 4)
    z = ours.codec.encode(image).permute(0, 3, 1, 2)
    logits = torch.nn.functional.conv2d(z, file["quantize.proj.weight"], file["quantize.proj.bias"])
    twin, _ = import_(tmp_path / "gumbel.safetensors", vq_gan.weights["taming"], presets)
    assert torch.equal(twin.eval().encode_codes(image), logits.argmax(1)) and torch.equal(twin.reconstruct(image), ours.reconstruct(image))
    with pytest.raises(UserError, match="drawn"):
        export(ours.state_dict(), config, vq_gan.weights["diffusers"], tmp_path / "no")


def test_what_is_another_model_is_named(tmp_path):
    theirs = vq_model()
    theirs.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    for change in ({"_class_name": "AutoencoderKL"}, {"norm_type": "spatial"}):
        (tmp_path / "config.json").write_text(json.dumps(told | change))
        with pytest.raises(UserError):
            import_(tmp_path, vq_gan.weights["diffusers"], presets)
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not vq_gan"):
        import_(tmp_path / "x.safetensors", vq_gan.weights["taming"], presets)
