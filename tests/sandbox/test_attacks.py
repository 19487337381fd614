"""More attacks on the sandbox: what namespaces and rlimits alone would let through, and a judge under siege."""

import os
import subprocess
import sys
import time

import pytest

from unidiff.sandbox import Ending, Sandbox
from unidiff.sandbox import filter as sandbox_filter
from unidiff.sandbox import process as module

needs_namespaces = pytest.mark.usefixtures("namespaces")
LIBC = "import ctypes, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def run(code, walls=None, **limits):
    return Sandbox(**{"seconds": 10, **limits, **(walls or {})}).run(code)


# --- memory that rlimits do not count ---------------------------------------------------------------------------------


def test_memory_that_belongs_to_no_process_cannot_be_had(walls):
    code = """
print(libc.shmget(0, 1 << 20, 0o1666), libc.semget(0, 1, 0o1666), libc.msgget(0, 0o1666))
try: os.memfd_create("x")
except OSError as error: print(error.errno)
"""
    assert run(LIBC + code, walls).stdout == "-1 -1 -1\n1\n"


@needs_namespaces
def test_empty_files_are_bounded():
    code = "n = 0\ntry:\n    while n < 50_000: open(str(n), 'w').close(); n += 1\nexcept OSError as e: print(e.errno)"
    assert run(code).stdout == "28\n"


def test_threads_and_zombies_are_bounded(walls):
    code = """
import os, threading, time
def flood(start, error):
    for n in range(100):
        try: start()
        except error: return n
print(flood(lambda: os.fork() or os._exit(0), OSError))
while True:
    try: os.wait()
    except ChildProcessError: break
print(flood(lambda: threading.Thread(target=time.sleep, args=(9,), daemon=True).start(), RuntimeError), flush=True)
os._exit(0)
"""
    counts = run(code, walls, processes=6).stdout.split()
    assert len(counts) == 2 and all(1 <= int(n) <= 8 for n in counts)


def test_limits_cannot_be_raised(walls):
    code = """
import resource
for name in ("AS", "CPU", "NPROC", "NOFILE", "FSIZE", "CORE"):
    try: resource.setrlimit(getattr(resource, "RLIMIT_" + name), (resource.RLIM_INFINITY,) * 2)
    except (OSError, ValueError): print("no")
"""
    assert run(code, walls).stdout == "no\n" * 6


def test_ten_gigabytes_of_output_are_cut(walls):
    start = time.monotonic()
    done = run("import os\nfor _ in range(10240): os.write(1, bytes(1 << 20))", walls)
    assert done.stop is Ending.OUTPUT and len(done.stdout) == Sandbox().output and time.monotonic() - start < 8


# --- the kernel, and what lies outside --------------------------------------------------------------------------------


def test_corners_of_the_kernel_are_closed(walls):
    code = """
def tried(*call):
    done = libc.syscall(*call)
    return done if done >= 0 else -ctypes.get_errno()
x86 = os.uname().machine == "x86_64"
buffer = ctypes.create_string_buffer(256)
print(tried(425, 8, buffer), tried(321 if x86 else 280, 0, buffer, 8), tried(323 if x86 else 282, 0))
print(tried(250 if x86 else 219, 0, -3, 0), tried(435, buffer, 88), tried(56 if x86 else 220, 0x10000000 | 17, 0, 0, 0))
for family in (16, 17, 40, 38):  # netlink, packet, vsock, crypto
    try: socket.socket(family, socket.SOCK_RAW if family != 40 else socket.SOCK_STREAM)
    except OSError as error: print(error.errno)
for protocol in (132, 33, 136, 262):  # SCTP, DCCP, UDP-Lite, MPTCP
    try: socket.socket(2, socket.SOCK_STREAM, protocol)
    except OSError as error: print(error.errno)
for family in (1, 2):
    try: print(int(socket.socket(family).family))
    except OSError as error: print(error.errno)
"""
    lines = run(LIBC + code, walls).stdout.splitlines()
    assert lines[:2] == ["-1 -1 -1", "-1 -38 -1"] and lines[2:6] == ["97"] * 4
    assert lines[6:10] == ["93"] * 4
    assert lines[10:] == ["97" if "network" in walls else "1", "2"]  # Unix sockets reach what listens on the machine


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("others", [False, True])
def test_a_filter_for_each_machine(others, network):
    for machine, (audit, column) in sandbox_filter.MACHINES.items():
        lines = sandbox_filter.program(machine, others, network)
        assert lines[1][3] == audit
        for at, (code, yes, no, _) in enumerate(lines):  # jumps stay inside, and the end is a verdict
            assert code == sandbox_filter.RETURN or at + 1 + max(yes, no) < len(lines)
        assert lines[-1][0] == sandbox_filter.RETURN
        tested = [value for code, _, _, value in lines if code == sandbox_filter.EQUAL]
        assert {numbers[column] for numbers in sandbox_filter.DENIED.values()} - {None} < set(tested)
    with pytest.raises(OSError, match="no filter of system calls for 'pdp11'; there are: x86_64"):
        sandbox_filter.program("pdp11", others, network)


def test_links_lead_nowhere(walls):
    code = """
import os
os.symlink("/", "root"); os.symlink("/etc/passwd", "passwd")
for path in ("passwd", "root/etc/passwd", "root/../etc/passwd", "/old/etc/passwd", "/tmp/old/etc/passwd"):
    try: print(open(path).read())
    except OSError: print("no")
"""
    if "network" in walls and "root:" in run("print(open('/etc/passwd').read())", walls).stdout:
        pytest.skip("this kernel has no Landlock: without namespaces any readable file can be read")
    assert run(code, walls).stdout == "no\n" * 5


@needs_namespaces
def test_nothing_but_tmp_can_be_written_whoever_runs_it(as_nobody):
    attack = """
import os
for path in ("/x", "/dev/x", "/usr/x", "/tmp/x"):
    try: open(path, "w"); print("wrote", path)
    except OSError: pass
try: os.rename("/dev/null", "/tmp/null")
except OSError: print("no")
"""
    assert run(attack).stdout == "wrote /tmp/x\nno\n"
    told = as_nobody(f"print(S.namespaces_refused())\nprint(S.Sandbox(seconds=9).run({attack!r}).stdout)")
    assert not told.startswith("None") or told == "None\nwrote /tmp/x\nno\n\n"


def test_without_a_namespace_other_processes_of_the_same_user_are_out_of_reach(as_nobody):
    """An ordinary user's sandbox could signal all that is his, the trainer too, or set its limits."""
    script = """
import os, subprocess, time
S.process.namespaces_refused = lambda: "off"
victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
attack = f'''
import os, resource, signal
def tried(what, *given):
    try: what(*given)
    except OSError: print("no")
    else: print("did", what)
for pid in ({victim.pid}, os.getppid(), -1):
    tried(os.kill, pid, signal.SIGKILL)
tried(resource.prlimit, {victim.pid}, resource.RLIMIT_CPU, (0, 0))
tried(os.setpriority, os.PRIO_PROCESS, {victim.pid}, 19)
tried(os.sched_setaffinity, {victim.pid}, {{{{0}}}})
print(resource.getrlimit(resource.RLIMIT_CPU)[0])
'''
done = S.Sandbox(seconds=9, network="allow").run(attack.replace("{{", "{").replace("}}", "}"))
print(done.stdout, done.stderr, victim.poll(), os.getpriority(os.PRIO_PROCESS, victim.pid))
victim.kill()
"""
    own = os.getpriority(os.PRIO_PROCESS, 0)  # which the victim has from here
    assert as_nobody(script) == f"no\nno\nno\nno\nno\nno\n9\n  None {own}\n"


def test_what_no_limit_counts_is_refused(walls):
    code = """
import fcntl, termios
x86 = os.uname().machine == "x86_64"
buffer = ctypes.create_string_buffer(256)
def tried(*call): return -ctypes.get_errno() if libc.syscall(*call) < 0 else "did"
print(tried(206 if x86 else 0, 100, buffer), tried(222 if x86 else 107, 0, None, buffer))  # aio, timers
print(tried(294 if x86 else 26, 0), tried(300 if x86 else 262, 0, 0))  # watches of files
end = os.pipe()[0]
for what in (lambda: fcntl.fcntl(end, 1031, 1 << 20), lambda: fcntl.ioctl(end, termios.TIOCSTI, b"x")):
    try: what()
    except OSError as error: print(error.errno)
timers = [libc.syscall(283 if x86 else 85, 1, 0) for _ in range(500)]
print(timers.count(-1) > 400)
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [40])
number = (129 if x86 else 138)
buffer[:] = b"\\0" * 8 + b"\\xff" * 4 + b"\\0" * 244  # as sigqueue sends it
print(sum(libc.syscall(number, os.getpid(), 40, buffer) == 0 for _ in range(1000)) < 100)
"""
    assert run(LIBC + code, walls).stdout.splitlines() == ["-1 -1", "-1 -1", "22", "95", "True", "True"]


def test_what_programs_do_is_not_refused(walls):
    code = """
import asyncio, fcntl, os, shutil, signal, socket, sqlite3, subprocess, sys, tempfile
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "a")
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write("x")
    os.chmod(path, 0o600)
    shutil.move(shutil.copy2(path, path + "2"), folder + "/b")
    print(open(folder + "/b").read(), len(os.listdir(folder)))
    with sqlite3.connect(folder + "/c") as base:
        print(base.execute("select 1 + 1").fetchone())
async def both():
    reader, writer = await asyncio.open_connection(sock=pair[0])
    pair[1].send(b"hello")
    return await reader.read(5)
pair = socket.socketpair()
print(asyncio.run(both()), shutil.get_terminal_size(), sys.stdout.isatty(), os.cpu_count() > 0)
print(subprocess.run([sys.executable, "-c", "print(input())"], input="in", capture_output=True, text=True).stdout)
"""
    done = run(code, walls)
    size = "os.terminal_size(columns=80, lines=24)"
    assert done.stdout.splitlines() == ["x 2", "(2,)", f"b'hello' {size} False True", "in", ""], done.stderr


KERNELS = {"its own": None, "Landlock 4": 4, "Landlock 1": 1, "without Landlock": 0}


@pytest.mark.parametrize("kernel", KERNELS)
def test_on_older_kernels_the_trainer_is_out_of_reach_too(as_nobody, kernel):
    """Without namespaces, as an ordinary user: signals by the owner of a descriptor, the trainer's descriptors and
    settings below /proc, its files' modes and sizes, its sockets."""
    script = """
import os, signal, socket, stat, tempfile, time
S.process.namespaces_refused = lambda: "off"
home = tempfile.mkdtemp()
named, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
named.bind(home + "/socket"), abstract.bind("\\0" + home)
named.listen(), abstract.listen()
mail = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
mail.bind(home + "/mail"), mail.setblocking(False)
open(home + "/file", "w").write("kept")
inner, outer = os.pipe()
os.set_blocking(inner, False)
attack = '''
import ctypes, fcntl, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
trainer, home, outer = TRAINER
end, other = os.pipe()
pair = socket.socketpair()
def tried(name, what, *given):
    try: what(*given)
    except OSError: return
    print("did", name)
tried("owner", fcntl.fcntl, end, fcntl.F_SETOWN, trainer)
tried("group", fcntl.fcntl, end, fcntl.F_SETOWN, -os.getpgid(trainer))
tried("owner ex", fcntl.fcntl, end, 15, struct.pack("ii", 1, trainer))
tried("signal", fcntl.fcntl, end, 10, 9)
tried("async", fcntl.fcntl, end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
for name, number in (("FIOSETOWN", 0x8901), ("SIOCSPGRP", 0x8902), ("FIOASYNC", 0x5452)):
    tried(name, fcntl.ioctl, pair[0], number, struct.pack("i", trainer))
os.write(other, b"x"), pair[1].send(b"x")
for name, mode in ((f"fd/{outer}", "wb"), ("environ", "rb"), ("mem", "r+b"), ("oom_score_adj", "wb")):
    tried(name, lambda: open(f"/proc/{trainer}/{name}", mode, 0).write(b"900" if mode == "wb" else b""))
tried("file size", os.truncate, home + "/file", 0)
tried("owner of a file", os.chown, home + "/file", -1, os.getgid())
tried("attribute", os.setxattr, home + "/file", "user.x", b"1")
os.chmod(home + "/file", 0), os.utime(home + "/file", (1, 1))  # without effect
for place in (home + "/socket", chr(0) + home):
    tried("socket", lambda: socket.socket(socket.AF_UNIX).connect(place))
    tried("pair", lambda: socket.socketpair()[0].connect(place))
tried("mail", lambda: socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b"x", home + "/mail"))
print("over")
'''.replace("TRAINER", repr((os.getpid(), home, outer)))
old = os.stat(home + "/file"), open("/proc/self/oom_score_adj").read()
done = S.Sandbox(seconds=9, network="allow").run(attack)
print(done.stdout + done.stderr, end="")
new = os.stat(home + "/file"), open("/proc/self/oom_score_adj").read()
same = [getattr(old[0], n) == getattr(new[0], n) for n in ("st_mode", "st_size", "st_mtime", "st_gid")]
print(same, old[1] == new[1])
for take in (lambda: os.read(inner, 9), lambda: mail.recv(9)):
    try: print("got", take())
    except BlockingIOError: pass
print("alive")
"""
    told = as_nobody(script, KERNELS[kernel]).splitlines()
    assert told == ["over", "[True, True, True, True] True", "alive"]


def test_what_ignores_signals_is_killed(walls):
    mark = f"deaf-{os.getpid() % 10000}"
    code = f"""
import ctypes, os, signal, time
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
if os.fork() == 0:
    os.setsid()
    ctypes.CDLL(None).prctl(15, b"{mark}")
    time.sleep(60)
print("on", flush=True)
time.sleep(60)
"""
    done = run(code, walls, seconds=2.0)
    assert done.stop is Ending.TIMEOUT and done.stdout == "on\n" and done.seconds < 4
    names = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm") as file:
                names.append(file.read().strip())
        except OSError:
            continue
    assert mark not in names


def test_a_killed_trainer_leaves_no_folder(walls, tmp_path):
    code = "print('on', flush=True)\nimport time\ntime.sleep(60)"
    off = "S.process.namespaces_refused = lambda: 'off'\n" if "network" in walls else ""
    path = os.path.dirname(os.path.dirname(module.__file__))
    start = f"import sys\nsys.path.insert(0, {path!r})\nimport sandbox as S\n"
    script = f"{start}{off}S.Sandbox(seconds=50, **{walls!r})"
    os.chmod(tmp_path, 0o755)
    trainer = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", f"{script}.run({code!r})"], env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    deadline = time.monotonic() + 20
    while "network" in walls and not os.listdir(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    trainer.kill()
    trainer.wait()
    while os.listdir(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.listdir(tmp_path)


# --- the judge --------------------------------------------------------------------------------------------------------

TESTS = ["assert square(3) == 9", "assert square(-2) == 4", "assert square(0) == 0"]
FORGERIES = {
    "closes every pipe": "import os\nos.closerange(0, 256)\ndef square(x): return 7",
    "closes the pipe of replies when asked": "import os\ndef square(x): os.closerange(3, 256)",
    "answers in advance": "import json, os\nfor fd in range(3, 64):\n    for i in range(9):\n"
    "        try: os.write(fd, json.dumps({'value': True, 'changed': [[0, 9]], 'passed': True}).encode() + b'\\n')\n"
    "        except OSError: pass\ndef square(x): return 7",
    "answers with every handle": "import json, os\nfor fd in range(3, 64):\n    for i in range(9):\n"
    "        try: os.write(fd, json.dumps({'value': {'remote': [0, [9], 'square', False]}}).encode() + b'\\n')\n"
    "        except OSError: pass\ndef square(x): return 7",
    "patches what encodes": "import gc\nfor o in gc.get_objects():\n"
    "    if isinstance(o, dict) and 'encode' in o and 'KINDS' in o:\n"
    "        o['encode'] = lambda *a: {'complex': ['9', 0]}\ndef square(x): return 7\n",
    "traces": "import sys\ndef tracer(frame, event, arg):\n    frame.f_locals.update(passed=True, value=7)\n"
    "    return tracer\nsys.settrace(tracer)\ndef square(x): return 7",
    "at exit": 'import atexit, os\natexit.register(lambda: os.write(2, b\'{"test": 0, "passed": true}\\n\'))\n'
    "def square(x): raise SystemExit",
    "a thread that answers": "import os, threading\ndef spam():\n    while True:\n        for fd in range(3, 20):\n"
    '            try: os.write(fd, b\'{"value": true, "arguments": []}\\n\')\n            except OSError: pass\n'
    "threading.Thread(target=spam, daemon=True).start()\ndef square(x): return 7",
    "exits through a signal": "import os, signal\ndef square(x): os.kill(os.getpid(), signal.SIGKILL)",
    "true strings": "def square(x): return '9'",
    "numbers without an end": "def square(x): return float('nan') if x else 10 ** 5000",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_no_forgery_passes(forgery, walls):
    report = Sandbox(seconds=8, **walls).test(FORGERIES[forgery], TESTS)
    assert report.passed == (False,) * 3 and not report.unjudged and set(report.messages) == {0, 1, 2}


def test_the_code_cannot_find_what_is_expected(walls):
    """It looks at every object of its interpreter, all frames, modules and files for a part of the tests."""
    code = """
import gc, os, sys
def found(hint):
    seen, new = set(), [*gc.get_objects(), *map(vars, filter(lambda m: hasattr(m, "__dict__"), sys.modules.values()))]
    new += [frame.f_locals for frame in sys._current_frames().values()]
    texts = []
    while new:
        one = new.pop()
        if id(one) in seen: continue
        seen.add(id(one))
        if type(one) in (str, bytes): texts.append(str(one))
        elif type(one) is dict: new += [*one.keys(), *one.values()]
        elif type(one) in (list, tuple, set): new += one
    for fd in range(64):
        try: os.lseek(fd, 0, 0); texts.append(os.read(fd, 1 << 20).decode(errors="replace"))
        except OSError: pass
    return sum(hint in text and "-".join(["", "word"]) in text for text in texts)
"""
    secret = "assert found('pass') == 0, 'pass-word'"  # the hint crosses, the rest must not
    assert Sandbox(seconds=9, **walls).test(code, [secret]).passed == (True,)
    planted = code + "\nnote = ['pass-word']"
    assert Sandbox(seconds=9, **walls).test(planted, ["assert found('pass') > 0"]).passed == (True,)
