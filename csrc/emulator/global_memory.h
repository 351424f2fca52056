// Global memory: every tensor that a call hands over is copied to the end of its own pages, with a page that nobody may
// touch behind it and another before, so that a stray address ends the launch wherever it lies within a page of a
// tensor; the few bytes between the tensor and a page border hold a pattern that is checked after the call.
#pragma once

#include <csignal>
#include <cstddef>
#include <cstdint>

namespace cramfast::emulator {

// Announces a tensor of the next call, in the caller's own memory.
void register_tensor(std::uintptr_t address, std::size_t bytes);

// The address that kernels get for an address inside a registered tensor.
// Throws std::runtime_error for an address that was not announced.
std::uintptr_t guarded(std::uintptr_t address);

// Lives as long as a call: at its end the tensors are copied back and forgotten.
struct GuardedCall {
  GuardedCall() = default;
  ~GuardedCall();
  GuardedCall(const GuardedCall&) = delete;
};

// Called after each launch: a fault when bytes beside a tensor were written.
void check_borders();

// While it lives, a touch of a forbidden page becomes a fault of the running thread instead of a crash.
class GuardPageTrap {
 public:
  GuardPageTrap();
  ~GuardPageTrap();

 private:
  struct sigaction segv_, bus_;
  stack_t stack_;
};

}  // namespace cramfast::emulator
