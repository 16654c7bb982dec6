// What a warp does with a step of a paged cache, kStep keys and values of a sequence under one key head, for the rows
// of cuda/paged_attention.cu: scores += rows keys^T, and sums += weights values.
//
// Half precision multiplies on tensor cores (cuda/mma.h). Which k, and which column, is which is free as long as both
// factors agree: so a lane's 16 bytes of a key are the operands of two products as they lie in memory. float32
// multiplies on ordinary cores and keeps its results in the same places. With g = lane / 4 and c = lane % 4, a lane
// holds the rows g and g + 8 of a tile of 16: of 8 scores 2c and 2c + 1, of 64 elements of the output 16c to 16c + 15.
#pragma once

#include "cuda/mma.h"

namespace posttrain::cuda {

constexpr int kStep = 16;
constexpr unsigned kAll = ~0u;

struct Lane {
  int warp = threadIdx.x / 32, index = threadIdx.x % 32, g = index / 4, c = index % 4;
};

__device__ inline unsigned word(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// kStep keys or values of a sequence under one key head, from `first` on, which is a multiple of kStep; those from
// `end` on are not read and count as zeros. Eight of them lie in one page.
template <class T>
struct Lines {
  const T* page[2];
  int first, end, mask;
  int64_t token;

  __device__ Lines(const PagedView& pages, const int32_t* table, int page_bits, int key_head, int first, int end)
      : first(first), end(end), mask((1 << page_bits) - 1), token(pages.token) {
    for (int n = 0; n < 2; ++n) {
      const int64_t index = table[(first + 8 * n < end ? first + 8 * n : first) >> page_bits];
      page[n] = static_cast<const T*>(pages.data) + index * pages.page + key_head * pages.head;
    }
  }

  // Key 8n + i, elements d, d + 1, ... in 16 bytes.
  template <class Vector>
  __device__ Vector read(int n, int i, int d, int width) const {
    const int key = first + 8 * n + i;
    if (key >= end || d >= width) return Vector{};
    return __ldg(reinterpret_cast<const Vector*>(page[n] + (key & mask) * token + d));
  }
};

// s[t] += the products of tile t's rows, of which `row` is the lane's first, with a step's keys.
template <int kWidth, int kLine, class T, int kTiles>
__device__ inline void multiply_keys(const Lines<T>& keys, const T* row, int tiles, int width,
                                     float (&s)[kTiles][2][4], Lane at) {
#pragma unroll
  for (int d = 8 * at.c; d < kWidth; d += 32) {
    const uint4 k[2] = {keys.template read<uint4>(0, at.g, d, width), keys.template read<uint4>(1, at.g, d, width)};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t >= tiles) continue;
      const uint4 low = *reinterpret_cast<const uint4*>(row + 16 * t * kLine + d);
      const uint4 high = *reinterpret_cast<const uint4*>(row + (16 * t + 8) * kLine + d);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply<T>(s[t][n], make_uint4(low.x, high.x, low.y, high.y), make_uint2(k[n].x, k[n].y));
        multiply<T>(s[t][n], make_uint4(low.z, high.z, low.w, high.w), make_uint2(k[n].z, k[n].w));
      }
    }
  }
}

template <int kLine, int kTiles>
__device__ inline void multiply_float_keys(const Lines<float>& keys, const float* row, int tiles, int width,
                                           float (&s)[kTiles][2][4], Lane at) {
#pragma unroll 1
  for (int d = 0; d < width; d += 4) {
    float4 k[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 2; ++i) k[n][i] = keys.read<float4>(n, 2 * at.c + i, d, width);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t >= tiles) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 q = *reinterpret_cast<const float4*>(row + (16 * t + 8 * r) * kLine + d);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& sum = s[t][n][2 * r + i];
            sum = fmaf(q.x, k[n][i].x, sum), sum = fmaf(q.y, k[n][i].y, sum);
            sum = fmaf(q.z, k[n][i].z, sum), sum = fmaf(q.w, k[n][i].w, sum);
          }
      }
    }
  }
}

// Elements j of 8 of two values as a pair.
__device__ inline unsigned pair(uint4 first, uint4 second, int j) {
  const unsigned a = word(first, j / 2), b = word(second, j / 2);
  return j % 2 == 0 ? (a & 0xffffu) | b << 16 : a >> 16 | (b & 0xffff0000u);
}

// sum[t] += tile t's weights p[t] times a step's values.
template <int kWidth, class T, int kTiles>
__device__ inline void add_values(const Lines<T>& values, const float (&p)[kTiles][2][4], int tiles, int width,
                                  float (&sum)[kTiles][kWidth / 8][4], Lane at) {
  uint4 weights[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
    weights[t] = make_uint4(paired<T>(p[t][0][0], p[t][0][1]), paired<T>(p[t][0][2], p[t][0][3]),
                            paired<T>(p[t][1][0], p[t][1][1]), paired<T>(p[t][1][2], p[t][1][3]));
#pragma unroll
  for (int i = 0; i < kWidth / 64; ++i) {
    uint4 v[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
      for (int k = 0; k < 2; ++k) v[n][k] = values.template read<uint4>(n, 2 * at.c + k, 64 * i + 8 * at.g, width);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint2 b = make_uint2(pair(v[0][0], v[0][1], j), pair(v[1][0], v[1][1], j));
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        if (t < tiles) multiply<T>(sum[t][8 * i + j], weights[t], b);
    }
  }
}

template <int kWidth, int kTiles>
__device__ inline void add_float_values(const Lines<float>& values, const float (&p)[kTiles][2][4], int tiles,
                                        int width, float (&sum)[kTiles][kWidth / 8][4], Lane at) {
#pragma unroll 1
  for (int c = 0; c < 4; ++c)
#pragma unroll
    for (int key = 0; key < 4; ++key)
#pragma unroll
      for (int d = 0; d < kWidth / 4; d += 4) {  // of the lane's elements
        const int n = key / 2, k = key % 2;
        const float4 v = values.read<float4>(n, 2 * c + k, d / 16 * 64 + 16 * at.c + d % 16, width);
        const float parts[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (t >= tiles) continue;
          const float low = __shfl_sync(kAll, p[t][n][k], 4 * at.g + c);
          const float high = __shfl_sync(kAll, p[t][n][2 + k], 4 * at.g + c);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float(&to)[4] = sum[t][d / 16 * 8 + (d + e) % 8];
            to[d % 16 / 8] = fmaf(low, parts[e], to[d % 16 / 8]);
            to[2 + d % 16 / 8] = fmaf(high, parts[e], to[2 + d % 16 / 8]);
          }
        }
      }
}

}  // namespace posttrain::cuda
