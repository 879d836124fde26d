"""A small language model of photograph captions learns titles of shop photographs from 300 of them.

All weights, and low-rank updates of rank 4 on all dense layers and the embedding, train for as many steps. What counts is how much of the drop in
perplexity that full tuning reaches LoRA reaches too; the trained share of the numbers and what both have forgotten of the first captions stand in
the notes. Learning rates were chosen on other titles of the training split.
"""
from polysense.mechanisms.lora import LowRank
from polysense.proofs.adapting import EXAMPLES, FIRST, SECOND, captions, perplexity, pretrained, share_trained, tuned
from polysense.proofs.harness import Outcome

METRIC, HIGHER_IS_BETTER = "share of full tuning's drop in perplexity on the new domain", True
DATA = "natural_captions (pre-training), fashion_products (300 titles to learn from, dev to test)"
RANK4 = LowRank(rank=4, on="*.blocks.* *.head *.embed")


def run(seed: int, split: str = "dev") -> Outcome:
    base, tokenizer = pretrained(captions(FIRST, "train", 10 ** 6, seed), seed)
    learn, test = captions(SECOND, "train", EXAMPLES, seed), captions(SECOND, split, 600, 1)
    before, old = perplexity(base, test, tokenizer), captions(FIRST, "dev", 400, 1)
    full = tuned(base, None, learn, tokenizer, seed, lr=1e-3)
    low = tuned(base, RANK4, learn, tokenizer, seed, lr=1e-2)
    after = {n: perplexity(s, test, tokenizer) for n, s in (("full tuning", full), ("LoRA", low))}
    kept = {n: perplexity(s, old, tokenizer) for n, s in (("base", base), ("full tuning", full), ("LoRA", low))}
    return Outcome((before - after["LoRA"]) / (before - after["full tuning"]), {"95 % of full tuning": 0.95}, {
        "perplexity before": before, **{f"perplexity after {k}": v for k, v in after.items()}, "trained share": share_trained(low, RANK4),
        **{f"perplexity on the first captions, {k}": v for k, v in kept.items()}})
