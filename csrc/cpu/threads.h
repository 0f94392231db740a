#pragma once
#include <cstdint>
#include <functional>

namespace llmquant {

// Whether the process has an OpenMP runtime to share.
bool has_threads();

// work(0) ... work(count - 1), each once, in any order and on at most `threads` threads; back when all are done.
void for_each(int64_t count, int threads, const std::function<void(int64_t)>& work);

}  // namespace llmquant
