"""reconstruct and codes, from picture files to picture files."""
import json

import numpy as np
import pytest
from PIL import Image

from polysense.cli import main


def run(*words: object) -> int:
    return main([str(w) for w in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of two steps in vq/ and three pictures in photos/."""
    place = tmp_path_factory.mktemp("codes")
    assert run("train", "vq_vae", "codec.encoder.width=16", "codec.decoder.width=16", "batch_size=8", "prior.depth=1", "prior.width=8",
               "--data", "digits", "--steps", 2, "--out", place / "vq", "--workers", 0) == 0
    assert run("data", "get", "digits", place / "photos", "--split", "test", "-n", 3) == 0
    return place


def test_reconstruct_draws_originals_above_what_is_left_of_them(place, tmp_path, capsys):
    capsys.readouterr()
    assert run("reconstruct", place / "photos", "-m", place / "vq", "--out", tmp_path / "seen.png", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["pictures"]) == 3 and Image.open(tmp_path / "seen.png").size == (3 * 64, 2 * 64)


def test_codes_and_back_are_the_reconstruction(place, tmp_path, capsys):
    import polysense

    capsys.readouterr()
    assert run("codes", place / "photos", "-m", place / "vq", "--out", tmp_path / "c.npz", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    with np.load(tmp_path / "c.npz") as held:
        names, codes = held["path"], held["codes"]
    assert told["pictures"] == 3 and codes.shape == (3, *told["grid"])
    assert run("codes", tmp_path / "c.npz", "-m", place / "vq", "--out", tmp_path / "drawn") == 0
    drawn = sorted((tmp_path / "drawn").glob("*.png"))
    want = polysense.open(place / "vq").reconstruct([str(n) for n in names])
    assert len(drawn) == 3 and all(np.array_equal(np.asarray(Image.open(d)), np.asarray(w)) for d, w in zip(drawn, want, strict=True))


def test_mistakes_are_one_line(place, tmp_path, capsys):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    np.savez(tmp_path / "wild.npz", path=np.array(["a"]), codes=np.full((1, 4, 4), 10 ** 6))
    for words, says in (
            (("reconstruct", tmp_path / "none.png", "-m", place / "vq"), "none.png"),
            (("reconstruct", tmp_path / "empty.png", "-m", place / "vq"), "no bytes"),
            (("codes", place / "photos", "-m", place / "vq", "--out", tmp_path / "c.txt"), ".npz"),
            (("codes", tmp_path / "bad.npz", "-m", place / "vq", "--out", tmp_path / "d"), "cannot read codes"),
            (("codes", tmp_path / "wild.npz", "-m", place / "vq", "--out", tmp_path / "d"), "outside")):
        capsys.readouterr()
        assert run(*words) == 2
        error = capsys.readouterr().err.strip()
        assert says in error and error.count("\n") == 0, error
