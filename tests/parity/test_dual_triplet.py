"""VSE++'s released layout both ways, with torchvision's form of the ResNet (timm's names) and torch's GRU as reference."""
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.align import dual_triplet
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_


def presets(name: str):
    return preset_of("dual_triplet", name)


@torch.no_grad()
@pytest.mark.parametrize("parallel", ["", "module."])
def test_released_files_in_and_out(tmp_path, parallel):
    torch.manual_seed(0)
    timm = reference("timm.models.resnet")
    cnn = shake(timm.ResNet(timm.Bottleneck, [1, 1, 1, 1], num_classes=0))
    fc, embed, rnn = shake(nn.Linear(2048, 24)), shake(nn.Embedding(50, 10)), shake(nn.GRU(10, 24, batch_first=True))
    state = {f"img_enc.cnn.{parallel}{k}": v for k, v in cnn.state_dict().items()} | {f"img_enc.fc.{k}": v for k, v in fc.state_dict().items()}
    state |= {"txt_enc.embed.weight": embed.weight} | {f"txt_enc.rnn.{k}": v for k, v in rnn.state_dict().items()}
    torch.save(state, tmp_path / "vsepp.pt")
    ours, preset = import_(tmp_path / "vsepp.pt", dual_triplet.weights["official"], presets)
    image, text = torch.randn(2, 3, 64, 64), torch.tensor([[1, 7, 30, 2, 0, 0], [1, 40, 41, 42, 43, 2]])
    states = rnn(embed(text))[0]
    want = {"image": F.normalize(fc(cnn(image)), dim=-1), "text": F.normalize(torch.stack([states[0, 3], states[1, 5]]), dim=-1)}
    assert_agree({"image": ours.encode_image(image), "text": ours.encode_text(text)}, want)
    export(ours.state_dict(), preset.config, dual_triplet.weights["official"], tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    plain = {k.replace("cnn.module.", "cnn."): v for k, v in state.items()}
    assert back.keys() == plain.keys() and all(torch.equal(back[k], v) for k, v in plain.items())


def test_other_towers_are_refused():
    with pytest.raises(UserError, match="no ResNet of bottlenecks"):
        dual_triplet.weights["official"].read({}, {"img_enc.cnn.features.0.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="ResNet of bottlenecks and a GRU"):
        dual_triplet.weights["official"].write(preset_of("dual_triplet").config)
