"""Adapters against peft (both directions, through its files) and NF4 against bitsandbytes."""
import json

import pytest
import torch
from reference import reference, shake

from polysense.mechanisms.lora import LowRank, adapted_layers
from polysense.mechanisms.nf4 import LEVELS, dequantise, dynamic_levels, quantise
from polysense.mechanisms.prefix import VirtualTokens
from polysense.towers.causal_lm import llama
from polysense.weights import llama_hf
from polysense.weights.files import read_json, read_state, write_files
from polysense.weights.keymap import load_into

IDS = torch.tensor([[5, 9, 3, 7, 2, 11], [8, 4, 6, 12, 30, 1]])
OURS = llama(vocab=50, length=32, width=32, depth=2, heads=4, kv_heads=2, hidden=48)


def their_name(path: str) -> str:
    """body.blocks.1.attn.q -> model.layers.1.self_attn.q_proj, as the key map of the weights says."""
    return llama_hf.keymap(OURS).theirs(f"{path}.weight").removesuffix(".weight")


def pair():
    """The same random weights in transformers' LLaMA and in ours."""
    transformers = reference("transformers")
    torch.manual_seed(0)
    theirs = shake(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, rms_norm_eps=1e-6, tie_word_embeddings=False, attn_implementation="eager")))
    ours = OURS.build().eval()
    load_into(ours, llama_hf.keymap(OURS), dict(theirs.state_dict()))
    return theirs, ours


def logits(ours, ids=IDS):
    with torch.inference_mode():
        return ours.logits(ours(ids).tokens)


@pytest.mark.parametrize("c", [LowRank(rank=4, alpha=10.0), LowRank(rank=3, alpha=6.0, scaling="root", on="*.attn.q|k|v|out")])
def test_lora_written_here_is_read_by_peft_and_the_other_way_round(c, tmp_path):
    peft = reference("peft")
    theirs, ours = pair()
    base = logits(ours)
    torch.testing.assert_close(base, theirs(IDS).logits, atol=1e-4, rtol=0)
    c.put(ours)
    assert torch.equal(logits(ours), base)
    with torch.no_grad():
        for _, layer in adapted_layers(ours):
            layer.lora["default"].B.normal_(std=0.3)
    write_files(tmp_path / "ours", {"adapter_config.json": c.about(ours, their_name) | {"task_type": "CAUSAL_LM"}},
                {"adapter_model.safetensors": c.tensors(ours, their_name)})
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    want = logits(ours)
    assert (want - base).abs().max() > 0.1
    torch.testing.assert_close(loaded(IDS).logits, want, atol=1e-4, rtol=0)
    with torch.no_grad():                    # theirs, changed and saved by them, into ours
        for n, p in loaded.named_parameters():
            if "lora_" in n:
                p.add_(torch.randn_like(p) * 0.1)
    loaded.save_pretrained(tmp_path / "theirs")
    assert set(read_state(tmp_path / "theirs" / "adapter_model.safetensors")) == set(c.tensors(ours, their_name))
    c.load(ours, read_state(tmp_path / "theirs" / "adapter_model.safetensors"), their_name)
    torch.testing.assert_close(logits(ours), loaded(IDS).logits, atol=1e-4, rtol=0)
    merged = loaded.merge_and_unload()
    c.settle(ours)
    torch.testing.assert_close(logits(ours), merged(IDS).logits, atol=1e-4, rtol=0)


def test_embedding_and_convolution_updates_are_pefts(tmp_path):
    peft = reference("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = torch.nn.Embedding(20, 6), torch.nn.Conv2d(6, 5, 3, stride=2, padding=1)

        def forward(self, ids):
            return self.conv(self.embed(ids).transpose(1, 2).unflatten(2, (4, 4)))

    torch.manual_seed(0)
    ours, ids = Net(), torch.arange(32).view(2, 16) % 20
    theirs = Net()
    theirs.load_state_dict(ours.state_dict())
    c = LowRank(rank=2, alpha=3.0, on="embed|conv")
    c.put(ours)
    with torch.no_grad():
        for _, layer in adapted_layers(ours):
            for p in layer.lora.parameters():
                p.normal_(std=0.5)
    write_files(tmp_path / "a", {"adapter_config.json": c.about(ours)}, {"adapter_model.safetensors": c.tensors(ours)})
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    torch.testing.assert_close(loaded(ids), ours(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_are_pefts_both_ways(kind, tmp_path):
    peft = reference("peft")
    theirs, ours = pair()
    c = VirtualTokens(tokens=3, kind=kind)
    c.put(ours)
    with torch.no_grad():
        for n, p in ours.named_parameters():
            if n in c.trainable(ours):
                p.normal_(std=0.5)
    write_files(tmp_path / "ours", {"adapter_config.json": c.about(ours)}, {"adapter_model.safetensors": c.tensors(ours)})
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    said = loaded(IDS).logits[:, -IDS.shape[1]:]     # of prompts they give the virtual places too
    torch.testing.assert_close(said, logits(ours), atol=1e-4, rtol=0)
    with torch.no_grad():
        for p in loaded.prompt_encoder.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    loaded.save_pretrained(tmp_path / "theirs")
    c.load(ours, read_state(tmp_path / "theirs" / "adapter_model.safetensors"))
    torch.testing.assert_close(loaded(IDS).logits[:, -IDS.shape[1]:], logits(ours), atol=1e-4, rtol=0)
    assert json.dumps(read_json(tmp_path / "theirs" / "adapter_config.json")["num_virtual_tokens"]) == "3"


@pytest.mark.parametrize("shape", [(64, 128), (96, 100)])
def test_codes_constants_and_values_are_those_of_bitsandbytes(shape):
    functional = reference("bitsandbytes.functional")
    g = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=g) * 0.05
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(state.code.float(), torch.tensor(LEVELS), atol=1e-7, rtol=0)
    ours = quantise(w, 0)
    assert torch.equal(ours.codes, packed.flatten()) and torch.equal(ours.absmax, state.absmax.flatten())
    torch.testing.assert_close(dequantise(ours), functional.dequantize_4bit(packed, state), atol=1e-7, rtol=0)


def test_double_quantisation_is_that_of_bitsandbytes():
    functional = reference("bitsandbytes.functional")
    torch.testing.assert_close(dynamic_levels(), functional.create_dynamic_map().float().sort().values, atol=1e-7, rtol=0)
    w = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)) * 0.05      # whole blocks in a row: what its processor kernel reads right
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantise(w)
    assert torch.equal(ours.codes, packed.flatten())
    torch.testing.assert_close(ours.mean, state.offset.reshape(()).float())
    assert (ours.absmax == state.absmax.flatten()).float().mean() > 0.99, "a tie in the middle of two levels may go either way"
    torch.testing.assert_close(ours.second, state.state2.absmax.flatten())
    torch.testing.assert_close(dequantise(ours), functional.dequantize_4bit(packed, state), atol=2e-3, rtol=0)
