"""LiT and ViT through their authors' .npz files and back, against transformers' ViT and BERT. Random weights, toy sizes, tolerance 1e-4."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from torch import Tensor, nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.align import lit
from polysense.systems.backbone import vit
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_
from polysense.weights.files import read_state

HEADS, SIZES = 4, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "hidden_act": "gelu_pytorch_tanh"}


def pair():
    """transformers' dual encoder of both towers; BERT's heads are 64 wide in the released files, so it has one here."""
    hf = reference("transformers")
    torch.manual_seed(0)
    image = hf.ViTConfig(**SIZES, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    text = hf.BertConfig(**{**SIZES, "num_attention_heads": 1}, vocab_size=60, max_position_embeddings=12, layer_norm_eps=1e-12)
    return shake(hf.VisionTextDualEncoderModel(hf.VisionTextDualEncoderConfig.from_vision_text_configs(image, text, projection_dim=32)))


def dense(at: str, layer: nn.Linear) -> dict[str, Tensor]:
    return {f"{at}/kernel": layer.weight.T, f"{at}/bias": layer.bias}


def norm(at: str, layer: nn.LayerNorm) -> dict[str, Tensor]:
    return {f"{at}/scale": layer.weight, f"{at}/bias": layer.bias}


def image_arrays(tower) -> dict[str, Tensor]:
    """A ViT of transformers under flax's names, by hand: each head a slice of its own."""
    e, width = tower.embeddings, SIZES["hidden_size"] // HEADS
    conv = e.patch_embeddings.projection
    out = {"cls": e.cls_token, "Transformer/posembed_input/pos_embedding": e.position_embeddings, "embedding/bias": conv.bias,
           "embedding/kernel": conv.weight.permute(2, 3, 1, 0), **norm("Transformer/encoder_norm", tower.layernorm)}
    names = dict(tower.named_modules())
    for i in range(2):
        at, layer = f"Transformer/encoderblock_{i}", next(m for n, m in names.items() if n.endswith(f"layer.{i}") or n.endswith(f"layers.{i}"))
        inner = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        q, k, v, o, up, down = inner.values()
        for name, linear in (("query", q), ("key", k), ("value", v)):
            kernel = torch.stack([linear.weight[h * width:(h + 1) * width].T for h in range(HEADS)], 1)
            out |= {f"{at}/MultiHeadDotProductAttention_1/{name}/kernel": kernel,
                    f"{at}/MultiHeadDotProductAttention_1/{name}/bias": torch.stack(linear.bias.split(width))}
        out |= {f"{at}/MultiHeadDotProductAttention_1/out/kernel": torch.stack([o.weight[:, h * width:(h + 1) * width].T for h in range(HEADS)]),
                f"{at}/MultiHeadDotProductAttention_1/out/bias": o.bias,
                **dense(f"{at}/MlpBlock_3/Dense_0", up), **dense(f"{at}/MlpBlock_3/Dense_1", down),
                **norm(f"{at}/LayerNorm_0", layer.layernorm_before), **norm(f"{at}/LayerNorm_2", layer.layernorm_after)}
    return out


def text_arrays(tower) -> dict[str, Tensor]:
    e, at = tower.embeddings, "BertEncoder_0"
    tables = {"token": e.word_embeddings, "position": e.position_embeddings, "segment": e.token_type_embeddings}
    out = {f"{at}/embedder/embedders_{n}_ids/embedding": t.weight for n, t in tables.items()} | norm(f"{at}/layer_norm", e.LayerNorm)
    for i, layer in enumerate(tower.encoder.layer):
        a, m = (f"{at}/encoder_block/layer_sequence/layers_{i}/{n}_block" for n in ("attention", "mlp"))
        own = layer.attention.self
        for name, linear in (("query", own.query), ("key", own.key), ("value", own.value)):
            out |= dense(f"{a}/attention_layer/{name}", linear)
        out |= dense(f"{a}/dense_layer", layer.attention.output.dense) | norm(f"{a}/layer_norm", layer.attention.output.LayerNorm)
        out |= dense(f"{m}/mlp/dense_layer", layer.intermediate.dense) | dense(f"{m}/dense_layer", layer.output.dense)
        out |= norm(f"{m}/layer_norm", layer.output.LayerNorm)
    return out


def saved(path, arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    held = {k: np.ascontiguousarray(v.detach().numpy()) for k, v in arrays.items()}
    np.savez(path, **held)
    return held


@torch.no_grad()
@pytest.mark.parametrize("head", ["none", "dense"])
def test_features_logits_and_loss_through_the_released_layout_both_ways(tmp_path, head):
    theirs = pair()
    on_text, on_image = shake(nn.Linear(32, 32 if head == "none" else 24)), shake(nn.Linear(32, 24))
    arrays = {f"img/{k}": v for k, v in image_arrays(theirs.vision_model).items()}
    arrays |= {f"txt/{k}": v for k, v in text_arrays(theirs.text_model).items()}
    arrays |= dense("txt/head", on_text) | {"t": torch.tensor([2.5])} | (dense("img/head", on_image) if head == "dense" else {})
    held = saved(tmp_path / "lit.npz", arrays)
    ours, preset = import_(tmp_path / "lit.npz", lit.weights["official"], lambda name: preset_of("lit", name))
    image, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 60, (3, 12))
    ids[1, 5:] = 0
    seen = theirs.vision_model(image).last_hidden_state[:, 0]
    said = on_text(theirs.text_model(ids, attention_mask=(ids != 0).long()).last_hidden_state[:, 0])            # [CLS] as it is: no pooler
    one, two = F.normalize(seen if head == "none" else on_image(seen), dim=-1), F.normalize(said, dim=-1)
    logits, target = torch.tensor(2.5).exp() * one @ two.T, torch.arange(3)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    mine = ours.embed({"image": image, "text": ids})
    assert_agree({**mine, "logits": ours.scale * mine["image"] @ mine["text"].T, "loss": ours.compare(mine)["contrast"]},
                 {"image": one, "text": two, "logits": logits, "loss": loss})
    assert bool(list(ours.image_head.parameters())) == (head == "dense") and preset.feed.image.size == 32

    export(ours.state_dict(), preset.config, lit.weights["official"], tmp_path / "back.npz")
    with np.load(tmp_path / "back.npz") as back:
        assert set(back.files) == set(held) and all(np.array_equal(back[k], v) for k, v in held.items())


@torch.no_grad()
@pytest.mark.parametrize("head", ["none", "dense", "tanh"])
def test_vits_arrays_in_and_out(tmp_path, head):
    theirs = pair().vision_model
    out, pre = shake(nn.Linear(32, 7)), shake(nn.Linear(32, 32))
    arrays = image_arrays(theirs) | (dense("head", out) if head != "none" else {}) | (dense("pre_logits", pre) if head == "tanh" else {})
    held = saved(tmp_path / "B_16.npz", arrays)
    ours, preset = import_(tmp_path / "B_16.npz", vit.weights["jax"], lambda name: preset_of("vit", name))
    image = torch.randn(2, 3, 32, 32)
    states = theirs(image).last_hidden_state
    feature = states[:, 0]
    want = {"none": feature, "dense": out(feature), "tanh": out(torch.tanh(pre(feature)))}[head]
    assert_agree({"tokens": ours.backbone(image).tokens, "logits": ours.classify(image)}, {"tokens": states, "logits": want})
    assert (preset.feed.image.mean, preset.feed.image.fit, preset.feed.image.size) == ((0.5,) * 3, "squash", 32)
    export(ours.state_dict(), preset.config, vit.weights["jax"], tmp_path / "back.npz")
    with np.load(tmp_path / "back.npz") as back:
        assert set(back.files) == set(held) and all(np.array_equal(back[k], v) for k, v in held.items())


def test_what_these_files_cannot_hold_and_what_is_no_such_file(tmp_path):
    with pytest.raises(UserError, match="plain ViT"):
        lit.weights["official"].write(lit.tiny().config)
    with pytest.raises(UserError, match="GELU by tanh"):
        vit.weights["jax"].write(vit.paper().config)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    np.savez(tmp_path / "object.npz", a=np.array({"runs": "code"}, dtype=object))
    for name in ("cut.npz", "object.npz"):
        with pytest.raises(UserError, match="damaged, cut short"):
            read_state(tmp_path / name)
