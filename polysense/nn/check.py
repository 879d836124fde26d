"""What a tower refuses, in one line that says what it reads instead."""
import torch
from torch import Tensor

from polysense.base.errors import UserError


def check_image(image: Tensor, channels: int) -> None:
    """Raises UserError unless image is float [B,channels,H,W]."""
    if image.ndim != 4 or not image.is_floating_point():
        raise UserError(f"an image tensor of shape {list(image.shape)} and type {image.dtype}", f"this tower reads float [B,{channels},H,W]")
    if image.shape[1] != channels:
        raise UserError(f"the image has {image.shape[1]} channels", f"this tower reads {channels}")


def check_video(video: Tensor, channels: int, frames: int, size: int) -> None:
    """Raises UserError unless video is float [B,frames,channels,size,size]."""
    if video.ndim != 5 or not video.is_floating_point() or video.shape[2] != channels:
        raise UserError(f"a video tensor of shape {list(video.shape)} and type {video.dtype}", f"this tower reads float [B,F,{channels},H,W]")
    if tuple(video.shape[1:2] + video.shape[3:]) != (frames, size, size):
        raise UserError(f"clips of {video.shape[1]} frames of {video.shape[3]}x{video.shape[4]} pixels",
                        f"this tower reads {frames} frames of {size}x{size}")


def check_text(text: Tensor, length: int, vocab: int) -> None:
    """Raises UserError unless text is int [B,L] with L <= length and, where looking costs no wait for a device, ids in [0, vocab)."""
    if text.ndim != 2 or text.dtype not in (torch.int64, torch.int32):
        raise UserError(f"a text tensor of shape {list(text.shape)} and type {text.dtype}", "this tower reads token ids, int64 [B,L]")
    if text.shape[1] > length:
        raise UserError(f"a text of {text.shape[1]} tokens", f"this tower reads at most {length}: let the tokenizer cut it")
    if text.device.type == "cpu" and not torch.compiler.is_compiling() and text.numel():
        low, high = text.aminmax()
        if low < 0 or high >= vocab:
            raise UserError(f"token id {int(high if high >= vocab else low)} is outside the vocabulary of {vocab}",
                            "use the tokenizer that belongs to these weights")
