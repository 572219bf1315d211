"""A URL becomes a file system and a path in it, by whichever library knows its scheme."""

from pathlib import Path

import pytest

from blocks.errors import UserError
from blocks.storage import filesystem, is_url, shown


@pytest.mark.parametrize("address", ["s3://bucket/a", "file:///a", "memory://a", "gs://a/b"])
def test_urls(address: str) -> None:
    assert is_url(address)


@pytest.mark.parametrize("address", ["/a/b", "~/a", "a", "C:\\a", "", "a/b://c"])
def test_paths_are_no_urls(address: str) -> None:
    assert not is_url(address)


def test_a_file_url_is_the_folder(tmp_path: Path) -> None:
    fs, path = filesystem(f"file://{tmp_path}")
    with fs.open_output_stream(f"{path}/a") as out:
        out.write(b"here")
    assert (tmp_path / "a").read_bytes() == b"here"


def test_settings_stand_in_the_query() -> None:
    _, path = filesystem("s3://bucket/a/b?endpoint_override=http%3A%2F%2F127.0.0.1%3A9&region=us-east-1")
    assert path == "bucket/a/b"


def test_fsspec_knows_more_schemes() -> None:
    fs, path = filesystem("memory://things")
    fs.create_dir(path)
    with fs.open_output_stream(f"{path}/a") as out:
        out.write(b"there")
    assert filesystem("memory://things/a")[0].open_input_file("/things/a").read() == b"there"


@pytest.mark.parametrize("url", ["nowhere://key:hunter2@a/b?token=hunter2", "file://key:hunter2@host/b?token=hunter2"])
def test_a_url_that_leads_nowhere_is_named_without_its_secrets(url: str) -> None:
    with pytest.raises(UserError, match=r"\*\*\*@") as caught:
        filesystem(url)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in shown(url)
