// The fibers behind cuda/emulation.h.
#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a broken one

#include "cuda/emulation.h"

#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace posttrain::emulation {

namespace {

constexpr size_t kStack = 128 << 10, kGuard = 64 << 10;
constexpr unsigned kMostThreads = 1024, kMostRows = 65535;

enum class State { running, at_barrier, meeting, returned };

struct Fiber {
  jmp_buf context;
  ucontext_t first;
  State state;
  uint3 index;
  Place place;
  // of a lane that meets others
  unsigned mask;
  int source;
  uint64_t value, result;
};

std::vector<Fiber*> fibers;  // those ever made; a block uses the first `count`
int count, current;

struct Warp {
  unsigned live, meeting;  // lanes
};

std::vector<Warp> warps;
int live, at_barrier;  // threads

bool descending_order;
jmp_buf scheduler;
ucontext_t maker;
const std::function<void()>* body;
std::string failure;

// Leaves `current` for the next fiber that can run, or for the scheduler.
void go_on() {
  const int step = descending_order ? count - 1 : 1;
  for (int tried = 0, next = (current + step) % count; tried < count; ++tried, next = (next + step) % count) {
    if (fibers[next]->state != State::running) continue;
    current = next;
    threadIdx = fibers[next]->index;
    _longjmp(fibers[next]->context, 1);
  }
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void wait() {
  if (_setjmp(fibers[current]->context) == 0) go_on();
}

Warp& warp() { return warps[current / 32]; }

Fiber& lane_of_warp(int lane) { return *fibers[current / 32 * 32 + lane]; }

bool same(Place a, Place b) { return a.line == b.line && a.file == b.file; }

void end_barrier_if_complete() {
  if (at_barrier == 0 || at_barrier < live) return;
  const Fiber* one = nullptr;
  for (int i = 0; i < count; ++i) {
    Fiber& f = *fibers[i];
    if (f.state != State::at_barrier) continue;
    if (one && !same(f.place, one->place))
      fail("threads of a block wait at different barriers: %s:%d and %s:%d", one->place.file, one->place.line,
           f.place.file, f.place.line);
    one = &f;
    f.state = State::running;
  }
  at_barrier = 0;
}

// Hands out the values of the lanes that meet with `mask` at `place`, if none is missing.
void end_meeting_if_complete(unsigned mask, Place place) {
  const unsigned wanted = mask & warp().live;
  if ((wanted & warp().meeting) != wanted) return;
  unsigned votes = 0;
  for (unsigned rest = wanted; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    const Fiber& f = lane_of_warp(i);
    if (f.mask != mask || !same(f.place, place)) return;
    if (f.value != 0) votes |= 1u << i;
  }
  for (unsigned rest = wanted; rest; rest &= rest - 1) {
    Fiber& f = lane_of_warp(__builtin_ctz(rest));
    f.result = f.source < 0 ? votes : wanted >> f.source & 1 ? lane_of_warp(f.source).value : ~uint64_t{0};
    f.state = State::running;
  }
  warp().meeting &= ~wanted;
}

void return_from_kernel() {
  fibers[current]->state = State::returned;
  --live;
  warp().live &= ~(1u << lane());
  for (unsigned rest = warp().meeting; rest; rest &= rest - 1) {
    const Fiber& f = lane_of_warp(__builtin_ctz(rest));
    if (f.state == State::meeting) end_meeting_if_complete(f.mask, f.place);
  }
  end_barrier_if_complete();
}

void fiber_main(unsigned low, unsigned high) {
  Fiber& self = *reinterpret_cast<Fiber*>(uintptr_t(high) << 32 | low);
  if (_setjmp(self.context) == 0) setcontext(&maker);
  for (;;) {
    (*body)();
    return_from_kernel();
    wait();
  }
}

void make_fiber() {
  auto* fiber = new Fiber();
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* stack = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack, kGuard, PROT_NONE);
  getcontext(&fiber->first);
  fiber->first.uc_stack.ss_sp = static_cast<char*>(stack);
  fiber->first.uc_stack.ss_size = kGuard + kStack;
  fiber->first.uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(fiber);
  makecontext(&fiber->first, reinterpret_cast<void (*)()>(fiber_main), 2, unsigned(address), unsigned(address >> 32));
  swapcontext(&maker, &fiber->first);
  fibers.push_back(fiber);
}

void forget_fibers() {
  for (Fiber* fiber : fibers) {
    munmap(fiber->first.uc_stack.ss_sp, kGuard + kStack);
    delete fiber;
  }
  fibers.clear();
}

// This library's thread-local variables are the kernels' static shared memory.
struct Span {
  char* data;
  size_t size;
};

int find_shared(dl_phdr_info* info, size_t, void* result) {
  const auto here = reinterpret_cast<uintptr_t>(&find_shared);
  bool ours = false;
  size_t size = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + segment.p_vaddr;
    ours |= segment.p_type == PT_LOAD && start <= here && here < start + segment.p_memsz;
    if (segment.p_type == PT_TLS) size = segment.p_memsz;
  }
  if (!ours) return 0;
  *static_cast<Span*>(result) = {static_cast<char*>(info->dlpi_tls_data), info->dlpi_tls_data ? size : 0};
  return 1;
}

thread_local char touched;  // makes the thread's copy exist

Span static_shared_memory() {
  *const_cast<volatile char*>(&touched) = 0;
  Span span = {nullptr, 0};
  dl_iterate_phdr(find_shared, &span);
  return span;
}

void report_waiting() {
  std::map<std::string, int> waiting;
  for (int i = 0; i < count; ++i) {
    const Fiber& f = *fibers[i];
    if (f.state == State::returned) continue;
    char place[512];
    std::snprintf(place, sizeof place, "%s at %s:%d", f.state == State::at_barrier ? "the barrier" : "a warp's meeting",
                  f.place.file, f.place.line);
    ++waiting[place];
  }
  failure = "threads wait for others that never come:";
  for (const auto& [place, threads] : waiting) failure += " " + std::to_string(threads) + " for " + place + ";";
  failure.pop_back();
}

// Whether the block's threads all returned.
bool run_block(Span shared) {
  if (shared.size) std::memset(shared.data, 0xff, shared.size);
  for (int i = 0; i < count; ++i) fibers[i]->state = State::running;
  live = count;
  at_barrier = 0;
  warps.resize((count + 31) / 32);
  for (int i = 0; i < count; i += 32) warps[i / 32] = {count - i < 32 ? (1u << (count - i)) - 1 : ~0u, 0};
  current = descending_order ? 0 : count - 1;
  failure.clear();
  if (_setjmp(scheduler) == 0) go_on();
  if (!failure.empty()) return false;
  for (int i = 0; i < count; ++i)
    if (fibers[i]->state != State::returned) report_waiting();
  return failure.empty();
}

void set_sizes(dim3 grid, dim3 block) {
  gridDim = grid;
  blockDim = block;
  count = block.x * block.y * block.z;
  while (int(fibers.size()) < count) make_fiber();
  for (unsigned i = 0; i < unsigned(count); ++i)
    fibers[i]->index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
}

}  // namespace

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  failure = text;
  _longjmp(scheduler, 1);
}

void block_barrier(Place place) {
  Fiber& self = *fibers[current];
  self.state = State::at_barrier;
  ++at_barrier;
  self.place = place;
  end_barrier_if_complete();
  if (self.state != State::running) wait();
}

uint64_t meet(unsigned mask, uint64_t value, int source, Place place) {
  Fiber& self = *fibers[current];
  if (!(mask >> lane() & 1)) fail("%s:%d: lane %d isn't in its own mask %#x", place.file, place.line, lane(), mask);
  self.state = State::meeting;
  self.place = place;
  self.mask = mask;
  self.value = value;
  self.source = source;
  warp().meeting |= 1u << lane();
  end_meeting_if_complete(mask, place);
  if (self.state != State::running) wait();
  return self.result;
}

int lane() { return current % 32; }

unsigned live_lanes() { return warp().live; }

void set_descending(bool descending) { descending_order = descending; }

int run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMostThreads || blocks == 0 || grid.x > INT32_MAX || grid.y > kMostRows ||
      grid.z > kMostRows)
    return cudaErrorInvalidConfiguration;
  set_sizes(grid, block);
  body = &thread;
  const Span shared = static_shared_memory();
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t index = descending_order ? blocks - 1 - i : i;
    blockIdx = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
    if (run_block(shared)) continue;
    failure += " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
               std::to_string(blockIdx.z) + ")";
    forget_fibers();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

const char* describe(int status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return failure.c_str();
  }
}

}  // namespace posttrain::emulation

// What -fsanitize=alignment,null,bounds,shift calls, as in GCC's and clang's runtime, which isn't linked.
namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct Access {
  SourceLocation at;
  const void* type;
  unsigned char log_alignment, kind;
};

struct Operation {
  SourceLocation at;
};

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1(Access* access, uintptr_t address) {
  posttrain::emulation::fail("%s:%u: %s address %#zx for an access that wants %u bytes aligned", access->at.file,
                             access->at.line, address ? "misaligned" : "null", size_t(address),
                             1u << access->log_alignment);
}

void __ubsan_handle_out_of_bounds(Operation* operation, uintptr_t index) {
  posttrain::emulation::fail("%s:%u: index %zd is out of the array's bounds", operation->at.file, operation->at.line,
                             ssize_t(index));
}

void __ubsan_handle_shift_out_of_bounds(Operation* operation, uintptr_t, uintptr_t) {
  posttrain::emulation::fail("%s:%u: a shift by too much", operation->at.file, operation->at.line);
}

void __ubsan_handle_pointer_overflow(Operation* operation, uintptr_t, uintptr_t) {
  posttrain::emulation::fail("%s:%u: pointer arithmetic past the end of memory", operation->at.file,
                             operation->at.line);
}
}
