"""Run one program, confined, and report whether it came to its end. Run as a script of its own by code_tests.py.

    python -I confine.py <descriptor> <cpu seconds> <bytes of memory>

reads a line with the program from standard input, in JSON, runs it, writes a line to the descriptor, reads a line with
[tests, token], runs the tests, and writes the token. So neither is in the process until the program has ended.

Before the program runs, this process gives up: more time, memory, open files and bytes in a file than the limits say;
all capabilities, where root has them; and, by a seccomp filter that nothing can take off again, new processes, other
programs, sockets, shared memory, io_uring, and signals to or system calls that look into other processes. Files, and
those in /proc, stay what their permissions say; and the tests run in a process that the program had to itself, where it
may have changed anything. This is no jail for malice, but for accidents.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

_X86 = {
    "arch": 0xC000003E,
    "deny": (41, 57, 58, 59, 62, 101, 129, 165, 200, 234, 272, 297, 308, 310, 311, 321, 322, 424, 425, 434),
    "shared": (29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 220, 240),  # System V's memory, messages, semaphores; mq_open
    "clone": 56,
    "prlimit": 302,
    "fcntl": 72,
    "ioctl": 16,
}
_ARM = {
    "arch": 0xC00000B7,
    "deny": (40, 97, 117, 129, 130, 131, 138, 198, 221, 240, 268, 270, 271, 280, 281, 424, 425, 434),
    "shared": (180, 186, 187, 188, 189, 190, 191, 192, 193, 194, 195, 196),
    "clone": 220,
    "prlimit": 261,
    "fcntl": 25,
    "ioctl": 29,
}
_MACHINES = {"x86_64": _X86, "aarch64": _ARM}
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_X32 = 0x40000000
_LOAD, _JUMP_EQUAL, _JUMP_ABOVE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50000 + 38
_NUMBER, _ARCH, _ARGUMENT, _COMMAND = 0, 4, 16, 24  # where they lie in struct seccomp_data
_SIGNALS = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902)}  # F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP


def rules(machine: dict) -> list[tuple[int, int, int, int]]:
    """The filter: (code, jump if true, jump if false, value) of each instruction."""
    lines = [(_LOAD, 0, 0, _ARCH), (_JUMP_EQUAL, 1, 0, machine["arch"]), (_RETURN, 0, 0, _KILL)]
    lines += [(_LOAD, 0, 0, _NUMBER), (_JUMP_ABOVE, 0, 1, _X32), (_RETURN, 0, 0, _EPERM)]
    for number in (*machine["deny"], *machine["shared"]):
        lines += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    lines += [(_JUMP_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ENOSYS)]  # the C library then tries clone
    lines += [(_JUMP_EQUAL, 0, 4, machine["prlimit"]), (_LOAD, 0, 0, _ARGUMENT), (_JUMP_EQUAL, 0, 1, 0)]
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]  # its own limits, nobody else's
    for call, commands in _SIGNALS.items():
        lines += [(_JUMP_EQUAL, 0, 2 + 2 * len(commands), machine[call]), (_LOAD, 0, 0, _COMMAND)]
        for command in commands:
            lines += [(_JUMP_EQUAL, 0, 1, command), (_RETURN, 0, 0, _EPERM)]
        lines += [(_RETURN, 0, 0, _ALLOW)]
    lines += [(_JUMP_EQUAL, 0, 3, machine["clone"]), (_LOAD, 0, 0, _ARGUMENT), (_JUMP_SET, 1, 0, _CLONE_THREAD)]
    return [*lines, (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]


def confine() -> None:
    """Give up what the module's text says, for good. Raises `OSError` where that can't be had."""
    machine = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None:
        raise OSError(f"no seccomp filter for {sys.platform} on {platform.machine()}")
    lines = rules(machine)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxP" if struct.calcsize("P") == 8 else "HxxP", len(lines), ctypes.addressof(code))
    library = ctypes.CDLL(None, use_errno=True)
    if library.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)):  # version 3, this process; none
        raise OSError(ctypes.get_errno(), f"capset failed: {os.strerror(ctypes.get_errno())}")
    prctl = library.prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    buffer = ctypes.create_string_buffer(program)
    for option, value, pointer in ((38, 1, 0), (22, 2, ctypes.addressof(buffer))):  # no new privileges; the filter
        if prctl(option, value, pointer, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl({option}) failed: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    """Read the work, confine this process, do it."""
    descriptor, seconds, memory = map(int, sys.argv[1:])
    source = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the program's input is empty
    program = json.loads(source.readline())
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 1 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    confine()
    space = {"__name__": "__main__"}
    exec(compile(program, "<completion>", "exec"), space)
    os.write(descriptor, b"\n")
    tests, token = json.loads(source.readline())
    exec(compile(tests, "<tests>", "exec"), space)
    os.write(descriptor, token.encode())


if __name__ == "__main__":
    main()
