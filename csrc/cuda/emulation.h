// CUDA's vocabulary on a CPU, so that a kernel's own source can be compiled by a C++ compiler and tested without a GPU.
//
// A block's threads are fibers of one system thread. A fiber runs until it waits: at __syncthreads, or where lanes of a
// warp meet (shuffles, votes, __syncwarp). Both end when every thread that they name has come or has returned. A launch
// fails, with a message, when a wait can't end, when threads wait at different barriers, and where the checks of
// -fsanitize=alignment,bounds,null,shift find something. Blocks run one after another and a block's threads take turns,
// ascending or descending, so that a result that depends on the order shows; shared memory holds NaN before each block.
//
// It doesn't show races within an order, accesses beyond tensors, or time. A block that waits for another would hang.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static thread_local
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
constexpr int cudaErrorLaunchFailure = 719;

namespace posttrain::emulation {

struct Place {
  const char* file;
  int line;
};

// Ends the launch with a message; to be called from a kernel.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void block_barrier(Place place);

// Waits for the lanes of `mask`. The value of lane `source`, or all ones where that lane isn't in the mask or has
// returned; for source < 0 the mask of the lanes whose value isn't 0.
uint64_t meet(unsigned mask, uint64_t value, int source, Place place);

int lane();
unsigned live_lanes();

// Runs `thread` for every thread of every block: cudaSuccess, or what a GPU's runtime might say.
int run(dim3 grid, dim3 block, const std::function<void()>& thread);

// What a status means; of a launch that failed, the message.
const char* describe(int status);

// The order of blocks and of a block's threads.
void set_descending(bool descending);

template <class T>
T shuffle(unsigned mask, T value, int source, Place place) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "a shuffle moves a number of at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(mask, bits, source, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace posttrain::emulation

// Where a call stands in the source.
#define POSTTRAIN_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(POSTTRAIN_PLACE) { posttrain::emulation::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, POSTTRAIN_PLACE) { posttrain::emulation::meet(mask, 0, -1, {file, line}); }
inline unsigned __activemask() { return posttrain::emulation::live_lanes(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, POSTTRAIN_PLACE) {
  const int first = posttrain::emulation::lane() / width * width;
  return posttrain::emulation::shuffle(mask, value, first + (source & (width - 1)), {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, POSTTRAIN_PLACE) {
  const int lane = posttrain::emulation::lane();
  const bool inside = int(distance) <= lane % width;
  return posttrain::emulation::shuffle(mask, value, inside ? lane - int(distance) : lane, {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, POSTTRAIN_PLACE) {
  const int lane = posttrain::emulation::lane();
  const bool inside = lane % width + int(distance) < width;
  return posttrain::emulation::shuffle(mask, value, inside ? lane + int(distance) : lane, {file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, POSTTRAIN_PLACE) {
  const int lane = posttrain::emulation::lane();
  const bool inside = (lane ^ distance) < (lane / width + 1) * width;
  return posttrain::emulation::shuffle(mask, value, inside ? lane ^ distance : lane, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int vote, POSTTRAIN_PLACE) {
  return unsigned(posttrain::emulation::meet(mask, vote != 0, -1, {file, line}));
}
inline int __any_sync(unsigned mask, int vote, POSTTRAIN_PLACE) { return __ballot_sync(mask, vote, file, line) != 0; }
inline int __all_sync(unsigned mask, int vote, POSTTRAIN_PLACE) { return __ballot_sync(mask, !vote, file, line) == 0; }

#undef POSTTRAIN_PLACE

inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T, class V>
T atomicExch(T* address, V value) {
  const T before = *address;
  *address = value;
  return before;
}
template <class T, class V>
T atomicAdd(T* address, V value) {
  return atomicExch(address, T(*address + value));
}
template <class T, class V>
T atomicMax(T* address, V value) {
  return atomicExch(address, std::max(*address, T(value)));
}
template <class T, class V>
T atomicMin(T* address, V value) {
  return atomicExch(address, std::min(*address, T(value)));
}
template <class T, class V>
T atomicOr(T* address, V value) {
  return atomicExch(address, T(*address | value));
}
template <class T, class U, class V>
T atomicCAS(T* address, U expected, V value) {
  return atomicExch(address, *address == T(expected) ? T(value) : *address);
}

#define POSTTRAIN_VECTOR2(name, T, bytes) \
  struct alignas(bytes) name {            \
    T x, y;                               \
  };                                      \
  inline name make_##name(T x, T y) { return {x, y}; }
#define POSTTRAIN_VECTOR4(name, T) \
  struct alignas(16) name {        \
    T x, y, z, w;                  \
  };                               \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
POSTTRAIN_VECTOR2(float2, float, 8)
POSTTRAIN_VECTOR2(int2, int, 8)
POSTTRAIN_VECTOR2(uint2, unsigned, 8)
POSTTRAIN_VECTOR4(float4, float)
POSTTRAIN_VECTOR4(int4, int)
POSTTRAIN_VECTOR4(uint4, unsigned)
#undef POSTTRAIN_VECTOR2
#undef POSTTRAIN_VECTOR4

template <class T>
T __ldg(const T* address) {
  return *address;
}

using std::max;
using std::min;

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

inline unsigned __float_as_uint(float x) { return posttrain::emulation::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return posttrain::emulation::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return posttrain::emulation::bits_as<float>(x); }
inline float __int_as_float(int x) { return posttrain::emulation::bits_as<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) {
    const unsigned sign = __float_as_uint(x) >> 16 & 0x8000, u = __float_as_uint(x) & 0x7fffffff;
    if (u > 0x7f800000)
      bits = 0x7fff;
    else if (u >= 0x477ff000)  // 65520, half way to what the next step would be
      bits = sign | 0x7c00;
    else if (u < 0x38800000)  // below 2^-14 in steps of 2^-24, which is what 0.5f has
      bits = sign | (__float_as_uint(__uint_as_float(u) + 0.5f) - 0x3f000000);
    else
      bits = sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13;
  }
  operator float() const {
    const float magnitude = __uint_as_float((bits & 0x7fffu) << 13) * 0x1p112f;
    const unsigned special = (bits & 0x7c00u) == 0x7c00 ? 0x7f800000 : 0;
    return __uint_as_float(__float_as_uint(magnitude) | special | (bits & 0x8000u) << 16);
  }
};

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    const unsigned u = __float_as_uint(x);
    bits = x != x ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }

struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
