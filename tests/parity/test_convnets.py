"""VGG through torchvision's and timm's files and back. Random weights, toy widths, tolerance 1e-4."""
import json

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.backbone import vgg
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

CLASSES = 5


def torchvision_of(name: str):
    """A torchvision network of narrow layers."""
    reference("timm")
    models = reference("torchvision.models.vgg")
    layout = {"vgg16": [8, 8, "M", 16, 16, "M", 24, 24, 24, "M", 32, 32, 32, "M", 32, 32, 32, "M"],
              "vgg19": [8, 8, "M", 16, 16, "M", 24, 24, 24, 24, "M", 32, 32, 32, 32, "M", 32, 32, 32, 32, "M"]}[name]
    with torch.device("meta"):                                            # its dense layers of 4096 are never made
        tv = models.VGG(models.make_layers(layout), num_classes=CLASSES, init_weights=False)
    for n, (a, b) in zip((0, 3, 6), ((32 * 49, 24), (24, 20), (20, CLASSES))):
        tv.classifier[n] = torch.nn.Linear(a, b)
    return shake(tv.to_empty(device="cpu"))


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
@torch.no_grad()
def test_torchvision_in_and_out(tmp_path, name):
    theirs = torchvision_of(name)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, preset = import_(tmp_path / "theirs.pth", vgg.weights["torchvision"], lambda p: preset_of("vgg", p))
    for size in (224, 64) if name == "vgg16" else (96,):                  # another size is averaged to the grid of the dense layers
        image, label = torch.randn(2, 3, size, size), torch.tensor([0, 4])
        maps = theirs.features(image)
        logits = theirs(image)
        hidden = theirs.classifier[:-1](theirs.avgpool(maps).flatten(1))
        assert_agree({"features": ours.backbone.map(image), "hidden": ours.backbone(image).pooled, "logits": ours.classify(image),
                 "loss": ours.losses({"image": image, "label": label})["label"]},
                {"features": maps, "hidden": hidden, "logits": logits, "loss": F.cross_entropy(logits, label)})
    assert_agree({"relu1": ours.backbone.features(image)[0]}, {"relu1": theirs.features[:2](image)})
    export(ours.state_dict(), preset.config, vgg.weights["torchvision"], tmp_path / "back", preset.feed)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == theirs.state_dict().keys() and all(torch.equal(v, back[k]) for k, v in theirs.state_dict().items())


@torch.no_grad()
def test_timm_vgg_has_its_dense_layers_as_convolutions(tmp_path):
    timm = reference("timm")
    plan = [4, 4, "M", 8, 8, "M", 8, 8, 8, "M", 12, 12, 12, "M", 12, 12, 12, "M"]
    with torch.device("meta"):
        theirs = reference("timm.models.vgg").VGG(plan, num_classes=CLASSES)
    theirs.pre_logits.fc1, theirs.pre_logits.fc2 = torch.nn.Conv2d(12, 24, 7), torch.nn.Conv2d(24, 24, 1)
    theirs.head.fc = torch.nn.Linear(24, CLASSES)
    theirs = shake(theirs.to_empty(device="cpu"))
    (tmp_path / "theirs").mkdir()
    save_file(theirs.state_dict(), tmp_path / "theirs" / "model.safetensors")
    cfg = {k: v for k, v in timm.get_pretrained_cfg("vgg16").to_dict().items() if k in ("mean", "std", "interpolation", "input_size", "crop_mode")}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"architecture": "vgg16", "num_classes": CLASSES, "pretrained_cfg": cfg}))
    ours, preset = import_(tmp_path / "theirs", vgg.weights["timm"], lambda p: preset_of("vgg", p))
    image = torch.randn(1, 3, 224, 224)
    assert_agree({"logits": ours.classify(image), "features": ours.backbone.map(image)},
                 {"logits": theirs(image), "features": theirs.features(image)})
    assert preset.feed.image.mean == (0.485, 0.456, 0.406)
    back = vgg.weights["timm"].keymap(preset.config).save(ours.state_dict())
    assert all(torch.equal(v, back[k]) for k, v in theirs.state_dict().items()) and len(back) == len(theirs.state_dict())


def test_published_sizes_and_what_no_file_can_hold():
    timm = reference("timm")
    for name, preset in (("vgg16", "paper"), ("vgg19", "vgg19"), ("vgg11", "paper_a")):
        with torch.device("meta"):
            state, ours = timm.create_model(name).state_dict(), preset_of("vgg", preset).config.build().state_dict()
        layout, config = vgg.weights["timm"], preset_of("vgg", preset).config
        assert {k: v.shape for k, v in layout.keymap(config).load(state).items()} == {k: v.shape for k, v in ours.items()}
        read = preset_of("vgg", "paper").but(**layout.read(layout.write(config), state)[1]).config
        assert read.backbone.rows == config.backbone.rows and read.backbone.hidden == config.backbone.hidden
    reference("torchvision")
    with torch.device("meta"):
        normed = reference("torchvision.models.vgg").vgg16_bn().state_dict()
    with pytest.raises(UserError, match="batch norm"):
        vgg.weights["torchvision"].read({}, normed)
