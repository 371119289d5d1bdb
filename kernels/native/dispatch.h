// Which pairs are kept, and their order: a threshold, then a counting sort by expert.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "vectors.h"

// Tokens of one expert that are multiplied together: what is gathered of them stays in a core's cache.
constexpr i64 MAX_ROWS = 96;

// All members have 8 bytes; the caller packs them in this order.
struct Arguments {
  i64 tokens, slots, experts, hidden_size, inner_size, output_size;
  const Element* hidden;  // [T, H], rows `hidden_stride` apart
  i64 hidden_stride;
  const float *scores, *weights;  // [T, K]
  const i64* ids;                 // [T, K]
  const uint8_t* modality;        // [T] or null
  const Element *gate_up, *down;  // [E, N, H] and [E, O, I], rows contiguous
  i64 gate_up_expert_stride, gate_up_stride, down_expert_stride, down_stride;
  const Element *gate_up_bias, *down_bias;  // [E, N], [E, O], or null
  Element* out;                             // [T, O]
  double alpha_text, alpha_vision, tau_text, tau_vision;
  i64 interleaved, weights_on_input, renormalise, threads;
};

struct Task {
  i64 expert, first, rows;  // positions [first, first + rows)
};

struct Dispatch {
  std::vector<int32_t> position;  // [T, K]: where a kept pair is, -1 where dropped
  std::vector<int32_t> token;     // [kept], by position
  std::vector<float> weight;      // [kept], by position
  std::vector<Task> tasks;        // largest first
};

static Dispatch dispatch(const Arguments& a) {
  const i64 pairs = a.tokens * a.slots;
  Dispatch d;
  d.position.resize(pairs);
  std::vector<float> scale(a.renormalise ? a.tokens : 0, 1.f);
  std::vector<int32_t> next(a.experts + 1);  // counts, then the next free position of each expert
  const float alphas[] = {float(a.alpha_text), float(a.alpha_vision)};
  const float taus[] = {float(a.tau_text), float(a.tau_vision)};
  for (i64 t = 0; t < a.tokens; t++) {
    const int kind = a.modality ? a.modality[t] : 0;
    float mass = 0, kept = 0;
    for (i64 p = t * a.slots; p < (t + 1) * a.slots; p++) {
      const bool inside = a.ids[p] >= 0 && a.ids[p] < a.experts;
      const bool below = kind < 2 && a.scores[p] * alphas[kind] < taus[kind];
      const bool keep = inside && !below;
      d.position[p] = keep ? 0 : -1;
      if (keep) next[a.ids[p] + 1]++;
      mass += a.weights[p];
      if (!below) kept += a.weights[p];
    }
    if (a.renormalise && kept > 0) scale[t] = mass / kept;
  }
  for (i64 e = 0; e < a.experts; e++) {
    i64 rows = next[e + 1], first = next[e];
    // Equal tasks, so that none of them is a small rest.
    for (i64 n = (rows + MAX_ROWS - 1) / MAX_ROWS; n > 0; n--) {
      const i64 size = n == 1 ? rows : (rows / n + LANES - 1) / LANES * LANES;
      d.tasks.push_back({e, first, size});
      first += size, rows -= size;
    }
    next[e + 1] = int32_t(first);
  }
  const i64 kept = next[a.experts];
  d.token.resize(kept);
  d.weight.resize(kept);
  for (i64 t = 0; t < a.tokens; t++)
    for (i64 p = t * a.slots; p < (t + 1) * a.slots; p++) {
      if (d.position[p] < 0) continue;
      const int32_t at = next[a.ids[p]]++;
      d.position[p] = at;
      d.token[at] = int32_t(t);
      d.weight[at] = a.renormalise ? a.weights[p] * scale[t] : a.weights[p];
    }
  std::stable_sort(d.tasks.begin(), d.tasks.end(), [](const Task& a, const Task& b) { return a.rows > b.rows; });
  return d;
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
