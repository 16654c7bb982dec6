#include "burst.h"

#include <chrono>
#include <vector>

#include "cpu/all.h"
#include "isa.h"

namespace posttrain {

namespace {

// Whether sequence `s`, whose newest token is `token`, goes on no more after `drawn` tokens.
bool complete(const BurstTask& task, int64_t s, int64_t token, int64_t drawn) {
  if (drawn == task.limits[s]) return true;
  if (drawn == 0 || !task.heeds[s]) return false;
  for (int64_t i = 0; i < task.num_ends; ++i)
    if (task.ends[i] == token) return true;
  return false;
}

// The sequences that go on from a step, as the arrays of its tokens.
struct Running {
  std::vector<int64_t> owners, tokens, positions, slots, rows, top_k, seeds, offsets;
  std::vector<int32_t> table, contexts;
  std::vector<float> temperature, top_p, min_p, logprobs;

  Running(const BurstTask& task, int64_t step) {
    const PagedTables& tables = task.tables;
    for (int64_t s = 0; s < tables.sequences; ++s) {
      const int64_t token = task.tokens[step * tables.sequences + s];
      if (task.drawn[s] < step || complete(task, s, token, step)) continue;
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

  void place(const BurstTask& task, int64_t step, int64_t page_size) {
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t position = task.tables.context_lens[owners[i]] + step;
      positions[i] = position;
      contexts[i] = int32_t(position + 1);
      slots[i] = table[i * task.tables.max_pages + position / page_size] * page_size + position % page_size;
      offsets[i] = task.draws.offsets[owners[i]] + step;
    }
  }

  // Writes down what was drawn; whether a sequence is complete now.
  bool note(const BurstTask& task, int64_t step) const {
    bool one = false;
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t s = owners[i];
      task.tokens[(step + 1) * task.tables.sequences + s] = tokens[i];
      task.logprobs[step * task.tables.sequences + s] = logprobs[i];
      task.drawn[s] = step + 1;
      one = one || complete(task, s, tokens[i], step + 1);
    }
    return one;
  }
};

template <class T>
struct Steps {
  using clock = std::chrono::steady_clock;
  const Decoder<T>& decoder;
  const BurstTask& task;
  int64_t step;
  Running running;
  PagedPlan plan;
  clock::time_point end;

  Steps(const Decoder<T>& decoder, const BurstTask& task, int64_t step)
      : decoder(decoder), task(task), step(step), running(task, step),
        end(clock::now() + std::chrono::duration_cast<clock::duration>(std::chrono::duration<double>(task.seconds))) {}

  void describe(DecoderStep<T>& f) {
    Running& r = running;
    r.place(task, step, decoder.page_size);
    const PagedTables tables = {r.table.data(), task.tables.max_pages, r.contexts.data(), nullptr, r.count(),
                                task.tables.max_pages};
    plan = paged_plan(tables, decoder.page_size, decoder.heads / decoder.key_heads);
    f.tokens = f.drawn = r.tokens.data(), f.positions = r.positions.data(), f.slots = r.slots.data();
    f.rows = r.rows.data(), f.logprobs = r.logprobs.data();
    f.num_tokens = f.num_rows = r.count();
    f.table = {tables.block_table, tables.stride, __builtin_ctzll(decoder.page_size)};
    f.slices = plan.slices.data(), f.panels = plan.panels.data(), f.num_panels = plan.panels.size();
    f.draws.temperature = r.temperature.data(), f.draws.top_k = r.top_k.data(), f.draws.top_p = r.top_p.data();
    f.draws.min_p = r.min_p.data(), f.draws.seeds = r.seeds.data(), f.draws.offsets = r.offsets.data();
  }

  bool next(DecoderStep<T>& f) {
    const bool one = running.note(task, step++);
    if ((one && task.until_one) || clock::now() > end) return false;
    if (one) running = Running(task, step);
    if (running.count() == 0) return false;
    describe(f);
    return true;
  }
};

}  // namespace

template <class T>
int64_t burst(const Decoder<T>& decoder, const Angles<T>& angles, const BurstTask& task, int64_t step, T* logits,
              T* workspace, int threads) {
  Steps<T> steps(decoder, task, step);
  if (steps.running.count() == 0) return step;
  DecoderStep<T> first = {};
  first.angles = angles, first.threads = threads, first.logits = logits, first.workspace = workspace;
  steps.describe(first);
  const DecoderSteps<T> all = {
      [](void* self, DecoderStep<T>& f) { return static_cast<Steps<T>*>(self)->next(f); }, &steps};
  POSTTRAIN_CALL(decode<T>, decoder, first, all);
  return steps.step;
}

#define INSTANTIATE(T)                                                                                             \
  template int64_t burst<T>(const Decoder<T>&, const Angles<T>&, const BurstTask&, int64_t, T*, T*, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain
