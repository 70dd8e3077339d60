"""Files are whole or absent."""

import csv
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.experiments.files import write_csv, write_whole


@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_what_is_written_is_there(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    path = tmp_path_factory.mktemp("files") / "new" / "folders" / "file.bin"
    assert write_whole(path, content) == path
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_others_may_read_it(tmp_path: Path) -> None:
    # A temporary file is private; the file that a user finds should not be.
    assert write_whole(tmp_path / "file", "text").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failure_leaves_the_old_file_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = write_whole(tmp_path / "result.csv", "old")
    reached = []

    def fail(*arguments: object) -> None:
        reached.append(path.read_text())
        raise OSError("the disk is full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_whole(path, "new")
    assert reached == ["old"]  # until the very end a reader finds the old content
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "result.csv", "new")
    assert list(tmp_path.iterdir()) == []


cells = st.one_of(st.integers(), st.text(alphabet="abc ,;\"'é", max_size=6))
tables = st.integers(1, 3).flatmap(lambda width: st.lists(st.tuples(*[cells] * width), min_size=1, max_size=4))


@given(tables)
def test_a_table_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int | str, ...]]) -> None:
    names = [f"column {number}" for number in range(len(rows[0]))]
    path = tmp_path_factory.mktemp("tables") / "table.csv"
    write_csv(path, [dict(zip(names, row, strict=True)) for row in rows])
    with path.open(encoding="utf-8", newline="") as file:
        header, *read = csv.reader(file)
    assert header == names
    assert read == [[str(cell) for cell in row] for row in rows]
