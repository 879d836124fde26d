"""BEiT v2 under its authors' names: the model against transformers' BEiT (the branch written out) and timm's, the tokenizer against a slow twin."""
import re

import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.nn.masking import masking_of
from polysense.systems.selfsup import beit_v2
from polysense.weights.convert import export, import_

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32, "patch_size": 8, "layer_scale_init_value": 0.1,
         "use_mean_pooling": True, "vocab_size": 40, "layer_norm_eps": 1e-6, "use_mask_token": True, "use_shared_relative_position_bias": True,
         "use_relative_position_bias": False}


def released(state, depth):
    """transformers' names -> the authors'."""
    out = {}
    for key, value in state.items():
        key = re.sub(r"^beit\.(layers\.(\d+)\.)?", lambda m: f"blocks.{m[2]}." if m[2] else "", key)
        for new, old in (("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.o_proj", "attn.proj"), ("lambda_", "gamma_"),
                         ("attention.q_proj.bias", "attn.q_bias"), ("attention.v_proj.bias", "attn.v_bias"), ("layernorm", "norm"),
                         ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.", ""),
                         ("shared_position_bias", "rel_pos_bias")):
            key = key.replace(new, old)
        out[key] = value
    for i in range(depth):
        out[f"blocks.{i}.attn.qkv.weight"] = torch.cat([out.pop(f"blocks.{i}.attention.{n}_proj.weight") for n in "qkv"])
    return out


@torch.no_grad()
def test_released_names_in_and_out_and_both_branches(tmp_path):
    hf = reference("transformers")
    model = shake(hf.BeitForMaskedImageModeling(hf.BeitConfig(**SIZES, num_hidden_layers=5)))
    whole = released(model.state_dict(), 5)                       # the fifth block plays the aggregating one
    state = {re.sub(r"^blocks\.4\.", "cls_pt_layers.0.", k): v for k, v in whole.items()}
    torch.save({"model": state}, tmp_path / "beitv2.pth")
    toy = {"config.target.codec.encoder.body.width": 16, "config.target.codec.encoder.body.heads": 2, "config.target.codec.encoder.body.depth": 1}
    ours, preset = import_(tmp_path / "beitv2.pth", beit_v2.weights["unilm"], lambda name: preset_of("beit_v2", name).but(
        **toy, **{"config.encoder.body.heads": 4}))
    image, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
    masking = masking_of(mask)
    assert preset.config.early == 3 and preset.config.aggregate.depth == 1 and preset.config.target.codec.codes == 40
    main, branch = ours.said(image, masking)
    hidden = model.beit(image, bool_masked_pos=mask, output_hidden_states=True).hidden_states
    logits = lambda x: model.lm_head(model.layernorm(x))[:, 1:][mask]
    torch.testing.assert_close(main, logits(hidden[4]), rtol=0, atol=1e-4)
    both = torch.cat([hidden[4][:, :1], hidden[3][:, 1:]], 1)
    last = model.beit.layers[4]
    bias = ours.encoder.body.relative(17)
    attn = last.attention
    y = last.layernorm_before(both)
    q, k, v = (f(y).unflatten(-1, (4, -1)).transpose(1, 2) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(2, -1, -1, -1)).transpose(1, 2).flatten(2)
    both = both + last.lambda_1 * attn.o_proj(mixed)
    both = both + last.lambda_2 * last.mlp(last.layernorm_after(both))
    torch.testing.assert_close(branch, logits(both), rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, beit_v2.weights["unilm"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in back.items()) and all("index" in k for k in set(state) - set(back))


@torch.no_grad()
def test_the_tokenizer_is_two_of_timms_vits_around_a_table(tmp_path):
    timm = reference("timm")
    vit = timm.models.vision_transformer.VisionTransformer
    encoder = shake(vit(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=0))
    decoder = shake(vit(img_size=4, patch_size=1, in_chans=16, embed_dim=64, depth=1, num_heads=1, num_classes=0))
    down, up = (shake(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, n))) for n in (16, 24))
    book = F.normalize(torch.randn(50, 16), dim=-1)
    state = {f"{name}.{k}": v for name, part in (("encode_task_layer", down), ("decode_task_layer", up)) for k, v in part.state_dict().items()}
    for name, part in (("encoder", encoder), ("decoder", decoder)):              # as released: no bias of keys, the last norm by another name
        for key, value in part.state_dict().items():
            if key.endswith("qkv.bias"):
                value[64:128] = 0
                state |= {f"{name}.{key.replace('qkv.bias', f'{n}_bias')}": v.clone() for n, v in zip("qv", (value[:64], value[128:]), strict=True)}
            else:
                state[f"{name}.{key.replace('norm.', 'fc_norm.') if key.startswith('norm.') else key}"] = value
    count = torch.rand(50)
    state |= {"quantize.embedding.weight": book, "quantize.embedding.embed_avg": torch.zeros(50, 16), "quantize.cluster_size": count,
              "quantize.embedding.cluster_size": torch.rand(50), "quantize.embedding.initted": torch.ones(1)}
    torch.save({"model": state | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}}, tmp_path / "vqkd.pth")
    toy = {"config.teacher.tower.body.width": 64, "config.teacher.tower.body.depth": 1, "config.teacher.head.into": 64,
           "config.teacher.tower.body.heads": 1}
    ours, preset = import_(tmp_path / "vqkd.pth", beit_v2.weights["unilm_tokenizer"], lambda name: preset_of("beit_v2", name).but(**toy))
    assert float(ours.codec.quantizer.begun) == 1 and torch.equal(ours.codec.quantizer.count, count), "training goes on from these codes"
    image = torch.randn(3, 3, 32, 32)
    z = F.normalize(down(encoder.forward_features(image)[:, 1:]), dim=-1)
    ids = ((z[:, :, None] - book) ** 2).sum(-1).argmin(-1)                        # by distance: on the sphere the same as by cosine
    codes = ours.encode_codes(image)
    assert torch.equal(codes.flatten(1), ids)
    said = up(decoder.forward_features(book[ids].transpose(1, 2).unflatten(2, (4, 4)))[:, 1:])
    torch.testing.assert_close(ours.restored(ours.codec(image)[1].vectors), said, rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, beit_v2.weights["unilm_tokenizer"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    unread = {"quantize.embedding.embed_avg", "quantize.embedding.cluster_size"}
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items() if k not in unread)
    assert all(back[k].shape == state[k].shape for k in unread)


@torch.no_grad()
def test_the_backbone_is_timms_beit():
    timm = reference("timm")
    model = shake(timm.models.beit.Beit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, init_values=0.1, use_abs_pos_emb=False,
                                        use_shared_rel_pos_bias=True, num_classes=0, global_pool="token"))
    from polysense.towers.beit import shared_bias
    from polysense.weights.beit import unilm_keymap

    encoder = shared_bias(32, 8, 32, 2, 4, 0.1).build().eval()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(("k_bias", "relative_position_index"))}
    extra = {"mask_token": torch.zeros(1, 1, 32), "lm_head.weight": torch.zeros(2, 32), "lm_head.bias": torch.zeros(2)}
    loaded = unilm_keymap(None).load(state | extra)
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in loaded.items() if k.startswith("encoder.")})
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(image).tokens, model.forward_features(image), rtol=0, atol=1e-4)
