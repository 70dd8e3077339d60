"""One command starts a script on the ranks of a machine, and says which of them failed."""

import os
import signal
import sys
from pathlib import Path

import pytest
from windtunnel.experiments import cli
from windtunnel.experiments.launch import LaunchError, launch

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "train.py"

REPORT = """
import os, pathlib, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
path = pathlib.Path(sys.argv[1]) / os.environ["RANK"]
path.write_text(" ".join([*(os.environ[name] for name in names), *sys.argv[2:]]))
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("stated", "threads", "wanted"), [("7", None, 7), ("7", 2, 2), (None, None, None)])
def test_what_each_rank_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str | None, threads: int | None, wanted: int | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if stated is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", stated)
    launch(written(tmp_path, REPORT), [str(tmp_path), "--lr", "0.1"], ranks=3, threads=threads)
    share = wanted or max(1, (os.cpu_count() or 1) // 3)
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text() == f"{rank} {rank} 3 127.0.0.1 {share} --lr 0.1"
    assert os.environ.get("OMP_NUM_THREADS") == stated


@pytest.mark.parametrize(
    ("ending", "how"),
    [
        ("sys.exit(7)", "exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("raise ValueError('on purpose')", "exit code 1"),
    ],
)
def test_the_rank_that_failed_is_named(tmp_path: Path, ending: str, how: str) -> None:
    script = written(
        tmp_path,
        f"import os, signal, sys, time\nif os.environ['RANK'] == '1':\n    {ending}\ntime.sleep(60)\n",
    )
    with pytest.raises(LaunchError, match=rf"^rank 1 of 2 ended with {how}: .*script\.py$"):
        launch(script, ranks=2)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["windtunnel", "launch", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_example_trains(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--ranks", "2", str(EXAMPLE), "--zero", "3", "--epochs", "2") == 0
    lines = capfd.readouterr().out.splitlines()  # nothing but what the script prints
    assert [line.partition(": loss ")[0] for line in lines] == ["epoch 0", "epoch 1"]
    assert all(line.endswith(" on 2 ranks") for line in lines)
    first, last = (float(line.split()[3]) for line in lines)
    assert last < first


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    script = written(tmp_path, "import os, sys\nprint('out')\nsys.exit(int(os.environ['RANK']))\n")
    assert command(monkeypatch, "--ranks", "2", str(script)) == 3
    answer = capfd.readouterr()
    assert set(answer.out.split()) == {"out"}
    assert answer.err == f"windtunnel: rank 1 of 2 ended with exit code 1: {script}\n"
    for words, message in {
        ("--ranks", "0", str(script)): "ranks = 0; allowed: an integer >= 1",
        ("--ranks", "2", "--threads", "0", str(script)): "threads = 0; allowed: an integer >= 1",
        ("--ranks", "2", "no.py"): "script = 'no.py'; allowed: the path of a Python file",
    }.items():
        assert command(monkeypatch, *words) == 2
        assert capfd.readouterr().err == f"windtunnel: {message}\n"


def test_the_handlers_of_signals_are_the_callers(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    launch(written(tmp_path, ""), ranks=1)
    assert signal.getsignal(signal.SIGTERM) == before
