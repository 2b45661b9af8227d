"""Makes glibc keep freed memory, in one arena and without mmap; the commands import this first.

XLA's CPU backend allocates its temporary memory anew at every step, and the kernel then clears it
page by page: 33,000 page faults, and 389 instead of 329 ms for a step of ResNet-18 (32 pixels,
batch 128, one core). A thread keeps its first arena, so this module has to run before the threads
of NumPy and JAX start. It does nothing without glibc or where a GPU plugin of JAX is installed.

It also lets Ctrl-C end the process silently until `exits.run_command`; an interrupted import would
print a traceback.
"""

import ctypes
import platform
import signal
import sys
from importlib import metadata

# The numbers of mallopt's options in malloc.h.
ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1

if (
    platform.libc_ver()[0] == "glibc"
    and "jax" not in sys.modules
    and not metadata.entry_points(group="jax_plugins")
):
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(option, value)

if "jax" not in sys.modules and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
