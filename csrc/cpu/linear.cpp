// Linear layers whose every output is computed in one fixed way: y[i, j] is the sum of x[i, k] w[j, k] over pieces of k,
// each summed in order. It depends on row i and column j alone, so a row gives the same bits by itself and in any batch.
// (A library GEMM picks another order of summation for another number of rows.)
//
// A piece of W is turned, so that the lanes of a vector are columns, and all rows go over it while it is in cache. Where
// all of W is turned already, that is read instead: with few rows, turning takes longer than the products.
#include <omp.h>

#include "cpu/attention_tile.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

constexpr int64_t kColumns = kTurnedColumns, kDepth = 128, kMostRows = 256;  // of a piece of W, and rows of x that pass over it
constexpr int64_t kSmall = 1 << 15;                              // multiplications that one thread does alone

// Numbers of x, with the next piece of W on its way into the cache while they are multiplied with this one: each block
// of rows asks for `depth` lines of it.
template <class T>
struct ScalarsAhead {
  const T* x;
  int64_t width, depth;
  const T* next;

  T operator()(int64_t c, int64_t i) const {
    if (c == 0) __builtin_prefetch(next + i * (64 / sizeof(T)), 0, 2);
    return x[c * width + i];
  }
  ScalarsAhead from(int64_t c) const {
    return {x + c * width, width, depth, next + c / kBlock * depth * int64_t(64 / sizeof(T))};
  }
};

template <class T>
void write(const T* sums, const LinearTask<T>& task, int64_t row, int64_t column, int64_t count) {
  T* y = task.y + row * task.y_stride + column;
  const T* base = task.add ? y : task.bias ? task.bias + column : nullptr;
  const T factor = T(task.factor);
  for (int64_t c = 0; c < count; ++c) y[c] = sums[c] * factor + (base ? base[c] : T(0));
}

// Columns [first, last) of one layer, for all rows.
template <class T>
void columns(const T* x, int64_t rows, const LinearTask<T>& task, int64_t first, int64_t last) {
  alignas(kVectorBytes) T piece[kDepth * kColumns], sums[kMostRows * kColumns];
  const int64_t width = task.width;
  for (int64_t j = first, count = 0; j < last; j += count) {
    const int64_t within = task.turned ? j % kColumns : 0, rest = kColumns - within;
    count = last - j < rest ? last - j : rest;
    const int64_t lanes = padded<T>(count);
    for (int64_t top = 0; top < rows; top += kMostRows) {
      const int64_t height = rows - top < kMostRows ? rows - top : kMostRows;
      for (int64_t i = 0; i < height * kColumns; ++i) sums[i] = T(0);
      for (int64_t k = 0; k < width; k += kDepth) {
        const int64_t depth = width - k < kDepth ? width - k : kDepth;
        const T* lines = task.turned ? task.turned + (j - within) * width + k * kColumns + within : piece;
        if (!task.turned)
          transpose([&](int64_t c) { return task.weight + (j + c) * width + k; }, count, depth, T(1), piece, kColumns);
        const ScalarsAhead<T> numbers = {x + top * width + k, width, depth, lines + depth * kColumns};
        multiply<T, true>(numbers, Lines<T>{lines, kColumns}, sums, kColumns, height, depth, lanes);
      }
      for (int64_t i = 0; i < height; ++i) write(sums + i * kColumns, task, top + i, j, count);
    }
  }
}

}  // namespace

template <class T>
void linear_share(const T* x, int64_t rows, const LinearTask<T>* tasks, int count, int64_t thread, int64_t threads) {
  constexpr int64_t unit = Lanes<T>::n;
  int64_t units = 0;
  for (int t = 0; t < count; ++t) units += (tasks[t].height + unit - 1) / unit;
  int64_t begin = units * thread / threads, end = units * (thread + 1) / threads;
  for (int t = 0; t < count && end > 0; ++t) {
    const int64_t height = tasks[t].height, own = (height + unit - 1) / unit;
    if (begin < own) columns<T>(x, rows, tasks[t], begin * unit, end < own ? end * unit : height);
    begin = begin < own ? 0 : begin - own;
    end -= own;
  }
}

template <class T>
void linear(const T* x, int64_t rows, const LinearTask<T>* tasks, int count) {
  int64_t work = 0;
  for (int t = 0; t < count; ++t) work += rows * tasks[t].height * tasks[t].width;
#pragma omp parallel if (work > kSmall)
  linear_share<T>(x, rows, tasks, count, omp_get_thread_num(), omp_get_num_threads());
}

template <class T>
void turn_weight(const T* weight, int64_t height, int64_t width, T* turned) {
#pragma omp parallel for schedule(static) if (height * width > kSmall)
  for (int64_t j = 0; j < height; j += kColumns) {
    const int64_t count = height - j < kColumns ? height - j : kColumns;
    transpose([&](int64_t c) { return weight + (j + c) * width; }, count, width, T(1), turned + j * width, kColumns);
  }
}

#define INSTANTIATE(T)                                                                                     \
  template void turn_weight<T>(const T*, int64_t, int64_t, T*);                                            \
  template void linear_share<T>(const T*, int64_t, const LinearTask<T>*, int, int64_t, int64_t);           \
  template void linear<T>(const T*, int64_t, const LinearTask<T>*, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
