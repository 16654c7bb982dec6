// Work plans of paged attention: host code, the same for every instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace posttrain {

// The tables of a step: block_table [sequences, max_pages] with `stride` between rows, context_lens and, if not null,
// query_lens [sequences], else one query each.
struct PagedTables {
  const int32_t* block_table;
  int64_t stride;
  const int32_t* context_lens;
  const int32_t* query_lens;
  int64_t sequences, max_pages;

  int64_t queries(int64_t sequence) const { return query_lens ? query_lens[sequence] : 1; }
};

// Throws std::invalid_argument, with the numbers, for lengths that don't fit each other, the table or the number of
// `tokens`, and for pages, among those that the contexts need, that don't exist.
void check_pages(const PagedTables& tables, int64_t tokens, int64_t num_pages, int64_t page_size);

struct PagedPlan {
  std::vector<QuerySlice> slices;
  std::vector<SlicePanel> panels;
};

// Panels of slices, for checked tables and groups of `group` query heads.
PagedPlan paged_plan(const PagedTables& tables, int64_t page_size, int64_t group);

// Keys or values of a step's tokens, one [heads] of `bytes` each; strides in bytes.
struct TokenHeads {
  const char* data;
  int64_t token, head;
};

// Throws std::invalid_argument, with the op's name and the numbers, unless all 0 <= slot < room.
void check_slots(const char* op, const int64_t* slots, int64_t tokens, int64_t room);

// Copies k and v into caches [slots, heads], contiguous, at slots[token].
void write_cache(TokenHeads k, TokenHeads v, char* key_cache, char* value_cache, const int64_t* slots, int64_t tokens,
                 int64_t heads, int64_t bytes);

}  // namespace posttrain
