"""Preparing more pictures than the object store and the driver's memory hold: what the driver's memory reaches, what spills.

    .venv/bin/python benchmarks/prepare_larger_than_memory.py [--gigabytes 2] [--store-megabytes 512] [--size 512]

JPEGs of about a megabyte are made in a temporary folder (a few dozen, each under many names: all are read and decoded) and
prepared through Ray Data by a cluster with a small object store. Run with --gigabytes 0.2 and 2: the driver's peak must not
grow with the rows, beyond 200 bytes for each listed file.
"""

import argparse
import json
import os
import re
import tempfile
import threading
import time
from pathlib import Path

DISTINCT = 24


def make_pictures(folder: Path, nbytes: float) -> int:
    """Fill `folder` with JPEGs of about a megabyte, `nbytes` together; returns how many."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    originals, size = [], 0
    for i in range(DISTINCT):
        light = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
        noisy = np.asarray(light).astype(np.int16) + rng.normal(0, 12, (1200, 1600, 1)).astype(np.int16)
        originals.append(folder / f"{i}.original")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(originals[-1], "JPEG", quality=92)
        size += originals[-1].stat().st_size
    number = max(DISTINCT, round(nbytes * DISTINCT / size))
    for i in range(number):
        file = folder / f"class{i % 3}" / f"{i:06d}.jpg"
        file.parent.mkdir(exist_ok=True)
        os.link(originals[i % DISTINCT], file)
    return number


class PeakMemory(threading.Thread):
    """The most memory of its own, in bytes, that this process had (what it shares with the object store left out)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            own = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
            self.peak = max(self.peak, int(own.split()[1]) * 1024)
            time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of JPEGs")
    parser.add_argument("--store-megabytes", type=int, default=512)
    parser.add_argument("--size", type=int, default=512, help="side of a sample in pixels")
    asked = parser.parse_args()

    import ray
    from ray._private.internal_api import memory_summary

    from blocks import CategoryBlock, DataBlock, ImageBlock, Resize, get_image_files, parent_label
    from cluster import dataloaders
    from cluster.runtime import stop_ray

    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "pictures")
        folder.mkdir()
        number = make_pictures(folder, asked.gigabytes * 1e9)
        os.environ["FASTRAY_CACHE"] = str(Path(home, "cache"))
        os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
        own = ray.init("local", object_store_memory=asked.store_megabytes * 10**6, include_dashboard=False, log_to_driver=False)
        block = DataBlock(
            (ImageBlock(), CategoryBlock()), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(asked.size)
        )
        memory = PeakMemory()
        memory.start()
        began = time.perf_counter()
        prepared = dataloaders(block, folder).prepared
        assert prepared is not None
        assert prepared.rows == number
        spilled = re.search(r"Spilled (\d+) MiB", memory_summary(own.address_info["address"], stats_only=True))
        print(
            json.dumps(
                {
                    "rows": number,
                    "stored_bytes": prepared.nbytes,
                    "peak_bytes_of_the_driver": memory.peak,
                    "seconds": round(time.perf_counter() - began, 1),
                    "spilled_bytes": int(spilled[1]) * 2**20 if spilled else 0,
                }
            )
        )
        stop_ray()


if __name__ == "__main__":
    main()
