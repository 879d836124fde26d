"""LiT's essence (Zhai et al. 2022)."""
import pytest
import torch
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.train.fit import fit

recipe = polysense.load("lit")
SETTINGS = {"tiny": "Lu", "tiny_Uu": "Uu", "tiny_uu": "uu", "tiny_LU": "LU", "tiny_UU": "UU", "tiny_uL": "uL"}


@pytest.fixture(scope="module")
def batch():
    return fake_batch(preset_of("lit"), ("image", "text"), n=6)


def trained(name: str, batch, steps: int = 3):
    torch.manual_seed(0)
    preset = preset_of("lit", name)
    system = preset.config.build()
    before = {k: v.clone() for k, v in system.state_dict().items()}
    list(fit(system, preset.stages[0].but(**{"steps": steps, "batch_size": 6, "optim.warmup": 0}), [batch] * steps))
    return system, {k for k, v in system.state_dict().items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_locked_tower_is_byte_identical_after_training_and_an_unlocked_one_is_not(name, batch):
    image, text = SETTINGS[name]
    system, moved = trained(name, batch)
    assert any(k.startswith("vision.") for k in moved) == (image != "L")
    assert any(k.startswith("text.") for k in moved) == (text != "L")
    assert "text_head.weight" in moved and "log_scale" in moved
    if image == "L":
        assert not system.train().vision.training and all(p.grad is None for p in system.vision.parameters())


def test_the_six_settings_differ_only_in_what_trains_and_what_they_start_from():
    base = preset_of("lit")
    for name, letters in SETTINGS.items():
        other = preset_of("lit", name)
        assert other.but(starts=base.starts).but(**{"stages.0.trainable": base.stages[0].trainable}) == base
        assert {s.into for s in other.starts} == ({"vision"} if letters[0] in "LU" else set()) | ({"text"} if letters[1] in "LU" else set())


def test_cached_features_give_the_same_loss_and_gradients(batch):
    torch.manual_seed(0)
    system = preset_of("lit").config.build()
    system.choose_trainable(preset_of("lit").stages[0].trainable)
    system.train()
    grads = []
    with torch.no_grad():
        features = system.vision(batch["image"]).pooled
    for each in (batch, {"features": features, "text": batch["text"]}):
        system.zero_grad()
        losses = system.compare(system.embed(each))
        losses.total().backward()
        grads.append((losses["contrast"].item(), system.text_head.weight.grad.clone()))
    assert grads[0][0] == pytest.approx(grads[1][0], abs=1e-6)
    torch.testing.assert_close(grads[0][1], grads[1][1])


def test_without_an_image_head_the_space_has_the_image_towers_width():
    system = preset_of("lit").config.build()
    assert not list(system.image_head.parameters()) and system.encode_text(torch.tensor([[1, 9, 2]])).shape[1] == system.vision.width
    assert {n.split(".")[0] for n, _ in system.named_parameters()} == {"vision", "text", "text_head", "log_scale"}


def test_the_scale_starts_at_ten_and_rises_while_all_positives_rank_first():
    system = preset_of("lit").config.build()
    assert system.scale.item() == pytest.approx(10)
    same = torch.eye(5)
    system.compare({"image": same, "text": same})["contrast"].backward()
    assert system.log_scale.grad < 0, "descending raises the scale"


def test_the_text_feature_is_the_raw_cls_state_and_padding_is_masked():
    system = preset_of("lit").config.build().eval()
    text = torch.tensor([[1, 9, 8, 2, 0, 0]])
    encoded = system.text(text)
    torch.testing.assert_close(encoded.pooled, encoded.tokens[:, 0])
    torch.testing.assert_close(system.encode_text(text), system.encode_text(text[:, :4]))
    assert not torch.allclose(system.encode_text(torch.tensor([[1, 9, 7, 2]])), system.encode_text(text), atol=1e-4), "[CLS] sees what follows it"


def test_the_papers_locked_tower_is_as_large_as_the_one_that_is_lent():
    preset = preset_of("lit", "paper")
    lent, own = preset_of("vit", preset.starts[0].preset).config.backbone, preset.config.vision
    assert [(c.image_size, c.patch, c.width, c.body.depth, c.body.heads) for c in (lent, own)] == [(224, 16, 1024, 24, 16)] * 2


def test_the_locked_tower_is_the_one_that_supervised_pre_trains():
    assert preset_of("lit").config.vision == preset_of("supervised").config.backbone
