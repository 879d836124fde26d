"""Published models at their real size, without memory: every name and shape of the reference, through the table, is a name and shape of ours."""
import pytest
import torch
from reference import reference

from polysense.base.catalogue import preset_of
from polysense.systems.align import clip
from polysense.systems.backbone import resnet, vit
from polysense.weights.layout import Layout


def shapes(state: dict) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items()}


def assert_known(system: str, layout: Layout, config: dict, state: dict, preset: str) -> None:
    """What the file says builds the very names and shapes that are in it, and it is the preset of our own that should be it."""
    name, overrides = layout.read(config, state)
    read = preset_of(system, name).but(**overrides)
    with torch.device("meta"):
        ours, known = read.config.build().state_dict(), preset_of(system, preset).config.build().state_dict()
    table = layout.keymap(read.config)
    assert shapes(table.load(state)) == shapes(ours) == shapes(known)
    assert shapes(table.save(ours)) == shapes(state)
    assert read.feed.image.size == preset_of(system, preset).feed.image.size
    again = layout.read({**layout.write(read.config), **layout.feed(read.feed)}, state)
    assert preset_of(system, again[0]).but(**again[1]).config == read.config


def test_transformers_defaults_are_clip_vit_b_32():
    hf = reference("transformers")
    config = hf.CLIPConfig().to_dict()
    with torch.device("meta"):
        state = hf.CLIPModel(hf.CLIPConfig()).state_dict()
    assert_known("clip", clip.weights["hf"], config, state, "vit_b_32")
    # the configuration of 2021 says things twice; the second counts, and 2 means the largest id
    old = {"model_type": "clip", "projection_dim": 512, "text_config": {"hidden_size": 8, "eos_token_id": 2}, "text_config_dict": {"eos_token_id": 2},
           "vision_config": {"patch_size": 32}, "vision_config_dict": None}
    assert clip.weights["hf"].read(old, state)[1] | {"config.text.end": 0} == clip.weights["hf"].read(config, state)[1] | {"config.text.end": 0}
    assert clip.weights["hf"].read(old, state)[1]["config.text.end"] is None


@pytest.mark.parametrize("name, preset", [("ViT-L-14-quickgelu", "paper"), ("ViT-L-14-336-quickgelu", "paper_336"),
                                          ("ViT-B-16-quickgelu", "vit_b_16"), ("RN50-quickgelu", "rn50")])
def test_open_clip_configurations_and_openai_shapes(name, preset):
    open_clip = reference("open_clip")
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        state = open_clip.CLIP(**{k: v for k, v in config.items() if k in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}).state_dict()
    assert_known("clip", clip.weights["open_clip"], {"model_cfg": config}, state, preset)
    assert_known("clip", clip.weights["openai"], {}, state, preset)


@pytest.mark.parametrize("name, system, preset", [("vit_base_patch16_384", "vit", "finetune"), ("resnet50", "resnet", "resnet50"),
                                                  ("resnet18", "resnet", "resnet18")])
def test_timm_architectures(name, system, preset):
    timm = reference("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    published = {k: v for k, v in model.pretrained_cfg.items() if k in ("mean", "std", "interpolation", "input_size", "crop_mode")}
    config = {"architecture": name, "num_classes": 1000, "pretrained_cfg": published}
    assert_known(system, {"vit": vit, "resnet": resnet}[system].weights["timm"], config, model.state_dict(), preset)


@pytest.mark.parametrize("system, preset, kind", [("vit", "finetune", "ViT"), ("resnet", "resnet50", "ResNet"), ("resnet", "paper", "ResNet")])
def test_transformers_backbones(system, preset, kind, tmp_path):
    hf = reference("transformers")
    layout, ours = {"vit": vit, "resnet": resnet}[system].weights["hf"], preset_of(system, preset).config
    config = layout.write(ours)
    with torch.device("meta"):
        state = layout.keymap(ours).save(ours.build().state_dict())
        theirs = getattr(hf, f"{kind}ForImageClassification")(getattr(hf, f"{kind}Config").from_dict(config)).state_dict()
    assert shapes(layout.keymap(ours).load(theirs)) == shapes(layout.keymap(ours).load(state))
    config = config | {"preprocessor_config": {"size": {"height": 384, "width": 384}}} if system == "vit" else config
    assert_known(system, layout, config, state, preset)
