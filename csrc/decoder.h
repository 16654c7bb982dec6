// A whole decoder as plain data, for generation: its weights where they lie, and the tokens of a step. Every field has
// eight bytes, since posttrain/rollout/decoder.py fills these structures in from Python.
#pragma once

#include <cstdint>

#include "attention.h"
#include "sample.h"

namespace posttrain {

// Columns of a piece of a turned matrix: W [height, width] turned is [pieces][width][kTurnedColumns], with the rows of W
// as columns; those behind the last row mean nothing.
constexpr int64_t kTurnedColumns = 64;

// One linear layer: y [rows, height] (row stride y_stride) = factor x W^T + bias, W [height, width]; bias may be null,
// and `turned`, which is W turned. With `add` it is added to what is in y instead of the bias.
template <class T>
struct LinearTask {
  const T *weight, *bias;
  T* y;
  int64_t height, width, y_stride;
  double factor;
  bool add;
  const T* turned;
};

// W x + bias + scaling B (A x); without bias, adapter or a turned W, they are null.
template <class T>
struct AdaptedLinear {
  const T *weight, *turned, *bias, *lora_a, *lora_b;
  int64_t height, width, rank;
  double scaling;
};

// Norms are null where a family has none. Those of queries and keys are over each head, or over all heads together.
// `rope` says which of the decoder's kinds of angles the layer uses.
template <class T>
struct DecoderLayer {
  const T *before_attention, *after_attention, *before_mlp, *after_mlp;
  const T *q_norm, *k_norm;
  AdaptedLinear<T> q, k, v, o, gate, up, down;
  T *keys, *values;
  int64_t window, rope, norm_each_head;
};

// Logits are head_softcap tanh(logit_scale x / head_softcap), without a tanh where head_softcap is 0.
template <class T>
struct Decoder {
  const T* embeddings;
  const T* norm;
  const DecoderLayer<T>* layers;
  AdaptedLinear<T> head;
  int64_t num_layers, hidden, heads, key_heads, width, intermediate, activation, page_size, most_rank;
  double embedding_scale, eps, scale, softcap, logit_scale, head_softcap;
};

// Cosines and sines [positions, rotated] of two kinds of layers.
template <class T>
struct Angles {
  const T *cos[2], *sin[2];
  int64_t rotated;
};

// Tokens, their positions and where they go. logits [num_rows, vocabulary] are those of `rows`, ascending. If
// `drawn` isn't null, a token is drawn from each of them, as `draws` say except for the logits.
template <class T>
struct DecoderStep {
  const int64_t *tokens, *positions, *slots, *rows;
  int64_t num_tokens, num_rows;
  Angles<T> angles;
  BlockTable table;
  const QuerySlice* slices;
  const SlicePanel* panels;
  int64_t num_panels, threads;
  T *logits, *workspace;
  SampleBatch draws;
  int64_t* drawn;
  float* logprobs;
};

// Steps one after the other: `next(self, step)` takes what the step before has drawn and describes the next one, with as
// many threads, or says that there is none.
template <class T>
struct DecoderSteps {
  bool (*next)(void* self, DecoderStep<T>& step);
  void* self;
};

}  // namespace posttrain
