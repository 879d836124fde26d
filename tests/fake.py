"""Random batches that fit a preset's feed and the batch vocabulary: what contract and system tests train on."""
import torch

from polysense.base.batch import Batch
from polysense.base.system import Preset

CLASSES = 3


def fake_batch(preset: Preset, keys: tuple[str, ...], n: int = 4, seed: int = 0) -> Batch:
    """One batch of n samples with just these keys (of alternatives "a|b" the first)."""
    g, feed = torch.Generator().manual_seed(seed), preset.feed
    made: Batch = {}
    for key in (k.split("|")[0] for k in keys):
        if key == "image":
            size = feed.train_image.size if feed.train_image else feed.image.size
            made[key] = torch.randn(n, 3, size, size, generator=g)
        elif key == "video":
            size = ((feed.video and feed.video.image) or feed.image).size
            made[key] = torch.randn(n, (feed.video.frames if feed.video else 8) or 5, 3, size, size, generator=g)
        elif key == "audio":
            made[key] = torch.randn(n, audio_samples(preset), generator=g) * 0.1
        elif key == "hint":
            made[key] = torch.rand(n, 3, feed.image.size, feed.image.size, generator=g)
        elif key == "views":
            made[key] = torch.randn(n, len(feed.views), 3, feed.views[0].size, feed.views[0].size, generator=g)
        elif key == "crops":
            made[key] = torch.randn(n, len(feed.crops), 3, feed.crops[0].size, feed.crops[0].size, generator=g)
        elif key in ("text", "retold", "question", "answer"):
            text = torch.randint(5, 60, (n, 8), generator=g)
            text[:, 0], text[:, -1] = 1, 2
            if getattr(feed.text, "new", ()):            # every text has the new words
                text[:, 1] = feed.text.vocab
            made[key] = text
        elif key == "word":
            made[key] = torch.cat([torch.full((n, 1), -1), torch.arange(6).expand(n, -1), torch.full((n, 1), -1)], 1)
        elif key == "has":
            made[key] = torch.arange(n) % 3
        elif key == "names":
            count = getattr(getattr(preset.config, "text", None), "classes", CLASSES)
            names = torch.randint(5, 60, (1, count, 6), generator=g)
            names[..., 0], names[..., -1] = 1, 2
            names[..., 1] = 60 + torch.arange(count)                              # no two are called the same
            made[key] = names.expand(n, -1, -1)
        elif key == "segment":
            made[key] = (torch.arange(8) > 3).long().expand(n, -1)
        elif key == "follows":
            made[key] = torch.arange(n) % 2
        elif key == "images":
            made[key] = torch.randn(n, feed.text.shots, 3, feed.image.size, feed.image.size, generator=g)
        elif key == "episode":
            made[key] = torch.randint(5, 60, (n, 1 + 4 * feed.text.shots), generator=g)
            made[key][:, 0], made[key][:, 1::4], made[key][:, 4::4] = 1, feed.text.image, 2
        elif key in ("chat", "brief"):
            made[key] = torch.randint(5, 60, (n, 12), generator=g)
            made[key][:, 0], made[key][:, 2], made[key][:, -2], made[key][0, -1] = 1, feed.text.image, 2, 0
        elif key in ("chat_reply", "brief_reply"):
            made[key] = (torch.arange(12) > 7).expand(n, -1) & (torch.arange(12) < 11)
        elif key == "text_mask":
            made[key] = torch.ones(n, 8, dtype=torch.bool)
        elif key == "label":
            made[key] = torch.arange(n) % CLASSES
        elif key == "index":
            made[key] = torch.arange(n)
        elif key in ("boxes", "box_label", "mask", "polygon", "keypoints"):
            made[key] = objects(preset, n)[key]
        elif key in ("origin", "rgb"):
            made[key] = torch.rand(n, 3, generator=g)
        elif key == "direction":
            made[key] = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1)
        elif key == "tags":
            made[key] = torch.rand(n, CLASSES, generator=g).round()
        else:
            raise KeyError(f"tests/fake.py cannot make {key!r} yet: add it")
    return made


def objects(preset: Preset, n: int) -> Batch:
    """Two boxes a picture with their masks; the last picture has one, and padding."""
    size = (preset.feed.train_image or preset.feed.image).size
    boxes = torch.tensor([[0.125, 0.25, 0.5, 0.75], [0.5, 0.5, 0.875, 0.875]]).repeat(n, 1, 1)
    label = torch.arange(2 * n).view(n, 2) % CLASSES
    boxes[-1, 1], label[-1, 1] = -1, -1
    at = (torch.arange(size) + 0.5) / size
    inside = (at > boxes[..., :2, None]) & (at < boxes[..., 2:, None])                     # [n,2,xy,size]
    edge = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).repeat_interleave(32, 0)   # 128 points, on the corners
    polygon = boxes[:, :, None, :2] + edge * (boxes[:, :, None, 2:] - boxes[:, :, None, :2])
    keypoints = torch.cat([polygon[:, :, ::26], torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]).view(5, 1).expand(n, 2, 5, 1)], -1)
    keypoints[-1, 1] = -1
    return {"boxes": boxes, "box_label": label, "mask": inside[:, :, 1, :, None] & inside[:, :, 0, None], "polygon": polygon, "keypoints": keypoints}


def audio_samples(preset: Preset) -> int:
    """How long a training sound of this preset is."""
    plan = preset.feed.audio
    seconds = plan and (plan.train_seconds or plan.seconds)
    return round(seconds * plan.rate) if seconds else 4000


class Strict(dict):
    """A batch that remembers what was read and refuses what the card does not declare."""

    def __init__(self, batch: Batch, allowed: set[str]):
        super().__init__(batch)
        self.allowed, self.read = allowed, set()

    def __getitem__(self, key: str):
        assert key in self.allowed, f"reads {key!r}, which card.needs does not declare"
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if super().__contains__(key) else default
