#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <utility>

#include "global_memory.h"
#include "shared_memory.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__x86_64__)
// Saves what the calling convention lets a callee change, and swaps stacks.
extern "C" void cramfast_switch(void** save, void* to);
asm(R"(
.text
.globl cramfast_switch
.hidden cramfast_switch
.type cramfast_switch, @function
cramfast_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#endif

namespace cramfast::emulator {

Thread* running = nullptr;
Launch current;
std::uint32_t block_clock = 0, block_start = 0;

namespace {

constexpr std::size_t stack_bytes = 128 << 10;
constexpr int warp_size = 32, max_threads = 1024;

std::uint32_t clock_now = 0, random_state = 1;
std::string ignored_site, fault_text;
struct SeenSite {
  std::string text;  // kind and place
  bool ignored = false;
};
std::map<std::pair<const void*, int>, SeenSite> seen_sites;
bool faulted = false;

std::vector<Thread> threads;
std::vector<Warp> warps;
int finished = 0, waiting = 0;
const std::function<void()>* kernel_body = nullptr;
char* stacks = nullptr;

std::string name_of(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

void fiber_main() {
  (*kernel_body)();
  running->state = State::done;
  ++finished;
  for (;;) yield_to_scheduler();
}

#if defined(__x86_64__)
void* scheduler_stack = nullptr;

void prepare(Thread& thread) {
  void** top = reinterpret_cast<void**>(stacks + stack_bytes * (thread.number + 1) - 64);
  *--top = nullptr;  // the return address of fiber_main, which never returns; also aligns the stack
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

void resume(Thread& thread) {
  running = &thread;
  cramfast_switch(&scheduler_stack, thread.stack_pointer);
  running = nullptr;
}
#else
ucontext_t scheduler_context;
std::vector<ucontext_t> contexts(max_threads);

void prepare(Thread& thread) {
  ucontext_t& context = contexts[thread.number];
  getcontext(&context);
  context.uc_stack.ss_sp = stacks + stack_bytes * thread.number;
  context.uc_stack.ss_size = stack_bytes - 64;
  makecontext(&context, fiber_main, 0);
}

void resume(Thread& thread) {
  running = &thread;
  swapcontext(&scheduler_context, &contexts[thread.number]);
  running = nullptr;
}
#endif

template <class T>
void shuffle(std::vector<T>& items) {
  for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random_below(i)]);
}

// Runs the lanes of a warp until each waits for something outside the warp or is done.
void run_warp(int warp) {
  bool any = true;
  while (any && !faulted) {
    any = false;
    const int first = static_cast<int>(random_below(warp_size));
    for (int i = 0; i < warp_size && !faulted; ++i) {
      Thread& thread = threads[warp * warp_size + (first + i) % warp_size];
      if (thread.state != State::ready) continue;
      any = true;
      resume(thread);
    }
  }
}

std::string who_waits_where() {
  std::string text;
  int shown = 0;
  for (const Thread& thread : threads) {
    if (thread.state == State::done || (thread.lane != 0 && &thread != &threads[0] &&
                                        threads[thread.number - 1].waits_at.line == thread.waits_at.line)) {
      continue;
    }
    text += " thread " + std::to_string(thread.number) + " at " + name_of(thread.waits_at) +
            (thread.state == State::at_barrier ? " (barrier);" : " (warp collective);");
    if (++shown == 8) break;
  }
  return text;
}

void release_barrier() {
  const Site* where = nullptr;
  for (const Thread& thread : threads) {
    if (thread.state != State::at_barrier) continue;
    if (where && name_of(*where) != name_of(thread.waits_at)) {
      fault("divergent barrier:" + who_waits_where());
    }
    where = &thread.waits_at;
  }
  waiting = 0;
  block_clock = tick();
  for (Warp& warp : warps) warp.clock = block_clock;
  for (Thread& thread : threads) {
    if (thread.state == State::at_barrier) thread.state = State::ready;
  }
}

void run_block() {
  const int n = static_cast<int>(threads.size());
  finished = waiting = 0;
  block_clock = block_start = tick();
  begin_shared_memory(current.dynamic_bytes);
  for (Warp& warp : warps) {
    warp.clock = block_clock;
    warp.exchanges.clear();
  }
  for (int i = 0; i < n; ++i) {
    Thread& thread = threads[i];
    thread.number = i;
    thread.lane = i % warp_size;
    thread.warp = i / warp_size;
    thread.index = Index3(i % current.block.x, i / current.block.x % current.block.y,
                          i / (current.block.x * current.block.y));
    thread.state = State::ready;
    thread.copies.clear();
    thread.groups.clear();
    prepare(thread);
  }
  std::vector<int> order(n / warp_size);
  for (int i = 0; i < n / warp_size; ++i) order[i] = i;
  while (finished < n && !faulted) {
    shuffle(order);
    const int before = finished;
    bool ran = false;
    for (const int warp : order) {
      const auto first = threads.begin() + warp * warp_size;
      ran |= std::any_of(first, first + warp_size, [](const Thread& t) { return t.state == State::ready; });
      run_warp(warp);
    }
    if (faulted || finished == n) break;
    if (waiting > 0 && waiting + finished == n) {
      release_barrier();
    } else if (!ran && finished == before) {
      fault("deadlock:" + who_waits_where());
    }
  }
}

void complete(Exchange& e) {
  for (int lane = 0; lane < warp_size; ++lane) {
    Thread& thread = threads[running->warp * warp_size + lane];
    if ((e.mask >> lane & 1u) && &thread != running) thread.state = State::ready;
  }
}

}  // namespace

std::uint32_t tick() { return ++clock_now; }

Warp& warp_of(const Thread& thread) { return warps[thread.warp]; }

void yield_to_scheduler() {
#if defined(__x86_64__)
  cramfast_switch(&running->stack_pointer, scheduler_stack);
#else
  swapcontext(&contexts[running->number], &scheduler_context);
#endif
}

void fault(const std::string& what) {
  if (!faulted) {
    faulted = true;
    const Index3& b = current.block_index;
    fault_text = std::string("emulator: ") + current.kernel + ", block (" + std::to_string(b.x) + ", " +
                 std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
    if (running) fault_text += ", thread " + std::to_string(running->number);
    fault_text += ": " + what;
  }
  if (running) {
    for (;;) yield_to_scheduler();  // never resumed: the scheduler stops at a fault
  }
  throw std::runtime_error(fault_text);
}

void barrier(Site site) {
  if (ignored("barrier", site)) return;
  running->state = State::at_barrier;
  running->waits_at = site;
  ++waiting;
  yield_to_scheduler();
}

void exchange(std::uint32_t mask, Operation operation, const std::uint32_t* in, int words_in, std::uint32_t* out,
              int words_out, Site site) {
  Thread& self = *running;
  Warp& warp = warp_of(self);
  const std::uint32_t own = 1u << self.lane;
  if (!(mask & own)) fault("warp collective at " + name_of(site) + ": the mask leaves out the lane that calls it");
  Exchange* e = nullptr;
  for (Exchange& candidate : warp.exchanges) {
    if (candidate.arrived == candidate.mask || !(candidate.mask & mask)) continue;
    if (candidate.mask != mask || candidate.kind != reinterpret_cast<const void*>(operation)) {
      fault("divergent warp collective at " + name_of(site) + ":" + who_waits_where());
    }
    e = &candidate;
  }
  if (!e) {
    for (Exchange& candidate : warp.exchanges) {
      if (candidate.mask == mask) e = &candidate;  // finished, and read by all its lanes before they came here again
    }
    if (!e) {
      if (warp.exchanges.empty()) warp.exchanges.reserve(33);  // addresses must stay
      if (warp.exchanges.size() == 33) fault("too many different masks in one warp");
      e = &warp.exchanges.emplace_back();
    }
    e->mask = mask;
    e->arrived = 0;
    e->kind = reinterpret_cast<const void*>(operation);
  }
  std::memcpy(e->in[self.lane], in, words_in * sizeof *in);
  e->arrived |= own;
  if (e->arrived == mask) {
    operation(*e);
    complete(*e);
  } else {
    self.state = State::in_exchange;
    self.waits_at = site;
    yield_to_scheduler();
  }
  std::memcpy(out, e->out[self.lane], words_out * sizeof *out);
}

void launch(const char* kernel, Index3 grid, Index3 block, std::size_t dynamic_bytes,
            const std::function<void()>& body) {
  const unsigned n = block.x * block.y * block.z;
  current = Launch{kernel, grid, block, {}, static_cast<std::uint32_t>(dynamic_bytes)};
  faulted = false;
  running = nullptr;
  if (n == 0 || n > max_threads || n % warp_size) fault("a block of " + std::to_string(n) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fault("an impossible grid");
  if (!stacks) {
    stacks = static_cast<char*>(mmap(nullptr, stack_bytes * max_threads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  threads.resize(n);
  warps.resize(n / warp_size);
  kernel_body = &body;
  const GuardPageTrap trap;
  std::vector<std::uint64_t> order(static_cast<std::uint64_t>(grid.x) * grid.y * grid.z);
  for (std::uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  shuffle(order);  // nothing may depend on which block runs first
  for (const std::uint64_t i : order) {
    current.block_index = Index3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                                 static_cast<unsigned>(i / grid.x / grid.y));
    run_block();
    if (faulted) throw std::runtime_error(fault_text);
  }
  check_borders();
}

void set_seed(std::uint32_t seed) { random_state = seed * 2654435761u + 1u; }

std::uint32_t random_below(std::uint32_t bound) {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<std::uint32_t>((static_cast<std::uint64_t>(random_state) * bound) >> 32);
}

void ignore_site(const std::string& site) {
  ignored_site = site;
  seen_sites.clear();
}

bool ignored(const char* kind, Site site) {
  const auto [entry, is_new] = seen_sites.try_emplace({site.file, site.line});
  if (is_new) entry->second = {std::string(kind) + " " + name_of(site), name_of(site) == ignored_site};
  return entry->second.ignored;
}

std::vector<std::string> sites() {
  std::set<std::string> all;  // one file may have several names in memory
  for (const auto& [place, seen] : seen_sites) all.insert(seen.text);
  seen_sites.clear();
  return {all.begin(), all.end()};
}

}  // namespace cramfast::emulator
