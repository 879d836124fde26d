"""The released layouts of SLIP and LaCLIP both ways, with timm's ViT, CLIP's text tower and SLIP's projector as reference."""
import json

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import save_file
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.align import laclip, slip
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

VOCAB, LENGTH = 100, 12


def presets(name: str):
    return preset_of("slip", name)


def projector() -> nn.Sequential:
    names = ("layer1", "bn1", "relu1", "layer2", "bn2", "relu2", "layer3")
    parts = (nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 16))
    out = nn.Sequential()
    for name, part in zip(names, parts, strict=True):
        out.add_module(name, part)
    return out


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    vit = reference("timm.models.vision_transformer").VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=0)
    text = reference("open_clip").CLIP(embed_dim=24, vision_cfg={"layers": 1, "width": 64, "image_size": 32, "patch_size": 16}, quick_gelu=True,
                                       text_cfg={"context_length": LENGTH, "vocab_size": VOCAB, "width": 64, "heads": 1, "layers": 2})
    return shake(vit), shake(text), shake(projector())


def released(vit, text, mlp=None) -> dict[str, torch.Tensor]:
    parts = {"visual": vit} | ({} if mlp is None else {"image_mlp": mlp})
    state = {f"{at}.{k}": v for at, part in parts.items() for k, v in part.state_dict().items()}
    state |= {k: v for k, v in text.state_dict().items() if k.startswith(("transformer.", "token_emb", "positional_emb", "ln_final", "text_proj"))}
    g = torch.Generator().manual_seed(1)
    return state | {"image_projection": torch.randn(64, 24, generator=g) * 0.1, "logit_scale": torch.tensor(2.5)}


def texts() -> torch.Tensor:
    ids = torch.randint(3, VOCAB - 2, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    ids[:, -1] = VOCAB - 1
    return ids


@torch.no_grad()
def test_released_files_in_and_out(theirs, tmp_path):
    vit, text, mlp = theirs
    state = released(*theirs)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 25}, tmp_path / "slip.pt")
    ours, preset = import_(tmp_path / "slip.pt", slip.weights["official"], presets)
    image, ids = torch.randn(3, 3, 32, 32), texts()
    want = {"image": F.normalize(vit(image) @ state["image_projection"], dim=-1), "text": text.encode_text(ids, normalize=True),
            "ssl": mlp(vit(image))}
    assert_agree({"image": ours.encode_image(image), "text": ours.encode_text(ids), "ssl": ours.projector(ours.vision.pooled(image))}, want)
    assert ours.scale.item() == pytest.approx(2.71828 ** 2.5, rel=1e-4)

    export(ours.state_dict(), preset.config, slip.weights["official"], tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys()
    moved = {f"image_mlp.{k}" for n in (1, 2) for k in (f"layer{n}.bias", f"bn{n}.running_mean")}      # a bias that batch norm takes away
    assert all(torch.equal(back[k], v) for k, v in state.items() if k not in moved)
    again = projector()
    again.load_state_dict({k.removeprefix("image_mlp."): v for k, v in back.items() if k.startswith("image_mlp.")})
    assert_agree({"ssl": again.eval()(vit(image))}, {"ssl": want["ssl"]})
    features = vit(image)
    assert_agree({"ssl": ours.projector.train()(features)}, {"ssl": again.train()(features)})


def test_vit_small_has_twelve_heads():
    vit = slip.weights["official"]
    state = {"visual.patch_embed.proj.weight": torch.zeros(384, 3, 16, 16), "visual.pos_embed": torch.zeros(1, 197, 384),
             "visual.blocks.0.mlp.fc1.weight": torch.zeros(1536, 384), "ln_final.weight": torch.zeros(512), "text_projection": torch.zeros(512, 512),
             "token_embedding.weight": torch.zeros(49408, 512), "positional_embedding": torch.zeros(77, 512),
             "transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(2048, 512)}
    assert vit.read({}, state)[1]["config.vision.body.heads"] == 12


def test_what_the_layout_cannot_hold_is_refused():
    with pytest.raises(UserError, match="largest id"):
        slip.weights["official"].write(slip.tiny().config)
    with pytest.raises(UserError, match="another image tower"):
        slip.weights["official"].write(slip.paper().config.but(**{"vision.pool": "mean"}))


def laclip_presets(name: str):
    return preset_of("laclip", name)


@torch.no_grad()
def test_laclip_in_slips_form(theirs, tmp_path):
    vit, text, mlp = theirs
    state, image, ids = released(vit, text), torch.randn(3, 3, 32, 32), texts()
    want = {"image": F.normalize(vit(image) @ state["image_projection"], dim=-1), "text": text.encode_text(ids, normalize=True)}
    for name, file in (("plain.pt", state), ("with_projector.pt", released(vit, text, mlp))):
        torch.save({"state_dict": file}, tmp_path / name)
        ours, preset = import_(tmp_path / name, laclip.weights["official"], laclip_presets)
        assert_agree({"image": ours.encode_image(image), "text": ours.encode_text(ids)}, want)
    export(ours.state_dict(), preset.config, laclip.weights["official"], tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())


@torch.no_grad()
def test_laclip_in_open_clips_form(tmp_path):
    cfg = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": {"layers": 2, "width": 64, "image_size": 32, "patch_size": 8},
           "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2}}
    model = shake(reference("open_clip").CLIP(**cfg))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    ours, preset = import_(tmp_path, laclip.weights["open_clip"], laclip_presets)
    image, ids = torch.randn(3, 3, 32, 32), texts()
    assert_agree({"image": ours.encode_image(image), "text": ours.encode_text(ids)},
            {"image": model.encode_image(image, normalize=True), "text": model.encode_text(ids, normalize=True)})
    export(ours.state_dict(), preset.config, laclip.weights["open_clip"], tmp_path / "back", preset.feed)
    again = import_(tmp_path / "back", laclip.weights["open_clip"], laclip_presets)[0]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())
