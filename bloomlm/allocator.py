"""Memory that is freed stays with the process: what comes from the system comes page by page, and has to be cleared.

glibc hands the end of its heap back whenever it is free, so a training step would get its gradients' memory anew.
"""

import ctypes

# Of <malloc.h>; their meaning: mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> None:
    """Let malloc keep freed blocks of up to 32 MiB, in the whole process and for the rest of its life.

    Larger ones come from the system and go back to it: glibc cannot find a place for them again when they are aligned,
    as tensors are, and the heap would grow and grow. Nothing happens where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl has none; Windows has no library of the process
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, -1)
