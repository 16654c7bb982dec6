// One step of a whole decoder: the tokens' embeddings through all layers, to logits behind some of them, and to a token
// drawn from each. It is what the modules of posttrain/models/families.py do, one kernel after the other without a way
// back to Python, and each of the kernels gives a token the same bits whatever is beside it.
//
// All threads go through the step together (team.h). Where there are tokens enough, each has its own tokens, reads all
// weights, and waits for the others at attention alone. Else linear layers are split by their outputs, what stands between
// them by tokens, and a step of one token also has something for each thread.
//
// The residual stream is `state`; what attention and MLP give, `delta`, joins it in the norm that follows.
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/team.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

constexpr int64_t kSmall = 1 << 18;  // multiplications in a layer that one thread does alone
constexpr int64_t kEnough = 8;       // tokens of each thread that are worth reading all weights for, if those are few

template <class T>
struct Run {
  const Decoder<T>& d;
  const DecoderStep<T>& s;
  bool by_tokens;
  T *state, *delta, *normed, *q, *k, *v, *attended, *gate, *up, *low, *rstd, *attention, *cos[2], *sin[2];
  float* draws_from;

  // Takes the places of its arrays in the workspace; returns its size.
  int64_t place(T* base) {
    const int64_t n = s.num_tokens, inner = d.heads * d.width, key_inner = d.key_heads * d.width;
    int64_t at = 0;
    const auto take = [&](int64_t size) {  // whole vectors, so that what begins at a multiple stays there
      const int64_t from = at;
      at += (size + Lanes<T>::n - 1) / Lanes<T>::n * Lanes<T>::n;
      return base ? base + from : nullptr;
    };
    state = take(n * d.hidden), delta = take(n * d.hidden), normed = take(n * d.hidden);
    q = take(n * inner), attended = take(n * inner), k = take(n * key_inner), v = take(n * key_inner);
    gate = take(n * d.intermediate), up = take(n * d.intermediate);
    low = take(n * 3 * d.most_rank), rstd = take(n * (d.heads > 1 ? d.heads : 1));
    for (int kind = 0; kind < 2; ++kind)
      cos[kind] = take(n * s.angles.rotated), sin[kind] = take(n * s.angles.rotated);
    attention = take(s.threads * paged_workspace<T>(d.width));
    draws_from = sizeof(T) == sizeof(float) ? (float*)s.logits : (float*)take(s.num_rows * d.head.height);
    return at;
  }

  // How many kinds of angles differ.
  int kinds() const { return s.angles.cos[0] == s.angles.cos[1] ? 1 : 2; }

  void operator()(const Team& team) const {
    embed(team.share(s.num_tokens));
    for (int64_t i = 0; i < d.num_layers; ++i) layer(team, d.layers[i], i == 0);
    if (s.num_rows == 0) return;
    if (s.num_rows < s.num_tokens) team.wait();  // for rows of others
    const Share own = team.share(s.num_rows);
    for (int64_t begin = own.begin, end; begin < own.end; begin = end) {  // rows that follow each other
      end = begin + 1;
      while (end < own.end && s.rows[end] == s.rows[end - 1] + 1) ++end;
      const int64_t at = s.rows[begin] * d.hidden;
      rms_norm_forward<T>(delta + at, state + at, d.norm, normed + begin * d.hidden, state + at, rstd + begin,
                          end - begin, d.hidden, d.eps);
    }
    if (!by_tokens) team.wait();
    const AdaptedLinear<T>* heads[] = {&d.head};
    T* outs[] = {s.logits};
    project(team, normed, s.num_rows, heads, outs, 1);
    scale_logits(own);
    if (s.drawn) draw(own);
  }

  void embed(Share own) const {
    for (int64_t i = own.begin; i < own.end; ++i) {
      const T* from = d.embeddings + s.tokens[i] * d.hidden;
      for (int64_t j = 0; j < d.hidden; ++j) state[i * d.hidden + j] = from[j] * T(d.embedding_scale);
      const int64_t width = s.angles.rotated;
      for (int kind = 0; kind < kinds(); ++kind) {
        copy(s.angles.cos[kind] + s.positions[i] * width, cos[kind] + i * width, width);
        copy(s.angles.sin[kind] + s.positions[i] * width, sin[kind] + i * width, width);
      }
    }
  }

  void layer(const Team& team, const DecoderLayer<T>& l, bool first) const {
    const int64_t n = s.num_tokens;
    const Share own = team.share(n);
    const T* x = enter(l.before_attention, own, first);
    team.restart();
    if (!by_tokens) team.wait();
    const AdaptedLinear<T>* projections[] = {&l.q, &l.k, &l.v};
    T* projected[] = {q, k, v};
    project(team, x, n, projections, projected, 3);
    place_heads(l, own);
    team.wait();
    attend(team, l);
    team.wait();
    const AdaptedLinear<T>* out[] = {&l.o};
    T* deltas[] = {delta};
    project(team, attended, n, out, deltas, 1);
    if (l.after_attention) norm(delta, l.after_attention, own, 1, d.hidden);
    x = enter(l.before_mlp, own, false);
    if (!by_tokens) team.wait();
    const AdaptedLinear<T>* halves[] = {&l.gate, &l.up};
    T* both[] = {gate, up};
    project(team, x, n, halves, both, 2);
    const int64_t at = own.begin * d.intermediate;
    glu_forward<T>(int(d.activation), gate + at, d.intermediate, up + at, d.intermediate, gate + at, own.count(),
                   d.intermediate);
    if (!by_tokens) team.wait();
    const AdaptedLinear<T>* down[] = {&l.down};
    project(team, gate, n, down, deltas, 1);
    if (l.after_mlp) norm(delta, l.after_mlp, own, 1, d.hidden);
  }

  // Adds delta, unless it is the `first` layer, to the state; returns its norm, or itself without a norm.
  const T* enter(const T* weight, Share own, bool first) const {
    const int64_t at = own.begin * d.hidden;
    if (weight) {
      rms_norm_forward<T>((first ? state : delta) + at, first ? nullptr : state + at, weight, normed + at,
                          first ? nullptr : state + at, rstd + own.begin, own.count(), d.hidden, d.eps);
      return normed;
    }
    if (!first)
      for (int64_t i = at; i < own.end * d.hidden; ++i) state[i] += delta[i];
    return state;
  }

  // Norms each of a token's `parts` of `width`.
  void norm(T* x, const T* weight, Share own, int64_t parts, int64_t width) const {
    T* at = x + own.begin * parts * width;
    rms_norm_forward<T>(at, nullptr, weight, at, nullptr, rstd + own.begin * parts, own.count() * parts, width, d.eps);
  }

  // Norms and turns queries and keys, and puts keys and values where they belong.
  void place_heads(const DecoderLayer<T>& l, Share own) const {
    const int64_t inner = d.heads * d.width, key_inner = d.key_heads * d.width;
    if (l.q_norm) {
      const int64_t parts = l.norm_each_head ? d.heads : 1, key_parts = l.norm_each_head ? d.key_heads : 1;
      norm(q, l.q_norm, own, parts, inner / parts);
      norm(k, l.k_norm, own, key_parts, key_inner / key_parts);
    }
    const int64_t kind = l.rope < kinds() ? l.rope : 0;
    rope_cache_tokens<T>({{q, inner, d.width},
                          {k, key_inner, d.width},
                          {v, key_inner, d.width},
                          cos[kind], sin[kind], s.slots, q, l.keys, l.values, d.heads, d.key_heads, d.width,
                          s.angles.rotated},
                         own.begin, own.end);
  }

  void attend(const Team& team, const DecoderLayer<T>& l) const {
    const int64_t line = d.key_heads * d.width;
    const PagedAttention<T> f = {{q, d.heads * d.width, d.width},
                                 {l.keys, d.page_size * line, line, d.width},
                                 {l.values, d.page_size * line, line, d.width},
                                 s.table, nullptr, d.heads, d.key_heads, d.width, d.scale, d.softcap, l.window};
    const int64_t pieces = paged_pieces(f, s.num_panels, team.threads);
    T* own = attention + team.thread * paged_workspace<T>(d.width);
    for (int64_t i; (i = team.take()) < pieces;)
      paged_piece(f, s.slices, s.panels, s.num_panels, team.threads, i, attended, own);
  }

  // y[i] = layers[i](x), up to three: for a thread's own rows, or for all of them, which all threads wait for.
  void project(const Team& team, const T* x, int64_t rows, const AdaptedLinear<T>* const* layers, T* const* y,
               int count) const {
    const Share own = by_tokens ? team.share(rows) : Share{0, rows};
    LinearTask<T> whole[3], down[3], raise[3];
    int adapted = 0;
    for (int i = 0; i < count; ++i) {
      const AdaptedLinear<T>& a = *layers[i];
      T* to = y[i] + own.begin * a.height;
      whole[i] = {a.weight, a.bias, to, a.height, a.width, a.height, 1.0, false, a.turned};
      if (a.rank == 0) continue;
      T* low_rank = low + adapted * s.num_tokens * d.most_rank + own.begin * a.rank;
      down[adapted] = {a.lora_a, nullptr, low_rank, a.rank, a.width, a.rank, 1.0, false, nullptr};
      raise[adapted++] = {a.lora_b, nullptr, to, a.height, a.rank, a.height, a.scaling, true, nullptr};
    }
    const T* from = x + own.begin * layers[0]->width;
    multiply_share(team, from, own.count(), whole, count);
    if (adapted) multiply_share(team, from, own.count(), down, adapted);
    if (!by_tokens) team.wait();
    if (adapted == 0) return;
    for (int i = 0; i < adapted; ++i) multiply_share(team, down[i].y, own.count(), raise + i, 1);
    if (!by_tokens) team.wait();
  }

  void multiply_share(const Team& team, const T* x, int64_t rows, const LinearTask<T>* tasks, int count) const {
    linear_share<T>(x, rows, tasks, count, by_tokens ? 0 : team.thread, by_tokens ? 1 : team.threads);
  }

  void scale_logits(Share own) const {
    const T scale = T(d.logit_scale), cap = T(d.head_softcap);
    T *at = s.logits + own.begin * d.head.height, *end = s.logits + own.end * d.head.height;
    if (scale != T(1))
      for (T* x = at; x < end; ++x) *x *= scale;
    if (cap > T(0))
      for (; at < end; at += Lanes<T>::n) {
        const int lanes = end - at < Lanes<T>::n ? int(end - at) : Lanes<T>::n;
        store_part(at, tanh(load_part(at, lanes, T(0)) * (T(1) / cap)) * cap, lanes);
      }
  }

  void draw(Share own) const {
    const int64_t size = d.head.height;
    if (sizeof(T) != sizeof(float))
      for (int64_t i = own.begin * size; i < own.end * size; ++i) draws_from[i] = float(s.logits[i]);
    SampleBatch batch = s.draws;
    batch.logits = draws_from, batch.stride = batch.size = size, batch.rows = s.num_rows;
    for (int64_t i = own.begin; i < own.end; ++i) sample_row(batch, i, s.drawn, s.logprobs);
  }

  static void copy(const T* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
};

template <class T>
int64_t layer_work(const DecoderLayer<T>& l) {
  const AdaptedLinear<T>* parts[] = {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down};
  int64_t work = 0;
  for (const AdaptedLinear<T>* part : parts) work += part->height * part->width;
  return work;
}

template <class T>
int threads_of(const Decoder<T>& decoder, const DecoderStep<T>& step) {
  return step.num_tokens * layer_work(decoder.layers[0]) > kSmall ? int(step.threads) : 1;
}

// Its arrays, and how threads share it. Weights that are turned are few enough for each thread to read all.
template <class T>
void prepare(Run<T>& run) {
  run.place(run.s.workspace);
  run.by_tokens = run.d.head.turned && run.s.num_tokens >= kEnough * run.s.threads;
}

}  // namespace

template <class T>
int64_t decoder_workspace(const Decoder<T>& decoder, const DecoderStep<T>& step) {
  Run<T> run = {decoder, step};
  return run.place(nullptr);
}

template <class T>
void decode(const Decoder<T>& decoder, const DecoderStep<T>& step) {
  Run<T> run = {decoder, step};
  prepare(run);
  TeamState all;
#pragma omp parallel num_threads(threads_of(decoder, step))
  run(Team{all});
}

template <class T>
void decode(const Decoder<T>& decoder, DecoderStep<T>& step, DecoderSteps<T> steps) {
  Run<T> run = {decoder, step};
  prepare(run);
  TeamState all;
  bool more = true;
#pragma omp parallel num_threads(threads_of(decoder, step))
  for (const Team team = {all}; more;) {
    run(team);
    team.wait();
    if (team.thread == 0) {
      more = steps.next(steps.self, step);
      prepare(run);
    }
    team.wait();
  }
}

#define INSTANTIATE(T)                                                             \
  template int64_t decoder_workspace<T>(const Decoder<T>&, const DecoderStep<T>&); \
  template void decode<T>(const Decoder<T>&, const DecoderStep<T>&);               \
  template void decode<T>(const Decoder<T>&, DecoderStep<T>&, DecoderSteps<T>);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
