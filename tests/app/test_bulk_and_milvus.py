import os
import sys
from pathlib import Path

import numpy as np
import pytest
from colours import paint, pipeline

from polysense.app.files import find_photos
from polysense.base.errors import UserError

COLOURS = ["red", "green", "blue", "yellow"]


@pytest.fixture
def photos(tmp_path):
    for i in range(8):
        paint(tmp_path / "photos" / f"d{i % 3}" / f"{i}-{COLOURS[i % 4]} é'\".png", COLOURS[i % 4], salt=i)
    (tmp_path / "photos" / "torn.jpg").write_bytes(b"torn")
    (tmp_path / os.fsdecode(b"photos/latin-\xe9.png")).write_bytes(paint(tmp_path / "m.png", "magenta").read_bytes())
    return tmp_path / "photos"


@pytest.mark.slow
def test_milvus_gives_what_faiss_gives(photos, tmp_path):
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite", exc_type=ImportError)
    from polysense.app.index import open_index
    from polysense.app.milvus import open_milvus
    from polysense.app.search import search

    eye, uri = pipeline(), str(tmp_path / "milvus.db")
    with pytest.raises(UserError, match="no collection"):
        open_milvus(uri, "pictures")
    with open_milvus(uri, "pictures", eye, photos) as far, open_index(tmp_path / "near", eye) as near:
        for act in ("first", "changed"):
            if act == "changed":
                paint(photos / "d0" / "0-red é'\".png", "blue", salt=50)
                (photos / "d1" / "1-green é'\".png").unlink()
                paint(photos / "new.png", "cyan")
                os.utime(photos / "d2" / "2-blue é'\".png", (5, 5))
            one, two = far.update(photos, eye, batch_size=3), near.update(photos, eye)
            assert one.to_json() == two.to_json() and len(one.skipped) == 1
            assert far.paths() == near.paths() and len(far) == len(near)
            assert any("latin" in p for p in far.paths())
            for query in ("red", "a blue yellow thing", "magenta"):
                a, b = search(far, eye, query, 20, why=False), search(near, eye, query, 20, why=False)
                assert {h.path for h in a} == {h.path for h in b} and np.allclose([h.score for h in a], [h.score for h in b], atol=1e-4)
        assert far.remove([photos / "d0", photos / "none.png"]) == near.remove([photos / "d0"]) == 3
        assert far.paths() == near.paths()
    with open_milvus(uri, "pictures", base=photos) as again:
        assert again.dim == 4 and Path(search(again, eye, "cyan", 1)[0].path).name == "new.png"
        with pytest.raises(UserError, match="made with model"):
            search(again, pipeline(gain=0.5), "red")


def opener():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from colours import pipeline
    return pipeline()


def start(ray) -> None:
    """Ray gives its own processes 30 seconds, too few where all cores are busy: it gets three chances."""
    for chance in range(3):
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
            return
        except Exception as error:
            ray.shutdown()
            if chance == 2 or "timed out" not in str(error):
                raise


@pytest.mark.slow
def test_ray_encodes_what_the_pipeline_encodes(photos, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    cloudpickle = pytest.importorskip("ray.cloudpickle")

    from polysense.app.bulk import encode_folder_with_ray

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    told = []
    start(ray)
    try:
        report = encode_folder_with_ray(photos, opener, tmp_path / "o" / "out.npz", batch_size=4, progress=lambda *p: told.append(p))
        encode_folder_with_ray(photos, opener, tmp_path / "out.parquet", batch_size=16)
    finally:
        ray.shutdown()
    data, eye = np.load(tmp_path / "o" / "out.npz"), pipeline()
    want = [p for p, _, _ in find_photos(photos) if not p.endswith("torn.jpg")]
    assert data["path"].tolist() == sorted(want) and told[-1] == (10, 10)
    assert np.allclose(data["vector"], eye.encode(images=sorted(want)), atol=1e-6)
    assert (report.encoded, report.dim, [Path(p).name for p, _ in report.skipped]) == (9, 4, ["torn.jpg"])
    import pyarrow.parquet
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.num_rows == 9 and np.allclose(np.stack(table["vector"].to_numpy(zero_copy_only=False)), data["vector"])


def test_bulk_refuses_what_it_cannot_write(tmp_path):
    from polysense.app.bulk import encode_folder_with_ray
    with pytest.raises(UserError, match=r"npz or \.parquet"):
        encode_folder_with_ray(tmp_path, opener, tmp_path / "o.txt")
    with pytest.raises(UserError, match="no pictures"):
        encode_folder_with_ray(tmp_path, opener, tmp_path / "o.npz")


def test_without_the_extra_the_user_is_told(monkeypatch, tmp_path):
    from polysense.app.milvus import open_milvus
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(UserError, match=r"pip install 'polysense\[milvus\]'"):
        open_milvus(str(tmp_path / "m.db"))
