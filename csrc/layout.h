// Layouts of packed tokens: host code, the same for every instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace posttrain {

// Checks a forest of `count` segments in depth-first order (parents[i] < 0: a root) and returns its number of tokens.
// Throws std::invalid_argument, with the numbers, for anything that is no such forest or has 2^31 tokens or more.
int64_t forest_tokens(const int64_t* lengths, const int64_t* parents, int64_t count);

// For a checked forest: what each key is visible until and each token's position [tokens], and where segments start
// [count + 1].
void forest_layout(const int64_t* lengths, const int64_t* parents, int64_t count, int32_t* visible_until,
                   int32_t* positions, int64_t* starts);

// The segments of sequences laid end to end, of which one starts wherever the position isn't the one before plus 1.
// Writes visible_until [tokens] and starts [segments + 1] (room for tokens + 1); returns the number of segments.
int64_t sequence_layout(const int64_t* positions, int64_t tokens, int32_t* visible_until, int64_t* starts);

struct AttentionPlan {
  std::vector<KeyRange> ranges;
  std::vector<QueryTile> tiles;  // by query
  std::vector<TileChunk> chunks;
  int64_t most_chunks = 0;  // of a tree
};

// Tiles of queries, whose panels hold `group` heads or as many as fit, for the mask k <= q < visible_until[k], whatever
// visible_until is.
AttentionPlan attention_plan(const int32_t* visible_until, int64_t tokens, int64_t group);

}  // namespace posttrain
