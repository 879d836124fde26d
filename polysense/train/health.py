"""Whether a run is collapsing, in numbers on the way and in words.

What a system says of its health (`System.health`) is looked at every few steps. A number that stays where no healthy run has it, several looks in a
row, is warned of once in a sentence; it is warned of again only after it was well in between.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

EVERY, LOOKS = 10, 3                         # steps between two looks; ill at so many in a row is ill

Health = Mapping[str, float]

# name -> (whether these numbers are ill, what to say of them)
SIGNS: dict[str, tuple[Callable[[Health], bool], str]] = {
    "feature_spread": (lambda h: h["feature_spread"] < 0.1,
                       "the spread of the features is {feature_spread:.2g} where 1 is healthy: collapsing onto one point"),
    "effective_rank": (lambda h: 0 < h["effective_rank"] < 1.5, "the features fill {effective_rank:.2g} dimensions: collapsing onto a line"),
    "answers_used": (lambda h: h["answers_used"] < 1.5 and h["teacher_entropy"] < 0.5,
                     "the teacher's entropy is {teacher_entropy:.2g} and it says the same of every picture: collapsing onto one answer"),
    "teacher_certainty": (lambda h: h["teacher_certainty"] < 0.02,
                          "the teacher's entropy is {teacher_entropy:.3g}, that of no knowledge at all: collapsing onto the uniform answer"),
    "share_of_codes": (lambda h: h["share_of_codes"] < 0.02,
                       "{codes_used:.2g} codes are in even use, {share_of_codes:.1%} of the codebook: it is collapsing"),
}


@dataclass
class Watch:
    """Remembers how often each sign was ill in a row."""
    ill: dict[str, int] = field(default_factory=dict)

    def say(self, health: Health) -> list[str]:
        """What there is to say of the numbers of one look."""
        out = []
        for name, (is_ill, words) in SIGNS.items():
            if name not in health:
                continue
            self.ill[name] = self.ill.get(name, 0) + 1 if is_ill(health) else 0
            if self.ill[name] == LOOKS:
                out.append(words.format(**health))
        return out
