"""Zero-shot classification of sounds: the names of the classes, in prompts, are the classifier (Girdhar et al. 2023, table 2)."""
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from polysense.tasks.encode import Progress, encode_each
from polysense.tasks.result import Result
from polysense.tasks.zero_shot import judged

TEMPLATES = ("{}", "the sound of {}", "a sound of {}.")


def run(subject: Any, test: Any, *, templates: str | Sequence[str] = TEMPLATES, names: Sequence[str] | None = None, seed: int = 0,
        progress: Progress | None = None) -> Result:
    """Accuracy of the class whose prompts are nearest to the sound. `subject` also has `read_audios`; `templates` and `names` as in zero_shot."""
    rate = getattr(test, "rate", None)
    seen = encode_each(subject, test, "audio", lambda sound: subject.system.encode_audio(subject.read_audios([sound], rate=rate)), progress)
    return judged("sound_zero_shot", subject, replace(seen, features=seen.features[:, 0] if seen.features.ndim == 3 else seen.features),
                  templates, names, seed)
