"""SimMIM against transformers' Swin and ViT for masked image modelling and timm's Swin, and under the authors' names: through files, both ways."""
import re

import pytest
import torch
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.masking import masking_of
from polysense.systems.selfsup import simmim
from polysense.weights.convert import export, import_

SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64, "patch_size": 4, "encoder_stride": 8}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 64, "patch_size": 16,
       "encoder_stride": 16}


def presets(name):
    return preset_of("simmim", name)


@pytest.fixture()
def image():
    return torch.randn(3, 3, 64, 64)


def masked(patches):
    """As many hidden in each picture."""
    return torch.rand(3, patches, generator=torch.Generator().manual_seed(1)).argsort(1) < patches * 0.6


@torch.no_grad()
def assert_agree(ours, model, image, mask):
    masking = masking_of(mask)
    want = model(image, bool_masked_pos=mask, return_dict=True)
    torch.testing.assert_close(ours.decoder.draw(ours.see(image, masking)), want.reconstruction, rtol=0, atol=1e-4)
    torch.testing.assert_close(simmim.masked_l1(*ours.pairs(image, masking)), want.loss, rtol=0, atol=1e-4)
    hidden = model(image, bool_masked_pos=mask, output_hidden_states=True).hidden_states
    if hasattr(ours.encoder, "stages"):
        maps = ours.encoder.features(image, (mask, ours.hide.token))
        torch.testing.assert_close(maps[-1].flatten(1, 2), hidden[-1], rtol=0, atol=1e-4)


def test_transformers_swin_in_and_out(tmp_path, image):
    hf = reference("transformers")
    model = shake(hf.SwinForMaskedImageModeling(hf.SwinConfig(**SWIN)))
    model.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", simmim.weights["hf"], presets)
    assert_agree(ours, model, image, masked(256))
    assert preset.feed.image.size == 64 and preset.config.sampler.side == 8
    export(ours.state_dict(), preset.config, simmim.weights["hf"], tmp_path / "back", preset.feed)
    again = hf.SwinForMaskedImageModeling.from_pretrained(tmp_path / "back").eval()
    assert again.config.image_size == 64
    assert_agree(ours, again, image, masked(256))
    state = model.state_dict()                                                   # the names that transformers 5 has in memory
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "theirs" / "model.safetensors")
    assert_agree(import_(tmp_path / "theirs", simmim.weights["hf"], presets)[0], model, image, masked(256))


def test_transformers_vit_in_and_out(tmp_path, image):
    hf = reference("transformers")
    model = shake(hf.ViTForMaskedImageModeling(hf.ViTConfig(**VIT)))
    model.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", simmim.weights["hf_vit"], presets)
    assert_agree(ours, model, image, masked(16))
    export(ours.state_dict(), preset.config, simmim.weights["hf_vit"], tmp_path / "back", preset.feed)
    assert_agree(ours, hf.ViTForMaskedImageModeling.from_pretrained(tmp_path / "back").eval(), image, masked(16))


def old(key: str) -> str:
    """The authors' names of what transformers saves; a halving belongs to the end of a stage in both."""
    for a, b in ((r"^swin\.embeddings\.patch_embeddings\.projection", "encoder.patch_embed.proj"),
                 (r"^swin\.embeddings\.norm", "encoder.patch_embed.norm"), (r"^swin\.embeddings\.mask_token", "encoder.mask_token"),
                 (r"^swin\.layernorm", "encoder.norm"), (r"^swin\.encoder\.", "encoder."),
                 (r"attention\.self\.relative_position_bias_table", "attn.relative_position_bias_table"),
                 (r"attention\.output\.dense", "attn.proj"), (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
                 (r"intermediate\.dense", "mlp.fc1"), (r"(?<!attention\.)output\.dense", "mlp.fc2")):
        key = re.sub(a, b, key)
    return key


def test_the_authors_names_in_and_out(tmp_path):
    hf = reference("transformers")
    image = torch.randn(3, 3, 32, 32)
    model = shake(hf.SwinForMaskedImageModeling(hf.SwinConfig(**{**SWIN, "image_size": 32})))
    model.save_pretrained(tmp_path / "theirs")
    state = {old(k): v for k, v in load_file(tmp_path / "theirs" / "model.safetensors").items()}
    for s in range(2):
        for i in range(2):
            at = f"encoder.layers.{s}.blocks.{i}."
            for p in ("weight", "bias"):
                state[f"{at}attn.qkv.{p}"] = torch.cat([state.pop(f"{at}attention.self.{n}.{p}") for n in ("query", "key", "value")])
            state[f"{at}attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    torch.save({"model": state}, tmp_path / "simmim.pth")
    ours, preset = import_(tmp_path / "simmim.pth", simmim.weights["official"], presets)
    assert preset.feed.image.size == 32
    assert_agree(ours, model, image, masked(64))
    export(ours.state_dict(), preset.config, simmim.weights["official"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in back.items()) and {k.rpartition(".")[2] for k in set(state) - set(back)} == {
        "relative_position_index"}


@torch.no_grad()
def test_the_encoder_is_timms_swin(image):
    timm = reference("timm")
    model = shake(timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=0))
    from polysense.weights.swin_timm import TIMM

    encoder = preset_of("simmim").but(**{"config.encoder.base": 16}).config.build().encoder.eval()
    encoder.load_state_dict(TIMM.load(model.state_dict()))
    torch.testing.assert_close(encoder(image).tokens, model.forward_features(image).flatten(1, 2), rtol=0, atol=1e-4)


def test_what_a_layout_cannot_hold_is_refused(tmp_path):
    plan = preset_of("simmim", "vit_b_16")
    for name in ("hf", "official"):
        with pytest.raises(UserError, match="this layout holds a Swin"):
            simmim.weights[name].write(plan.config)
    with pytest.raises(UserError, match="learned absolute positions"):
        simmim.weights["hf_vit"].write(plan.config)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    save_file({"swin.embeddings.mask_token": torch.zeros(1, 1, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not 'swin'"):
        import_(tmp_path, simmim.weights["hf"], presets)
