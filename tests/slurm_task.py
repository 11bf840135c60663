"""A rank of SLURM or mpirun whose program is forked from the tests' parent: `slurm_task.py WORDS…` for `python`.

The launcher sees this process: it passes on the signals that it gets (SIGRTMIN as SIGSTOP, which it cannot get
itself), takes the program with it when it is killed, and ends as the program has ended. SLURM_TASK_PROGRAM replaces the
program of the batch script.
"""

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

from tests.forked import Program  # noqa: E402

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

if __name__ == "__main__":
    words = [sys.executable, os.environ.get("SLURM_TASK_PROGRAM", sys.argv[1]), *sys.argv[2:]]
    # The nodes have names in their own mount namespace, which is not that of the tests.
    address = {"MASTER_ADDR": "127.0.0.1"} if "SLURM_JOB_ID" in os.environ else {}
    program = Program(words, os.environ | address, attended=True)
    for signum in PASSED_ON:
        signal.signal(signum, lambda number, _: program.send_signal(number))
    signal.signal(signal.SIGRTMIN, lambda number, _: program.send_signal(signal.SIGSTOP))
    code = program.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
