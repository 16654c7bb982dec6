// The product of up to 16 rows with an NF4 matrix on a GPU (posttrain/ops/nf4_weight.py describes the format), to which
// a LoRA adapter's part may be added in the same launch: y = base + x W^T + s (x A^T) B^T.
//
// In half precision the product runs on tensor cores (cuda/rows_product.h). A byte holds neighbours of a row, and so
// does a register of mma's operand: a table of the 256 bytes gives the registers, once for each of 16 lanes, so that no
// two lanes of a half warp meet in a bank. The code is the sum of two numbers of half precision, 2^-17 of the truth; x
// is exact and so are the products. The absmax multiplies the float32 sums of its block.
//
// The first blocks make u = s x A^T, eight ranks each, while the others multiply with W; these then wait for u, which
// has long been there, and add u B^T. Blocks are numbered as they start, so those that are waited for run already:
// waiting always ends. The last block to leave sets the counters back to 0.
#include "cuda/nf4_code.h"
#include "cuda/rows_product.h"

namespace posttrain::cuda {

namespace {

// The order of blocks within a launch.

struct Order {
  int *started, *made, *left;

  explicit __device__ Order(int* counters) : started(counters), made(counters + 1), left(counters + 2) {}

  // The number of this block, in the order in which blocks start.
  __device__ int64_t number() const {
    __shared__ int own;
    if (threadIdx.x == 0) own = atomicAdd(started, 1);
    __syncthreads();
    return own;
  }

  __device__ void announce() const {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(made, 1);
  }

  __device__ void wait_for(int64_t blocks) const {
    if (threadIdx.x == 0) {
      while (*static_cast<volatile int*>(made) < blocks) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  __device__ void leave() const {
    if (threadIdx.x != 0 || atomicAdd(left, 1) != int(gridDim.x) - 1) return;
    *started = *made = *left = 0;
  }
};

// An adapter, and the memory that its part of the product needs.
template <class P>
struct LowRank {
  const P *a, *b;  // [ranks, K], [N, ranks]
  int64_t ranks;
  float scale;
  float* u;  // [rows, ranks]
  int* counters;
};

template <class T>
struct Product {
  const T* x;  // [rows, width]
  int rows;
  int64_t width, height;
  const T* base;  // [rows, height], or [height] with a stride of 0, or null
  int64_t base_stride;
  T* y;  // [rows, height], may be the base
  int64_t y_stride;

  __device__ void finish(int r, int64_t n, float sum) const {
    if (r >= rows || n >= height) return;
    if (base) sum += load(base + r * base_stride + n);
    store(y + r * y_stride + n, sum);
  }
};

// The product on tensor cores: rows of whole spans, which lie in one block each.

constexpr int kTiles = 4, kTile = 8 * kTiles;  // rows of W of a block of threads
constexpr int kSlots = 16;                     // copies of the table
constexpr int kDepth = 64;                     // ranks that are added at a time

// 32 rows of W. Lane l has the absmax of row l.
template <class T>
struct Nf4Rows {
  const Nf4& w;
  const uint2* table;
  const uint8_t* packed;  // of the first of them
  unsigned own[kTiles];   // where this lane's row of each eight begins for it, from there
  int64_t absmax_start;
  int shift;

  struct Piece {
    uint2 packed[kTiles];
    float absmax;
  };

  __device__ Nf4Rows(const Nf4& w, const uint2* table, int shift, int64_t first, int64_t height, int64_t width)
      : w(w), table(table + threadIdx.x % kSlots), packed(w.packed + first * (width / 2)), shift(shift) {
    const int lane = threadIdx.x % 32, last = int(min(height - first, int64_t{kTile})) - 1;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) own[j] = min(8 * j + lane / 4, last) * unsigned(width / 2) + 8 * (lane % 4);
    absmax_start = (first + min(lane, last)) * width;
  }

  __device__ Piece piece(int64_t span) const {
    Piece p;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      p.packed[j] = *reinterpret_cast<const uint2*>(packed + span * (kSpan / 2) + own[j]);
    p.absmax = absmax_of(w, (absmax_start + span * kSpan) >> shift);
    return p;
  }

  __device__ void multiply_by(const Rows& x, const Piece& p, float (&sums)[kTiles][4]) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const unsigned bytes = (s < 2 ? p.packed[j].x : p.packed[j].y) >> (s % 2 * 16);
        const uint2 first = table[(bytes & 255) * kSlots], second = table[(bytes >> 8 & 255) * kSlots];
        multiply<T>(products, x[s], make_uint2(first.x, second.x));
        multiply<T>(products, x[s], make_uint2(first.y, second.y));
      }
      const float even = __shfl_sync(~0u, p.absmax, 8 * j + 2 * t), odd = __shfl_sync(~0u, p.absmax, 8 * j + 2 * t + 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] = fmaf(products[i], i % 2 ? odd : even, sums[j][i]);
    }
  }
};

// Registers of mma's operand for every byte: the code's two neighbours, and what rounding them left.
template <class T>
__device__ void fill_table(uint2* table) {
  for (int i = threadIdx.x; i < 256 * kSlots; i += kThreads) {
    const float first = kCode[i / kSlots >> 4], second = kCode[i / kSlots & 15];
    table[i] = make_uint2(paired<T>(first, second),
                          paired<T>(first - to_float(T(first)), second - to_float(T(second))));
  }
}

// Ranks [begin, begin + kDepth) of rows [first, first + kTile) of B, in float32, zeros beyond its end.
template <class P>
__device__ void stage_factor(const LowRank<P>& adapter, int64_t first, int64_t height, int64_t begin,
                             float (*factor)[kDepth + 4]) {
  for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
    const int64_t n = first + i / kDepth, q = begin + i % kDepth;
    factor[i / kDepth][i % kDepth] = n < height && q < adapter.ranks ? load(adapter.b + n * adapter.ranks + q) : 0.0f;
  }
}

template <class P>
__device__ void stage_low(const LowRank<P>& adapter, int rows, int64_t begin, float (*low)[kDepth]) {
  for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
    const int r = i / kDepth;
    const int64_t q = begin + i % kDepth;
    low[r][i % kDepth] = r < rows && q < adapter.ranks ? adapter.u[r * adapter.ranks + q] : 0.0f;
  }
}

__device__ float dot(const float* a, const float* b, float sum) {
#pragma unroll
  for (int q = 0; q < kDepth; q += 4) {
    const float4 x = *reinterpret_cast<const float4*>(a + q), y = *reinterpret_cast<const float4*>(b + q);
    sum = fmaf(x.x, y.x, sum);
    sum = fmaf(x.y, y.y, sum);
    sum = fmaf(x.z, y.z, sum);
    sum = fmaf(x.w, y.w, sum);
  }
  return sum;
}

// Eight ranks of u, on tensor cores if A is in half precision as x is, else one to a warp: in units of 2, since with
// units of 8 the kernel spills.
template <class T, class P>
__device__ void make_low_rank(const Product<T>& product, const LowRank<P>& adapter, const T* low, const T* high,
                              int64_t first, float* of_warps) {
  if constexpr (sizeof(P) == 2) {
    float sums[1][4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
    const DenseRows<T, 1> a(adapter.a, first, adapter.ranks, product.width);
    multiply_rows<T, 2>(low, high, product.width / kSpan, a, [] {}, sums);
    store_sums<1>(sums, of_warps);
    __syncthreads();
    const int r = threadIdx.x / 8, q = threadIdx.x % 8;
    if (r < product.rows && first + q < adapter.ranks)
      adapter.u[r * adapter.ranks + first + q] = adapter.scale * total_of_warps<1>(of_warps, r, q);
  } else {
    const int64_t q = first + threadIdx.x / 32, width = product.width;
    if (q >= adapter.ranks) return;
    float sums[kRows] = {};
    const auto row = [&](int r) { return product.x + r * width; };
    multiply_rows_plainly<2>(row, product.rows, width, DenseRow<2>{adapter.a + q * width, width}, sums);
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < product.rows) adapter.u[r * adapter.ranks + q] = adapter.scale * sums[r];
  }
}

template <class T, class P>
__global__ void __launch_bounds__(kThreads, 2)
    matvec_kernel(Nf4 w, int shift, Product<T> product, LowRank<P> adapter) {
  static_assert(kTile == 32, "a lane has one row of W");
  constexpr int kShare = kRows / kWarps;  // rows of x of a warp, at the end
  __shared__ uint2 table[256 * kSlots];
  alignas(16) __shared__ float factor[kTile][kDepth + 4];
  alignas(16) __shared__ float low_rank[kRows][kDepth];
  static_assert(sizeof table >= sizeof(float) * kWarps * kRows * kTile, "the warps' sums take the table's place");
  float* of_warps = reinterpret_cast<float*>(table);

  const int64_t makers = (adapter.ranks + 7) / 8;
  const Order order(adapter.counters);
  const int64_t block = makers ? order.number() : blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T* low = g < product.rows ? product.x + g * product.width + 16 * t : nullptr;
  const T* high = g + 8 < product.rows ? product.x + (g + 8) * product.width + 16 * t : nullptr;
  if (block < makers) {
    make_low_rank(product, adapter, low, high, 8 * block, of_warps);
    order.announce();
    order.leave();
    return;
  }
  const int64_t first = (block - makers) * kTile;
  float sums[kTiles][4] = {};
  const Nf4Rows<T> rows_of_w(w, table, shift, first, product.height, product.width);
  const auto prepare = [&] {
    fill_table<T>(table);
    if (makers) stage_factor(adapter, first, product.height, 0, factor);
    __syncthreads();
  };
  multiply_rows<T, 2>(low, high, product.width / kSpan, rows_of_w, prepare, sums);
  __syncthreads();
  store_sums<kTiles>(sums, of_warps);
  __syncthreads();

  float sum[kShare];
#pragma unroll
  for (int i = 0; i < kShare; ++i) sum[i] = total_of_warps<kTiles>(of_warps, warp + i * kWarps, lane);
  if (makers) order.wait_for(makers);
  for (int64_t begin = 0; begin < adapter.ranks; begin += kDepth) {
    if (begin > 0) {
      __syncthreads();
      stage_factor(adapter, first, product.height, begin, factor);
    }
    stage_low(adapter, product.rows, begin, low_rank);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kShare; ++i) sum[i] = dot(low_rank[warp + i * kWarps], factor[lane], sum[i]);
  }
#pragma unroll
  for (int i = 0; i < kShare; ++i) product.finish(warp + i * kWarps, first + lane, sum[i]);
  if (makers) order.leave();
}

// The product of everything else: float32, rows that end within a span, blocks of 32.

constexpr int kPlainWarps = 8;

// A row of W, dequantised in units of 8 elements, or of a byte.
template <int kUnit>
struct Nf4Row {
  const Nf4& w;
  const float* code;
  int shift;
  int64_t start, width;

  __device__ int64_t odd() const { return kUnit == 8 ? 0 : start % 2; }
  __device__ int64_t units() const { return (width + odd() + kUnit - 1) / kUnit; }

  __device__ int64_t unit(int64_t i, float (&v)[kUnit]) const {
    const int64_t byte = start / 2 + i * (kUnit / 2);
    const float absmax = absmax_of(w, 2 * byte >> shift);
    unsigned bits;
    if constexpr (kUnit == 8)
      bits = *reinterpret_cast<const unsigned*>(w.packed + byte);
    else
      bits = w.packed[byte];
#pragma unroll
    for (int e = 0; e < kUnit; ++e) v[e] = __fmul_rn(code[bits >> (e / 2 * 8 + (e % 2 ? 0 : 4)) & 15], absmax);
    return kUnit * i - odd();
  }
};

template <int kUnit, class T>
__global__ void __launch_bounds__(32 * kPlainWarps)
    plain_matvec_kernel(Nf4 w, int shift, Product<T> product, LowRank<float> adapter) {
  __shared__ float code[16], tile[kRows][kPlainWarps];
  const int64_t makers = (adapter.ranks + kPlainWarps - 1) / kPlainWarps;
  const Order order(adapter.counters);
  const int64_t block = makers ? order.number() : blockIdx.x;
  if (threadIdx.x < 16) code[threadIdx.x] = kCode[threadIdx.x];
  __syncthreads();

  const bool makes = block < makers;
  const int64_t first = (makes ? block : block - makers) * kPlainWarps, own = first + threadIdx.x / 32;
  const int64_t width = product.width;
  const auto row = [&](int r) { return product.x + r * width; };
  float sums[kRows] = {};
  if (makes && own < adapter.ranks)
    multiply_rows_plainly<kUnit>(row, product.rows, width, DenseRow<kUnit>{adapter.a + own * width, width}, sums);
  else if (!makes && own < product.height)
    multiply_rows_plainly<kUnit>(row, product.rows, width, Nf4Row<kUnit>{w, code, shift, own * width, width}, sums);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) tile[r][threadIdx.x / 32] = sums[r];
  }
  __syncthreads();

  const int r = threadIdx.x / kPlainWarps, n = threadIdx.x % kPlainWarps;
  const bool inside = r < product.rows && first + n < (makes ? adapter.ranks : product.height);
  if (makes) {
    if (inside) adapter.u[r * adapter.ranks + first + n] = adapter.scale * tile[r][n];
    order.announce();
    order.leave();
    return;
  }
  if (makers) order.wait_for(makers);
  if (inside) {
    float sum = tile[r][n];
    const float *u = adapter.u + r * adapter.ranks, *b = adapter.b + (first + n) * adapter.ranks;
    for (int64_t q = 0; q < adapter.ranks; ++q) sum = fmaf(u[q], b[q], sum);
    product.finish(r, first + n, sum);
  }
  if (makers) order.leave();
}

template <class P>
LowRank<P> typed(const Nf4Adapter& adapter) {
  return {static_cast<const P*>(adapter.a), static_cast<const P*>(adapter.b), adapter.ranks, adapter.scale, adapter.u,
          adapter.counters};
}

template <class T, class P>
int start_matvec(void* stream, const Nf4& w, const Product<T>& product, const Nf4Adapter& adapter) {
  const int64_t blocks = divide_up(product.height, kTile) + divide_up(adapter.ranks, 8);
  return launch(matvec_kernel<T, P>, blocks, kThreads, stream, w, log2_of(w.block), product, typed<P>(adapter));
}

template <int kUnit, class T>
int start_plain_matvec(void* stream, const Nf4& w, const Product<T>& product, const Nf4Adapter& adapter) {
  const int64_t blocks = divide_up(product.height, kPlainWarps) + divide_up(adapter.ranks, kPlainWarps);
  return launch(plain_matvec_kernel<kUnit, T>, blocks, 32 * kPlainWarps, stream, w, log2_of(w.block), product,
                typed<float>(adapter));
}

bool in_units_of_8(const Nf4& w, const Product<float>& product, const Nf4Adapter& adapter) {
  const auto packed = reinterpret_cast<uintptr_t>(w.packed);
  return product.width % 8 == 0 && packed % 4 == 0 && is_aligned(product.x) && is_aligned(adapter.a);
}

}  // namespace

int nf4_matvec(void* stream, Nf4 w, const void* x, int dtype, int64_t rows, int64_t width, int64_t height,
               const void* base, int64_t base_stride, void* y, int64_t y_stride, Nf4Adapter adapter, bool spans) {
  if (rows == 0 || height == 0) return cudaSuccess;
  if (rows > kRows) return cudaErrorInvalidValue;
  return by_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    const Product<T> product = {static_cast<const T*>(x), int(rows), width, height, static_cast<const T*>(base),
                                base_stride, static_cast<T*>(y), y_stride};
    if constexpr (sizeof(T) == 4) {
      if (in_units_of_8(w, product, adapter)) return start_plain_matvec<8>(stream, w, product, adapter);
    } else if (spans) {
      return adapter.dtype == kFloat32 ? start_matvec<T, float>(stream, w, product, adapter)
                                       : start_matvec<T, T>(stream, w, product, adapter);
    }
    return start_plain_matvec<2>(stream, w, product, adapter);
  });
}

}  // namespace posttrain::cuda
