"""System calls that sandboxed code may not make: a seccomp filter. Standard library alone; see child.py.

What namespaces and rlimits leave open: memory that no limit counts (System V, message queues, memfds, timers, watches
of files), sockets of families that belong to no network namespace (vsock reaches the host of a virtual machine),
namespaces of its own, other processes' memory, and corners of the kernel that no solution of a task needs and that
attacks begin in. Where there is no process namespace, also signals to other processes and their limits, and what
Landlock does not restrict: modes, owners, times and attributes of files, sockets with names.
"""

import ctypes
import errno
import functools
import os

# name: number on x86_64, and on machines with the generic table (None: it does not have the call)
DENIED = {
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "io_setup": (206, 0), "timer_create": (222, 107),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "vmsplice": (278, 75),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "syslog": (103, 116), "modify_ldt": (154, None),
}  # fmt: skip
TO_OTHERS = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
    "truncate": (76, 45), "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "file_setattr": (469, 469),
}  # fmt: skip
# These succeed and do nothing: copying a file is not an error where its mode and time cannot be copied.
WITHOUT_EFFECT = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
}  # fmt: skip
PRLIMIT, CLONE, CLONE3 = (302, 261), (56, 220), (435, 435)
SOCKET, SOCKETPAIR, FCNTL, IOCTL = (41, 198), (53, 199), (72, 25), (16, 29)
UNIX, INTERNET = (1,), (2, 10)
PROTOCOLS = (0, 6, 17)  # TCP and UDP; others load modules into the kernel (SCTP, DCCP)
STREAMS = tuple(kind | flags for kind in (1, 5) for flags in (0, 0x800, 0x80000, 0x80800))  # stream, seqpacket
NEW_NAMESPACES = 0x7E020000  # flags of clone
# Descriptors and their flags, locks. Not: who gets which signal for a descriptor, leases, the size of a pipe.
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
SET_FLAGS, ASYNC = 4, 0x2000  # a terminal's signals go to those who use it
# What a terminal is and its size, how much can be read, flags. Not: owners of signals, input as if typed.
IOCTL_COMMANDS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
X32 = 0x40000000  # x86_64 has every call a second time, under these numbers
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "riscv64": (0xC00000F3, 1)}  # audit name, column

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # operations of the filter machine
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, MACHINE = 0, 4  # where they are in what a filter sees
ARGUMENTS = (16, 24, 32)


class Instruction(ctypes.Structure):
    """jump_true, jump_false: how many instructions are left out."""

    _fields_ = [("code", ctypes.c_uint16), ("jump_true", ctypes.c_uint8), ("jump_false", ctypes.c_uint8)]
    _fields_ += [("value", ctypes.c_uint32)]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction))]


# Each rule is a list of lines that expects the call's number, and leaves it for the next.


def fails(number, error):
    """The call fails. error 0: it seems to succeed."""
    return [(EQUAL, 0, 1, number), (RETURN, 0, 0, FAIL | error)]


def fails_unless(number, argument, values, error):
    """The call fails if the argument is none of the values."""
    count = len(values)
    lines = [(EQUAL, 0, count + 3, number), (LOAD, 0, 0, ARGUMENTS[argument])]
    lines += [(EQUAL, count - i, 0, value) for i, value in enumerate(values)]
    return [*lines, (RETURN, 0, 0, FAIL | error), (LOAD, 0, 0, NUMBER)]


def fails_with_bits(number, argument, bits, error, when=None):
    """The call fails if the argument has one of the bits. when: (argument, value), only where that one has this."""
    lines = [(LOAD, 0, 0, ARGUMENTS[argument]), (ANY_BIT, 0, 1, bits), (RETURN, 0, 0, FAIL | error)]
    if when:
        lines = [(LOAD, 0, 0, ARGUMENTS[when[0]]), (EQUAL, 0, len(lines), when[1]), *lines]
    return [(EQUAL, 0, len(lines) + 1, number), *lines, (LOAD, 0, 0, NUMBER)]


def program(machine, others, network):
    """The filter for a machine. others: processes and files that are not the sandbox's own can be reached. network:
    it shares the machine's network. Raises OSError for a machine that is not known."""
    if machine not in MACHINES:
        raise OSError(f"no filter of system calls for {machine!r}; there are: {', '.join(MACHINES)}")
    audit, column = MACHINES[machine]
    lines = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL)]  # calls of another architecture
    lines += [(LOAD, 0, 0, NUMBER)]
    if column == 0:
        lines += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, FAIL | errno.EPERM)]
    for table, error in ((DENIED, errno.EPERM), *(((TO_OTHERS, errno.EPERM), (WITHOUT_EFFECT, 0)) if others else ())):
        for numbers in table.values():
            lines += [] if numbers[column] is None else fails(numbers[column], error)
    if others:  # limits of its own are set by the same call, for process 0
        lines += fails_unless(PRLIMIT[column], 0, (0,), errno.EPERM)
    # Its flags are in memory, out of a filter's sight: without it the C library takes clone.
    lines += fails(CLONE3[column], errno.ENOSYS)
    lines += fails_with_bits(CLONE[column], 0, NEW_NAMESPACES, errno.EPERM)
    shared = others or network  # a Unix socket can have a name in the machine's network namespace, or in its files
    lines += fails_unless(SOCKET[column], 0, INTERNET if shared else UNIX + INTERNET, errno.EAFNOSUPPORT)
    lines += fails_unless(SOCKET[column], 2, PROTOCOLS, errno.EPROTONOSUPPORT)
    lines += fails_unless(SOCKETPAIR[column], 0, UNIX, errno.EAFNOSUPPORT)
    if shared:  # a pair of datagram sockets can be connected anew
        lines += fails_unless(SOCKETPAIR[column], 1, STREAMS, errno.EPERM)
    lines += fails_unless(FCNTL[column], 1, FCNTL_COMMANDS, errno.EINVAL)
    lines += fails_with_bits(FCNTL[column], 2, ASYNC, errno.EPERM, when=(1, SET_FLAGS))
    lines += fails_unless(IOCTL[column], 1, IOCTL_COMMANDS, errno.EOPNOTSUPP)
    return [*lines, (RETURN, 0, 0, ALLOW)]


@functools.cache
def prepared(others, network):
    """The filter for this machine, as the kernel reads it. Raises OSError for a machine that is not known."""
    lines = program(os.uname().machine, others, network)
    return Program(len(lines), (Instruction * len(lines))(*lines))


def install(libc, filter):
    """For this process and all that it starts, for good. It must have given up gaining privileges. Raises OSError."""
    set_seccomp, with_filter = 22, 2
    if libc.prctl(set_seccomp, with_filter, ctypes.byref(filter), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
