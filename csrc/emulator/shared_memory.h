// Shared memory of the running block, with a record of who touched each two bytes and when. An access is a fault if it
//   leaves its array, or is not aligned to its type;
//   reads what this block never wrote, or what a cp.async has not delivered;
//   meets an access of another thread, one of the two a write, with no barrier between them (for threads of one warp:
//   no __syncwarp either; shuffles and mma order nothing).
// Kernels hold a Shared<T>; under nvcc that is T* (device_code.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

namespace cramfast::emulator {

struct Region {
  std::uint32_t begin = 0, end = 0;
};

void begin_shared_memory(std::uint32_t dynamic_bytes);
Region static_region(const void* declaration, const char* name, std::uint32_t bytes);
Region dynamic_region();

void read_shared(Region region, std::int64_t offset, void* to, std::uint32_t bytes, std::uint32_t alignment);
void write_shared(Region region, std::int64_t offset, const void* from, std::uint32_t bytes, std::uint32_t alignment);

// cp.async: the bytes arrive when the thread that issued the copy waits for its group, not before.
void issue_copy(Region region, std::int64_t offset, const void* from, std::uint32_t bytes);
void commit_copies();
void wait_for_copies(std::size_t groups_left, Site site);

// What Shared<T>::operator[] gives: reads and writes go through the record.
template <class T>
class Element {
  using Value = std::remove_const_t<T>;

 public:
  Element(Region region, std::int64_t offset) : region_(region), offset_(offset) {}
  Element(const Element&) = default;
  operator Value() const {
    Value value;
    read_shared(region_, offset_, &value, sizeof value, alignof(Value));
    return value;
  }
  const Element& operator=(const Value& value) const {
    static_assert(!std::is_const_v<T>, "writes to a Shared<const T>");
    write_shared(region_, offset_, &value, sizeof value, alignof(Value));
    return *this;
  }
  const Element& operator=(const Element& other) const { return *this = static_cast<Value>(other); }
  const Element& operator+=(const Value& value) const { return *this = static_cast<Value>(*this) + value; }
  const Element& operator-=(const Value& value) const { return *this = static_cast<Value>(*this) - value; }
  const Element& operator*=(const Value& value) const { return *this = static_cast<Value>(*this) * value; }

 private:
  Region region_;
  std::int64_t offset_;
};

// A pointer into shared memory that knows its array.
template <class T>
class Shared {
 public:
  Shared() = default;
  explicit Shared(Region region) : region_(region), offset_(region.begin) {}
  Shared(Region region, std::int64_t offset) : region_(region), offset_(offset) {}
  operator Shared<const T>() const { return {region_, offset_}; }

  Element<T> operator[](std::int64_t i) const { return {region_, offset_ + i * bytes}; }
  Element<T> operator*() const { return {region_, offset_}; }
  Shared operator+(std::int64_t i) const { return {region_, offset_ + i * bytes}; }
  Shared operator-(std::int64_t i) const { return {region_, offset_ - i * bytes}; }
  Shared& operator+=(std::int64_t i) { return *this = *this + i; }

  Region region() const { return region_; }
  std::int64_t offset() const { return offset_; }

 private:
  static constexpr std::int64_t bytes = sizeof(T);
  Region region_;
  std::int64_t offset_ = 0;
};

template <class U, class T>
Shared<U> shared_cast(Shared<T> pointer) {
  return {pointer.region(), pointer.offset()};
}

}  // namespace cramfast::emulator
