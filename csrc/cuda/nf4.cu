// Dequantisation of NF4 matrices on a GPU (posttrain/ops/nf4_weight.py describes the format): a thread takes 8 elements
// at a time, 4 bytes, which lie in one block.
#include "cuda/nf4_code.h"

namespace posttrain::cuda {

namespace {

constexpr int kWordsTogether = 4, kDequantizeThreads = 256;

// Bytes [4 i, 4 i + 4), of which the matrix has `bytes`.
__device__ unsigned word_of(const uint8_t* packed, int64_t i, int64_t bytes) {
  if (4 * i + 4 <= bytes && reinterpret_cast<uintptr_t>(packed) % 4 == 0)
    return reinterpret_cast<const unsigned*>(packed)[i];
  unsigned word = 0;
  for (int b = 0; b < 4 && 4 * i + b < bytes; ++b) word |= unsigned(packed[4 * i + b]) << 8 * b;
  return word;
}

template <class T>
__device__ void store_word(unsigned word, float absmax, const float* code, T* out, int64_t begin, int64_t end) {
  float v[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] = __fmul_rn(code[word >> (e / 2 * 8 + (e % 2 ? 0 : 4)) & 15], absmax);
  if (begin == 0 && end == 8 && is_aligned(out)) {
#pragma unroll
    for (int part = 0; part < 8 / Vector<T>::size; ++part) {
      Vector<T> vector;
#pragma unroll
      for (int e = 0; e < Vector<T>::size; ++e) vector.set(e, v[part * Vector<T>::size + e]);
      store_vector(out + part * Vector<T>::size, vector);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (e >= begin && e < end) store(out + e, v[e]);
}

// out = elements [first, first + count) of the matrix.
template <class T>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(Nf4 w, int shift, int64_t first, int64_t count, T* out) {
  __shared__ float code[16];
  if (threadIdx.x < 16) code[threadIdx.x] = kCode[threadIdx.x];
  const int64_t end = first + count, bytes = (end + 1) / 2;
  const int64_t start = first / 8 + int64_t{blockIdx.x} * kWordsTogether * kDequantizeThreads + threadIdx.x;
  unsigned word[kWordsTogether];
  float absmax[kWordsTogether];
#pragma unroll
  for (int j = 0; j < kWordsTogether; ++j) {
    const int64_t i = start + j * kDequantizeThreads;
    if (8 * i >= end) continue;
    word[j] = word_of(w.packed, i, bytes);
    absmax[j] = absmax_of(w, 8 * i >> shift);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kWordsTogether; ++j) {
    const int64_t at = 8 * (start + j * kDequantizeThreads);
    if (at >= end) continue;
    store_word(word[j], absmax[j], code, out + (at - first), max(first - at, int64_t{0}), min(end - at, int64_t{8}));
  }
}

}  // namespace

int nf4_dequantize(void* stream, Nf4 w, int64_t first, int64_t count, int dtype, void* out) {
  if (count == 0) return cudaSuccess;
  const int64_t words = (first + count - 1) / 8 - first / 8 + 1;
  return by_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    return launch(dequantize_kernel<T>, divide_up(words, kWordsTogether * kDequantizeThreads), kDequantizeThreads,
                  stream, w, log2_of(w.block), first, count, static_cast<T*>(out));
  });
}

}  // namespace posttrain::cuda
