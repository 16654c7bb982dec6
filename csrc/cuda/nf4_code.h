// What the kernels of NF4 matrices share (posttrain/ops/nf4_weight.py describes the format).
#pragma once

#include "nf4.h"

#include "cuda/device.h"

namespace posttrain::cuda {

namespace {

__constant__ float kCode[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Through nested statistics rounded after the product and after the sum, as bitsandbytes does.
__device__ inline float absmax_of(const Nf4& w, int64_t block) {
  if (w.nested_absmax == nullptr) return w.absmax[block];
  const float scale = w.nested_absmax[block / w.nested_block];
  return __fadd_rn(__fmul_rn(w.nested_code[w.absmax_index[block]], scale), *w.offset);
}

inline int log2_of(int64_t block) {
  int shift = 0;
  while (int64_t{1} << shift < block) ++shift;
  return shift;
}

}  // namespace

}  // namespace posttrain::cuda
