"""open_clip's CoCa in its own layout, both ways: one pooler as released, and the two forms of the paper."""
import json

import pytest
import torch
from reference import reference, shake
from safetensors.torch import save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.align import coca
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

VOCAB, LENGTH, DIM = 60, 12, 64


def presets(name: str):
    return preset_of("coca", name)


def told(pool, *, width: int = DIM, act: bool = False) -> dict:
    return {"embed_dim": DIM, "quick_gelu": act, "vision_cfg": {
                "image_size": 32, "patch_size": 8, "layers": 2, "width": width, "head_width": 32, "attentional_pool": pool, "attn_pooler_heads": 4,
                "attn_pooler_queries": 6, "output_tokens": True},
            "text_cfg": {"context_length": LENGTH, "vocab_size": VOCAB, "width": DIM, "heads": 2, "layers": 2, "embed_cls": True,
                         "output_tokens": True},
            "multimodal_cfg": {"context_length": LENGTH, "vocab_size": VOCAB, "width": DIM, "heads": 2, "layers": 2}}


def texts() -> torch.Tensor:
    ids = torch.randint(3, VOCAB - 2, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    for row, end in enumerate((LENGTH - 1, LENGTH - 2, 5, 2)):
        ids[row, 0], ids[row, end], ids[row, end + 1:] = VOCAB - 2, VOCAB - 1, 0
    return ids


def saved(cfg: dict, folder):
    torch.manual_seed(0)
    model = shake(reference("open_clip.coca_model").CoCa(**{k: v for k, v in cfg.items()}))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    about = {"model_cfg": cfg | {"custom_text": True}, "preprocess_cfg": {"interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return model


FORMS = [told(True), told(True, width=96, act=True), told("cascade"), told("parallel")]


@pytest.mark.parametrize("cfg", FORMS, ids=["released", "released, another width", "cascade", "parallel"])
def test_features_logits_and_losses_both_ways(cfg, tmp_path):
    model, image, ids = saved(cfg, tmp_path), torch.randn(4, 3, 32, 32), texts()
    ours, preset = import_(tmp_path, coca.weights["open_clip"], presets)
    with torch.no_grad():
        said = model(image, ids)
        loss = reference("open_clip.loss").CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        features = {"image": said["image_features"].view(4, DIM), "text": said["text_features"]}
        con, cap = loss(features["image"], features["text"], said["logits"], said["labels"], said["logit_scale"])
        mine = ours.both(ours.read({"image": image, "text": ids}))
        assert_agree({"image": ours.encode_image(image), "text": ours.encode_text(ids), "con": mine["contrast"], "cap": 2 * mine["caption"],
                 "logits": ours.tell(ours.text(ids).tokens[:, :-1], ours.vision(image).tokens)},
                features | {"con": con, "cap": cap, "logits": said["logits"]})
        short = ids[2:, :6]                  # trimmed to the longest, as our batches are; theirs are always as long as the context
        assert_agree({"text": ours.encode_text(short)}, {"text": features["text"][2:]})

    export(ours.state_dict(), preset.config, coca.weights["open_clip"], tmp_path / "back", preset.feed)
    about = json.loads((tmp_path / "back" / "open_clip_config.json").read_text())["model_cfg"]
    again = reference("open_clip.coca_model").CoCa(**{k: v for k, v in about.items() if k != "custom_text"})
    from safetensors.torch import load_file
    again.load_state_dict(load_file(tmp_path / "back" / "open_clip_model.safetensors"))
    with torch.no_grad():
        assert_agree({"logits": again.eval()(image, ids)["logits"]}, {"logits": said["logits"]})


@torch.no_grad()
def test_captions_are_those_of_the_reference_chosen_greedily(tmp_path):
    model, image = saved(told(True), tmp_path), torch.randn(2, 3, 32, 32)
    ours, _ = import_(tmp_path, coca.weights["open_clip"], presets)
    text = torch.full((2, 1), VOCAB - 2)
    for _ in range(5):
        text = torch.cat([text, model(image, text, output_labels=False)["logits"][:, -1:].argmax(-1)], 1)
    new = ours.generate_text(image, torch.full((2, 1), VOCAB - 2), max_new=5)
    for row, want in zip(new.tolist(), text[:, 1:].tolist(), strict=True):
        many = want.index(VOCAB - 1) + 1 if VOCAB - 1 in want else len(want)
        assert row[:many] == want[:many]


@pytest.mark.parametrize(("preset", "name"), [("vit_b_32", "coca_ViT-B-32"), ("vit_l_14", "coca_ViT-L-14")])
def test_the_released_sizes(preset, name):
    cfg = reference("open_clip").get_model_config(name)
    with torch.device("meta"):
        theirs = reference("open_clip.coca_model").CoCa(**{k: v for k, v in cfg.items() if k != "custom_text"})
        ours = presets(preset).config.build()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert coca.weights["open_clip"].read({"model_cfg": cfg}, {})[1]["config.text.sees"] == presets(preset).config.text.sees == "released"


@torch.no_grad()
def test_the_mask_that_the_released_weights_should_have_had(tmp_path):
    model, ids = saved(told("cascade"), tmp_path), texts()
    model.text.correct_cls_mask = True
    ours, preset = import_(tmp_path, coca.weights["open_clip"], presets)
    right = preset.config.but(**{"text.sees": "words"}).build().eval()
    right.load_state_dict(ours.state_dict())
    assert_agree({"text": right.encode_text(ids)}, {"text": model.encode_text(ids)})
    with pytest.raises(UserError, match="its own mask"):
        coca.weights["open_clip"].write(preset.config.but(**{"text.sees": "words"}))


def test_what_the_layout_cannot_hold_is_refused():
    with pytest.raises(UserError, match="blocks that read the picture between others"):
        coca.weights["open_clip"].write(coca.tiny().config)
    with pytest.raises(UserError, match="is missing"):
        coca.weights["open_clip"].read({}, {})
    with pytest.raises(UserError, match="timm_model_name"):
        cfg = told(True)
        coca.weights["open_clip"].read({"model_cfg": cfg | {"vision_cfg": cfg["vision_cfg"] | {"timm_model_name": "vit"}}}, {})
