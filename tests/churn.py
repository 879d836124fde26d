"""A process that indexes and forgets without end, to be killed. A module of its own, because a fork server has to import it."""
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from colours import pipeline

import polysense.app.index as module


def churn(folder: Path, photos: Path, begun: Event) -> None:
    eye = pipeline()
    encode, serialize = eye.encode_prepared, module.faiss.serialize_index
    eye.encode_prepared = lambda batch: (time.sleep(0.004), encode(batch))[1]
    module.faiss.serialize_index = lambda index: (time.sleep(0.02), serialize(index))[1]      # so that kills fall into writing too
    begun.set()
    while True:
        with module.open_index(folder, eye) as index:
            index.update(photos, eye, batch_size=3)
            index.remove(index.paths()[::2])
