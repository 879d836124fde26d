"""Image-text matching: is this the caption of this picture? Pairs that the contrastive scores find hard serve as the wrong ones."""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """Rows to be matched: `image` and `text` [3B] number the pictures and the texts, `truth` [3B] is 1 where they belong together."""
    image: Tensor
    text: Tensor
    truth: Tensor


def similarities(one: Tensor, two: Tensor, scale: Tensor | float) -> Tensor:
    """scale * one @ two.T, [B,D] and [N,D] -> [B,N], in float32 under autocast too: a logit of 14 in bfloat16 is off by 3 %."""
    with torch.autocast(one.device.type, enabled=False):
        return scale * one.float() @ two.float().T


def hard_negatives(similar: Tensor, first: int = 0) -> Tensor:
    """One wrong column for each row, drawn in proportion to exp(similar) over all columns but the row's own (Li et al. 2021, ALBEF, section 3.2).

    similar [B,N] logits; row i's own column is i + first. -> int [B]. Without gradient. Equal similarities are drawn uniformly. ValueError
    where a row has no other column.
    """
    rows, columns = similar.shape
    if columns < 2 or rows + first > columns:
        raise ValueError(f"{rows} rows from column {first} on have no wrong column among {columns}")
    own = torch.arange(rows, device=similar.device)[:, None] + first
    chance = similar.detach().float().scatter(1, own, -torch.inf).softmax(1)
    # a batch that is not finite draws anything: the loss is not finite either, and the loop names the samples
    return torch.multinomial(torch.where(chance.isfinite(), chance, 1.0), 1)[:, 0]


def matching_pairs(image_to_text: Tensor, text_to_image: Tensor, first: int = 0) -> Pairs:
    """B true pairs, then each text with a hard picture, then each picture with a hard text.

    image_to_text and text_to_image [B,N]: logits of this rank's pictures with all texts, and the other way round; this rank's own rows begin
    at `first` among all N.
    """
    own = torch.arange(len(image_to_text), device=image_to_text.device) + first
    image, text = hard_negatives(text_to_image, first), hard_negatives(image_to_text, first)
    truth = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    return Pairs(torch.cat([own, image, own]), torch.cat([own, own, text]), truth)


def matching_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Two-way cross-entropy: logits [N,2] (no, yes), truth int [N]. Scalar."""
    return F.cross_entropy(logits.float(), truth)
