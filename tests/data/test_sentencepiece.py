"""SentencePiece files against the library that writes them: the same pieces for the same texts, ids as XLM-R and T5 count them."""
import io
from pathlib import Path

import pytest
import torch

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
