"""Texts of different origin about one sample: a title, hashtags, captions of key frames, a caption of the clip, a polished text.

Training draws a text uniformly among a sample's captions; `in_views` lists each as often as makes that a draw among the origins first.
"""
from collections.abc import Mapping, Sequence
from math import lcm
from typing import Any

from polysense.base.errors import UserError


def in_views(views: Mapping[str, Any], parts: Mapping[str, int] | None = None) -> list[str]:
    """{origin: text or texts} -> captions, of which a uniform draw gives every origin its part and the texts of one origin equal shares of it: with
    five origins a fifth each, and a fortieth for each of eight captions of frames (Zhu et al. 2024, LanguageBind, section 4). The first caption is
    the first origin's first: what is read outside training.

    parts: whole numbers for other shares than equal ones. Origins without a text are left out. UserError for a part that is below one.
    """
    held = {name: [str(t).strip() for t in (said if isinstance(said, Sequence) and not isinstance(said, str) else [said])
                   if t is not None and str(t).strip()] for name, said in views.items()}
    held = {name: texts for name, texts in held.items() if texts}
    shares = {name: 1 if parts is None else parts.get(name, 1) for name in held}
    if wrong := [n for n, p in shares.items() if p < 1]:
        raise UserError(f"a part of {shares[wrong[0]]} for the texts of {wrong[0]!r}", "leave the origin out, or give it a whole number from 1")
    whole = lcm(*(len(texts) for texts in held.values())) if held else 1
    return [t for name, texts in held.items() for t in texts for _ in range(shares[name] * whole // len(texts))]
