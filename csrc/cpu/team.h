// Threads that take the same steps together, each its share of every step, within one parallel region: waiting for each
// other takes a fraction of what it takes to begin another region.
#pragma once

#include <omp.h>
#include <sched.h>

#include <cstdint>

namespace posttrain::POSTTRAIN_ISA {

namespace {

// What all threads of a region see.
struct TeamState {
  alignas(64) int64_t arrived = 0;
  alignas(64) int64_t round = 0;
  alignas(64) int64_t taken = 0;
};

struct Share {
  int64_t begin, end;

  int64_t count() const { return end - begin; }
};

// A thread's view. Made inside the region.
struct Team {
  TeamState& all;
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();

  // This thread's part of 0 <= i < count.
  Share share(int64_t count) const { return {count * thread / threads, count * (thread + 1) / threads}; }

  // The next number that no thread has taken since `restart`.
  int64_t take() const { return __atomic_fetch_add(&all.taken, 1, __ATOMIC_RELAXED); }

  // To be followed by `wait` before the next `take`, and to follow one after the last.
  void restart() const {
    if (thread == 0) __atomic_store_n(&all.taken, 0, __ATOMIC_RELAXED);
  }

  // Until all threads have come. Gives the processor away where they take long: others may need it to come.
  void wait() const {
    constexpr int kSpins = 1000;
    if (threads == 1) return;
    const int64_t round = __atomic_load_n(&all.round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&all.arrived, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&all.arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&all.round, round + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&all.round, __ATOMIC_ACQUIRE) == round;) {
      if (++spins > kSpins) {
        sched_yield();
        continue;
      }
#if defined(__x86_64__) || defined(_M_X64)
      __builtin_ia32_pause();
#endif
    }
  }
};

}  // namespace

}  // namespace posttrain::POSTTRAIN_ISA
