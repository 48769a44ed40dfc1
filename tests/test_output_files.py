import errno
import os
from pathlib import Path

import numpy as np
import pytest

from internseg_ds.errors import OutputError
from internseg_ds.output_files import make_folder, whole_file, write_picture


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(OutputError, match="No space left on device"), whole_file(path) as file:
        file.write(b"ne")
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"w")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with whole_file(path) as file:
        file.write(b"new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_taken_is_one_sentence(tmp_path):
    (tmp_path / "a.png" / "inner").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"a\.png cannot be written"):
        write_picture(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(OutputError, match="pipe cannot be written: it is there, and no file"),
        whole_file(tmp_path / "pipe"),
    ):
        pass
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another one"):
        make_folder(tmp_path / "file" / "deep")


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "a.png").symlink_to(tmp_path / "there" / "b.png")
    write_picture(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    assert (tmp_path / "a.png").is_symlink() and (tmp_path / "there" / "b.png").is_file()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_is_read_only_is_one_sentence(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OutputError, match="Read-only file system"), whole_file(tmp_path / "a"):
        pass
