"""The C++ products of exported programs alone: gigabytes of the matrix and billions of products per second.

    python benchmarks/kernels.py --rows 1,8 --formats int8,int4
    python benchmarks/kernels.py --rows 16,32,512 --kernels many_rows

The matrix has as many rows of a width as take --megabytes, so that it is read from memory, as in a decoding step. One
thread; times are its processor seconds, least of a few, so that the numbers hold while others use the machine too.
BLOOMLM_MAX_CPU_ISA limits the instructions (docs/decisions/programs.md). few_rows reads a matrix as it is stored;
many_rows gives it to oneDNN's kernels, in bfloat16 where the processor and the format have that.
"""

import argparse
import ctypes
import itertools
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from common import machine, record

from bloomlm.kernels.source import cpp_source
from bloomlm.runtime.torch_internals import find_compiler

FORMATS = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 1 / 16}
"""Bytes a weight, in the order of Matrix::Format."""
WRAPPER = """
#include <omp.h>
#include <torch/csrc/inductor/aoti_runtime/utils.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
{source}
extern "C" void run(int format, const void* data, const void* scale, const float* row_scale, int64_t outs, int64_t ins,
                    const float* x, int64_t rows, float* results, bool few) {{
  using namespace bloomlm;
  omp_set_num_threads(1);
  const Matrix matrix{{static_cast<Matrix::Format>(format), data, scale, row_scale, outs, ins}};
  const bool in_bfloat16 = kLevel >= kAvx512Bf16 && format != Matrix::kFloat32 && format != Matrix::kFloat16;
  if (few) few_rows(x, matrix, rows, Finish{{}}, results);
  else if (in_bfloat16) many_rows<Bfloat16>(x, matrix, rows, Finish{{}}, results);
  else many_rows<float>(x, matrix, rows, Finish{{}}, results);
}}
extern "C" const char* level() {{ return bloomlm::kLevelNames[bloomlm::kLevel]; }}
"""


def compiled(directory: Path) -> ctypes.CDLL:
    """The kernels as a library, with the flags that PyTorch's compiler gives."""
    root = Path(torch.__file__).parent
    source, library = directory / "kernels.cpp", directory / "kernels.so"
    source.write_text(WRAPPER.format(source=cpp_source()))
    flags = ["-O3", "-std=c++20", "-march=x86-64-v3", "-fopenmp", "-fno-tree-loop-vectorize", "-fno-trapping-math"]
    paths = [f"-I{root / 'include'}", f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]
    links = ["-ltorch_cpu", "-ltorch", "-lc10"]
    compiler = find_compiler()
    assert compiler is not None, "there is no C++ compiler"
    subprocess.run([compiler, *flags, *paths, "-shared", "-fPIC", source, "-o", library, *links], check=True)
    return ctypes.CDLL(str(library))


def seconds(library: ctypes.CDLL, kind: int, data: torch.Tensor, outs: int, ins: int, rows: int, few: bool) -> float:
    """Processor seconds of a product."""
    scale, row_scale = torch.zeros(outs * ins // 16, dtype=torch.float32), torch.zeros(outs)
    x, results = torch.randn(rows, ins), torch.empty(rows, outs)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (data, scale, row_scale, x, results)]
    times = []
    for _ in range(7):
        start = time.process_time()
        library.run(
            kind,
            *pointers[:3],
            ctypes.c_int64(outs),
            ctypes.c_int64(ins),
            pointers[3],
            ctypes.c_int64(rows),
            pointers[4],
            ctypes.c_bool(few),
        )
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="1,2,4,8,16,32")
    parser.add_argument("--widths", default="1024,4096")
    parser.add_argument("--kernels", default="few_rows")
    parser.add_argument("--megabytes", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        library = compiled(Path(directory))
    library.level.restype = ctypes.c_char_p
    print(f"{library.level().decode()}, one thread; {machine()}\n")
    print("| format | width | rows | kernel | GB/s | billion products/s |\n|---|---:|---:|---|---:|---:|")
    data = torch.zeros(args.megabytes << 20, dtype=torch.uint8)
    table = {}
    for name in args.formats.split(","):
        for ins in map(int, args.widths.split(",")):
            outs = int((args.megabytes << 20) / FORMATS[name]) // ins
            for rows, kernel in itertools.product(map(int, args.rows.split(",")), args.kernels.split(",")):
                took = seconds(library, list(FORMATS).index(name), data, outs, ins, rows, kernel == "few_rows")
                read, products = outs * ins * FORMATS[name] / took / 1e9, outs * ins * rows / took / 1e9
                print(f"| {name} | {ins} | {rows} | {kernel} | {read:.1f} | {products:.0f} |", flush=True)
                row = {"read_gb_per_second": read, "billion_products_per_second": products}
                at = f"{name}, {ins} wide, {rows} rows"
                table[at if kernel == "few_rows" else f"{at}, {kernel}"] = [row]
    record(table)


if __name__ == "__main__":
    main()
