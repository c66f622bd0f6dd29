"""What the process does with memory that a pass has freed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Keep it for the next pass, which asks for the same sizes.

    glibc gives large pieces back to the system at once, and every page that it then gets anew
    costs a fault: at 480 rows that is four times the arithmetic of a norm. Elsewhere no effect.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
            mallopt(M_TRIM_THRESHOLD, 1 << 30)
