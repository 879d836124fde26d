"""DeCLIP's released layout both ways; CLIP's towers (open_clip) and SimSiam's heads as reference. Random weights, toy size."""
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.align import declip
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

VOCAB, LENGTH = 100, 12


def presets(name: str):
    return preset_of("declip", name).but(**{"config.queue.size": 8})


def chain(**parts: nn.Module) -> nn.Sequential:
    out = nn.Sequential()
    for name, part in parts.items():
        out.add_module(name, part)
    return shake(out)


@torch.no_grad()
def test_released_files_in_and_out(tmp_path):
    torch.manual_seed(0)
    clip = shake(reference("open_clip").CLIP(embed_dim=24, quick_gelu=True, vision_cfg={"layers": 2, "width": 64, "image_size": 32, "patch_size": 8},
                                             text_cfg={"context_length": LENGTH, "vocab_size": VOCAB, "width": 64, "heads": 1, "layers": 2}))
    projector = chain(linear1=nn.Linear(24, 32), bn1=nn.BatchNorm1d(32), relu1=nn.ReLU(), linear2=nn.Linear(32, 32), bn2=nn.BatchNorm1d(32),
                      relu2=nn.ReLU(), linear3=nn.Linear(32, 32), bn3=nn.BatchNorm1d(32))
    predictor = chain(linear1=nn.Linear(32, 16), bn1=nn.BatchNorm1d(16), relu1=nn.ReLU(), layer2=nn.Linear(16, 32))
    head, guess = shake(nn.Linear(64, 24)), shake(nn.Linear(64, VOCAB))
    state = {k: v for k, v in clip.state_dict().items() if k.startswith("visual.")}
    text = ("transformer.", "token_emb", "positional_emb", "ln_final")
    state |= {f"encode_text.{k}": v for k, v in clip.state_dict().items() if k.startswith(text)}
    for name, part in {"projector": projector, "predictor": predictor, "encode_text.text_projection": head, "text_label_predictor": guess}.items():
        state |= {f"{name}.{k}": v for k, v in part.state_dict().items()}
    state["logit_scale"] = torch.tensor([3.5])
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "declip.pth.tar")
    ours, preset = import_(tmp_path / "declip.pth.tar", declip.weights["official"], presets)
    image, ids = torch.randn(3, 3, 32, 32), torch.randint(3, VOCAB - 4, (3, LENGTH))
    ids[:, -1] = VOCAB - 2                                   # the end; the id behind it is the mask's
    seen = clip.encode_image(image)
    clip.text_projection = nn.Parameter(torch.eye(64))
    want = {"image": F.normalize(seen, dim=-1), "text": F.normalize(head(clip.encode_text(ids)), dim=-1), "z": projector(seen),
            "p": predictor(projector(seen))}
    z = ours.projector(ours.image_head(ours.vision.pooled(image)))
    assert_agree({"image": ours.encode_image(image), "text": ours.encode_text(ids), "z": z, "p": ours.predictor(z)}, want)
    tokens = ours.text(ids).tokens
    torch.testing.assert_close(ours.guess(tokens), guess(tokens))
    assert ours.log_scale.item() == 3.5 and ours.log_scale.ndim == 0
    export(ours.state_dict(), preset.config, declip.weights["official"], tmp_path / "back.pth.tar")
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True)
    assert back.keys() == state.keys() and back["logit_scale"].shape == (1,)
    folded = {f"{a}.linear{n}.bias" for a, n in (("projector", 1), ("projector", 2), ("projector", 3), ("predictor", 1))}
    folded |= {k.replace("linear", "bn").replace("bias", "running_mean") for k in folded}
    assert all(torch.equal(back[k], v) for k, v in state.items() if k not in folded)
    again, _ = import_(tmp_path / "back.pth.tar", declip.weights["official"], presets)
    assert_agree({"p": again.predictor(again.projector(seen))}, {"p": want["p"]})


def test_what_the_layout_cannot_hold_is_refused():
    with pytest.raises(UserError, match="text head with a bias"):
        declip.weights["official"].write(preset_of("declip").config)
    with pytest.raises(UserError, match="ResNet tower"):
        declip.weights["official"].read({}, {"visual.layer1.0.conv1.weight": torch.zeros(1)})
