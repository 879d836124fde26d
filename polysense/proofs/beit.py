"""What stood in the hidden patches of a photograph: BEiT names their codes better than the commonest code and than the nearest visible neighbour.

A VQ-VAE of 64 codes is trained on the photographs at 32 px, then BEiT on its codes at 64 px. Noted beside it, for the entry's control: the
accuracy on cifar10 after fine-tuning on 500 labels, of this tower and of one from scratch, at equal steps. Sized on the last 800 training
pictures; the score is taken on the set's own test part, which no choice was made on.
"""
import torch
from torch import Tensor

from polysense.base.system import Preset, System
from polysense.data import source
from polysense.proofs.arms import accuracy, few_of_each, train_arm
from polysense.proofs.codecs import code_counts, pictures
from polysense.proofs.harness import Outcome
from polysense.systems.generate import vq_vae
from polysense.systems.selfsup import beit
from polysense.train.starts import carry

METRIC, HIGHER_IS_BETTER = "accuracy of the code of hidden patches (64 codes, 8x8, about 38 % hidden)", True
DATA = "tiny_imagenet40 at 64 px (5,000 train, 800 test); cifar10 (500 labels, 2,000 test) for the control"


def quick(preset: Preset, steps: int, batch_size: int = 32) -> Preset:
    return preset.but(**{"stages.0.steps": steps, "stages.0.batch_size": batch_size, "stages.0.optim.warmup": steps // 10})


def smaller(preset: Preset, tower: str) -> Preset:
    return preset.but(**{f"config.{tower}.body.width": 64, f"config.{tower}.body.depth": 3, f"config.{tower}.body.heads": 2})


def nearest_visible(ids: Tensor, mask: Tensor, side: int) -> Tensor:
    """ids, mask [B,N] -> [B,N]: at every place the code of the visible patch that lies nearest (of several the first)."""
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    distance = torch.cdist(place, place)[None].expand(len(ids), -1, -1).masked_fill(mask[:, None], torch.inf)
    return ids.gather(1, distance.argmin(-1))


def compare(seed: int, train, test, labelled, exam, steps: int = 800) -> Outcome:
    codec = train_arm("vq_vae", quick(vq_vae.small(), 400, 16), train, needs=("image",), seed=seed).subject
    common = int(code_counts(codec, train).argmax())
    plan = smaller(quick(beit.tiny(), steps), "encoder").but(**{"stages.0.optim.lr": 3e-3})

    def stand(system: System) -> None:
        carry(plan.starts[0], codec, system)  # type: ignore[arg-type]

    made = train_arm("beit", plan, train, needs=("image",), seed=seed, prepare=stand).subject
    right, model = torch.zeros(3), made.system
    torch.manual_seed(seed)
    with torch.inference_mode():
        for image in pictures(test, made):
            masking = model.masking(image)
            ids, hidden = model.target.ids(image).flatten(1), masking.mask
            said = model.decoder.whole(model.see(image, masking)).argmax(-1)
            guesses = (said, torch.full_like(ids, common), nearest_visible(ids, hidden, 8))
            right += torch.tensor([float((g == ids)[hidden].float().mean()) * len(image) for g in guesses])
    right /= len(test)

    few = few_of_each(labelled, 50, seed)
    control = {}
    for name in ("pre-trained", "from scratch"):
        fine = smaller(quick(beit.tiny_finetune(), 60), "backbone").but(**{"config.head.into": 64, "config.head.out": 10})

        def start(system: System, fine: Preset = fine, name: str = name) -> None:
            if name == "pre-trained":
                carry(fine.starts[0], made, system)  # type: ignore[arg-type]

        tuned = train_arm("beit", fine, few, needs=("image", "label"), seed=seed, prepare=start).subject
        control[f"cifar10 accuracy of 500 labels, {name}"] = accuracy(tuned, exam)
    return Outcome(float(right[0]), {"the commonest code": float(right[1]), "the nearest visible patch's code": float(right[2])}, control)


def run(seed: int) -> Outcome:
    return compare(seed, source("tiny_imagenet40"), source("tiny_imagenet40", split="test"), source("cifar10"), source("cifar10", split="test"))
