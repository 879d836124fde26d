"""SentencePiece vocabularies (Kudo and Richardson 2018) as `tokenizers` engines: the files that BEiT-3, XLM-R, T5 and Marian were published with."""
from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Engine

from polysense.base.errors import UserError
from polysense.data.tokenizer import FOREIGN

NAMES = ("*.spm", "sentencepiece.bpe.model", "spiece.model", "*.model")
NORMAL, UNKNOWN, CONTROL, ADDED, UNUSED, BYTE = range(1, 7)
UNIGRAM = 1
MARK = "▁"                                   # stands for a space
LAST = 10.0                                  # how much less likely a letter is that no piece holds
LANGUAGE = re.compile(r">>.+<<")              # which one to translate into


@dataclass(frozen=True)
class Pieces:
    """What a file says: every piece with its logarithmic probability and its type, and how texts are normalised."""
    pieces: tuple[tuple[str, float, int], ...]
    charsmap: bytes
    prefix: bool                             # a space is put before every text
    squeezed: bool                           # runs of spaces are one, those at the ends none


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message in protobuf's wire format. IndexError, ValueError where it is cut off or none."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        if key & 7 not in (1, 2, 5):
            raise ValueError(f"wire type {key & 7}")
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        if at + size > len(data):
            raise ValueError("cut off")
        yield key >> 3, data[at:at + size]
        at += size


def read_pieces(path: Path) -> Pieces:
    """Raises UserError for a file that is no whole SentencePiece model, or one that does not choose by probability (unigram)."""
    pieces, kind, charsmap, prefix, squeezed = list[tuple[str, float, int]](), UNIGRAM, b"", True, True
    try:
        for number, value in fields(path.read_bytes()):
            if number == 1:
                piece = dict(fields(bytes(value)))  # type: ignore[arg-type]
                score, = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))  # type: ignore[arg-type]
                pieces.append((bytes(piece[1]).decode(), score, int(piece.get(3, NORMAL))))  # type: ignore[arg-type]
            elif number == 2:
                kind = int(dict(fields(bytes(value))).get(3, UNIGRAM))  # type: ignore[arg-type]
            elif number == 3:
                norm = dict(fields(bytes(value)))  # type: ignore[arg-type]
                charsmap, prefix, squeezed = bytes(norm.get(2, b"")), bool(norm.get(3, 1)), bool(norm.get(4, 1))  # type: ignore[arg-type]
    except (OSError, ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{path} is not a SentencePiece model", "the file is damaged or of another kind") from error
    if len(pieces) < 4:
        raise UserError(f"{path} is not a SentencePiece model", "it holds no pieces")
    if kind != UNIGRAM:
        raise UserError(f"{path} merges pairs, and only models that choose by probability (unigram) are read from this form",
                        "put the tokenizer.json of the same model beside it")
    return Pieces(tuple(pieces), charsmap, prefix, squeezed)


def engine_of(found: Pieces, vocab: list[tuple[str, float]], unknown: int) -> Engine:
    """An engine over `vocab` (piece, score), in the order of its ids, that cuts texts as SentencePiece does."""
    bytes_too = any(kind == BYTE for _, _, kind in found.pieces)
    engine = Engine(models.Unigram(vocab, unknown, bytes_too))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(found.charsmap)] if found.charsmap else []
    if found.squeezed:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")]
    steps += [normalizers.Prepend(MARK)] if found.prefix else []
    engine.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", MARK)])
    engine.decoder = decoders.Metaspace(MARK, "always" if found.prefix else "never")
    return engine


def find(folder: Path) -> Path | None:
    """The SentencePiece file of a folder."""
    return next((p for name in NAMES for p in sorted(folder.glob(name))), None)


def xlm_roberta(path: Path) -> Engine:
    """Ids as XLM-R counts them (and BEiT-3): <s> <pad> </s> <unk>, the pieces behind the file's own three, and <mask>."""
    found = read_pieces(path)
    if [kind for *_, kind in found.pieces[:3]] != [UNKNOWN, CONTROL, CONTROL]:
        raise UserError(f"{path} does not begin with <unk> <s> </s>", "it is no vocabulary of XLM-R's kind")
    special: list[tuple[str, float]] = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    return engine_of(found, [*special, *((p, s) for p, s, _ in found.pieces[3:]), ("<mask>", 0.0)], 3)


def t5(path: Path, extra: int = 100) -> Engine:
    """Ids as in the file (<pad> </s> <unk> first), then <extra_id_99> to <extra_id_0>."""
    found = read_pieces(path)
    names = [p for p, *_ in found.pieces[:3]]
    if names != ["<pad>", "</s>", "<unk>"]:
        raise UserError(f"{path} begins with {' '.join(names)}", "a vocabulary of T5 begins with <pad> </s> <unk>")
    return engine_of(found, [*((p, s) for p, s, _ in found.pieces), *((f"<extra_id_{i}>", 0.0) for i in reversed(range(extra)))], 2)


def marian(folder: Path) -> Engine:
    """Marian's: ids are those of `vocab.json`, texts are cut by the pieces of `source.spm`, and what only the other language has is written alone.
    Its letters are the exception: one that the first language lacks is read as what it is, as in transformers."""
    source, table = folder / "source.spm", folder / "vocab.json"
    if not source.is_file() or not table.is_file():
        raise UserError(f"no marian vocabulary in {folder}", "it should hold tokenizer.json, or source.spm with vocab.json")
    found = read_pieces(source)
    try:
        vocab: dict[str, int] = json.loads(table.read_text(encoding="utf-8"))
        names = sorted(vocab, key=vocab.__getitem__)
        unknown = vocab["<unk>"]
        assert [vocab[n] for n in names] == list(range(len(names)))
    except (ValueError, KeyError, AttributeError, AssertionError, TypeError) as error:
        raise UserError(f"{table} is not a vocabulary", "it should give every piece its number, <unk> among them") from error
    score = {p: s for p, s, kind in found.pieces if kind not in (UNKNOWN, CONTROL, UNUSED)}
    least = min(score.values())
    plain = {n for n in names if n in score or len(n) == 1 or n in ("</s>", "<unk>", "<pad>") or LANGUAGE.fullmatch(n)}
    engine = engine_of(found, [(n if n in plain else FOREIGN + n, score.get(n, least - LAST)) for n in names], unknown)
    engine.normalizer = normalizers.Sequence([normalizers.Replace(FOREIGN, ""), engine.normalizer])
    engine.decoder = decoders.Sequence([decoders.Replace(FOREIGN, ""), decoders.Metaspace(MARK, "always")])
    engine.add_special_tokens([AddedToken(n, normalized=False) for n in names if LANGUAGE.fullmatch(n)])
    return engine
