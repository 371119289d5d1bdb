// `modes_fx::masked_moe` on a CPU. Included after the type `Element` of hidden and expert weights, and `formula`.
//
//   dispatch   threshold, then a counting sort: the kept pairs by expert, each with a position
//   jobs       up to MAX_ROWS positions of one expert: gather -> gate_up, formula -> down -> a row for each
//   combine    the rows of a token with several, added in slot order and written once
//
// Only weights of experts with kept pairs are read, where they lie. Sums have a fixed order, so equal inputs
// give equal bits with any number of threads.

#pragma once

#include <utility>

#include "dispatch.h"
#include "job.h"
#include "tile_job.h"

// Weight bytes that one thread reads before another is woken for it.
constexpr i64 BYTES_PER_THREAD = 1 << 20;

static void combine(const Arguments& a, const Dispatch& d, const Element* rows, i64 token) {
  const i64 O = a.output_size;
  Element* out = a.out + token * O;
  const int32_t *position = d.position.data() + token * a.slots, *end = position + a.slots;
  if (std::any_of(position, end, [&](int32_t p) { return p >= 0 && d.alone[p]; })) return;
  i64 h = 0;
  for (; h + LANES <= O; h += LANES) {
    vec sum = {};
    for (const int32_t* p = position; p < end; p++)
      if (*p >= 0) sum += load(rows + *p * O + h);
    store(out + h, sum);
  }
  for (; h < O; h++) {
    float sum = 0;
    for (const int32_t* p = position; p < end; p++)
      if (*p >= 0) sum += widen(rows[*p * O + h]);
    assign(out[h], sum);
  }
}

template <class Job>
static void run(const Arguments& a, const Dispatch& d) {
  const i64 kept = i64(d.token.size()), num_tasks = i64(d.tasks.size());
  const i64 scratch = Job::scratch(a);
  // Threads by the weights to read: for a few of them, waking a thread takes longer than reading.
  i64 hit = 0, last = -1;
  for (const Task& task : d.tasks) hit += task.expert != last, last = task.expert;
  const i64 expert_bytes = i64(sizeof(Element)) * a.inner_size * ((GATED ? 2 : 1) * a.hidden_size + a.output_size);
  const int threads = int(std::max<i64>(1, std::min(a.threads, hit * expert_bytes / BYTES_PER_THREAD)));

  static thread_local Arena shared;
  const bool split = threads > 1 && num_tasks < 4 * threads;
  i64 bytes = kept * a.output_size * i64(sizeof(Element)) + 64;
  if (split)
    for (const Task& task : d.tasks) bytes += Job::bytes(a, task.rows);
  shared.reset(bytes);
  Element* rows = shared.take<Element>(kept * a.output_size);

  std::vector<Job> jobs;
  std::vector<std::pair<i64, i64>> up_units, down_units;  // task, first column
  if (split) {
    for (i64 i = 0; i < num_tasks; i++) {
      jobs.emplace_back(a, d, d.tasks[i], rows, shared);
      for (i64 c = 0; c < a.inner_size; c += UP_SPLIT) up_units.emplace_back(i, c);
      for (i64 c = 0; c < a.output_size; c += DOWN_SPLIT) down_units.emplace_back(i, c);
    }
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Arena own;
    own.reset(scratch * 4 + 64 + (split ? 0 : Job::bytes(a, MAX_ROWS)));
    [[maybe_unused]] const typename Job::Unit unit;
    if (split) {
      float* space = own.take<float>(scratch);
#pragma omp for schedule(dynamic)
      for (i64 i = 0; i < num_tasks; i++) jobs[i].gather();
#pragma omp for schedule(dynamic)
      for (i64 u = 0; u < i64(up_units.size()); u++) {
        const auto [i, c] = up_units[u];
        jobs[i].gate_up(c, std::min(c + UP_SPLIT, a.inner_size), space);
      }
#pragma omp for schedule(dynamic)
      for (i64 u = 0; u < i64(down_units.size()); u++) {
        const auto [i, c] = down_units[u];
        jobs[i].down(c, std::min(c + DOWN_SPLIT, a.output_size), space);
      }
    } else {
#pragma omp for schedule(dynamic)
      for (i64 i = 0; i < num_tasks; i++) {
        own.reset(scratch * 4 + 64 + Job::bytes(a, MAX_ROWS));
        float* space = own.take<float>(scratch);
        Job job(a, d, d.tasks[i], rows, own);
        job.gather();
        job.gate_up(0, a.inner_size, space);
        job.down(0, a.output_size, space);
      }
    }
#pragma omp for schedule(static)
    for (i64 t = 0; t < a.tokens; t++) combine(a, d, rows, t);
  }
}

// The number of kept pairs; -1 where there is no memory.
extern "C" i64 run_masked_moe(const void* arguments) {
  const Arguments& a = *static_cast<const Arguments*>(arguments);
  try {
    const Dispatch d = dispatch(a);
#if defined(__AMX_BF16__)
    if (TileJob::takes(a, d))
      run<TileJob>(a, d);
    else
#endif
      run<Job>(a, d);
    return i64(d.token.size());
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
