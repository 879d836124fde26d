"""SimCLR's and SimSiam's published files in and out, against torchvision's ResNet with the authors' heads. Random weights, tolerance 1e-4."""
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.selfsup import simclr, simsiam
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_


def resnet(head: nn.Module) -> nn.Module:
    reference("timm")
    tv = reference("torchvision.models.resnet")
    net = tv.ResNet(tv.Bottleneck, [1, 1, 1, 1])
    net.fc = head
    return net


def of(system: str):
    return lambda name: preset_of(system, name)


@pytest.mark.parametrize("probe", [True, False])
@torch.no_grad()
def test_simclr_converted_backbone_in_and_out(tmp_path, probe):
    net, image = shake(resnet(nn.Linear(2048, 10) if probe else nn.Identity())), torch.randn(2, 3, 64, 64)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "r.pth")
    ours, preset = import_(tmp_path / "r.pth", simclr.weights["torchvision"], of("simclr"))
    net.fc = nn.Identity()
    assert_agree({"pooled": ours.backbone(image).pooled, "features": ours.encode_image(image)},
            {"pooled": net(image), "features": F.normalize(net(image), dim=-1)})
    export(ours.state_dict(), preset.config, simclr.weights["torchvision"], tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    want = net.state_dict()
    assert back.keys() == want.keys() and all(torch.equal(v, back[k]) for k, v in want.items())


@torch.no_grad()
def test_a_trained_simclr_writes_its_backbone(tmp_path):
    preset = preset_of("simclr", "paper").but(**{"config.backbone.layers": (1, 1, 1, 1)})
    system = shake(preset.config.build())
    export(system.state_dict(), preset.config, simclr.weights["torchvision"], tmp_path / "r.pth")
    net, image = resnet(nn.Identity()).eval(), torch.randn(1, 3, 64, 64)
    net.load_state_dict(torch.load(tmp_path / "r.pth", weights_only=True))
    assert_agree({"pooled": system.backbone(image).pooled}, {"pooled": net(image)})


class Siamese(nn.Module):
    """The authors' module: the encoder's own dense layer, bias and all, is the last of its projector."""

    def __init__(self, dim=12, hidden=5):
        super().__init__()
        self.encoder = resnet(nn.Sequential(
            nn.Linear(2048, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(),
            nn.Linear(2048, dim), nn.BatchNorm1d(dim, affine=False)))
        self.predictor = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, one, two):
        z1, z2 = self.encoder(one), self.encoder(two)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return p1, p2, z1, z2, -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) * 0.5


@torch.no_grad()
def test_simsiam_projections_predictions_and_loss_in_and_out(tmp_path):
    theirs, views = shake(Siamese()), torch.randn(3, 2, 3, 64, 64)
    state = OrderedDict((f"module.{k}", v) for k, v in theirs.state_dict().items())
    torch.save({"epoch": 99, "arch": "resnet50", "state_dict": state}, tmp_path / "c.pth.tar")
    ours, preset = import_(tmp_path / "c.pth.tar", simsiam.weights["facebook"], of("simsiam"))

    def check(reference_):
        p1, p2, z1, z2, loss = reference_(views[:, 0], views[:, 1])
        seen, said = ours.both({"views": views})
        assert_agree({"z1": seen[0], "z2": seen[1], "p1": said[0], "p2": said[1], "loss": ours.agree({"views": views})["agree"]},
                {"z1": z1, "z2": z2, "p1": p1, "p2": p2, "loss": loss})

    check(theirs)
    export(ours.state_dict(), preset.config, simsiam.weights["facebook"], tmp_path / "back.pth.tar")
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True)
    assert back.keys() == theirs.state_dict().keys()
    differ = {k for k, v in theirs.state_dict().items() if not torch.equal(v, back[k])}
    assert differ == {"encoder.fc.6.bias", "encoder.fc.7.running_mean"}, "the idle bias has gone into the mean behind it"
    again = Siamese().eval()
    again.load_state_dict(back)
    check(again)


def test_foreign_cut_and_empty_files_are_refused_in_one_line(tmp_path):
    reference("timm")
    tv = reference("torchvision.models.resnet")
    small = {k: v for k, v in tv.ResNet(tv.BasicBlock, [1, 1, 1, 1]).state_dict().items()}
    torch.save(small, tmp_path / "foreign.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({f"encoder.{k}": v for k, v in small.items() if "fc" not in k} | {"encoder.fc.6.bias": torch.zeros(2)}, tmp_path / "basic.pth")
    whole = Siamese().state_dict()
    torch.save({k: v for k, v in whole.items() if "fc.7.running_mean" not in k}, tmp_path / "cut.pth")
    for system, recipe, name in (("simclr", simclr, "torchvision"), ("simsiam", simsiam, "facebook")):
        for file in ("foreign", "empty", "cut", "basic"):
            with pytest.raises(UserError) as caught:
                import_(tmp_path / f"{file}.pth", recipe.weights[name], of(system))
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="four stages"):
        simsiam.weights["facebook"].write(preset_of("simsiam").config)
    with pytest.raises(UserError, match="four stages"):
        simclr.weights["torchvision"].write(preset_of("simclr").config)
