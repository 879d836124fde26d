"""A frozen language model of captions is steered to list the shapes that a caption names, from 500 examples.

Eight keys and values in each layer against eight embeddings in front of the words, and against asking without either. Score: F1 of the words that
are written behind the caption, greedily, among the names of shapes in it. The rate of the first was looked at on the validation split.
"""
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from polysense.base.batch import Batch
from polysense.base.system import Optim, Stage
from polysense.data.scenes.palette import SHAPES
from polysense.mechanisms.adapter import AdapterConfig
from polysense.mechanisms.prefix import VirtualTokens, virtual_of
from polysense.proofs.adapting import captions, copy_of, pretrained, train
from polysense.proofs.harness import Outcome
from polysense.systems.adapt import lora

METRIC, HIGHER_IS_BETTER = "F1 of the shapes listed behind a caption", True
DATA = "scenes (captions of 4,000 drawn pictures; 500 examples to learn from; 120 of the test split)"
EXAMPLES, STEPS, BATCH, ROOM = 500, 300, 32, 12


def shapes(caption: str) -> list[str]:
    """Names of shapes in their order, each once."""
    return list(dict.fromkeys(w for w in re.findall(r"[a-z]+", caption.lower()) if w in SHAPES))


def examples(split: str, n: int, seed: int) -> list[tuple[str, str]]:
    """(caption and colon, the shapes)."""
    said = [c for c in captions("scenes?n=4000" if split == "train" else "scenes?n=600", split, 4 * n, seed) if shapes(c)]
    return [(f"{c.rstrip('.')}:", " ".join(shapes(c))) for c in said[:n]]


def talks(pairs: Sequence[tuple[str, str]], tokenizer: Any, seed: int) -> Iterator[Batch]:
    """Endless batches of `chat` with `chat_reply` on the answer and its end."""
    g = torch.Generator().manual_seed(seed)
    while True:
        drawn = [pairs[i] for i in torch.randint(len(pairs), (BATCH,), generator=g).tolist()]
        chat = tokenizer([f"{q} {a}" for q, a in drawn])
        asked = (tokenizer([q for q, _ in drawn]) != 0).sum(1) - 1         # without its end
        place = torch.arange(chat.shape[1])
        yield {"chat": chat, "chat_reply": (place >= asked[:, None]) & (chat != 0)}


def steered(base: Any, adapter: AdapterConfig, pairs: Sequence[tuple[str, str]], tokenizer: Any, seed: int, lr: float) -> Any:
    torch.manual_seed(seed)
    made = copy_of(base)
    adapter.put(made)
    train(made, Stage(objective=lora.LoRA.reply, trainable=adapter.trainable(made), steps=STEPS, batch_size=BATCH,
                      optim=Optim(lr=lr, warmup=20, clip=1.0)), talks(pairs, tokenizer, seed))
    return made


@torch.inference_mode()
def f1(system: Any, pairs: Sequence[tuple[str, str]], tokenizer: Any) -> float:
    """Of sets of words, all examples together."""
    hit = said_n = true_n = 0
    for q, a in pairs:
        ids = tokenizer([q])[:, :-1]
        new = system.language.generate(system.language.embed(ids), None, max_new=ROOM, end=2)
        said, true = set(re.findall(r"[a-z]+", tokenizer.decode(new[0].tolist()).lower())), set(a.split())
        hit, said_n, true_n = hit + len(said & true), said_n + len(said), true_n + len(true)
    return 2 * hit / max(1, said_n + true_n)


def run(seed: int, split: str = "test") -> Outcome:
    base, tokenizer = pretrained(captions("scenes?n=4000", "train", 10 ** 6, seed), seed)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    learn, test = examples("train", EXAMPLES, seed), examples(split, 120, 1)
    like = tuple(range(300, 308))
    arms = {"deep": VirtualTokens(tokens=8, hidden=128), "shallow": VirtualTokens(tokens=8, kind="prompt", like=like)}
    rates = {"deep": 1e-2, "shallow": 3e-2}
    made = {k: steered(base, a, learn, tokenizer, seed, rates[k]) for k, a in arms.items()}
    same = all(torch.equal(v, made["deep"].state_dict()[k]) for k, v in before.items())
    scores = {k: f1(s, test, tokenizer) for k, s in made.items()}
    return Outcome(scores["deep"], {"eight embeddings": scores["shallow"], "no virtual tokens": f1(base, test, tokenizer)}, {
        "base unchanged": same, **{f"share of the base's numbers, {k}": virtual_of(s).whole().numel() / len_of(base) for k, s in made.items()}})


def len_of(system: Any) -> int:
    return sum(p.numel() for p in system.parameters())
