"""The inside of the sandbox. Runs as a script of its own (standard library alone), started by sandbox.py.

    server     a warm interpreter that forks a launcher for each sandbox; what can be prepared is prepared here
    launcher   enters new namespaces, builds a small read-only root, forks; ends with the trainer, and has its own clock
    payload    without privileges, under limits: a program, or what judges (payload.py). In a process namespace a judge
               is the first process: when it ends, the kernel kills all that is left. For a program, which may send
               itself signals that a first process does not get, there is an `init` between the two.

What happened is reported over a pipe that the payload does not have. See sandbox.py for what is promised.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -I leaves it out
import candidate
import filter as sandbox_filter
import folders
import lifeline
import payload
from payload import TEXT

NOBODY = 65534
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
MNT_DETACH, RECURSIVE, READ_ONLY, NO_SUID = 2, 0x8000, 1, 2
SET_DUMPABLE, SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVS = 4, 36, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
CAPSET = {"x86_64": 126, "aarch64": 91, "riscv64": 91}
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same everywhere
INODES = 8192  # files and folders in /tmp: empty ones use memory of the kernel, which `disk` does not count
GRACE_SECONDS = 5  # after which a sandbox ends that nobody has stopped
LONGEST_JOB = 1 << 16  # bytes, but for what it reads
RLIMIT_SIGPENDING, SIGNALS = 11, 64  # signals that wait, which use memory of the kernel; resource lacks the name
FILE_RIGHTS = 0b100000000000111 | 1 << 15  # execute, write, read, truncate, ioctl: those that a single file can have

libc = ctypes.CDLL(None, use_errno=True)
for function in ("mount", "umount2", "unshare", "syscall", "prctl"):
    getattr(libc, function)  # looked up here, once, and not in each fork


def checked(what, result):
    """The result of a system call. Raises OSError with what was tried."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option, value):
    checked(f"prctl({option})", libc.prctl(option, value, 0, 0, 0))


def encoded(text):
    return None if text is None else os.fsencode(text)


def mount(source, target, kind, flags, data=None):
    done = libc.mount(encoded(source), encoded(target), encoded(kind), ctypes.c_ulong(flags), encoded(data))
    checked(f"mount {target}", done)


# --- namespaces -------------------------------------------------------------------------------------------------------


def enter_namespaces(network, mapper):
    """New user, mount, process, ipc, host name and, unless network is allowed, network namespaces.

    mapper: a socket of the server, which maps root's user ids: the payload becomes nobody, and only a process outside
    may map a second id.
    """
    flags = NEWUSER | NEWNS | NEWPID | NEWIPC | NEWUTS | (0 if network else NEWNET)
    uid, gid = os.geteuid(), os.getegid()
    checked("unshare", libc.unshare(flags))
    if uid == 0:
        mapped, done = os.pipe()
        socket.send_fds(mapper, [str(os.getpid()).encode()], [done])
        os.close(done)
        if not os.read(mapped, 1):
            raise OSError("the user ids of the new namespace could not be mapped")
    else:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{uid} {uid} 1")
        write("/proc/self/gid_map", f"{gid} {gid} 1")
    write("/proc/sys/user/max_user_namespaces", "0")  # the payload makes none of its own


def map_ids(launcher, *done):
    """Lets a launcher's namespace have root and nobody, and says so to it. Does nothing if it has ended."""
    with contextlib.suppress(OSError):
        for kind in ("uid", "gid"):
            write(f"/proc/{launcher}/{kind}_map", f"0 0 1\n{NOBODY} {NOBODY} 1")
        for fd in done:
            os.write(fd, b"x")


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def build_root(readable, disk):
    """A root that holds the readable folders, a few devices and an empty /tmp; nothing else is there, and nothing but
    /tmp can be written. readable: where each is to be, and where it is."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.chdir("/tmp")
    os.mkdir("old")
    checked("pivot_root", libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"old"))
    os.chdir("/")
    os.mkdir("/tmp")
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk},nr_inodes={INODES},mode=777")
    for path, place in readable:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.isdir(place) and path != place:  # /lib -> /usr/lib, which is there already
            os.symlink(place, path)
        else:
            os.makedirs(path, exist_ok=True)
            mount(f"/old{place}", path, None, MS_BIND | MS_REC)
    os.mkdir("/dev")
    for name in ("null", "zero", "random", "urandom"):
        write(f"/dev/{name}", "")
        mount(f"/old/dev/{name}", f"/dev/{name}", None, MS_BIND)
    os.symlink("/tmp", "/dev/shm")  # locks of multiprocessing, bounded as all files are
    checked("umount", libc.umount2(b"/old", MNT_DETACH))
    os.rmdir("/old")
    set_attributes("/", RECURSIVE, READ_ONLY | NO_SUID, 0)
    set_attributes("/tmp", 0, 0, READ_ONLY)


def set_attributes(path, flags, on, off):
    attributes = (ctypes.c_uint64 * 4)(on, off, 0, 0)
    done = libc.syscall(MOUNT_SETATTR, -1, path.encode(), flags, attributes, ctypes.sizeof(attributes))
    checked(f"mount_setattr {path}", done)


# --- without namespaces -----------------------------------------------------------------------------------------------


def landlock(readable, folder):
    """Lets this process and its children open the readable paths and write in the folder, and nothing else.

    Returns False where the kernel has no Landlock (before 5.13, or switched off).
    """
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    scoped = 3 if version >= 6 else 0  # no abstract sockets of others, no signals to others
    rules = (ctypes.c_uint64 * 3)(handled, 0, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = checked("landlock", libc.syscall(LANDLOCK_CREATE, rules, size, 0))
    read = 0b1101  # execute, read files, read folders
    for path, rights in [(p, read) for p in readable] + [(folder, handled), ("/dev/null", 6), ("/dev/urandom", 4)]:
        if not os.path.exists(path):
            continue
        at = os.open(path, os.O_PATH)
        rights &= handled if os.path.isdir(path) else handled & FILE_RIGHTS
        rule = rights.to_bytes(8, sys.byteorder) + at.to_bytes(4, sys.byteorder)
        checked(f"landlock {path}", libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0))
        os.close(at)
    checked("landlock", libc.syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)
    return True


def tasks_of(uid):
    """How many threads a user has: without a namespace the limit on processes counts them all."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def abandon(folder):
    """What there is to do when the run is stopped or late, or the trainer has died, who would remove the folder."""
    sweep()
    folders.remove(folder)
    os._exit(0)


def sweep():
    """Kills and reaps every descendant; orphans come to the subreaper, so the loop ends when none is left."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(word) for word in file.read().split()]
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# --- the three processes ----------------------------------------------------------------------------------------------


def limit(job, others):
    """Hard limits of the payload. others: processes of the same user that are not the payload's."""
    seconds, disk = job["cpu_seconds"], job["disk"]
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_NPROC, job["processes"] + others),
        (resource.RLIMIT_NOFILE, job["open_files"]),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_CORE, 0),
        (RLIMIT_SIGPENDING, SIGNALS),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def drop_privileges(root):
    if root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    checked("capset", libc.syscall(CAPSET[os.uname().machine], header, none))


def become_payload(job, fds, others, launcher):
    """Gives up everything that the payload is not to have, and keeps what it reads as descriptor TEXT. Ends the process
    with a report if something cannot be given up."""
    text, status = fds
    try:
        os.setsid()
        os.chdir(job["folder"] or "/tmp")
        drop_privileges(os.geteuid() == 0)
        if not job["namespaces"]:
            lifeline.tie(launcher)
            if not os.access(os.path.dirname(os.__file__), os.R_OK):
                raise OSError(f"{sys.executable} may not be read by user {os.getuid()}; give another with python='…'")
            landlock([place for _, place in job["readable"]], job["folder"])
        limit(job, others)
        sandbox_filter.install(libc, job["filter"])
    except BaseException as error:
        report(status, f"refused {error}")
        os._exit(1)
    if text != TEXT:
        os.dup2(text, TEXT, inheritable=False)
    os.closerange(TEXT + 1, 1 << 16)  # the pipe of the launcher among them


def report(status, line):
    os.write(status, line.encode() + b"\n")


def report_end(status, how):
    code = os.waitstatus_to_exitcode(how)
    report(status, f"exit {code}" if code >= 0 else f"signal {-code}")


def fork_payload(job, fds, others):
    """Forks the payload. Returns True in the payload; the parent reaps all, reports its end and returns False."""
    parent, child = os.getpid(), os.fork()
    if not child:
        become_payload(job, fds, others, parent)
        return True
    while (ended := os.waitpid(-1, 0))[0] != child:
        pass
    report_end(fds[1], ended[1])
    return False


def launch_with_limits(job, fds, server):
    """Returns True in the payload, False in its parent when all is over."""
    root = os.geteuid() == 0
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda *_: abandon(job["folder"]))
    lifeline.tie(server, signal.SIGTERM)
    os.mkdir(job["folder"], 0o700)  # here, where whatever ends the launcher also removes it
    if root:
        os.chown(job["folder"], NOBODY, NOBODY)
    prctl(SET_CHILD_SUBREAPER, 1)
    prctl(SET_DUMPABLE, 0)
    inside = fork_payload(job, fds, tasks_of(NOBODY if root else os.getuid()))
    if inside:
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
    else:
        sweep()
    return inside


def launch_in_namespaces(job, fds, server, mapper):
    """Returns True in the payload, False in its parents when all is over."""
    lifeline.tie(server)
    with mapper:
        enter_namespaces(job["network"], mapper)
    lifeline.tie(server)  # again: new credentials can end a tie
    build_root(job["readable"], job["disk"])
    prctl(SET_DUMPABLE, 0)
    alive, held = os.pipe()
    first = os.fork()
    if first:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
        report_end(fds[1], os.waitpid(first, 0)[1])  # when all of the process namespace are gone
        return False
    os.close(held)
    prctl(lifeline.SET_PDEATHSIG, signal.SIGKILL)
    if select.select([alive], [], [], 0)[0]:  # the launcher, whose id cannot be asked for from here, has ended before
        os._exit(1)
    if job["mode"] == "program":
        return fork_payload(job, fds, 2)
    become_payload(job, fds, 1, 0)
    return True


def launched(job, fds, server, mapper):
    """Becomes a launcher, and returns the job in the payload alone. fds: what the payload reads, and for reports."""
    signal.alarm(job["cpu_seconds"] + GRACE_SECONDS)
    try:
        if job["namespaces"]:
            inside = launch_in_namespaces(job, fds, server, mapper)
        else:
            mapper.close()
            inside = launch_with_limits(job, fds, server)
    except Exception as error:
        report(fds[1], f"refused {error}")
        inside = False
    if not inside:
        os._exit(0)
    sys.path += job["paths"]
    return job


def serve(asked, trainer):
    """Forks a launcher for each message, a job with the descriptors that come with it: what the payload reads, a pipe
    for reports, and its standard streams. Answers with a descriptor of its process. Returns the job in a payload alone.

    Launchers send it their ids by a socket of their own, to have user ids mapped.
    """
    lifeline.tie(trainer)
    prctl(SET_DUMPABLE, 0)
    server = os.getpid()
    mapper, launchers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while True:
        for ready in select.select([asked, launchers], [], [])[0]:
            message, fds, _, _ = socket.recv_fds(ready, LONGEST_JOB, 5)
            if not message:
                os._exit(0)
            if ready is launchers:
                map_ids(int(message), *fds)
            else:
                try:
                    job = read_job(message, fds)
                    child = os.fork()
                    if child == 0:
                        asked.close()
                        launchers.close()
                        become_launcher(fds[2:])
                        return launched(job, fds[:2], server, mapper)
                    fds.append(os.pidfd_open(child))
                    socket.send_fds(asked, [b"forked"], fds[-1:])
                except OSError as error:
                    asked.send(str(error).encode())
            for fd in fds:
                os.close(fd)
        candidate.reap()


def read_job(message, fds):
    """The job with its filter: what is prepared here is prepared once, in an interpreter that is warm."""
    if len(fds) < 5:
        raise OSError("no descriptors are left")
    job = json.loads(message)
    return {**job, "filter": sandbox_filter.prepared(not job["namespaces"], job["network"])}


def become_launcher(streams):
    os.setsid()
    prctl(SET_DUMPABLE, 1)  # its own files in /proc are written for the new namespaces
    for fd, stream in enumerate(streams):
        os.dup2(stream, fd)
        os.close(stream)


if __name__ == "__main__":
    sys.path[0:1] = []
    payload.run(serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])))
