// One streaming multiprocessor on the CPU: blocks one after another, every thread a fiber, warps run greedily in random
// order, because lanes in lockstep hide races that a real machine has. Kernels include device_code.h, not this.
//
// Any fault (a race, a bad address, a divergent barrier, a deadlock) ends the launch with a std::runtime_error that
// names the kernel, the block and the thread. Not modelled: time, bank conflicts, registers, the rounding inside a
// tensor core, reordering of memory operations, blocks that run at the same time.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace cramfast::emulator {

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
  Index3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// A place in the kernel source, taken where a default argument is evaluated.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum class State { ready, in_exchange, at_barrier, done };

// One cp.async that has been issued and whose bytes nobody may see yet.
struct AsyncCopy {
  std::uint32_t offset, bytes;
  unsigned char data[16];
};

struct Thread {
  void* stack_pointer = nullptr;
  Index3 index;
  int number = 0, lane = 0, warp = 0;
  State state = State::ready;
  Site waits_at{"", 0};
  std::vector<AsyncCopy> copies;         // issued, not committed
  std::vector<std::vector<AsyncCopy>> groups;  // committed, oldest first
};

// Values that the lanes of a warp hand to each other in one collective operation.
struct Exchange {
  static constexpr int words = 12;
  std::uint32_t mask = 0, arrived = 0;
  const void* kind = nullptr;  // lanes of one exchange must all be in the same operation
  std::uint32_t in[32][words], out[32][words];
};

struct Warp {
  std::uint32_t clock = 0;  // advances at __syncwarp and at barriers
  std::vector<Exchange> exchanges;
};

struct Launch {
  const char* kernel = "";
  Index3 grid, block, block_index;
  std::uint32_t dynamic_bytes = 0;
};

extern Thread* running;  // the fiber that has the processor; null outside a launch
extern Launch current;
extern std::uint32_t block_clock;  // value of the clock at the last block-wide barrier
extern std::uint32_t block_start;  // value of the clock when the block began

std::uint32_t tick();  // the next value of a clock that never goes back
Warp& warp_of(const Thread& thread);

[[noreturn]] void fault(const std::string& what);
void yield_to_scheduler();
void barrier(Site site = Site::here());

// Hands `in` over, waits until all lanes of the mask have, and gives back this lane's row of what `operation` made of
// them. The last lane to come computes for all.
using Operation = void (*)(Exchange&);
void exchange(std::uint32_t mask, Operation operation, const std::uint32_t* in, int words_in, std::uint32_t* out,
              int words_out, Site site);

void launch(const char* kernel, Index3 grid, Index3 block, std::size_t dynamic_bytes,
            const std::function<void()>& body);

// For tests: the order of warps, lanes and blocks; and mutation without a compiler: a barrier or wait that is ignored,
// or an mma whose operand registers are swapped, must make some test fail, else nothing shows that it is right.
void set_seed(std::uint32_t seed);
std::uint32_t random_below(std::uint32_t bound);
void ignore_site(const std::string& site);  // "file.cu:12", or "" for none
bool ignored(const char* kind, Site site);  // also notes that the site exists
std::vector<std::string> sites();           // every barrier, wait and mma passed since the last call

}  // namespace cramfast::emulator
