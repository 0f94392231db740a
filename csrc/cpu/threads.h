#pragma once
#include <cstdint>
#include <functional>

namespace llmquant {

// Whether the process has an OpenMP runtime to share.
bool has_threads();

// work(0) ... work(count - 1), each once, in any order and on at most `threads` threads; back when all are done.
void for_each(int64_t count, int threads, const std::function<void(int64_t)>& work);

// Runs `body` on the calling thread with a team kept at hand: a `for_each` inside finds its threads waiting for work instead of
// starting a parallel region of its own. Work is never left to a thread that has not begun it, so one that the system
// gives no time delays nobody.
void with_team(int threads, const std::function<void()>& body);

}  // namespace llmquant
