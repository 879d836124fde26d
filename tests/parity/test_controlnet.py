"""ControlNet against diffusers' ControlNetModel: residuals, guess mode, two nets, a pipeline's folder, the original names. Tolerance 1e-4."""
import json

import pytest
import torch
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.generate import controlnet as recipe
from polysense.weights import controlnet as layouts
from polysense.weights.convert import export, import_
from polysense.weights.keymap import load_into

VOCAB, LENGTH, END = 40, 7, 39


def presets(name: str):
    return preset_of("controlnet", name)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    diffusers, hf, place = reference("diffusers"), reference("transformers"), tmp_path_factory.mktemp("control") / "pipeline"
    torch.manual_seed(0)
    unet = shake(diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")))
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    born = {k: v.clone() for k, v in control.state_dict().items()}
    shake(control)
    vae = shake(diffusers.AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2))
    text = shake(hf.CLIPTextModel(hf.CLIPTextConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=LENGTH,
        eos_token_id=END, bos_token_id=1, pad_token_id=END)))
    scheduler = diffusers.DDIMScheduler(beta_start=8.5e-4, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    for name, part in (("unet", unet), ("controlnet", control), ("vae", vae), ("text_encoder", text), ("scheduler", scheduler)):
        part.save_pretrained(place / name)
    (place / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionControlNetPipeline"}))
    return place, unet, control, born


def inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, LENGTH, 16), torch.rand(2, 3, 16, 16)


@torch.no_grad()
def test_a_pipelines_folder_in_and_out(published, tmp_path):
    place, unet, control, _ = published
    ours, preset = import_(place, recipe.weights["diffusers"], presets)
    z, t, context, hint = inputs()
    down, mid = control(z, t, context, hint, return_dict=False)
    got = ours.controls[0](z, t, context, hint)
    for a, b in zip(got, (*down, mid), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    want = unet(z, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    torch.testing.assert_close(ours.says({"hint": hint}, z, t, context), want, rtol=0, atol=1e-4)

    export(ours.state_dict(), preset.config, recipe.weights["diffusers"], tmp_path / "back", preset.feed)
    again = reference("diffusers").ControlNetModel.from_pretrained(tmp_path / "back" / "controlnet").eval()
    for a, b in zip(again(z, t, context, hint, return_dict=False)[0], down, strict=True):
        torch.testing.assert_close(a, b)
    assert import_(tmp_path / "back", recipe.weights["diffusers"], presets)[1].config == preset.config


@torch.no_grad()
def test_guess_mode_and_two_nets_are_theirs(published):
    place, _, control, _ = published
    ours, preset = import_(place, recipe.weights["diffusers"], presets)
    z, t, context, hint = inputs()
    down, mid = control(z, t, context, hint, conditioning_scale=0.7, guess_mode=True, return_dict=False)
    got = ours.steer({"hint": hint, "guess": torch.tensor(1), "strength": torch.tensor(0.7)}, z, t, context)["add"]
    for a, b in zip(got, (*down, mid), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    multi = reference("diffusers.models.controlnets.multicontrolnet").MultiControlNetModel([control, control])
    two = preset.config.but(kinds=2).build()
    state = ours.state_dict()
    two.load_state_dict(state | {k.replace("controls.0", "controls.1"): v for k, v in state.items() if k.startswith("controls.0")})
    down, mid = multi(z, t, context, [hint, hint.flip(0)], [0.4, 1.5], return_dict=False)
    got = two.steer({"hint": torch.cat([hint, hint.flip(0)], 1), "strength": torch.tensor([0.4, 1.5])}, z, t, context)["add"]
    for a, b in zip(got, (*down, mid), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_birth_is_from_unet_and_a_copy_alone_loads_onto_any_base(published):
    place, _, control, born = published
    ours, preset = import_(place, recipe.weights["diffusers"], presets)
    base = {k: v.clone() for k, v in ours.unet.state_dict().items()}
    new = preset.config.build()
    new.unet.load_state_dict(base)
    new.after_start()
    keymap = layouts.copy_diffusers(preset.config)
    told = keymap.save(new.state_dict())
    assert told.keys() == born.keys()
    assert all(torch.equal(told[k], v) for k, v in born.items() if "cond_embedding" not in k), "as ControlNetModel.from_unet"
    load_into(new, keymap, control.state_dict())
    z, t, context, hint = inputs()
    for a, b in zip(new.controls[0](z, t, context, hint), ours.controls[0](z, t, context, hint), strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(v, base[k]) for k, v in new.unet.state_dict().items())


@torch.no_grad()
def test_the_original_file_with_its_base(published, tmp_path):
    place, _, control, _ = published
    ours, preset = import_(place, recipe.weights["diffusers"], presets)
    old = layouts.original_map(preset.config).save(ours.state_dict())
    assert {f"control_model.{k}.weight" for k in ("input_hint_block.6", "zero_convs.3.0", "middle_block_out.0", "input_blocks.0.0")} <= old.keys()
    convert = reference("diffusers.loaders.single_file_utils").convert_controlnet_checkpoint
    theirs = reference("diffusers").ControlNetModel.from_config(dict(control.config))
    renamed = {k.replace("hint_block.6.", "hint_block.14."): v.clone() for k, v in old.items() if k.startswith("control_model.")}
    theirs.load_state_dict(convert(renamed,
                                   dict(control.config)))     # the converter knows the hint encoder of f = 8 only, whose last layer is 14
    z, t, context, hint = inputs()
    for a, b in zip(theirs.eval()(z, t, context, hint, return_dict=False)[0], control(z, t, context, hint, return_dict=False)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.save(old, tmp_path / "control.pth")
    again, read = import_(tmp_path / "control.pth", recipe.weights["original"], presets)
    assert read.config.hint_widths == (4, 8) and read.config.unet == preset.config.unet
    assert all(torch.equal(again.state_dict()[k], v) for k, v in ours.state_dict().items() if k != "log_noise" and "scale" not in k)
    torch.save({k: v for k, v in old.items() if k.startswith("control_model.")}, tmp_path / "alone.pth")
    with pytest.raises(UserError, match="the copy alone"):
        import_(tmp_path / "alone.pth", recipe.weights["original"], presets)
