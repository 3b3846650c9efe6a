// Fibers, one per CUDA thread, each with its own stack. On x86-64 a switch takes fifteen instructions and no system
// call; on other CPUs it uses ucontext.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__) && !defined(FASTSIMCLR_EMULATION_UCONTEXT)
#define FASTSIMCLR_EMULATION_ASSEMBLY 1
#else
#define FASTSIMCLR_EMULATION_ASSEMBLY 0
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define FASTSIMCLR_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTSIMCLR_EMULATION_ASAN 1
#endif
#endif
#ifndef FASTSIMCLR_EMULATION_ASAN
#define FASTSIMCLR_EMULATION_ASAN 0
#endif
#if FASTSIMCLR_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Hidden: each shared library has its own emulator, even if a process loads several with different compiler options.
namespace [[gnu::visibility("hidden")]] emulation {

// A stack with a guard page below it, so that an overflow does not corrupt memory silently.
class Stack {
 public:
  static constexpr size_t kBytes = size_t(256) << 10;  // address space; memory is allocated on first access

  Stack() : page_(size_t(sysconf(_SC_PAGESIZE))) {
    memory_ = mmap(nullptr, page_ + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED || mprotect(memory_, page_, PROT_NONE) != 0) {
      std::perror("CUDA emulation: no memory for a thread's stack");
      std::abort();
    }
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() { munmap(memory_, page_ + kBytes); }

  char* bottom() const { return static_cast<char*>(memory_) + page_; }
  bool holds(const void* address) const { return uintptr_t(address) - uintptr_t(bottom()) < kBytes; }

 private:
  size_t page_;
  void* memory_;
};

// A context to switch to: a fiber, or the host's stack.
struct Context {
#if FASTSIMCLR_EMULATION_ASSEMBLY
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
#if FASTSIMCLR_EMULATION_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;
#endif
};

#if FASTSIMCLR_EMULATION_ASSEMBLY

#ifdef __clang__
#define FASTSIMCLR_EMULATION_OPAQUE noinline
#else
#define FASTSIMCLR_EMULATION_OPAQUE noipa  // callers must not keep values in registers that the body does not name
#endif

// Pushes the callee-saved registers and continues the suspended function on the other stack. Floating-point modes are
// not switched, because kernels don't change them.
__attribute__((naked, FASTSIMCLR_EMULATION_OPAQUE)) inline void swap_stacks(void** /*rdi: save*/, void* /*rsi: load*/) {
  asm volatile(
      "pushq %%rbp\n\t pushq %%rbx\n\t pushq %%r12\n\t pushq %%r13\n\t pushq %%r14\n\t pushq %%r15\n\t"
      "movq %%rsp, (%%rdi)\n\t"
      "movq %%rsi, %%rsp\n\t"
      "popq %%r15\n\t popq %%r14\n\t popq %%r13\n\t popq %%r12\n\t popq %%rbx\n\t popq %%rbp\n\t"
      "popq %%rcx\n\t"  // a jump, because `ret` would be mispredicted to return to the caller on the old stack
      "jmp *%%rcx" ::
          : "memory");
}

#undef FASTSIMCLR_EMULATION_OPAQUE
#endif

inline Context* previous_context = nullptr;  // the context before the last switch

// Must be called first after a switch, on the new stack.
inline void arrive([[maybe_unused]] Context& here) {
#if FASTSIMCLR_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(here.fake_stack, &previous_context->bottom, &previous_context->bytes);
#endif
}

// Switches to `to`. is_last: `from` will not be resumed.
inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool is_last) {
#if FASTSIMCLR_EMULATION_ASAN
  previous_context = &from;
  __sanitizer_start_switch_fiber(is_last ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#endif
#if FASTSIMCLR_EMULATION_ASSEMBLY
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrive(from);
}

// Initializes `context` to call entry() on this stack, whose contents are discarded. entry must start with arrive() and
// must not return. index staggers the stacks: with the same offset in a page they would compete for the same cache
// lines.
inline void start_context(Context& context, const Stack& stack, size_t index, void (*entry)()) {
  const size_t bytes = Stack::kBytes - index % 61 * 64;
#if FASTSIMCLR_EMULATION_ASAN
  __asan_unpoison_memory_region(stack.bottom(), Stack::kBytes);  // may be poisoned by a fiber that was abandoned
  context.bottom = stack.bottom();
  context.bytes = bytes;
  context.fake_stack = nullptr;
#endif
#if FASTSIMCLR_EMULATION_ASSEMBLY
  auto* top = reinterpret_cast<void**>(stack.bottom() + bytes);
  *--top = nullptr;                         // return address of entry: the end of stack traces
  *--top = reinterpret_cast<void*>(entry);  // what swap_stacks jumps to
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack.bottom();
  context.registers.uc_stack.ss_size = bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

}  // namespace emulation
