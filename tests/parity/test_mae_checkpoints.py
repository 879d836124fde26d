"""MAE through published files and back: transformers and the authors' names. Random weights, toy sizes, tolerance 1e-4."""
import json

import pytest
import torch
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.position import sincos_2d
from polysense.objectives.masked import masked_mse
from polysense.systems.selfsup import mae
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
         "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 48}


def presets(name: str):
    return preset_of("mae", name)


@torch.no_grad()
def ours(system, image, noise):
    masking = system.sampler(len(image), (4, 4), noise=noise)
    seen = system.see(image, masking)
    prediction, target = system.pairs(image, masking)
    whole = system.decoder.whole(seen, masking)
    torch.testing.assert_close(masking.at_hidden(whole), prediction, rtol=1e-4, atol=1e-5)
    return {"logits": whole, "mask": masking.mask.float(), "restore": masking.restore.float(), "loss": masked_mse(prediction, target)}


@torch.no_grad()
def theirs(model, image, noise):
    out = model(image, noise=noise)
    return {"logits": out.logits, "mask": out.mask, "restore": out.ids_restore.float(), "loss": out.loss}


@pytest.mark.parametrize("norm", [False, True])
def test_transformers_in_and_out_under_all_names(tmp_path, norm):
    hf = reference("transformers")
    peer = shake(hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**SIZES, norm_pix_loss=norm, mask_ratio=0.6, layer_norm_eps=1e-3)))
    peer.save_pretrained(tmp_path / "theirs")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "theirs")
    system, preset = import_(tmp_path / "theirs", mae.weights["hf"], presets)
    image, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    want = theirs(peer, image, noise)
    assert_agree(ours(system, image, noise), want)
    assert preset.config.target.norm == ("patch" if norm else "none") and preset.config.sampler.ratio == 0.6

    table = mae.weights["hf"].keymap(preset.config)
    states = [table.load(s) for s in (load_file(tmp_path / "theirs" / "model.safetensors"), peer.state_dict())]
    assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    export(system.state_dict(), preset.config, mae.weights["hf"], tmp_path / "back", preset.feed)
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert "decoder.decoder_layers.1.attention.attention.query.weight" in written and "vit.encoder.layer.0.output.dense.bias" in written
    again, notes = hf.ViTMAEForPreTraining.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    assert_agree(theirs(again.eval(), image, noise), want)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_fixed_positions_are_theirs(grid):
    """Their table with its two halves swapped, as the released weights have it (transformers leaves it at zero in a fresh model)."""
    reference("transformers")
    table = reference("transformers.models.vit_mae.modeling_vit_mae").build_2d_sinusoidal_position_embedding(*grid, 32, cls_token=True)
    torch.testing.assert_close(sincos_2d(32, grid, 1)[0], torch.cat([table[:, 16:], table[:, :16]], 1))
    system = preset_of("mae").config.build()
    assert torch.equal(system.encoder.position, sincos_2d(128, (8, 8), 1)) and torch.equal(system.decoder.position, sincos_2d(96, (8, 8), 1))


def test_the_authors_files_in_and_out(tmp_path):
    """Their class is not installed: transformers' holds the same weights under other names."""
    hf = reference("transformers")
    sizes = {**SIZES, "hidden_size": 128, "num_attention_heads": 2, "decoder_hidden_size": 64, "decoder_num_attention_heads": 2,
             "layer_norm_eps": 1e-6}
    peer = shake(hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**sizes)))
    state = {}
    for name, value in peer.state_dict().items():
        name = name.removeprefix("vit.embeddings.").removeprefix("vit.").removeprefix("decoder.")
        for a, b in (("position_embeddings", "pos_embed"), ("patch_embeddings.projection", "patch_embed.proj"),
                     ("decoder_layers.", "decoder_blocks."), ("layers.", "blocks."), ("attention.o_proj", "attn.proj"),
                     ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("layernorm.", "norm.")):
            name = name.replace(a, b) if not (a == "layers." and name.startswith("decoder_")) else name
        if "attention.q_proj" in name:
            parts = [peer.state_dict()[k] for k in (o for p in "qkv" for o in peer.state_dict()
                                                    if o == original(peer, value).replace("q_proj", f"{p}_proj"))]
            state[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif "attention." not in name:
            state[name] = value
    torch.save({"model": state, "epoch": 1}, tmp_path / "mae.pth")
    system, preset = import_(tmp_path / "mae.pth", mae.weights["facebook"], presets)
    image, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    assert_agree(ours(system, image, noise), theirs(peer, image, noise))
    export(system.state_dict(), preset.config, mae.weights["facebook"], tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(v, back[k]) for k, v in state.items())
    torch.save({"model": {k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"} | {"decoder_pos_embed": torch.zeros(1)}},
               tmp_path / "encoder.pth")
    with pytest.raises(UserError, match="no decoder"):
        import_(tmp_path / "encoder.pth", mae.weights["facebook"], presets)


def original(peer, value) -> str:
    return next(k for k, v in peer.state_dict().items() if v.data_ptr() == value.data_ptr())


def test_the_encoder_is_timms_vit():
    """timm vit_*_patch16_224.mae: the same tower, all tokens visible."""
    timm = reference("timm")
    peer = shake(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=2, num_classes=0))
    from polysense.weights.vit_timm import VISION
    system = preset_of("mae").but(**{"config.encoder.image_size": 32, "config.encoder.body": mae.tower(48, 2, 3)}).config.build().eval()
    system.encoder.load_state_dict(VISION.load(peer.state_dict()))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_agree({"tokens": system.encoder(image).tokens}, {"tokens": peer.forward_features(image)})


@pytest.mark.parametrize("case", ["other model", "no config", "empty", "cut"])
def test_files_that_are_no_mae_are_refused_in_one_line(tmp_path, case):
    config = preset_of("mae").config
    export(config.build().state_dict(), config, mae.weights["hf"], tmp_path / "good")
    file, about = tmp_path / "good" / "model.safetensors", tmp_path / "good" / "config.json"
    if case == "other model":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"model_type": "vit"}))
    elif case == "no config":
        about.unlink()
    elif case == "empty":
        file.write_bytes(b"")
    else:
        save_file({k: v for k, v in load_file(file).items() if "decoder_pred" not in k}, file)
    with pytest.raises(UserError) as caught:
        import_(tmp_path / "good", mae.weights["hf"], presets)
    assert "\n" not in str(caught.value)
