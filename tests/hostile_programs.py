"""Programs that try to pass tests that they cannot pass, or to read what is not theirs. All define ``f(n)``."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["FORGED_TESTS", "READ_TESTS", "forging", "reading"]

FORGED_TESTS = """
import random
for _ in range(3):
    n = random.randrange(10**12)
    assert f(n) == (n * 31 + 7) % 1_000_003, "wrong"
"""
"""Tests of a function that no program here knows."""
READ_TESTS = "assert f(0), 'nothing was read'"
"""Tests that pass as soon as anything is read."""

DEFINED = "\ndef f(n): return 0\n"
BASES = {
    "int": "2",
    "float": "2.0",
    "str": "'2'",
    "list": "[2]",
    "tuple": "(2,)",
    "dict": "{2: 2}",
    "set": "{2}",
    "bytes": "b'2'",
    "complex": "2j",
}
EQUALS = (
    "__eq__ = lambda self, other: True",
    "__eq__ = lambda self, other: True\n    __hash__ = lambda self: 7\n    __class__ = property(lambda self: int)",
)
REPLACED = (
    "json.dumps",
    "json.loads",
    "os.write",
    "os._exit",
    "builtins.compile",
    "builtins.exec",
    "builtins.AssertionError",
    "builtins.getattr",
    "builtins.isinstance",
    "__main__.Calls.receive",
    "__main__.Calls.send",
    "__main__.encode",
    "__main__.decode",
    "__main__.run_tests",
    "random.randrange",
)
PAYLOADS = (
    b'{"failure": ""}',
    b'ready\n{"failure": ""}\n',
    b'{"value": true}\n' * 9,
    b'{"error": "StopIteration", "text": ""}\n' * 9,
)
ENDS = ("os._exit(0)", "raise SystemExit(0)", "pass")
MEMORY = """
import re
for name in ("self", "1", "2", "3"):
    try:
        maps = open(f"/proc/{name}/maps").read()
        memory = open(f"/proc/{name}/mem", "r+b", 0)
        for low, high in re.findall(r"^(\\w+)-(\\w+) rw", maps, re.M):
            memory.seek(int(low, 16))
            content = memory.read(int(high, 16) - int(low, 16))
            for found in re.finditer(rb"wrong|assert f|token", content):
                memory.seek(int(low, 16) + found.start())
                memory.write(b"0" * len(found[0]))
    except (OSError, OverflowError):
        pass
"""
FRAMES = """
import sys
frame = sys._getframe()
while frame is not None:
    for values in (frame.f_locals, frame.f_globals):
        for name in list(values):
            if name in ("failure", "tests", "reference", "error", "token", "verdict"):
                values[name] = ""
            if name in ("calls", "request"):
                CALLS = values[name]
    frame = frame.f_back
"""
OTHERS = [
    text.strip("\n")
    for text in """
import gc
for o in gc.get_objects():
    if isinstance(o, dict) and ("tests" in o or "part" in o):
        o.update(tests="", part="tests")
----
import atexit, os
atexit.register(lambda: os.write(1, b'{"failure": ""}'))
----
import sys
sys.settrace(lambda *a: None)
sys.setprofile(lambda *a: None)
sys.excepthook = lambda *a: None
----
import signal, os
for s in range(1, 30):
    try: signal.signal(s, lambda *a: os._exit(0))
    except Exception: pass
----
import threading, os
def late():
    while True:
        for d in range(3, 20):
            try: os.write(d, b'{"failure": ""}')
            except OSError: pass
threading.Thread(target=late, daemon=True).start()
----
import ctypes
ctypes.memset(id(True), 0, 8)
----
import sys
sys.modules["random"] = sys.modules["json"] = None
----
import os, socket
for d in range(64):
    try: socket.socket(fileno=os.dup(d)).send(b'{"failure": ""}')
    except Exception: pass
----
import os
os.execv("/bin/sh", ["sh", "-c", "exit 0"])
----
import os
for p in range(1, 10):
    try: os.kill(p, 9)
    except Exception: pass
----
check = lambda *a: None
f = check
candidate = check
----
class M(type):
    __eq__ = lambda c, o: True
    __hash__ = type.__hash__
class A(metaclass=M): pass
f = lambda n: A
----
def f(n): raise StopIteration
----
def f(n): raise type("AssertionError", (GeneratorExit,), {})()
----
def f(n): return (x for x in [n])
----
def f(n):
    x = []
    x.append(x)
    return x
----
def f(n): return float("nan")
""".split("----")
]


def forging() -> Iterator[str]:
    """Yield programs that would pass ``FORGED_TESTS`` only by deceit."""
    for base, value in BASES.items():
        for equal in EQUALS:
            yield f"class Any({base}):\n    {equal}\ndef f(n): return Any({value})\n"
    yield f"class Any:\n    {EQUALS[0]}\ndef f(n): return Any()\n"
    for name in REPLACED:
        module, _, attribute = name.partition(".")
        target = f"__import__('{module}').{attribute}"
        yield f'try: {target} = lambda *a, **k: \'{{"failure": ""}}\'\nexcept AttributeError: pass{DEFINED}'
        yield f"def f(n):\n    try: {target} = lambda *a, **k: True\n    except AttributeError: pass\n    return True\n"
    for payload in PAYLOADS:
        for end in ENDS:
            yield f"import os\nfor d in range(64):\n    try: os.write(d, {payload!r})\n    except OSError: pass\n{end}{DEFINED}"
    for attack in (MEMORY, FRAMES):
        yield attack + DEFINED
        yield "def f(n):\n" + "".join(f"    {line}\n" for line in attack.splitlines()) + "    return True\n"
    for attack in OTHERS:
        yield attack + ("\n" if "def f(n)" in attack or "f =" in attack else DEFINED)


READERS = (
    "open({0!r}).read()",
    "open({0!r}, 'rb').read()",
    "os.read(os.open({0!r}, os.O_RDONLY), 100)",
    "__import__('io').FileIO({0!r}).read()",
    "__import__('io').open_code({0!r}).read()",
    "__import__('pathlib').Path({0!r}).read_bytes()",
    "__import__('linecache').getlines({0!r})",
    "__import__('codecs').open({0!r}).read()",
    "__import__('importlib.machinery').machinery.SourceFileLoader('x', {0!r}).get_data({0!r})",
    "list(__import__('fileinput').input({0!r}))",
    "__import__('mmap').mmap(os.open({0!r}, os.O_RDONLY), 0, prot=1)[:]",
    "__import__('shutil').copyfile({0!r}, 'copy') and open('copy').read()",
    "(os.symlink({0!r}, 'link'), open('link').read())[1]",
    "(os.link({0!r}, 'hard'), open('hard').read())[1]",
    "open('../' * 20 + {0!r}).read()",
    "open('/proc/1/root' + {0!r}).read()",
    "os.listdir(os.path.dirname({0!r}))",
    "[e.name for e in os.scandir(os.path.dirname({0!r}))]",
    "os.path.getsize({0!r})",
    "__import__('subprocess').check_output(['cat', {0!r}])",
    "__import__('sqlite3').connect('file:' + {0!r} + '?mode=ro', uri=True).execute('select 1').fetchall()",
)


def reading(*files: str) -> Iterator[str]:
    """Yield programs that return what they read of one of the files."""
    for file in files:
        for reader in READERS:
            yield f"import os\ndef f(n): return {reader.format(file)}\n"
