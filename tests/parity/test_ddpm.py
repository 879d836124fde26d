"""DDPM against diffusers: a published folder in and out, and equal pictures from DDPMPipeline's scheduler. Tolerance 1e-4."""
import json

import pytest
import torch
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.generate import ddpm
from polysense.weights.convert import export, import_


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    diffusers, place = reference("diffusers"), tmp_path_factory.mktemp("ddpm") / "published"
    torch.manual_seed(0)
    theirs = shake(diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=None, downsample_padding=0,
        norm_eps=1e-6, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        flip_sin_to_cos=False, freq_shift=1))
    theirs.save_pretrained(place)
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    scheduler.save_pretrained(place)
    return place, theirs, scheduler


@torch.no_grad()
def test_a_published_folder_draws_the_same_pictures_and_goes_back(folder, tmp_path):
    place, theirs, scheduler = folder
    ours, preset = import_(place, ddpm.weights["diffusers"], lambda name: preset_of("ddpm", name))
    assert preset.config.sampler.variance == "large" and preset.feed.image.size == 8
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 800])
    torch.testing.assert_close(ours.unet(x, t), theirs(x, t).sample, rtol=1e-4, atol=1e-4)

    torch.manual_seed(3)
    got = ours.sample_image(2, steps=10)
    torch.manual_seed(3)
    want = torch.randn(2, 3, 8, 8)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        want = scheduler.step(theirs(want, t).sample, t, want).prev_sample
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    export(ours.state_dict(), preset.config, ddpm.weights["diffusers"], tmp_path / "back", preset.feed)
    again = reference("diffusers").UNet2DModel.from_pretrained(tmp_path / "back").eval()
    t = torch.tensor([5, 800])
    torch.testing.assert_close(again(x, t).sample, theirs(x, t).sample)
    assert import_(tmp_path / "back", ddpm.weights["diffusers"], lambda name: preset_of("ddpm", name))[1].config == preset.config


@pytest.mark.parametrize("change, said", [({"act_fn": "gelu", "resnet_time_scale_shift": "scale_shift"}, "scale_shift"),
                                          ({"_class_name": "UNet1DModel"}, "UNet1DModel"), ({"sample_size": None}, "sample_size")])
def test_other_networks_are_refused(folder, change, said):
    config = json.loads((folder[0] / "config.json").read_text())
    with pytest.raises(UserError, match=said):
        ddpm.weights["diffusers"].read({**config, **change}, {})
