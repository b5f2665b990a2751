// A parallel loop on a pool of threads that others use, too.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "problem.h"

namespace normjax {

// The tasks of one loop, which threads take one after the other.
//
// Whoever waits, waits for tasks that a running thread has taken, never for a helper to
// be given a thread: in a pool whose threads all wait like this, none would be. A helper
// that comes late finds no task left, so that it may outlive the call.
class Loop {
 public:
  Loop(int64_t tasks, Workers::Task task, void* context)
      : tasks_(tasks), task_(task), context_(context) {}

  void work(int64_t worker) {
    for (int64_t t; (t = next_.fetch_add(1)) < tasks_;) {
      task_(context_, t, worker);
      if (done_.fetch_add(1) + 1 == tasks_) {
        const std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_one();
      }
    }
  }

  void wait() {
    // The others' last tasks are short: most often they end before a thread could sleep.
    for (int spin = 0; spin < 2000; ++spin) {
      if (done_.load() == tasks_) return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [&] { return done_.load() == tasks_; });
  }

 private:
  const int64_t tasks_;
  const Workers::Task task_;
  void* const context_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// Workers of a pool that has Schedule(function) and num_threads(): the caller, and as
// many helpers as the pool will run.
template <class Pool>
class PoolWorkers final : public Workers {
 public:
  explicit PoolWorkers(Pool& pool) : Workers(pool.num_threads()), pool_(pool) {}

  void run(int64_t tasks, Task task, void* context) override {
    const auto loop = std::make_shared<Loop>(tasks, task, context);
    for (int64_t helper = 1; helper < count() && helper < tasks; ++helper) {
      pool_.Schedule([loop, helper] { loop->work(helper); });
    }
    loop->work(0);
    loop->wait();
  }

 private:
  Pool& pool_;
};

}  // namespace normjax
