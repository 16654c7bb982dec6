// Linear layers whose every output is computed in one fixed way: y[i, j] is the sum over k, in vector lanes and then
// pairwise over the lanes, of x[i, k] w[j, k]. It depends on row i and column j alone, so a row gives the same bits by
// itself and in any batch. (A library GEMM picks another order of summation for another number of rows.)
//
// A tile of kRows x kColumns outputs has one vector of partial sums each; as many as there are lanes, so that turning
// them into one vector of results takes lanes - 1 additions.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

template <class T>
struct Tile {
  static constexpr int n = Lanes<T>::n;
  static constexpr int columns = n < 4 ? n : 4, rows = n / columns;
};
constexpr int64_t kChunkBytes = 24 << 10;  // of rows of x that stay in the first cache
constexpr int64_t kSmall = 1 << 15;        // multiplications that one thread does alone

// Lane i of the result is the sum of the lanes of v[i].
template <class T>
Vec<T> sums(Vec<T>* v) {
  constexpr int n = Lanes<T>::n;
  decltype(Vec<T>{} < Vec<T>{}) low = {}, high = {};
  for (int i = 0; i < n; ++i) {
    low[i] = i / 2 + i % 2 * n;
    high[i] = low[i] + n / 2;
  }
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = shuffle<T>(v[i], v[i + half], low) + shuffle<T>(v[i], v[i + half], high);
  return v[0];
}

// y[row + r, column + c] for R rows of x and the columns of a tile, w[c] their weights.
template <class T, int R>
void tile(const T* x, const T* const* w, const LinearTask<T>& task, int64_t row, int64_t column) {
  constexpr int n = Lanes<T>::n, C = Tile<T>::columns;
  const int64_t width = task.width;
  x += row * width;
  Vec<T> acc[n] = {};
  int64_t k = 0;
  for (; k + n <= width; k += n) {
    Vec<T> b[C];
    for (int c = 0; c < C; ++c) b[c] = load(w[c] + k);
    for (int r = 0; r < R; ++r) {
      const Vec<T> a = load(x + r * width + k);
      for (int c = 0; c < C; ++c) acc[r * C + c] += a * b[c];
    }
  }
  if (k < width) {
    const int left = int(width - k);
    Vec<T> b[C];
    for (int c = 0; c < C; ++c) b[c] = load_part(w[c] + k, left, T(0));
    for (int r = 0; r < R; ++r) {
      const Vec<T> a = load_part(x + r * width + k, left, T(0));
      for (int c = 0; c < C; ++c) acc[r * C + c] += a * b[c];
    }
  }
  const Vec<T> result = sums<T>(acc) * T(task.factor);
  const int count = int(task.height - column < C ? task.height - column : C);
  for (int r = 0; r < R; ++r) {
    T* y = task.y + (row + r) * task.y_stride + column;
    for (int c = 0; c < count; ++c)
      y[c] = result[r * C + c] + (task.add ? y[c] : task.bias ? task.bias[column + c] : T(0));
  }
}

template <class T>
void tile_of(int rows, const T* x, const T* const* w, const LinearTask<T>& task, int64_t row, int64_t column) {
  constexpr int R = Tile<T>::rows;
  if (rows == 1) return tile<T, 1>(x, w, task, row, column);
  if constexpr (R >= 2)
    if (rows == 2) return tile<T, 2>(x, w, task, row, column);
  if constexpr (R >= 3)
    if (rows == 3) return tile<T, 3>(x, w, task, row, column);
  if constexpr (R >= 4) return tile<T, 4>(x, w, task, row, column);
}

// Columns [first, last) of one layer, for all rows.
template <class T>
void columns(const T* x, int64_t rows, const LinearTask<T>& task, int64_t first, int64_t last) {
  constexpr int C = Tile<T>::columns, R = Tile<T>::rows;
  int64_t chunk = kChunkBytes / (task.width * int64_t(sizeof(T)) + 1) / R * R;
  if (chunk < R) chunk = R;
  for (int64_t top = 0; top < rows; top += chunk) {
    const int64_t end = top + chunk < rows ? top + chunk : rows;
    for (int64_t j = first; j < last; j += C) {
      const T* w[C];
      for (int c = 0; c < C; ++c) w[c] = task.weight + (j + c < last ? j + c : j) * task.width;
      for (int64_t i = top; i < end; i += R) tile_of<T>(int(end - i < R ? end - i : R), x, w, task, i, j);
    }
  }
}

}  // namespace

template <class T>
void linear(const T* x, int64_t rows, const LinearTask<T>* tasks, int count) {
  constexpr int C = Tile<T>::columns;
  int64_t blocks = 0, work = 0;
  for (int t = 0; t < count; ++t) {
    blocks += (tasks[t].height + C - 1) / C;
    work += rows * tasks[t].height * tasks[t].width;
  }
#pragma omp parallel if (work > kSmall)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t begin = blocks * thread / threads, end = blocks * (thread + 1) / threads;
    for (int t = 0; t < count && begin < end; ++t) {
      const int64_t own = (tasks[t].height + C - 1) / C;
      if (begin < own) {
        const int64_t last = end < own ? end : own;
        columns<T>(x, rows, tasks[t], begin * C, last * C < tasks[t].height ? last * C : tasks[t].height);
      }
      begin = begin < own ? 0 : begin - own;
      end -= own;
    }
  }
}

template void linear<float>(const float*, int64_t, const LinearTask<float>*, int);
template void linear<double>(const double*, int64_t, const LinearTask<double>*, int);

}  // namespace posttrain::POSTTRAIN_ISA
