#pragma once
#include <cstdint>

namespace posttrain {

// A matrix in 4-bit NormalFloat (posttrain/ops/nf4_weight.py): either absmax, or absmax_index with the nested
// statistics.
struct Nf4 {
  const uint8_t* packed;
  const float* absmax;
  const uint8_t* absmax_index;
  const float *nested_absmax, *nested_code, *offset;
  int64_t block, nested_block;
};

}  // namespace posttrain
