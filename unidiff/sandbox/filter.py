"""System calls that sandboxed code may not make: a seccomp filter. Standard library alone; see child.py.

What namespaces and rlimits leave open: memory that no limit counts (System V, message queues, memfds), sockets of
families that belong to no network namespace (vsock reaches the host of a virtual machine), namespaces of its own, other
processes' memory, and corners of the kernel that no solution of a task needs and that attacks begin in. Where there is
no process namespace, signals and limits of other processes too, among which may be the trainer.
"""

import ctypes
import errno
import os

# name: number on x86_64, and on machines with the generic table
DENIED = {
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "unshare": (272, 97), "setns": (308, 268),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
}  # fmt: skip
TO_OTHERS = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
}  # fmt: skip
PRLIMIT, SOCKET, CLONE, CLONE3 = (302, 261), (41, 198), (56, 220), (435, 435)
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: all inside the network namespace
NEW_NAMESPACES = 0x7E020000  # flags of clone
X32 = 0x40000000  # x86_64 has every call a second time, under these numbers
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "riscv64": (0xC00000F3, 1)}  # audit name, column

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # operations of the filter machine
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # where they stand in what a filter sees


class Instruction(ctypes.Structure):
    """jump_true, jump_false: how many instructions are left out."""

    _fields_ = [("code", ctypes.c_uint16), ("jump_true", ctypes.c_uint8), ("jump_false", ctypes.c_uint8)]
    _fields_ += [("value", ctypes.c_uint32)]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction))]


def program(machine, others):
    """The filter for a machine. others: processes that are not the sandbox's own can be seen. Raises OSError for a
    machine that is not known."""
    if machine not in MACHINES:
        raise OSError(f"no filter of system calls for {machine!r}; there are: {', '.join(MACHINES)}")
    audit, column = MACHINES[machine]
    lines = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL)]  # calls of another architecture
    lines += [(LOAD, 0, 0, NUMBER)]
    if column == 0:
        lines += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, FAIL | errno.EPERM)]
    for numbers in [*DENIED.values(), *(TO_OTHERS.values() if others else ())]:
        lines += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, FAIL | errno.EPERM)]
    if others:  # limits of its own are set by the same call, for process 0
        lines += [(EQUAL, 0, 4, PRLIMIT[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 1, 0, 0)]
        lines += [(RETURN, 0, 0, FAIL | errno.EPERM), (RETURN, 0, 0, ALLOW)]
    # Its flags lie in memory, out of a filter's sight: without it the C library takes clone.
    lines += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, FAIL | errno.ENOSYS)]
    lines += [(EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, NEW_NAMESPACES)]
    lines += [(RETURN, 0, 0, FAIL | errno.EPERM), (RETURN, 0, 0, ALLOW)]
    lines += [(EQUAL, 0, len(FAMILIES) + 2, SOCKET[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    lines += [(EQUAL, len(FAMILIES) - i, 0, family) for i, family in enumerate(FAMILIES)]
    lines += [(RETURN, 0, 0, FAIL | errno.EAFNOSUPPORT), (RETURN, 0, 0, ALLOW)]
    return lines


def install(libc, others):
    """For this process and all that it starts, for good. It must have given up gaining privileges. Raises OSError."""
    lines = program(os.uname().machine, others)
    instructions = (Instruction * len(lines))(*lines)
    wanted = Program(len(lines), instructions)
    set_seccomp, with_filter = 22, 2
    if libc.prctl(set_seccomp, with_filter, ctypes.byref(wanted), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
