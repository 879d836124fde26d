"""Losses of language models: every token is predicted from those before it."""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError

IGNORE = -100                                # a label that counts for nothing: padding, prompts, places of an image


def labels_of(text: Tensor, counted: Tensor) -> Tensor:
    """text [B,L] ids, counted bool [B,L] -> labels [B,L]: the ids where they count, IGNORE elsewhere."""
    return text.masked_fill(~counted, IGNORE)


def next_token(logits: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
    """-mean log p(label_{t+1} | tokens up to t) over all labels that count (Radford et al. 2018, equation 1).

    logits [B,T,V] at every token; label int [B,T], the tokens themselves, IGNORE where a token is not to be learned: the shift by one is
    made here, so logits and label belong to the same tokens. The mean is over tokens, not over samples. `smoothing` as in Szegedy et al. 2016.
    Raises UserError where the shapes differ or no label counts, which would be a loss of nothing (0/0).
    """
    counted = _shifted(logits, label)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), counted.flatten(), ignore_index=IGNORE, label_smoothing=smoothing)


def hidden_words(logits: Tensor, word: Tensor) -> Tensor:
    """-mean log p of hidden words (Devlin et al. 2019, section 3.1): logits [N,V], word int [N] -> scalar; 0 where none was hidden."""
    return F.cross_entropy(logits.float(), word, reduction="sum") / max(1, len(word))


def token_log_likelihood(logits: Tensor, label: Tensor) -> Tensor:
    """Sum of log p over the labels that count, for each sample: logits [B,T,V], label [B,T] -> [B]. How candidate answers are ranked.

    Raises UserError as `next_token`, and where a single sample has no label that counts.
    """
    counted = _shifted(logits, label)
    if not bool((counted != IGNORE).any(1).all()):
        raise UserError("a sample has no token that counts", "its answer is empty, or was cut off by the prompt before it")
    logp = -F.cross_entropy(logits[:, :-1].float().mT, counted, ignore_index=IGNORE, reduction="none")
    return logp.sum(1)


def _shifted(logits: Tensor, label: Tensor) -> Tensor:
    if logits.ndim != 3 or label.shape != logits.shape[:2]:
        raise UserError(f"logits of shape {list(logits.shape)} and labels of shape {list(label.shape)}", "give [B,T,V] and [B,T], token by token")
    counted = label[:, 1:]
    if not torch.compiler.is_compiling() and not bool((counted != IGNORE).any()):
        raise UserError("no token of this batch counts in the loss: all labels are masked",
                        "the texts are empty, or their prompts leave no room before the length limit")
    return counted
