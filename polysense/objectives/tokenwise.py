"""Late interaction: two samples are as similar as their tokens are to their best partners. Exact, in memory that the batch does not square.

    S_ij = sum_k w_ik max_r a_ik . b_jr                                     (Yao et al. 2022, FILIP, equations 3 and 4)

The four-dimensional array of all token pairs is made tile by tile and dropped; backward makes each tile again, finds the same maxima and sends
the gradient there. Legend: M rows, N columns, K and L their tokens, D width.
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from collections.abc import Iterator
from math import ceil, isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.objectives.once import once
from polysense.objectives.spread import gather, places, widest

TILE = 4_194_304                             # token pairs that exist at a time: 16 MB in float32


def token_nce(patches: Tensor, words: Tensor, mask: Tensor, scale: Tensor | float, keep: float = 1.0) -> Tensor:
    """Cross-entropy over the rows of both similarities: each picture's patches against the words of all texts, each text's words against the
    patches of all pictures; the mean of the two. Scalar.

    patches [B,K,D], words [B,L,D] unit norm, mask [B,L] True where a word is real: others take part in no maximum and no mean. keep: the share of
    its tokens that a sample shows to the others (FILIP, section 3.1: 25 %); a sample compares all of its own. With one token each it is `info_nce`.
    """
    if patches.ndim != 3 or words.ndim != 3 or len(patches) != len(words) or mask.shape != words.shape[:2]:
        raise ValueError(f"tokens should be [B,K,D] and [B,L,D] with a mask [B,L]: got {tuple(patches.shape)}, {tuple(words.shape)} and "
                         f"{tuple(mask.shape)}")
    at, all_real = places(patches), torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
    (shown, shown_mask), (said, said_mask) = best_tokens(patches, all_real, words, mask, keep), best_tokens(words, mask, patches, all_real, keep)
    shown, shown_mask, said, said_mask = (gather(_wide(x), at) for x in (shown, shown_mask, said, said_mask))
    see, seen = token_log_sum_exp(patches, all_real, said, said_mask, scale, at.start)
    say, told = token_log_sum_exp(words, mask, shown, shown_mask, scale, at.start)
    return ((see - seen).sum() + (say - told).sum()) / (2 * at.share)


def token_log_sum_exp(a: Tensor, a_mask: Tensor, b: Tensor, b_mask: Tensor, scale: Tensor | float, pair: int) -> tuple[Tensor, Tensor]:
    """(log-sum-exp of the rows of scale * S [M], the entries [i, i + pair] of it [M]), with w = 1 / number of real tokens of the row. a [M,K,D],
    b [N,L,D] and their masks. Differentiable once, in a, b and scale."""
    work = torch.float64 if a.dtype == torch.float64 else torch.float32
    weight = a_mask.to(work) / a_mask.sum(1, keepdim=True)
    return _TokenLogSumExp.apply(a, weight, b, b_mask, torch.as_tensor(scale, dtype=work, device=a.device).reshape(()), pair)


@torch.no_grad()
def token_similarity(a: Tensor, a_mask: Tensor, b: Tensor, b_mask: Tensor) -> Tensor:
    """S [M,N], without a graph: what a search or a zero-shot classifier ranks by."""
    weight, out = a_mask.to(a.dtype) / a_mask.sum(1, keepdim=True), a.new_empty(len(a), len(b))
    for r, c in _tiles(a, b):
        out[r, c] = (_best(a[r], b[c], b_mask[c])[0] * weight[r, :, None]).sum(1)
    return out


@torch.no_grad()
def best_scores(a: Tensor, a_mask: Tensor, b: Tensor, b_mask: Tensor) -> Tensor:
    """[M,K]: the largest product of each token of `a` with any real token of any sample of `b`; -inf where a token is padding."""
    out = torch.full(a.shape[:2], -torch.inf, dtype=a.dtype, device=a.device)
    for r, c in _tiles(a, b):
        out[r] = torch.maximum(out[r], _best(a[r], b[c], b_mask[c])[0].amax(2).to(out.dtype))
    return out.masked_fill(~a_mask, -torch.inf)


def best_tokens(a: Tensor, a_mask: Tensor, b: Tensor, b_mask: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """The ceil(keep * real tokens) of each sample that score best against the samples of the other kind at hand: (tokens [M,K',D], mask [M,K'])."""
    if keep >= 1:
        return a, a_mask
    counts = (keep * a_mask.sum(1)).ceil().long()
    order = best_scores(a.detach().float(), a_mask, b.detach().float(), b_mask).argsort(1, descending=True)[:, :ceil(keep * a.shape[1])]
    chosen = a.gather(1, order[..., None].expand(-1, -1, a.shape[2]))
    return chosen, torch.arange(order.shape[1], device=a.device) < counts[:, None]


def _wide(x: Tensor) -> Tensor:
    """x [n,K,...] padded to the most tokens that any rank has."""
    return F.pad(x, (*(0, 0) * (x.ndim - 2), 0, widest(x.shape[1], x.device) - x.shape[1]))


def _tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice]]:
    side = max(1, isqrt(TILE // max(1, a.shape[1] * b.shape[1])))
    for i in range(0, len(a), side):
        for j in range(0, len(b), side):
            yield slice(i, min(i + side, len(a))), slice(j, min(j + side, len(b)))


def _best(a: Tensor, b: Tensor, b_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Largest product of each token of each row with a token of each column, and which: [m,K,n] each."""
    dots = (a.flatten(0, 1) @ b.flatten(0, 1).T).view(*a.shape[:2], *b.shape[:2])
    return dots.masked_fill_(~b_mask, -torch.inf).max(-1)


class _TokenLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, b: Tensor, b_mask: Tensor, scale: Tensor, pair: int) -> tuple[Tensor, Tensor]:
        rows, pairs = weight.new_full((len(a),), -torch.inf), weight.new_zeros(len(a))
        with torch.autocast(a.device.type, enabled=False):
            for r, c in _tiles(a, b):
                logits = scale * (_best(a[r].to(weight.dtype), b[c].to(weight.dtype), b_mask[c])[0] * weight[r, :, None]).sum(1)
                rows[r] = torch.logaddexp(rows[r], logits.logsumexp(1))
                for i, j in _crossed(r, c, pair):
                    pairs[i] = logits[i - r.start, j - c.start]
        ctx.save_for_backward(a, weight, b, b_mask, scale, rows)
        ctx.pair = pair
        return rows, pairs

    @staticmethod
    @once
    def backward(ctx: Any, g_rows: Tensor, g_pairs: Tensor) -> tuple[Any, ...]:
        """dL_ij = g_rows_i exp(L_ij - rows_i) + g_pairs_i [j = i + pair], sent to the tokens that gave the maxima."""
        a, weight, b, b_mask, scale, rows = ctx.saved_tensors
        da, db, d_scale = torch.zeros_like(a, dtype=weight.dtype), torch.zeros_like(b, dtype=weight.dtype), torch.zeros_like(scale)
        with torch.autocast(a.device.type, enabled=False):
            for r, c in _tiles(a, b):
                x, y = a[r].to(weight.dtype), b[c].to(weight.dtype)
                best, where = _best(x, y, b_mask[c])
                s = (best * weight[r, :, None]).sum(1)
                d = g_rows[r, None] * (scale * s - rows[r, None]).exp()
                for i, j in _crossed(r, c, ctx.pair):
                    d[i - r.start, j - c.start] += g_pairs[i]
                d_scale += (d * s).sum()
                sent = x.new_zeros(*best.shape, b.shape[1]).scatter_(3, where[..., None], (d[:, None] * weight[r, :, None])[..., None])
                sent = sent.view(x.shape[0] * x.shape[1], -1)
                da[r] += (sent @ y.flatten(0, 1)).view(x.shape)
                db[c] += (sent.T @ x.flatten(0, 1)).view(y.shape)
        return (da * scale).to(a.dtype), None, (db * scale).to(b.dtype), None, d_scale, None


def _crossed(r: slice, c: slice, pair: int) -> list[tuple[int, int]]:
    """Places of the tile on the diagonal j = i + pair."""
    return [(i, i + pair) for i in range(max(r.start, c.start - pair), min(r.stop, c.stop - pair))]
