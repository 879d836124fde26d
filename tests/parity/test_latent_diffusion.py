"""Latent diffusion against diffusers and transformers: a pipeline's folder in and out, three guided steps, the original one-file layout. 1e-4."""
import json

import pytest
import torch
from reference import reference, shake

from polysense.archetypes.stable_diffusion import PARAMETERS_2, PARAMETERS_LDM
from polysense.archetypes.stable_diffusion import unet as unet_of
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.generate import latent_diffusion as recipe
from polysense.weights import latent_diffusion as layouts
from polysense.weights.convert import export, import_
from polysense.weights.layout import write_checkpoint

VOCAB, LENGTH, END = 60, 9, 59


def presets(name: str):
    return preset_of("latent_diffusion", name)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, U-Net, auto-encoder, text tower, scheduler), the folder as StableDiffusionPipeline.save_pretrained lays it out."""
    diffusers, hf, place = reference("diffusers"), reference("transformers"), tmp_path_factory.mktemp("sd") / "pipeline"
    torch.manual_seed(0)
    unet = shake(diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")))
    vae = shake(diffusers.AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, sample_size=16, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2))
    text = shake(hf.CLIPTextModel(hf.CLIPTextConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH,
        eos_token_id=END, bos_token_id=1, pad_token_id=END)))
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, beta_start=8.5e-4, beta_end=0.012, beta_schedule="scaled_linear",
                                        clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text), ("scheduler", scheduler)):
        part.save_pretrained(place / name)
    (place / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return place, unet, vae, text, scheduler


def caption():
    ids = torch.randint(2, END, (2, 5))
    ids[:, 0], ids[:, -1], ids[0, -2] = 1, END, END
    return ids


@torch.no_grad()
def their_picture(unet, vae, text, scheduler, ids, noise, guidance):
    """The pipeline's own loop: empty caption, doubled batch, DDIM, decode."""
    whole = torch.full((2, LENGTH), END)
    whole[:, :ids.shape[1]] = ids
    nothing = torch.full((2, LENGTH), END)
    nothing[:, 0] = 1
    context = torch.cat([text(nothing).last_hidden_state, text(whole).last_hidden_state])
    scheduler.set_timesteps(3)
    z, trail = noise, []
    for t in scheduler.timesteps:
        free, given = unet(torch.cat([z, z]), t, context).sample.chunk(2)
        z = scheduler.step(free + guidance * (given - free), t, z).prev_sample
        trail.append(z)
    return trail, vae.decode(z / vae.config.scaling_factor).sample


@torch.no_grad()
def test_a_pipelines_folder_in_three_steps_and_out(published, tmp_path):
    place, *theirs = published
    ours, preset = import_(place, recipe.weights["diffusers"], presets)
    ours.sampler = ours.sampler.but(name="ddim")
    assert preset.config.size == 16 and float(ours.scale) == 0.5 and preset.feed.text.length == LENGTH
    ids, noise = caption(), torch.randn(2, 4, 8, 8)
    trail, want = their_picture(*theirs, ids, noise, 3.0)
    seen = []
    ours.vae.post_quant.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    got = ours.generate_image(ids, steps=3, guidance=torch.tensor(3.0), noise=noise)
    torch.testing.assert_close(seen[0] * ours.scale, trail[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.context(ids), theirs[2](ours.whole(ids)).last_hidden_state, rtol=1e-4, atol=1e-4)

    export(ours.state_dict(), preset.config, recipe.weights["diffusers"], tmp_path / "back", preset.feed)
    diffusers, hf = reference("diffusers"), reference("transformers")
    again = [diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "back" / "unet").eval(),
             diffusers.AutoencoderKL.from_pretrained(tmp_path / "back" / "vae").eval(),
             hf.CLIPTextModel.from_pretrained(tmp_path / "back" / "text_encoder").eval(),
             diffusers.DDIMScheduler.from_pretrained(tmp_path / "back" / "scheduler")]
    torch.testing.assert_close(their_picture(*again, ids, noise, 3.0)[1], want, rtol=1e-4, atol=1e-4)
    assert import_(tmp_path / "back", recipe.weights["diffusers"], presets)[1].config == preset.config


@torch.no_grad()
def test_the_original_layout_holds_the_same_system(published, tmp_path):
    place, *_ = published
    ours, preset = import_(place, recipe.weights["diffusers"], presets)
    old = layouts.original_map(preset.config).save(ours.state_dict())
    assert {"model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight",
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"} <= old.keys()
    extra = {"betas": torch.zeros(3), "model_ema.decay": torch.zeros(()), "first_stage_model.loss.logvar": torch.zeros(()),
             "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, LENGTH), "scale_factor": torch.tensor(0.5)}
    torch.save({"state_dict": old | extra}, tmp_path / "sd.ckpt")
    again, read = import_(tmp_path / "sd.ckpt", recipe.weights["original"], presets)
    # shapes do not show heads of the text tower; the pictures agree because both are told
    assert read.config.unet == preset.config.unet and read.config.vae == preset.config.vae and float(again.scale) == 0.5
    ids, x, t = caption(), torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    context = ours.context(ids)
    torch.testing.assert_close(again.unet(x, t, context), ours.unet(x, t, context))
    torch.testing.assert_close(again.vae.decode(x), ours.vae.decode(x))
    assert all(torch.equal(a, b) for a, b in zip(again.text.state_dict().values(), ours.text.state_dict().values(), strict=True))
    write_checkpoint(tmp_path / "mine.ckpt", {}, old, recipe.weights["original"])
    assert torch.load(tmp_path / "mine.ckpt", weights_only=True).keys() == old.keys()


@torch.no_grad()
def test_version_2_says_the_velocity_and_pads_with_zero(tmp_path):
    """A context of 1024, heads of one width, linear joins, GELU, v as target: a pipeline of version 2 in three steps, and back."""
    diffusers, hf = reference("diffusers"), reference("transformers")
    torch.manual_seed(0)
    unet = shake(diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=1024, attention_head_dim=(1, 2),
        use_linear_projection=True, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")))
    vae = shake(diffusers.AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, sample_size=16, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2))
    text = shake(hf.CLIPTextModel(hf.CLIPTextConfig(
        vocab_size=VOCAB, hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16, max_position_embeddings=LENGTH,
        hidden_act="gelu", eos_token_id=END, bos_token_id=1, pad_token_id=0)))
    scheduler = diffusers.DDIMScheduler(beta_start=8.5e-4, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
                                        steps_offset=1, prediction_type="v_prediction")
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text), ("scheduler", scheduler)):
        part.save_pretrained(tmp_path / "two" / name)
    (tmp_path / "two" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    ours, preset = import_(tmp_path / "two", recipe.weights["diffusers"], presets)
    ours.sampler = ours.sampler.but(name="ddim")
    assert preset.config.predict == "velocity" and preset.config.pad == 0 and preset.feed.text.pad == "zero"
    ids, noise, nothing = caption(), torch.randn(2, 4, 8, 8), torch.tensor([[1, END]] * 2)
    whole = [torch.nn.functional.pad(x, (0, LENGTH - x.shape[1])) for x in (nothing, ids)]
    context = torch.cat([text(x).last_hidden_state for x in whole])
    scheduler.set_timesteps(3)
    z = noise
    for t in scheduler.timesteps:
        free, given = unet(torch.cat([z, z]), t, context).sample.chunk(2)
        z = scheduler.step(free + 3.0 * (given - free), t, z).prev_sample
    got = ours.generate_image(ids, steps=3, guidance=torch.tensor(3.0), noise=noise)
    torch.testing.assert_close(got, vae.decode(z / 0.5).sample, rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, recipe.weights["diffusers"], tmp_path / "back", preset.feed)
    assert import_(tmp_path / "back", recipe.weights["diffusers"], presets)[1].config == preset.config


@torch.no_grad()
def test_version_2_in_one_file_reads_open_clip_but_its_last_block(published, tmp_path):
    open_clip = reference("open_clip")
    torch.manual_seed(0)
    clip = shake(open_clip.CLIP(embed_dim=8, vision_cfg={"layers": 1, "width": 64, "image_size": 8, "patch_size": 8}, text_cfg={
        "context_length": LENGTH, "vocab_size": VOCAB, "width": 64, "heads": 1, "layers": 3}))
    other = preset_of("latent_diffusion", "version2")
    base = import_(published[0], recipe.weights["diffusers"], presets)[1].config
    config = other.config.but(vae=base.vae, size=16, scale=0.5, unet=unet_of((64, 128), (0,), 64, depth=1, head_width=64, join="linear"),
                              text=other.config.text.but(vocab=VOCAB, length=LENGTH, body=other.config.text.body.but(width=64, depth=2, heads=1)))
    made = shake(config.build())
    theirs = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    old = layouts.original_map(config).save(made.state_dict())
    old = {k: v for k, v in old.items() if "cond_stage" not in k} | {f"cond_stage_model.model.{k}": v for k, v in theirs.items()}
    torch.save({"state_dict": old}, tmp_path / "two.ckpt")
    ours, preset = import_(tmp_path / "two.ckpt", recipe.weights["original"], presets)
    body = preset.config.text.body
    assert preset.config.predict == "velocity" and preset.config.pad == 0 and (body.depth, body.heads, body.block.mlp.act) == (2, 1, "gelu")
    ids = caption()
    x = clip.token_embedding(ours.whole(ids)) + clip.positional_embedding
    for block in clip.transformer.resblocks[:-1]:
        x = block(x, attn_mask=clip.attn_mask)
    torch.testing.assert_close(ours.context(ids), clip.ln_final(x), rtol=0, atol=1e-4)
    again = layouts.original_map(preset.config).save(ours.state_dict())
    assert all(torch.equal(again[k], old[k]) for k in again) and {k.split(".")[4] for k in old.keys() - again.keys() if "resblocks" in k} == {"2"}


def test_version_2_has_the_published_size():
    with torch.device("meta"):
        made = preset_of("latent_diffusion", "version2").config.build()
    assert sum(p.numel() for p in (*made.unet.parameters(), *made.vae.parameters(), *made.text.parameters())) == PARAMETERS_2


@torch.no_grad()
def test_the_first_text_to_image_model_in_three_steps_and_out(tmp_path):
    """diffusers' own LDMTextToImagePipeline, from words to pixels: word pieces, a tower that sees both ways and reads padding, guidance."""
    diffusers, hf = reference("diffusers"), reference("transformers")
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    torch.manual_seed(0)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball", "blue", "sea"]))
    unet = shake(diffusers.UNet2DConditionModel(
        sample_size=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24, attention_head_dim=8, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")))
    vae = shake(diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=4, sample_size=32, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4))
    bert = shake(LDMBertModel(LDMBertConfig(vocab_size=10, encoder_layers=2, encoder_ffn_dim=48, encoder_attention_heads=2, head_dim=8, d_model=24)))
    scheduler = diffusers.DDIMScheduler(beta_start=8.5e-4, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
                                        steps_offset=1)
    pipe = diffusers.LDMTextToImagePipeline(vqvae=vae, bert=bert, tokenizer=hf.BertTokenizer(str(tmp_path / "vocab.txt")), unet=unet,
                                            scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "ldm")
    ours, preset = import_(tmp_path / "ldm", recipe.weights["text2im"], presets)
    ours.sampler = ours.sampler.but(name="ddim")
    assert preset.config.size == 32 and preset.config.pad == 0 and preset.config.text.body.block.attn.head_width == 8
    said, noise = ["a red ball", "blue sea"], torch.randn(2, 4, 4, 4)
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0]])
    want = pipe(said, num_inference_steps=3, guidance_scale=3.0, latents=noise, output_type="pt").images
    seen = []
    ours.vae.post_quant.register_forward_hook(lambda m, args, out: seen.append(args[0] * ours.scale))
    got = ours.generate_image(ids, steps=3, guidance=torch.tensor(3.0), noise=noise)
    torch.testing.assert_close((got / 2 + 0.5).clamp(0, 1), want, rtol=0, atol=1e-4)
    assert float(((got > -1) & (got < 1)).float().mean()) > 0.5              # the clamp hides little
    torch.testing.assert_close(ours.context(ids), bert(ours.whole(ids))[0], rtol=1e-4, atol=1e-4)
    moved = ids.clone()
    moved[:, 3] = 5
    assert float((ours.context(moved) - ours.context(ids))[:, 0].abs().max()) > 1e-3     # the first token sees later ones
    assert ours.text.last(ids).tolist() == [4, 3]

    export(ours.state_dict(), preset.config, recipe.weights["text2im"], tmp_path / "back", preset.feed)
    back = LDMBertModel.from_pretrained(tmp_path / "back" / "bert").eval()
    torch.testing.assert_close(back(ours.whole(ids))[0], bert(ours.whole(ids))[0], rtol=0, atol=0)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "back" / "unet").eval()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), unet.state_dict().values(), strict=True))
    assert import_(tmp_path / "back", recipe.weights["text2im"], presets)[1].config == preset.config

    # the authors' one file, its words named as in their x-transformer: attention and MLP alternate in one list, each behind its norm
    old = layouts.original_map(preset.config).save(ours.state_dict())
    theirs, words = bert.model, "cond_stage_model.transformer"
    assert torch.equal(old[f"{words}.attn_layers.layers.2.1.to_k.weight"], theirs.layers[1].self_attn.k_proj.weight)
    assert torch.equal(old[f"{words}.attn_layers.layers.3.1.net.2.bias"], theirs.layers[1].fc2.bias)
    assert torch.equal(old[f"{words}.attn_layers.layers.1.0.weight"], theirs.layers[0].final_layer_norm.weight)
    torch.save({"state_dict": old | {f"{words}.to_logits.weight": torch.zeros(10, 24), "scale_factor": torch.tensor(0.5)}}, tmp_path / "ldm.ckpt")
    read, said = import_(tmp_path / "ldm.ckpt", recipe.weights["original"], presets)
    assert said.config.unet.levels[0].attn.heads == 8 and said.config.pad == 0 and float(read.scale) == 0.5
    assert said.config.but(**{"text.body.heads": 2, "text.body.block.attn.head_width": 8}).text == preset.config.text      # no shape shows them
    assert all(torch.equal(a, b) for a, b in zip(read.text.state_dict().values(), ours.text.state_dict().values(), strict=True))
    assert read.unet.state_dict().keys() == ours.unet.state_dict().keys()


def test_the_first_text_to_image_model_has_the_published_size():
    """1.45 billion with the head of words that its text tower was defined with and never uses."""
    with torch.device("meta"):
        made = preset_of("latent_diffusion", "text2im").config.build()
    assert sum(p.numel() for p in (*made.unet.parameters(), *made.vae.parameters(), *made.text.parameters())) == PARAMETERS_LDM
    assert round((PARAMETERS_LDM - 83_653_863 + 30_522 * 1281) / 1e7) == 145


@pytest.mark.parametrize("harm, said", [
    (lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b""), "empty"),
    (lambda p: (p / "vae" / "config.json").unlink(), "config.json"), (lambda p: (p / "unet" / "config.json").write_text("[]"), "configuration"),
    (lambda p: __import__("shutil").rmtree(p / "text_encoder"), "text_encoder")], ids=["empty", "no config", "not a config", "no folder"])
def test_damaged_folders_get_one_line(published, tmp_path, harm, said):
    import shutil
    shutil.copytree(published[0], tmp_path / "bad")
    harm(tmp_path / "bad")
    with pytest.raises(UserError, match=said) as caught:
        import_(tmp_path / "bad", recipe.weights["diffusers"], presets)
    assert "\n" not in str(caught.value)
