"""Clipping the gradients of units lets a normaliser-free network train at rates at which it diverges without.

The same network is trained at three rates, each four times the last, with and without adaptive clipping. A rate is stable where the network has
learned, which here means that it puts four in ten test pictures into their class. A ResNet with batch norm of about as many weights stands beside
the best of them. Rates and steps were chosen on the first 2,000 test pictures of a fixed shuffle; the scores are taken on the others.
"""
from polysense.base.system import Optim, Preset
from polysense.data import source
from polysense.nn.residual import Pad
from polysense.proofs.arms import drawn, read_all, rest_of, share_right, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.backbone import nfnet, resnet
from polysense.train.fit import Diverged

METRIC, HIGHER_IS_BETTER = "largest rate at which a tiny NFNet trains, 40 steps of 128", True
DATA = "mnist (10,000 train at 32 px, 2,000 test)"
RATES, STEPS, SIZE, LEARNED = (0.1, 0.4, 1.6), 40, 128, 0.4


def run(seed: int, chosen: bool = True) -> Outcome:
    plan = nfnet.tiny().but(**{"stages.0.steps": STEPS, "stages.0.batch_size": SIZE, "stages.0.optim.warmup": 5})
    few = some_of(source("mnist"), 10_000, seed)
    train = read_all(plan.feed, few)
    test = read_all(plan.feed, (rest_of if chosen else some_of)(source("mnist", split="test"), 2000, 0))

    def score(id: str, made: Preset) -> float:
        try:
            arm = train_arm(id, made, few, needs=("image", "label"), seed=seed, batches=drawn(*train, SIZE, seed))
        except Diverged:
            return 0.0
        return share_right(arm.subject.system, *test)

    free = Optim(name="nesterov", lr=0.1, momentum=0.9, weight_decay=2e-5, warmup=plan.stages[0].optim.warmup)
    found = {kind: {rate: score("nfnet", plan.but(**{"stages.0.optim": optim}).but(**{"stages.0.optim.lr": rate})) for rate in RATES}
             for kind, optim in (("with", plan.stages[0].optim), ("without", free))}
    stable = {kind: max((rate for rate, right in scores.items() if right >= LEARNED), default=0.0) for kind, scores in found.items()}
    normed = resnet.tiny().but(config=resnet.cifar_form(14, base=16, shortcut=Pad.Config())).but(
        **{"stages.0.steps": STEPS, "stages.0.batch_size": SIZE, "stages.0.optim.warmup": 5})
    notes = {f"accuracy {kind} clipping at {rate}": right for kind, scores in found.items() for rate, right in scores.items()}
    best = max(found["with"].values())
    beside = score("resnet", normed)
    return Outcome(stable["with"], {"without clipping": stable["without"]}, {
        **notes, "best accuracy with clipping": best, "ResNet with batch norm": beside, "within one point of batch norm": best >= beside - 0.01})
