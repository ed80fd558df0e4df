"""OpenMP's threads: the workers among which PyTorch divides the operations of a thread that calls it.

Every calling thread gets workers of its own, which wait for its next operation in a loop. Once a process has more such
threads than processors, libgomp lets all of them sleep after each operation instead, and to wake them takes as long as
an operation of a decoding step: https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html.
"""

import ctypes

_SOFT_PAUSE = 1  # omp_pause_soft of <omp.h>


def end_workers() -> None:
    """End the workers of the calling thread, before another thread takes over its work; its next operation starts new
    ones. Nothing happens where PyTorch's threads are not OpenMP's.

    Source: https://www.openmp.org/spec-html/5.0/openmpsu155.html (omp_pause_resource_all).
    """
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):
        return
    pause(_SOFT_PAUSE)
