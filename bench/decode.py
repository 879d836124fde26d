"""Greedy decoding behind an image prefix: our CausalLM against transformers' LlamaForCausalLM.generate, with the same weights.

    python bench/decode.py [--new 128] [--prefix 64] [--prompt 16] [--batch 1] [--rounds 5] [--json docs/proofs/bench_decode.json]

A LLaMA of 8 layers x 512 (8 heads, MLP 1376, 2,048 words), fp32, one thread. Both read the same `prefix` image tokens as embeddings and the
same prompt, then write `new` tokens with a key-value cache and must write the same ones. Rounds alternate between the two; the score is the
ratio of the medians of new tokens a second.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference import reference

from polysense.proofs.harness import commit, machine
from polysense.towers.causal_lm import llama
from polysense.weights import llama_hf

VOCAB, WIDTH, DEPTH, HEADS, HIDDEN, LENGTH = 2048, 512, 8, 8, 1376, 1024
TARGET = 2.0


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and theirs, with equal random weights."""
    transformers = reference("transformers")
    torch.manual_seed(0)
    ours = llama(vocab=VOCAB, length=LENGTH, width=WIDTH, depth=DEPTH, heads=HEADS, hidden=HIDDEN)
    lm = ours.build().eval()
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    config = {k: v for k, v in llama_hf.write(ours).items() if k not in ("architectures", "rope_theta")}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    theirs.load_state_dict(llama_hf.keymap(ours).save(dict(lm.state_dict())))
    theirs.generation_config.eos_token_id = None
    return lm, theirs


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("new", 128), ("prefix", 64), ("prompt", 16), ("batch", 1), ("rounds", 5)):
        words.add_argument(f"--{name}", type=int, default=value)
    words.add_argument("--json", type=Path)
    args = words.parse_args()
    torch.set_num_threads(1)
    ours, theirs = models()
    g = torch.Generator().manual_seed(1)
    prefix = torch.randn(args.batch, args.prefix, WIDTH, generator=g)
    prompt = torch.randint(3, VOCAB, (args.batch, args.prompt), generator=g)
    x = torch.cat([prefix, ours.embed(prompt).detach()], 1)

    def mine() -> torch.Tensor:
        return ours.generate(ours.join(prefix, prompt)[0], max_new=args.new, end=None)

    @torch.no_grad()
    def peer() -> torch.Tensor:
        return theirs.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long), max_new_tokens=args.new, do_sample=False)

    written = {"polysense": mine().tolist(), "transformers": peer().tolist()}
    times: dict[str, list[float]] = {"polysense": [], "transformers": []}
    for _ in range(args.rounds):
        for name, write in (("polysense", mine), ("transformers", peer)):
            start = time.process_time()
            write()
            times[name].append(args.batch * args.new / (time.process_time() - start))
    speed = {name: median(rates) for name, rates in times.items()}
    ratio = speed["polysense"] / speed["transformers"]
    out = {"bench": "greedy decoding behind an image prefix", "commit": commit(), "machine": machine(),
           "unit": "new tokens a second of processor time",
           "sizes": vars(args) | {"json": None, "layers": DEPTH, "width": WIDTH}, "same text": written["polysense"] == written["transformers"],
           "speed": speed, "all": times, "ratio": ratio, "target": TARGET, "reached": ratio >= TARGET}
    print(json.dumps(out, indent=1))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    return 0 if out["same text"] else 1


if __name__ == "__main__":
    sys.exit(main())
