#include "global_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "machine.h"

namespace cramfast::emulator {
namespace {

constexpr unsigned char pattern = 0xff;  // NaN in every floating type, so a read of it shows too
constexpr std::uintptr_t alignment = 16;

struct Tensor {
  std::uintptr_t address;
  std::size_t bytes;
  unsigned char* pages = nullptr;  // first forbidden page
  std::size_t total = 0;           // with both forbidden pages
  unsigned char* copy = nullptr;
};

std::vector<Tensor> tensors;

std::size_t page() {
  static const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

void make_copy(Tensor& t) {
  const std::size_t room = (t.bytes + alignment + page() - 1) / page() * page();
  t.total = room + 2 * page();
  void* pages = mmap(nullptr, t.total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::runtime_error("emulator: mmap failed");
  t.pages = static_cast<unsigned char*>(pages);
  mprotect(t.pages + page(), room, PROT_READ | PROT_WRITE);
  std::memset(t.pages + page(), pattern, room);
  t.copy = t.pages + page() + (room - t.bytes) / alignment * alignment;
  std::memcpy(t.copy, reinterpret_cast<const void*>(t.address), t.bytes);
}

void on_bad_address(int, siginfo_t* info, void*) {
  if (!running) {
    signal(SIGSEGV, SIG_DFL);
    return;  // not ours: happens again, with the default action
  }
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  for (const Tensor& t : tensors) {
    const auto first = reinterpret_cast<std::uintptr_t>(t.pages);
    if (t.copy && address >= first && address < first + t.total) {
      const auto offset = static_cast<std::int64_t>(address - reinterpret_cast<std::uintptr_t>(t.copy));
      fault("out of bounds: global memory, byte " + std::to_string(offset) + " of a tensor of " +
            std::to_string(t.bytes));
    }
  }
  fault("out of bounds: global memory, far from every tensor");
}

}  // namespace

void register_tensor(std::uintptr_t address, std::size_t bytes) {
  if (address == 0) return;
  std::uintptr_t begin = address, end = address + bytes;
  for (auto it = tensors.begin(); it != tensors.end();) {  // views of one tensor stay one
    if (it->address < end && begin < it->address + it->bytes) {
      begin = std::min(begin, it->address);
      end = std::max(end, it->address + it->bytes);
      it = tensors.erase(it);
    } else {
      ++it;
    }
  }
  tensors.push_back({begin, end - begin});
}

std::uintptr_t guarded(std::uintptr_t address) {
  if (address == 0) return 0;
  for (Tensor& t : tensors) {
    if (address >= t.address && address < t.address + std::max<std::size_t>(t.bytes, 1)) {
      if (!t.copy) make_copy(t);
      return reinterpret_cast<std::uintptr_t>(t.copy) + (address - t.address);
    }
  }
  throw std::runtime_error("emulator: an address that belongs to no tensor of the call");
}

void check_borders() {
  for (const Tensor& t : tensors) {
    if (!t.copy) continue;
    const unsigned char *first = t.pages + page(), *last = t.pages + t.total - page();
    const auto untouched = [](unsigned char byte) { return byte == pattern; };
    if (!std::all_of(first, const_cast<const unsigned char*>(t.copy), untouched) ||
        !std::all_of(const_cast<const unsigned char*>(t.copy) + t.bytes, last, untouched)) {
      fault("out of bounds: bytes beside a tensor of " + std::to_string(t.bytes) + " were written");
    }
  }
}

GuardedCall::~GuardedCall() {
  for (const Tensor& t : tensors) {
    if (!t.copy) continue;
    std::memcpy(reinterpret_cast<void*>(t.address), t.copy, t.bytes);
    munmap(t.pages, t.total);
  }
  tensors.clear();
}

GuardPageTrap::GuardPageTrap() {
  alignas(16) static unsigned char trap_stack[64 << 10];
  stack_t own{};
  own.ss_sp = trap_stack;
  own.ss_size = sizeof trap_stack;
  sigaltstack(&own, &stack_);
  struct sigaction action {};
  action.sa_sigaction = on_bad_address;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // left by a switch of stacks, not by a return
  sigemptyset(&action.sa_mask);
  sigaction(SIGSEGV, &action, &segv_);
  sigaction(SIGBUS, &action, &bus_);
}

GuardPageTrap::~GuardPageTrap() {
  sigaction(SIGSEGV, &segv_, nullptr);
  sigaction(SIGBUS, &bus_, nullptr);
  sigaltstack(&stack_, nullptr);
}

}  // namespace cramfast::emulator
