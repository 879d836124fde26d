"""UniCL's parts against timm and open_clip, and its released layout both ways. Random weights, toy size."""
import re

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.align import unicl
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

VOCAB, LENGTH = 100, 12


def presets(name: str):
    return preset_of("unicl", name)


@pytest.fixture(scope="module")
def towers():
    """timm's Swin and CLIP's text tower with the released epsilon."""
    torch.manual_seed(0)
    swin = reference("timm.models.swin_transformer").SwinTransformer(
        img_size=64, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2, 1), num_heads=(1, 2, 4), num_classes=0)
    text = reference("open_clip").CLIP(embed_dim=24, vision_cfg={"layers": 1, "width": 64, "image_size": 32, "patch_size": 16}, quick_gelu=True,
                                       text_cfg={"context_length": LENGTH, "vocab_size": VOCAB, "width": 64, "heads": 1, "layers": 2,
                                                 "norm_kwargs": {"eps": 1e-12}})
    return shake(swin), shake(text)


def released(swin, text) -> dict[str, torch.Tensor]:
    """The names of the released files: the halving at the end of a stage, the text tower under its own prefix."""
    def earlier(name: str) -> str:
        return re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)

    state = {f"image_encoder.{earlier(k)}": v for k, v in swin.state_dict().items()}
    for k, v in text.state_dict().items():
        if k.startswith(("transformer.", "token_embedding", "positional_embedding", "ln_final")):
            state[f"text_encoder.{k.removeprefix('transformer.')}"] = v
    state["image_projection"], state["text_projection"] = torch.randn(64, 24) * 0.1, text.state_dict()["text_projection"]
    return state | {"logit_scale": torch.tensor(2.5)}


@torch.no_grad()
def test_released_files_in_and_out(towers, tmp_path):
    swin, text = towers
    state = released(swin, text)
    buffers = {"image_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long)}
    torch.save(state | buffers, tmp_path / "unicl.pth")
    ours, preset = import_(tmp_path / "unicl.pth", unicl.weights["official"], presets)
    image, ids = torch.randn(3, 3, 64, 64), torch.randint(3, VOCAB - 2, (3, LENGTH))
    ids[:, -1] = VOCAB - 1
    want = {"image": F.normalize(swin(image) @ state["image_projection"], dim=-1), "text": text.encode_text(ids, normalize=True)}
    assert_agree({"image": ours.encode_image(image), "text": ours.encode_text(ids)}, want)
    loss = reference("open_clip").ClipLoss()(want["image"], want["text"], torch.tensor(2.5).exp())
    made = {"image": ours.encode_image(image), "text": ours.encode_text(ids), "label": torch.tensor([5, 2, -1])}
    assert_agree({"loss": ours.compare_labelled(made)["contrast"]}, {"loss": loss})
    export(ours.state_dict(), preset.config, unicl.weights["official"], tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())


def test_what_the_layout_cannot_hold_is_refused():
    with pytest.raises(UserError, match="largest id"):
        unicl.weights["official"].write(preset_of("unicl").config)
    with pytest.raises(UserError, match="no Swin"):
        unicl.weights["official"].read({}, {"image_encoder.layers.0.blocks.0.modulation.f.weight": torch.zeros(1)})
