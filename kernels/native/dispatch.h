// Which pairs are kept, and their order: a threshold, then a counting sort by expert.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "arguments.h"
#include "vectors.h"

// Tokens of one expert that are multiplied together: what is gathered of them stays in a core's cache.
constexpr i64 MAX_ROWS = 96;
// Columns of the formula's value and of the output that go to one thread at a time, where experts are too few to
// go around.
constexpr i64 UP_SPLIT = 32, DOWN_SPLIT = 64;

using Arguments = ArgumentsOf<Element>;

struct Task {
  i64 expert, first, rows;  // positions [first, first + rows)
  i64 expert_rows;          // of all tasks of the expert
};

struct Dispatch {
  std::vector<int32_t> position;  // [T, K]: where a kept pair is, -1 where dropped
  std::vector<int32_t> token;     // [kept], by position
  std::vector<uint8_t> alone;     // [kept], by position: whether it is the only pair that its token keeps
  std::vector<float> weight;      // [kept], by position
  std::vector<Task> tasks;        // those of the largest expert first; those of one follow each other
};

static inline float read(const void* values, bool are_bfloat16, i64 i) {
  return are_bfloat16 ? widen(static_cast<const bfloat16*>(values)[i]) : static_cast<const float*>(values)[i];
}

static Dispatch dispatch(const Arguments& a) {
  const i64 pairs = a.tokens * a.slots;
  Dispatch d;
  d.position.resize(pairs);
  std::vector<float> scale(a.renormalise ? a.tokens : 0, 1.f);
  std::vector<int32_t> next(a.experts + 1);  // counts, then the next free position of each expert
  const float alphas[] = {a.alpha_text, a.alpha_vision};
  const float taus[] = {a.tau_text, a.tau_vision};
  for (i64 t = 0; t < a.tokens; t++) {
    const int kind = a.modality ? a.modality[t] : 0;
    float mass = 0, kept = 0;
    for (i64 p = t * a.slots; p < (t + 1) * a.slots; p++) {
      const bool inside = a.ids[p] >= 0 && a.ids[p] < a.experts;
      const bool below = kind < 2 && read(a.scores, a.scores_are_bfloat16, p) * alphas[kind] < taus[kind];
      const bool keep = inside && !below;
      d.position[p] = keep ? 0 : -1;
      if (keep) next[a.ids[p] + 1]++;
      const float weight = read(a.weights, a.weights_are_bfloat16, p);
      mass += weight;
      if (!below) kept += weight;
    }
    if (a.renormalise && kept > 0) scale[t] = mass / kept;
  }
  for (i64 e = 0; e < a.experts; e++) {
    const i64 all = next[e + 1];
    i64 rows = all, first = next[e];
    // Equal tasks, so that none of them is a small rest.
    for (i64 n = (rows + MAX_ROWS - 1) / MAX_ROWS; n > 0; n--) {
      const i64 size = n == 1 ? rows : (rows / n + LANES - 1) / LANES * LANES;
      d.tasks.push_back({e, first, size, all});
      first += size, rows -= size;
    }
    next[e + 1] = int32_t(first);
  }
  const i64 kept = next[a.experts];
  d.token.resize(kept);
  d.alone.resize(kept);
  d.weight.resize(kept);
  for (i64 t = 0; t < a.tokens; t++) {
    const i64 begin = t * a.slots, end = begin + a.slots;
    const i64 dropped = std::count(d.position.begin() + begin, d.position.begin() + end, -1);
    for (i64 p = begin; p < end; p++) {
      if (d.position[p] < 0) continue;
      const int32_t at = next[a.ids[p]]++;
      d.position[p] = at;
      d.alone[at] = dropped == a.slots - 1;
      d.token[at] = int32_t(t);
      d.weight[at] = read(a.weights, a.weights_are_bfloat16, p) * (a.renormalise ? scale[t] : 1.f);
    }
  }
  std::stable_sort(d.tasks.begin(), d.tasks.end(),
                   [](const Task& a, const Task& b) { return a.expert_rows > b.expert_rows; });
  return d;
}

// Where the weighted output of a position goes: straight to the output, or among `rows`, to be added up.
static inline Element* destination(const Arguments& a, const Dispatch& d, Element* rows, i64 at) {
  return d.alone[at] ? a.out + d.token[at] * a.output_size : rows + at * a.output_size;
}

static inline i64 padded(i64 n) { return (n + LANES - 1) / LANES * LANES; }

// Memory that a thread keeps from call to call: fresh memory costs a page fault every 4 kB.
class Arena {
 public:
  template <class T>
  T* take(i64 count) {
    const i64 bytes = (count * i64(sizeof(T)) + 63) / 64 * 64;
    char* at = reinterpret_cast<char*>(memory_.get()) + used_;
    used_ += bytes;
    if (used_ > size_) std::abort();  // `reset` was given less than is taken
    return reinterpret_cast<T*>(at);
  }
  // Forget what was taken; room for `bytes`.
  void reset(i64 bytes) {
    used_ = 0;
    if (bytes <= size_ && !(size_ > KEPT && bytes < size_ / 4)) return;
    memory_.reset();
    size_ = (bytes + 63) / 64 * 64;
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, size_)));
    if (!memory_) size_ = 0, throw std::bad_alloc();
  }

 private:
  static constexpr i64 KEPT = 64 << 20;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  i64 size_ = 0, used_ = 0;
};

// Rows of gate_up that belong to column `i` of the formula's value.
static inline i64 first_row(const Arguments& a, i64 i) { return GATED && a.interleaved ? 2 * i : i; }
static inline i64 second_row(const Arguments& a, i64 i) { return a.interleaved ? 2 * i + 1 : a.inner_size + i; }

// The biases of an expert, in the order of columns; zeros where there are none.
static void read_biases(const Arguments& a, i64 expert, float* first, float* second, float* down) {
  const Element* gate_up = a.gate_up_bias + expert * (GATED ? 2 : 1) * a.inner_size;
  for (i64 i = 0; i < a.inner_size; i++) {
    first[i] = a.gate_up_bias ? widen(gate_up[first_row(a, i)]) : 0.f;
    if (GATED) second[i] = a.gate_up_bias ? widen(gate_up[second_row(a, i)]) : 0.f;
  }
  const Element* bias = a.down_bias + expert * a.output_size;
  for (i64 h = 0; h < a.output_size; h++) down[h] = a.down_bias ? widen(bias[h]) : 0.f;
}
