"""CapPa's essence (Tschannen et al. 2023): each test fails if its mechanism is replaced by a shortcut."""
from math import log

import pytest
import torch
import torch.nn.functional as F
from reference import shake

import polysense
from polysense.base.catalogue import preset_of

recipe = polysense.load("cappa")
CONFIG = recipe.config(32, 8, (32, 2, 2), (24, 2, 2), 60, 12)


@pytest.fixture()
def system():
    torch.manual_seed(0)
    return shake(CONFIG.build())


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(5, 60, (5, 8), generator=g)
    text[:, 0] = 1
    for row, at in enumerate((7, 5, 3, 7, 4)):
        text[row, at], text[row, at + 1:] = 2, 0
    return {"image": torch.randn(5, 3, 32, 32, generator=g), "text": text}


def logits(system, batch, at_once: float, text=None):
    text = batch["text"] if text is None else text
    return system.predict(text, system.vision(batch["image"]).tokens, torch.full((5,), at_once > 0))


def test_all_at_once_nothing_of_the_caption_is_read_and_positions_see_each_other(system, batch):
    with torch.no_grad():
        one, two = (logits(system, batch, 1, t) for t in (batch["text"], torch.randint(5, 60, (5, 8))))
    torch.testing.assert_close(one, two)
    with torch.no_grad():
        system.decoder.text.position[0, 6] += torch.randn(24)
        assert (logits(system, batch, 1)[:, 0] - one[:, 0]).abs().max() > 1e-4, "the first position sees the last"


def test_from_left_to_right_no_token_sees_a_later_one(system, batch):
    with torch.no_grad():
        before = logits(system, batch, 0)
        other = batch["text"].clone()
        other[:, 4] = 59
        after = logits(system, batch, 0, other)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert (after[:, 4:] - before[:, 4:]).abs().max() > 1e-4


def test_targets_stay_where_they_are_and_padding_is_ignored(system, batch):
    system.parallel = 0.0
    target = batch["text"][:, 1:]
    want = F.cross_entropy(logits(system, batch, 0)[target != 0], target[target != 0])
    torch.testing.assert_close(system.caption(batch)["caption"], want)
    system.parallel = 1.0
    want = F.cross_entropy(logits(system, batch, 1)[target != 0], target[target != 0])
    torch.testing.assert_close(system.caption(batch)["caption"], want)


def test_each_sample_chooses_its_mode_for_itself(batch):
    system, modes = recipe.config(32, 8, (32, 1, 2), (24, 1, 2), 60, 12).build(), []
    whole = {k: v.repeat(40, *[1] * (v.ndim - 1)) for k, v in batch.items()}
    system.decoder.text.register_forward_pre_hook(lambda m, args: modes.append((args[0] == system.mask).all(1)))
    for _ in range(5):
        system.caption(whole)
    share = torch.cat(modes).float()
    assert share.mean().item() == pytest.approx(0.75, abs=0.04) and all(0 < m.float().mean() < 1 for m in modes)
    modes.clear()
    system.parallel = 0.0
    system.caption(whole)
    assert not torch.cat(modes).any(), "0 is Cap"


def test_at_birth_every_token_is_equally_likely():
    system = CONFIG.build()
    text = torch.tensor([[1, 9, 8, 7, 2]])
    for share in (0.0, 1.0):
        system.parallel = share
        assert system.caption({"image": torch.randn(1, 3, 32, 32), "text": text})["caption"].item() == pytest.approx(log(60), abs=1e-5)
    assert system.decoder.text.embed.weight.std().item() == pytest.approx(1, abs=0.1) and system.decoder.text.embed.weight.shape[0] == 61


def test_the_decoder_has_no_biases_and_the_picture_tower_no_class_token(system):
    names = [n for n, _ in system.decoder.named_parameters()]
    assert not any(n.endswith("bias") for n in names) and system.vision.cls is None
    tokens = system.vision(torch.randn(2, 3, 32, 32)).tokens
    assert tokens.shape == (2, 16, 32)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(system.encode_image(image), F.normalize(system.vision(image).tokens.mean(1), dim=-1))


@torch.no_grad()
def test_a_decoder_block_is_torchs(system):
    block = system.decoder.text.body.blocks[0]
    theirs = torch.nn.TransformerDecoderLayer(24, 2, 96, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True, bias=False).eval()
    a, c = block.attn, block.cross
    state = {"self_attn.in_proj_weight": torch.cat([a.q.weight, a.k.weight, a.v.weight]), "self_attn.out_proj.weight": a.out.weight,
             "norm1.weight": block.norm1.weight, "norm2.weight": block.norm_cross.weight, "norm3.weight": block.norm2.weight,
             "linear1.weight": block.mlp.up.weight, "linear2.weight": block.mlp.down.weight}
    memory = torch.randn(3, 16, 24)
    same = recipe.config(32, 8, (24, 1, 2), (24, 1, 2), 60, 12).build()
    c = shake(same).decoder.text.body.blocks[0].cross
    block.cross = c
    theirs.load_state_dict(state | {"multihead_attn.in_proj_weight": torch.cat([c.q.weight, c.k.weight, c.v.weight]),
                                    "multihead_attn.out_proj.weight": c.out.weight})
    x, causal = torch.randn(3, 6, 24), torch.ones(6, 6).tril().bool()
    torch.testing.assert_close(block(x, memory, causal=True), theirs(x, memory, tgt_mask=~causal), rtol=1e-4, atol=1e-4)


def test_labels_are_scored_by_the_sum_over_their_tokens_in_any_order(system, batch):
    with torch.no_grad():
        score = system.score_text(batch["image"], batch["text"])
        order = torch.tensor([3, 0, 4, 1, 2])
        torch.testing.assert_close(system.score_text(batch["image"], batch["text"][order]), score[:, order])
        own = logits(system, batch, 0).log_softmax(-1)
        target = batch["text"][:, 1:]
        want = (own.gather(2, target[..., None])[..., 0] * (target != 0)).sum(1)
    torch.testing.assert_close(score.diagonal(), want, rtol=1e-4, atol=1e-4)


def test_captions_are_written_from_left_to_right_and_continue_a_prompt(system, batch):
    new = system.generate_text(batch["image"], torch.tensor([[1]] * 5), max_new=6)
    assert new.shape[0] == 5 and new.shape[1] <= 6
    with torch.no_grad():
        seen = system.vision(batch["image"]).tokens
        first = system.decoder(torch.tensor([[1]] * 5), seen)[:, -1].argmax(-1)
        after = system.decoder(torch.tensor([[1, 9]] * 5), seen)[:, -1].argmax(-1)
    assert torch.equal(new[:, 0], first)
    assert torch.equal(system.generate_text(batch["image"], torch.tensor([[1, 9, 0]] * 5), max_new=3)[:, 0], after)


def test_cap_is_a_preset():
    assert preset_of("cappa", "tiny_cap").config.parallel == preset_of("cappa", "paper_cap").config.parallel == 0
    assert preset_of("cappa", "paper").config.parallel == 0.75
