"""A text as a bag of its words: what a language model is told of a picture before anything sees for it."""
import torch
from torch import Tensor


def bag(text: Tensor, real: Tensor, n: int) -> Tensor:
    """text [B,L] ids, real bool [B,L] -> n ids [B,n] drawn from the real ones of each row, again and again, in no order.

    A language model that reads such bags in front of the texts they come from learns to use what stands there, wherever it stands; soft prompts
    can then take the bag's place. A row without real ids gives its first.
    """
    count, places = real.sum(1, keepdim=True), real.int().argsort(dim=1, descending=True, stable=True)
    drawn = (torch.rand(len(text), n, device=text.device) * count).long()
    return text.gather(1, places.gather(1, drawn))
