"""Forks processes for the tests out of one that has imported everything: an import costs more than a small run.

Reads a line of JSON for each group of processes and answers with two: their ids, and their statuses in the end.
"""

import json
import os
import runpy
import signal
import sys
from typing import Any

import matplotlib.figure  # noqa: F401
import monai.bundle  # noqa: F401
import sklearn.linear_model  # noqa: F401
import torch._dynamo  # which the optimisers import
import torch.utils.tensorboard  # noqa: F401

import dissect_monai  # noqa: F401


def fork(process: dict[str, Any]) -> int:
    """Id of a new process; 0 in that process, which is then as if started in its folder with its environment."""
    if pid := os.fork():
        return pid
    os.chdir(process["cwd"])
    os.environ.update(process["environment"])
    sys.argv, sys.path[0] = process["arguments"], process["cwd"]
    signal.alarm(600)  # ends it if it hangs
    for number, path in enumerate((os.devnull, process["stdout"], process["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    return 0


def statuses(pids: list[int]) -> list[int]:
    """Of a group, in the order of their ends; when one of it fails, the others, who would wait for it, are ended."""
    found: dict[int, int] = {}
    while len(found) < len(pids):
        pid, status = os.wait()
        found[pid] = os.waitstatus_to_exitcode(status)
        if found[pid]:
            for other in {*pids} - {*found}:
                os.kill(other, signal.SIGTERM)
    return [*found.values()]


def is_forked() -> bool:
    """Serve until no more lines come, in which case this is the process that was started, or a fork of it."""
    for line in sys.stdin:
        pids = []
        for process in json.loads(line):
            pids.append(fork(process))
            if not pids[-1]:
                return True
        print(json.dumps(pids), flush=True)
        print(json.dumps(statuses(pids)), flush=True)
    return False


if __name__ == "__main__" and is_forked():
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
