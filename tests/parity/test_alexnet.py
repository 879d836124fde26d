"""AlexNet of one tower through torchvision's files and back. Random weights, narrow dense layers, tolerance 1e-4."""
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.backbone import alexnet
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

LAYOUT = alexnet.weights["torchvision"]


def theirs():
    """torchvision's, its dense layers of 4096 narrowed."""
    reference("timm")                                                     # torchvision's operators get their names
    with torch.device("meta"):
        tv = reference("torchvision.models.alexnet").AlexNet(num_classes=5)
    for n, (a, b) in zip((1, 4, 6), ((256 * 36, 24), (24, 20), (20, 5))):
        tv.classifier[n] = torch.nn.Linear(a, b)
    return shake(tv.to_empty(device="cpu"))


@torch.no_grad()
def test_torchvision_in_and_out(tmp_path):
    net = theirs()
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    ours, preset = import_(tmp_path / "theirs.pth", LAYOUT, lambda p: preset_of("alexnet", p))
    for size in (224, 96):                                                # another size is averaged to the grid of the dense layers
        image, label = torch.randn(1, 3, size, size), torch.tensor([4])
        maps, logits = net.features(image), net(image)
        hidden = net.classifier[:-1](net.avgpool(maps).flatten(1))
        assert_agree({"features": ours.backbone.map(image), "hidden": ours.backbone(image).pooled, "logits": ours.classify(image),
                 "relu1": ours.backbone.features(image)[0], "loss": ours.losses({"image": image, "label": label})["label"]},
                {"features": maps, "hidden": hidden, "logits": logits, "relu1": net.features[:2](image), "loss": F.cross_entropy(logits, label)})
    export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == net.state_dict().keys() and all(torch.equal(v, back[k]) for k, v in net.state_dict().items())


def test_published_shapes_and_what_no_file_can_hold():
    reference("timm")
    with torch.device("meta"):
        state = reference("torchvision.models.alexnet").AlexNet().state_dict()
        ours = preset_of("alexnet", "torchvision").config.build().state_dict()
    preset = preset_of("alexnet", "torchvision")
    assert {k: v.shape for k, v in LAYOUT.keymap(preset.config).load(state).items()} == {k: v.shape for k, v in ours.items()}
    assert preset.but(**LAYOUT.read({}, state)[1]).config == preset.config
    with pytest.raises(UserError, match="torchvision"):
        LAYOUT.write(preset_of("alexnet", "paper").config)
