// RMS norm with an optional fused residual add (posttrain/ops/rms_norm.py derives the gradient).
//
// A row is read once for the sum of squares and once more, from cache, for the output. The weight gradient is summed
// over a few rows at a time, then in double over each block of rows, then over the blocks in order: so it does not
// depend on the threads, and stays exact over any number of rows.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace posttrain::POSTTRAIN_ISA {

constexpr int64_t kFewRows = 16;

int64_t rms_norm_blocks(int64_t rows) {
  const int64_t blocks = (rows + 31) / 32;
  return blocks < 64 ? blocks : 64;
}

template <class T>
static T add_and_square(const T* x, const T* residual, T* sum_out, int64_t width) {
  constexpr int n = Lanes<T>::n;
  Vec<T> squares = splat(T(0)), squares2 = splat(T(0));
  int64_t j = 0;
  for (; j + 2 * n <= width; j += 2 * n) {
    Vec<T> a = load(x + j), b = load(x + j + n);
    if (residual) {
      a += load(residual + j);
      b += load(residual + j + n);
      store(sum_out + j, a);
      store(sum_out + j + n, b);
    }
    squares += a * a;
    squares2 += b * b;
  }
  T total = sum<T>(squares + squares2);
  for (; j < width; ++j) {
    T a = x[j];
    if (residual) sum_out[j] = a = a + residual[j];
    total += a * a;
  }
  return total;
}

template <class T>
void rms_norm_forward(const T* x, const T* residual, const T* weight, T* y, T* sum_out, T* rstd, int64_t rows,
                      int64_t width, double eps) {
  constexpr int n = Lanes<T>::n;
#pragma omp parallel for schedule(static) if (rows * width > 16384)
  for (int64_t i = 0; i < rows; ++i) {
    const T total = add_and_square(x + i * width, residual ? residual + i * width : nullptr,
                                   sum_out ? sum_out + i * width : nullptr, width);
    const T scale = T(1) / T(__builtin_sqrt(double(total) / double(width) + eps));
    const T* row = residual ? sum_out + i * width : x + i * width;
    T* out = y + i * width;
    rstd[i] = scale;
    int64_t j = 0;
    for (; j + n <= width; j += n) store(out + j, load(row + j) * scale * load(weight + j));
    for (; j < width; ++j) out[j] = row[j] * scale * weight[j];
  }
}

template <class T>
static void backward_row(const T* grad_y, const T* grad_sum, const T* row, const T* weight, T scale, T* dx, T* dw,
                         int64_t width) {
  constexpr int n = Lanes<T>::n;
  Vec<T> dot = splat(T(0));
  int64_t j = 0;
  for (; j + n <= width; j += n) {
    const Vec<T> g = load(grad_y + j), x = load(row + j);
    dot += g * load(weight + j) * x;
    store(dw + j, load(dw + j) + g * x * scale);
  }
  T total = sum<T>(dot);
  for (; j < width; ++j) {
    total += grad_y[j] * weight[j] * row[j];
    dw[j] += grad_y[j] * row[j] * scale;
  }
  const T pull = total * scale * scale * scale / T(width);
  for (j = 0; j + n <= width; j += n) {
    Vec<T> d = load(grad_y + j) * load(weight + j) * scale - load(row + j) * pull;
    if (grad_sum) d += load(grad_sum + j);
    store(dx + j, d);
  }
  for (; j < width; ++j)
    dx[j] = grad_y[j] * weight[j] * scale - row[j] * pull + (grad_sum ? grad_sum[j] : T(0));
}

template <class T>
void rms_norm_backward(const T* grad_y, const T* grad_sum, const T* sum, const T* weight, const T* rstd, T* dx, T* dw,
                       T* partial, double* exact, int64_t rows, int64_t width) {
  const int64_t blocks = rms_norm_blocks(rows);
#pragma omp parallel for schedule(static) if (rows * width > 16384)
  for (int64_t b = 0; b < blocks; ++b) {
    T* few = partial + b * width;
    double* all = exact + b * width;
    for (int64_t j = 0; j < width; ++j) few[j] = T(0), all[j] = 0;
    const int64_t begin = rows * b / blocks, end = rows * (b + 1) / blocks;
    for (int64_t i = begin; i < end; ++i) {
      backward_row(grad_y + i * width, grad_sum ? grad_sum + i * width : nullptr, sum + i * width, weight, rstd[i],
                   dx + i * width, few, width);
      if ((i - begin) % kFewRows == kFewRows - 1 || i + 1 == end)
        for (int64_t j = 0; j < width; ++j) all[j] += double(few[j]), few[j] = T(0);
    }
  }
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t j = 0; j < width; ++j) exact[j] += exact[b * width + j];
  for (int64_t j = 0; j < width; ++j) dw[j] = blocks ? T(exact[j]) : T(0);
}

#define INSTANTIATE(T)                                                                                            \
  template void rms_norm_forward<T>(const T*, const T*, const T*, T*, T*, T*, int64_t, int64_t, double);           \
  template void rms_norm_backward<T>(const T*, const T*, const T*, const T*, const T*, T*, T*, T*, double*, \
                                     int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
