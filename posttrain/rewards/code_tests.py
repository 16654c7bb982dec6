"""Code: 1 if the program in a completion passes its tests, else 0. It runs in a process of its own (confine.py).

Limits are the processor's time, wall-clock time, memory, the size of each written file and open files; there is no
network and no second process. They hold back accidents and the usual cheating, not an attacker: what the user's files
allow, the program may do, and its tests run in its own process, so a program made to fool them can. Hence the explicit
`allow_execution`.
"""

import contextlib
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posttrain.rewards.text import Completion, check_column, text_of

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


class CodeTests:
    """A reward function that runs programs against the column `tests`: Python that raises if something is wrong.

    Args:
        allow_execution: must be True: code that a model wrote is run on this machine.
        seconds: of processor time and, with one more to start, of wall-clock time for each program.
        memory: bytes of address space for each.
        workers: programs at once; by default as many as there are processors.

    Raises:
        ValueError: unless `allow_execution`, or if programs can't be confined here, with the reason.
    """

    def __init__(
        self, *, allow_execution: bool = False, seconds: int = 5, memory: int = 1 << 30, workers: int | None = None
    ) -> None:
        if allow_execution is not True:
            raise ValueError("CodeTests runs code that a model wrote; say allow_execution=True if that is meant")
        self.__name__ = "code_tests"
        self._seconds = seconds
        self._memory = memory
        self._workers = workers or os.cpu_count() or 1
        ended, complaint = self._run("pass", "pass")
        if not ended:
            raise ValueError(f"CodeTests can't confine programs on this machine: {complaint or 'they do not end'}")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        tests: Sequence[str | None],
        **columns: Any,
    ) -> list[float | None]:
        """1.0, 0.0, or None where there are no tests. The last fenced block is the program, else all of the text."""
        check_column("tests", tests, completions, "code_tests")

        def score(pair: tuple[Completion, str | None]) -> float | None:
            completion, checks = pair
            return None if checks is None else float(self._run(program_of(text_of(completion)), checks)[0])

        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(score, zip(completions, tests, strict=True)))

    def _run(self, program: str, tests: str) -> tuple[bool, str]:
        """(whether program and tests came to their end, the last line of what went wrong)."""
        token = secrets.token_hex(16)  # an early exit doesn't know it
        reader, writer = os.pipe()
        limits = [str(writer), str(self._seconds), str(self._memory)]
        with _folder() as folder, tempfile.TemporaryFile() as complaint:
            process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("confine.py")), *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=complaint,
                pass_fds=[writer],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
            os.close(writer)
            try:
                self._talk(process, reader, program, [tests, token])
            except (subprocess.TimeoutExpired, BrokenPipeError):
                pass
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            os.set_blocking(reader, False)
            ended = _read(reader) == token.encode()
            complaint.seek(max(0, complaint.seek(0, os.SEEK_END) - 4096))
            lines = complaint.read().decode(errors="replace").strip().splitlines()
        os.close(reader)
        return ended, lines[-1] if lines else ""

    def _talk(self, process: subprocess.Popen[bytes], reader: int, program: str, rest: list[str]) -> None:
        """Hand over the program and, when it has ended, the rest."""
        deadline = time.monotonic() + self._seconds + 1
        assert process.stdin is not None
        with process.stdin as sink:
            sink.write(json.dumps(program).encode() + b"\n")
            sink.flush()
            poll = select.poll()
            poll.register(reader, select.POLLIN)
            if poll.poll(1000 * (self._seconds + 1)) and os.read(reader, 1):
                sink.write(json.dumps(rest).encode() + b"\n")
        process.wait(max(0.0, deadline - time.monotonic()))


def program_of(text: str) -> str:
    """The last fenced block of Python in `text`, or all of it."""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder; it goes however many folders lie in one another, which Python's removal can't do."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        with contextlib.suppress(RecursionError):
            folder.cleanup()
        if os.path.exists(folder.name):
            subprocess.run(["rm", "-rf", "--", folder.name], stderr=subprocess.DEVNULL, check=False)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except BlockingIOError:
        return b""
