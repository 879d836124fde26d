"""The Transformer against torch.nn.Transformer, and through Marian's files and back. Random weights, toy sizes, tolerance 1e-4."""
import pytest
import torch
from reference import reference, shake
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.backbone import transformer
from polysense.towers.decoding import Beam
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_


def named(name: str) -> str:
    """torch's name of one of our weights of a body."""
    for ours, theirs in (("blocks.", "layers."), ("attn.out", "self_attn.out_proj"), ("cross.out", "multihead_attn.out_proj"), ("mlp.up", "linear1"),
                         ("mlp.down", "linear2")):
        name = name.replace(ours, theirs)
    return name


@torch.no_grad()
def test_bodies_are_torchs():
    torch.manual_seed(0)
    config = transformer.net(60, 40, 32, 3, 4, 48, 0.1)
    ours = shake(config.build()).language
    make = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "batch_first": True, "norm_first": False}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**make), 3, norm=None, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**make), 3, norm=None)
    theirs = nn.Transformer(custom_encoder=encoder, custom_decoder=decoder, d_model=32, nhead=4, batch_first=True)
    for half, body in (("encoder", ours.encoder), ("decoder", ours.decoder)):
        state, out, reads = body.state_dict(), {}, half == "decoder"
        norms = {"norm1": "norm1", "norm2": "norm3" if reads else "norm2", **({"norm_cross": "norm2"} if reads else {})}
        kinds = {"attn": "self_attn", **({"cross": "multihead_attn"} if reads else {})}
        for i, p in ((i, p) for i in range(3) for p in ("weight", "bias")):
            block = f"blocks.{i}"
            out |= {f"layers.{i}.{b}.{p}": state[f"{block}.{a}.{p}"] for a, b in norms.items()}
            out |= {f"layers.{i}.{b}.in_proj_{p}": torch.cat([state[f"{block}.{a}.{o}.{p}"] for o in "qkv"]) for a, b in kinds.items()}
        out |= {named(k): v for k, v in state.items() if k.endswith((".out.weight", ".out.bias")) or ".mlp." in k}
        getattr(theirs, half).load_state_dict(out)
    theirs.eval()
    text, other = torch.randint(3, 60, (3, 12)), torch.randint(3, 60, (3, 9))
    text[1, 8:], other[2, 6:] = 0, 0
    x, y = ours.words(text), ours.words(other)
    memory = theirs.encoder(x, src_key_padding_mask=text == 0)
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    hidden = theirs.decoder(y, memory, tgt_mask=later, memory_key_padding_mask=text == 0, tgt_key_padding_mask=other == 0)
    seen = ours(text)
    real, said = text != 0, other != 0
    got = {"memory": seen.tokens[real], "hidden": ours.decode(other, seen.tokens, seen.mask)[said]}
    assert_agree(got, {"memory": memory[real], "hidden": hidden[said]})


SIZES = {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 2,
         "encoder_ffn_dim": 40, "decoder_ffn_dim": 48, "max_position_embeddings": 30, "pad_token_id": 60, "decoder_start_token_id": 60,
         "eos_token_id": 0, "forced_eos_token_id": None, "activation_function": "swish", "scale_embedding": True, "dropout": 0.1}


def marian():
    hf = reference("transformers")
    torch.manual_seed(0)
    model = hf.MarianMTModel(hf.MarianConfig(**SIZES))
    places = {k: v.clone() for k, v in model.state_dict().items() if "embed_positions" in k}
    shake(model)
    model.load_state_dict(places, strict=False)
    model.tie_weights()
    return hf, model


@torch.no_grad()
def test_marian_in_and_out(tmp_path):
    hf, model = marian()
    model.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", transformer.weights["marian"], lambda name: preset_of("transformer", name))
    text, other = torch.randint(1, 60, (3, 12)), torch.randint(1, 60, (3, 9))
    text[1, 8:] = 60
    begun = torch.cat([torch.full((3, 1), 60), other], 1)
    label = torch.cat([other, torch.full((3, 1), -100)], 1)
    out = model(text, attention_mask=text != 60, decoder_input_ids=begun, labels=label)
    seen = ours.language(text)
    logits = ours.language.logits(ours.language.decode(begun, seen.tokens, seen.mask))
    ours.smoothing = 0.0
    assert_agree({"memory": seen.tokens[text != 60], "logits": logits, "loss": ours.losses({"question": text, "answer": begun})["language"]},
            {"memory": out.encoder_last_hidden_state[text != 60], "logits": out.logits, "loss": out.loss})
    export(ours.state_dict(), preset.config, transformer.weights["marian"], tmp_path / "back", preset.feed)
    again = hf.MarianMTModel.from_pretrained(tmp_path / "back").eval()
    assert_agree({"logits": again(text, attention_mask=text != 60, decoder_input_ids=begun).logits}, {"logits": out.logits})
    in_memory = transformer.weights["marian"].keymap(preset.config).load(model.state_dict())
    assert {k: v.shape for k, v in in_memory.items()} == {k: v.shape for k, v in ours.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 4])
def test_marian_writes_the_same(tmp_path, beams):
    _, model = marian()
    model.save_pretrained(tmp_path)
    ours, _ = import_(tmp_path, transformer.weights["marian"], lambda name: preset_of("transformer", name))
    text = torch.randint(1, 60, (4, 12))
    text[2, 7:] = 60
    want = model.generate(text, attention_mask=text != 60, max_new_tokens=14, num_beams=beams, do_sample=False, length_penalty=0.6,
                          early_stopping=False, use_cache=False, bad_words_ids=None, forced_eos_token_id=None)[:, 1:]
    got = ours.translate_text(text, max_new=14, how=Beam.Config(beams=beams, length_penalty=0.6))
    over = (want == 0).int().cumsum(1) - (want == 0).int() > 0
    want = want.masked_fill(over, 60)
    assert torch.equal(got, want[:, :got.shape[1]]) and bool((want[:, got.shape[1]:] == 60).all())


def test_published_shapes():
    hf = reference("transformers")
    config = hf.MarianConfig(vocab_size=58101, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8,
                             encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=512, pad_token_id=58100,
                             decoder_start_token_id=58100, eos_token_id=0, activation_function="swish", scale_embedding=True)
    plan, layout = preset_of("transformer", "marian"), transformer.weights["marian"]
    with torch.device("meta"):
        state, ours = hf.MarianMTModel(config).state_dict(), plan.config.build().state_dict()
    assert {k: v.shape for k, v in layout.keymap(plan.config).load(state).items()} == {k: v.shape for k, v in ours.items()}
    assert plan.but(**layout.read(config.to_dict(), state)[1]).config == plan.config
    assert plan.but(**layout.read(layout.write(plan.config), state)[1]).config == plan.config


def test_what_marian_is_not_is_refused():
    layout = transformer.weights["marian"]
    with pytest.raises(UserError, match="preset `marian`"):
        layout.write(preset_of("transformer", "paper").config)
    with pytest.raises(UserError, match="opus-mt"):
        layout.read({"scale_embedding": False}, {})
