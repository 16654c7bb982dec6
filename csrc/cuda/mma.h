// Products of half precision on tensor cores, m16n8k16.
//
// With g = lane / 4 and t = lane % 4 a lane holds of a [16, 16] the elements 2t, 2t+1 of rows g (x) and g + 8 (y), and
// 2t+8, 2t+9 of the same (z, w); of b [16, 8], column g, the same elements (x, y); of d [16, 8] columns 2t, 2t+1 of
// rows g (0, 1) and g + 8 (2, 3). Sums over k may run in any order: what lies next to each other in memory may be
// elements 2t, 2t+1, 2t+8, 2t+9 for all that the result cares, as long as a and b agree.
#pragma once

#include <type_traits>

#include "cuda/device.h"

namespace posttrain::cuda {

// Two elements as one register, `first` in the low half.
template <class T>
__device__ inline unsigned paired(float first, float second) {
  const T of[2] = {T(first), T(second)};
  unsigned bits;
  memcpy(&bits, of, sizeof bits);
  return bits;
}

// The products of two pairs, summed.
template <class T>
__device__ inline float dot_of_pairs(unsigned a, unsigned b) {
  T x[2], y[2];
  memcpy(x, &a, sizeof a);
  memcpy(y, &b, sizeof b);
  return to_float(x[0]) * to_float(y[0]) + to_float(x[1]) * to_float(y[1]);
}

template <class T>
__device__ inline void multiply_plainly(float (&d)[4], uint4 a, uint2 b) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int lane = 0; lane < 4; ++lane) {
    const int row = 4 * g + lane;
    const unsigned low[2] = {__shfl_sync(~0u, a.x, row), __shfl_sync(~0u, a.z, row)};
    const unsigned high[2] = {__shfl_sync(~0u, a.y, row), __shfl_sync(~0u, a.w, row)};
    for (int j = 0; j < 2; ++j) {
      const int column = 4 * (2 * t + j) + lane;
      const unsigned first = __shfl_sync(~0u, b.x, column), second = __shfl_sync(~0u, b.y, column);
      d[j] += dot_of_pairs<T>(low[0], first) + dot_of_pairs<T>(low[1], second);
      d[2 + j] += dot_of_pairs<T>(high[0], first) + dot_of_pairs<T>(high[1], second);
    }
  }
}

// d += a b.
template <class T>
__device__ inline void multiply(float (&d)[4], uint4 a, uint2 b) {
  static_assert(sizeof(T) == 2);
#ifdef __CUDA_ARCH__
#define POSTTRAIN_MMA(type)                                                                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
      "{%0, %1, %2, %3};"                                                                                          \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                             \
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y))
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    POSTTRAIN_MMA("bf16");
  else
    POSTTRAIN_MMA("f16");
#undef POSTTRAIN_MMA
#else
  multiply_plainly<T>(d, a, b);
#endif
}

}  // namespace posttrain::cuda
