// What packed and paged attention share: products, and a softmax that goes through blocks of keys.
//
// Every product is one micro-kernel: C[c][:] += sum over i of A[c, i] B[i][:] on a block of kBlock c times up to
// kWide vectors, kept in registers and added to C at the end, since sums of sums err less. A is read one number at a
// time, in any layout, and B in whole vectors.
//
// A panel is up to kRows rows, each a query under one head. What becomes of a row depends only on the row and on the
// blocks of keys that it goes through, not on the other rows.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif
constexpr int kBlock = 6;
constexpr int64_t kRows = kPanelRows;
constexpr int64_t kKeys = kKeyBlock;
constexpr double kInfinity = __builtin_inf();

template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + Lanes<T>::n - 1) / Lanes<T>::n * Lanes<T>::n;
}

template <class T>
struct Index {};
template <>
struct Index<float> {
  typedef int32_t type;
};
template <>
struct Index<double> {
  typedef int64_t type;
};
template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});  // also a vector of Index<T>

template <class T>
inline Mask<T> load_indices(const typename Index<T>::type* p) {
  Mask<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Numbers A[c, i] at a + c * by_c + i * by_i.
template <class T>
struct Scalars {
  const T* a;
  int64_t by_c, by_i;

  T operator()(int64_t c, int64_t i) const { return a[c * by_c + i * by_i]; }
  Scalars from(int64_t c) const { return {a + c * by_c, by_c, by_i}; }
};

// Lines of numbers, `stride` apart, that may be read up to whole vectors.
template <class T>
struct Lines {
  const T* data;
  int64_t stride;

  const T* operator[](int64_t i) const { return data + i * stride; }
};

// Lines anywhere, from their element `first` on: those of B as in Lines, and the numbers A[c, i] = lines[c][first + i].
template <class T>
struct LinePointers {
  const T* const* lines;
  int64_t first;

  const T* operator[](int64_t i) const { return lines[i] + first; }
  T operator()(int64_t c, int64_t i) const { return lines[c][first + i]; }
  LinePointers from(int64_t c) const { return {lines + c, first}; }
};

constexpr int64_t kCacheLine = 64;  // bytes

// Lines as in LinePointers, of which kWide vectors are read, and as many numbers of `size` later ones, from their element
// `later_first` on, which are asked for meanwhile.
template <class T>
struct LinesAndLater {
  const T* const* lines;
  int64_t first;
  const T* const* later;
  int64_t later_first, size;

  const T* operator[](int64_t i) const {
    constexpr int64_t step = kCacheLine / sizeof(T);
    if (i < size)
      for (int64_t d = 0; d < kWide * Lanes<T>::n; d += step) __builtin_prefetch(later[i] + later_first + d, 0, 2);
    return lines[i] + first;
  }
};

template <class T, int C, int R, bool kAdd, class A, class B>
inline void block(A a, B b, int64_t first, T* c, int64_t c_stride, int64_t n, int last) {
  constexpr int n_lanes = Lanes<T>::n;
  Vec<T> sums[C][R] = {};
  for (int64_t i = 0; i < n; ++i) {
    Vec<T> rows[R];
    const T* line = b[i] + first;
    for (int r = 0; r < R; ++r) rows[r] = load(line + r * n_lanes);
    for (int j = 0; j < C; ++j) {
      const Vec<T> scalar = splat(a(j, i));
      for (int r = 0; r < R; ++r) sums[j][r] += scalar * rows[r];
    }
  }
  for (int j = 0; j < C; ++j)
    for (int r = 0; r < R; ++r) {
      T* at = c + j * c_stride + r * n_lanes;
      if (r == R - 1 && last < n_lanes)
        store_part(at, kAdd ? load_part(at, last, T(0)) + sums[j][r] : sums[j][r], last);
      else
        store(at, kAdd ? load(at) + sums[j][r] : sums[j][r]);
    }
}

template <class T, int R, bool kAdd, class A, class B>
void blocks(A a, B b, int64_t first, T* c, int64_t c_stride, int64_t count, int64_t n, int last) {
  int64_t j = 0;
  for (; j + kBlock <= count; j += kBlock, c += kBlock * c_stride)
    block<T, kBlock, R, kAdd>(a.from(j), b, first, c, c_stride, n, last);
  switch (count - j) {
    case 1: return block<T, 1, R, kAdd>(a.from(j), b, first, c, c_stride, n, last);
    case 2: return block<T, 2, R, kAdd>(a.from(j), b, first, c, c_stride, n, last);
    case 3: return block<T, 3, R, kAdd>(a.from(j), b, first, c, c_stride, n, last);
    case 4: return block<T, 4, R, kAdd>(a.from(j), b, first, c, c_stride, n, last);
    case 5: return block<T, 5, R, kAdd>(a.from(j), b, first, c, c_stride, n, last);
  }
}

// C[c][0, width) (+)= sum over i < n of A[c, i] B[i][0, width) for c < count. Each sum runs through i in order, wherever
// its block lies.
template <class T, bool kAdd, class A, class B>
void multiply(A a, B b, T* c, int64_t c_stride, int64_t count, int64_t n, int64_t width) {
  constexpr int lanes = Lanes<T>::n;
  for (int64_t first = 0; first < width; first += kWide * lanes) {
    const int64_t rest = width - first;
    const int vectors = rest >= kWide * lanes ? kWide : int((rest + lanes - 1) / lanes);
    const int last = rest >= vectors * lanes ? lanes : int(rest - (vectors - 1) * lanes);
    switch (vectors) {
      case 1: blocks<T, 1, kAdd>(a, b, first, c + first, c_stride, count, n, last); break;
      case 2: blocks<T, 2, kAdd>(a, b, first, c + first, c_stride, count, n, last); break;
#if defined(__AVX512F__)
      case 3: blocks<T, 3, kAdd>(a, b, first, c + first, c_stride, count, n, last); break;
      case 4: blocks<T, 4, kAdd>(a, b, first, c + first, c_stride, count, n, last); break;
#endif
    }
  }
}

// The same, of numbers in any layout and lines at b, b + b_stride, ...
template <class T, bool kAdd>
void multiply(Scalars<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t count, int64_t n,
              int64_t width) {
  multiply<T, kAdd>(a, Lines<T>{b, b_stride}, c, c_stride, count, n, width);
}

template <class T>
void copy_line(const T* from, int64_t size, T factor, T* to) {
  for (int64_t d = 0; d < size; ++d) to[d] = from[d] * factor;
  for (int64_t d = size; d < padded<T>(size); ++d) to[d] = T(0);
}

// v[i][r] = row(r)[i] for r < rows and i < size, at most whole vectors, else 0.
template <class T, class Row>
inline void load_turned(Row row, int64_t rows, int64_t size, Vec<T>* v) {
  constexpr int n = Lanes<T>::n;
  if (rows >= n && size >= n)
    for (int r = 0; r < n; ++r) v[r] = load(row(r));
  else
    for (int r = 0; r < n; ++r)
      v[r] = r >= rows ? splat(T(0)) : size >= n ? load(row(r)) : load_part(row(r), int(size), T(0));
  turn<T>(v);
}

// to[d][0, rows) = row(r)[d] * factor for d < size, with zeros up to whole vectors.
template <class T, class Row>
void transpose(Row row, int64_t rows, int64_t size, T factor, T* to, int64_t stride) {
  constexpr int n = Lanes<T>::n;
  for (int64_t r = 0; r < rows; r += n)
    for (int64_t d = 0; d < size; d += n) {
      Vec<T> v[n];
      load_turned<T>([&](int64_t i) { return row(r + i) + d; }, rows - r, size - d, v);
      for (int i = 0; i < n && d + i < size; ++i) store(to + (d + i) * stride + r, v[i] * factor);
    }
}

// Lines of scores s[count][stride], to be read as vectors [0, width).
template <class T>
void cap_scores(T* s, int64_t stride, int64_t count, int64_t width, T cap) {
  for (int64_t j = 0; j < count; ++j, s += stride)
    for (int64_t r = 0; r < width; r += Lanes<T>::n) store(s + r, tanh(load(s + r) * (1 / cap)) * cap);
}

// Turns scores s[key][kRows] into e^(s - m), moves m to the new maximum, and rescales the sums l and the rows o.
template <class T>
void online_softmax(T* s, int64_t keys, int64_t rows, T* m, T* l, T* o, int64_t line) {
  constexpr int n = Lanes<T>::n;
  T factors[kRows];
  Mask<T> moved = {};
  for (int64_t r = 0; r < rows; r += n) {
    Vec<T> tops[4];
    for (int i = 0; i < 4; ++i) tops[i] = load(m + r);
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4)
      for (int i = 0; i < 4; ++i) tops[i] = max<T>(tops[i], load(s + (j + i) * kRows + r));
    for (; j < keys; ++j) tops[0] = max<T>(tops[0], load(s + j * kRows + r));
    const Vec<T> top = max<T>(max<T>(tops[0], tops[1]), max<T>(tops[2], tops[3]));
    const Vec<T> reference = top > T(-kInfinity) ? top : splat(T(0));
    const Vec<T> factor = exp_or_zero(load(m + r) - reference);
    Vec<T> sums = load(l + r) * factor;
    for (T* at = s + r; at < s + keys * kRows; at += kRows) {
      const Vec<T> p = exp_or_zero(load(at) - reference);
      store(at, p);
      sums += p;
    }
    store(m + r, top);
    store(l + r, sums);
    store(factors + r, factor);
    moved |= factor < T(1);
  }
  T any[n];
  store(any, moved ? splat(T(1)) : splat(T(0)));
  if (max_lane<T>(load(any)) == 0) return;
  for (int64_t row = 0; row < rows; ++row)
    if (factors[row] < 1)
      for (int64_t d = 0; d < line; d += n) store(o + row * line + d, load(o + row * line + d) * factors[row]);
}

// What a row is to be multiplied with in the end, and its log-sum-exp.
template <class T>
struct RowEnd {
  T factor;
  double lse;
};

// From the maximum and the sum of a row, and its sink, if not null.
template <class T>
RowEnd<T> end_row(T m, T l, const T* sink) {
  double sum = l, top = m, factor = 1;
  if (sink && *sink > top) {
    factor = __builtin_exp(top - *sink);
    top = *sink;
  }
  sum = sum * factor + (sink ? __builtin_exp(*sink - top) : 0);
  return {sum > 0 ? T(factor / sum) : T(0), sum > 0 ? top + __builtin_log(sum) : -kInfinity};
}

}  // namespace

}  // namespace posttrain::POSTTRAIN_ISA
