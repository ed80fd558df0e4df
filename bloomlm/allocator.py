"""How a process that runs one command of bloomlm uses memory beside its tensors.

Memory that is freed stays with the process: what comes from the system comes page by page, and has to be cleared. glibc
hands the end of its heap back whenever it is free, so a training step would get its gradients' memory anew.

oneDNN compiles every product for its shapes and keeps the code, in two caches of 1,024 entries each (PyTorch's and its
own). A server reads another number of tokens in almost every pass, and the four products of a block need 2.3 MB for
each number, so the caches would grow to more than 500 MB.
"""

import ctypes
import os

# Of <malloc.h>; their meaning: mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_THRESHOLD = 32 * 2**20
_MOST_PRODUCTS = 128
"""Those of 32 different numbers of tokens."""


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


def bound_product_caches() -> None:
    """Let oneDNN keep the compiled code of few products, in the whole process; before the first product.

    A product that is compiled again takes 0.3 ms more, and the blocks of a pass share it. Variables of the environment
    that are set already stay as they are. Sources: https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html
    for oneDNN's cache, include/ideep/lru_cache.hpp in https://github.com/intel/ideep for PyTorch's.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_MOST_PRODUCTS))
