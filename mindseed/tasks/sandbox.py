"""Running code that a model wrote: in a process of its own, short, small and alone.

The process has a few seconds, bounded memory and output, no environment, an empty folder that is deleted afterwards,
no child processes and no large files. That keeps honest mistakes (endless loops, memory, litter) harmless. It is not a
wall against code that means harm: it runs as the user, and can read, write and delete what that user can. So nothing
calls this unless code was asked for by name.
"""
from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile

TIMEOUT_S, MEMORY_BYTES, FILE_BYTES = 5.0, 512 << 20, 1 << 20
LIMITS = """
import resource, sys
word, code = sys.stdin.readline(), sys.stdin.read()
seconds, memory, size = {limits}
for what, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, size),
                   (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (most, most))
exec(compile(code, "answer", "exec"), {{"__name__": "__main__"}})
sys.__stdout__.write("\\n" + word)
"""


def passes(code: str, *, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether the code runs to its end without raising, within its limits. Leaving early, with whatever exit code, is
    no end: only who comes to it says the word of this run. Code that looks for that word can find it, so
    `verify.grade_code` also asks whether it passes what nothing can."""
    word = secrets.token_hex(16)
    limits = LIMITS.format(limits=(max(1, round(timeout_s)), memory_bytes, FILE_BYTES))
    with tempfile.TemporaryDirectory() as folder:
        with tempfile.TemporaryFile() as out:     # a file, so that its size is limited as that of others is
            process = subprocess.Popen([sys.executable, "-I", "-S", "-c", limits], cwd=folder, env={},
                                       stdin=subprocess.PIPE, stdout=out, stderr=subprocess.DEVNULL,
                                       start_new_session=True)
            try:
                process.communicate(f"{word}\n{code}".encode(errors="replace"), timeout=timeout_s)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)                        # and whatever it has started
                process.wait()
            out.seek(max(0, out.seek(0, os.SEEK_END) - 2 * len(word)))
            return process.returncode == 0 and out.read().rstrip().endswith(word.encode())
