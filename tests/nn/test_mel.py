"""Spectrograms against transformers' Kaldi-style ones, and against a plain loop."""
import numpy as np
import pytest
import torch
from reference import reference

from polysense.base.errors import UserError
from polysense.nn.mel import MelSpectrogram, triangles

SPEC = MelSpectrogram.Config(bins=32, frames=20)


def sound(samples: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    t = torch.arange(samples) / 16000
    return 0.3 * torch.sin(2 * torch.pi * 440 * t)[None] + 0.05 * torch.randn(2, samples, generator=g) + 0.1


def test_energies_agree_with_transformers():
    audio_utils = reference("transformers.audio_utils")
    filters = audio_utils.mel_filter_bank(num_frequency_bins=257, num_mel_filters=32, min_frequency=20, max_frequency=8000, sampling_rate=16000,
                                          norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    np.testing.assert_allclose(triangles(32, 512, 16000, 20, 8000).numpy()[:256], filters[:256], atol=1e-5)
    wave = sound(4000)
    for row, got in zip(wave.numpy(), SPEC.build().energies(wave).numpy()):
        want = audio_utils.spectrogram(row - row.mean(), audio_utils.window_function(400, "hann", periodic=False), frame_length=400, hop_length=160,
                                       fft_length=512, power=2.0, center=False, preemphasis=0.97, mel_filters=filters, log_mel="log",
                                       mel_floor=1.192092955078125e-07, remove_dc_offset=True).T
        np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


def test_the_picture_is_normalised_filled_up_with_zeros_or_cut():
    mel = SPEC.build()
    short = mel(sound(1600))
    assert short.shape == (2, 1, 32, 20) and mel.energies(sound(1600)).shape[1] == 8
    torch.testing.assert_close(short[..., 8:], torch.full((2, 1, 32, 12), 4.268 / 9.138))
    torch.testing.assert_close(short[0, 0, :, 3], (mel.energies(sound(1600))[0, 3] + 4.268) / 9.138)
    long = mel(sound(16000))
    assert long.shape == (2, 1, 32, 20)
    assert mel.state_dict() == {}, "nothing of it is learned or stored"


def test_two_seconds_are_204_frames_of_which_six_are_empty():
    mel = MelSpectrogram.Config().build()
    assert mel.energies(sound(32000)).shape == (2, 198, 128) and mel(sound(32000)).shape == (2, 1, 128, 204)


def test_silence_and_loudness():
    mel = SPEC.build()
    assert (mel.energies(torch.zeros(1, 800)) == torch.tensor(1.192092955078125e-07).log()).all()
    wave = sound(4000) - 0.1
    torch.testing.assert_close(mel.energies(2 * wave), mel.energies(wave) + 2 * np.log(2), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mel.energies(wave + 0.3), mel.energies(wave), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("audio", [torch.zeros(800), torch.zeros(1, 0), torch.zeros(1, 300), torch.zeros(1, 800, dtype=torch.int64)])
def test_what_is_no_sound_is_refused_in_one_line(audio):
    with pytest.raises(UserError) as caught:
        SPEC.build()(audio)
    assert "\n" not in str(caught.value)
