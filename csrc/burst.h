// Steps of generation in which every sequence draws one token, one after the other until the sequences are complete:
// host code, the same for every instruction set.
#pragma once

#include <cstdint>

#include "decoder.h"
#include "paging.h"

namespace posttrain {

// Of `count` sequences, whose pages have room for all they may draw: arrays [count], and [steps + 1, count] of `tokens`
// and [steps, count] of `logprobs`, whose row t has what is drawn in step t (tokens: in row t + 1; row 0 are the newest
// tokens before). Logits and their row length in `draws` are not used.
struct BurstTask {
  PagedTables tables;        // context_lens: keys before the first step
  const int64_t* limits;     // most tokens of each
  const int64_t* heeds;      // whether one of `ends` completes it
  const int64_t* ends;
  int64_t num_ends;
  SampleBatch draws;         // with the offsets of the first step
  int64_t* tokens;
  float* logprobs;
  int64_t* drawn;            // how many tokens of each, so far; 0 before the first call
  int64_t until_one;         // whether to stop when one is complete
  double seconds;            // after which to stop, for others to get their turn
};

// Takes steps from step number `step` on; returns the number of the next one, which is `step` if all sequences are
// complete. `logits` and `workspace` have room for a step of all sequences.
template <class T>
int64_t burst(const Decoder<T>& decoder, const Angles<T>& angles, const BurstTask& task, int64_t step, T* logits,
              T* workspace, int threads);

}  // namespace posttrain
