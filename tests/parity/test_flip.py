"""FLIP against open_clip: its dropping of patches with the same choice forced, and its files both ways. Random weights, toy size."""
import json

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.masking import masking_of
from polysense.systems.align import flip
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

VISION = {"layers": 2, "width": 64, "head_width": 16, "image_size": 32, "patch_size": 8, "patch_dropout": 0.5}
TEXT = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}


def presets(name: str):
    return preset_of("flip", name)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(theirs, ours, our preset), the same random weights, through the published files."""
    torch.manual_seed(0)
    theirs = shake(reference("open_clip").CLIP(embed_dim=24, vision_cfg=VISION, text_cfg=TEXT))
    folder = tmp_path_factory.mktemp("flip")
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}}))
    ours, preset = import_(folder, flip.weights["open_clip"], presets)
    return theirs, ours, preset


@torch.no_grad()
def test_the_same_choice_of_patches_gives_the_same_features(pair):
    theirs, ours, _ = pair
    image = torch.randn(5, 3, 32, 32)
    theirs.train()
    torch.manual_seed(3)
    want, kept = theirs.encode_image(image, normalize=True), []
    theirs.visual.patch_dropout.register_forward_hook(lambda m, args, out: kept.append((args[0].shape[1], out.shape[1])))
    torch.manual_seed(3)
    theirs.encode_image(image)
    assert kept == [(17, 9)]
    torch.manual_seed(3)
    rows = torch.randn(5, 16).topk(8, dim=-1).indices                        # how PatchDropout draws
    masking = masking_of(torch.ones(5, 16, dtype=torch.bool).scatter_(1, rows, False))
    assert_agree({"part": ours.encode_part(image, masking)}, {"part": want})
    masking = ours.sampler(5, (4, 4))
    assert masking.visible + 1 == kept[0][1]
    theirs.eval()


@torch.no_grad()
def test_whole_pictures_and_texts_in_and_out(pair, tmp_path):
    theirs, ours, preset = pair
    image, text = torch.randn(3, 3, 32, 32), torch.randint(3, 98, (3, 12))
    text[:, -1] = 99
    want = {"image": theirs.encode_image(image, normalize=True), "text": theirs.encode_text(text, normalize=True)}
    assert_agree({"image": ours.encode_image(image), "text": ours.encode_text(text)}, want)
    export(ours.state_dict(), preset.config, flip.weights["open_clip"], tmp_path / "back", preset.feed)
    again = reference("open_clip").CLIP(**json.loads((tmp_path / "back" / "open_clip_config.json").read_text())["model_cfg"]).eval()
    again.load_state_dict(load_file(tmp_path / "back" / "open_clip_model.safetensors"), strict=True)
    assert_agree({"image": F.normalize(again.encode_image(image), dim=-1), "text": F.normalize(again.encode_text(text), dim=-1)}, want)


def test_big_g_is_open_clips(tmp_path):
    open_clip = reference("open_clip")
    config = open_clip.get_model_config("ViT-bigG-14")
    with torch.device("meta"):
        state = open_clip.CLIP(**{k: v for k, v in config.items() if k in ("embed_dim", "vision_cfg", "text_cfg")}).state_dict()
        name, overrides = flip.weights["open_clip"].read({"model_cfg": config}, state)
        read = preset_of("flip", name).but(**overrides)
        ours = read.config.build().state_dict()
    assert read.config.vision == flip.big_g().config.vision and read.config.text.body.width == 1280
    shapes = {k: tuple(v.shape) for k, v in flip.weights["open_clip"].keymap(read.config).load(state).items()}
    assert shapes == {k: tuple(v.shape) for k, v in ours.items()}


def test_a_resnet_is_refused():
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}, "text_cfg": TEXT}}
    with pytest.raises(UserError, match="ResNet tower, flip has a ViT"):
        flip.weights["open_clip"].read(config, {})
