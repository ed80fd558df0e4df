// bloomlm::weight_gradient: the gradient of a matrix [outs, ins] from the gradients [N, outs] of its products and their
// inputs x [N, ins]: the sum over N of gradient times x.
//
// All products are of a tile of kPanel outs and kPanel ins over up to kRows rows, by oneDNN's kernels for small matrices.
// kPanel columns of the gradients are turned over at a time, and multiplied with kColumns of x, which lie in panels of
// kPanel columns; PyTorch would turn the gradients over as a whole before.

#include <algorithm>
#include <stdexcept>

#include "many_rows.h"
#include "tensors.h"

namespace bloomlm {

constexpr int64_t kRows = 1024;     // of a tile: as many of kPanel columns stay in the second cache
constexpr int64_t kColumns = 1024;  // of x that are multiplied at a time: as many stay in the third

// kPanel columns of x [N, ins] from `first` on as [rows, kPanel], with zeros after the last row and column.
inline void copy_panel(const float* x, int64_t num_rows, int64_t ins, int64_t first, int64_t rows, float* panel) {
  const int64_t count = std::min(kPanel, ins - first);
  if (num_rows < rows || count < kPanel) std::fill_n(panel, rows * kPanel, 0.0f);
  for (int64_t row = 0; row < num_rows; ++row) std::copy_n(x + row * ins + first, count, panel + row * kPanel);
}

// Rows of the gradients are `stride` numbers apart.
inline void weight_gradient(const float* gradients, int64_t stride, const float* x, int64_t num_rows, int64_t outs,
                            int64_t ins, float* results) {
  // sums over a multiple of kUnit rows, since each number of rows is a kernel
  const int64_t rows = (num_rows + kUnit - 1) / kUnit * kUnit;
  const int64_t turned_stride = kRows + kUnit;  // rows whose distance is a power of two would share places of the cache
  const Kernels kernels = kernels_of_level();
  Room<float> panels(kColumns * rows);
#pragma omp parallel
  {
    Room<float> turned(kPanel * turned_stride);
    for (int64_t left = 0; left < ins; left += kColumns) {
      const int64_t right = std::min(left + kColumns, ins);
#pragma omp for schedule(static)
      for (int64_t first = left; first < right; first += kPanel)
        copy_panel(x, num_rows, ins, first, rows, panels.data() + (first - left) * rows);
#pragma omp for schedule(dynamic)
      for (int64_t start = 0; start < outs; start += kPanel) {
        const int64_t count = std::min(kPanel, outs - start);
        for (int64_t row = 0; row < rows; row += kRows) {
          const int64_t inner = std::min(kRows, rows - row), here = std::min(kRows, num_rows - row);
          kernels.turn(gradients + row * stride + start, stride, here, count, turned.data(), turned_stride);
          for (int64_t out = 0; out < count; ++out)
            std::fill(turned.data() + out * turned_stride + here, turned.data() + out * turned_stride + inner, 0.0f);
          for (int64_t first = left; first < right; first += kPanel)
            multiply(count, std::min(kPanel, ins - first), inner, turned.data(), turned_stride,
                     panels.data() + (first - left) * rows + row * kPanel, kPanel, results + start * ins + first, ins,
                     row > 0);
        }
      }
    }
  }
}

// Writes a result [outs, ins]. Columns of the gradients, x and the result are contiguous.
inline void weight_gradient(AtenTensorHandle gradients, AtenTensorHandle x, AtenTensorHandle result) {
  if (!has_products<float>()) throw std::runtime_error("this PyTorch has no products of small matrices");
  const Floats from(gradients), inputs(x);
  weight_gradient(from.data, from.strides[0], inputs.data, from.sizes[0], from.sizes[1], inputs.sizes[1],
                  data_of<float>(result));
}

}  // namespace bloomlm
