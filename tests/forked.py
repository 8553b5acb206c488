"""Processes that begin at once: each is a fork of one that has imported torch, which takes seconds.

That one has not imported fastreg, so that each of its forks reads the environment anew.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import traceback


def context():
    """What `multiprocessing` starts such processes with."""
    # Threads that wait for others must not burn the time of other processes. OpenMP reads this when it is
    # loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.tensor"])
    return multiprocessing.get_context("forkserver")


def start(code, *arguments, folder, **environment):
    """A process that runs `code` with these variables set and prints into `folder`.

    How many threads OpenMP takes has been read before.
    """
    process = context().Process(
        target=_run, args=(code, [str(a) for a in arguments], environment, str(folder))
    )
    process.start()
    return process


def finished(process, folder, timeout=600):
    """What `subprocess.run` gives of a process that `start` has started; one that takes longer is killed."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    printed = []
    for name in ("stdout", "stderr"):
        with open(f"{folder}/{name}", encoding="utf-8") as file:
            printed.append(file.read())
    return subprocess.CompletedProcess([], process.exitcode, *printed)


def _run(code, arguments, environment, folder):
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    status = 1
    with contextlib.suppress(BaseException):
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
