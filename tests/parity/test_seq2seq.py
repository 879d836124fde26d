"""T5 and FlanT5 against transformers: states, logits, loss, generated ids; equal random weights, toy sizes, through the published layout."""
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from torch import nn

from polysense.base.errors import UserError
from polysense.nn.distance import bucket
from polysense.objectives.language import next_token
from polysense.towers.decoding import Beam
from polysense.towers.seq2seq import flan_t5, t5
from polysense.weights import t5_hf
from polysense.weights.keymap import load_into

SIZES = {"vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0, "dropout_rate": 0.0}
FAMILIES = {"t5": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
            "flan": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}}


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request):
    """(ours, theirs, our configuration)."""
    hf = reference("transformers")
    torch.manual_seed(0)
    theirs = hf.T5ForConditionalGeneration(hf.T5Config(**SIZES, **FAMILIES[request.param]))
    if request.param == "flan":
        theirs.lm_head.weight = nn.Parameter(torch.randn(61, 32) * 0.3)                    # published files hold a head of their own
        found = t5_hf.sizes({**theirs.config.to_dict(), "tie_word_embeddings": False}, "config")
        config = flan_t5(vocab=9, width=8, depth=1, heads=1, hidden=8).but(**{k.removeprefix("config."): v for k, v in found.items()})
    else:
        base = t5(vocab=61, width=32, depth=2, heads=4, hidden=40, head_width=6)
        config = base.but(buckets=8, furthest=12, **{"decoder.depth": 3})
    shake(theirs)
    ours = config.build()
    load_into(ours, t5_hf.keymap(config), dict(theirs.state_dict()))
    return ours.eval(), theirs, config


@pytest.fixture()
def texts():
    g = torch.Generator().manual_seed(3)
    text, reply, mask = torch.randint(3, 61, (3, 30), generator=g), torch.randint(3, 61, (3, 19), generator=g), torch.ones(3, 30, dtype=torch.bool)
    mask[1, :6] = mask[2, 22:] = False
    learned = torch.ones_like(reply, dtype=torch.bool)
    learned[0, 12:] = False
    return text.masked_fill(~mask, 0), mask, reply, learned


@torch.no_grad()
def test_states_logits_and_loss(pair, texts):
    ours, theirs, _ = pair
    text, mask, reply, learned = texts
    label = reply.masked_fill(~learned, -100)
    begun = torch.cat([torch.zeros_like(reply[:, :1]), reply[:, :-1]], 1)
    want = theirs(input_ids=text, attention_mask=mask.long(), decoder_input_ids=begun, labels=label)
    source = ours(text, mask).tokens
    assert (source - want.encoder_last_hidden_state)[mask].abs().max() <= 1e-4
    logits = ours.logits(ours.decode(begun, source, mask))
    assert (logits - want.logits).abs().max() <= 1e-4 * want.logits.abs().max().clamp(min=1)
    whole = ours.predict(reply, ours.embed(text), mask)
    assert (whole[:, :-1] - logits).abs().max() <= 1e-5
    assert abs(next_token(whole, F.pad(label, (1, 0), value=-100)) - want.loss) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(pair, texts, beams):
    ours, theirs, _ = pair
    text, mask, *_ = texts
    want = theirs.generate(input_ids=text, attention_mask=mask.long(), max_new_tokens=16, num_beams=beams, do_sample=False, eos_token_id=1,
                           length_penalty=1.0, early_stopping=False, use_cache=False)[:, 1:]
    how = Beam.Config(beams=beams) if beams > 1 else None
    got = ours.generate(ours.embed(text), mask, max_new=16, end=1, how=how)
    over = (want == 1).int().cumsum(1) - (want == 1).int() > 0                             # what stands behind an end is padding, however written
    want = want.masked_fill(over, 0)
    assert torch.equal(got, want[:, :got.shape[1]]) and not want[:, got.shape[1]:].any()


@pytest.mark.parametrize("ways", ["both", "back"])
@pytest.mark.parametrize("buckets, furthest", [(32, 128), (8, 12), (16, 40)])
def test_buckets(ways, buckets, furthest):
    reference("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention
    ahead = torch.arange(-200, 201)
    want = T5Attention._relative_position_bucket(ahead, bidirectional=ways == "both", num_buckets=buckets, max_distance=furthest)
    assert torch.equal(bucket(ahead, buckets, furthest, ways), want)


def test_saved_it_is_the_published_state(pair):
    ours, theirs, config = pair
    back = t5_hf.keymap(config).save(ours.state_dict())
    state = dict(theirs.state_dict())
    assert set(back) == {k for k in state if "embed_tokens" not in k and (k != "lm_head.weight" or config.head is not None)}
    assert all(torch.equal(v, state[k]) for k, v in back.items())
    again = t5_hf.write(config)
    assert again["d_kv"] == 6 and again["num_decoder_layers"] == 3 and again["tie_word_embeddings"] is (config.head is None)
    if config.head is not None:
        assert t5_hf.sizes(again, "c") == t5_hf.sizes({**theirs.config.to_dict(), "tie_word_embeddings": False}, "c")


def test_what_is_not_of_the_family_is_refused(pair):
    *_, config = pair
    with pytest.raises(UserError, match="FlanT5"):
        t5_hf.sizes({"feed_forward_proj": "relu"}, "c")
    with pytest.raises(UserError, match="two halves"):
        t5_hf.write(config.but(**{"encoder.heads": 2}))
