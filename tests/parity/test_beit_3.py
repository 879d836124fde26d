"""BEiT-3's released layouts in and out, against torchscale where it is there; its half for pictures against timm's VisionTransformer, both ways."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file, save_file
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.selfsup import beit_3
from polysense.towers.multiway import prefix_sees
from polysense.weights.convert import export, import_

WIDE, DEPTH, PATCH, SIDE, VOCAB, LENGTH = 64, 2, 8, 4, 70, 20
N = 1 + SIDE * SIDE


def presets(name):
    """The released presets with a toy tokenizer: published files have none."""
    return preset_of("beit_3", name).but(**{"config.target.codec.encoder.body.width": 12, "config.target.codec.encoder.body.depth": 1,
                                            "config.target.codec.codes": 16})


def released(head=None, norm=True):
    """A file as the authors write it, at random."""
    g, state = torch.Generator().manual_seed(3), {}

    def put(name, *shape):
        one = "norm" in name and name.endswith("weight")
        state[name] = torch.randn(*shape, generator=g) * (0.1 if len(shape) > 1 else 0.3) + one

    def dense(name, out, into):
        put(f"{name}.weight", out, into)
        put(f"{name}.bias", out)

    def layer_norm(name, wide=WIDE):
        put(f"{name}.weight", wide)
        put(f"{name}.bias", wide)

    for x in "AB":
        for i in range(DEPTH):
            at = f"beit3.encoder.layers.{i}"
            for n in ("q_proj", "k_proj", "v_proj", "out_proj"):
                dense(f"{at}.self_attn.{n}.{x}", WIDE, WIDE)
            for n in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                layer_norm(f"{at}.{n}.{x}")
            dense(f"{at}.ffn.{x}.fc1", 4 * WIDE, WIDE)
            dense(f"{at}.ffn.{x}.fc2", WIDE, 4 * WIDE)
            layer_norm(f"{at}.ffn.{x}.ffn_layernorm", 4 * WIDE)
        if norm:
            layer_norm(f"beit3.encoder.layer_norm.{x}")
        put(f"beit3.encoder.embed_positions.{x}.weight", N + 2 if x == "A" else LENGTH + 2, WIDE)
    put("beit3.text_embed.weight", VOCAB, WIDE)
    put("beit3.vision_embed.cls_token", 1, 1, WIDE)
    put("beit3.vision_embed.mask_token", 1, 1, WIDE)
    put("beit3.vision_embed.proj.weight", WIDE, 3, PATCH, PATCH)
    put("beit3.vision_embed.proj.bias", WIDE)
    if head == "unilm_retrieval":
        put("vision_head.weight", WIDE, WIDE)
        put("language_head.weight", WIDE, WIDE)
        state["logit_scale"] = torch.tensor(2.0)
    elif head == "unilm_captioning":
        dense("mlm_head", VOCAB, WIDE)
    elif head == "unilm_vqa":
        layer_norm("pooler.norm")
        dense("pooler.dense", WIDE, WIDE)
        dense("head.0", 2 * WIDE, WIDE)
        layer_norm("head.1", 2 * WIDE)
        dense("head.3", 9, 2 * WIDE)
    elif head == "unilm_labels":
        layer_norm("fc_norm")
        dense("head", 7, WIDE)
    elif head == "unilm_nlvr2":
        layer_norm("head.norm1", 4 * WIDE)
        dense("head.dense1", 2 * WIDE, 4 * WIDE)
        layer_norm("head.norm2", 2 * WIDE)
        dense("head.dense2", 2, 2 * WIDE)
    return state


def half_for_pictures(state):
    """The file's A half under timm's names: positions without the two rows in front, one qkv."""
    out = {"cls_token": state["beit3.vision_embed.cls_token"], "pos_embed": state["beit3.encoder.embed_positions.A.weight"][None, 2:]}
    for key, value in state.items():
        if ".B." in key or "embed_positions" in key or key.endswith(("cls_token", "mask_token", "text_embed.weight")):
            continue
        for old, new in (("beit3.vision_embed.", "patch_embed."), ("beit3.encoder.layer_norm.A", "norm"), ("beit3.encoder.layers", "blocks"),
                         ("ffn.A.ffn_layernorm", "mlp.norm"), ("ffn.A", "mlp"), ("self_attn_layer_norm.A", "norm1"), ("final_layer_norm.A", "norm2"),
                         ("self_attn.inner_attn_ln.A", "attn.norm"), ("self_attn.out_proj.A", "attn.proj"), ("self_attn", "attn")):
            key = key.replace(old, new)
        out[key] = value
    for i in range(DEPTH):
        for p in ("weight", "bias"):
            out[f"blocks.{i}.attn.qkv.{p}"] = torch.cat([out.pop(f"blocks.{i}.attn.{n}_proj.A.{p}") for n in "qkv"])
    return out


@torch.no_grad()
@pytest.mark.parametrize("name", list(beit_3.weights))
def test_released_files_go_in_and_out(tmp_path, name):
    state = released(name, norm=name not in ("unilm_vqa", "unilm_labels"))
    save_file(state, tmp_path / "beit3.safetensors")
    ours, preset = import_(tmp_path / "beit3.safetensors", beit_3.weights[name], presets)
    assert (preset.config.net.body.depth, preset.config.net.text.length, preset.config.net.text.vocab) == (DEPTH, LENGTH, VOCAB)
    export(ours.state_dict(), preset.config, beit_3.weights[name], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items())


@torch.no_grad()
def test_pictures_as_timm_reads_them_both_ways(tmp_path):
    timm = reference("timm.models.vision_transformer")
    state, image = released(), torch.randn(3, 3, SIDE * PATCH, SIDE * PATCH)
    theirs = timm.VisionTransformer(img_size=SIDE * PATCH, patch_size=PATCH, embed_dim=WIDE, depth=DEPTH, num_heads=1, num_classes=0,
                                    scale_attn_norm=True, scale_mlp_norm=True, class_token=True, global_pool="avg", fc_norm=False,
                                    norm_layer=partial(nn.LayerNorm, eps=1e-5)).eval()
    theirs.load_state_dict(half_for_pictures(state))
    save_file(state, tmp_path / "beit3.safetensors")
    ours, preset = import_(tmp_path / "beit3.safetensors", beit_3.weights["unilm"], presets)
    torch.testing.assert_close(ours.net(image).image, theirs.forward_features(image), rtol=0, atol=1e-4)
    other = preset.config.build().eval()                                 # and back: from other weights of ours to theirs
    export(other.state_dict(), preset.config, beit_3.weights["unilm"], tmp_path / "back.safetensors")
    theirs.load_state_dict(half_for_pictures(load_file(tmp_path / "back.safetensors")))
    torch.testing.assert_close(theirs.forward_features(image), other.net(image).image, rtol=0, atol=1e-4)
    converted = timm._convert_beit3(dict(load_file(tmp_path / "back.safetensors")), theirs)
    assert all(torch.equal(converted[k], v) for k, v in theirs.state_dict().items() if k in converted)


@torch.no_grad()
def test_pairs_texts_and_captions_as_torchscale_reads_them(tmp_path):
    config = reference("torchscale.architecture.config")
    model = reference("torchscale.model.BEiT3")
    args = config.EncoderConfig(img_size=SIDE * PATCH, patch_size=PATCH, vocab_size=VOCAB, multiway=True, layernorm_embedding=False,
                                normalize_output=True, no_output_layer=True, encoder_embed_dim=WIDE, encoder_attention_heads=1,
                                encoder_ffn_embed_dim=4 * WIDE, encoder_layers=DEPTH, max_source_positions=LENGTH + 2)
    theirs = shake(model.BEiT3(args))
    save_file({f"beit3.{k}": v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "beit3.safetensors")
    ours, preset = import_(tmp_path / "beit3.safetensors", beit_3.weights["unilm"], presets)
    image, text = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH), torch.tensor([[0, 9, 8, 7, 2], [0, 9, 2, 1, 1]])
    pad = text == 1
    want = theirs(textual_tokens=text, visual_tokens=image, text_padding_position=pad)["encoder_out"]
    seen = ours.net(image, text)
    torch.testing.assert_close(seen.image, want[:, :N], rtol=0, atol=1e-4)
    torch.testing.assert_close(seen.text[~pad], want[:, N:][~pad], rtol=0, atol=1e-4)
    want = theirs(textual_tokens=text, text_padding_position=pad)["encoder_out"]
    torch.testing.assert_close(ours.net(text=text).text[~pad], want[~pad], rtol=0, atol=1e-4)
    hidden = torch.rand(2, N - 1) < 0.4
    want = theirs(visual_tokens=image, vision_masked_position=hidden)["encoder_out"]
    torch.testing.assert_close(ours.net(image, fill=(hidden, ours.hide.token)).image, want, rtol=0, atol=1e-4)
    sees = prefix_sees(N, 5)
    want = theirs(textual_tokens=text[:1], visual_tokens=image[:1], attn_mask=(~sees).long())["encoder_out"]
    torch.testing.assert_close(torch.cat(ours.net(image[:1], text[:1], sees=sees), 1), want, rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, beit_3.weights["unilm"], tmp_path / "back.safetensors")
    theirs.load_state_dict({k.removeprefix("beit3."): v for k, v in load_file(tmp_path / "back.safetensors").items()})


@torch.no_grad()
def test_features_of_the_model_for_search(tmp_path):
    state = released("unilm_retrieval")
    save_file(state, tmp_path / "beit3.safetensors")
    ours, _ = import_(tmp_path / "beit3.safetensors", beit_3.weights["unilm_retrieval"], presets)
    image, text = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH), torch.tensor([[0, 9, 8, 2], [0, 9, 2, 1]])
    want = F.normalize(ours.net(image).image[:, 0] @ state["vision_head.weight"].T, dim=-1)
    torch.testing.assert_close(ours.encode_image(image), want)
    want = F.normalize(ours.net(text=text).text[:, 0] @ state["language_head.weight"].T, dim=-1)
    torch.testing.assert_close(ours.encode_text(text), want)
    assert float(ours.log_scale) == 2.0


def test_what_the_authors_cannot_hold_is_refused(tmp_path):
    for preset, name, why in (("tiny", "unilm", "cannot hold"), ("base", "unilm_vqa", "it has no pooler")):
        with pytest.raises(UserError, match=why):
            export({}, preset_of("beit_3", preset).config, beit_3.weights[name], tmp_path / "out.safetensors")
    state = {k: v for k, v in released().items() if "inner_attn_ln" not in k}
    save_file(state, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match="inner norms"):
        import_(tmp_path / "old.safetensors", beit_3.weights["unilm"], presets)
