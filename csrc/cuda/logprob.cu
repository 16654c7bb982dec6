// The elementwise half of linear_logprob on a GPU: a tile of logits from a library GEMM is folded into running
// statistics, or turned into its own gradient (posttrain/ops/logprob.py has the formulas, csrc/cpu/logprob.cpp the
// same on a CPU).
//
// One block per row, in whose registers the row's part of the tile waits for its maximum: every logit is read once, and
// nothing but what the next GEMM multiplies is written, in the dtype that it multiplies. A row's sums have one order,
// whatever the rows beside it and the alignment are: repeated runs and repeated rows give the same bits.
#include <type_traits>

#include "cuda/device.h"

namespace posttrain::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kGroups = kLogprobColumns / (4 * kThreads);  // of four neighbouring columns, for each thread
constexpr float kSlack = 16.0f;  // how far a tile's maximum may exceed the reference before the reference moves

// Four neighbouring floats, zero from `room` on.
__device__ __forceinline__ float4 four(const float* from, int room, bool aligned) {
  float4 v = {0, 0, 0, 0};
  if (aligned) {
    if (room > 0) v = *reinterpret_cast<const float4*>(from);
    return v;
  }
  if (room > 0) v.x = from[0];
  if (room > 1) v.y = from[1];
  if (room > 2) v.z = from[2];
  if (room > 3) v.w = from[3];
  return v;
}

__device__ __forceinline__ void put_four(float* to, const float* x) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void put_four(__nv_bfloat16* to, const float* x) {
  struct alignas(8) {
    __nv_bfloat162 pairs[2];
  } v = {__float22bfloat162_rn(make_float2(x[0], x[1])), __float22bfloat162_rn(make_float2(x[2], x[3]))};
  *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(&v);
}

// LogitTransform with its divisions done: z = (a + bias) inner, or outer tanh((a + bias) inner) under a cap.
struct Transform {
  float inner, outer, inverse_outer;

  explicit Transform(LogitTransform f)
      : inner(f.softcap == 0 ? f.scale * f.inverse_temperature : f.scale / f.softcap),
        outer(f.softcap * f.inverse_temperature),
        inverse_outer(1.0f / outer) {}

  template <bool kCapped>
  __device__ __forceinline__ float z(float a) const {
    return kCapped ? outer * tanhf(a * inner) : a * inner;
  }
  // d cap(t) / dt from z: 1 - tanh^2.
  template <bool kCapped>
  __device__ __forceinline__ float slope(float z) const {
    return kCapped ? 1.0f - (z * inverse_outer) * (z * inverse_outer) : 1.0f;
  }
};

// e^x in two instructions; its error grows with |x|, to 1e-6 of the value at 16.
__device__ __forceinline__ float quick_exp(float x) {
  const float power = x * 1.44269504f;
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(power));
  return y;
#else
  return exp2f(power);
#endif
}

// What a thread holds of a row: four columns of every group.
using Part = float[4 * kGroups];

__device__ __forceinline__ int column(int element) {
  return 4 * kThreads * (element / 4) + 4 * int(threadIdx.x) + element % 4;
}

// Which of this thread's elements is the target, -1 if none.
__device__ __forceinline__ int target_element(int64_t target, int64_t first_column, int cols) {
  const int64_t j = target - first_column;
  if (j < 0 || j >= cols || j / 4 % kThreads != threadIdx.x) return -1;
  return int(j) / (4 * kThreads) * 4 + int(j) % 4;
}

// z of a row of raw logits, -inf beyond its end.
template <bool kCapped>
__device__ __forceinline__ void load_row(const float* row, const float* bias, int cols, bool aligned,
                                         const Transform& f, Part& z) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int j = column(4 * g);
    const float4 a = four(row + j, cols - j, aligned);
    z[4 * g] = a.x, z[4 * g + 1] = a.y, z[4 * g + 2] = a.z, z[4 * g + 3] = a.w;
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int j = column(4 * g);
    if (bias) {
      const float4 b = four(bias + j, cols - j, aligned);
      z[4 * g] += b.x, z[4 * g + 1] += b.y, z[4 * g + 2] += b.z, z[4 * g + 3] += b.w;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) z[4 * g + k] = j + k < cols ? f.z<kCapped>(z[4 * g + k]) : -INFINITY;
  }
}

// x over the row's own memory, rounded to T, when all threads have read what they need of it.
template <class T>
__device__ __forceinline__ void store_row(float* row, int cols, bool aligned, const Part& x) {
  T* to = reinterpret_cast<T*>(row);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int j = column(4 * g);
    if (aligned) {
      if (j < cols) put_four(to + j, x + 4 * g);
      continue;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (j + k < cols) store(to + j + k, x[4 * g + k]);
  }
}

template <class Combine>
__device__ float combine_warps(const float (&of_warp)[kWarps], Combine combine) {
  float x = of_warp[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = combine(x, of_warp[w]);
  return x;
}

// `combine` over the block, given to every thread; of_warp is used only here.
template <class Combine>
__device__ float reduce_row(float x, float (&of_warp)[kWarps], Combine combine) {
  x = reduce_warp(x, combine);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  return combine_warps(of_warp, combine);
}

// Multiplies a row of the unit by `factor`.
__device__ void rescale(float* row, int64_t width, float factor) {
  const int64_t fours = is_aligned(row) ? width / 4 : 0;
  for (int64_t i = threadIdx.x; i < fours; i += kThreads) {
    float4& v = reinterpret_cast<float4*>(row)[i];
    v = make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
  }
  for (int64_t i = 4 * fours + threadIdx.x; i < width; i += kThreads) row[i] *= factor;
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(float* tile, int64_t stride, int cols, bool aligned, int64_t first_column,
                const int64_t* targets, const float* bias, Transform f, float* m, float* top, float* s, float* t,
                float* z_target, float* unit, int64_t width) {
  const int64_t i = blockIdx.x;
  const int y = target_element(targets[i], first_column, cols);
  const float before = m[i], top_before = top[i], s_before = s[i], t_before = t ? t[i] : 0.0f;
  Part z;
  load_row<kCapped>(tile + i * stride, bias, cols, aligned, f, z);
  float tile_top = -INFINITY, z_of_target = 0.0f;
#pragma unroll
  for (int e = 0; e < 4 * kGroups; ++e) {
    z_of_target = e == y ? z[e] : z_of_target;
    z[e] = e == y ? -INFINITY : z[e];  // the statistics are those of the other tokens
    tile_top = fmaxf(tile_top, z[e]);
  }
  if (y >= 0) z_target[i] = z_of_target;
  __shared__ float tops[kWarps], sums[kWarps], weighted_sums[kWarps];
  tile_top = reduce_row(tile_top, tops, Maximum{});

  const bool moves = !(tile_top <= before + kSlack) && tile_top > -INFINITY;
  const bool first = before == -INFINITY;
  const float after = moves ? tile_top : before;
  const float factor = !moves ? 1.0f : first ? 0.0f : expf(before - after);
  const float reference = after == -INFINITY ? 0.0f : after;
  if (unit && moves && !first) rescale(unit + i * width, width, factor);

  float sum = 0.0f, weighted = 0.0f;
#pragma unroll
  for (int e = 0; e < 4 * kGroups; ++e) {
    const float x = quick_exp(z[e] - reference);
    sum += x;
    if (x > 0.0f) weighted += x * (z[e] - reference);
    z[e] = x > 0.0f ? x * f.slope<kCapped>(z[e]) : x;
  }
  if (unit) store_row<T>(tile + i * stride, cols, aligned, z);
  weighted = reduce_warp(weighted, Sum{});
  if (threadIdx.x % 32 == 0) weighted_sums[threadIdx.x / 32] = weighted;
  sum = reduce_row(sum, sums, Sum{});
  if (threadIdx.x != 0) return;
  weighted = combine_warps(weighted_sums, Sum{});
  const float shifted = moves && !first ? (before - after) * s_before : 0.0f;
  if (t) t[i] = (first ? 0.0f : factor * (t_before + shifted)) + weighted;
  s[i] = factor * s_before + sum;
  m[i] = after;
  top[i] = fmaxf(top_before, tile_top);
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads)
    grad_kernel(float* tile, int64_t stride, int cols, bool aligned, int64_t first_column,
                const int64_t* targets, const float* bias, Transform f, float scale, const float* logprob,
                const float* entropy, const float* lse, const float* lse_low, const float* grad_logprob,
                const float* grad_entropy, const float* grad_lse) {
  const int64_t i = blockIdx.x;
  const int y = target_element(targets[i], first_column, cols);
  const float g = grad_logprob ? grad_logprob[i] : 0.0f, g_lse = grad_lse ? grad_lse[i] : 0.0f;
  const float g_entropy = grad_entropy ? grad_entropy[i] : 0.0f, h = grad_entropy ? entropy[i] : 0.0f;
  const float high = lse[i], low = lse_low[i], log_p_target = logprob[i];
  const auto uncertainty = [=](float log_p, float p) { return p > 0.0f ? p * g_entropy * (log_p + h) : 0.0f; };
  const float p_target = expf(log_p_target);
  const float dz_target = p_target * g_lse - g * expm1f(log_p_target) - uncertainty(log_p_target, p_target);
  Part z;
  load_row<kCapped>(tile + i * stride, bias, cols, aligned, f, z);
#pragma unroll
  for (int e = 0; e < 4 * kGroups; ++e) {
    const float log_p = (z[e] - high) - low, p = quick_exp(log_p);
    const float dz = p * (g_lse - g) - uncertainty(log_p, p);
    z[e] = (e == y ? dz_target : dz) * scale * f.slope<kCapped>(z[e]);
  }
  __syncthreads();
  store_row<T>(tile + i * stride, cols, aligned, z);
}

bool takes_fours(const float* tile, int64_t stride, int64_t cols, const float* bias) {
  return is_aligned(tile) && stride % 4 == 0 && cols % 4 == 0 && is_aligned(bias);
}

// call(T{}, capped) with T as the next GEMM multiplies it, and whether there is a softcap.
template <class Call>
int by_variant(int dtype, float softcap, Call call) {
  const auto by_cap = [&](auto element) {
    return softcap == 0 ? call(element, std::false_type{}) : call(element, std::true_type{});
  };
  if (dtype == kFloat32) return by_cap(float{});
  if (dtype == kBfloat16) return by_cap(__nv_bfloat16{});
  return cudaErrorInvalidValue;
}

}  // namespace

int logprob_fold(void* stream, int dtype, float* tile, int64_t stride, int64_t rows, int64_t cols,
                 int64_t first_column, const int64_t* targets, const float* bias, LogitTransform transform, float* m,
                 float* top, float* s, float* t, float* z_target, float* unit, int64_t width) {
  if (cols > kLogprobColumns) return cudaErrorInvalidValue;
  return by_variant(dtype, transform.softcap, [=](auto element, auto capped) {
    return launch(fold_kernel<decltype(element), capped>, rows, kThreads, stream, tile, stride, int(cols),
                  takes_fours(tile, stride, cols, bias), first_column, targets, bias, Transform(transform), m, top, s,
                  t, z_target, unit, width);
  });
}

int logprob_grad(void* stream, int dtype, float* tile, int64_t stride, int64_t rows, int64_t cols,
                 int64_t first_column, const int64_t* targets, const float* bias, LogitTransform transform,
                 const float* logprob, const float* entropy, const float* lse, const float* lse_low,
                 const float* grad_logprob, const float* grad_entropy, const float* grad_lse) {
  if (cols > kLogprobColumns) return cudaErrorInvalidValue;
  return by_variant(dtype, transform.softcap, [=](auto element, auto capped) {
    return launch(grad_kernel<decltype(element), capped>, rows, kThreads, stream, tile, stride, int(cols),
                  takes_fours(tile, stride, cols, bias), first_column, targets, bias, Transform(transform),
                  transform.scale * transform.inverse_temperature, logprob, entropy, lse, lse_low, grad_logprob,
                  grad_entropy, grad_lse);
  });
}

}  // namespace posttrain::cuda
