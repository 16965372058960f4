"""Writing the groups of a corpus."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from genemodel.corpus import store


def test_threads_of_one_process_write_every_chunk(tmp_path, monkeypatch):
    """A Dask worker writes with several threads; zarr's settings belong to the process."""
    both = threading.Barrier(2)
    plain = store._plain

    def meet(frame):
        # Both threads are inside at once, if anything lets them; the first one leaves first.
        try:
            if "n_genes" in frame and both.wait(0.05) == 1:
                time.sleep(0.3)
        except threading.BrokenBarrierError:
            both.reset()
        return plain(frame)

    monkeypatch.setattr(store, "_plain", meet)
    obs = pd.DataFrame({"n_genes": np.zeros(3, np.int32)}, index=list("abc"))
    var = pd.DataFrame({"symbol": pd.array(["A", "B"], "string")}, index=["a", "b"])
    counts = np.zeros(0, np.int32)

    def write(name):
        store.write_group(tmp_path, name, counts, counts, np.zeros(4, np.int64), obs, var)

    with ThreadPoolExecutor(2) as pool:
        for i in range(0, 8, 2):
            list(pool.map(write, [f"dataset_{i}", f"dataset_{i + 1}"]))
    for i in range(8):
        assert (tmp_path / f"dataset_{i}" / "obs" / "n_genes" / "c" / "0").is_file()
        assert (tmp_path / f"dataset_{i}" / "var" / "symbol" / "mask" / "c" / "0").is_file()
