"""The KL auto-encoder against diffusers' AutoencoderKL, through both namings. Tolerance 1e-4."""
import torch
from reference import reference, shake

from polysense.decoders.kl_vae import KLVAE
from polysense.nn.norm import GroupNorm
from polysense.weights import kl_vae
from polysense.weights.keymap import load_into

CONFIG = KLVAE.Config(widths=(8, 16, 16), depth=1, latents=3, norm=GroupNorm.Config(groups=4, eps=1e-6))


def theirs_of():
    diffusers = reference("diffusers")
    return shake(diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=3, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3))


@torch.no_grad()
def test_moments_and_pictures_are_the_same_both_ways():
    theirs, ours = theirs_of(), CONFIG.build().eval()
    load_into(ours, kl_vae.diffusers(), theirs.state_dict())
    x, z = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 4)
    want = theirs.encode(x).latent_dist
    torch.testing.assert_close(ours.moments(x)[0], want.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.moments(x)[1], want.logvar, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-4)
    back = kl_vae.diffusers().save(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys() and all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())
    assert kl_vae.read(dict(theirs.config) | {"_class_name": "AutoencoderKL"}) == CONFIG
    assert kl_vae.read(kl_vae.write(CONFIG, 16, 0.2)) == CONFIG


@torch.no_grad()
def test_original_names_say_the_same():
    theirs, ours = theirs_of(), CONFIG.build().eval()
    load_into(ours, kl_vae.diffusers(), theirs.state_dict())
    old = kl_vae.original(CONFIG).save(ours.state_dict())
    assert old["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1) and "decoder.up.0.block.0.nin_shortcut.weight" in old
    convert = reference("diffusers.loaders.single_file_utils").convert_ldm_vae_checkpoint
    new = convert({f"first_stage_model.{k}": v.clone() for k, v in old.items()}, dict(theirs.config))
    again = theirs_of()
    again.load_state_dict(new)
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(again(x).sample, theirs(x).sample)
    twin = CONFIG.build().eval()
    load_into(twin, kl_vae.original(CONFIG), old)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), ours.state_dict().values(), strict=True))
    assert kl_vae.from_original(old).widths == CONFIG.widths and kl_vae.from_original(old).depth == 1
