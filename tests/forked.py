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


def run_python(code, *arguments, folder, **environment):
    """The finished process that ran `code` with these variables set; what it prints is in files of `folder`.

    How many threads OpenMP takes has been read before.
    """
    outputs = [f"{folder}/stdout", f"{folder}/stderr"]
    process = context().Process(target=_run, args=(code, [str(a) for a in arguments], environment, outputs))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        process.join()
    printed = []
    for path in outputs:
        with open(path) as file:
            printed.append(file.read())
    return subprocess.CompletedProcess(arguments, process.exitcode, *printed)


def _run(code, arguments, environment, outputs):
    for stream, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
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
