"""Programs run confined: what passes, what is stopped, and that cheating doesn't pay."""

import os
import sys
import tempfile
import time

import pytest

from posttrain.rewards import CodeTests
from posttrain.rewards.code_tests import program_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")

RIGHT = "def f(x): return x + 1\n"
CHECK = "assert f(1) == 2"


@pytest.fixture(scope="module")
def reward():
    return CodeTests(allow_execution=True, seconds=1, memory=1 << 29, workers=2)


def score(reward, program: str, tests: str | None = CHECK):
    return reward(["?"], [f"Here it is:\n```python\n{program}\n```\n"], [[1]], tests=[tests])[0]


def test_right_wrong_and_without_tests(reward):
    assert score(reward, RIGHT) == 1.0
    assert score(reward, "def f(x): return x") == 0.0
    assert score(reward, "def f(x) return x") == 0.0
    assert score(reward, RIGHT, None) is None


@pytest.mark.parametrize(
    "before",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "x = bytearray(2**31)",
        "import socket; socket.socket()",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.kill(os.getppid(), 0)",
        "open('a', 'w').write('x' * 2**22)",
        "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
        "import fcntl; fcntl.fcntl(0, 10, 10)",  # F_SETSIG
        "import fcntl, os, struct; fcntl.fcntl(0, 15, struct.pack('ii', 1, os.getppid()))",  # F_SETOWN_EX
        "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
        "import ctypes; assert ctypes.CDLL(None).msgget(0, 0o1600) >= 0",
        "import ctypes; assert ctypes.CDLL(None).semget(0, 1, 0o1600) >= 0",
    ],
)
def test_stopped(reward, before):
    assert score(reward, f"{before}\n{RIGHT}") == 0.0


def test_the_filter_answers_system_calls(reward):
    """With its own error, not with the one that a bad argument has without it."""
    owner = "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nc.{}\nassert ctypes.get_errno() == 1\n"
    for call in ("ioctl(-1, 0x8901, 0)", "ioctl(-1, 0x8902, 0)", "fcntl(-1, 8, 0)", "shmat(-1, None, 0)"):
        assert score(reward, owner.format(call), "pass") == 1.0, call


@pytest.mark.skipif(os.getuid() != 0, reason="only root has capabilities to lose")
def test_root_is_not_above_the_limits(reward):
    assert score(reward, "import os\nopen(f'/proc/{os.getppid()}/environ').read()", "pass") == 0.0
    assert score(reward, "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')", "pass") == 0.0
    assert score(reward, "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", "pass") == 0.0


def test_tests_and_token_come_after_the_program(reward):
    walk = """
import sys
frame = sys._getframe()
while frame := frame.f_back:
    assert "here they" + " are" not in repr(frame.f_locals), frame
"""
    assert score(reward, walk, "'here they are'") == 1.0
    cheat = "import sys\nsys._getframe(1).f_locals['work']['tests'] = 'pass'"
    assert score(reward, cheat, "assert False") == 0.0


def test_input_is_empty(reward):
    assert score(reward, "import sys\nassert sys.stdin.read() == ''\n" + RIGHT) == 1.0


def test_folders_in_folders_are_removed(reward, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert score(reward, "import os\nfor _ in range(1500): os.mkdir('d'); os.chdir('d')", "pass") == 1.0
    assert not list(tmp_path.iterdir())


def test_time_is_limited(reward):
    started = time.perf_counter()
    both = ["while True: pass", "import time; time.sleep(60)"]
    assert reward(["?"] * 2, both, tests=["pass"] * 2) == [0.0, 0.0]
    assert time.perf_counter() - started < 20


def test_threads_and_endless_output_are_no_matter(reward):
    threads = "import threading\nt = threading.Thread(target=print); t.start(); t.join()\n"
    assert score(reward, threads + RIGHT) == 1.0
    assert score(reward, "for _ in range(10**5): print('x' * 100)\n" + RIGHT) == 1.0


def test_the_environment_is_not_handed_on(reward, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "1")
    assert score(reward, "import os\nassert 'SECRET_KEY' not in os.environ\n" + RIGHT) == 1.0


def test_it_must_be_asked_for():
    with pytest.raises(ValueError, match="allow_execution=True"):
        CodeTests()


def test_a_machine_that_cannot_confine_is_an_error(monkeypatch):
    monkeypatch.setattr("posttrain.rewards.code_tests.sys.executable", "/bin/false")
    with pytest.raises(ValueError, match="can't confine programs on this machine"):
        CodeTests(allow_execution=True)


def test_the_last_block_is_the_program():
    assert program_of("a\n```python\nx = 1\n```\n```py\nx = 2\n```") == "x = 2\n"
    assert program_of("x = 3") == "x = 3"
