// Fibers: one for each CUDA thread, on a stack of its own. A switch makes no system call on x86-64, where it is fifteen
// instructions; elsewhere it is ucontext's.
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

// Hidden: each shared library has its own machine, even if a process loads several that were compiled differently.
namespace [[gnu::visibility("hidden")]] emulation {

// A stack with a page below it that can't be touched, so that an overflow is no silent corruption.
class Stack {
 public:
  static constexpr size_t kBytes = size_t(256) << 10;  // address space; only what is touched becomes memory

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

// A place to switch to: a fiber, or the host's own stack.
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
#define FASTSIMCLR_EMULATION_OPAQUE noipa  // or callers would keep values in registers that "this body" doesn't touch
#endif

// Pushes what the ABI has a function preserve, and returns on the other stack to whoever was suspended there. The
// modes of floating point are not switched: kernels don't change them.
__attribute__((naked, FASTSIMCLR_EMULATION_OPAQUE)) inline void swap_stacks(void** /*rdi: save*/, void* /*rsi: load*/) {
  asm volatile(
      "pushq %%rbp\n\t pushq %%rbx\n\t pushq %%r12\n\t pushq %%r13\n\t pushq %%r14\n\t pushq %%r15\n\t"
      "movq %%rsp, (%%rdi)\n\t"
      "movq %%rsi, %%rsp\n\t"
      "popq %%r15\n\t popq %%r14\n\t popq %%r13\n\t popq %%r12\n\t popq %%rbx\n\t popq %%rbp\n\t"
      "popq %%rcx\n\t"  // a jump: `ret` would be predicted to go back to the caller on the stack before
      "jmp *%%rcx" ::
          : "memory");
}

#undef FASTSIMCLR_EMULATION_OPAQUE
#endif

inline Context* left_context = nullptr;  // the one that the latest switch came from

// First thing on a stack that was switched to.
inline void arrive([[maybe_unused]] Context& here) {
#if FASTSIMCLR_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(here.fake_stack, &left_context->bottom, &left_context->bytes);
#endif
}

// Goes on in `to`. is_last: `from` is not coming back.
inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool is_last) {
#if FASTSIMCLR_EMULATION_ASAN
  left_context = &from;
  __sanitizer_start_switch_fiber(is_last ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#endif
#if FASTSIMCLR_EMULATION_ASSEMBLY
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrive(from);
}

// Makes `context` one that calls entry() on this stack, whatever was there before. entry must begin with arrive() and
// must not return. index staggers the stacks: all at the same offset in a page would compete for the same cache
// lines.
inline void start_context(Context& context, const Stack& stack, size_t index, void (*entry)()) {
  const size_t bytes = Stack::kBytes - index % 61 * 64;
#if FASTSIMCLR_EMULATION_ASAN
  __asan_unpoison_memory_region(stack.bottom(), Stack::kBytes);  // of a fiber that was dropped
  context.bottom = stack.bottom();
  context.bytes = bytes;
  context.fake_stack = nullptr;
#endif
#if FASTSIMCLR_EMULATION_ASSEMBLY
  auto* top = reinterpret_cast<void**>(stack.bottom() + bytes);
  *--top = nullptr;                         // entry's return address: here stack traces end
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
