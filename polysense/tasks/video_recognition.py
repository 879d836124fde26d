"""Recognition of what happens in videos: the mean of the probabilities over several views of each (Tong et al. 2022, VideoMAE, appendix: 5 clips of 3
crops on Kinetics-400, 2 of 3 on Something-Something)."""
from typing import Any

import numpy as np
from torch import Tensor

from polysense.base.errors import UserError
from polysense.data.sources import BadSample
from polysense.tasks.encode import Progress, frozen, name_of
from polysense.tasks.result import Result, classification


def run(subject: Any, test: Any, *, clips: int = 1, crops: int = 1, seed: int = 0, progress: Progress | None = None) -> Result:
    """`clips` of each video, from its beginning to its end, and `crops` of each clip. `subject` also has `read_video_views`."""
    rows, labels, skipped = list[np.ndarray](), list[int](), list[list[str]]()
    with frozen(subject.system):
        for i in range(len(test)):
            try:
                sample = test[i]
                if (label := int(sample.get("label", -1))) < 0:
                    continue
                rows.append(averaged(subject.system.classify_video(subject.read_video_views(sample["video"], clips, crops))))
                labels.append(label)
            except BadSample as bad:
                skipped.append([bad.id, bad.reason])
            if progress:
                progress(i + 1, len(test))
    if not rows:
        raise UserError(f"no video of {test.name!r} with a label can be read", skipped[0][1] if skipped else "use data with labels")
    scores, label = np.stack(rows), np.array(labels)
    names = tuple(test.classes) or tuple(str(i) for i in range(scores.shape[1]))
    if scores.shape[1] != len(names) or label.max() >= len(names):
        raise UserError(f"this system knows {scores.shape[1]} classes, {test.name!r} has {max(len(names), int(label.max()) + 1)}",
                        "use the data whose classes it was trained on")
    notes = {**({"skipped": skipped} if skipped else {}), "clips": clips, "crops": crops}
    return classification("video_recognition", name_of(subject), test.name, scores, label, names, seed=seed, notes=notes)


def averaged(logits: Tensor) -> np.ndarray:
    """Logits [V,C] of the views of one video -> the logarithm of their mean probability [C]."""
    if not logits.isfinite().all():
        raise UserError("classify_video returned numbers that are not finite", "the weights are damaged, or its training diverged")
    return (logits.float().log_softmax(-1).logsumexp(0)).cpu().numpy()
