"""The prefix row: only virtual tokens train. The mechanism: tests/mechanisms/test_prefix.py."""
import pytest
import torch
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.mechanisms.prefix import Prompt, virtual_of
from polysense.train.fit import fit
from polysense.train.folder import Run
from polysense.train.starts import carry

recipe = polysense.load("prefix_tuning")
COUNT = {"tiny": 8 * 128 + 129 * 64 + 65 * 4 * 2 * 128, "tiny_v2": 8 * 4 * 2 * 128, "tiny_prompt": 8 * 128}


@pytest.mark.parametrize("name", ["tiny", "tiny_v2", "tiny_prompt", "tiny_lstm"])
def test_only_virtual_tokens_train_and_the_base_is_bit_identical(name):
    preset = preset_of("prefix_tuning", name)
    torch.manual_seed(0)
    system, base = preset.config.build(), preset_of("lora", "base").config.build()
    carry(preset.starts[0], Run("lora", preset_of("lora", "base"), base, None, None, {}), system)
    batch = fake_batch(preset, ("text",))
    list(fit(system, preset.stages[0].but(**{"steps": 2, "batch_size": 4, "optim.warmup": 0}), [batch] * 2))
    for k, v in base.state_dict().items():
        assert torch.equal(system.state_dict()[k], v), k
    trained = sum(p.numel() for p in system.parameters() if p.requires_grad)
    assert trained == COUNT.get(name, trained) and {n for n, p in system.named_parameters() if p.requires_grad} == {
        n for n, _ in system.named_parameters() if "virtual" in n or "soft" in n}


def test_the_prompt_begins_as_words():
    system = preset_of("prefix_tuning", "tiny_prompt").config.build()
    held = virtual_of(system)
    assert isinstance(held, Prompt) and torch.equal(held.whole(), system.language.embed.weight[300:308])


def test_the_baked_prefix_of_the_paper_has_a_quarter_of_a_million_numbers():
    with torch.device("meta"):
        held = virtual_of(recipe.paper().config.build())
    assert held.whole().shape == (5, 24, 2, 1024) and held.whole().numel() == 245_760


def test_the_papers_base_is_a_trained_model_of_the_same_shape():
    preset = recipe.paper()
    start, = preset.starts
    lent = preset_of(start.from_, start.preset).config
    assert (start.into, start.take) == ("language", "language") and lent.language == preset.config.language and lent.adapter is None
