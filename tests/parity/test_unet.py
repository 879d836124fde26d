"""The U-Net against diffusers' UNet2DModel and UNet2DConditionModel, through the diffusers names and the original ones. Tolerance 1e-4."""
import pytest
import torch
from reference import reference, shake

from polysense.nn.norm import GroupNorm
from polysense.nn.spatial import ResBlock, SpatialAttention, SpatialTransformer
from polysense.nn.time import SinusoidalTime
from polysense.nn.unet import Level, UNet
from polysense.weights import unet_compvis, unet_diffusers
from polysense.weights.keymap import load_into

FEW = GroupNorm.Config(groups=4, eps=1e-5)


def pixel_config():
    attn = SpatialAttention.Config(norm=FEW, heads=2)
    return UNet.Config(levels=(Level(width=8), Level(width=16, attn=attn)), mid=attn, block=ResBlock.Config(norm=FEW), pad="end",
                       time=SinusoidalTime.Config(shift=1.0, order="sin cos"))


def latent_config(join: str):
    attn = SpatialTransformer.Config(norm=GroupNorm.Config(groups=4, eps=1e-6), heads=2, source=12, join=join)
    return UNet.Config(channels=4, levels=(Level(width=8, attn=attn), Level(width=16, attn=attn), Level(width=16)), mid=attn,
                       block=ResBlock.Config(norm=FEW))


def latent_reference(join: str):
    return shake(reference("diffusers").UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16), layers_per_block=2, cross_attention_dim=12,
        attention_head_dim=2, norm_num_groups=4, use_linear_projection=join == "linear",
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")))


@torch.no_grad()
def test_pixel_unet_is_unet2d_both_ways():
    theirs = shake(reference("diffusers").UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, attention_head_dim=8, downsample_padding=0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), flip_sin_to_cos=False, freq_shift=1))
    theirs.conv_out.weight.normal_()
    for i in (0, 1):                                        # 8 wide heads: one in a width of 8, two in 16
        assert theirs.down_blocks[1].attentions[i].heads == 2
    ours, keymap = pixel_config().build().eval(), unet_diffusers.keymap(pixel_config())
    load_into(ours, keymap, theirs.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 977])
    torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-4, atol=1e-4)
    back = keymap.save(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys() and all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())
    former = {k.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): v for k, v in back.items()}
    assert former.keys() != back.keys()
    load_into(pixel_config().build(), keymap, former)


@pytest.mark.parametrize("join", ["conv", "linear"])
@torch.no_grad()
def test_latent_unet_is_unet2d_condition_both_ways(join):
    theirs = latent_reference(join)
    ours, keymap = latent_config(join).build().eval(), unet_diffusers.keymap(latent_config(join))
    load_into(ours, keymap, theirs.state_dict())
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 977]), torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x, t, context), theirs(x, t, context).sample, rtol=1e-4, atol=1e-4)
    back = keymap.save(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[k], v) and back[k].shape == v.shape for k, v in theirs.state_dict().items())
    down = [torch.randn(s.shape) for s in ours.encode(x, ours.told(x, t), context)]
    want = theirs(x, t, context, down_block_additional_residuals=tuple(down[:-1]), mid_block_additional_residual=down[-1]).sample
    torch.testing.assert_close(ours(x, t, context, add=down), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_original_names_are_total_and_turn_back():
    """Original names -> ours -> diffusers names gives the network that wrote them; the released converter agrees on the numbering."""
    config = latent_config("conv")
    ours = shake(config.build())
    keymap = unet_compvis.keymap(config)
    old = keymap.save(ours.state_dict())
    shapes = {k: tuple(v.shape) for k, v in old.items()}
    assert shapes["input_blocks.0.0.weight"] == (8, 4, 3, 3) and shapes["input_blocks.1.1.proj_in.weight"] == (8, 8, 1, 1)
    assert shapes["input_blocks.3.0.op.weight"] == (8, 8, 3, 3) and shapes["output_blocks.2.1.conv.weight"] == (16, 16, 3, 3)
    assert shapes["output_blocks.5.2.conv.weight"] == (16, 16, 3, 3) and shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"] == (16, 12)
    convert = reference("diffusers.loaders.single_file_utils").convert_ldm_unet_checkpoint
    theirs = latent_reference("conv")
    theirs.load_state_dict(convert({f"model.diffusion_model.{k}": v for k, v in old.items()}, dict(theirs.config)))
    again = config.build().eval()
    load_into(again, keymap, old)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 977]), torch.randn(2, 5, 12)
    torch.testing.assert_close(again(x, t, context), theirs(x, t, context).sample, rtol=1e-4, atol=1e-4)
