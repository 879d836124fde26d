"""Learned words against diffusers' TextualInversionLoaderMixin and transformers' CLIPTextModel: equal text states, multi-vector expansion. 1e-4."""
import json

import pytest
import torch
from reference import reference, shake

from polysense.base.plan import WordsPlan
from polysense.data.tokenizer import load_tokenizer
from polysense.towers.clip import body
from polysense.towers.clip_text import ClipText
from polysense.weights.clip_hf import TEXT
from polysense.weights.concept import read_concept
from polysense.weights.keymap import load_into

LENGTH, WIDTH = 16, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CLIP's kind of tokenizer files with letters only."""
    place = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(97, 123)] + ["<", ">", "*", "_", "1", "0"]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    return place, len(tokens)


@pytest.mark.parametrize("vectors", [1, 3])
@torch.no_grad()
def test_a_learned_word_gives_equal_text_states(folder, tmp_path, vectors):
    hf, mixin = reference("transformers"), reference("diffusers.loaders.textual_inversion").TextualInversionLoaderMixin
    place, vocab = folder
    theirs = hf.CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=LENGTH)
    text = shake(hf.CLIPTextModel(hf.CLIPTextConfig(
        vocab_size=vocab, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH,
        eos_token_id=vocab - 1, bos_token_id=vocab - 2, pad_token_id=vocab - 1)))
    ours = ClipText.Config(vocab=vocab, length=LENGTH, body=body(WIDTH, 2, 2).but(**{"block.mlp.hidden": 32})).build().eval()
    load_into(ours, TEXT, text.state_dict())

    learned = torch.randn(vectors, WIDTH)
    torch.save({"<it>": learned if vectors > 1 else learned[0]}, tmp_path / "learned_embeds.bin")
    torch.save({"string_to_param": {"*": learned}}, tmp_path / "embeddings.pt")
    new = read_concept(tmp_path / "learned_embeds.bin", WIDTH)["<it>"]
    assert torch.equal(new, learned) and torch.equal(read_concept(tmp_path / "embeddings.pt")["*"], learned)

    holder = type("Holder", (mixin,), {"components": {}, "device": torch.device("cpu"), "dtype": torch.float32, "hf_device_map": None})()
    holder.tokenizer, holder.text_encoder = theirs, text
    holder.load_textual_inversion(str(tmp_path / "learned_embeds.bin"), token="<it>")
    prompt = "a <it> on it"
    ids = theirs(holder.maybe_convert_prompt(prompt, theirs), padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    plan = WordsPlan(vocab=vocab, length=LENGTH, new=(("<it>", vectors),))
    mine = load_tokenizer(place, plan)(prompt, trim=False)
    assert mine.tolist() == ids.tolist(), "S* becomes S*, S*_1, ... behind the vocabulary"
    torch.testing.assert_close(ours(mine, new=new).tokens, text(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
