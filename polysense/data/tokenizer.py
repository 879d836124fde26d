"""Words to token ids and back: CLIP's lower-cased byte-level BPE and BERT's WordPiece, trained on captions or read from official files.

BPE: Sennrich et al. 2016 (arXiv 1508.07909) over bytes, as CLIP (arXiv 2103.00020) uses it: the last symbol of a word carries `</w>`.
WordPiece: as BERT (arXiv 1810.04805). The work is done by the `tokenizers` library; this module fixes ids, cleaning and padding.
"""
from __future__ import annotations

import gzip
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.plan import TextPlan

BPE_SPECIALS = ("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unknown|>")
WORDPIECE_SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
PUBLISHED = {"llama": ("<s>", "</s>", None, None), "t5": ("<pad>", "</s>", "<pad>", "<unk>"), "roberta": ("<s>", "</s>", "<pad>", "<unk>"),
             "marian": ("", "</s>", "<pad>", "<unk>")}       # kinds only read: start ("": none is written), end, padding, unknown
FOREIGN = "\ue000"                            # before pieces that are written, never read: a character of no language
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"        # CLIP's pattern: letters, single digits, runs of the rest
ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);")


def byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte: itself where printable, else the next free one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, free = {b: chr(b) for b in printable}, 256
    for b in range(256):
        if b not in letters:
            letters[b], free = chr(free), free + 1
    return [letters[b] for b in range(256)]


LETTERS = byte_letters()
BYTES = {letter: b for b, letter in enumerate(LETTERS)}


class Tokenizer:
    """`tokenizer(texts) -> int64 [B, L]`: start + tokens + end, cut to the plan's length (the end stays), padded, trimmed to the longest.

    `.vocab` number of ids; `.start .end .pad .unknown` their ids (`unknown` None where every text can be written).
    """

    def __init__(self, engine: Engine, plan: TextPlan, start: str, end: str, pad_token: str | None, unknown: str | None):
        self.engine, self.plan, self.vocab = engine, plan, engine.get_vocab_size(with_added_tokens=False)
        if self.vocab > plan.vocab:
            raise UserError(f"the tokenizer has {self.vocab} tokens, the preset takes {plan.vocab}", f"set feed.text.vocab={self.vocab}")
        self.start, self.end = self._must(start or pad_token or end), self._must(end)
        self.unknown = None if unknown is None else engine.token_to_id(unknown)
        # WordPiece masks padding by its own token whatever the plan says: BERT towers find it by that id.
        self.pad = self._must(pad_token) if pad_token else self.end if plan.pad == "end" else 0
        self._special = {self.start, self.end, self.pad} if plan.kind != "bpe" or plan.pad == "end" else {self.start, self.end}
        engine.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}".strip(), special_tokens=[
            (token, id) for token, id in ((start, self.start), (end, self.end)) if token])
        engine.enable_truncation(plan.length)
        self.new: dict[int, list[int]] = {}                 # id of a new word in the engine -> its ids behind the preset's vocabulary
        at = plan.vocab
        for word, count in getattr(plan, "new", ()):
            if clean(word).split() != [clean(word)] or count < 1:
                raise UserError(f"{word!r} cannot be a new word", "it has no spaces, and at least one id")
            engine.add_tokens([AddedToken(clean(word), normalized=True)])
            self.new[self._must(clean(word))] = list(range(at, at + count))
            at += count

    def _must(self, token: str) -> int:
        found = self.engine.token_to_id(token)
        if found is None:
            raise UserError(f"the vocabulary has no {token!r}", f"is it one of kind {self.plan.kind!r}?")
        return found

    def __call__(self, texts: str | Sequence[str], trim: bool = True) -> Tensor:
        """Texts -> token ids [B, L]; with trim=False L is the plan's length."""
        return self.encode(texts, trim)[0]

    def encode(self, texts: str | Sequence[str], trim: bool = True) -> tuple[Tensor, Tensor]:
        """Texts -> (ids int64 [B, L], mask bool [B, L], True on real tokens)."""
        rows = [e.ids for e in self.engine.encode_batch_fast([clean(t) for t in ([texts] if isinstance(texts, str) else texts)])]
        rows = [self._spelled(r) for r in rows] if self.new else rows
        lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        width = self.plan.length if not trim else int(lengths.max()) if rows else 0
        mask = torch.arange(width) < lengths[:, None]
        ids = torch.full((len(rows), width), self.pad, dtype=torch.int64)
        ids[mask] = torch.tensor([i for r in rows for i in r], dtype=torch.int64)
        return ids, mask

    def _spelled(self, row: list[int]) -> list[int]:
        """A row with the ids of new words in their place, cut to the plan's length; the end stays."""
        row = [i for r in row for i in self.new.get(r, [r])]
        return row if len(row) <= self.plan.length else [*row[:self.plan.length - 1], row[-1]]

    def words(self, ids: Tensor) -> Tensor:
        """ids [B,L] of `tokenizer(texts)` -> which word of its text, counted from 0, each is a piece of; -1 on start, end and padding.

        A token begins a word unless WordPiece marks it as the rest of one; after a BPE token that does not end a word, the next is the rest.
        """
        if self.plan.kind not in ("bpe", "wordpiece"):
            raise UserError(f"tokens of kind {self.plan.kind!r} do not say where words begin", "choose bpe or wordpiece")
        special = torch.isin(ids, torch.tensor(sorted({self.start, self.end, self.pad})))
        marked = self._marked[ids] & ~special
        rest = marked if self.plan.kind == "wordpiece" else torch.cat([marked.new_zeros(len(ids), 1), marked[:, :-1]], 1)
        return ((~rest & ~special).long().cumsum(1) - 1).masked_fill(special, -1)

    @cached_property
    def _marked(self) -> Tensor:
        """bool [V]: WordPiece's rests of words; BPE's tokens that do not end one."""
        rest = (lambda t: t.startswith("##")) if self.plan.kind == "wordpiece" else (lambda t: not t.endswith("</w>"))
        return torch.tensor([rest(self.token(i)) for i in range(max(self.vocab, 1 + max(self.engine.get_vocab().values())))])

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each token of `tokenizer(text)[0]`, the (start, stop) characters of `text` it stands for; (0, 0) for start and end."""
        cleaned, origin = _clean_with_origin(text)
        return [(origin[a], origin[b]) if b > a else (0, 0) for a, b in self.engine.encode(cleaned).offsets]

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Token ids (one row) -> text, up to the first end token; start and padding are left out."""
        row = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        row = row[:row.index(self.end)] if self.end in row else row
        if self.plan.kind in PUBLISHED:
            return self.engine.decode([i for i in row if i not in self._special], skip_special_tokens=True).strip()
        tokens = [self.engine.id_to_token(i) or "" for i in row if i not in self._special]
        if self.plan.kind == "bpe":
            joined = "".join(t for t in tokens if t not in BPE_SPECIALS).replace("</w>", " ")
            raw = b"".join(bytes([BYTES[c]]) if c in BYTES else c.encode() for c in joined)
            return raw.decode("utf-8", "replace").strip()
        return decoders.WordPiece(prefix="##").decode(tokens)

    def token(self, id: int) -> str:
        """The token of an id as the vocabulary writes it."""
        return (self.engine.id_to_token(id) or "").removeprefix(FOREIGN)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` (the layout of the tokenizers library, which transformers also reads)."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.json").write_text(self.engine.to_str(pretty=False), encoding="utf-8")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"engine": self.engine.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"engine": Engine.from_str(state["engine"])}


def clean(text: str) -> str:
    """HTML entities resolved (twice, as CLIP does: captions from the web are often escaped twice)."""
    return html.unescape(html.unescape(text)) if "&" in text else text


def _clean_with_origin(text: str) -> tuple[str, list[int]]:
    """Cleaned text and, for each of its positions and the end, the position in the original."""
    origin = list(range(len(text) + 1))
    for _ in range(2 if "&" in text else 0):
        out: list[str] = []
        place: list[int] = []
        last = 0
        for m in ENTITY.finditer(text):
            out.append(text[last:m.start()])
            place += origin[last:m.start()]
            said = html.unescape(m.group())
            out.append(said)
            place += [origin[m.start()]] * len(said)
            last = m.end()
        text, origin = "".join(out) + text[last:], place + origin[last:]
    return text, origin


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str | None) -> Engine:
    engine = Engine(models.BPE(vocab, merges, unk_token=unknown, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)])
    return engine


def _wordpiece(vocab: dict[str, int], lowercase: bool = True) -> Engine:
    engine = Engine(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    engine.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece(prefix="##")
    return engine


def make_tokenizer(plan: TextPlan, captions: Iterable[str]) -> Tokenizer:
    """Train a tokeniser on captions: the same captions always give the same ids.

    bpe: 0 pad, 1 start, 2 end, 3 unknown; wordpiece: 0 [PAD], 1 [CLS], 2 [SEP], 3 [UNK], 4 [MASK]. The vocabulary never exceeds
    `plan.vocab`; letters too rare to fit in become unknown. Raises UserError for no captions or too small a vocabulary.
    """
    texts = sorted({clean(c) for c in captions})
    bpe = _kind(plan) == "bpe"
    specials = BPE_SPECIALS if bpe else WORDPIECE_SPECIALS
    if not any(t.strip() for t in texts):
        raise UserError("no captions to train a tokenizer on", "choose data that offer text")
    if plan.kind in PUBLISHED:
        raise UserError(f"a tokenizer of kind {plan.kind!r} is read from its published files, not trained", "choose bpe or wordpiece")
    if plan.vocab < len(specials) + 32:
        raise UserError(f"a vocabulary of {plan.vocab} is too small", f"set feed.text.vocab to {len(specials) + 32} or more")
    splitter = _bpe({}, [], None) if bpe else _wordpiece({"[UNK]": 0})
    counts: Counter[str] = Counter()
    for text in texts:
        said = splitter.normalizer.normalize_str(text)  # type: ignore[union-attr]
        counts.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(said))  # type: ignore[union-attr]
    pieces = _alphabet(counts, plan.vocab - len(specials), bpe)
    # The letters go in as special tokens, in sorted order: left alone, the trainer would number the marked ones in the order of a hash table.
    rules: dict[str, Any] = {"vocab_size": plan.vocab, "min_frequency": 2, "show_progress": False, "special_tokens": [*specials, *pieces]}
    known = set(pieces)
    words = [word for word in sorted(counts) if known.issuperset(word) for _ in range(counts[word])]
    if bpe:
        engine = Engine(models.BPE(unk_token=BPE_SPECIALS[3], end_of_word_suffix="</w>"))
        trainer: Any = trainers.BpeTrainer(end_of_word_suffix="</w>", **rules)
    else:
        engine = Engine(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(continuing_subword_prefix="##", **rules)
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.train_from_iterator(words, trainer)
    model = json.loads(engine.to_str())["model"]
    if bpe:
        return _clip(model["vocab"], _pairs(model["merges"]), plan)
    return Tokenizer(_wordpiece(model["vocab"]), plan, "[CLS]", "[SEP]", "[PAD]", "[UNK]")


def _alphabet(counts: dict[str, int], room: int, bpe: bool) -> list[str]:
    """Single letters, plain and as marked at the edge (bpe) or inside (wordpiece) of words; the rarest are left out where room is short.

    Marked forms that no caption has are added while half of the room is free, so that new words made of known letters can be written.
    """
    seen: Counter[str] = Counter()
    met: set[str] = set()
    for word, n in counts.items():
        for c in word:
            seen[c] += n
        met.update(word[-1:] if bpe else word[1:])
    mark = (lambda c: c + "</w>") if bpe else (lambda c: "##" + c)
    pieces: list[str] = []
    known = sorted(seen, key=lambda c: (-seen[c], c))
    for c in known:
        more = [c, mark(c)] if c in met else [c]
        if len(pieces) + len(more) <= room:
            pieces += more
    more = [mark(c) for c in known if c in set(pieces) and c not in met]
    return sorted(pieces + more[:max(0, room // 2 - len(pieces))])


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files write "a b"."""
    return [(m[0], m[1]) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]  # type: ignore[misc]


def _kind(plan: TextPlan) -> str:
    if plan.kind not in ("bpe", "wordpiece", *PUBLISHED):
        raise UserError(f"no tokenizer of kind {plan.kind!r}", "choose bpe or wordpiece")
    return plan.kind


def load_tokenizer(folder: str | Path, plan: TextPlan) -> Tokenizer:
    """Read a saved tokeniser, or an official vocabulary.

    `tokenizer.json` (ours, Hugging Face's); bpe: `vocab.json` with `merges.txt`, or OpenAI's `bpe_simple_vocab_16e6.txt.gz`;
    wordpiece: `vocab.txt`. Raises UserError when the folder has none of them, or one of another kind.
    """
    folder = Path(folder)
    if plan.kind in PUBLISHED:
        return _published(folder, plan)
    bpe = _kind(plan) == "bpe"
    saved = folder / "tokenizer.json"
    packed = sorted(folder.glob("bpe_simple_vocab*.txt.gz"))
    lowercase = _lowercase(folder)
    if saved.exists():
        try:
            whole = json.loads(saved.read_text(encoding="utf-8"))
            model = whole["model"]
            kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{saved} is not a tokenizer file", str(error)) from error
        if kind != ("BPE" if bpe else "WordPiece"):
            raise UserError(f"{saved} holds a {kind} tokenizer", f"the preset reads text as {plan.kind}")
        if not bpe:
            return Tokenizer(_wordpiece(model["vocab"], bool((whole.get("normalizer") or {}).get("lowercase", lowercase))), plan,
                             "[CLS]", "[SEP]", "[PAD]", "[UNK]")
        return _clip(model["vocab"], _pairs(model["merges"]), plan)
    if bpe and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if len(line.split()) == 2 and not line.startswith("#version")]
        return _clip(json.loads((folder / "vocab.json").read_text(encoding="utf-8")), merges, plan)
    if bpe and packed:
        lines = gzip.decompress(packed[0].read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1:49152 - 256 - 2 + 1]]
        letters = sorted(LETTERS)                                            # OpenAI's order: the printable bytes, then the others
        tokens = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), BPE_SPECIALS[1], BPE_SPECIALS[2]]
        return _clip({t: i for i, t in enumerate(tokens)}, merges, plan)
    if not bpe and (folder / "vocab.txt").exists():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return Tokenizer(_wordpiece({t: i for i, t in enumerate(lines)}, lowercase), plan, "[CLS]", "[SEP]", "[PAD]", "[UNK]")
    wanted = "vocab.json with merges.txt" if bpe else "vocab.txt"
    raise UserError(f"no {plan.kind} vocabulary in {folder}", f"it should hold tokenizer.json or {wanted}")


def _clip(vocab: dict[str, int], merges: list[Any], plan: TextPlan) -> Tokenizer:
    ours = BPE_SPECIALS[3] in vocab
    return Tokenizer(_bpe(vocab, merges, BPE_SPECIALS[3] if ours else BPE_SPECIALS[2]), plan, BPE_SPECIALS[1], BPE_SPECIALS[2], None,
                     BPE_SPECIALS[3] if ours else None)


def _published(folder: Path, plan: TextPlan) -> Tokenizer:
    """LLaMA's, T5's, RoBERTa's or Marian's own, as `tokenizer.json` has it: case and spaces are kept; letters unknown to LLaMA are written as bytes,
    RoBERTa writes nothing but bytes. A text of T5 has no start: padding stands there, which its decoder begins with. Without that file the
    SentencePiece models that T5, Marian or a multilingual RoBERTa (XLM-R, BEiT-3) were published with."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        from polysense.data.sentencepiece import find, marian, t5, xlm_roberta

        if plan.kind == "marian":
            return Tokenizer(marian(folder), plan, *PUBLISHED[plan.kind])
        pieces, read = find(folder), {"t5": t5, "roberta": xlm_roberta}.get(plan.kind)
        if pieces is not None and read is not None:
            return Tokenizer(read(pieces), plan, *PUBLISHED[plan.kind])
        raise UserError(f"no {plan.kind} vocabulary in {folder}", "it should hold tokenizer.json" + (" or a SentencePiece model" if read else ""))
    try:
        return Tokenizer(Engine.from_file(str(path)), plan, *PUBLISHED[plan.kind])
    except UserError:
        raise
    except Exception as error:                        # the library raises bare exceptions for what it cannot read
        raise UserError(f"{path} is not a tokenizer file", str(error)) from error


def _lowercase(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return bool(json.loads(path.read_text(encoding="utf-8")).get("do_lower_case", True)) if path.exists() else True
