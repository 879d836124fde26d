"""SentencePiece files against the library that writes them: the same pieces for the same texts, ids as XLM-R and T5 count them."""
import io
import json
from pathlib import Path

import pytest
import torch
from reference import reference

import polysense
from polysense.base.errors import UserError
from polysense.base.plan import TextPlan
from polysense.data.sentencepiece import fields, read_pieces
from polysense.data.tokenizer import load_tokenizer

spm = pytest.importorskip("sentencepiece")
LINES = [line for name in ("README.md", "docs/design.md") for line in (Path(__file__).parents[2] / name).read_text(encoding="utf-8").splitlines()
         if line.strip()]
HARD = ["a photo of a cat", "  two   spaces ", "\u00dcn\u00efcode \u00e9 \ufb01 \u2460 \u4f60\u597d", "tab\there\nnew", "", "x", "A.B,C!  ?",
        "e\u0301", "\U0001f642 smile", "\u2581mark", "\u3000wide"]


def trained(path: Path, **options) -> "spm.SentencePieceProcessor":
    buffer = io.BytesIO()
    options = {"vocab_size": 500, "model_type": "unigram", "character_coverage": 0.999, "minloglevel": 2} | options
    spm.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=buffer, **options)
    path.write_bytes(buffer.getvalue())
    return spm.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("options", [
    {}, {"normalization_rule_name": "identity"}, {"add_dummy_prefix": False}, {"byte_fallback": True, "vocab_size": 700},
    {"remove_extra_whitespaces": False}], ids=["as published", "identity", "no prefix", "bytes", "spaces kept"])
def test_the_pieces_are_those_of_the_library(tmp_path, options):
    theirs = trained(tmp_path / "beit3.spm", **options)
    ours = load_tokenizer(tmp_path, TextPlan(kind="roberta", vocab=1000, length=512))
    for text in HARD + LINES:
        want = [3 if i == 0 else i + 1 for i in theirs.encode(text)]
        assert ours.engine.encode(text, add_special_tokens=False).ids == want, text
    assert ours.vocab == theirs.vocab_size() + 2 and (ours.start, ours.pad, ours.end, ours.unknown) == (0, 1, 2, 3)
    assert ours.engine.token_to_id("<mask>") == theirs.vocab_size() + 1


def test_batches_and_back(tmp_path):
    trained(tmp_path / "beit3.spm")
    ours = load_tokenizer(tmp_path, TextPlan(kind="roberta", vocab=1000, length=12))
    ids = ours(["a picture", "many pictures and words that do not fit into twelve"])
    assert ids.shape == (2, 12) and ids[:, 0].tolist() == [0, 0] and ids[1, -1] == 2 and ids[0, -1] == 1
    assert ours.decode(ids[0]) == "a picture"
    ours.save(tmp_path / "kept")
    again = load_tokenizer(tmp_path / "kept", TextPlan(kind="roberta", vocab=1000, length=12))
    assert torch.equal(again(LINES[:20]), ours(LINES[:20]))


def test_t5_counts_as_its_file_does_and_adds_its_blanks(tmp_path):
    theirs = trained(tmp_path / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    ours = load_tokenizer(tmp_path, TextPlan(kind="t5", vocab=1000, length=512))
    for text in LINES:
        assert ours.engine.encode(text, add_special_tokens=False).ids == theirs.encode(text)
    assert ours.vocab == theirs.vocab_size() + 100 and ours.engine.token_to_id("<extra_id_0>") == ours.vocab - 1 and (ours.end, ours.pad) == (1, 0)
    trained(tmp_path / "spiece.model")
    with pytest.raises(UserError, match="begins with <unk>"):
        load_tokenizer(tmp_path, TextPlan(kind="t5", vocab=1000, length=512))


@pytest.fixture()
def opus(tmp_path):
    """A folder of Marian's two vocabularies, and the library's processor of the first."""
    theirs = trained(tmp_path / "source.spm", user_defined_symbols=["<user>"])
    buffer = io.BytesIO()
    loud = [line.upper().replace("E", "\u00c9") for line in LINES]
    spm.SentencePieceTrainer.train(sentence_iterator=iter(loud), model_writer=buffer, vocab_size=400, character_coverage=1.0, minloglevel=2)
    target = spm.SentencePieceProcessor(model_proto=buffer.getvalue())
    pieces = [p.id_to_piece(i) for p in (theirs, target) for i in range(3, p.vocab_size())]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(["</s>", "<unk>", *pieces, ">>fra<<", "<pad>"]))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return tmp_path, theirs, target, vocab


def test_marian_reads_one_language_and_writes_the_other(opus):
    folder, theirs, target, vocab = opus
    ours = load_tokenizer(folder, TextPlan(kind="marian", vocab=2000, length=512))
    seen = 0
    for text in LINES:
        pieces = theirs.encode(text, out_type=str)
        if any(len(p) > 1 and theirs.piece_to_id(p) == 0 for p in pieces):
            continue                         # several unknown letters are one unknown piece there, and several here
        assert ours(text)[0].tolist() == [*(vocab.get(p, 1) for p in pieces), 0], text
        seen += 1
    assert seen > 100
    assert (ours.end, ours.pad, ours.unknown) == (0, len(vocab) - 1, 1)
    for line in LINES[:20]:
        said = " ".join(line.upper().replace("E", "\u00c9").split())
        ids = [vocab[p] for p in target.encode(said, out_type=str) if p in vocab]
        assert ours.decode([*ids, 0, ours.pad]) == target.decode(target.encode(said))
    known = {theirs.id_to_piece(i) for i in range(theirs.vocab_size())}
    foreign = next(p for p in vocab if p not in known and len(p) == 3 and p.isalpha() and p.isupper())
    assert ours.token(vocab[foreign]) == foreign and vocab[foreign] not in ours(f"{foreign} {foreign}")[0].tolist(), "it is written, never read"
    assert ours(">>fra<< a picture")[0, 0] == vocab[">>fra<<"]
    ours.save(folder / "kept")
    again = load_tokenizer(folder / "kept", TextPlan(kind="marian", vocab=2000, length=512))
    assert torch.equal(again(LINES[:20]), ours(LINES[:20])) and again.decode([vocab[foreign]]) == foreign


def test_marian_translates_strings_from_its_published_folder(opus, tmp_path):
    folder, *_, vocab = opus
    hf = reference("transformers")
    config = hf.MarianConfig(vocab_size=len(vocab), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                             decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
                             pad_token_id=len(vocab) - 1, decoder_start_token_id=len(vocab) - 1, eos_token_id=0, forced_eos_token_id=None,
                             activation_function="swish", scale_embedding=True)
    model = hf.MarianMTModel(config).eval()
    model.save_pretrained(folder)
    pipeline = polysense.open(folder, system="transformer", layout="marian")
    said = pipeline.translate(["a picture of a cat", "words"], max_new=6, how="greedy")
    ids = pipeline.tokenizer(["a picture of a cat", "words"])
    how = hf.GenerationConfig(decoder_start_token_id=config.pad_token_id, eos_token_id=0, pad_token_id=config.pad_token_id, max_new_tokens=6)
    new = model.generate(ids, attention_mask=ids != config.pad_token_id, generation_config=how)
    assert said == [pipeline.tokenizer.decode(row) for row in new[:, 1:]] and any(said)
    answer = pipeline.tokenizer(["a cat", "two words"])
    assert pipeline.system.begun(answer)[:, 0].tolist() == [config.pad_token_id] * 2
    label = answer.masked_fill(answer == config.pad_token_id, -100)
    pipeline.system.smoothing = 0.0
    got = pipeline.system.losses({"question": ids, "answer": answer})["language"]
    want = model(ids, attention_mask=ids != config.pad_token_id, labels=label).loss
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"<unk>": 5}'])
def test_a_vocabulary_that_is_none_is_refused(opus, text):
    folder, *_ = opus
    (folder / "vocab.json").write_text(text)
    with pytest.raises(UserError, match="is not a vocabulary"):
        load_tokenizer(folder, TextPlan(kind="marian", vocab=2000, length=512))
    (folder / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"source\.spm with vocab\.json"):
        load_tokenizer(folder, TextPlan(kind="marian", vocab=2000, length=512))


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    plan = TextPlan(kind="roberta", vocab=1000, length=512)
    with pytest.raises(UserError, match="or a SentencePiece model"):
        load_tokenizer(tmp_path, plan)
    file = tmp_path / "beit3.spm"
    trained(file, model_type="bpe")
    with pytest.raises(UserError, match="merges pairs"):
        load_tokenizer(tmp_path, plan)
    with pytest.raises(UserError, match="it should hold"):
        load_tokenizer(tmp_path, TextPlan(kind="llama", vocab=1000, length=512))
    trained(file, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    with pytest.raises(UserError, match="does not begin with"):
        load_tokenizer(tmp_path, plan)
    trained(file)
    whole = file.read_bytes()
    for damaged in (b"", b"no model at all", whole[:len(whole) // 2 + 1], b"PK\x03\x04" + whole):
        file.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            read_pieces(file)
        assert "is not a SentencePiece model" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError):
        list(fields(b"\x0a\x05abc"))
