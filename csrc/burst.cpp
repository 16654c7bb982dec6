#include "burst.h"

#include <chrono>
#include <vector>

#include "cpu/all.h"
#include "isa.h"

namespace posttrain {

namespace {

// The sequences that go on, as the arrays of a step.
template <class T>
struct Running {
  const BurstTask& task;
  std::vector<int64_t> owners, tokens, positions, slots, rows, top_k, seeds, offsets;
  std::vector<int32_t> table, contexts;
  std::vector<float> temperature, top_p, min_p, logprobs;

  Running(const BurstTask& task, int64_t step) : task(task) {
    const PagedTables& tables = task.tables;
    for (int64_t s = 0; s < tables.sequences; ++s) {
      const int64_t token = task.tokens[step * tables.sequences + s];
      if (task.drawn[s] < step || complete(s, token, step)) continue;
      const int32_t* pages = tables.block_table + s * tables.stride;
      table.insert(table.end(), pages, pages + tables.max_pages);
      rows.push_back(owners.size());
      owners.push_back(s);
      tokens.push_back(token);
      temperature.push_back(task.draws.temperature[s]);
      top_k.push_back(task.draws.top_k[s]);
      top_p.push_back(task.draws.top_p[s]);
      min_p.push_back(task.draws.min_p[s]);
      seeds.push_back(task.draws.seeds[s]);
    }
    for (auto* numbers : {&positions, &slots, &offsets}) numbers->resize(count());
    contexts.resize(count());
    logprobs.resize(count());
  }

  int64_t count() const { return owners.size(); }

  // Whether sequence `s`, whose newest token is `token`, goes on no more after `drawn` tokens.
  bool complete(int64_t s, int64_t token, int64_t drawn) const {
    if (drawn == task.limits[s]) return true;
    if (drawn == 0 || !task.heeds[s]) return false;
    for (int64_t i = 0; i < task.num_ends; ++i)
      if (task.ends[i] == token) return true;
    return false;
  }

  // A step of all; whether one is complete after it.
  bool advance(const Decoder<T>& decoder, const Angles<T>& angles, int64_t step, T* logits, T* workspace,
               int threads) {
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t position = task.tables.context_lens[owners[i]] + step, size = decoder.page_size;
      positions[i] = position;
      contexts[i] = int32_t(position + 1);
      slots[i] = table[i * task.tables.max_pages + position / size] * size + position % size;
      offsets[i] = task.draws.offsets[owners[i]] + step;
    }
    const int64_t pages = task.tables.max_pages;
    const PagedTables all = {table.data(), pages, contexts.data(), nullptr, count(), pages};
    const PagedPlan plan = paged_plan(all, decoder.page_size, decoder.heads / decoder.key_heads);
    DecoderStep<T> f = {};
    f.tokens = tokens.data(), f.positions = positions.data(), f.slots = slots.data(), f.rows = rows.data();
    f.num_tokens = f.num_rows = count();
    f.angles = angles;
    f.table = {all.block_table, all.stride, __builtin_ctzll(decoder.page_size)};
    f.slices = plan.slices.data(), f.panels = plan.panels.data(), f.num_panels = plan.panels.size();
    f.threads = threads;
    f.draws = {nullptr,      0,            0,           0,           temperature.data(), top_k.data(),
               top_p.data(), min_p.data(), seeds.data(), offsets.data()};
    f.drawn = tokens.data(), f.logprobs = logprobs.data();
    f.logits = logits, f.workspace = workspace;
    POSTTRAIN_CALL(decode<T>, decoder, f);
    return note(step);
  }

  // Writes down what was drawn.
  bool note(int64_t step) {
    bool one = false;
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t s = owners[i];
      task.tokens[(step + 1) * task.tables.sequences + s] = tokens[i];
      task.logprobs[step * task.tables.sequences + s] = logprobs[i];
      task.drawn[s] = step + 1;
      one = one || complete(s, tokens[i], step + 1);
    }
    return one;
  }
};

}  // namespace

template <class T>
int64_t burst(const Decoder<T>& decoder, const Angles<T>& angles, const BurstTask& task, int64_t step, T* logits,
              T* workspace, int threads) {
  using clock = std::chrono::steady_clock;
  const auto end = clock::now() + std::chrono::duration<double>(task.seconds);
  for (;;) {
    Running<T> running(task, step);
    if (running.count() == 0) return step;
    for (bool one = false; !one;) {
      one = running.advance(decoder, angles, step++, logits, workspace, threads);
      if ((one && task.until_one) || clock::now() > end) return step;
    }
  }
}

#define INSTANTIATE(T)                                                                                             \
  template int64_t burst<T>(const Decoder<T>&, const Angles<T>&, const BurstTask&, int64_t, T*, T*, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain
