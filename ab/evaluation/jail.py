"""Runs one Python program with almost everything taken away that a program may do: a process of its own runs this file,
and it imports nothing of ssv.

It takes three things away, in this order: more time and memory than it was given (setrlimit), files outside of its own
folder and Python's library (Landlock, Linux 5.13), and system calls by which it would reach the network, other
processes, or the machine's settings (seccomp). None of them takes root, and a kernel that lacks one is reported: the
program is not run then. What is taken away cannot be given back to a process.

`ssv.ab.evaluation.programs` starts it, and says what this does not protect from.

Usage: python jail.py REPORT_FD CPU_SECONDS MEMORY_MB, in the folder of `program.py`; a token on stdin.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import runpy
import struct
import sys
import sysconfig
from collections.abc import Sequence

PROGRAM = "program.py"
MAX_FILE_BYTES = 16 << 20
MAX_OPEN_FILES = 64
MAX_WORDS = 300
"""Characters of what is said of a program that failed."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of `FORBIDDEN`, and the number by which seccomp knows the machine (linux/audit.h)."""

NONE = -1

FORBIDDEN: dict[str, tuple[int, int]] = {
    # the network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "io_uring_setup": (425, 425),
    # other processes
    "fork": (57, NONE), "vfork": (58, NONE), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272), "setpriority": (141, 140),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "mq_unlink": (241, 181),
    # its own limits
    "setrlimit": (160, 164), "prlimit64": (302, 261),
    # what Landlock lets pass of files
    "truncate": (76, 45), "chmod": (90, NONE), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, NONE),
    "fchown": (93, 55), "lchown": (94, NONE), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "utime": (132, NONE), "utimes": (235, NONE), "futimesat": (261, NONE), "utimensat": (280, 88),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    # the machine
    "mount": (165, 40), "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "reboot": (169, 142), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116), "iopl": (172, NONE),
    "ioperm": (173, NONE), "personality": (135, 92), "vhangup": (153, 58), "mknod": (133, NONE), "mknodat": (259, 33),
    "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setresuid": (117, 147),
    "setgroups": (116, 159),
}  # fmt: skip
"""System calls that are refused, with their numbers on x86-64 and on aarch64 (Linux's unistd_64.h, asm-generic)."""

NEWEST = 448
"""Calls with greater numbers came later than this list: they are refused as if the kernel did not know them."""

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_EPERM, _ENOSYS = 1, 38
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Kinds of access to files that Landlock knows, by its version; later ones know no others."""


class NoProtectionError(Exception):
    """The kernel lacks something that protects; the message says what."""


def main() -> int:
    report, cpu_seconds, memory_mb = (int(argument) for argument in sys.argv[1:])
    token = sys.stdin.readline().strip()
    try:
        limit(cpu_seconds, memory_mb)
        _system_call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        confine_files(os.getcwd())
        forbid_calls(platform.machine())
    except NoProtectionError as error:
        os.write(report, f"{token} unprotected {error}".encode())
        return 1
    os.write(report, f"{token} {_outcome()}".encode(errors="replace"))
    return 0


def _outcome() -> str:
    """Runs the program; "passed", or "failed" and what it raised."""
    try:
        runpy.run_path(PROGRAM, run_name="__main__")
    except BaseException as error:  # also SystemExit: it has not come to its end
        try:
            words = str(error)
        except Exception:
            words = ""
        return f"failed {type(error).__name__}: {words}"[:MAX_WORDS]
    return "passed"


def limit(cpu_seconds: int, memory_mb: int) -> None:
    """Bounds what this process may take."""
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def confine_files(folder: str) -> None:
    """Leaves this process its folder, and Python's library and the system's to read.

    Raises:
        NoProtectionError: the kernel has no Landlock, or it is switched off.
    """
    version = _libc().syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        raise NoProtectionError("this kernel cannot confine a process to a folder (Landlock: Linux 5.13, switched on)")
    everything = _ALL_BY_ABI[min(version, max(_ALL_BY_ABI))]
    handled = struct.pack("Q", everything)
    ruleset = _system_call("syscall", _LANDLOCK_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    readable = _EXECUTE | _READ_FILE | _READ_DIR
    rules = {folder: everything, "/dev/null": _READ_FILE | _WRITE_FILE, "/etc/ld.so.cache": _READ_FILE}
    stdlib = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    for path in (*stdlib, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo"):
        rules[path] = readable
    for path, access in rules.items():
        if not os.path.exists(path):
            continue
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access, descriptor)
        _system_call("syscall", _LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
        os.close(descriptor)
    _system_call("syscall", _LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def forbid_calls(machine: str) -> None:
    """Refuses the calls of `FORBIDDEN` from now on.

    Raises:
        NoProtectionError: another machine than those, or the kernel has no seccomp.
    """
    if machine not in MACHINES:
        raise NoProtectionError(f"system calls of {machine} are not known (of {', '.join(MACHINES)} they are)")
    column, architecture = MACHINES[machine]
    numbers = sorted({both[column] for both in FORBIDDEN.values()} - {NONE})
    program = filter_program(numbers, architecture)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    pointer = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _system_call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer, 0, 0)


def filter_program(numbers: Sequence[int], architecture: int) -> list[tuple[int, int, int, int]]:
    """Seccomp's filter as instructions of classic BPF (code, jump if true, jump if false, operand)."""
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, refuse, end = 0x7FFF0000, 0x00050000, 0x80000000
    program = [
        (load, 0, 0, 4),  # the architecture of the call: its number means another thing to another one
        (equal, 1, 0, architecture),
        (answer, 0, 0, end),
        (load, 0, 0, 0),  # its number
        (at_least, 0, 1, NEWEST + 1),  # on x86-64 these are those of the x32 ABI, too
        (answer, 0, 0, refuse | _ENOSYS),
    ]
    for number in numbers:
        program += [(equal, 0, 1, number), (answer, 0, 0, refuse | _EPERM)]
    return [*program, (answer, 0, 0, allow)]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _system_call(name: str, *arguments: object) -> int:
    """Calls a function of libc that returns a number, and -1 where it fails.

    Raises:
        NoProtectionError: it failed.
    """
    found = int(getattr(_libc(), name)(*arguments))
    if found < 0:
        raise NoProtectionError(f"{name} {arguments[0]}: {os.strerror(ctypes.get_errno())}")
    return found


if __name__ == "__main__":
    status = main()
    os._exit(status)  # what the program has left to be done at the end is not run
