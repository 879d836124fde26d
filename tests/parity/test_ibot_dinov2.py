"""iBOT's and DINOv2's published files in and out, against timm, transformers and the authors' names. Random weights, toy sizes, tolerance 1e-4."""
import argparse
from collections import OrderedDict

import pytest
import torch
from reference import reference, shake
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.selfsup import dinov2, ibot
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_


def of(system: str):
    return lambda name: preset_of(system, name)


def vit(size=32, patch=8, **more):
    timm = reference("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=patch, embed_dim=128, num_heads=2, depth=2, num_classes=0,
                             dynamic_img_size=True, **more)


class Head(nn.Module):
    """The authors' head, one last layer for both kinds of tokens, torch's weight normalisation written out."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(128, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 16))
        self.last_layer = nn.Module()
        self.last_layer.weight_g, self.last_layer.weight_v = nn.Parameter(torch.ones(20, 1)), nn.Parameter(torch.randn(20, 16))
        self.last_layer2 = self.last_layer

    def forward(self, x):
        x = nn.functional.normalize(self.mlp(x), dim=-1)
        return x @ torch._weight_norm(self.last_layer.weight_v, self.last_layer.weight_g, 0).T


@torch.no_grad()
def test_ibots_full_checkpoint(tmp_path):
    parts = {n: nn.ModuleDict({"backbone": shake(vit()), "head": Head()}) for n in ("student", "teacher")}
    masked = torch.randn(1, 128)
    student = OrderedDict((f"module.{k}", v) for k, v in parts["student"].state_dict().items()) | {"module.backbone.masked_embed": masked}
    centres = {"center": torch.randn(1, 20), "center2": torch.randn(1, 1, 20)}
    torch.save({"student": student, "teacher": parts["teacher"].state_dict(), "optimizer": {"state": {}}, "epoch": 800,
                "args": argparse.Namespace(arch="vit_small"), "ibot_loss": centres}, tmp_path / "full.pth")
    ours, preset = import_(tmp_path / "full.pth", ibot.weights["bytedance"], of("ibot"))
    image, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 16) > 0.5
    held, teacher, net = ours.teacher.module, parts["teacher"], parts["student"]["backbone"]
    tokens = teacher["backbone"].forward_features(image)
    assert_agree({"teacher tokens": held["backbone"](image).tokens, "teacher patches": held["projector"](held["backbone"](image).tokens[:, 1:]),
             "student": ours.project(image)},
            {"teacher tokens": tokens, "teacher patches": teacher["head"](tokens[:, 1:]), "student": parts["student"]["head"](net(image))})
    x = net.patch_embed(image).flatten(1, -2)                                        # the masked forward pass, by the same patch embeddings
    x = torch.where(mask[..., None], masked, x)
    x = torch.cat([net.cls_token.expand(2, -1, -1), x], 1) + net.pos_embed
    assert_agree({"masked": ours.backbone(image, fill=(mask, ours.hide.token)).tokens}, {"masked": net.norm(net.blocks(x))})
    assert torch.equal(ours.centre.value, centres["center"][0]) and torch.equal(ours.patch_centre.value, centres["center2"][0, 0])
    export(ours.state_dict(), preset.config, ibot.weights["bytedance"], tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    want = {f"{n}.{k}": v for n, m in parts.items() for k, v in m.state_dict().items()} | {
        "student.backbone.masked_embed": masked, **{f"ibot_loss.{k}": v for k, v in centres.items()}}
    assert back.keys() == want.keys() and all(torch.equal(v, back[k]) for k, v in want.items())


@torch.no_grad()
def test_ibots_teacher_backbone_alone_at_two_sizes(tmp_path):
    theirs = shake(vit())
    torch.save({"state_dict": theirs.state_dict() | {"masked_embed": torch.zeros(1, 128)}}, tmp_path / "checkpoint_teacher.pth")
    ours, preset = import_(tmp_path / "checkpoint_teacher.pth", ibot.weights["bytedance"], of("ibot"))
    for side in (32, 48):
        image = torch.randn(1, 3, side, side)
        assert_agree({"tokens": ours.tower(image).tokens}, {"tokens": theirs.forward_features(image)})
    export(ours.state_dict(), preset.config, ibot.weights["bytedance"], tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == theirs.state_dict().keys() and all(torch.equal(v, back[k]) for k, v in theirs.state_dict().items())


def hugging(kind: str):
    hf = reference("transformers")
    said = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "attn_implementation": "eager"}
    if kind == "registers":
        return shake(hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(num_register_tokens=3, **said)))
    return shake(hf.Dinov2Model(hf.Dinov2Config(use_swiglu_ffn=kind == "gated", **said)))


@pytest.mark.parametrize("kind", ["plain", "gated", "registers"])
@torch.no_grad()
def test_transformers_dinov2_at_two_sizes_masked_and_not(tmp_path, kind):
    theirs = hugging(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", dinov2.weights["hf"], of("dinov2"))
    many, mask = 3 if kind == "registers" else 0, torch.rand(2, 16) > 0.5

    def whole(model, image, **how):
        x = model(image, **how).last_hidden_state
        return torch.cat([x[:, :1], x[:, 1 + many:]], 1)

    image, large = torch.randn(2, 3, 56, 56), torch.randn(1, 3, 84, 70)
    want = {"tokens": whole(theirs, image), "larger": whole(theirs, large), "masked": whole(theirs, image, bool_masked_pos=mask),
            "pooled": theirs(image).pooler_output}
    got = {"tokens": ours.tower(image).tokens, "larger": ours.tower(large).tokens, "pooled": ours.tower.pooled(image),
           "masked": ours.tower(image, fill=(mask, ours.hide.token)).tokens}
    assert_agree(got, want)
    export(ours.state_dict(), preset.config, dinov2.weights["hf"], tmp_path / "back", preset.feed)
    again = type(theirs).from_pretrained(tmp_path / "back").eval()
    assert_agree({"tokens": whole(again, image), "masked": whole(again, image, bool_masked_pos=mask)}, {k: want[k] for k in ("tokens", "masked")})


@pytest.mark.parametrize("kind", ["plain", "gated", "registers"])
@torch.no_grad()
def test_the_authors_files_hold_what_timm_computes(tmp_path, kind):
    timm = reference("timm")
    more = {"init_values": 0.3}
    if kind == "gated":
        more |= {"mlp_ratio": 2 * 344 / 128, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    if kind == "registers":
        more |= {"reg_tokens": 3, "no_embed_class": True}
    theirs = shake(vit(56, 14, **more))
    state = dict(theirs.state_dict())
    if kind == "registers":                                                          # timm has merged the class token's position into it
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 128), state["pos_embed"]], 1)
    state = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if kind == "gated" else k: v for k, v in state.items()}
    state["mask_token"] = torch.randn(1, 128)
    torch.save(state, tmp_path / "dinov2_pretrain.pth")
    ours, preset = import_(tmp_path / "dinov2_pretrain.pth", dinov2.weights["facebook"], of("dinov2"))
    many, image = 3 if kind == "registers" else 0, torch.randn(2, 3, 56, 56)
    x = theirs.forward_features(image)
    assert_agree({"tokens": ours.tower(image).tokens}, {"tokens": torch.cat([x[:, :1], x[:, 1 + many:]], 1)})
    export(ours.state_dict(), preset.config, dinov2.weights["facebook"], tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(v, back[k]) for k, v in state.items())
    assert (preset.config.backbone.resize, preset.config.backbone.offset) == (("antialias", 0.0) if many else ("plain", 0.1))


@torch.no_grad()
def test_a_trained_dinov2_writes_its_teachers_tower(tmp_path):
    preset = preset_of("dinov2").but(**{"config.backbone.body.width": 24, "config.projector.into": 24, "config.patch_head.into": 24})
    system = preset.config.build().eval()
    system.teacher.module["backbone"].cls.add_(1)
    export(system.state_dict(), preset.config, dinov2.weights["hf"], tmp_path / "hf", preset.feed)
    theirs, image = reference("transformers").Dinov2Model.from_pretrained(tmp_path / "hf").eval(), torch.randn(1, 3, 32, 32)
    assert_agree({"tokens": system.tower(image).tokens}, {"tokens": theirs(image).last_hidden_state})


def test_foreign_cut_and_empty_files_are_refused_in_one_line(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "foreign.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    whole = vit(init_values=0.1).state_dict()
    torch.save({k: v for k, v in whole.items() if k != "norm.weight"}, tmp_path / "cut.pth")
    for system, layout in (("ibot", ibot.weights["bytedance"]), ("dinov2", dinov2.weights["facebook"])):
        for name in ("foreign", "empty", "cut"):
            with pytest.raises(UserError) as caught:
                import_(tmp_path / f"{name}.pth", layout, of(system))
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="layer scale"):
        dinov2.weights["hf"].write(preset_of("ibot").config)
