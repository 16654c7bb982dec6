// What packed and paged attention work on, and how they walk a forest of tokens (built by layout.cpp) and the pages of
// sequences (paging.cpp), as plain data: the same types for every instruction set.
#pragma once

#include <cstdint>

namespace posttrain {

// Keys begin <= k < end.
struct KeyRange {
  int64_t begin, end;
};

inline KeyRange common(KeyRange a, KeyRange b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// `count` neighbouring queries from `first` on that see the same keys: all of their `ancestors`, and of `own`, which
// ends with the last of them, each the keys up to itself.
struct QueryTile {
  int64_t first, count;
  KeyRange own;
  const KeyRange* ancestors;
  int64_t num_ancestors;
};

// Keys that the softmax takes together.
constexpr int64_t kKeyBlock = 64;

// Rows of a panel, the queries of a tile under the heads of a group, and tokens of a chunk, at most.
constexpr int64_t kPanelRows = 64;
constexpr int64_t kChunkTokens = 128;

// Neighbouring tiles begin <= t < end of one tree, whose tokens see no key of other trees, nor the other way round:
// number `index` of the tree's `count` chunks, which follow each other.
struct TileChunk {
  int64_t begin, end, index, count;
};

// A tensor [tokens, heads, width] whose last dimension is contiguous; strides in elements.
template <class T>
struct View {
  T* data;
  int64_t token, head;
};

// What packed attention reads. softcap and window are 0 for none, sinks [heads] may be null.
template <class T>
struct Attention {
  View<const T> q, k, v;
  const int32_t* positions;
  const T* sinks;
  int64_t tokens, heads, key_heads, width, value_width;
  double scale, softcap;
  int64_t window;
};

// Forward results and output gradient in; gradients out, contiguous, added to what is there.
template <class T>
struct AttentionGradients {
  const T* out;
  const double* lse;
  View<const T> grad_out;
  T* grad_q;
  T* grad_k;
  T* grad_v;
  T* delta;  // written
};

// A cache [pages, page size, key heads, width] whose last dimension is contiguous; strides in elements.
template <class T>
struct Pages {
  const T* data;
  int64_t page, token, head;
};

// Heads [batch, heads, tokens, width] whose last dimension is contiguous, and where they go; strides in elements.
template <class T>
struct TurnedHeads {
  struct Strides {
    int64_t batch, head, token;
  };

  const T* x;
  Strides from;
  T* y;
  Strides to;
  int64_t heads;
};

// Heads of a step's tokens, the angles [tokens, rotated] by which queries and keys are turned, and where they go: queries
// to `out`, keys and values to the slots of caches [slots, key heads, width]. All but q, k and v are contiguous.
template <class T>
struct StepHeads {
  View<const T> q, k, v;
  const T *cos, *sin;
  const int64_t* slots;
  T *out, *keys, *values;
  int64_t heads, key_heads, width, rotated;
};

// The pages of each sequence, one for every 2^page_bits positions.
struct BlockTable {
  const int32_t* pages;
  int64_t stride, page_bits;
};

// Queries of a sequence at the positions begin <= p < end, from `token` on. The first `common` blocks of kKeyBlock keys
// are also those of the slice before, in the same pages and before both ends.
struct QuerySlice {
  int64_t sequence, token, begin, end, common;
};

// Neighbouring slices begin <= i < end that are worked on together: one, or as many as share a block of keys and fit.
struct SlicePanel {
  int64_t begin, end;
};

// What paged attention reads. softcap and window are 0 for none, sinks [heads] may be null.
template <class T>
struct PagedAttention {
  View<const T> q;
  Pages<T> k, v;
  BlockTable table;
  const T* sinks;
  int64_t heads, key_heads, width;
  double scale, softcap;
  int64_t window;
};

}  // namespace posttrain
