// Everything of CUDA that kernels use: the only such header that they include. A C++ compiler gets cuda/emulation.h in
// CUDA's place, so inline PTX and what else only a GPU has stands behind #ifdef __CUDA_ARCH__, a plain path beside.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda/emulation.h"
#endif

#include "cuda/kernels.h"

namespace posttrain::cuda {

// Sizes of a grid in blocks, or of a block in threads.
struct Extent {
  int64_t x, y, z;
  Extent(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Starts a kernel; a grid without blocks is none. No allocation and no wait, so that a graph can capture it.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Extent grid, Extent block, void* stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (grid.x < 0 || grid.x > INT32_MAX || grid.y < 0 || grid.y > 65535 || grid.z < 0 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const dim3 blocks(grid.x, grid.y, grid.z), threads(block.x, block.y, block.z);
#ifdef __CUDACC__
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
#else
  (void)stream;
  const std::tuple<Parameters...> parameters(arguments...);
  return emulation::run(blocks, threads, [&] { std::apply(kernel, parameters); });
#endif
}

// body(T{}) with the element type that the tag `dtype` names.
template <class Body>
int by_dtype(int dtype, Body body) {
  switch (dtype) {
    case kFloat32:
      return body(float{});
    case kBfloat16:
      return body(__nv_bfloat16{});
    case kFloat16:
      return body(__half{});
    default:
      return cudaErrorInvalidValue;
  }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

__device__ inline void from_float(float* to, float x) { *to = x; }
__device__ inline void from_float(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void from_float(__half* to, float x) { *to = __float2half_rn(x); }

// An element in float32, whatever it is stored as; stores round to nearest.
template <class T>
__device__ float load(const T* from) {
  return to_float(*from);
}
template <class T>
__device__ void store(T* to, float x) {
  from_float(to, x);
}

// 16 bytes of elements, moved by one instruction; addresses must be 16-byte aligned.
template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T values[size];

  __device__ float operator[](int i) const { return to_float(values[i]); }
  __device__ void set(int i, float x) { from_float(values + i, x); }
};

template <class T>
__device__ Vector<T> load_vector(const T* from) {
  Vector<T> v;
  *reinterpret_cast<uint4*>(v.values) = *reinterpret_cast<const uint4*>(from);
  return v;
}
template <class T>
__device__ void store_vector(T* to, const Vector<T>& v) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(v.values);
}

__host__ __device__ inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Maximum {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// `combine` over the warp's lanes, given to every lane, in a fixed order.
template <class T, class Combine>
__device__ T reduce_warp(T x, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = combine(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

// `combine` over a block of kThreads, given to every thread, in a fixed order; `start` is its neutral element.
template <int kThreads, class T, class Combine>
__device__ T reduce_block(T x, T start, Combine combine) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  __shared__ T of_warp[kThreads / 32];
  x = reduce_warp(x, combine);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = reduce_warp(threadIdx.x % 32 < kThreads / 32 ? of_warp[threadIdx.x % 32] : start, combine);
  __syncthreads();  // of_warp may be written again
  return x;
}

}  // namespace posttrain::cuda
