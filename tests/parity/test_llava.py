"""LLaVA-1.5 and LLaVA against transformers' LlavaForConditionalGeneration: features, logits, loss; through files, both ways; toy sizes."""
import json

import pytest
import torch
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.objectives.language import IGNORE
from polysense.systems.lmm import llava, llava_1_5
from polysense.weights import llava_hf
from polysense.weights.convert import export, import_

PLACE, P = 60, 4
TEXT = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
          "image_size": 16, "patch_size": 8, "hidden_act": "quick_gelu", "projection_dim": 16}


@pytest.fixture(scope="module")
def theirs():
    transformers = reference("transformers")
    torch.manual_seed(0)
    config = transformers.LlavaConfig(text_config=TEXT, vision_config=VISION, image_token_index=PLACE, image_token_id=PLACE, vision_feature_layer=-2)
    return shake(transformers.LlavaForConditionalGeneration(config))


@pytest.fixture()
def batch():
    """Three texts with one, two and no pictures, padded on the right; one place each in ours, P in theirs."""
    g = torch.Generator().manual_seed(1)
    rows = [[1, 5, PLACE, 6, 7, 8, 2], [1, PLACE, 9, PLACE, 10, 2], [1, 11, 12, 2]]
    image = torch.randn(3, 3, 16, 16, generator=g)
    return rows, image


def toy(system):
    sizes = llava_hf._sizes(TEXT, {**llava_hf.VISION_DEFAULTS, **VISION}, -2, PLACE)
    return preset_of(system, "paper").config.but(**{k.removeprefix("config."): v for k, v in sizes.items() if k.startswith("config.")})


def spread(rows):
    return [[j for i in row for j in ([PLACE] * P if i == PLACE else [i])] for row in rows]


def padded(rows):
    wide = max(map(len, rows))
    return torch.tensor([r + [0] * (wide - len(r)) for r in rows])


def labels(text):
    return text.masked_fill((text == 0) | (text == PLACE) | (text == 1), IGNORE)


def published(model, path, config):
    """Their state as it lies in published files, which differ from the names in memory."""
    out = {}
    for name, value in model.state_dict().items():
        name = name.replace("model.language_model.", "language_model.model.").replace("model.multi_modal_projector", "multi_modal_projector")
        name = name.replace("model.vision_tower.", "vision_tower.").replace("lm_head", "language_model.lm_head")
        if name.startswith("vision_tower.") and "vision_model" not in name:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        out[name] = value.clone().contiguous()
    path.mkdir()
    save_file(out, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def assert_agree(ours, theirs, rows, image):
    """Row by row (theirs takes no batch of different numbers of pictures), and ours in one batch besides."""
    text = padded(rows)
    for i, (row, images) in enumerate(zip(rows, (image[:1], image[1:3], None), strict=True)):
        wide = torch.tensor(spread([row]))
        want = theirs(input_ids=wide, pixel_values=images, labels=labels(wide)) if images is not None else theirs(input_ids=wide, labels=labels(wide))
        x, mask, _ = ours.splice(None if images is None else images[None], text[i:i + 1], labels(text[i:i + 1]))
        got = ours.language.logits(ours.language.read(x, mask))
        assert (got[:, :wide.shape[1]] - want.logits).abs().max() <= 1e-4
        loss = ours.nll(None if images is None else images[None], text[i:i + 1], labels(text[i:i + 1]) != IGNORE)
        assert abs(loss - want.loss) <= 1e-4
        if images is not None:
            features = theirs.get_image_features(pixel_values=images, vision_feature_layer=-2)
            features = getattr(features, "pooler_output", features)
            features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
            assert (ours.see(images[None]).flatten(0, 2) - features.flatten(0, -2)).abs().max() <= 1e-4


@torch.no_grad()
def test_features_logits_and_loss_of_both_key_layouts(theirs, batch, tmp_path):
    path = published(theirs, tmp_path / "published", theirs.config.to_dict())
    ours, preset = import_(path, llava_hf.LAYOUT, lambda name: preset_of("llava_1_5", name))
    assert_agree(ours, theirs, *batch)
    assert preset.config.image_token == PLACE and preset.feed.image.size == 16
    theirs.save_pretrained(tmp_path / "saved")
    again, _ = import_(tmp_path / "saved", llava_hf.LAYOUT, lambda name: preset_of("llava_1_5", name))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


@torch.no_grad()
def test_ours_opens_in_transformers(batch, tmp_path):
    transformers = reference("transformers")
    torch.manual_seed(3)
    config = toy("llava_1_5")
    ours = shake(config.build())
    export(dict(ours.state_dict()), config, llava_hf.LAYOUT, tmp_path / "out", preset_of("llava_1_5", "paper").feed)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert_agree(ours, theirs, *batch)


@torch.no_grad()
def test_greedy_replies(theirs, batch, tmp_path):
    ours, _ = import_(published(theirs, tmp_path / "p", theirs.config.to_dict()), llava_hf.LAYOUT, lambda name: preset_of("llava_1_5", name))
    text, image = torch.tensor([[1, 5, PLACE, 6, 7]]), batch[1][:1]
    want = theirs.generate(input_ids=torch.tensor(spread(text.tolist())), pixel_values=image, max_new_tokens=8, do_sample=False)[:, 4 + P:]
    assert ours.generate_text(image, text, max_new=8).tolist() == want.tolist()


@torch.no_grad()
def test_llava_is_the_same_with_one_linear(theirs, batch, tmp_path):
    """transformers always has two layers: theirs are replaced by one."""
    import copy

    changed = copy.deepcopy(theirs)
    changed.model.multi_modal_projector = torch.nn.Linear(24, 32)
    config = toy("llava")
    ours = config.build()
    state = {}
    for name, value in changed.state_dict().items():                          # as the authors name it
        name = name.replace("model.language_model.", "model.").replace("model.multi_modal_projector", "model.mm_projector")
        name = name.replace("model.vision_tower.vision_model.", "model.vision_tower.")
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        state[name] = value.clone()
    (tmp_path / "authors").mkdir()
    save_file(state, tmp_path / "authors" / "model.safetensors")
    (tmp_path / "authors" / "config.json").write_text(json.dumps(llava_hf.write_official(config)))
    ours, _ = import_(tmp_path / "authors", llava.weights["official"], lambda name: preset_of("llava", name))
    assert_agree(ours, changed, *batch)
    export(dict(ours.state_dict()), config, llava.weights["official"], tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(state) and all(torch.equal(back[k], state[k]) for k in back)


def test_connector_names_round_trip():
    """mm_projector.0/.2 of the authors are multi_modal_projector.linear_1/linear_2 of transformers."""
    config = preset_of("llava_1_5", "tiny").config
    ours = {f"connector.mlp.{n}.{p}": torch.randn(2, 2) if p == "weight" else torch.randn(2) for n in ("up", "down") for p in ("weight", "bias")}
    hf, authors = llava_hf.keymap(config).save(ours), llava_hf.official(config).save(ours)
    assert set(hf) == {f"multi_modal_projector.linear_{n}.{p}" for n in (1, 2) for p in ("weight", "bias")}
    assert set(authors) == {f"model.mm_projector.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")}
    assert torch.equal(hf["multi_modal_projector.linear_2.weight"], authors["model.mm_projector.2.weight"])
    for table, theirs in ((llava_hf.keymap(config), hf), (llava_hf.official(config), authors)):
        assert all(torch.equal(v, ours[k]) for k, v in table.load(theirs).items())


def test_what_the_layouts_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="CLIP's ViT"):
        llava_hf.write(preset_of("llava_1_5", "tiny").config)
    with pytest.raises(UserError, match="two layers"):
        llava_hf.write(preset_of("llava", "paper").config)
    with pytest.raises(UserError, match="not 'llava'"):
        llava_hf.read({"model_type": "clip"}, {})
    assert set(llava_1_5.weights) == {"hf", "official"}
