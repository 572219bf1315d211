"""What all tests share: a cache and a working folder of their own, seeds, and a handful of real digits as image files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from blocks import CategoryBlock, DataBlock, ImageBlock, Normalize, RandomSplitter, Resize, get_image_files, parent_label


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is read from or left in the person's folders; returns the working folder."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("FASTRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("FASTRAY_STORAGE", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return home


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same random numbers for each test, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 real handwritten digits of the classes 0, 1 and 2 as PNG files in three class folders."""
    return write_few_digits(tmp_path_factory.mktemp("few") / "digits")


def write_few_digits(root: Path) -> Path:
    """Those of `few_digits`."""
    data = load_digits(n_class=3)
    for number, (pixels, label) in enumerate(zip(data.images[:120], data.target[:120], strict=True)):
        file = root / str(label) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(file)
    return root


@pytest.fixture(scope="session")
def ray_running() -> Iterator[None]:
    """One Ray of the test session's own, for the tests that need it: of four CPUs, on however many there are."""
    from cluster.runtime import start_ray, stop_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 4}')
        start_ray()
    yield
    stop_ray()


@pytest.fixture
def bucket() -> Iterator[str]:
    """An empty S3 bucket on this machine, as a URL that carries its keys."""
    pytest.importorskip("moto.server")
    import boto3
    from moto.server import ThreadedMotoServer

    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys).create_bucket(Bucket="shared")
    yield f"s3://testing:testing@shared?endpoint_override=http%3A%2F%2F{host}%3A{port}&region=us-east-1"
    server.stop()


@pytest.fixture
def digits_block() -> DataBlock:
    """The DataBlock that reads `few_digits` as 16x16 colour pictures."""
    return DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=Resize(16),
        batch_tfms=Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )
