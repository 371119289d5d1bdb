// The work of one task in bfloat16 on a CPU's matrix unit (AMX).
//
// A tile register holds 16 weight rows as they lie in memory, and another the tokens, a lane each, two values of
// k side by side: panels [K / 2, 16] of pairs. So only the tokens are brought into another order.

#pragma once

#if defined(__AMX_BF16__)

#include <immintrin.h>

#include <type_traits>

#include "dispatch.h"
#include "products.h"

class TileJob {
 public:
  static constexpr i64 SIDE = 16, DEPTH = 32;  // of a tile register: rows, and values of k in each
  static_assert(LANES == SIDE);

  // The tile registers of a thread, while it works.
  struct Unit {
    Unit() {
      struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
      } config;
      for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
      _tile_loadconfig(&config);
    }
    ~Unit() { _tile_release(); }
  };

  static bool takes(const Arguments& a, const Dispatch& d) {
    const bool whole = a.hidden_size % DEPTH == 0 && a.inner_size % DEPTH == 0 && a.output_size % DEPTH == 0;
    // A few rows keep up with memory without it.
    const bool many = !d.tasks.empty() && d.tasks[0].expert_rows > ROWS_AT_ONCE;
    return std::is_same<Element, bfloat16>::value && whole && many;
  }
  static i64 scratch(const Arguments&) { return 4 * SIDE * SIDE; }
  static i64 bytes(const Arguments& a, i64 rows) {
    const i64 lanes = padded(rows);
    return 2 * (lanes + SIDE) * (a.hidden_size + a.inner_size) + 4 * (2 * a.inner_size + a.output_size + lanes) + 1024;
  }

  TileJob(const Arguments& a, const Dispatch& d, const Task& task, Element* rows, Arena& arena)
      : a_(a), d_(d), task_(task), panels_((task.rows + SIDE - 1) / SIDE) {
    for (i64 t = 0; t < task.rows; t++) out_[t] = destination(a, d, rows, task.first + t);
    x_ = arena.take<vec>(panels_ * a.hidden_size / 2);
    y_ = arena.take<vec>(panels_ * a.inner_size / 2);
    scaled_ = arena.take<Element>(SIDE * a.hidden_size);
    first_bias_ = arena.take<float>(a.inner_size);
    second_bias_ = arena.take<float>(a.inner_size);
    down_bias_ = arena.take<float>(a.output_size);
    weights_ = arena.take<float>(panels_ * SIDE);
  }

  void gather() {
    const i64 H = a_.hidden_size;
    for (i64 t = 0; t < panels_ * SIDE; t++)
      weights_[t] = t < task_.rows && !a_.weights_on_input ? d_.weight[task_.first + t] : 1.f;
    for (i64 p = 0; p < panels_; p++) {
      const Element* from[SIDE];
      for (i64 t = 0; t < SIDE; t++) {
        const i64 at = task_.first + std::min(p * SIDE + t, task_.rows - 1);
        from[t] = a_.hidden + i64(d_.token[at]) * a_.hidden_stride;
        if (a_.weights_on_input) from[t] = scale(from[t], d_.weight[at], scaled_ + t * H);
      }
      for (i64 k = 0; k < H; k += DEPTH) {
        vec pairs[SIDE];
        for (i64 t = 0; t < SIDE; t++) memcpy(&pairs[t], from[t] + k, sizeof(vec));
        transpose(pairs);
        for (i64 i = 0; i < SIDE; i++) x_[(p * H + k) / 2 + i] = pairs[i];
      }
    }
    read_biases(a_, task_.expert, first_bias_, second_bias_, down_bias_);
  }

  // Columns [begin, end) of what the formula gives; both are multiples of DEPTH.
  void gate_up(i64 begin, i64 end, float* products) {
    constexpr i64 columns = GATED ? SIDE : 2 * SIDE;
    const Element* expert = a_.gate_up + task_.expert * a_.gate_up_expert_stride;
    const i64 stride = first_row(a_, 1) * a_.gate_up_stride;
    for (i64 i = begin; i < end; i += columns) {
      const Element* first = expert + i * stride;
      const Element* second = GATED ? expert + second_row(a_, i) * a_.gate_up_stride : first + SIDE * stride;
      for (i64 p = 0; p < panels_; p += 2) {
        multiply(first, second, stride, a_.hidden_size, x_ + p * a_.hidden_size / 2, p + 1 < panels_, fetch(p), products);
        for (i64 v = 0; v < 2 && p + v < panels_; v++)
          for (i64 j = 0; j < columns; j += 2) {
            vec values[2];
            for (i64 n = 0; n < 2; n++) {
              const i64 half = (j + n) / SIDE, row = (j + n) % SIDE;
              const vec a = load(products + ((half * 2 + v) * SIDE + row) * SIDE) + first_bias_[i + j + n];
              const vec b = GATED ? load(products + ((2 + v) * SIDE + row) * SIDE) + second_bias_[i + j + n] : vec{};
              values[n] = formula(a, b);
            }
            y_[((p + v) * a_.inner_size + i + j) / 2] = narrow_pairs(values[0], values[1]);
          }
      }
    }
  }

  // Columns [begin, end) of the rows of this task; both are multiples of DEPTH.
  void down(i64 begin, i64 end, float* products) {
    const Element* expert = a_.down + task_.expert * a_.down_expert_stride;
    const i64 stride = a_.down_stride;
    for (i64 h = begin; h < end; h += 2 * SIDE) {
      const Element* first = expert + h * stride;
      for (i64 p = 0; p < panels_; p += 2) {
        multiply(first, first + SIDE * stride, stride, a_.inner_size, y_ + p * a_.inner_size / 2, p + 1 < panels_,
                 fetch(p), products);
        for (i64 v = 0; v < 2 && p + v < panels_; v++) {
          const vec weight = load(weights_ + (p + v) * SIDE);
          const i64 num = std::min(SIDE, task_.rows - (p + v) * SIDE);
          for (i64 half = 0; half < 2; half++) {
            const float* sums = products + (half * 2 + v) * SIDE * SIDE;
            const float* bias = down_bias_ + h + half * SIDE;
            auto row = [&](i64 r) { return (load(sums + r * SIDE) + bias[r]) * weight; };
            // Pairs of columns, [SIDE / 2, tokens], become [tokens, SIDE / 2].
            vec block[SIDE / 2];
            for (i64 r = 0; r < SIDE; r += 2) block[r / 2] = narrow_pairs(row(r), row(r + 1));
            transpose(block);
            Element tokens[SIDE][SIDE];
            memcpy(tokens, block, sizeof tokens);
            for (i64 t = 0; t < num; t++)
              memcpy(out_[(p + v) * SIDE + t] + h + half * SIDE, tokens[t], sizeof tokens[t]);
          }
        }
      }
    }
  }

 private:
  // Two times 16 weight rows with one or two panels: `products` [2, 2, 16, 16], by half, panel, row and token.
  // With `fetch`, the rows that follow both halves are fetched meanwhile.
  static void multiply(const Element* first, const Element* second, i64 stride, i64 K, const vec* x, bool two,
                       bool fetch, float* products) {
    const i64 bytes = stride * sizeof(Element);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i64 k = 0; k < K; k += DEPTH) {
      if (fetch)
        for (i64 r = 0; r < SIDE; r++) {
          __builtin_prefetch(first + k + (SIDE + r) * stride, 0, 2);
          __builtin_prefetch(second + k + (SIDE + r) * stride, 0, 2);
        }
      _tile_loadd(4, first + k, bytes);
      _tile_loadd(5, second + k, bytes);
      _tile_loadd(6, x + k / 2, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if (two) {
        _tile_loadd(7, x + (K + k) / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, products, 64);
    _tile_stored(2, products + 2 * SIDE * SIDE, 64);
    if (two) {
      _tile_stored(1, products + SIDE * SIDE, 64);
      _tile_stored(3, products + 3 * SIDE * SIDE, 64);
    }
  }

  // With one panel, memory is all that counts, and the processor's own prefetching does better.
  bool fetch(i64 panel) const { return panel == 0 && panels_ > 1; }

  const Element* scale(const Element* from, float weight, Element* to) const {
    for (i64 k = 0; k < a_.hidden_size; k += LANES) store(to + k, load(from + k) * weight);
    return to;
  }

  const Arguments& a_;
  const Dispatch& d_;
  const Task& task_;
  Element* out_[MAX_ROWS];  // of each position
  i64 panels_;
  vec *x_, *y_;  // [panels, H / 2] and [panels, I / 2], each vec 16 pairs
  Element* scaled_;
  float *first_bias_, *second_bias_, *down_bias_, *weights_;
};

#endif
