"""FILIP points: the patch most like the name of a thing lies on it.

Scenes of two things with boxes; each is asked for by colour and shape, and the best patch counts when it lies in the box. The control is CLIP
with the same towers, batches and steps, its patches compared with the text as heat-maps do.
"""
import torch

from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.scenes.source import ScenesSource
from polysense.proofs.arms import train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.small import SIZE, fitted, kept
from polysense.systems.align import clip, filip

METRIC, HIGHER_IS_BETTER = "share of things on whose box the best patch for their name lies", True
DATA = "scenes (two things each, 4,000 pictures; 500 others for the test)"
STEPS, SPEC = 220, "scenes?objects=2&digits=0&style=plain&shapes=6&colours=6"


def pointing(subject: object, test: ScenesSource) -> tuple[float, float]:
    """(share of hits, share of the picture that a box covers, which is what chance would give)."""
    system, feed = subject.system, subject.preset.feed  # type: ignore[attr-defined]
    hits, covered = [], []
    with torch.inference_mode():
        for n, batch in enumerate(Loader(test, feed, None, batch_size=100, train=False, needs=("image", "boxes"))):
            for i in range(len(batch["image"])):
                scene, boxes = test.scene(100 * n + i), batch["boxes"][i]
                asked = subject.read_texts([f"a {t.colour} {t.shape}" for t in scene.things])  # type: ignore[attr-defined]
                image = batch["image"][i:i + 1].expand(len(asked), -1, -1, -1)
                heat = system.ground_text(image, asked) if hasattr(system, "ground_text") else torch.einsum(
                    "bhwd,bd->bhw", system.encode_patches(image), system.encode_text(asked))
                h, w = heat.shape[1:]
                best = heat.flatten(1).argmax(1)
                x, y = (best % w + 0.5) / w, (best // w + 0.5) / h
                for k in range(len(asked)):
                    x0, y0, x1, y1 = boxes[k].tolist()
                    hits.append(float(x0 <= x[k] <= x1 and y0 <= y[k] <= y1))
                    covered.append((x1 - x0) * (y1 - y0))
    return sum(hits) / len(hits), sum(covered) / len(covered)


def run(seed: int, test_seed: int = 1001) -> Outcome:
    train, test = kept(source(f"{SPEC}&n=4000&seed={seed}&size={SIZE}")), source(f"{SPEC}&n=500&seed={test_seed}&size={SIZE}", split="test")
    assert isinstance(test, ScenesSource)
    image, text, of = filip.body(96, 3, 3), filip.body(96, 2, 3), {"vocab": 1024, "length": 24, "end": 2}
    own = fitted(filip.tiny(), filip.config(SIZE, 4, image, text, 64, **of, keep=1.0), STEPS, **{"stages.0.batch_size": 48})
    other = fitted(clip.tiny(), clip.config(SIZE, 4, image, text, 64, **of), STEPS, **{
        "stages.0.batch_size": 48, "feed.train_image.flip": 0.0, "feed.train_image.jitter": 0.0})
    found, area = {}, 0.0
    for name, plan in (("filip", own), ("clip", other)):
        found[name], area = pointing(train_arm(name, plan, train, needs=("image", "text"), seed=seed).subject, test)
    return Outcome(found["filip"], {"CLIP's patches": found["clip"], "chance": area})
