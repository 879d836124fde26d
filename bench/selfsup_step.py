"""One training step (forward, loss, backward, optimiser, moving teacher) of self-supervised rows: SimCLR, MoCo and DINO against lightly, SimMIM and
BEiT against transformers, in one run at equal mathematics.

    python bench/selfsup_step.py [--rounds 3] [--only simclr moco dino simmim_swin simmim_vit beit] [--json docs/proofs/bench_selfsup_step.json]

fp32, pictures in memory. SimCLR and MoCo: ResNet-18 at 96 px, batch 32, lightly's heads and losses on torchvision's network; MoCo's queue holds
4,096 keys. DINO: a ViT of width 192 and 12 blocks at 224 px, two views and six crops of 96 px, batch 2, 8,192 prototypes, on timm's network.
SimMIM: the paper's Swin-B at 192 px, and ViT-B/16 at 224 px; BEiT: ViT-B/16 at 224 px with its codes given, as the
tokenizer is no part of the comparison; batch 8. On a ViT most of the step is the same matrix products on both sides, so that the ratio stays near
one; BEiT's stochastic depth computes nothing for what it drops. Both sides use the same
optimiser of torch. Arms are interleaved, the median of processor seconds is taken. lightly (`pip install --no-deps lightly`) is no dependency:
without it its arms are left out. torchvision need not have compiled operators: their names are declared here, as the tests do.
"""
import argparse
import os
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from filing import PROOFS, goal, medians, write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference import reference

from polysense.base.plan import ImagePlan, ViewPlan
from polysense.base.system import After
from polysense.mechanisms.queue import Queue
from polysense.mechanisms.teacher import Teacher
from polysense.nn.masking import Masking
from polysense.nn.mlp import MLP
from polysense.nn.residual import Basic
from polysense.objectives.codes import masked_ce
from polysense.systems.selfsup import beit, dino, moco, simclr, simmim
from polysense.towers.resnet import ResNet

Step = Callable[[], float]
RESNET = ResNet.Config(layers=(2, 2, 2, 2), block=Basic.Config())
IMAGE = ImagePlan(size=96, mean=(0.5,) * 3, std=(0.5,) * 3)


def stepping(system: Any, loss_of: Callable[[], tuple[Tensor, dict[str, Tensor]]], after: bool, lr: float = 0.01) -> Step:
    """A step of plain SGD with momentum on what is trained; then, of ours, what moves without a gradient."""
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=lr, momentum=0.9)

    def step() -> float:
        loss, keep = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if after:
            system.after_step(After(step=1, progress=0.5, optimizer=optimizer, keep={k: v.detach() for k, v in keep.items()}))
        return float(loss.detach())
    return step


def ours(system: Any, objective: Callable[..., Any], batch: dict[str, Tensor]) -> Step:
    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        found = objective(system.train(), batch)
        return found.total(), found.keep
    return stepping(system, loss, True)


def resnet() -> Any:
    reference("timm")                        # declares the names of torchvision's operators
    from torchvision.models import resnet18
    made = resnet18(weights=None)
    made.fc = torch.nn.Identity()
    return made


def simclr_arms() -> dict[str, Step]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    views = torch.randn(32, 2, 3, 96, 96)
    plan = simclr.tiny()
    mine = simclr.preset(96, plan.data, ViewPlan(size=96), RESNET, MLP.Config(width=512, hidden=512, out=128, act="relu"), 0.1,
                         plan.stages[0]).config.build()
    theirs = torch.nn.ModuleList([resnet(), SimCLRProjectionHead(512, 512, 128, batch_norm=False)])
    criterion = NTXentLoss(temperature=0.1)

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        one, two = (theirs[1](theirs[0](v).flatten(1)) for v in views.unbind(1))
        return criterion(one, two), {}
    return {"simclr": ours(mine, lambda of, batch: of.compare(of.embed(batch)), {"views": views}), "simclr, lightly": stepping(theirs, loss, False)}


def moco_arms() -> dict[str, Step]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum

    views = torch.randn(32, 2, 3, 96, 96)
    mine = moco.MoCo.Config(backbone=RESNET, projector=MLP.Config(width=512, hidden=512, out=128, act="relu"),
                            teacher=Teacher.Config(momentum=0.99), queue=Queue.Config(size=4096, width=128)).build()
    theirs = torch.nn.ModuleList([resnet(), MoCoProjectionHead(512, 512, 128)])
    teacher = deepcopy(theirs)
    deactivate_requires_grad(teacher)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(4096, 128))

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        for a, b in zip(theirs, teacher, strict=True):
            update_momentum(a, b, 0.99)
        query = theirs[1](theirs[0](views[:, 0]).flatten(1))
        with torch.no_grad():
            key, order = batch_shuffle(views[:, 1])
            key = batch_unshuffle(teacher[1](teacher[0](key).flatten(1)), order)
        return criterion(query, key), {}
    return {"moco": ours(mine, moco.MoCo.look_up, {"views": views}), "moco, lightly": stepping(theirs, loss, False)}


def dino_arms() -> dict[str, Step]:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    views, crops = torch.randn(2, 2, 3, 224, 224), torch.randn(2, 6, 3, 96, 96)
    plan = dino.paper().but(**{"config.backbone": dino.tower(224, 16, 192, 12, 3), "config.projector.into": 192, "config.projector.out": 8192,
                               "config.centre.width": 8192})
    theirs, teacher = (torch.nn.ModuleList([
        reference("timm").create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True),
        DINOProjectionHead(192, 2048, 256, 8192, freeze_last_layer=0)]) for _ in range(2))           # old weight norms cannot be copied
    deactivate_requires_grad(teacher)
    criterion = DINOLoss(output_dim=8192)

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        for a, b in zip(theirs, teacher, strict=True):
            update_momentum(a, b, 0.99)
        with torch.no_grad():
            said = [teacher[1](teacher[0](v)) for v in views.unbind(1)]
        return criterion(said, [theirs[1](theirs[0](v)) for v in (*views.unbind(1), *crops.unbind(1))], epoch=1), {}
    return {"dino": ours(plan.config.build(), dino.DINO.losses, {"views": views, "crops": crops}), "dino, lightly": stepping(theirs, loss, False)}


def simmim_arms() -> dict[str, Step]:
    hf, image = reference("transformers"), torch.randn(8, 3, 224, 224)
    mine = simmim.plain_vit_b_16().config.build()
    theirs = hf.ViTForMaskedImageModeling(hf.ViTConfig(encoder_stride=16)).train()

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        return theirs(image, bool_masked_pos=mine.masking(image).mask).loss, {}  # type: ignore[operator]
    return {"simmim vit": ours(mine, simmim.SimMIM.losses, {"image": image}), "simmim vit, transformers": stepping(theirs, loss, False)}


def simmim_swin_arms() -> dict[str, Step]:
    """The paper's own configuration."""
    hf, image = reference("transformers"), torch.randn(8, 3, 192, 192)
    config: Any = simmim.paper().config
    mine: Any = config.build()
    theirs = hf.SwinForMaskedImageModeling(hf.SwinConfig(
        image_size=192, patch_size=4, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=6, encoder_stride=32,
        drop_path_rate=config.encoder.drop_path)).train()

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        return theirs(image, bool_masked_pos=mine.masking(image).mask).loss, {}  # type: ignore[operator]
    return {"simmim swin": ours(mine, simmim.SimMIM.losses, {"image": image}), "simmim swin, transformers": stepping(theirs, loss, False)}


def beit_arms() -> dict[str, Step]:
    hf, image = reference("transformers"), torch.randn(8, 3, 224, 224)
    plan = beit.paper()
    mine: Any = plan.config.build()
    theirs = hf.BeitForMaskedImageModeling(hf.BeitConfig(use_mask_token=True, use_shared_relative_position_bias=True, use_mean_pooling=False,
                                                         layer_scale_init_value=0.1, drop_path_rate=0.1, vocab_size=8192)).train()
    ids = torch.randint(8192, (8, 196))

    def own() -> tuple[Tensor, dict[str, Tensor]]:
        masking: Masking = mine.masking(image)
        return masked_ce(mine.decoder(mine.see(image, masking), masking), ids[masking.mask]), {}

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        mask = mine.masking(image).mask
        return torch.nn.functional.cross_entropy(theirs(image, bool_masked_pos=mask).logits[mask], ids[mask]), {}
    return {"beit": stepping(mine.train(), own, False), "beit, transformers": stepping(theirs, loss, False)}


ARMS = {"simclr": simclr_arms, "moco": moco_arms, "dino": dino_arms, "simmim_vit": simmim_arms, "simmim_swin": simmim_swin_arms, "beit": beit_arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", type=Path, default=PROOFS / "bench_selfsup_step.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    reference("timm")
    seconds: dict[str, float] = {}
    for name in args.only:
        try:
            arms = ARMS[name]()
        except ModuleNotFoundError as missing:
            print(f"{name} is left out: {missing}", flush=True)
            continue
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for round_ in range(args.rounds + 1):
            for arm, step in arms.items():
                start = time.process_time()
                step()
                if round_:                   # the first round warms up
                    times[arm].append(time.process_time() - start)
        seconds |= medians(times)
        print(name, {k: round(v, 3) for k, v in medians(times).items()}, flush=True)
    ratios = {f"{arm} / ours": seconds[arm] / seconds[arm.split(",")[0]] for arm in seconds if "," in arm}
    write(args.json, what="Processor seconds of a training step, fp32; a ratio above 1 is in our favour", settings={"rounds": args.rounds},
          seconds=seconds, ratios=ratios, goals={k: goal(v, least=1.1) for k, v in ratios.items()})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    main()
