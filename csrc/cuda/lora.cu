// Adapters of several tasks in one batch, on a GPU: each row of x names its adapter, or -1 for none, and meets no other
// (posttrain/ops/lora_products.py has the formulas).
//
//     u[i] = s_e x[i] A_e^T        y[i] += u[i] B_e^T        dA_e = sum over the rows of e of v[i]^T x[i]
//
// A block has one adapter and 64 rows of the batch, of which it picks its own; nothing is sorted beforehand and no row
// is copied. What happens to a row depends neither on the others nor on their number, and sums run in a fixed order.
// The same kernels make v from dy and B^T, dx from v and A^T, and dB^T from u and dy.
#include "cuda/rows_product.h"

namespace posttrain::cuda {

namespace {

constexpr int kBatch = 64;  // rows of the batch that a block looks at

// Writes which of rows [first, first + kBatch) name adapter `e`, counted from `first`, to `own`, and returns how many.
__device__ int pick(const int64_t* adapter, int64_t first, int64_t rows, int64_t e, int* own) {
  __shared__ int picked;
  if (threadIdx.x < 32) {
    int count = 0;
    for (int i = threadIdx.x; i < kBatch; i += 32) {
      const bool mine = first + i < rows && adapter[first + i] == e;
      const unsigned votes = __ballot_sync(~0u, mine);
      if (mine) own[count + __popc(votes & ((1u << threadIdx.x) - 1))] = i;
      count += __popc(votes);
    }
    if (threadIdx.x == 0) picked = count;
  }
  __syncthreads();
  return picked;
}

template <class T>
struct Batch {
  const T* x;  // [rows, width]
  int64_t stride, rows, width;
  const int64_t* adapter;  // [rows]
};

// u = s x A^T on tensor cores, 16 ranks to a block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    shrink_kernel(Batch<T> batch, const T* a, int64_t ranks, const float* scale, float* u) {
  constexpr int tiles = 2;
  __shared__ float of_warps[kWarps * kRows * 8 * tiles];
  __shared__ int own[kBatch];
  const int64_t e = blockIdx.z, first = int64_t{blockIdx.y} * kBatch, first_rank = int64_t{blockIdx.x} * 8 * tiles;
  const int count = pick(batch.adapter, first, batch.rows, e, own);
  const DenseRows<T, tiles> factor(a + e * ranks * batch.width, first_rank, ranks, batch.width);
  const auto row = [&](int i) {
    return i < count ? batch.x + (first + own[i]) * batch.stride + 16 * (threadIdx.x % 4) : nullptr;
  };
  for (int begin = 0; begin < count; begin += kRows) {
    const int g = threadIdx.x % 32 / 4;
    float sums[tiles][4] = {};
    multiply_rows<T, 1>(row(begin + g), row(begin + g + 8), batch.width / kSpan, factor, [] {}, sums);
    __syncthreads();
    store_sums<tiles>(sums, of_warps);
    __syncthreads();
    const int r = threadIdx.x / (8 * tiles), q = threadIdx.x % (8 * tiles);
    if (r < kRows && begin + r < count && first_rank + q < ranks)
      u[(first + own[begin + r]) * ranks + first_rank + q] = scale[e] * total_of_warps<tiles>(of_warps, r, q);
  }
}

// The same for A in float32, and for rows of any width: a warp has one rank.

constexpr int kPlainWarps = 8;

template <int kUnit, class T>
__global__ void __launch_bounds__(32 * kPlainWarps, 2)
    plain_shrink_kernel(Batch<T> batch, const float* a, int64_t ranks, const float* scale, float* u) {
  __shared__ int own[kBatch];
  const int64_t e = blockIdx.z, first = int64_t{blockIdx.y} * kBatch;
  const int64_t rank = int64_t{blockIdx.x} * kPlainWarps + threadIdx.x / 32;
  const int count = pick(batch.adapter, first, batch.rows, e, own);
  if (rank >= ranks) return;
  const DenseRow<kUnit> factor = {a + (e * ranks + rank) * batch.width, batch.width};
  for (int begin = 0; begin < count; begin += kRows) {
    const int rows = min(kRows, count - begin);
    float sums[kRows] = {};
    const auto row = [&](int r) { return batch.x + (first + own[begin + r]) * batch.stride; };
    multiply_rows_plainly<kUnit>(row, rows, batch.width, factor, sums);
    if (threadIdx.x % 32 != 0) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) u[(first + own[begin + r]) * ranks + rank] = scale[e] * sums[r];
  }
}

// y += u B^T: a thread has one column, 16 rows at a time.

constexpr int kColumns = 128, kDepth = 32;

template <class T, class P>
__global__ void __launch_bounds__(kColumns)
    expand_kernel(const float* u, const P* b, int64_t ranks, const int64_t* adapter, T* y, int64_t stride,
                  int64_t rows, int64_t height) {
  __shared__ float factor[kColumns][kDepth + 1];
  alignas(16) __shared__ float low[kDepth][kRows];
  __shared__ int own[kBatch];
  const int64_t e = blockIdx.z, first = int64_t{blockIdx.y} * kBatch, first_column = int64_t{blockIdx.x} * kColumns;
  const int64_t n = first_column + threadIdx.x;
  const int count = pick(adapter, first, rows, e, own);
  for (int begin = 0; begin < count; begin += kRows) {
    float sums[kRows] = {};
    for (int64_t from = 0; from < ranks; from += kDepth) {
      __syncthreads();
      for (int i = threadIdx.x; i < kColumns * kDepth; i += kColumns) {
        const int64_t column = first_column + i / kDepth, q = from + i % kDepth;
        const bool inside = column < height && q < ranks;
        factor[i / kDepth][i % kDepth] = inside ? load(b + (e * height + column) * ranks + q) : 0.0f;
      }
      for (int i = threadIdx.x; i < kRows * kDepth; i += kColumns) {
        const int r = begin + i / kDepth;
        const int64_t q = from + i % kDepth;
        low[i % kDepth][i / kDepth] = r < count && q < ranks ? u[(first + own[r]) * ranks + q] : 0.0f;
      }
      __syncthreads();
#pragma unroll 4
      for (int q = 0; q < kDepth; ++q) {
        const float f = factor[threadIdx.x][q];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] = fmaf(low[q][r], f, sums[r]);
      }
    }
    if (n >= height) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (begin + r >= count) break;
      T* to = y + (first + own[begin + r]) * stride + n;
      store(to, load(to) + sums[r]);
    }
  }
}

// dA = v^T x: a thread has one column, 16 ranks of one adapter, and goes through the whole batch.
template <class T>
__global__ void __launch_bounds__(kColumns)
    outer_kernel(const float* v, int64_t ranks, Batch<T> batch, float* grad) {
  __shared__ int own[kBatch];
  alignas(16) __shared__ float low[kBatch][kRows];
  const int64_t e = blockIdx.z, first_rank = int64_t{blockIdx.y} * kRows;
  const int64_t k = int64_t{blockIdx.x} * kColumns + threadIdx.x;
  float sums[kRows] = {};
  for (int64_t first = 0; first < batch.rows; first += kBatch) {
    const int count = pick(batch.adapter, first, batch.rows, e, own);
    for (int i = threadIdx.x; i < count * kRows; i += kColumns) {
      const int64_t q = first_rank + i % kRows;
      low[i / kRows][i % kRows] = q < ranks ? v[(first + own[i / kRows]) * ranks + q] : 0.0f;
    }
    __syncthreads();
    for (int i = 0; i < count && k < batch.width; ++i) {
      const float x = load(batch.x + (first + own[i]) * batch.stride + k);
#pragma unroll
      for (int q = 0; q < kRows; ++q) sums[q] = fmaf(low[i][q], x, sums[q]);
    }
    __syncthreads();
  }
  if (k >= batch.width) return;
#pragma unroll
  for (int q = 0; q < kRows; ++q)
    if (first_rank + q < ranks) grad[(e * ranks + first_rank + q) * batch.width + k] = sums[q];
}

Extent grid_of(int64_t columns, int64_t per_block, int64_t rows, int64_t adapters) {
  return {divide_up(columns, per_block), divide_up(rows, kBatch), adapters};
}

template <class T, class P>
int start_expand(void* stream, const float* u, const void* b, int64_t adapters, int64_t ranks, const int64_t* adapter,
                 void* y, int64_t stride, int64_t rows, int64_t height) {
  return launch(expand_kernel<T, P>, grid_of(height, kColumns, rows, adapters), kColumns, stream, u,
                static_cast<const P*>(b), ranks, adapter, static_cast<T*>(y), stride, rows, height);
}

}  // namespace

int lora_shrink(void* stream, const void* x, int dtype, int64_t stride, int64_t rows, int64_t width,
                const int64_t* adapter, const void* a, int a_dtype, int64_t adapters, int64_t ranks,
                const float* scale, float* u) {
  return by_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    const Batch<T> batch = {static_cast<const T*>(x), stride, rows, width, adapter};
    const auto start = [=](auto kernel, int64_t ranks_of_block, int threads, auto* factor) {
      return launch(kernel, grid_of(ranks, ranks_of_block, rows, adapters), threads, stream, batch, factor, ranks,
                    scale, u);
    };
    if constexpr (sizeof(T) == 2)
      if (a_dtype != kFloat32) return start(shrink_kernel<T>, 16, kThreads, static_cast<const T*>(a));
    const auto plain = width % 8 == 0 ? plain_shrink_kernel<8, T> : plain_shrink_kernel<2, T>;
    return start(plain, kPlainWarps, 32 * kPlainWarps, static_cast<const float*>(a));
  });
}

int lora_expand(void* stream, const float* u, const int64_t* adapter, const void* b, int b_dtype, int64_t adapters,
                int64_t ranks, void* y, int dtype, int64_t stride, int64_t rows, int64_t height) {
  return by_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    const auto start = b_dtype == kFloat32 ? start_expand<T, float> : start_expand<T, T>;
    return start(stream, u, b, adapters, ranks, adapter, y, stride, rows, height);
  });
}

int lora_outer(void* stream, const float* v, int64_t ranks, const void* x, int dtype, int64_t stride, int64_t rows,
               int64_t width, const int64_t* adapter, int64_t adapters, float* grad) {
  return by_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    const Extent grid = {divide_up(width, kColumns), divide_up(ranks, kRows), adapters};
    return launch(outer_kernel<T>, grid, kColumns, stream, v, ranks,
                  Batch<T>{static_cast<const T*>(x), stride, rows, width, adapter}, grad);
  });
}

}  // namespace posttrain::cuda
