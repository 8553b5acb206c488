"""Every script in examples/ is short, runs, and has something to say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Those of several ranks, train_*.py, are run by test_examples_ranks.py.
FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if not path.stem.startswith("train_"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example(script, tmp_path):
    for package in ("mlxtend", "sklearn"):
        pytest.importorskip(package, reason='the examples need pip install "torch-fastreg[test]"')
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40 and lines[0].startswith('"""')
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", script],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        timeout=120,  # 15 s on a machine of its own
    )
    assert done.returncode == 0, done.stderr
    assert any(character.isdigit() for character in done.stdout)  # it shows a number
    assert not list(tmp_path.iterdir())  # and leaves nothing behind


def test_there_are_examples():
    assert len(SCRIPTS) >= 5
