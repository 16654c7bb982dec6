// RMS norm with an optional residual add (posttrain/ops/rms_norm.py has the formula).
//
// A block owns a row and holds it in registers between the sum of squares and the output, so every element is read
// once; the weights are on their way while the sum is formed. What a row has beyond kHeld accesses of each thread is
// read again. The order of the sum depends on the row's width alone: a row's bits are the same in any batch.
#include "cuda/pack.h"

namespace posttrain::cuda {

namespace {

constexpr int kHeld = 4, kMostThreads = 512;

// The sum over a block of any number of warps.
__device__ float sum_over_block(float x) {
  __shared__ float of_warp[kMostThreads / 32];
  x = reduce_warp(x, Sum{});
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  return reduce_warp(threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0.0f, Sum{});
}

// 1 / sqrt(mean + eps), rounded once. eps is a few units in the last place of the mean, the same in all rows: rounding
// the sum would make all results of a model lean to one side. So what it loses joins the last step of Newton's method.
__device__ float reciprocal_root(float mean, float eps) {
  const float sum = mean + eps, added = sum - mean, lost = (mean - (sum - added)) + (eps - added);
  const float root = rsqrtf(sum), product = sum * root;
  const float rest = fmaf(lost, root, fmaf(sum, root, -product));  // of (mean + eps) root - product
  return fmaf(0.5f * (fmaf(-product, root, 1.0f) - rest * root), root, root);
}

// A row in packs of N; `residual` and `total` are null without a residual.
template <class T, int N>
struct Row {
  const T* x;
  const T* residual;
  T* total;

  // The sum from element j on, which goes into `total`; its squares are added to `squares`.
  __device__ Pack<T, N> add(int64_t j, float& squares) const {
    Pack<T, N> own = load_pack<N>(x + j);
    if (residual) {
      const Pack<T, N> other = load_pack<N>(residual + j);
#pragma unroll
      for (int n = 0; n < N; ++n) own.set(n, own[n] + other[n]);
      store_pack(total + j, own);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) squares += own[n] * own[n];
    return own;
  }
};

template <class T, class W, int N>
__device__ void scale(T* y, Pack<T, N> row, float rstd, const Pack<W, N>& weight) {
#pragma unroll
  for (int n = 0; n < N; ++n) row.set(n, row[n] * rstd * weight[n]);
  store_pack(y, row);
}

template <class T, class W, int N>
__global__ void __launch_bounds__(kMostThreads, 1)
    norm_kernel(const T* x, const T* residual, const W* weight, T* y, T* total, float* rstd, int64_t width, float eps) {
  const int64_t start = blockIdx.x * width, step = int64_t{N} * blockDim.x, first = int64_t{N} * threadIdx.x;
  const Row<T, N> row = {x + start, residual ? residual + start : nullptr, residual ? total + start : nullptr};
  y += start;
  Pack<T, N> held[kHeld];
  Pack<W, N> weights[kHeld];
  float squares = 0.0f;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int64_t j = h * step + first;
    if (j >= width) continue;
    weights[h] = load_pack<N>(weight + j);
    held[h] = row.add(j, squares);
  }
  for (int64_t j = kHeld * step + first; j < width; j += step) row.add(j, squares);
  const float scaling = reciprocal_root(sum_over_block(squares) / static_cast<float>(width), eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = scaling;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int64_t j = h * step + first;
    if (j < width) scale(y + j, held[h], scaling, weights[h]);
  }
  const T* normed = residual ? row.total : row.x;
  for (int64_t j = kHeld * step + first; j < width; j += step)
    scale(y + j, load_pack<N>(normed + j), scaling, load_pack<N>(weight + j));
}

// Two packs a thread, more where the most threads don't suffice.
template <int N, class T, class W>
int norm_in_packs(void* stream, const T* x, const T* residual, const W* weight, T* y, T* total, float* rstd,
                  int64_t rows, int64_t width, float eps) {
  const int64_t warps = divide_up(width, 64 * N), most = kMostThreads / 32;
  return launch(norm_kernel<T, W, N>, rows, 32 * (warps < most ? warps : most), stream, x, residual, weight, y,
                total, rstd, width, eps);
}

template <class T, class W>
int norm(void* stream, const T* x, const T* residual, const W* weight, T* y, T* total, float* rstd, int64_t rows,
         int64_t width, float eps) {
  constexpr int N = 16 / sizeof(T);
  const void* all[] = {x, residual, weight, y, total};
  bool aligned = width % N == 0;
  for (const void* p : all) aligned = aligned && is_aligned(p);
  return (aligned ? norm_in_packs<N, T, W> : norm_in_packs<1, T, W>)(stream, x, residual, weight, y, total, rstd, rows,
                                                                     width, eps);
}

}  // namespace

int rms_norm(void* stream, int dtype, bool wide_weight, const void* x, const void* residual, const void* weight,
             void* y, void* total, float* rstd, int64_t rows, int64_t width, float eps) {
  if (width == 0) return cudaSuccess;
  return by_dtype(dtype, [=](auto t) {
    using T = decltype(t);
    const auto with = [=](auto* own_weight) {
      return norm(stream, static_cast<const T*>(x), static_cast<const T*>(residual), own_weight, static_cast<T*>(y),
                  static_cast<T*>(total), rstd, rows, width, eps);
    };
    return wide_weight ? with(static_cast<const float*>(weight)) : with(static_cast<const T*>(weight));
  });
}

}  // namespace posttrain::cuda
