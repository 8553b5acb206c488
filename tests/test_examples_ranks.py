"""The examples of several ranks, under torchrun: they are short, the numbers are those of one process, and a
training that lost a rank ends with the loss of one that nobody disturbed.
"""

import os
import re
import signal
import time
from pathlib import Path

import forked
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("train_*.py"))

pytestmark = pytest.mark.slow


def torchrun(folder, ranks, script, *arguments, restarts=0):
    """The running torchrun, which prints into `folder`."""
    pytest.importorskip("sklearn", reason='the examples need pip install "torch-fastreg[test]"')
    folder.mkdir()
    options = "--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--monitor-interval", "0.1"
    script = ("-m", "fastreg") if script == "fastreg" else (EXAMPLES / script,)
    code = "from torch.distributed.run import main; main()"
    variables = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return forked.start(code, *options, *script, *arguments, folder=folder, **variables)


def output_of(process, folder):
    done = forked.finished(process, folder, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def ran(folder, *arguments):
    return output_of(torchrun(folder, *arguments), folder)


def numbers_in(output):
    found = [float(number) for number in re.findall(r"\d+\.\d+", output)]
    assert found, output
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_they_are_short(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60 and lines[0].startswith('"""') and "torchrun" in "".join(lines[:6])


def test_data_parallel(tmp_path):
    (right,) = numbers_in(ran(tmp_path / "out", 2, "train_ddp.py"))
    assert right > 80  # percent


def test_the_demo_runs_once(tmp_path):
    for package in ("matplotlib", "PIL", "rich"):
        pytest.importorskip(package, reason='the demo needs pip install "torch-fastreg[demo]"')
    arguments = "demo", "--quick", "--only", "dropout", "--out", tmp_path / "report"
    output = ran(tmp_path / "out", 2, "fastreg", *arguments)
    assert output.count("index.html") == 1 and (tmp_path / "report" / "index.html").is_file()


def test_tensor_parallel_is_one_process(tmp_path):
    one, two = (numbers_in(ran(tmp_path / str(ranks), ranks, "train_tensor_parallel.py")) for ranks in (1, 2))
    assert len(one) == 6 and one == pytest.approx(two, abs=2e-3)


def workers_of(pid):
    """The processes that torchrun has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes of a rank are found in /proc")
def test_a_rank_is_killed_and_the_training_ends_as_if_not(tmp_path):
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    (want,) = numbers_in(ran(tmp_path / "first", 2, "train_fsdp.py", folders[0]))
    process = torchrun(tmp_path / "second", 2, "train_fsdp.py", folders[1], restarts=1)
    while not (folders[1] / "step-0040").exists() and process.is_alive():
        time.sleep(0.02)
    victims = workers_of(process.pid)
    os.kill(victims[-1], signal.SIGKILL)
    output = output_of(process, tmp_path / "second")
    assert numbers_in(output) == [want] and len(victims) == 2
    assert int(re.search(r"steps (\d+) to", output)[1]) in (40, 80)  # it did not begin anew
