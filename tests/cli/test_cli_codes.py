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
    sheet = np.asarray(Image.open(tmp_path / "seen.png")).astype(float) / 255
    assert len(told["pictures"]) == 3 and sheet.shape == (2 * 64, 3 * 64, 3)
    squares = ((sheet[:64] - sheet[64:]) ** 2).reshape(64, 3, 64, 3).mean((0, 2, 3))
    np.testing.assert_allclose(told["psnr"], -10 * np.log10(squares), atol=1e-3)
    assert len(told["ssim"]) == 3 and all(-1 <= v < 1 for v in told["ssim"])
    assert run("reconstruct", place / "photos", "-m", place / "vq", "--out", tmp_path / "seen.png") == 0
    assert f"PSNR {sum(told['psnr']) / 3:.2f} dB, SSIM" in capsys.readouterr().out.replace("\n", " ")


def test_encode_with_tokens_is_codes_and_the_exam_counts_them(place, tmp_path, capsys):
    photo = sorted((place / "photos").rglob("*.*"))[0]
    said = []
    for words in (("codes", photo), ("encode", photo, "--tokens")):
        capsys.readouterr()
        assert run(*words, "-m", place / "vq") == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]
    assert run("encode", place / "photos", "--tokens", "-m", place / "vq", "--out", tmp_path / "all.npz") == 0 and (tmp_path / "all.npz").is_file()
    assert run("encode", place / "photos", "--tokens", "-m", place / "vq", "--workers", 2) == 2 and "--workers" in capsys.readouterr().err
    assert run("exam", place / "vq", "reconstruction", "--data", "digits", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["psnr"]["value"] > 0 and 1 <= told["notes"]["codes in use"] <= told["notes"]["codes"]


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


def test_ids_go_to_standard_output_and_back_to_the_same_picture(place, tmp_path, capsys):
    import polysense

    photo = sorted((place / "photos").rglob("*.*"))[0]
    capsys.readouterr()
    assert run("codes", photo, "-m", place / "vq") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == [str(photo)]
    (tmp_path / "ids.json").write_text(json.dumps(told))
    (tmp_path / "grid.json").write_text(json.dumps(told["codes"][0]))           # of any origin: one grid, without a name
    want = np.asarray(polysense.open(place / "vq").reconstruct([str(photo)])[0])
    for name in ("ids", "grid"):
        assert run("decode", tmp_path / f"{name}.json", "-m", place / "vq", "--out", tmp_path / f"{name}.png") == 0
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{name}.png")), want)
    assert run("codes", place / "photos", "-m", place / "vq", "--out", tmp_path / "all.json", "--json") == 0
    assert run("decode", tmp_path / "all.json", "-m", place / "vq", "--out", tmp_path / "drawn") == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 3


def test_mistakes_are_one_line(place, tmp_path, capsys):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    (tmp_path / "broken.json").write_text("[[1, 2")
    (tmp_path / "ragged.json").write_text("[[1, 2], [3]]")
    (tmp_path / "half.json").write_text("[[0.5, 1.0]]")
    (tmp_path / "two.json").write_text(json.dumps(np.zeros((2, 4, 4), int).tolist()))
    np.savez(tmp_path / "wild.npz", path=np.array(["a"]), codes=np.full((1, 4, 4), 10 ** 6))
    for words, says in (
            (("reconstruct", tmp_path / "none.png", "-m", place / "vq"), "none.png"),
            (("reconstruct", tmp_path / "empty.png", "-m", place / "vq"), "no bytes"),
            (("codes", place / "photos", "-m", place / "vq", "--out", tmp_path / "c.txt"), ".npz"),
            (("codes", tmp_path / "bad.npz", "-m", place / "vq", "--out", tmp_path / "d"), "cannot read codes"),
            (("decode", tmp_path / "none.json", "-m", place / "vq"), "none.json"),
            (("decode", tmp_path / "broken.json", "-m", place / "vq"), "cannot read codes"),
            (("decode", tmp_path / "ragged.json", "-m", place / "vq"), "cannot read codes"),
            (("decode", tmp_path / "half.json", "-m", place / "vq"), "whole numbers"),
            (("decode", tmp_path / "two.json", "-m", place / "vq", "--out", tmp_path / "one.png"), "give a folder"),
            (("codes", tmp_path / "wild.npz", "-m", place / "vq", "--out", tmp_path / "d"), "outside")):
        capsys.readouterr()
        assert run(*words) == 2
        error = capsys.readouterr().err.strip()
        assert says in error and error.count("\n") == 0, error
