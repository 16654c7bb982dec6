#include "paging.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace posttrain {

namespace {

[[noreturn]] void reject(const std::string& problem) { throw std::invalid_argument("paged_attention: " + problem); }

int64_t pages_of(int64_t keys, int64_t page_size) { return (keys + page_size - 1) / page_size; }

// Blocks of keys that two slices have in the same pages before both ends.
int64_t common_blocks(const PagedTables& tables, int64_t page_size, const QuerySlice& a, const QuerySlice& b) {
  const int64_t blocks = std::min(a.end, b.end) / kKeyBlock;
  const int32_t* one = tables.block_table + a.sequence * tables.stride;
  const int32_t* other = tables.block_table + b.sequence * tables.stride;
  const int32_t* last = one + pages_of(blocks * kKeyBlock, page_size);
  return std::min(blocks, (std::mismatch(one, last, other).first - one) * page_size / kKeyBlock);
}

}  // namespace

void check_pages(const PagedTables& tables, int64_t tokens, int64_t num_pages, int64_t page_size) {
  int64_t total = 0;
  for (int64_t s = 0; s < tables.sequences; ++s) {
    const std::string here = "sequence " + std::to_string(s);
    const int64_t context = tables.context_lens[s], queries = tables.queries(s);
    if (context < 0 || context > tables.max_pages * page_size)
      reject(here + " has a context of " + std::to_string(context) + " keys; a block table of " +
             std::to_string(tables.max_pages) + " pages of " + std::to_string(page_size) + " holds 0 to " +
             std::to_string(tables.max_pages * page_size));
    if (queries < 0 || queries > context)
      reject(here + " has " + std::to_string(queries) + " queries in a context of " + std::to_string(context) + " keys");
    for (int64_t i = 0; i < pages_of(context, page_size); ++i) {
      const int64_t page = tables.block_table[s * tables.stride + i];
      if (page < 0 || page >= num_pages)
        reject("block_table[" + std::to_string(s) + "][" + std::to_string(i) + "] is " + std::to_string(page) +
               "; the cache has " + std::to_string(num_pages) + " pages");
    }
    total += queries;
  }
  if (total != tokens)
    reject("query_lens sum to " + std::to_string(total) + ", q has " + std::to_string(tokens) + " tokens");
}

PagedPlan paged_plan(const PagedTables& tables, int64_t page_size, int64_t group) {
  const int64_t most = std::max<int64_t>(kPanelRows / group, 1);
  PagedPlan plan;
  int64_t token = 0, in_panel = 0;
  for (int64_t s = 0; s < tables.sequences; ++s) {
    const int64_t context = tables.context_lens[s];
    for (int64_t begin = context - tables.queries(s); begin < context;) {
      QuerySlice slice = {s, token, begin, std::min(begin + most, context), 0};
      if (!plan.slices.empty()) slice.common = common_blocks(tables, page_size, plan.slices.back(), slice);
      const int64_t index = plan.slices.size(), count = slice.end - begin;
      if (slice.common == 0 || in_panel + count > most) {
        plan.panels.push_back({index, index});
        in_panel = 0;
      }
      plan.slices.push_back(slice);
      plan.panels.back().end = index + 1;
      in_panel += count;
      token += count;
      begin = slice.end;
    }
  }
  return plan;
}

void check_slots(const char* op, const int64_t* slots, int64_t tokens, int64_t room) {
  for (int64_t t = 0; t < tokens; ++t)
    if (slots[t] < 0 || slots[t] >= room)
      throw std::invalid_argument(std::string(op) + ": slots[" + std::to_string(t) + "] is " +
                                  std::to_string(slots[t]) + "; the cache has the slots 0 to " +
                                  std::to_string(room - 1));
}

void write_cache(TokenHeads k, TokenHeads v, char* key_cache, char* value_cache, const int64_t* slots, int64_t tokens,
                 int64_t heads, int64_t bytes) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t to = (slots[t] * heads + h) * bytes;
      std::memcpy(key_cache + to, k.data + t * k.token + h * k.head, bytes);
      std::memcpy(value_cache + to, v.data + t * v.token + h * v.head, bytes);
    }
}

}  // namespace posttrain
