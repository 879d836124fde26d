"""LLaMA and OPT against transformers: logits, loss, generated ids; equal random weights, toy sizes, through the published layouts, both ways."""
import pytest
import torch
from reference import reference, shake

from polysense.base.errors import UserError
from polysense.objectives.language import IGNORE, next_token
from polysense.towers.causal_lm import llama, opt
from polysense.towers.decoding import Beam
from polysense.weights import llama_hf, opt_hf
from polysense.weights.keymap import load_into

LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 61, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
       "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, llama_hf, llama(vocab=9, length=9, width=8, depth=1, heads=1, hidden=8)),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, opt_hf, opt(vocab=9, length=9, width=8, depth=1, heads=1))}


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request):
    """(ours, theirs, table, config of ours)."""
    transformers = reference("transformers")
    torch.manual_seed(0)
    cls, config, sizes, table, seed = FAMILIES[request.param]
    theirs = shake(getattr(transformers, cls)(getattr(transformers, config)(**sizes)))
    theirs.generation_config.eos_token_id = 2
    found = table.sizes(theirs.config.to_dict(), "config")
    ours_config = seed.but(**{k.removeprefix("config."): v for k, v in found.items()})
    ours = ours_config.build()
    load_into(ours, table.keymap(ours_config), dict(theirs.state_dict()))
    return ours.eval(), theirs, table, ours_config


@pytest.fixture()
def prompt():
    g = torch.Generator().manual_seed(3)
    text, mask = torch.randint(3, 61, (3, 9), generator=g), torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = mask[2, :2] = False                                       # padded on the left, as generation wants it
    return text.masked_fill(~mask, 0), mask


@torch.no_grad()
def test_logits_and_loss(pair, prompt):
    ours, theirs, *_ = pair
    text, mask = prompt
    label = text.masked_fill(mask.cumsum(1) < 2, IGNORE)                    # nothing real stands before the first token of a text
    want, got = theirs(input_ids=text, attention_mask=mask.long(), labels=label), ours.logits(ours(text, mask).tokens)
    assert (got - want.logits)[mask].abs().max() <= 1e-4
    assert abs(next_token(got, label) - want.loss) <= 1e-4
    plain = theirs(input_ids=text[:1]).logits
    assert (ours.logits(ours(text[:1]).tokens) - plain).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(pair, prompt, beams):
    ours, theirs, *_ = pair
    text, mask = prompt
    want = theirs.generate(input_ids=text, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, num_beams=beams)[:, 9:]
    how = Beam.Config(beams=beams) if beams > 1 else None
    got = ours.generate(ours.embed(text), mask, max_new=12, end=2, how=how)
    assert got.tolist() == want.tolist()


def test_both_ways(pair):
    ours, theirs, table, config = pair
    back = table.keymap(config).save(dict(ours.state_dict()))
    for name, value in back.items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert set(theirs.state_dict()) - set(back) <= {"lm_head.weight"}
    written, read = table.write(config), theirs.config.to_dict()
    assert all(read.get(k, v) == v for k, v in written.items() if k not in ("architectures", "dtype", "rope_theta"))
    assert config.but(**{k.removeprefix("x."): v for k, v in table.sizes(written, "x").items()}) == config


def test_metas_own_files_have_neighbouring_rotary_pairs():
    config = llama(vocab=20, length=16, width=16, depth=1, heads=2, hidden=8, kv_heads=1)
    lm = config.build()
    theirs = llama_hf.meta(config).save(dict(lm.state_dict()))
    w, ours = theirs["layers.0.attention.wq.weight"], lm.body.blocks[0].attn.q.weight
    assert torch.equal(w[0], ours[0]) and torch.equal(w[1], ours[4]) and torch.equal(w[2], ours[1]) and torch.equal(w[8], ours[8])
    twin = config.build()
    load_into(twin, llama_hf.meta(config), theirs)
    assert all(torch.equal(a, b) for a, b in zip(lm.state_dict().values(), twin.state_dict().values(), strict=True))


def test_what_the_families_have_not_is_refused():
    with pytest.raises(UserError, match="rotary"):
        llama_hf.sizes({"rope_scaling": {"type": "linear", "factor": 2.0}}, "x")
    with pytest.raises(UserError, match="OPT-350M"):
        opt_hf.sizes({"hidden_size": 1024, "word_embed_proj_dim": 512}, "x")
    with pytest.raises(UserError, match="LLaMA family"):
        llama_hf.write(opt(vocab=9, length=9, width=8, depth=1, heads=1))
    with pytest.raises(UserError, match="OPT family"):
        opt_hf.write(llama(vocab=9, length=9, width=8, depth=1, heads=1, hidden=8))
