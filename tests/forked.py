"""Python programs as processes of their own that have the imports behind them: they begin in a tenth of a second.

0. pytest's controller or only process starts the parent, which imports PRELOADED while the tests are collected.
1. `Program` asks it for a child with these words, environment, folder and output.
2. The child leads a session of its own and does what `python WORDS…` does; torchrun gets its ranks in the same way.
3. The parent answers with the process id at once, and with the exit code when there is one.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

PRELOADED = (
    "tasks.train",
    "tasks.evaluate",
    "tasks.search.sweep",
    "data.index.index",
    "data.inspect.inspect",
    "data.pack.pack",
    "mae.export.write",
    "mae.plan.forecast",
    "mae.report.page",
    "torch.distributed.run",
)
ADDRESS = "TESTS_FORKED_AT"  # where the parent listens, for pytest's workers and programs that start programs
LARGEST = 1 << 17  # bytes of a request or an answer


class Program:
    """`python WORDS…`, to be used as subprocess.Popen is."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str],
        cwd: Path | str | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        start_new_session: bool = True,
        attended: bool = False,
    ) -> None:
        """attended  the program is killed when this process ends"""
        assert args[0] == sys.executable and start_new_session, args
        self.args, self.returncode, self.stdout = list(args), None, None
        reading = writing = None
        if stdout == subprocess.PIPE:
            reading, writing = os.pipe()
            self.stdout, stdout = os.fdopen(reading), writing
        outputs = [_descriptor(stdout, 1), _descriptor(stdout if stderr == subprocess.STDOUT else stderr, 2)]
        address = parent()
        request = {"words": self.args[1:], "environment": {**env, ADDRESS: address}, "folder": str(cwd or os.getcwd())}
        request["attended"] = attended
        self._answers = _ask(address, request, outputs)
        if writing is not None:
            os.close(writing)
        pid = self._answers.recv(LARGEST)
        assert pid, "no program can be forked: their parent has ended, see its error"
        self.pid = int(pid)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = int(self._answers.recv(LARGEST))
            self._answers.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            select.select([self._answers], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Returns what was printed, once everything that could print more has ended."""
        said: list[str] = []

        def read(output: IO[str]) -> None:
            with output:
                said.append(output.read())

        reader = threading.Thread(target=read, args=(self.stdout,), daemon=True)
        reader.start()
        reader.join(timeout)
        if not said:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return said[0], None

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def started(self) -> list[int]:
        """Returns the programs that it asked for in its turn: under torchrun its ranks, in their order."""
        with _ask(parent(), {"started by": self.pid}, []) as answer:
            return json.loads(answer.recv(LARGEST))


def sessions() -> dict[int, int]:
    """Returns process → leader of its session, for each process that runs."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has just ended.
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found[int(folder.name)] = int(session)
    return found


def _descriptor(output: IO[Any] | int | None, inherited: int) -> int:
    return inherited if output is None else output if isinstance(output, int) else output.fileno()


def _ask(address: str, request: dict[str, Any], outputs: list[int]) -> socket.socket:
    """Where the answers to a request come."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(f"\0{address}")
    socket.send_fds(connection, [json.dumps({"from": os.getpid()} | request).encode()], outputs)
    return connection


def parent() -> str:
    """Returns where the parent listens; starts it if there is none. It ends with the process that started it."""
    if ADDRESS not in os.environ:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(process.communicate)
        assert process.stdout is not None
        os.environ[ADDRESS] = process.stdout.readline().strip()
    return os.environ[ADDRESS]


def listen() -> socket.socket:
    """Opens a socket of a name that nobody else has, and prints that name."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")
    listener.listen(64)
    print(listener.getsockname()[1:].decode(), flush=True)
    return listener


def preload() -> None:
    """Imports what the programs need, while requests wait. A wrong name ends the parent, a package of an extra that is
    not installed does not."""
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if (missing.name or "").split(".")[0] in {"data", "mae", "tasks", "torch"}:
                raise
    assert threading.active_count() == 1, threading.enumerate()
    gc.freeze()


def serve(listener: socket.socket) -> list[str]:
    """Forks a child for each request, until standard input ends; returns in the child, with its words.

    Children that still run then are killed.
    """
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor that says when it has ended
    attended: dict[socket.socket, int] = {}
    started: dict[int, list[int]] = defaultdict(list)
    while True:
        ready, _, _ = select.select([0, listener, *running, *attended], [], [])
        if 0 in ready:
            for pid, _ in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            sys.exit()
        for ended in running.keys() & set(ready):
            pid, connection = running.pop(ended)
            attended.pop(connection, None)
            _answer(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            connection.close()
            os.close(ended)
        for left in attended.keys() & set(ready):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(attended.pop(left), signal.SIGKILL)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        message, outputs, _, _ = socket.recv_fds(connection, LARGEST, 2)
        request = json.loads(message)
        if "started by" in request:
            _answer(connection, started[request["started by"]])
            connection.close()
            continue
        pid = os.fork()
        if pid == 0:
            for descriptor in (listener, connection, *(other for _, other in running.values())):
                descriptor.close()
            for ended in running:
                os.close(ended)
            _become(request, *outputs)
            return request["words"]
        for descriptor in outputs:
            os.close(descriptor)
        running[os.pidfd_open(pid)] = (pid, connection)
        if request["attended"]:
            attended[connection] = pid
        started[request["from"]].append(pid)
        _answer(connection, pid)


def _answer(connection: socket.socket, contents: int | list[int]) -> None:
    with contextlib.suppress(BrokenPipeError):  # Who asked has been killed.
        connection.send(json.dumps(contents).encode())


def _become(request: dict[str, Any], stdout: int, stderr: int) -> None:
    """Makes this process what was asked for."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the tests ignore under nohup,
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and this one as a job of a script
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None  # what the parent has found follows from its own TMPDIR
    # The temporary folders that imports have made are the parent's to remove.
    for finalizer in list(weakref.finalize._registry):  # pyright: ignore[reportAttributeAccessIssue]
        finalizer.atexit = False
    if wandb := sys.modules.get("wandb.sdk.data_types._private"):
        atexit.unregister(wandb.MEDIA_TMP.cleanup)


def run(words: list[str]) -> None:
    """Does what `python WORDS…` does."""
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # pyright: ignore[reportAttributeAccessIssue]
        words = words[1:]
    if words[0] != "-m":
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")
        return
    sys.argv, sys.path[0] = words[1:], os.getcwd()
    if words[1] == "torch.distributed.run":
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
        from torch.distributed.run import main as torchrun

        subprocess_handler.Popen = Program  # pyright: ignore[reportAttributeAccessIssue]
        torchrun(words[2:])
    else:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def end(code: str | int | None) -> NoReturn:
    """Ends the process as sys.exit does, without taking apart what was imported, which would take seconds."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    try:
        listening = listen()
        preload()
        run(serve(listening))
    except SystemExit as ended:
        end(ended.code)
    end(0)
