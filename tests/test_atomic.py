"""Writing beside a file and renaming."""

import os

import pytest

from tether import atomic
from tether.atomic import written_beside


def write(target, text):
    with written_beside(target) as beside:
        beside.write_text(text)


def test_the_target_is_the_old_file_until_the_block_ends_well(tmp_path):
    target = tmp_path / "file"
    write(target, "old")
    with pytest.raises(KeyboardInterrupt), written_beside(target) as beside:
        beside.write_text("half")
        assert target.read_text() == "old"
        raise KeyboardInterrupt
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write(target, "new")
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_what_a_dead_process_left_goes_once_it_is_old(tmp_path):
    target = tmp_path / "file"
    left, again = tmp_path / ".0123abcd.file", tmp_path / ".0123abcd..fedc9876.file"
    others = [tmp_path / name for name in (".0123abcd.other", "0123abcd.file", ".backup.file", ".0123abcd.file.txt")]
    for path in (left, again, *others):
        path.write_text("left")
    write(target, "young")
    assert left.exists() and again.exists()
    for path in (left, again, *others):
        os.utime(path, (0, 0))
    write(target, "old")
    assert not left.exists() and not again.exists() and all(path.exists() for path in others)


def test_what_somebody_still_writes_stays_however_old(tmp_path):
    target = tmp_path / "file"
    with written_beside(target) as slow:
        slow.write_text("slow")
        os.utime(slow, (0, 0))
        write(target, "quick")
        assert slow.exists() and target.read_text() == "quick"
    assert target.read_text() == "slow"


def test_without_locks_age_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    left = tmp_path / ".0123abcd.file"
    left.write_text("left")
    os.utime(left, (0, 0))
    write(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "new"
