"""Sounds of scenes: one beep a thing, its colour is the pitch and its shape the timbre."""
from dataclasses import replace

import numpy as np

from polysense.data.scenes.palette import COLOURS, NUMBERS, SHAPES
from polysense.data.scenes.say import a, noun, plural
from polysense.data.scenes.world import Scene

RATE = 16000                                                      # samples a second
PITCH = {c: 220.0 * 2 ** (k / 6) for k, c in enumerate(COLOURS)}   # whole tones up from A3: 220 Hz (red) to 784 Hz (black)


def _timbres() -> dict[str, np.ndarray]:
    """Amplitudes of the first eight partials of each shape: a fixed lot, the fundamental always the strongest."""
    rng = np.random.Generator(np.random.Philox(key=7))
    partials = rng.random((len(SHAPES), 8)) ** 2 * 0.85
    partials[:, 0] = 1
    for i in range(len(SHAPES)):
        partials[i, 1 + i % 7] = 0.85                             # neighbours differ in their second strongest partial at least
    partials[0, 1:] = 0                                           # the circle is a pure tone
    return dict(zip(SHAPES, partials / partials.sum(1, keepdims=True)))


TIMBRE = _timbres()
_ENVELOPE = {s: (0.005 + 0.03 * (k % 3 == 1), (1.0, 4.0, 9.0)[k % 3]) for k, s in enumerate(SHAPES)}     # attack in seconds, decay a beep
_TIMES = ("never", "once", "twice", "three times", "four times")


def alike(scene: Scene) -> Scene:
    """The things of the first one's kind: what is seen is what is heard."""
    kind = scene.things[0].colour, scene.things[0].shape
    return replace(scene, things=tuple(t for t in scene.things if (t.colour, t.shape) == kind))


def beep(shape: str, frequency: float, seconds: float) -> np.ndarray:
    """One tone, float32 [seconds * RATE], peak at most 1."""
    t = np.arange(int(seconds * RATE)) / RATE
    wave = TIMBRE[shape] @ np.sin(2 * np.pi * frequency * np.arange(1, 9)[:, None] * t)
    attack, decay = _ENVELOPE[shape]
    shape_of = np.minimum(1, t / attack) * np.exp(-decay * t / seconds) * np.clip((seconds - t) / 0.01, 0, 1)
    return (wave * shape_of).astype(np.float32)


def play(scene: Scene, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """The things from left to right, one beep each, in equal slots of a quarter of the time (fewer where there are more); a little noise.

    float32 [seconds * RATE] in [-1, 1]; digits are silent.
    """
    things = sorted((t for t in scene.things if t.writing < 0), key=lambda t: t.x)
    total = int(seconds * RATE)
    out = (0.003 * rng.standard_normal(total)).astype(np.float32)
    slot = seconds / max(4, len(things))
    loud, detune = rng.uniform(0.5, 0.9), 2 ** (rng.uniform(-0.1, 0.1) / 12)
    for k, t in enumerate(things):
        tone = loud * beep(t.shape, PITCH[t.colour] * detune, 0.72 * slot)
        start = int((k + 0.1) * slot * RATE)
        out[start:start + len(tone)] += tone
    return np.clip(out, -1, 1)


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """True sentences about the sound of a scene of one kind, in an order drawn by `rng`."""
    n, t = len(scene.things), scene.things[0]
    beeps = "one beep" if n == 1 else f"{NUMBERS[n]} beeps"
    said = [f"{a(noun(t))} beeps {_TIMES[n] if n < len(_TIMES) else f'{NUMBERS[n]} times'}", f"{beeps} of {a(noun(t))}",
            f"the sound of {a(noun(t)) if n == 1 else f'{NUMBERS[n]} {t.colour} {plural(t.shape)}'}",
            f"{a(noun(t))} sounds {NUMBERS[n]} time{'s' * (n > 1)}"]
    return [said[i] for i in rng.permutation(len(said))]
