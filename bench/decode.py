"""Greedy decoding behind an image prefix: our CausalLM against transformers' LlamaForCausalLM.generate, with the same weights.

    python bench/decode.py [--new 96] [--prefix 256] [--prompt 16] [--batch 1 8] [--rounds 3] [--json docs/proofs/bench_decode.json]

A LLaMA of 8 layers x 512 (8 heads, MLP 1376, 2,048 words), fp32. Both read the same `prefix` image tokens as embeddings and the
same prompt, then write `new` tokens with a key-value cache and must write the same ones; a picture is encoded before, once, by neither. Rounds
alternate; the score is the ratio of the medians. "prompt" is a call that writes one token, "a token" what each further one costs. "weights alone"
is the time to read all weights of the blocks once by their matrix products with one row: no code in fp32 can write a token sooner.
"""
import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from filing import PROOFS, goal, medians, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference import reference

from polysense.towers.causal_lm import CausalLM, llama
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


def timed(run: Callable[[], object], times: list[float]) -> None:
    begun = time.process_time()
    run()
    times.append(time.process_time() - begun)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("new", 96), ("prefix", 256), ("prompt", 16), ("rounds", 3)):
        words.add_argument(f"--{name}", type=int, default=value)
    words.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    words.add_argument("--json", type=Path, default=PROOFS / "bench_decode.json")
    args = words.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    ours, theirs = models()
    assert isinstance(ours, CausalLM)
    seconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    same = True
    for batch in args.batch:
        g = torch.Generator().manual_seed(1)
        prefix = torch.randn(batch, args.prefix, WIDTH, generator=g)
        prompt = torch.randint(3, VOCAB, (batch, args.prompt), generator=g)
        x, seen = torch.cat([prefix, ours.embed(prompt).detach()], 1), torch.ones(batch, args.prefix + args.prompt, dtype=torch.long)

        def mine(new: int, x: torch.Tensor = x) -> torch.Tensor:
            return ours.generate(x, max_new=new, end=None)

        @torch.no_grad()
        def peer(new: int, x: torch.Tensor = x, seen: torch.Tensor = seen) -> torch.Tensor:
            return theirs.generate(inputs_embeds=x, attention_mask=seen, max_new_tokens=new, do_sample=False)  # type: ignore[operator]

        linears = [layer for block in ours.body.blocks for layer in (block.attn.q, block.attn.k, block.attn.v, block.attn.out, block.mlp.gate,
                                                                     block.mlp.up, block.mlp.down)]
        rows = {n: torch.randn(batch, n) for n in (WIDTH, HIDDEN)}

        @torch.no_grad()
        def read(linears: list[torch.nn.Linear] = linears, rows: dict[int, torch.Tensor] = rows) -> None:
            for layer in linears:
                layer(rows[layer.in_features])

        same = same and torch.equal(mine(args.new), peer(args.new))
        times: dict[str, list[float]] = {k: [] for k in ("ours", "transformers", "ours, prompt", "transformers, prompt", "weights alone")}
        for _ in range(args.rounds):
            timed(lambda: mine(args.new), times["ours"])
            timed(lambda: peer(args.new), times["transformers"])
            timed(lambda: mine(1), times["ours, prompt"])
            timed(lambda: peer(1), times["transformers, prompt"])
            for _ in range(5):
                timed(read, times["weights alone"])
        t = medians(times)
        for name in ("ours", "transformers"):
            t[f"{name}, a token"] = (t[name] - t[f"{name}, prompt"]) / (args.new - 1)
        seconds |= {f"{k}, batch {batch}": v for k, v in t.items()}
        ratios |= {f"transformers / ours, batch {batch}": t["transformers"] / t["ours"],
                   f"transformers / ours, a token, batch {batch}": t["transformers, a token"] / t["ours, a token"],
                   f"transformers, a token / weights alone, batch {batch}": t["transformers, a token"] / t["weights alone"]}
    write(args.json, what="Processor seconds of greedy decoding behind an image prefix, fp32; a ratio above 1 is in our favour",
          settings={"new tokens": args.new, "prefix": args.prefix, "prompt": args.prompt, "layers": DEPTH, "width": WIDTH, "rounds": args.rounds},
          seconds=seconds, ratios=ratios, goals={k: goal(v, least=TARGET) for k, v in ratios.items() if k.startswith("transformers / ours")},
          notes={"same text": same, "new tokens a second": {f"{n}, batch {b}": b / seconds[f"{n}, a token, batch {b}"] for b in args.batch
                                                            for n in ("ours", "transformers")}})
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
