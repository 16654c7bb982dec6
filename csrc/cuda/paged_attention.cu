// Decoding over a paged cache on a GPU: one query for each sequence (formulas: posttrain/ops/paged_attention.py).
//
// A block owns kSplit keys of one key head, at fixed positions. Its rows are the query heads of that key head, of one
// sequence or of some that follow each other in the batch and have the same pages there, as completions of a prompt do:
// the first of them reads the keys for all, and the blocks of the others end at once. Who shares is read from the block
// table; nothing is planned beforehand. A warp takes kStep keys at a time from memory to registers, in 16-byte loads,
// and through all rows; the warps of a block, each with every fourth step, are merged in their order, and a second
// kernel merges the splits in theirs. What happens to a row depends neither on the other rows nor on their number, so
// that a result has the same bits in any batch.
#include "cuda/paged_step.h"

namespace posttrain::cuda {

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kSplit = 256;
constexpr float kLog2e = 1.4426950408889634f;

// Of 16 rows each, whose accumulators fit into a block's registers.
template <class T, int kWidth>
constexpr int kTilesOf = sizeof(T) == 4 || kWidth > 128 ? 1 : 2;

struct Smaller {
  __device__ int operator()(int a, int b) const { return min(a, b); }
};

// Whether sequences s - 1 and s have all keys of a split, in the same pages. A whole warp asks.
__device__ bool shares(const PagedDecode& f, int s, int split, Lane at) {
  const int64_t first = int64_t(split) * kSplit, end = first + kSplit;
  if (f.contexts[s - 1] < end || f.contexts[s] < end) return false;
  const int32_t* own = f.table + s * f.table_row + (first >> f.page_bits);
  const int pages = kSplit >> f.page_bits > 1 ? kSplit >> f.page_bits : 1;
  return __all_sync(kAll, at.index >= pages || own[at.index] == own[at.index - f.table_row]);
}

// The rows of a block: heads first_head to first_head + heads of each of `sequences` sequences from `first` on.
struct Rows {
  int first, sequences, first_head, heads, split;

  __device__ int count() const { return sequences * heads; }
  __device__ int sequence(int row) const { return first + row / heads; }
  __device__ int head(int row) const { return first_head + row % heads; }
  __device__ int64_t part(const PagedDecode& f, int row) const {
    return (int64_t(sequence(row)) * f.heads + head(row)) * f.splits + split;
  }
};

// e^(a - b), 0 for a of -infinity.
__device__ float weight(float a, float b) { return exp2f((a - (b == -INFINITY ? 0.0f : b)) * kLog2e); }

// What a lane knows of its rows, g and g + 8 of each tile.
template <int kTiles, int kWidth>
struct State {
  float top[kTiles][2], total[kTiles][2], sum[kTiles][kWidth / 8][4];

  __device__ State() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      for (int r = 0; r < 2; ++r) top[t][r] = -INFINITY, total[t][r] = 0.0f;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
        for (int i = 0; i < 4; ++i) sum[t][j][i] = 0.0f;
    }
  }

  // Turns the products of tile t with the keys from `first` on into weights, of which those below low[r] and from `end`
  // on are 0.
  __device__ void weigh(const PagedDecode& f, int t, float (&s)[2][4], const int (&low)[2], int first, int end,
                        Lane at) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = top[t][r];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = first + 8 * n + 2 * at.c + i;
          float& score = s[n][2 * r + i];
          score = f.softcap > 0.0f ? f.softcap * tanhf(score * (f.scale / f.softcap)) : score * f.scale;
          if (key < low[r] || key >= end) score = -INFINITY;
          most = fmaxf(most, score);
        }
      most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));
      const float factor = weight(top[t][r], most);
      total[t][r] *= factor;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) total[t][r] += s[n][2 * r + i] = weight(s[n][2 * r + i], most);
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) sum[t][j][2 * r] *= factor, sum[t][j][2 * r + 1] *= factor;
      top[t][r] = most;
    }
  }
};

// Merges the states of a block's warps, in their order, and leaves its part; `sums`, `tops` and `totals` are shared.
template <int kTiles, int kWidth, int kRows>
__device__ void leave_part(const PagedDecode& f, const Rows& rows, const State<kTiles, kWidth>& state,
                           float (&sums)[kRows][kWidth], float (&tops)[kWarps][kRows],
                           float (&totals)[kWarps][kRows], Lane at) {
  const int count = rows.count();
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
    for (int r = 0; r < 2; ++r) {
      float total = state.total[t][r];
      total += __shfl_xor_sync(kAll, total, 1);
      total += __shfl_xor_sync(kAll, total, 2);
      const int row = 16 * t + 8 * r + at.g;
      if (at.c == 0) tops[at.warp][row] = state.top[t][r], totals[at.warp][row] = total;
    }
  __syncthreads();
  const auto top = [&](int row) {
    float most = tops[0][row];
    for (int w = 1; w < kWarps; ++w) most = fmaxf(most, tops[w][row]);
    return most;
  };
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    if (at.warp == w)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        for (int r = 0; r < 2; ++r) {
          const int row = 16 * t + 8 * r + at.g;
          const float factor = weight(state.top[t][r], top(row));
#pragma unroll
          for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& sum = sums[row][j / 8 * 64 + 16 * at.c + 8 * i + j % 8];
              sum = fmaf(state.sum[t][j][2 * r + i], factor, w == 0 ? 0.0f : sum);
            }
        }
    __syncthreads();
  }
  for (int row = threadIdx.x; row < count; row += kThreads) {
    const float most = top(row);
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total = fmaf(totals[w][row], weight(tops[w][row], most), total);
    f.part_top[rows.part(f, row)] = most;
    f.part_total[rows.part(f, row)] = total;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < count * (kWidth / 4); i += kThreads) {
    const int row = i / (kWidth / 4), d = i % (kWidth / 4) * 4;
    if (d >= f.width || top(row) == -INFINITY) continue;
    *reinterpret_cast<float4*>(f.part_out + rows.part(f, row) * f.width + d) =
        *reinterpret_cast<const float4*>(&sums[row][d]);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) attend_kernel(PagedDecode f) {
  constexpr int kTiles = kTilesOf<T, kWidth>, kRows = 16 * kTiles;
  constexpr int kLine = kWidth + 64 / sizeof(T);  // so that two rows of queries are on different banks
  __shared__ uint4 staged[kRows * kLine * sizeof(T) / 16];
  alignas(16) __shared__ float sums[kRows][kWidth];
  __shared__ float tops[kWarps][kRows], totals[kWarps][kRows];
  __shared__ int joins[kRows];
  const Lane at;
  const int group = f.heads / f.key_heads, pieces = (group + kRows - 1) / kRows;
  const int key_head = blockIdx.y / pieces, piece = blockIdx.y % pieces;
  const int first = blockIdx.x, split = blockIdx.z, context = f.contexts[first];
  if (int64_t(split) * kSplit >= context) return;
  const int begin = split * kSplit, end = context - begin < kSplit ? context : begin + kSplit;

  const int together = group < kRows ? kRows / group : 1;
  if (first % together != 0 && shares(f, first, split, at)) return;
  const int most = min(together - first % together, f.sequences - first);
  for (int i = 1 + at.warp; i < most; i += kWarps) {
    const bool joined = shares(f, first + i, split, at);
    if (at.index == 0) joins[i] = joined;
  }
  __syncthreads();
  Rows rows = {first, 1, key_head * group + piece * kRows, min(group - piece * kRows, kRows), split};
  while (rows.sequences < most && joins[rows.sequences]) ++rows.sequences;
  const int count = rows.count(), tiles = (count + 15) / 16;

  T* queries = reinterpret_cast<T*>(staged);
#pragma unroll 2
  for (int row = at.warp; row < 16 * tiles; row += kWarps) {
    const T* from = static_cast<const T*>(f.q) + rows.sequence(row) * f.q_token + rows.head(row) * f.q_head;
#pragma unroll
    for (int d = at.index; d < kWidth; d += 32)
      queries[row * kLine + d] = row < count && d < f.width ? from[d] : T(0.0f);
  }
  int low[kTiles][2], oldest = begin;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * t + 8 * r + at.g;
      low[t][r] = f.window > 0 && row < count ? f.contexts[rows.sequence(row)] - f.window : 0;
    }
  if (f.window > 0) {
    const int context_of = f.contexts[first + min(at.index, rows.sequences - 1)];  // of at most 32 sequences
    oldest = reduce_warp(context_of, Smaller{}) - f.window;
  }
  __syncthreads();

  State<kTiles, kWidth> state;
  const int32_t* table = f.table + first * f.table_row;
  for (int key = begin + kStep * at.warp; key < end; key += kStep * kWarps) {
    if (key + kStep <= oldest) continue;
    const Lines<T> keys(f.k, table, f.page_bits, key_head, key, end);
    const Lines<T> values(f.v, table, f.page_bits, key_head, key, end);
    float s[kTiles][2][4] = {};
    const T* row = queries + at.g * kLine;
    if constexpr (sizeof(T) == 4)
      multiply_float_keys<kLine>(keys, row, tiles, f.width, s, at);
    else
      multiply_keys<kWidth, kLine>(keys, row, tiles, f.width, s, at);
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      if (t < tiles) state.weigh(f, t, s[t], low[t], key, end, at);
    if constexpr (sizeof(T) == 4)
      add_float_values<kWidth>(values, s, tiles, f.width, state.sum, at);
    else
      add_values<kWidth>(values, s, tiles, f.width, state.sum, at);
  }
  leave_part(f, rows, state, sums, tops, totals, at);
}

// The splits of a query under one head, in their order: a warp each.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(PagedDecode f, T* out) {
  const Lane at;
  const int64_t row = int64_t(blockIdx.x) * kWarps + at.warp, first = row * f.splits;
  if (row >= int64_t(f.sequences) * f.heads) return;
  const int used = (int64_t(f.contexts[row / f.heads]) + kSplit - 1) / kSplit;
  const float sink = f.sinks ? f.sinks[row % f.heads] : -INFINITY;
  float top = sink;
  for (int i = at.index; i < used; i += 32) top = fmaxf(top, f.part_top[first + i]);
  for (int distance = 16; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, distance));
  float total = weight(sink, top);
  float4 sum[2] = {};
  for (int i = 0; i < used; ++i) {
    const float share = weight(f.part_top[first + i], top);
    if (share == 0.0f) continue;
    total = fmaf(f.part_total[first + i], share, total);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int d = 4 * at.index + 128 * k;
      if (d >= f.width) continue;
      const float4 part = *reinterpret_cast<const float4*>(f.part_out + (first + i) * f.width + d);
      sum[k].x = fmaf(part.x, share, sum[k].x), sum[k].y = fmaf(part.y, share, sum[k].y);
      sum[k].z = fmaf(part.z, share, sum[k].z), sum[k].w = fmaf(part.w, share, sum[k].w);
    }
  }
  const float divisor = total > 0.0f ? total : 1.0f;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int d = 4 * at.index + 128 * k;
    if (d >= f.width) continue;
    T* to = out + row * f.width + d;
    store(to, sum[k].x / divisor), store(to + 1, sum[k].y / divisor);
    store(to + 2, sum[k].z / divisor), store(to + 3, sum[k].w / divisor);
  }
}

template <class T, int kWidth>
int decode(void* stream, const PagedDecode& f, void* out) {
  const int64_t pieces = divide_up(f.heads / f.key_heads, 16 * kTilesOf<T, kWidth>);
  const Extent grid(f.sequences, f.key_heads * pieces, f.splits);
  const int status = launch(attend_kernel<T, kWidth>, grid, kThreads, stream, f);
  if (status != cudaSuccess) return status;
  const int64_t rows = int64_t(f.sequences) * f.heads;
  return launch(combine_kernel<T>, divide_up(rows, kWarps), kThreads, stream, f, static_cast<T*>(out));
}

}  // namespace

int paged_split() { return kSplit; }

int paged_decode(void* stream, int dtype, const PagedDecode& f, void* out) {
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    return f.width <= 64    ? decode<T, 64>(stream, f, out)
           : f.width <= 128 ? decode<T, 128>(stream, f, out)
                            : decode<T, 256>(stream, f, out);
  });
}

}  // namespace posttrain::cuda
