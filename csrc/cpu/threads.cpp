// Work shared among threads: those of the OpenMP runtime that torch has brought into the process, so that there is one team of
// threads and not two that spin on the same cores. libgomp, libiomp5 and libomp all offer GOMP_parallel. Without one: one thread.
#include "threads.h"

#include <atomic>
#include <cstring>

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

}  // namespace

bool has_threads() { return runtime() != nullptr; }

void for_each(int64_t count, int threads, const std::function<void(int64_t)>& work) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1 || !has_threads()) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  Job job{&work, count};
  runtime()(run, &job, static_cast<unsigned>(threads), 0);
}

}  // namespace llmquant
