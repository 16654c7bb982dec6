#include "layout.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace posttrain {

namespace {

[[noreturn]] void reject(const std::string& problem) { throw std::invalid_argument("PackedLayout: " + problem); }

}  // namespace

int64_t forest_tokens(const int64_t* lengths, const int64_t* parents, int64_t count) {
  std::vector<int64_t> path;  // the segment before i, and its ancestors, from the root
  int64_t tokens = 0;
  for (int64_t i = 0; i < count; ++i) {
    const std::string here = "segment " + std::to_string(i);
    if (lengths[i] < 0) reject(here + " has the negative length " + std::to_string(lengths[i]));
    if (lengths[i] > std::numeric_limits<int32_t>::max() - tokens)
      reject(here + " ends at token " + std::to_string(tokens) + " + " + std::to_string(lengths[i]) +
             ", beyond what int32 holds");
    tokens += lengths[i];
    if (parents[i] < -1) reject(here + " has the parent " + std::to_string(parents[i]) + "; a root has -1");
    if (parents[i] >= i) reject(here + " has the parent " + std::to_string(parents[i]) + ", which must come before it");
    while (!path.empty() && path.back() != parents[i]) path.pop_back();
    if (parents[i] >= 0 && path.empty())
      reject("segments are not in depth-first order: " + here + " has the parent " + std::to_string(parents[i]) +
             ", whose descendants ended before it");
    path.push_back(i);
  }
  return tokens;
}

void forest_layout(const int64_t* lengths, const int64_t* parents, int64_t count, int32_t* visible_until,
                   int32_t* positions, int64_t* starts) {
  starts[0] = 0;
  for (int64_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + lengths[i];
  std::vector<int64_t> subtree_end(starts + 1, starts + count + 1), next_position(count);
  for (int64_t i = count - 1; i >= 0; --i)
    if (parents[i] >= 0) subtree_end[parents[i]] = std::max(subtree_end[parents[i]], subtree_end[i]);
  for (int64_t i = 0; i < count; ++i) {
    int64_t position = parents[i] < 0 ? 0 : next_position[parents[i]];
    for (int64_t t = starts[i]; t < starts[i + 1]; ++t) {
      visible_until[t] = static_cast<int32_t>(subtree_end[i]);
      positions[t] = static_cast<int32_t>(position++);
    }
    next_position[i] = position;
  }
}

int64_t sequence_layout(const int64_t* positions, int64_t tokens, int32_t* visible_until, int64_t* starts) {
  int64_t segments = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    if (positions[t] < 0 || positions[t] > std::numeric_limits<int32_t>::max())
      reject("position id " + std::to_string(t) + " is " + std::to_string(positions[t]) +
             ", outside 0 to what int32 holds");
    if (t == 0 || positions[t] != positions[t - 1] + 1) starts[segments++] = t;
  }
  starts[segments] = tokens;
  for (int64_t s = 0; s < segments; ++s)
    std::fill(visible_until + starts[s], visible_until + starts[s + 1], static_cast<int32_t>(starts[s + 1]));
  return segments;
}

namespace {

// Where what is seen may change: at every change of visible_until, and at every token some key is visible until.
std::vector<int64_t> run_starts(const int32_t* visible_until, int64_t tokens) {
  std::vector<char> starts(tokens + 1, 0);
  for (int64_t t = 0; t < tokens; ++t) {
    if (t == 0 || visible_until[t] != visible_until[t - 1]) starts[t] = 1;
    if (visible_until[t] >= 0 && visible_until[t] < tokens) starts[visible_until[t]] = 1;
  }
  std::vector<int64_t> runs;
  for (int64_t t = 0; t < tokens; ++t)
    if (starts[t]) runs.push_back(t);
  runs.push_back(tokens);
  return runs;
}

struct OpenRange {
  KeyRange keys;
  int64_t until;
};

// Appends the tiles from `first` on, one tree, as chunks of as many as fit.
void append_chunks(AttentionPlan& plan, int64_t first) {
  const int64_t end = plan.tiles.size();
  const size_t first_chunk = plan.chunks.size();
  for (int64_t t = first, tokens = 0; t < end; ++t) {
    if (t == first || tokens + plan.tiles[t].count > kChunkTokens) {
      plan.chunks.push_back({t, t, int64_t(plan.chunks.size() - first_chunk), 0});
      tokens = 0;
    }
    tokens += plan.tiles[t].count;
    plan.chunks.back().end = t + 1;
  }
  const int64_t count = plan.chunks.size() - first_chunk;
  for (size_t c = first_chunk; c < plan.chunks.size(); ++c) plan.chunks[c].count = count;
  plan.most_chunks = std::max(plan.most_chunks, count);
}

}  // namespace

AttentionPlan attention_plan(const int32_t* visible_until, int64_t tokens, int64_t group) {
  const std::vector<int64_t> runs = run_starts(visible_until, tokens);
  const int64_t tile = std::max<int64_t>(kPanelRows / group, 1);
  AttentionPlan plan;
  std::vector<OpenRange> open;  // what the current run's queries see, by key
  std::vector<int64_t> first_range;
  int64_t tree = 0;  // its first tile
  for (size_t r = 0; r + 1 < runs.size(); ++r) {
    const int64_t start = runs[r], end = runs[r + 1];
    open.erase(std::remove_if(open.begin(), open.end(), [=](const OpenRange& o) { return o.until <= start; }),
               open.end());
    if (open.empty()) {
      append_chunks(plan, tree);
      tree = plan.tiles.size();
    }
    const bool sees_itself = visible_until[start] > start;
    const int64_t offset = plan.ranges.size();
    for (const OpenRange& o : open) plan.ranges.push_back(o.keys);
    for (int64_t q = start; q < end; q += tile) {
      const int64_t last = std::min(q + tile, end);
      plan.tiles.push_back({q, last - q, {sees_itself ? start : last, last}, nullptr, int64_t(open.size())});
      first_range.push_back(offset);
    }
    open.push_back({{start, end}, visible_until[start]});
  }
  append_chunks(plan, tree);
  for (size_t t = 0; t < plan.tiles.size(); ++t) plan.tiles[t].ancestors = plan.ranges.data() + first_range[t];
  return plan;
}

}  // namespace posttrain
