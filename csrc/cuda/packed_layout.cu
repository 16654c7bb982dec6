// Layouts of packed tokens made on a GPU, integer for integer what posttrain/ops/layout.py makes elsewhere: two
// launches expand a forest, two more describe its blocks, nothing waits for the device.
//
// Segments are in depth-first order. So what ends with segment i is i and those ancestors of it that don't continue,
// up to the parent of i + 1: each segment is in one such chain, whose end is the end of its subtree; and the position
// at which i + 1 starts is where i ends, less the tokens of the chain. One sum over the segments then gives all
// positions.
//
// A token starts a tree where no key before it is visible to it. Within a block of 32 tokens the last token that no key
// of the block before it reaches is the last to start a tree, if no key before the block reaches it, else none does. So
// a block is described by itself but for the largest visible_until before it, which one scan over the blocks gives.
#include "cuda/device.h"

namespace posttrain::cuda {

namespace {

constexpr int kBlock = 32;  // BLOCK of posttrain/ops/layout.py: a warp
constexpr int kThreads = 256, kScan = 1024;
constexpr unsigned kAll = ~0u;

struct SumOf {
  __device__ int operator()(int a, int b) const { return a + b; }
};
struct LargestOf {
  __device__ int operator()(int a, int b) const { return max(a, b); }
};

// `combine` of the values of this lane and those before it.
template <class Combine>
__device__ int scan_warp(int x, Combine combine) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kAll, x, distance);
    if (lane >= distance) x = combine(before, x);
  }
  return x;
}

// `combine` of `carry` and the values of the threads before this one of a block of kScan; `carry` becomes that of all.
template <class Combine>
__device__ int scan_block(int x, int& carry, Combine combine) {
  __shared__ int of_warp[kScan / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int own = scan_warp(x, combine), before = __shfl_up_sync(kAll, own, 1);
  if (lane == 31) of_warp[warp] = own;
  __syncthreads();
  const int warps = scan_warp(of_warp[lane], combine), earlier = __shfl_sync(kAll, warps, max(warp - 1, 0));
  int result = warp == 0 ? carry : combine(carry, earlier);
  if (lane > 0) result = combine(result, before);
  carry = combine(carry, __shfl_sync(kAll, warps, 31));
  __syncthreads();  // of_warp may be written again
  return result;
}

// Of each segment its first token, the end of its subtree, and the position of its first token.
__global__ void __launch_bounds__(kScan)
    segments_kernel(const int32_t* lengths, const int32_t* parents, int count, int32_t* start, int32_t* until,
                    int32_t* position) {
  int tokens = 0, steps = 0;
  for (int first = 0; first < count; first += kScan) {
    const int i = first + threadIdx.x;
    const int before = scan_block(i < count ? lengths[i] : 0, tokens, SumOf{});
    if (i < count) start[i] = before;
  }
  for (int first = 0; first < count; first += kScan) {
    const int i = first + threadIdx.x;
    int step = 0;
    if (i < count) {
      step = lengths[i];
      const int end = start[i] + step, next = i + 1 < count ? parents[i + 1] : -1;
      for (int ended = i; ended != next; ended = parents[ended]) {
        until[ended] = end;
        step -= lengths[ended];
      }
    }
    const int before = scan_block(step, steps, SumOf{});
    if (i < count) position[i] = before;
  }
}

__global__ void __launch_bounds__(kThreads)
    expand_kernel(const int32_t* start, const int32_t* until, const int32_t* position, int count, int tokens,
                  int32_t* visible_until, int32_t* positions) {
  const int64_t token = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= tokens) return;
  int segment = 0;  // the last that doesn't start after the token
  for (int end = count; segment + 1 < end;) {
    const int middle = segment + (end - segment) / 2;
    if (start[middle] <= token)
      segment = middle;
    else
      end = middle;
  }
  visible_until[token] = until[segment];
  positions[token] = position[segment] + int(token) - start[segment];
}

// The rows of a schedule but tree_start, which becomes the last token that no key of its block before it reaches.
__global__ void __launch_bounds__(kThreads)
    blocks_kernel(const int32_t* visible_until, const int32_t* positions, int tokens, int64_t blocks,
                  int32_t* schedule) {
  const int64_t token = int64_t(blockIdx.x) * kThreads + threadIdx.x, block = token / kBlock;
  if (block >= blocks) return;
  const int lane = threadIdx.x % 32;
  const int until = token < tokens ? visible_until[token] : 0, position = token < tokens ? positions[token] : 0;
  const int largest = scan_warp(until, LargestOf{}), before = __shfl_up_sync(kAll, largest, 1);
  const unsigned starts = __ballot_sync(kAll, lane == 0 || before <= token);
  int smallest = until, furthest = position, nearest = position;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    smallest = min(smallest, __shfl_xor_sync(kAll, smallest, distance));
    furthest = max(furthest, __shfl_xor_sync(kAll, furthest, distance));
    nearest = min(nearest, __shfl_xor_sync(kAll, nearest, distance));
  }
  if (lane < 31) return;
  schedule[block] = largest;
  schedule[blocks + block] = smallest;
  schedule[2 * blocks + block] = furthest;
  schedule[3 * blocks + block] = int(block) * kBlock + 31 - __clz(int(starts));
  schedule[4 * blocks + block] = nearest;
}

__global__ void __launch_bounds__(kScan) trees_kernel(const int32_t* largest, int32_t* tree_start, int64_t blocks) {
  int reach = INT32_MIN, last = 0;  // of the blocks before: the largest visible_until, the last in which a tree starts
  for (int64_t first = 0; first < blocks; first += kScan) {
    const int64_t block = first + threadIdx.x;
    const bool inside = block < blocks;
    const int until = scan_block(inside ? largest[block] : INT32_MIN, reach, LargestOf{});
    const bool starts = inside && tree_start[block] >= until;
    const int before = scan_block(starts ? int(block) : 0, last, LargestOf{});
    if (inside) tree_start[block] = kBlock * (until <= kBlock * block ? int(block) : before);
  }
}

}  // namespace

int layout_expand(void* stream, const int32_t* lengths, const int32_t* parents, int64_t segments, int64_t tokens,
                  int32_t* workspace, int32_t* visible_until, int32_t* positions) {
  if (tokens == 0) return cudaSuccess;
  int32_t *start = workspace, *until = start + segments, *position = until + segments;
  const int status =
      launch(segments_kernel, 1, kScan, stream, lengths, parents, int(segments), start, until, position);
  if (status != cudaSuccess) return status;
  return launch(expand_kernel, divide_up(tokens, kThreads), kThreads, stream, start, until, position, int(segments),
                int(tokens), visible_until, positions);
}

int layout_schedule(void* stream, const int32_t* visible_until, const int32_t* positions, int64_t tokens,
                    int32_t* schedule, int64_t blocks) {
  if (blocks == 0) return cudaSuccess;
  const int status = launch(blocks_kernel, divide_up(blocks * kBlock, kThreads), kThreads, stream, visible_until,
                            positions, int(tokens), blocks, schedule);
  if (status != cudaSuccess) return status;
  return launch(trees_kernel, 1, kScan, stream, schedule, schedule + 3 * blocks, blocks);
}

}  // namespace posttrain::cuda
