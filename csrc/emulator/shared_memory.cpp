#include "shared_memory.h"

#include <array>
#include <string>
#include <vector>

namespace cramfast::emulator {
namespace {

constexpr std::uint32_t arena_bytes = 256 << 10, granule_bytes = 2;
constexpr std::uint32_t static_limit = 48 << 10;
// Opt-in limit of a block (CUDA programming guide, technical specifications): 64 KiB on 7.5, 99 KiB on 8.6.
constexpr std::uint32_t block_limit =
    CRAMFAST_EMULATED >= 900 ? 227 << 10 : CRAMFAST_EMULATED >= 800 ? 99 << 10 : 64 << 10;

// The last write and the reads since the last barrier. Clocks never go back, so nothing is cleared between blocks.
struct Record {
  std::uint32_t write_block_clock = 0, write_warp_clock = 0;
  std::uint32_t read_block_clock = 0, read_warp_clock = 0;
  std::uint32_t read_warps = 0, read_lanes = 0;
  std::uint32_t pending_since = 0;  // the start of the block in which a cp.async was issued and not waited for
  std::uint16_t writer = 0, pending_owner = 0;
};

struct Declaration {
  const void* id;
  const char* name;
  Region region;
};

alignas(64) std::array<unsigned char, arena_bytes> arena;
std::vector<Record> records(arena_bytes / granule_bytes);
std::vector<Declaration> declarations;
std::uint32_t used = 0;

std::string place(Region region, std::int64_t offset) {
  for (const Declaration& d : declarations) {
    if (d.region.begin == region.begin && d.region.end == region.end) {
      return "shared array " + std::string(d.name) + ", byte " +
             std::to_string(offset - static_cast<std::int64_t>(region.begin)) + " of " +
             std::to_string(region.end - region.begin);
    }
  }
  return "shared memory, byte " + std::to_string(offset);
}

void check_bounds(Region region, std::int64_t offset, std::uint32_t bytes, std::uint32_t alignment) {
  if (!running) fault("shared memory touched outside a kernel");
  if (offset < region.begin || offset + bytes > region.end) fault("out of bounds: " + place(region, offset));
  if (offset % alignment) {
    fault("misaligned access of " + std::to_string(alignment) + " bytes: " + place(region, offset));
  }
}

std::string thread_name(int number) { return "thread " + std::to_string(number); }

bool pending(const Record& r) { return r.pending_since == block_start; }

void note_read(Region region, std::int64_t offset, std::uint32_t bytes) {
  const Thread& self = *running;
  const std::uint32_t warp_clock = warp_of(self).clock, warp_bit = 1u << self.warp, lane_bit = 1u << self.lane;
  for (std::int64_t at = offset; at < offset + bytes; at += granule_bytes) {
    Record& r = records[at / granule_bytes];
    if (pending(r)) {
      fault("reads before cp.async was waited for by " + thread_name(r.pending_owner) + ": " + place(region, at));
    }
    if (r.write_block_clock < block_start) fault("reads what nobody wrote: " + place(region, at));
    if (r.writer != self.number && r.write_block_clock == block_clock) {
      const bool same_warp = r.writer / 32 == self.warp;
      if (!same_warp || r.write_warp_clock == warp_clock) {
        fault("race: reads what " + thread_name(r.writer) + " wrote with no " +
              (same_warp ? "__syncwarp" : "barrier") + " between: " + place(region, at));
      }
    }
    if (r.read_block_clock != block_clock) {
      r.read_block_clock = block_clock;
      r.read_warps = r.read_lanes = 0;
    }
    if (r.read_warp_clock != warp_clock) {
      r.read_warp_clock = warp_clock;
      r.read_lanes = 0;
    }
    r.read_warps |= warp_bit;
    r.read_lanes |= lane_bit;
  }
}

void check_write(Region region, std::int64_t at, const Record& r) {
  const Thread& self = *running;
  const std::uint32_t warp_clock = warp_of(self).clock;
  if (pending(r)) fault("writes under a cp.async of " + thread_name(r.pending_owner) + ": " + place(region, at));
  if (r.writer != self.number && r.write_block_clock == block_clock) {
    const bool same_warp = r.writer / 32 == self.warp;
    if (!same_warp || r.write_warp_clock == warp_clock) {
      fault("race: overwrites what " + thread_name(r.writer) + " wrote with no " +
            (same_warp ? "__syncwarp" : "barrier") + " between: " + place(region, at));
    }
  }
  if (r.read_block_clock != block_clock) return;
  const std::uint32_t other_warps = r.read_warps & ~(1u << self.warp);
  const bool other_lanes = r.read_warp_clock == warp_clock && (r.read_lanes & ~(1u << self.lane));
  if (other_warps || other_lanes) {
    fault(std::string("race: overwrites what another ") + (other_warps ? "warp" : "lane") +
          " read with no barrier between: " + place(region, at));
  }
}

void note_write(Region region, std::int64_t offset, std::uint32_t bytes) {
  const Thread& self = *running;
  const std::uint32_t warp_clock = warp_of(self).clock;
  for (std::int64_t at = offset; at < offset + bytes; at += granule_bytes) {
    Record& r = records[at / granule_bytes];
    check_write(region, at, r);
    r.writer = static_cast<std::uint16_t>(self.number);
    r.write_block_clock = block_clock;
    r.write_warp_clock = warp_clock;
  }
}

}  // namespace

void begin_shared_memory(std::uint32_t dynamic_bytes) {
  arena.fill(0xff);  // NaN in every floating type
  declarations.clear();
  if (dynamic_bytes > block_limit) {
    fault(std::to_string(dynamic_bytes) + " bytes of shared memory, more than the limit");
  }
  static const char dynamic_id = 0;
  declarations.push_back({&dynamic_id, "(dynamic)", {0, dynamic_bytes}});
  used = (dynamic_bytes + 15) / 16 * 16;
}

Region static_region(const void* declaration, const char* name, std::uint32_t bytes) {
  for (const Declaration& d : declarations) {
    if (d.id == declaration) return d.region;
  }
  const Region region{used, used + bytes};
  used = (used + bytes + 15) / 16 * 16;
  const std::uint32_t dynamic_bytes = declarations.front().region.end;
  if (used - dynamic_bytes > static_limit + 16 || used > block_limit) {
    fault(std::string("too much shared memory: ") + name);
  }
  declarations.push_back({declaration, name, region});
  return region;
}

Region dynamic_region() { return declarations.front().region; }

void read_shared(Region region, std::int64_t offset, void* to, std::uint32_t bytes, std::uint32_t alignment) {
  check_bounds(region, offset, bytes, alignment);
  note_read(region, offset, bytes);
  std::memcpy(to, arena.data() + offset, bytes);
}

void write_shared(Region region, std::int64_t offset, const void* from, std::uint32_t bytes, std::uint32_t alignment) {
  check_bounds(region, offset, bytes, alignment);
  note_write(region, offset, bytes);
  std::memcpy(arena.data() + offset, from, bytes);
}

void issue_copy(Region region, std::int64_t offset, const void* from, std::uint32_t bytes) {
  check_bounds(region, offset, bytes, bytes);
  AsyncCopy copy{static_cast<std::uint32_t>(offset), bytes, {}};
  std::memcpy(copy.data, from, bytes);
  for (std::int64_t at = offset; at < offset + bytes; at += granule_bytes) {
    Record& r = records[at / granule_bytes];
    check_write(region, at, r);
    r.pending_since = block_start;
    r.pending_owner = static_cast<std::uint16_t>(running->number);
  }
  running->copies.push_back(copy);
}

void commit_copies() {
  running->groups.push_back(std::move(running->copies));
  running->copies.clear();
}

void wait_for_copies(std::size_t groups_left, Site site) {
  if (ignored("cp_async_wait", site)) return;
  std::vector<std::vector<AsyncCopy>>& groups = running->groups;
  while (groups.size() > groups_left) {
    for (const AsyncCopy& copy : groups.front()) {
      for (std::uint32_t at = copy.offset; at < copy.offset + copy.bytes; at += granule_bytes) {
        Record& r = records[at / granule_bytes];
        r.pending_since = 0;
        r.writer = static_cast<std::uint16_t>(running->number);
        r.write_block_clock = block_clock;
        r.write_warp_clock = warp_of(*running).clock;
      }
      std::memcpy(arena.data() + copy.offset, copy.data, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cramfast::emulator
