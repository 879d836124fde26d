"""Pictures of every kind to tensors: decoding, geometry, and agreement with torchvision's / transformers' CLIP preprocessing."""
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from reference import reference

from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan
from polysense.data.images import decode, fit, read_images, window
from polysense.data.sources import BadPicture

PLAN = ImagePlan(size=32)


def photo(w: int = 61, h: int = 47, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (h // 4 + 1, w // 4 + 1, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", **how) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **how)
    return out.getvalue()


def test_same_picture_as_path_bytes_array_tensor_and_pil(tmp_path):
    p = photo()
    (tmp_path / "图 片.png").write_bytes(encoded(p))
    a = np.asarray(p)
    t = torch.from_numpy(a.copy())
    named = tmp_path / "图 片.png"
    items = [named, str(named), encoded(p), a, t, t.permute(2, 0, 1), p, a.astype(np.float32) / 255, a.astype(np.uint16) * 257]
    out = read_images(PLAN, items)
    assert out.shape == (9, 3, 32, 32) and out.dtype == torch.float32 and all(torch.equal(out[0], o) for o in out)


def test_picture_behind_an_address(tmp_path):
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *a): ...

    (tmp_path / "a.png").write_bytes(encoded(photo()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        assert np.array_equal(decode(f"{base}/a.png"), np.asarray(photo()))
        with pytest.raises(BadPicture, match="cannot fetch"):
            decode(f"{base}/none.png")
    finally:
        server.shutdown()


def test_grey_palette_transparent_cmyk_and_deep_pictures_decode_rightly():
    grey = photo().convert("L")
    assert np.array_equal(np.asarray(decode(encoded(grey)))[..., 1], np.asarray(grey))
    clear = photo().convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(61)[None] < 30, 0, 255).repeat(47, 0).astype(np.uint8)))
    out = np.asarray(decode(encoded(clear)))
    assert (out[:, :30] == 255).all() and np.array_equal(out[:, 30:], np.asarray(photo())[:, 30:])                # on white
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.paste(1, (4, 0, 8, 8))
    out = np.asarray(decode(encoded(palette, transparency=0)))
    assert (out[:, :4] == 255).all() and (out[:, 4:] == (200, 0, 0)).all()
    cmyk = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert cmyk.mode == "RGB" and np.asarray(cmyk)[8, 8, 0] > 200 and np.asarray(cmyk)[8, 8, 1] < 60
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024)
    out = np.asarray(decode(encoded(Image.fromarray(deep))))
    assert np.abs(out[..., 0].astype(int) - deep / 257).max() <= 1 and out.max() > 240
    assert np.asarray(decode(encoded(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"))).max() == 255
    assert decode(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation_is_applied(turn: int):
    upright = photo(40, 24)
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(undo[turn]) if turn > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    assert np.array_equal(np.asarray(decode(encoded(stored, exif=exif))), np.asarray(upright))


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("make", [lambda: b"", lambda: b"this is no picture", lambda: encoded(photo(200, 200), "JPEG")[:1500], bomb,
                                  lambda: encoded(photo())[:60], lambda: np.zeros((3, 4, 5, 6)), lambda: np.zeros((0, 4, 3)), lambda: 7,
                                  lambda: "no/such/file.png", lambda: "."])
def test_what_is_no_picture_is_refused_with_a_reason(make):
    with pytest.raises(BadPicture) as error:
        decode(make())
    assert isinstance(error.value, UserError) and error.value.advice


@pytest.mark.parametrize("size", [(61, 47), (47, 61), (32, 32), (20, 20), (33, 100), (500, 37)])
def test_agrees_with_open_clip_and_transformers(size):
    pictures = [photo(*size, seed=s) for s in range(2)]
    ours = read_images(PLAN, pictures)
    transform = reference("open_clip.transform").image_transform(32, is_train=False)
    assert (ours - torch.stack([transform(p) for p in pictures])).abs().max() < 1e-5
    clip = reference("transformers").CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = clip(pictures, return_tensors="pt")["pixel_values"]
    # transformers resizes tensors in place of PIL pictures: at most a grey level or two apart (one is 0.015)
    assert (ours - theirs).abs().max() < 0.05


def test_squash_keeps_the_whole_picture_and_crop_the_middle():
    bars = Image.fromarray(np.concatenate([np.full((32, 32, 3), v, np.uint8) for v in (0, 128, 255)], 1))
    middle = np.asarray(fit(bars, PLAN))
    whole = np.asarray(fit(bars, ImagePlan(size=32, fit="squash")))
    assert (middle[:, 4:-4] == 128).all() and whole[0, 0, 0] < 10 and whole[0, -1, 0] > 245
    assert window(bars.size, PLAN) == (1 / 3, 0.0, 2 / 3, 1.0) and window(bars.size, ImagePlan(size=32, fit="squash")) == (0, 0, 1, 1)


def test_bilinear_and_normalisation():
    plan = ImagePlan(size=16, resample="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
    out = read_images(plan, [Image.new("RGB", (64, 64), (255, 0, 127))])
    assert torch.allclose(out[0, :, 8, 8], torch.tensor([2.0, -2.0, (127 / 255 - 0.5) / 0.25]))
    assert not torch.equal(read_images(plan, [photo()]), read_images(plan.but(resample="bicubic"), [photo()]))
    assert read_images(PLAN, []).shape == (0, 3, 32, 32)


def test_large_jpegs_may_be_decoded_at_a_reduced_scale():
    big = encoded(photo(800, 600), "JPEG", quality=95)
    small = decode(big, at_least=100)
    assert 100 <= min(small.size) < 600 and decode(big).size == (800, 600)
    a, b = (np.asarray(p.resize((40, 30), Image.Resampling.BICUBIC), dtype=float) for p in (small, decode(big)))
    assert np.abs(a - b).mean() < 3
