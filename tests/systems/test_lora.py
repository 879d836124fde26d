"""The LoRA row: born as its base, trains little, forgets nothing of the base's weights. The mechanism: tests/mechanisms/test_lora.py."""
import pytest
import torch
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.train.fit import fit
from polysense.train.folder import Run
from polysense.train.starts import carry

recipe = polysense.load("lora")


def lent(system, preset):
    """A base with random weights, carried into the system as its Start would."""
    torch.manual_seed(3)
    base = preset_of("lora", "base").config.build()
    carry(preset.starts[0], Run("lora", preset_of("lora", "base"), base, None, None, {}), system)
    return base.eval()


def test_with_its_bases_weights_it_is_the_base_bit_for_bit():
    preset = preset_of("lora")
    system = preset.config.build().eval()
    base, text = lent(system, preset), fake_batch(preset, ("text",))["text"]
    with torch.inference_mode():
        assert torch.equal(system.logits(text), base.logits(text))


def test_training_moves_the_updates_alone():
    preset = preset_of("lora")
    system = preset.config.build()
    lent(system, preset)
    before = {k: v.clone() for k, v in system.state_dict().items()}
    batch = fake_batch(preset, ("text",))
    list(fit(system, preset.stages[0].but(**{"steps": 3, "batch_size": 4, "optim.warmup": 0}), [batch] * 3))
    moved = {k for k, v in system.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(".lora.default." in k for k in moved)


def test_the_published_number_of_trained_parameters():
    with torch.device("meta"):
        system = recipe.paper().config.build()
    trained = sum(p.numel() for n, p in system.named_parameters() if ".lora." in n)
    assert trained == 24 * 2 * 2 * 1024 * 4, "r (k + d) over query and value of 24 layers"
    assert sum(p.numel() for n, p in system.named_parameters() if ".lora." not in n) == 354_823_168


def test_padding_is_no_word_and_replies_alone_count():
    system = preset_of("lora").config.build().eval()
    text = torch.tensor([[1, 7, 9, 2]])
    longer = torch.nn.functional.pad(text, (0, 3))
    with torch.inference_mode():
        assert system.losses({"text": text})["language"] == pytest.approx(float(system.losses({"text": longer})["language"]), abs=1e-5)
        replied = torch.tensor([[False, False, True, True]])
        got = float(system.reply({"chat": text, "chat_reply": replied})["language"])
        log_p = system.logits(text).log_softmax(-1)[0]
        assert got == pytest.approx(float(-(log_p[1, 9] + log_p[2, 2]) / 2), abs=1e-5)


def test_the_papers_base_is_a_trained_model_of_the_same_shape():
    preset = recipe.paper()
    start, = preset.starts
    lent = preset_of(start.from_, start.preset).config
    assert (start.into, start.take) == ("language", "language") and lent.language == preset.config.language and lent.adapter is None
