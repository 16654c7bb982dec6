// Products of up to 16 rows of x with rows of a matrix: c[r][n] = sum over k of x[r][k] w[n][k], in float32.
//
// On tensor cores a block's warps take spans of 64 elements in turn. As in cuda/mma.h, lane 4g + t has rows g and g + 8
// of x, and row g of every eight of the matrix; of a span it has elements 16t to 16t + 15 of each, 32 bytes of half
// precision, which are operands of four products as they lie in memory. Elsewhere, and for a matrix in float32, a warp
// takes one row of the matrix, a lane some of its elements. (As a sum of two numbers of half precision float32 loses
// digits below 2^-3 and everything above 65504 in float16, whose exponents end there.)
//
// What happens to a row of x depends neither on the others nor on their number.
#pragma once

#include "cuda/mma.h"

namespace posttrain::cuda {

constexpr int kRows = 16, kSpan = 64;
constexpr int kWarps = 8, kThreads = 32 * kWarps;

// 16 elements from a 16-byte aligned address; zeros from none.
template <class T>
__device__ inline void load_span(const T* from, unsigned (&to)[8]) {
  const uint4 none = make_uint4(0, 0, 0, 0);
  const uint4 a = from ? reinterpret_cast<const uint4*>(from)[0] : none;
  const uint4 b = from ? reinterpret_cast<const uint4*>(from)[1] : none;
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
  to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// Of 16 rows of x over a span, what one lane has.
struct Rows {
  unsigned low[8], high[8];

  template <class T>
  __device__ void load(const T* low_row, const T* high_row, int64_t span) {
    load_span(low_row ? low_row + span * kSpan : nullptr, low);
    load_span(high_row ? high_row + span * kSpan : nullptr, high);
  }

  // Operand of product s, of four.
  __device__ uint4 operator[](int s) const {
    return make_uint4(low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]);
  }
};

// 8 kTiles rows of a matrix [height, width] in the dtype of x, from row `first` on.
template <class T, int kTiles>
struct DenseRows {
  const T* own[kTiles];  // this lane's row of each eight, at its first element

  struct Piece {
    uint4 bits[kTiles][2];
  };

  __device__ DenseRows(const T* matrix, int64_t first, int64_t height, int64_t width) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) own[j] = matrix + min(first + 8 * j + g, height - 1) * width + 16 * t;
  }

  __device__ Piece piece(int64_t span) const {
    Piece p;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) p.bits[j][i] = reinterpret_cast<const uint4*>(own[j] + span * kSpan)[i];
    }
    return p;
  }

  __device__ void multiply_by(const Rows& x, const Piece& p, float (&sums)[kTiles][4]) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint4 w = p.bits[j][s / 2];
        multiply<T>(sums[j], x[s], s % 2 ? make_uint2(w.z, w.w) : make_uint2(w.x, w.y));
      }
    }
  }
};

// Adds to `sums` the products of the warp's spans. `low` and `high` are this lane's rows at their first element, or
// null. A warp asks for pieces of the matrix kAhead spans ahead, for x one. prepare() is called once, by all threads,
// when the first loads are under way.
template <class T, int kAhead, int kTiles, class Matrix, class Prepare>
__device__ inline void multiply_rows(const T* low, const T* high, int64_t spans, const Matrix& w, Prepare prepare,
                                     float (&sums)[kTiles][4]) {
  int64_t span = threadIdx.x / 32;
  typename Matrix::Piece ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (span + i * kWarps < spans) ahead[i] = w.piece(span + i * kWarps);
  Rows next;
  if (span < spans) next.load(low, high, span);
  prepare();
  for (; span < spans; span += kWarps) {
    const typename Matrix::Piece piece = ahead[0];
    const Rows x = next;
#pragma unroll
    for (int i = 0; i + 1 < kAhead; ++i) ahead[i] = ahead[i + 1];
    if (span + kAhead * kWarps < spans) ahead[kAhead - 1] = w.piece(span + kAhead * kWarps);
    if (span + kWarps < spans) next.load(low, high, span + kWarps);
    w.multiply_by(x, piece, sums);
  }
}

// The sums of all warps, [kRows, 8 kTiles] each, one after the other.
template <int kTiles>
__device__ inline void store_sums(const float (&sums)[kTiles][4], float* of_warps) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float* own = of_warps + threadIdx.x / 32 * (kRows * 8 * kTiles) + g * 8 * kTiles + 2 * t;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) own[(i / 2 * 8) * 8 * kTiles + 8 * j + i % 2] = sums[j][i];
  }
}

// c[r][n] from what store_sums stored.
template <int kTiles>
__device__ inline float total_of_warps(const float* of_warps, int r, int n) {
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += of_warps[(warp * kRows + r) * 8 * kTiles + n];
  return total;
}

// Eight elements from a 16-byte aligned address.
template <class T>
__device__ inline void load_eight(const T* from, float (&to)[8]) {
#pragma unroll
  for (int part = 0; part < 8 / Vector<T>::size; ++part) {
    const Vector<T> v = load_vector(from + part * Vector<T>::size);
#pragma unroll
    for (int e = 0; e < Vector<T>::size; ++e) to[part * Vector<T>::size + e] = v[e];
  }
}

// A row in float32 [width], in units of elements: of 8, 16-byte aligned, or of 2.
template <int kUnit>
struct DenseRow {
  const float* row;
  int64_t width;

  __device__ int64_t units() const { return (width + kUnit - 1) / kUnit; }

  // The values of a unit, and where it begins.
  __device__ int64_t unit(int64_t i, float (&v)[kUnit]) const {
    if constexpr (kUnit == 8) {
      load_eight(row + 8 * i, v);
    } else {
      for (int e = 0; e < kUnit; ++e) v[e] = kUnit * i + e < width ? row[kUnit * i + e] : 0.0f;
    }
    return kUnit * i;
  }
};

// The warp's sums for up to 16 rows, of which row(r) is the address, with one row of a matrix.
template <int kUnit, class RowOf, class Matrix>
__device__ inline void multiply_rows_plainly(RowOf row, int rows, int64_t width, const Matrix& w,
                                             float (&sums)[kRows]) {
  for (int64_t i = threadIdx.x % 32, units = w.units(); i < units; i += 32) {
    float v[kUnit];
    const int64_t k = w.unit(i, v);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      const auto* x = row(r) + k;
      if constexpr (kUnit == 8) {
        float own[8];
        load_eight(x, own);
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[r] = fmaf(own[e], v[e], sums[r]);
      } else {
#pragma unroll
        for (int e = 0; e < kUnit; ++e)
          if (k + e >= 0 && k + e < width) sums[r] = fmaf(load(x + e), v[e], sums[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = reduce_warp(sums[r], Sum{});
}

}  // namespace posttrain::cuda
