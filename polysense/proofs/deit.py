"""A transformer that sees few pictures learns more from them with a convolutional teacher beside the labels.

The teacher, a small ResNet, sees the same 3,000 pictures and labels as the students. Both students are the same network with two tokens and two
heads, on the same batches; without a teacher both heads learn the label. Fewer steps and smaller patches left both students hardly trained, on the
first 2,000 test pictures of a fixed shuffle. The scores are taken on the other pictures.
"""
import torch
import torch.nn.functional as F

from polysense.base.system import System
from polysense.data import source
from polysense.proofs.arms import accuracy, read_all, rest_of, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.backbone import deit, resnet

STEPS, BATCH, LR, TEACHER = 900, 32, 1e-3, 250
METRIC, HIGHER_IS_BETTER = f"mnist accuracy of a ViT 4x96 of patch 7 taught by a ResNet, {STEPS} steps of {BATCH} in three versions", True
DATA = "mnist (3,000 train, 2,000 test)"


def run(seed: int, chosen: bool = True) -> Outcome:
    few, test = some_of(source("mnist"), 3000, seed), (rest_of if chosen else some_of)(source("mnist", split="test"), 2000, 0)
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
