// The hooks of -fsanitize=thread and their checks (race_detector.h). Compile this file without that flag.
#define FASTSIMCLR_EMULATION_RACES 1
#include "race_detector.h"

#include <dlfcn.h>

#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace [[gnu::visibility("hidden")]] emulation {
namespace races {
namespace {

// A line of a kernel, or an address in its code if `line` is 0.
struct Site {
  const void* code_or_file;
  int line;
};

Site site_of(SourceLocation location) { return {location.file, location.line}; }

// Accesses of one kind to a byte. Only those of the latest epoch are kept: older ones are ordered before them.
struct Accesses {
  Site site = {nullptr, 0};
  uint32_t lanes = 0;  // 0: no access yet
  uint32_t block = 0, block_barriers = 0, warp_barriers = 0;
  uint8_t warp = 0;
  bool several_warps = false;   // in this epoch; the other members describe the first warp
  bool several_blocks = false;  // in any epoch
  bool is_copy_in_flight = false;

  // Whether one of these accesses and one of `now` are by different threads and not ordered.
  bool races_with(const Accesses& now) const {
    if (lanes == 0) return false;
    if (is_copy_in_flight || several_blocks || block != now.block) return true;
    if (block_barriers < now.block_barriers) return false;
    if (several_warps || warp != now.warp) return true;
    if (warp_barriers < now.warp_barriers) return false;
    return __builtin_popcount(lanes | now.lanes) > 1;
  }

  void add(const Accesses& now) {
    if (lanes == 0) {
      *this = now;
    } else if (block != now.block) {
      *this = now;
      several_blocks = true;
    } else if (block_barriers < now.block_barriers) {
      const bool of_several_blocks = several_blocks;
      *this = now;
      several_blocks = of_several_blocks;
    } else if (warp != now.warp) {
      several_warps = true;
    } else if (warp_barriers < now.warp_barriers) {
      warp_barriers = now.warp_barriers;
      lanes = now.lanes;
      site = now.site;
    } else {
      lanes |= now.lanes;
    }
  }
};

struct Cell {
  Accesses reads, writes, atomics;
};

// The cells of a page of memory: one per word until part of a word is accessed, then one per byte.
class Page {
 public:
  static constexpr size_t kBytes = 4096;

  // Calls f(cell) for the bytes [begin, end) of the page.
  template <class F>
  void for_cells(size_t begin, size_t end, F f) {
    if (bytes_per_cell_ > 1 && (begin % bytes_per_cell_ != 0 || end % bytes_per_cell_ != 0)) split();
    for (size_t cell = begin / bytes_per_cell_; cell < end / bytes_per_cell_; cell++) f(cells_[cell]);
  }

 private:
  void split() {
    std::vector<Cell> cells(kBytes);
    for (size_t i = 0; i < kBytes; i++) cells[i] = cells_[i / bytes_per_cell_];
    cells_ = std::move(cells);
    bytes_per_cell_ = 1;
  }

  size_t bytes_per_cell_ = 4;
  std::vector<Cell> cells_{kBytes / bytes_per_cell_};
};

class Shadow {
 public:
  void clear() {
    pages_.clear();
    recent_ = {};
  }

  // Calls f(cell, address) for all cells of these bytes.
  template <class F>
  void for_cells(const void* address, size_t bytes, F f) {
    for (uintptr_t begin = uintptr_t(address), last = begin + bytes; begin < last;) {
      const uintptr_t number = begin / Page::kBytes, start = number * Page::kBytes;
      const uintptr_t end = last < start + Page::kBytes ? last : start + Page::kBytes;
      page(number).for_cells(begin - start, end - start, f);
      begin = end;
    }
  }

 private:
  Page& page(uintptr_t number) {
    auto& [recent_number, recent] = recent_[number % recent_.size()];
    if (recent == nullptr || recent_number != number) {
      std::unique_ptr<Page>& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      recent_number = number;
      recent = page.get();
    }
    return *recent;
  }

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::array<std::pair<uintptr_t, Page*>, 256> recent_{};
};

// The state of the current launch.
Shadow shadow;
bool detecting = false;
uint32_t block = 0, block_barriers = 0;
std::array<uint32_t, kMaxThreads / kLanes> warp_barriers;

Accesses current_access(Site site) {
  const int thread = machine.thread_index(), warp = thread / kLanes;
  Accesses now;
  now.site = site;
  now.lanes = 1u << (thread % kLanes);
  now.block = block;
  now.block_barriers = block_barriers;
  now.warp_barriers = warp_barriers[size_t(warp)];
  now.warp = uint8_t(warp);
  return now;
}

std::string text_of(Site site) {
  if (site.line > 0) return static_cast<const char*>(site.code_or_file) + (":" + std::to_string(site.line));
  Dl_info library;
  if (!dladdr(site.code_or_file, &library)) return "an unknown line";
  const char* call = static_cast<const char*>(site.code_or_file) - 1;
  char command[4096];
  const auto offset = static_cast<unsigned long long>(call - static_cast<const char*>(library.dli_fbase));
  std::snprintf(command, sizeof(command), "addr2line -s -e '%s' %#llx", library.dli_fname, offset);
  char line[256] = "";
  if (FILE* output = popen(command, "r")) {
    if (!std::fgets(line, sizeof(line), output)) line[0] = 0;
    pclose(output);
  }
  const std::string text(line);
  return text.empty() ? "an unknown line (no addr2line)" : text.substr(0, text.find_first_of(" \n"));
}

[[noreturn]] void report(const void* address, const char* what_now, const Accesses& now, const char* what_before,
                         const Accesses& before) {
  detecting = false;
  std::string where = "global memory";
  if (machine.is_shared(address, 1))
    where = "shared memory, byte " + std::to_string(static_cast<const char*>(address) - machine.shared());
  const unsigned x = before.block % gridDim.x, y = before.block / gridDim.x % gridDim.y,
                 z = before.block / gridDim.x / gridDim.y;
  // Of the lanes that made the earlier access, choose one that is not the current thread.
  uint32_t others = before.lanes;
  if (before.block == now.block && before.warp == now.warp && (others & ~now.lanes)) others &= ~now.lanes;
  machine.fail("data race in %s: %s at %s, not ordered after the %s at %s by thread %d%s of block (%u, %u, %u)",
               where.c_str(), what_now, text_of(now.site).c_str(), what_before, text_of(before.site).c_str(),
               before.warp * kLanes + __builtin_ctz(others), before.several_warps ? " and other warps" : "", x, y, z);
}

void record(Access kind, const void* address, size_t bytes, const Accesses& now) {
  shadow.for_cells(address, bytes, [&](Cell& cell) {
    constexpr const char* kNames[] = {"read", "write", "atomic"};
    const char* name = now.is_copy_in_flight ? "cp.async" : kNames[int(kind)];
    if (cell.writes.races_with(now))
      report(address, name, now, cell.writes.is_copy_in_flight ? "cp.async in flight" : "write", cell.writes);
    if (kind != Access::kAtomic && cell.atomics.races_with(now)) report(address, name, now, "atomic", cell.atomics);
    if (kind != Access::kRead && cell.reads.races_with(now)) report(address, name, now, "read", cell.reads);
    if (kind == Access::kRead) cell.reads.add(now);
    if (kind == Access::kAtomic) cell.atomics.add(now);
    if (kind == Access::kWrite) cell.writes = now;  // all earlier ones are ordered before it
  });
}

// An access by the code of the kernel.
void on_access(Access kind, const void* address, size_t bytes, const void* return_address) {
  if (!detecting || machine.thread().stack.holds(address)) return;
  record(kind, address, bytes, current_access({return_address, 0}));
}

}  // namespace

void begin_launch() { shadow.clear(); }

void begin_block(const char* shared, size_t shared_bytes) {
  block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  block_barriers = 0;
  warp_barriers = {};
  shadow.for_cells(shared, shared_bytes, [](Cell& cell) { cell = {}; });
}

void begin_thread() { detecting = true; }
void end_thread() { detecting = false; }
void at_block_barrier() { block_barriers++; }
void at_warp_barrier() { warp_barriers[size_t(machine.thread_index() / kLanes)]++; }

void access(Access kind, const void* address, size_t bytes, SourceLocation location) {
  record(kind, address, bytes, current_access(site_of(location)));
}

void read_by_warp(const void* address, size_t bytes, SourceLocation location) {
  Accesses now = current_access(site_of(location));
  now.lanes = ~0u;
  record(Access::kRead, address, bytes, now);
}

void begin_copy(const Copy& copy) {
  Accesses now = current_access(site_of(copy.location));
  if (copy.from) record(Access::kRead, copy.from, sizeof(uint4), now);
  now.is_copy_in_flight = true;
  record(Access::kWrite, copy.to, sizeof(uint4), now);
}

void end_copy(const Copy& copy) {
  const Accesses now = current_access(site_of(copy.location));
  if (copy.from) record(Access::kRead, copy.from, sizeof(uint4), now);
  shadow.for_cells(copy.to, sizeof(uint4), [&](Cell& cell) { cell.writes = now; });
}

DetectionPause::DetectionPause() : was_detecting_(detecting) { detecting = false; }
DetectionPause::~DetectionPause() { detecting = was_detecting_; }

// Called by code that g++ instruments. A range is an access of over 16 bytes, or not of a power of two.
extern "C" {
#define FASTSIMCLR_HOOK(kind, name, bytes) \
  void __tsan_##name(void* address) { on_access(Access::kind, address, bytes, __builtin_return_address(0)); }
#define FASTSIMCLR_HOOKS(bytes)                        \
  FASTSIMCLR_HOOK(kRead, read##bytes, bytes)           \
  FASTSIMCLR_HOOK(kWrite, write##bytes, bytes)         \
  FASTSIMCLR_HOOK(kRead, unaligned_read##bytes, bytes) \
  FASTSIMCLR_HOOK(kWrite, unaligned_write##bytes, bytes)
FASTSIMCLR_HOOKS(1)
FASTSIMCLR_HOOKS(2)
FASTSIMCLR_HOOKS(4)
FASTSIMCLR_HOOKS(8)
FASTSIMCLR_HOOKS(16)
#undef FASTSIMCLR_HOOKS
#undef FASTSIMCLR_HOOK
void __tsan_read_range(void* address, size_t bytes) {
  on_access(Access::kRead, address, bytes, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  on_access(Access::kWrite, address, bytes, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}
}

}  // namespace races
}  // namespace emulation
