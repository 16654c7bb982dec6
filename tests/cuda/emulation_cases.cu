// Small kernels, right and wrong ones, run emulated: a line "name: result" for each. test_emulation.py has what is due.
#include <cstdio>
#include <vector>

#include "cuda/device.h"

namespace posttrain::emulation {
void set_descending(bool descending);
}

using namespace posttrain::cuda;

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(~0u, lane, 3, 8);
  out[32 + lane] = __shfl_up_sync(~0u, lane, 3, 16);
  out[64 + lane] = __shfl_down_sync(~0u, lane, 5);
  out[96 + lane] = __shfl_xor_sync(~0u, lane, 17);
  out[128 + lane] = int(__ballot_sync(~0u, lane % 3 == 0));
  out[160 + lane] = __any_sync(~0u, lane == 9) * 2 + __all_sync(~0u, lane < 31);
}

// Half warps go different ways, and a lane that returned is missed by nobody.
__global__ void halves(int* out) {
  const int lane = threadIdx.x;
  if (lane == 20) return;
  if (lane < 16)
    out[lane] = __shfl_xor_sync(0xffffu, lane, 1);
  else
    out[lane] = __shfl_xor_sync(0xffff0000u, lane, 2);
  __syncwarp();
  __syncthreads();
}

__global__ void sums(float* out) {
  const float sum = reduce_block<96>(float(threadIdx.x), 0.0f, Sum{});
  const float top = reduce_block<96>(float(threadIdx.x % 50), -INFINITY, Maximum{});
  if (threadIdx.x == blockIdx.x) out[blockIdx.x] = sum + 1000 * top;
}

__global__ void part_of_a_warp(float* out) {
  __shared__ float shared[40];
  shared[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  float sum = shared[39 - threadIdx.x];
  for (int i = 1; i < 8; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
  out[threadIdx.x] = sum;
}

__global__ void atomics(int* out, float* total) {
  atomicAdd(total, 0.5f);
  atomicMax(out, int(threadIdx.x));
  atomicMin(out + 1, -int(blockIdx.x));
  atomicCAS(out + 2, 0, int(threadIdx.x) + 1);
}

__global__ void unwritten(float* out) {
  __shared__ float shared[32];
  out[blockIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 1;
}

__global__ void order(int* out, int* count) { out[atomicAdd(count, 1)] = int(blockIdx.x * 2 + threadIdx.x); }

__global__ void without_barrier(float* out) {
  __shared__ float shared;
  if (threadIdx.x == 0) shared = 1;
  out[threadIdx.x] = shared;
}

__global__ void barrier_in_a_branch(int) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void absent_lane(int) {
  if (threadIdx.x == 5)
    __syncthreads();
  else
    __shfl_sync(~0u, 1, 0);
}

__global__ void wrong_mask(int) { __shfl_sync(0xfffeu, 1, 0); }

__global__ void other_lines(int) {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    __syncwarp();
}

__global__ void misaligned(float* out) { store_vector(out + 1, Vector<float>{}); }

__global__ void beyond_shared(int index) {
  __shared__ float shared[8];
  shared[index + threadIdx.x] = 1;
}

template <class T>
void row(const char* name, const std::vector<T>& values) {
  std::printf("%s:", name);
  for (const T x : values) std::printf(" %g", double(x));
  std::printf("\n");
}

void status(const char* name, int code) { std::printf("%s: %d %s\n", name, code, describe(code)); }

void right_ones() {
  std::vector<int> ints(192);
  launch(shuffles, 1, 32, nullptr, ints.data());
  row("shuffles", ints);
  ints.assign(32, -1);
  status("halves", launch(halves, 1, 32, nullptr, ints.data()));
  row("halves", ints);
  std::vector<float> floats(3);
  launch(sums, 3, 96, nullptr, floats.data());
  row("sums", floats);
  floats.assign(40, 0);
  launch(part_of_a_warp, 1, 40, nullptr, floats.data());
  row("part_of_a_warp", floats);
  ints.assign(3, 0), floats.assign(1, 0);
  launch(atomics, Extent(2, 2), Extent(16, 2), nullptr, ints.data(), floats.data());
  row("atomics", ints), row("atomics", floats);
  ints.assign(8, 0);
  int count = 0;
  launch(order, 4, 2, nullptr, ints.data(), &count);
  row("order", ints);
  std::vector<float> halves_of = {65519.0f, 65520.0f, 1.00048828125f, 1.00146484375f, 6e-8f, -0.0f};
  for (float& x : halves_of) x = __half(x);
  row("halves_of", halves_of);
  halves_of = {1.00390625f, 1.01171875f, 3.3961776e38f, -1e-40f, NAN};
  for (float& x : halves_of) x = __nv_bfloat16(x);
  row("bfloats_of", halves_of);
}

void wrong_ones() {
  alignas(16) float floats[64];
  launch(unwritten, 2, 1, nullptr, floats);
  row("unwritten", std::vector<float>(floats, floats + 2));
  launch(without_barrier, 1, 2, nullptr, floats);
  row("without_barrier", std::vector<float>(floats, floats + 2));
  status("barrier_in_a_branch", launch(barrier_in_a_branch, 2, 64, nullptr, 0));
  status("absent_lane", launch(absent_lane, 1, 64, nullptr, 0));
  status("wrong_mask", launch(wrong_mask, 1, 32, nullptr, 0));
  status("other_lines", launch(other_lines, 1, 32, nullptr, 0));
  status("misaligned", launch(misaligned, 1, 1, nullptr, floats));
  status("beyond_shared", launch(beyond_shared, 1, 4, nullptr, 5));
  status("within_shared", launch(beyond_shared, 1, 4, nullptr, 4));
  status("empty_grid", launch(beyond_shared, 0, 32, nullptr, 0));
  status("large_block", launch(beyond_shared, 1, 1056, nullptr, 0));
  status("large_grid", launch(beyond_shared, Extent(1, 65536), 32, nullptr, 0));
}

int main(int count, char**) {
  posttrain::emulation::set_descending(count > 1);
  right_ones();
  wrong_ones();
}
