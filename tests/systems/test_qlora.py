"""The QLoRA row: a four-bit base under updates. The quantiser: tests/mechanisms/test_nf4.py."""
import torch
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.mechanisms.nf4 import NF4Linear, dequantise, quantise
from polysense.train.folder import Run
from polysense.train.starts import carry

recipe = polysense.load("qlora")


def test_every_dense_layer_of_every_block_is_quantised_and_adapted_and_nothing_else():
    system = preset_of("qlora").config.build()
    layers = {n for n, m in system.named_modules() if isinstance(m, NF4Linear)}
    assert len(layers) == 4 * 7 and all(".blocks." in n for n in layers)
    assert all("default" in m.lora for m in system.modules() if isinstance(m, NF4Linear))
    assert isinstance(system.language.head, torch.nn.Linear) and system.language.head.weight.dtype == torch.float32


def test_its_start_is_quantised_on_the_way_in():
    preset = preset_of("qlora")
    torch.manual_seed(1)
    system, base = preset.config.build().eval(), preset_of("lora", "base").config.build().eval()
    carry(preset.starts[0], Run("lora", preset_of("lora", "base"), base, None, None, {}), system)
    for name, layer in system.named_modules():
        if isinstance(layer, NF4Linear):
            assert torch.equal(layer.weight, dequantise(quantise(base.get_submodule(name).weight)))
    text = fake_batch(preset, ("text",))["text"]
    with torch.inference_mode():
        near, exact = system.logits(text), base.logits(text)
    assert 0 < (near - exact).abs().mean() < 0.3 * exact.abs().mean()


def test_the_log_of_the_authors_counts_the_same_numbers():
    with torch.device("meta"):
        system = recipe.paper().config.build()
    trained = sum(p.numel() for n, p in system.named_parameters() if ".lora." in n)
    packed = sum(b.numel() for n, b in system.named_buffers() if n.endswith(".codes"))
    assert trained == 159_907_840 and packed == 3_238_002_688
    assert sum(p.numel() for p in system.parameters()) + packed == 3_660_320_768
    assert recipe.paper().stages[0].optim.name == "paged_adamw"


def test_the_papers_base_is_a_trained_model_of_the_same_shape():
    preset = recipe.paper()
    start, = preset.starts
    lent = preset_of(start.from_, start.preset).config
    assert (start.into, start.take) == ("language", "language") and lent.language == preset.config.language and lent.adapter is None
