"""Four-bit weights under low-rank updates learn what the same updates learn over full weights.

The language model of `lora`'s proof in NF4, with updates of rank 4 on all dense layers of its blocks, and the same updates over the weights as they
are, learn 300 titles. The baseline is the perplexity of the latter, and 3 % more. Beside it, what the base loses by NF4 and by sixteen equal steps.
"""
import torch
from torch import nn

from polysense.mechanisms.lora import LowRank
from polysense.mechanisms.nf4 import QuantisedLowRank, dequantise, quantise
from polysense.proofs.adapting import EXAMPLES, FIRST, SECOND, captions, copy_of, perplexity, pretrained, tuned
from polysense.proofs.harness import Outcome

METRIC, HIGHER_IS_BETTER = "perplexity on the new domain", False
DATA = "natural_captions (pre-training), fashion_products (300 titles to learn from, dev to test)"
EQUAL = tuple(i / 7 for i in range(-8, 8))   # int4: sixteen equal steps, absmax at the eighth above zero


def coarse(base: nn.Module, levels: tuple[float, ...] | None = None) -> nn.Module:
    """A copy of the base whose dense layers in blocks hold what four bits leave of them: NF4, or other levels."""
    twin = copy_of(base)
    with torch.no_grad():
        for name, m in twin.named_modules():
            if ".blocks." in name and isinstance(m, nn.Linear):
                m.weight.copy_(dequantise(quantise(m.weight, 0, levels), levels) if levels else dequantise(quantise(m.weight)))
    return twin


def run(seed: int, split: str = "dev") -> Outcome:
    base, tokenizer = pretrained(captions(FIRST, "train", 10 ** 6, seed), seed)
    learn, test = captions(SECOND, "train", EXAMPLES, seed), captions(SECOND, split, 600, 1)
    old = captions(FIRST, "dev", 400, 1)
    four = QuantisedLowRank(rank=4, alpha=None, dropout=0.0)
    quantised, plain = (tuned(base, a, learn, tokenizer, seed, lr=1e-2) for a in (four, LowRank(rank=4, on="*.blocks.*")))
    said = {k: perplexity(s, old, tokenizer) for k, s in (("fp32", base), ("NF4", coarse(base)), ("int4", coarse(base, EQUAL)))}
    reached = perplexity(plain, test, tokenizer)
    return Outcome(perplexity(quantised, test, tokenizer), {"LoRA over fp32, and 3 %": 1.03 * reached}, {
        "LoRA over fp32": reached, "before": perplexity(base, test, tokenizer), **{f"base on the first captions, {k}": v for k, v in said.items()}})
