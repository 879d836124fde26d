"""DINO's published files in and out: transformers' ViTModel and the authors' names, against transformers and timm. Toy sizes, tolerance 1e-4."""
import argparse
from collections import OrderedDict

import pytest
import torch
from reference import reference, shake
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.selfsup import dino
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_


def presets(name: str):
    return preset_of("dino", name)


@torch.no_grad()
def test_transformers_backbone_and_attention_in_and_out(tmp_path):
    hf = reference("transformers")
    config = hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, image_size=32, patch_size=8)
    config._attn_implementation = "eager"
    theirs = shake(hf.ViTModel(config, add_pooling_layer=False))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", dino.weights["hf"], presets)
    image = torch.randn(2, 3, 32, 32)
    out = theirs(image, output_attentions=True)
    want = {"tokens": out.last_hidden_state, "attention": out.attentions[-1][:, :, 0, 1:].unflatten(-1, (4, 4))}
    assert_agree({"tokens": ours.tower(image).tokens, "attention": ours.attend(image)}, want)
    export(ours.state_dict(), preset.config, dino.weights["hf"], tmp_path / "back", preset.feed)
    again = hf.ViTModel.from_pretrained(tmp_path / "back", add_pooling_layer=False).eval()
    assert_agree({"tokens": again(image).last_hidden_state}, {"tokens": want["tokens"]})


@torch.no_grad()
def test_a_trained_system_writes_its_teachers_backbone(tmp_path):
    hf = reference("transformers")
    preset = preset_of("dino").but(**{"config.backbone.body.width": 24, "config.projector.into": 24})
    system = preset.config.build().eval()
    system.teacher.module["backbone"].cls.add_(1)
    export(system.state_dict(), preset.config, dino.weights["hf"], tmp_path / "hf", preset.feed)
    theirs, image = hf.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval(), torch.randn(1, 3, 32, 32)
    assert_agree({"tokens": system.tower(image).tokens}, {"tokens": theirs(image).last_hidden_state})


class Head(nn.Module):
    """The authors' head, with torch's own weight normalisation written out."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(128, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 16))
        self.last_layer = nn.Module()
        self.last_layer.weight_g, self.last_layer.weight_v = nn.Parameter(torch.ones(20, 1)), nn.Parameter(torch.randn(20, 16))

    def forward(self, x):
        x = nn.functional.normalize(self.mlp(x), dim=-1)
        return x @ torch._weight_norm(self.last_layer.weight_v, self.last_layer.weight_g, 0).T


def vit():
    timm = reference("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=128, num_heads=2, depth=2, num_classes=0,
                             dynamic_img_size=True)


@torch.no_grad()
def test_the_authors_full_checkpoint_and_timm_at_two_sizes(tmp_path):
    parts = {n: nn.ModuleDict({"backbone": shake(vit()), "head": Head()}) for n in ("student", "teacher")}
    centre = torch.randn(1, 20)
    student = OrderedDict((f"module.{k}", v) for k, v in parts["student"].state_dict().items())
    torch.save({"student": student, "teacher": parts["teacher"].state_dict(), "optimizer": {"state": {}, "param_groups": []}, "epoch": 800,
                "args": argparse.Namespace(arch="vit_small", out_dim=20), "dino_loss": {"center": centre}}, tmp_path / "full.pth")
    ours, preset = import_(tmp_path / "full.pth", dino.weights["facebook"], presets)
    for side in (32, 16):                                     # the second reads interpolated positions
        image = torch.randn(2, 3, side, side)
        assert_agree({"student": ours.project(image), "teacher": ours.aim(image), "tokens": ours.tower(image).tokens},
                {"student": parts["student"]["head"](parts["student"]["backbone"](image)),
                 "teacher": parts["teacher"]["head"](parts["teacher"]["backbone"](image)),
                 "tokens": parts["teacher"]["backbone"].forward_features(image)})
    assert torch.equal(ours.centre.value, centre[0])
    export(ours.state_dict(), preset.config, dino.weights["facebook"], tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    want = {f"{n}.{k}": v for n, m in parts.items() for k, v in m.state_dict().items()} | {"dino_loss.center": centre}
    assert back.keys() == want.keys() and all(torch.equal(v, back[k]) for k, v in want.items())


@torch.no_grad()
def test_the_authors_backbone_alone(tmp_path):
    theirs, image = shake(vit()), torch.randn(2, 3, 32, 32)
    torch.save(theirs.state_dict(), tmp_path / "dino_pretrain.pth")
    ours, preset = import_(tmp_path / "dino_pretrain.pth", dino.weights["facebook"], presets)
    assert_agree({"tokens": ours.tower(image).tokens}, {"tokens": theirs.forward_features(image)})
    export(ours.state_dict(), preset.config, dino.weights["facebook"], tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == theirs.state_dict().keys() and all(torch.equal(v, back[k]) for k, v in theirs.state_dict().items())


def test_foreign_cut_and_empty_files_are_refused_in_one_line(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "foreign.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({k: v for k, v in vit().state_dict().items() if k != "norm.weight"}, tmp_path / "cut.pth")
    for name in ("foreign", "empty", "cut"):
        with pytest.raises(UserError) as caught:
            import_(tmp_path / f"{name}.pth", dino.weights["facebook"], presets)
        assert "\n" not in str(caught.value)
