// What tokens are drawn from: the same types for every instruction set.
#pragma once

#include <cstdint>

namespace posttrain {

// Logits [rows, size], `stride` between rows, and each row's parameters [rows], as in posttrain/ops/sample.py.
struct SampleBatch {
  const float* logits;
  int64_t stride, rows, size;
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* seeds;
  const int64_t* offsets;
};

}  // namespace posttrain
