// All kernels for the processor of the host, behind one function that launches them by name.
#include "cuda.h"

#include "../checksum.cu"
#include "../engine.cu"
#include "../move.cu"

namespace {

constexpr size_t STACK_BYTES = 64 << 10;

using Thunk = void (*)(void **);

enum class State { Ready, AtBarrier, Done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
  State state;
};

thread_local std::vector<Fiber> fibers;
thread_local ucontext_t scheduler;
thread_local unsigned running;
thread_local Thunk body;
thread_local void **parameters;

void enter() {
  body(parameters);
  fibers[running].state = State::Done;
  swapcontext(&fibers[running].context, &scheduler);
}

void run_block(unsigned threads) {
  for (unsigned at = 0; at < threads; at++) {
    Fiber &fiber = fibers[at];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::Ready;
  }
  for (unsigned done = 0; done < threads;) {
    unsigned waiting = 0;
    done = 0;
    for (running = 0; running < threads; running++) {
      if (fibers[running].state != State::Done) {
        threadIdx = {running, 0, 0};
        fibers[running].state = State::Ready;
        swapcontext(&scheduler, &fibers[running].context);
      }
      (fibers[running].state == State::Done ? done : waiting)++;
    }
    if (done != 0 && waiting != 0) {
      std::fprintf(stderr, "%u of %u threads left a block while others wait at a barrier\n", done, threads);
      std::abort();
    }
  }
}

template <typename... Types, size_t... At>
void call(void (*kernel)(Types...), void **from, std::index_sequence<At...>) {
  kernel(*static_cast<std::remove_reference_t<Types> *>(from[At])...);
}
template <auto KERNEL> struct Unpack;
template <typename... Types, void (*KERNEL)(Types...)> struct Unpack<KERNEL> {
  static void run(void **from) { call(KERNEL, from, std::index_sequence_for<Types...>{}); }
};

struct Entry {
  const char *name;
  Thunk thunk;
};
#define ENTRY(name) {#name, Unpack<name>::run}
const Entry ENTRIES[] = {
    ENTRY(terrace_gather_16),  ENTRY(terrace_gather_4),  ENTRY(terrace_gather_1),  ENTRY(terrace_scatter_16),
    ENTRY(terrace_scatter_4),  ENTRY(terrace_scatter_1), ENTRY(terrace_checksum),  ENTRY(terrace_embed),
    ENTRY(terrace_rms_norm),   ENTRY(terrace_product),   ENTRY(terrace_add),       ENTRY(terrace_place),
    ENTRY(terrace_attend),     ENTRY(terrace_silu),      ENTRY(terrace_rows),
};

} // namespace

void barrier() {
  fibers[running].state = State::AtBarrier;
  swapcontext(&fibers[running].context, &scheduler);
}

// Runs a kernel to its end. Returns 0, or 1 if there is none of that name.
extern "C" int terrace_launch(const char *name, const unsigned *grid, unsigned threads, void **from) {
  for (const Entry &entry : ENTRIES) {
    if (std::strcmp(entry.name, name) != 0) continue;
    body = entry.thunk;
    parameters = from;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    while (fibers.size() < threads) fibers.emplace_back();
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
      for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) run_block(threads);
    return 0;
  }
  return 1;
}
