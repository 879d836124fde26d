"""A transformer that sees few photographs learns more from them with a convolutional teacher beside the labels.

The teacher, a small ResNet, sees the same 3,000 photographs and labels as the students. Both students are the same network with two tokens and two
heads, on the same batches; without a teacher both heads learn the label. On handwritten digits, tried before, the teacher says what the labels say,
and it did not help. Sizes were chosen on training photographs set aside; the test part is read once.
"""
import torch
import torch.nn.functional as F

from polysense.base.system import System
from polysense.data import source
from polysense.proofs.arms import accuracy, read_all, rest_of, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.backbone import deit, resnet

STEPS, BATCH, LR, TEACHER = 900, 32, 1e-3, 800
METRIC, HIGHER_IS_BETTER = f"cifar10 accuracy of a ViT 4x96 of patch 7 taught by a ResNet, {STEPS} steps of {BATCH} in three versions", True
DATA = "cifar10 at 28 px (3,000 train, 2,000 test)"


def run(seed: int, chosen: bool = True) -> Outcome:
    train = source("cifar10")
    test = some_of(source("cifar10", split="test"), 2000, 0) if chosen else some_of(train, 4000, 9)
    few = some_of(train if chosen else rest_of(train, 4000, 9), 3000, seed)
    made = train_arm("resnet", resnet.tiny().but(**{"stages.0.steps": TEACHER, "stages.0.batch_size": 64}), few, needs=("image", "label"), seed=seed)
    teacher = made.subject.system.state_dict()

    def prepare(system: System) -> None:
        system.teacher.module.load_state_dict(teacher)  # type: ignore[operator, union-attr]

    plan = deit.tiny().but(config=deit.tiny().config.but(vision=deit.tower(28, 7, 96, 4, 3))).but(**{
        "stages.0.steps": STEPS, "stages.0.batch_size": BATCH, "stages.0.optim.lr": LR})
    taught = train_arm("deit", plan, few, needs=("views", "label"), seed=seed, prepare=prepare).subject
    alone = train_arm("deit", plan.but(**{"stages.0.objective": deit.DeiT.alone}), few, needs=("views", "label"), seed=seed).subject
    with torch.inference_mode():
        tokens = taught.system.vision(read_all(plan.feed, some_of(test, 500, 0))[0]).tokens
        likeness = float(F.cosine_similarity(tokens[:, 0], tokens[:, 1]).mean())
    return Outcome(accuracy(taught, test), {"without a teacher": accuracy(alone, test)}, {
        "accuracy of the teacher": accuracy(made.subject, test), "cosine of the two tokens": likeness})
