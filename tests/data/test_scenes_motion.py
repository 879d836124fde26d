"""Clips move as they are said to; sounds sound as they are said to."""
import re
from dataclasses import replace

import numpy as np
import pytest

from polysense.data.scenes import motion, sound
from polysense.data.scenes.paint import paint
from polysense.data.scenes.palette import COLOURS, SHAPES
from polysense.data.scenes.source import ScenesSource


def actor(clip: motion.Clip, frames: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """(centroid x y [T,2], area [T]) in the picture of the thing that acts: the last one, nearest."""
    masks = [paint(clip.at(u), 96).masks()[-1] for u in np.linspace(0, 1, frames)]
    where = np.array([np.argwhere(m).mean(0)[::-1] / 96 for m in masks])
    return where, np.array([m.sum() for m in masks])


@pytest.mark.parametrize("action", motion.ACTIONS)
def test_the_actor_does_what_the_caption_says(action: str):
    source, found = ScenesSource("scenes:clips?seed=4"), 0
    for i in range(12):
        clip = motion.animate(source.scene(i), source.stream(i, 9), action)
        if clip.action != action:
            continue
        found += 1
        where, area = actor(clip)
        step, change = np.diff(where, axis=0), where[-1] - where[0]
        t = clip.scene.things[-1]
        assert all(t.colour in c and t.shape in c for c in clip.captions) and len(clip.captions) >= 3
        assert all(0 < m < 1 for m in where.ravel())
        if action.startswith("moves"):
            along, sign = (0 if action.endswith(("left", "right")) else 1), (1 if action.endswith(("right", "down")) else -1)
            assert (sign * step[:, along] > 0.02).all() and abs(change[1 - along]) < 0.01
            words = {"moves left": "left", "moves right": "right", "moves up": "up|rises", "moves down": "down|sinks"}
            assert all(re.search(rf"\b({words[action]})\b", c) for c in clip.captions)
        elif action.startswith("turns"):
            turned = [clip.at(u).things[-1].angle for u in (0, 0.5, 1)]
            assert (np.diff(turned) > 0).all() == (action == "turns clockwise") and np.abs(change).max() < 0.12
        elif action in ("grows", "shrinks"):
            assert (np.diff(area) > 0).all() if action == "grows" else (np.diff(area) < 0).all()
        elif action == "bounces":
            assert where[:, 1].min() < where[0, 1] - 0.15 and abs(change[1]) < 0.02 and np.abs(step[:, 0]).max() < 0.02
        else:
            first, last = clip.at(0).things, clip.at(1).things
            assert np.allclose([(first[0].x, first[0].y), (first[1].x, first[1].y)], [(last[1].x, last[1].y), (last[0].x, last[0].y)])
    assert found >= 3


def test_clockwise_is_clockwise_on_the_screen():
    """The tip of an arrow that points right goes down first."""
    source = ScenesSource("scenes:clips?shapes=arrow&style=plain&objects=1")
    clip = motion.animate(source.scene(0), source.stream(0, 9), "turns clockwise")
    t = clip.scene.things[0]
    tip = [t.r * np.array([np.cos(a), np.sin(a)]) for a in (t.angle, t.angle + 0.3)]
    assert tip[0][0] * tip[1][1] - tip[0][1] * tip[1][0] > 0       # y down: positive is clockwise as seen
    for angle, point in zip((t.angle, t.angle + 0.3), tip):
        mask = paint(replace(clip.scene, things=(replace(t, angle=angle, x=0.5, y=0.5),)), 96).masks()[0]
        x, y = (96 * (0.5 + 0.95 * point)).astype(int)
        assert mask[y, x], "the tip is where the angle says"


def test_a_film_starts_with_the_image_and_only_the_actor_moves():
    source = ScenesSource("scenes:clips?size=32&style=plain&seed=8")
    for i in range(20):
        s, clip = source[i], source.clip(i)
        assert s["video"].shape == (8, 32, 32, 3) and s["video"].dtype == np.uint8
        assert np.array_equal(s["video"][0], s["image"]) and s["label"] == motion.ACTIONS.index(clip.action)
        assert (s["video"][1:] != s["video"][0]).any()
        still = [[t for t in clip.at(u).things[:-1]] for u in (0, 0.3, 1)] if clip.action != "swap" else [[]]
        assert all(x == still[0] for x in still)


def test_all_actions_are_drawn():
    labels = ScenesSource("scenes:clips?n=400").labels()
    assert np.bincount(labels, minlength=len(motion.ACTIONS)).min() >= 8


def spectrum_peak(wave: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 8 * len(wave)))
    return float(power.argmax() * sound.RATE / (8 * len(wave)))


def bursts(wave: np.ndarray) -> list[tuple[int, int]]:
    """Where it sounds: runs of 10 ms windows louder than the noise."""
    loud = np.sqrt((wave[:len(wave) // 160 * 160].reshape(-1, 160) ** 2).mean(1)) > 0.012
    ends = np.flatnonzero(np.diff(np.concatenate([[0], loud.astype(int), [0]])))
    return [(160 * a, 160 * b) for a, b in zip(ends[::2], ends[1::2])]


def test_the_pitch_is_the_colour_and_the_beeps_are_counted():
    source, counts = ScenesSource("scenes:sounds?seed=6"), set()
    for i in range(40):
        s, scene = source[i], source.scene(i)
        t, n = scene.things[0], len(scene.things)
        assert len({(o.colour, o.shape) for o in scene.things}) == 1 and s["audio"].dtype == np.float32 and s["audio"].shape == (16000,)
        assert np.abs(s["audio"]).max() <= 1
        runs = bursts(s["audio"])
        assert len(runs) == n, (n, runs)
        assert abs(12 * np.log2(spectrum_peak(s["audio"][slice(*runs[0])]) / sound.PITCH[t.colour])) < 0.35, "within a third of a semitone"
        word = ("once", "twice", "three times", "four times")[n - 1]
        assert any(t.colour in c and t.shape in c for c in s["captions"]) and any(word in c or "beep" in c or "sound" in c for c in s["captions"])
        counts.add(n)
    assert counts == {1, 2, 3, 4}


def test_pitches_and_timbres_tell_apart():
    pitches = np.array([sound.PITCH[c] for c in COLOURS])
    assert (12 * np.diff(np.log2(pitches)) > 1.9).all()
    spectra = {}
    for shape in SHAPES:
        power = np.abs(np.fft.rfft(sound.beep(shape, 220.0, 0.5)))
        spectra[shape] = power / np.linalg.norm(power)
    for a in SHAPES:
        for b in SHAPES:
            assert a == b or spectra[a] @ spectra[b] < 0.985, (a, b)


def test_many_things_and_digits_sound_too():
    source = ScenesSource("scenes:sounds?objects=6&seconds=2")
    assert max(len(source.scene(i).things) for i in range(30)) > 4 and source[0]["audio"].shape == (32000,)
    digits = ScenesSource("scenes:digits").scene(0)
    assert np.abs(sound.play(digits, 1.0, np.random.default_rng(0))).max() < 0.05
