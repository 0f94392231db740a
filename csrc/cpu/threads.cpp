// Work shared among threads: those of the OpenMP runtime that torch has brought into the process, so that there is one team of
// threads and not two that spin on the same cores. libgomp, libiomp5 and libomp all offer GOMP_parallel. Without one: one thread.
#include "threads.h"

#include <atomic>
#include <cstring>
#include <thread>

#include <dlfcn.h>
#ifdef __linux__
#include <link.h>
#endif

namespace llmquant {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#ifdef __linux__
int look(dl_phdr_info* info, size_t, void* found) {
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* file = slash ? slash + 1 : info->dlpi_name;
  for (const char* runtime : {"libgomp", "libiomp5", "libomp"}) {
    if (std::strncmp(file, runtime, std::strlen(runtime)) != 0) continue;
    void* library = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
    void* function = library ? dlsym(library, "GOMP_parallel") : nullptr;
    if (function) {
      *static_cast<void**>(found) = function;
      return 1;
    }
  }
  return 0;
}
#endif

Parallel find() {
  void* function = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#ifdef __linux__
  if (!function) dl_iterate_phdr(look, &function);
#endif
  return reinterpret_cast<Parallel>(function);
}

Parallel runtime() {
  static const Parallel function = find();
  return function;
}

struct Job {
  const std::function<void(int64_t)>* work;
  int64_t count;
  std::atomic<int64_t> next{0};
};

void run(void* data) {
  auto* job = static_cast<Job*>(data);
  for (int64_t i; (i = job->next.fetch_add(1, std::memory_order_relaxed)) < job->count;) (*job->work)(i);
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One thread leads and posts jobs; the others take parts of them. A ticket is one word: the number of the job, and in its low half
// a count that reaches kNone when no part is left. So a thread that comes late learns from the ticket alone whether it has a part,
// and that is one of the job that is posted now.
class Team {
 public:
  explicit Team(const std::function<void()>& body) : body_(body), leader_(std::this_thread::get_id()) {}

  // What every thread of the team runs.
  void run() {
    if (std::this_thread::get_id() == leader_) {
      current = this;
      body_();
      current = nullptr;
      over_.store(true, std::memory_order_release);
      return;
    }
    uint64_t seen = 0;
    for (int idle = 0; !over_.load(std::memory_order_acquire);) {
      const uint64_t job = tickets_.load(std::memory_order_acquire) >> 32;
      if (job != seen) {
        seen = job;
        idle = 0;
        take_parts();
      } else if (++idle < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  void for_each(int64_t count, const std::function<void(int64_t)>& work) {
    const uint64_t job = (tickets_.load(std::memory_order_relaxed) >> 32) + 1;
    posted_ = {&work, count};
    finished_.store(0, std::memory_order_relaxed);
    tickets_.store(job << 32 | (kNone - static_cast<uint64_t>(count)), std::memory_order_release);
    take_parts();
    for (int idle = 0; finished_.load(std::memory_order_acquire) < count;) {
      if (++idle < kSpins) pause();
      else std::this_thread::yield();
    }
  }

  static thread_local Team* current;

 private:
  static constexpr uint64_t kNone = 1u << 31;
  static constexpr int kSpins = 4000;  // some 50 microseconds
  struct Posted {
    const std::function<void(int64_t)>* work;
    int64_t count;
  };

  void take_parts() {
    for (;;) {
      const uint64_t ticket = tickets_.fetch_add(1, std::memory_order_acq_rel);
      if (ticket & kNone) return;
      // A job stays posted until all its parts are finished, this one too.
      (*posted_.work)(static_cast<int64_t>(ticket & 0xffffffffu) - static_cast<int64_t>(kNone) + posted_.count);
      finished_.fetch_add(1, std::memory_order_release);
    }
  }

  const std::function<void()>& body_;
  const std::thread::id leader_;
  Posted posted_ = {};
  alignas(64) std::atomic<uint64_t> tickets_{kNone};
  alignas(64) std::atomic<int64_t> finished_{0};
  alignas(64) std::atomic<bool> over_{false};
};

thread_local Team* Team::current = nullptr;

void run_team(void* team) { static_cast<Team*>(team)->run(); }

}  // namespace

void with_team(int threads, const std::function<void()>& body) {
  if (threads <= 1 || !has_threads()) return body();
  Team team(body);
  runtime()(run_team, &team, static_cast<unsigned>(threads), 0);
}

bool has_threads() { return runtime() != nullptr; }

void for_each(int64_t count, int threads, const std::function<void(int64_t)>& work) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1 || !has_threads()) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  if (Team::current) return Team::current->for_each(count, work);
  Job job{&work, count};
  runtime()(run, &job, static_cast<unsigned>(threads), 0);
}

}  // namespace llmquant
