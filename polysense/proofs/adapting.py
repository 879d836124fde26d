"""What the proofs of adapters share: a small language model of captions, texts as batches in memory, perplexity, one arm of adaptation."""
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from polysense.base.batch import Batch
from polysense.base.system import Optim, Stage, System
from polysense.data import source
from polysense.data.tokenizer import make_tokenizer
from polysense.mechanisms.adapter import AdapterConfig
from polysense.systems.adapt import lora
from polysense.train.fit import fit

FIRST, SECOND = "natural_captions", "fashion_products"
EXAMPLES, BASE_STEPS, STEPS, BATCH = 300, 300, 120, 32


def captions(name: str, split: str, most: int, seed: int) -> list[str]:
    """`most` captions at random."""
    said = list(source(name, split).captions())
    order = torch.randperm(len(said), generator=torch.Generator().manual_seed(seed)).tolist()
    return [said[i] for i in order[:most]]


def batches(texts: Sequence[str], tokenizer: Any, size: int, seed: int) -> Iterator[Batch]:
    """Endless random batches of `text`."""
    g = torch.Generator().manual_seed(seed)
    while True:
        yield {"text": tokenizer([texts[i] for i in torch.randint(len(texts), (size,), generator=g).tolist()])}


def train(system: System, stage: Stage, fed: Iterator[Batch]) -> None:
    for _ in fit(system, stage, fed):
        pass
    system.eval()


def pretrained(texts: Sequence[str], seed: int) -> tuple[Any, Any]:
    """(the language model of `lora` after a short run on these texts, its tokenizer)."""
    preset = lora.base()
    tokenizer = make_tokenizer(preset.feed.text, texts)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    system = preset.config.build()
    train(system, preset.stages[0].but(steps=BASE_STEPS, batch_size=BATCH), batches(texts, tokenizer, BATCH, seed))
    return system, tokenizer


@torch.inference_mode()
def perplexity(system: Any, texts: Sequence[str], tokenizer: Any) -> float:
    """exp of the mean negative log likelihood of a token."""
    total = count = 0.0
    for start in range(0, len(texts), 100):
        text = tokenizer(list(texts[start:start + 100]))
        said = system.logits(text)[:, :-1].log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]
        real = text[:, 1:] != 0
        total, count = total - float(said[real].sum()), count + float(real.sum())
    return float(torch.tensor(total / count).exp())


def copy_of(system: Any) -> Any:
    """The same language model with the same weights, without adapter."""
    twin = lora.base().config.build()
    twin.load_state_dict(system.state_dict())
    return twin


def tuned(system: Any, adapter: AdapterConfig | None, texts: Sequence[str], tokenizer: Any, seed: int, lr: float) -> Any:
    """A copy of a language model, trained on other texts: an adapter on it, or all of it where there is none."""
    torch.manual_seed(seed)
    made = copy_of(system)
    if adapter is not None:
        adapter.put(made)
    stage = Stage(objective=lora.LoRA.losses, trainable=adapter.trainable(made) if adapter is not None else ("*",), steps=STEPS, batch_size=BATCH,
                  optim=Optim(lr=lr, warmup=15, clip=1.0))
    train(made, stage, batches(texts, tokenizer, BATCH, seed))
    return made


def share_trained(system: Any, adapter: AdapterConfig) -> float:
    """Trained numbers over those of the base."""
    from fnmatch import fnmatch

    wanted = adapter.trainable(system)
    own = sum(p.numel() for n, p in system.named_parameters() if any(fnmatch(n, w) for w in wanted))
    return own / sum(p.numel() for p in lora.base().config.build().parameters())
