"""Tokenisers: ids, cleaning, round trips, determinism, and equality with CLIP's and BERT's."""
import gzip
import hashlib
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference

from polysense.base.errors import UserError
from polysense.base.plan import TextPlan
from polysense.data.tokenizer import BPE_SPECIALS, LETTERS, clean, load_tokenizer, make_tokenizer

CAPTIONS = ["a photo of two dogs on the grass", "a black cat sits on a red chair", "two dogs and a cat",
            "the dog's bowl isn't here, it's 2 metres away!", "一只猫坐在桌子上", "一只狗在草地上", "naïve café"] * 3
BPE = TextPlan(vocab=400, length=12)
PIECES = TextPlan(kind="wordpiece", vocab=400, length=12)
PLANS = pytest.mark.parametrize("plan", [BPE, PIECES], ids=["bpe", "wordpiece"])


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    """A folder with OpenAI's vocabulary, as open_clip ships it."""
    found = importlib.util.find_spec("open_clip")
    if not found or not found.origin:
        pytest.skip("open_clip is not installed")
    folder = tmp_path_factory.mktemp("openai")
    shutil.copy(Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz", folder)
    return folder


def test_special_ids_and_shape():
    t, w = make_tokenizer(BPE, CAPTIONS), make_tokenizer(PIECES, CAPTIONS)
    assert [t.token(i) for i in range(4)] == list(BPE_SPECIALS) and (t.start, t.end, t.pad, t.unknown) == (1, 2, 2, 3)
    assert [w.token(i) for i in range(5)] == ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"] and (w.start, w.end, w.pad, w.unknown) == (1, 2, 0, 3)
    assert make_tokenizer(BPE.but(pad="zero"), CAPTIONS).pad == 0
    for tok in (t, w):
        ids, mask = tok.encode(["a dog", "two dogs on the grass and a cat on the red chair and more and more and more"])
        assert ids.dtype == torch.int64 and ids.shape == mask.shape == (2, 12) and mask.dtype == torch.bool
        assert (ids[:, 0] == 1).all() and ids[1, -1] == 2 and mask[1].all() and (ids[0][~mask[0]] == tok.pad).all()
        n = int(mask[0].sum())
        assert 4 <= n < 12 and tok("a dog").shape == (1, n) and tok("a dog", trim=False).shape == (1, 12) and tok([]).shape == (0, 0)
        assert torch.equal(tok("a dog")[0], ids[0, :n]), "trimming changes nothing but padding"


@PLANS
def test_decode_gives_the_words_back(plan):
    t = make_tokenizer(plan.but(length=30), CAPTIONS)
    for text in ("two dogs on a red chair", "一只猫" if plan.kind == "bpe" else "cat"):
        assert t.decode(t(text)[0]) == text and t.decode(t([text, "a black cat sits on the grass"])[0].tolist()) == text


@PLANS
@settings(max_examples=25, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_stays_within_the_vocabulary_and_has_spans_inside_it(plan, text):
    t = _made(plan)
    ids = t(text)[0]
    assert ids[0] == t.start and ids[-1] == t.end and len(ids) <= plan.length and int(ids.max()) < t.vocab <= plan.vocab
    spans = t.spans(text)
    assert len(spans) == len(ids) and all(0 <= a <= b <= len(text) for a, b in spans) and spans[0] == spans[-1] == (0, 0)


_cache: dict = {}


def _made(plan):
    return _cache.setdefault(plan.kind, make_tokenizer(plan, CAPTIONS))


@PLANS
def test_spans_name_the_words(plan):
    t, text = _made(plan), "A  black cat &amp;  Two dogs"
    said = ["".join(text[a:b]) for a, b in t.spans(text)]
    assert "".join(said).replace("&amp;", "&").lower() == "ablackcat&twodogs"
    at = [k for k, (a, b) in enumerate(t.spans(text)) if text[a:b] == "cat"]
    assert at and t.token(int(t(text)[0][at[0]])).removesuffix("</w>") == "cat"


@PLANS
@pytest.mark.parametrize("vocab", [60, 100, 1000])
def test_vocabulary_is_an_upper_bound(plan, vocab):
    t = make_tokenizer(plan.but(vocab=vocab), CAPTIONS)
    assert t.vocab <= vocab and int(t(CAPTIONS).max()) < t.vocab
    if vocab == 60:
        assert (t("龘 q") == t.unknown).any() and not (t("dogs on grass") == t.unknown).any()


DIGEST = """
import sys, hashlib, json
from polysense.base.plan import TextPlan
from polysense.data.tokenizer import make_tokenizer
captions = json.loads(sys.stdin.read())
made = [make_tokenizer(TextPlan(kind=k, vocab=300, length=12), captions).engine.to_str() for k in ("bpe", "wordpiece")]
print(hashlib.sha256("".join(made).encode()).hexdigest())
"""


def test_training_is_deterministic_across_processes_and_orders():
    out = subprocess.run([sys.executable, "-c", DIGEST], input=json.dumps(CAPTIONS[::-1]), capture_output=True, text=True, check=True).stdout
    made = [make_tokenizer(TextPlan(kind=k, vocab=300, length=12), CAPTIONS).engine.to_str() for k in ("bpe", "wordpiece")]
    assert out.strip() == hashlib.sha256("".join(made).encode()).hexdigest()


@PLANS
def test_saved_tokenizer_is_the_same(plan, tmp_path):
    t = make_tokenizer(plan, CAPTIONS)
    t.save(tmp_path)
    again = load_tokenizer(tmp_path, plan)
    assert torch.equal(again(CAPTIONS), t(CAPTIONS)) and (again.start, again.end, again.pad, again.unknown) == (t.start, t.end, t.pad, t.unknown)
    assert torch.equal(pickle.loads(pickle.dumps(t))(CAPTIONS), t(CAPTIONS))
    with pytest.raises(UserError, match="the preset reads text as"):
        load_tokenizer(tmp_path, PIECES if plan is BPE else BPE)
    with pytest.raises(UserError, match=r"feed\.text\.vocab"):
        load_tokenizer(tmp_path, plan.but(vocab=50))


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"should hold tokenizer.json or vocab.json with merges.txt"):
        load_tokenizer(tmp_path, BPE)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer file"):
        load_tokenizer(tmp_path, BPE)
    for bad, why in (((BPE, []), "no captions"), ((BPE.but(vocab=20), CAPTIONS), "too small"),
                     ((BPE.but(kind="sentencepiece"), CAPTIONS), "bpe or wordpiece")):
        with pytest.raises(UserError, match=why):
            make_tokenizer(*bad)


def test_entities_are_resolved_twice():
    assert clean("a &amp;amp; b &lt;i&gt;") == "a & b <i>" and clean("R&B") == "R&B"


TEXTS = ["A photo of a cat!!", "it's 2024, isn't it? &amp; so", "  multiple   spaces\t\n here", "一只猫坐在桌子上", "naïve café", "", "😀😀 emoji",
         "a" * 300, "don't 'S i'LL", "x<y>z [a] {b} #1 @me 3.14", "word " * 90]


def test_equals_open_clip(openai):
    reference("open_clip")
    theirs = importlib.import_module("open_clip.tokenizer").SimpleTokenizer(clean="lower")
    ours = load_tokenizer(openai, TextPlan(vocab=49408, length=77, pad="zero"))
    assert (ours.vocab, ours.start, ours.end) == (49408, 49406, 49407) and torch.equal(ours(TEXTS, trim=False), theirs(TEXTS))

    @settings(max_examples=40, deadline=None)
    @given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
    def agrees(text):
        assert torch.equal(ours(text, trim=False), theirs(text)), text

    agrees()


def test_equals_transformers_clip_in_both_published_layouts(openai, tmp_path):
    transformers = reference("transformers")
    lines = gzip.decompress(next(openai.glob("*.gz")).read_bytes()).decode().split("\n")[1:48895]
    letters = sorted(LETTERS)
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(line.split()) for line in lines), BPE_SPECIALS[1], BPE_SPECIALS[2]]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    plan = TextPlan(vocab=49408, length=77)
    texts = [t for t in TEXTS if "&" not in t]
    want = theirs(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    for folder in (tmp_path, tmp_path / "fast"):
        if folder.name == "fast":
            theirs.save_pretrained(folder)
            (folder / "vocab.json").unlink(missing_ok=True)
            assert (folder / "tokenizer.json").exists()
        ids, mask = load_tokenizer(folder, plan).encode(texts)
        assert torch.equal(ids, want["input_ids"]) and torch.equal(mask, want["attention_mask"].bool())


def test_equals_transformers_bert(tmp_path):
    transformers = reference("transformers")
    make_tokenizer(PIECES, CAPTIONS).save(tmp_path / "ours")
    vocab = json.loads((tmp_path / "ours" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n", encoding="utf-8")
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    texts = ["A Photo of two dogs!", "the dog's bowl", "一只猫", "naïve CAFÉ", "unseen zzzz words", "[brackets] and-dashes"]
    want = theirs(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
    assert torch.equal(load_tokenizer(tmp_path, PIECES)(texts), want) and torch.equal(load_tokenizer(tmp_path / "ours", PIECES)(texts), want)


def test_equals_transformers_t5(tmp_path):
    transformers = reference("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("▁photo", -5.0), ("▁of", -4.0), ("▁two", -6.0),
              ("▁dogs", -7.0), *((c, -9.0) for c in "abcdefghilmnoprstuwx")]
    engine = Tokenizer(models.Unigram(pieces, unk_id=2))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, TextPlan(kind="t5", vocab=100, length=12))
    for text in ("a photo of two dogs", "the cats"):
        assert ours([text])[0].tolist() == [0, *fast(text, add_special_tokens=False).input_ids, 1], "padding for a start, then theirs and an end"
    assert ours.decode(ours(["a photo of two dogs"])[0]) == "a photo of two dogs" and (ours.start, ours.end, ours.pad) == (0, 1, 0)
    with pytest.raises(UserError, match="read from its published files"):
        make_tokenizer(TextPlan(kind="t5", vocab=100, length=12), CAPTIONS)
