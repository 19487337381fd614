"""The sandbox under attack, with namespaces and, where they are refused, with limits alone."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from unidiff.sandbox import Ending, Sandbox, SandboxError
from unidiff.sandbox import process as module

needs_namespaces = pytest.mark.usefixtures("namespaces")
LIBRARY = os.path.dirname(os.path.dirname(module.__file__))
ALONE = f"import sys\nsys.path.insert(0, {LIBRARY!r})\n"  # without the rest of unidiff: quick


def landlocked() -> bool:
    import ctypes

    return ctypes.CDLL(None).syscall(444, None, 0, 1) > 0


def run(code, walls=None, stdin="", **limits):
    return Sandbox(**{"seconds": 8, **limits, **(walls or {})}).run(code, stdin)


# --- what it is for ---------------------------------------------------------------------------------------------------


def test_a_program_runs(walls):
    done = run("import sys, math\nprint(sys.stdin.read().upper(), math.pi > 3)\nsys.exit(3)", walls, stdin="hé")
    assert (done.stop, done.code, done.stdout, done.stderr) == (Ending.EXITED, 3, "HÉ True\n", "")
    assert not done.ok and run("", walls).ok


def test_it_has_a_folder_of_its_own_that_goes_away(walls):
    code = "import os\nopen('a', 'w').write('x')\nprint(os.getcwd(), os.listdir('.'))"
    before = set(os.listdir("/tmp"))
    first, second = run(code, walls), run(code, walls)
    assert first.stdout.endswith(" ['a']\n") and second.stdout.endswith(" ['a']\n")
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("unidiff-sandbox")]


def test_its_folder_goes_away_however_deep_it_is(walls):
    code = "import os\nfor _ in range(2000):\n    os.mkdir('d')\n    os.chdir('d')\nos.mkdir('x', 0)\nprint('deep')"
    before = set(os.listdir("/tmp"))
    assert run(code, walls).stdout == "deep\n"
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("unidiff-sandbox")]


def test_packages_can_be_made_readable(tmp_path, walls):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "gift.py").write_text("present = 'a book'")
    os.chmod(tmp_path, 0o755)
    code = "import gift\nprint(gift.present)"
    assert "No module named" in run(code, walls).stderr
    if os.geteuid() == 0 and "network" in walls:
        return  # nobody cannot pass the folders of the tests, which are root's alone
    assert run(code, walls, paths=(str(tmp_path / "mine"),)).stdout == "a book\n"


def test_a_folder_behind_a_link_can_be_made_readable(tmp_path, walls):
    if os.geteuid() == 0 and "network" in walls:
        return  # as above
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "real" / "inner" / "gift.py").write_text("present = 'a book'")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "last").symlink_to(tmp_path / "real" / "inner")
    os.chmod(tmp_path, 0o755)
    code = "import gift\nprint(gift.present, open(gift.__file__).read()[:7])"
    for path in (tmp_path / "link" / "inner", tmp_path / "last"):
        assert run(code, walls, paths=(str(path),)).stdout == "a book present\n"
    both = (str(tmp_path / "real" / "inner"), str(tmp_path / "last"), str(tmp_path / "real"))
    assert run(code, walls, paths=both).stdout == "a book present\n"


def test_it_is_imported_without_the_rest(tmp_path):
    words = [sys.executable, "-I", "-S", "-c", f"{ALONE}import sandbox\nprint(sandbox.Sandbox(seconds=3).seconds)"]
    assert subprocess.run(words, capture_output=True, text=True, cwd=tmp_path).stdout == "3.0\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, r"seconds=0\.0; it must be above 0"),
        ({"network": "open"}, "network is 'open'; choose one of deny, allow"),
        ({"seconds": float("inf")}, "seconds is inf; it must be a finite number"),
        ({"seconds": "6"}, "seconds is '6'; it must be a finite number"),
        ({"memory": 0.5}, r"memory is 0\.5; it must be a whole number"),
        ({"memory": None}, "memory is None; it must be a whole number"),
        ({"paths": "/usr"}, "paths is '/usr'; it must be a list"),
        ({"paths": ("nowhere",)}, "'nowhere' is not a folder with an absolute path"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Sandbox(**options)


# --- attacks on the machine -------------------------------------------------------------------------------------------


def test_endless_loops_end(walls):
    start = time.monotonic()
    busy, idle = run("while True: pass", walls, seconds=1.0), run("import time; time.sleep(60)", walls, seconds=1.0)
    assert busy.stop in (Ending.TIMEOUT, Ending.SIGNAL) and idle.stop is Ending.TIMEOUT
    assert time.monotonic() - start < 6


def survivors(mark: str) -> list[str]:
    """Processes whose command line or name holds the mark."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm") as file:
                found += [pid] if mark in file.read() else []
        except OSError:
            continue
    return found


def test_a_fork_bomb_is_bounded_and_leaves_nothing(walls):
    code = """
import ctypes, os
ctypes.CDLL(None).prctl(15, b"bomb-%d")
forks = 0
while True:
    try:
        if os.fork() == 0:
            os.setsid()
            while True:
                try: os.fork()
                except OSError: pass
        forks += 1
    except OSError:
        break
print(forks, flush=True)
import time; time.sleep(60)
"""
    mark = str(os.getpid() % 10000)
    done = run(code.replace("%d", mark), walls, seconds=2.0, processes=6)
    assert done.stop is Ending.TIMEOUT and 1 <= int(done.stdout) <= 8
    assert not survivors(f"bomb-{mark}")


def test_a_daemon_does_not_outlive_its_program(walls):
    mark = f"imp-{os.getpid() % 10000}"
    code = f"""
import ctypes, os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(15, b"{mark}")
        time.sleep(60)
    os._exit(0)
os.wait()
print("done")
"""
    done = run(code, walls)
    assert done.stdout == "done\n" and done.seconds < 7
    assert not survivors(mark)


def test_memory_is_bounded(walls):
    done = run("try:\n    x = bytearray(10 << 30)\nexcept MemoryError:\n    print('no')", walls)
    assert done.stdout == "no\n"
    assert not run("x = [0]\nwhile True: x += x", walls).ok


def test_printing_for_ever_is_cut(walls):
    for stream in ("stdout", "stderr"):
        done = run(f"import sys\nwhile True: sys.{stream}.write('x' * 999)", walls, output=5000)
        assert done.stop is Ending.OUTPUT and len(getattr(done, stream)) == 5000


def test_files_are_bounded(walls):
    code = "try:\n    open('big', 'wb').write(bytes(9 << 20))\nexcept OSError as e:\n    print(e.errno)"
    assert run(code, walls, disk=4).stdout.strip() in ("27", "28")  # too large, or no space
    assert "Too many open files" in run("x = [open('/dev/null') for _ in range(99)]", walls, open_files=20).stderr


@needs_namespaces
def test_all_files_together_are_bounded():
    code = "for i in range(20):\n    open(f'f{i}', 'wb').write(bytes(1 << 20))"
    assert "No space left" in run(code, disk=4).stderr


def test_nothing_outside_can_be_written(walls, tmp_path):
    places = ["/usr/x", "/etc/x", "/var/tmp/x", str(tmp_path / "x"), os.path.dirname(module.__file__) + "/x", "/x"]
    if "network" in walls and not landlocked():
        pytest.skip("this kernel has no Landlock: without namespaces files are guarded by their owners alone")
    code = f"""
import os
for path in {places!r}:
    try: open(path, "w")
    except OSError as error: print("no")
    else: print("wrote", path)
"""
    done = run(code, walls)
    assert done.stdout.replace("wrote /x\n", "no\n") == "no\n" * len(places)  # / may be the sandbox's own
    assert not any(os.path.exists(place) for place in places)


def test_secrets_cannot_be_read(walls, monkeypatch, tmp_path):
    if "network" in walls and not landlocked():
        pytest.skip("this kernel has no Landlock: without namespaces any readable file can be read")
    monkeypatch.setenv("MY_API_KEY", "hush-hush")
    (tmp_path / "secret").write_text("hush-hush")
    code = f"""
import glob, os
print(dict(os.environ))
for path in ["/etc/passwd", "/etc/hostname", {str(tmp_path / "secret")!r}, f"/proc/{{os.getppid()}}/environ",
             "/proc/{os.getpid()}/environ", "/proc/1/environ", "/proc/self/environ", *glob.glob("/proc/*/environ")]:
    try: print(open(path).read())
    except OSError: print("no")
"""
    done = run(code, walls)
    assert "hush" not in done.stdout and "root:" not in done.stdout and done.stdout.count("no\n") >= 7


@needs_namespaces
def test_other_processes_cannot_be_seen_or_killed():
    code = f"""
import os, signal
for pid in (1, os.getppid(), {os.getpid()}):
    try: os.kill(pid, signal.SIGKILL)
    except OSError as error: print(error.errno)
print(os.getpid())
"""
    done = run(code)
    assert int(done.stdout.split()[-1]) < 10 and str(3) in done.stdout.split()  # the trainer: no such process
    assert done.stop is Ending.EXITED  # and init does not hear


def listen(port_file: socket.socket, seen: list) -> None:
    try:
        port_file.accept()
        seen.append(1)
    except OSError:
        pass


@pytest.mark.parametrize("network", ["deny", "allow"])
def test_the_network_is_closed_unless_told(network, request):
    if network == "deny":
        request.getfixturevalue("namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        seen: list[int] = []
        thread = threading.Thread(target=listen, args=(server, seen))
        thread.start()
        port = server.getsockname()[1]
        done = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 3)\nprint('in')", network=network)
        if network == "deny":
            assert "in" not in done.stdout and "OSError" in done.stderr
            server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert seen == ([1] if network == "allow" else [])
    udp = "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))"
    assert network == "allow" or "unreachable" in run(udp).stderr


def test_privileges_are_gone(walls):
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None), libc.unshare(0x10000000), os.getuid())
try: os.setuid(0)
except OSError: print("no")
"""
    words = run(code, walls).stdout.split()
    assert words[0] == "-1" and words[2] != "0" and words[3] == "no"
    assert "network" in walls or words[1] == "-1"


def test_the_trainers_end_is_the_sandboxs_end(walls):
    mark = f"orph-{os.getpid() % 10000}"
    code = f"import ctypes, time\nctypes.CDLL(None).prctl(15, b'{mark}')\nprint('on', flush=True)\ntime.sleep(60)"
    fake = "S.process.namespaces_refused = lambda: 'off'\n" if "network" in walls else ""
    script = f"{ALONE}import sandbox as S\n{fake}S.Sandbox(seconds=50, **{walls!r}).run({code!r})"
    trainer = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script])
    deadline = time.monotonic() + 25
    while not survivors(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert survivors(mark)
    trainer.kill()
    trainer.wait()
    while survivors(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not survivors(mark)


# --- refusal ----------------------------------------------------------------------------------------------------------


def test_without_namespaces_it_refuses_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(module, "namespaces_refused", lambda: "the sandbox could not be built: unshare: not permitted")
    with pytest.raises(SandboxError, match=r"unshare: not permitted.*network cannot be closed.*network='allow'"):
        Sandbox().run("print(1)")
    module.warn_unisolated.cache_clear()
    with pytest.warns(UserWarning, match="limits alone, without namespaces: .*not permitted"), suppress(SandboxError):
        Sandbox(network="allow").run("print(1)")
    with pytest.raises(SandboxError, match="python='/nowhere' is not a Python interpreter"):
        Sandbox(python="/nowhere", network="allow").run("")


@needs_namespaces
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs the unshare program to build a system that refuses")
def test_a_system_that_refuses_is_recognised():
    script = f"{ALONE}import sandbox\nprint(sandbox.namespaces_refused())"
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    words = ["unshare", "-Ur", "sh", "-c", shell, sys.executable, script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("the sandbox could not be built: [Errno 28] unshare"), done.stderr


@needs_namespaces
@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user already")
def test_an_ordinary_user_has_the_same_walls(as_nobody):
    attack = "import os\nprint(os.getuid(), os.listdir('/'), os.path.exists('/etc'))\nopen('/usr/x', 'w')"
    tests = ["assert f(2) == 4", "assert f(3) == 4"]
    script = f"""
print(S.namespaces_refused())
done = S.Sandbox(seconds=8).run({attack!r})
print(done.stdout, done.code, "Read-only" in done.stderr)
print(S.Sandbox(seconds=8).test("def f(x): return x * x", {tests!r}).passed)
print(S.Sandbox(seconds=8, processes=3).run("import os\\nfor _ in range(9): os.fork()").code)
"""
    said = as_nobody(script)
    assert "Traceback" not in said  # a fault of ours is not a refusal of the system
    lines = said.split("\n")
    if lines[0] != "None":
        pytest.skip(f"ordinary users get no namespaces here: {lines[0]}")
    assert lines[1].startswith("65534 [") and lines[1].endswith("False") and lines[2] == " 1 True", said
    assert lines[3:5] == ["(True, False)", "1"], said


# --- the judge's walls; what it judges is in test_judge.py ------------------------------------------------------------

SQUARE = "def square(x): return x * x"
TESTS = ["assert square(3) == 9", "assert square(-2) == 4", "assert square(0) == 0"]


def judge(code, tests=tuple(TESTS), walls=None):
    return Sandbox(seconds=6, **(walls or {})).test(code, tests)


def test_tests_judge(walls):
    right, wrong = judge(SQUARE, walls=walls), judge("def square(x): return 9", walls=walls)
    assert right.passed == (True,) * 3 and right.rate == 1 and not right.messages and not right.weak
    assert wrong.passed == (True, False, False) and wrong.messages[1].startswith("AssertionError")
    look = judge("class P: x = 1", ["assert P.x == 1", "assert P().x == 2"], walls)
    assert look.passed == (True, False) and set(look.weak) == {0, 1}
    read = Sandbox(seconds=6, **walls).programs("print(int(input()) + 1)", [("1", "2"), ("2", "4"), ("x", "")])
    assert read.passed == (True, False, False) and "printed" in read.messages[1] and "1" in read.messages[2]


def test_the_judge_is_out_of_reach(walls):
    """The code under test looks for the process that judges it, to read or to stop it."""
    code = """
import os, signal
seen = []
for pid in (p for p in range(1, 40000) if os.path.isdir(f"/proc/{p}")):
    for name in ("mem", "environ", "fd", "maps"):
        try:
            os.listdir(f"/proc/{pid}/{name}") if name == "fd" else open(f"/proc/{pid}/{name}", "rb").read(1)
            seen.append(pid)
        except OSError: pass
def others(): return [p for p in seen if p != os.getpid()]
"""
    assert judge(code, ["assert others() == []"], walls).passed == (True,)


def test_descriptors_do_not_leak(walls):
    Sandbox(**walls).run("print(1)")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        judge(SQUARE, TESTS, walls)
        Sandbox(**walls).run("print(1)")
    assert len(os.listdir("/proc/self/fd")) == before
