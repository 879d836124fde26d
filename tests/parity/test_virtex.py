"""VirTex's released layout both ways, with torch's own decoder on top of torchvision's ResNet as reference."""
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.align import virtex
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

VOCAB, LENGTH, WIDTH = 50, 10, 64


def presets(name: str):
    return preset_of("virtex", name)


class Textual(nn.Module):
    """Word and position embeddings, normed; torch's post-norm decoder; an output tied to the embeddings."""

    def __init__(self):
        super().__init__()
        self.visual_projection = nn.Linear(2048, WIDTH)
        self.embedding = nn.ModuleDict({"words": nn.Embedding(VOCAB, WIDTH), "positions": nn.Embedding(LENGTH, WIDTH),
                                        "layer_norm": nn.LayerNorm(WIDTH, eps=1e-8)})
        layer = nn.TransformerDecoderLayer(WIDTH, 1, 96, activation="gelu", batch_first=True)
        self.transformer = nn.TransformerDecoder(layer, 2)
        self.output = nn.Linear(WIDTH, VOCAB)

    def forward(self, places, text):
        x = self.embedding["layer_norm"](self.embedding["words"](text) + self.embedding["positions"].weight[:text.shape[1]])
        later = torch.ones(text.shape[1], text.shape[1]).triu(1).bool()
        out = self.transformer(x, self.visual_projection(places), tgt_mask=later, tgt_key_padding_mask=text == 0)
        return F.linear(out, self.embedding["words"].weight, self.output.bias)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    reference("timm")                                        # declares torchvision's operators
    resnet = reference("torchvision.models.resnet")
    cnn = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1])
    cnn.fc = nn.Identity()
    ahead, back = shake(Textual()), shake(Textual())
    for name in ("visual_projection", "embedding", "output"):
        setattr(back, name, getattr(ahead, name))
    ahead.output.weight = ahead.embedding["words"].weight
    return shake(cnn), ahead, back


def released(cnn, ahead, back=None):
    parts = {"visual.cnn": cnn, "textual": ahead} | ({"backward_textual": back} if back is not None else {})
    return {f"{at}.{k}": v for at, part in parts.items() for k, v in part.state_dict().items()}


def texts():
    ids = torch.randint(4, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate((9, 5, 7)):
        ids[row, 0], ids[row, end], ids[row, end + 1:] = 1, 2, 0
    return ids


@torch.no_grad()
def test_both_directions_in_and_out(theirs, tmp_path):
    cnn, ahead, back = theirs
    state, image, text = released(*theirs), torch.randn(3, 3, 64, 64), texts()
    torch.save({"model": state, "iteration": 500_000}, tmp_path / "virtex.pth")
    ours, preset = import_(tmp_path / "virtex.pth", virtex.weights["official"], presets)
    maps = cnn.layer4(cnn.layer3(cnn.layer2(cnn.layer1(cnn.maxpool(F.relu(cnn.bn1(cnn.conv1(image))))))))
    places, turned, losses = maps.flatten(2).mT, virtex.turned(text), ours.caption({"image": image, "text": text})
    want, mine, seen = {}, {}, ours.see(image)
    for name, ids, head, body in (("forward", text, ahead, ours.decoder.text.body), ("backward", turned, back, ours.backward)):
        said, real = head(places, ids), (ids != 0)[..., None]
        want |= {f"{name} logits": said * real,
                 f"{name} loss": F.cross_entropy(said[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)}
        mine |= {f"{name} logits": ours.logits(ids, seen, body) * real, f"{name} loss": losses[name]}
    assert_agree(mine | {"image": ours.encode_image(image)}, want | {"image": F.normalize(cnn(image), dim=-1)})
    export(ours.state_dict(), preset.config, virtex.weights["official"], tmp_path / "back.pth")
    again = torch.load(tmp_path / "back.pth", weights_only=True)
    assert again.keys() == state.keys() and all(torch.equal(again[k], v) for k, v in state.items())


@torch.no_grad()
def test_forward_models_have_one_direction(theirs, tmp_path):
    cnn, ahead, _ = theirs
    state = released(cnn, ahead)
    torch.save({"model": state}, tmp_path / "virtex.pth")
    ours, preset = import_(tmp_path / "virtex.pth", virtex.weights["official"], presets)
    assert ours.backward is None and set(ours.caption({"image": torch.randn(3, 3, 64, 64), "text": texts()})) == {"forward"}
    export(ours.state_dict(), preset.config, virtex.weights["official"], tmp_path / "back.pth")
    assert torch.load(tmp_path / "back.pth", weights_only=True).keys() == state.keys()


def test_copies_that_differ_and_other_forms_are_refused(theirs, tmp_path):
    state = {k: v.clone() for k, v in released(*theirs).items()}
    state["backward_textual.output.bias"] += 1
    torch.save({"model": state}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="copies differ"):
        import_(tmp_path / "odd.pth", virtex.weights["official"], presets)
    with pytest.raises(UserError, match="ResNet of bottlenecks"):
        virtex.weights["official"].write(virtex.tiny().config)
    with pytest.raises(UserError, match="--system resnet"):
        shallow = {"textual.embedding.words.weight": torch.zeros(5, 4), "visual.cnn.conv1.weight": torch.zeros(64, 3, 7, 7)}
        virtex.weights["official"].read({}, shallow)
