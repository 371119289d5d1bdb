// The work of one task in float32; bfloat16 is widened on the way.

#pragma once

#include <iterator>

#include "dispatch.h"
#include "products.h"

// From so many tokens on, a vector with idle lanes is quicker than rows.
constexpr i64 WORTH_A_PANEL = LANES * 11 / 16;
constexpr i64 PAGE = 4096;
// Columns of the formula's value that a tile gives.
constexpr i64 COLUMNS = GATED ? HALF : ROWS;

// One task with its memory.
class Job {
 public:
  struct Unit {};  // nothing to set up in a thread
  static i64 scratch(const Arguments& a) { return ROWS * std::max(a.hidden_size, a.inner_size); }
  static i64 bytes(const Arguments& a, i64 rows) {
    const i64 widths = padded(a.hidden_size) + 3 * padded(a.inner_size) + 4 * 64;
    return 4 * ((rows + 2 * LANES) * widths + 2 * padded(a.inner_size) + padded(a.output_size) + MAX_ROWS) + 4096;
  }

  Job(const Arguments& a, const Dispatch& d, const Task& task, Element* rows, Arena& arena)
      : a_(a), d_(d), task_(task), out_(rows + task.first * a.output_size) {
    panels_ = task.rows / LANES + (task.rows % LANES >= WORTH_A_PANEL);
    rest_ = std::max<i64>(0, task.rows - panels_ * LANES);
    inner_ = padded(a.inner_size);
    x_ = arena.take<float>(panels_ * LANES * padded(a.hidden_size));
    x_rest_ = arena.take<float>(rest_ * padded(a.hidden_size));
    y_ = arena.take<float>(panels_ * LANES * inner_);
    y_rest_ = arena.take<float>(rest_ * inner_);
    first_rest_ = arena.take<float>(rest_ * inner_);
    second_rest_ = arena.take<float>(rest_ * inner_);
    first_bias_ = arena.take<float>(inner_);
    second_bias_ = arena.take<float>(inner_);
    down_bias_ = arena.take<float>(padded(a.output_size));
    weights_ = arena.take<float>(MAX_ROWS);
  }

  void gather() {
    const i64 H = a_.hidden_size, width = padded(H);
    for (i64 t = 0; t < MAX_ROWS; t++)
      weights_[t] = t < task_.rows && !a_.weights_on_input ? d_.weight[task_.first + t] : 1.f;
    for (i64 p = 0; p < panels_; p++) {
      const Element* from[LANES];
      float scale[LANES];
      for (i64 t = 0; t < LANES; t++) from[t] = source(p * LANES + t, scale[t]);
      for (i64 k = 0; k < H; k += LANES) {
        vec block[LANES];
        for (i64 t = 0; t < LANES; t++) {
          block[t] = k + LANES <= H ? load(from[t] + k) : load_some(from[t] + k, H - k);
          if (a_.weights_on_input) block[t] = rounded(block[t] * scale[t]);
        }
        transpose(block);
        for (i64 i = 0; i < LANES; i++) store(x_ + (p * width + k + i) * LANES, block[i]);
      }
    }
    x_tokens_ = {x_, panels_, width * LANES, {}, rest_};
    y_tokens_ = {y_, panels_, inner_ * LANES, {}, rest_};
    for (i64 t = 0; t < rest_; t++) {
      float scale;
      const Element* from = source(panels_ * LANES + t, scale);
      x_tokens_.rest[t] = row(from, scale, x_rest_ + t * width);
      y_tokens_.rest[t] = y_rest_ + t * inner_;
    }
    read_biases(a_, task_.expert, first_bias_, second_bias_, down_bias_);
  }

  // Columns [begin, end) of what the formula gives; `begin` is a multiple of SPLIT.
  void gate_up(i64 begin, i64 end, float* scratch) {
    const i64 S = spread();
    for (i64 i = begin; i < end; i += COLUMNS) {
      const i64 at = column(i, S), next = i + COLUMNS;
      const Ahead ahead = ahead_of(next < end ? gate_up_weights(column(next, S), S) : down_weights(0));
      multiply(
          gate_up_weights(at, S), a_.hidden_size, x_tokens_, ahead, scratch,
          [&](i64 panel, auto& sums) {
            for (i64 j = 0; j < COLUMNS; j++)
              for (i64 v = 0; v < i64(std::size(sums[0])); v++) {
                const i64 c = at + j * S;
                const vec first = sums[j][v] + first_bias_[c];
                const vec second = GATED ? sums[(j + COLUMNS) % ROWS][v] + second_bias_[c] : vec{};
                store(y_ + ((panel + v) * inner_ + c) * LANES, formula(first, second));
              }
          },
          [&](i64 t, auto& sums) {
            for (auto& row : sums) {
              for (i64 j = 0; j < COLUMNS; j++) {
                first_rest_[t * inner_ + at + j * S] = row[j];
                if (GATED) second_rest_[t * inner_ + at + j * S] = row[(j + COLUMNS) % ROWS];
              }
              t++;
            }
          });
    }
    for (i64 t = 0; t < rest_; t++)
      for (i64 i = begin; i < end; i += LANES) {
        const vec first = load(first_rest_ + t * inner_ + i) + load(first_bias_ + i);
        const vec second = GATED ? load(second_rest_ + t * inner_ + i) + load(second_bias_ + i) : vec{};
        store(y_rest_ + t * inner_ + i, formula(first, second));
      }
  }

  // Columns [begin, end) of the rows of this task.
  void down(i64 begin, i64 end, float* scratch) {
    const i64 stride = a_.output_size;
    for (i64 i = begin; i < end; i += ROWS) {
      // The last tile reaches back over columns that are there already.
      const i64 h = std::min(i, stride - ROWS);
      const Ahead ahead = i + ROWS < end ? ahead_of(down_weights(i + ROWS)) : Ahead();
      multiply(
          down_weights(h), a_.inner_size, y_tokens_, ahead, scratch,
          [&](i64 panel, auto& sums) {
            for (i64 v = 0; v < i64(std::size(sums[0])); v++, panel++) {
              const vec weight = load(weights_ + panel * LANES);
              vec block[ROWS];
              for (i64 r = 0; r < ROWS; r++) block[r] = (sums[r][v] + down_bias_[h + r]) * weight;
              transpose(block);
              Element tokens[LANES][ROWS];
              for (i64 r = 0; r < ROWS; r++) store(&tokens[0][0] + r * LANES, block[r]);
              const i64 num = std::min<i64>(LANES, task_.rows - panel * LANES);
              Element* out = out_ + panel * LANES * stride + h;
              for (i64 t = 0; t < num; t++) memcpy(out + t * stride, tokens[t], sizeof tokens[t]);
            }
          },
          [&](i64 t, auto& sums) {
            for (auto& row : sums) {
              const i64 token = panels_ * LANES + t++;
              for (i64 r = 0; r < ROWS; r++)
                assign(out_[token * stride + h + r], (row[r] + down_bias_[h + r]) * weights_[token]);
            }
          });
    }
  }

 private:
  // A processor fetches ahead along one run of addresses in each page. So the rows of a tile are taken from
  // different pages: every S-th of a group of S * COLUMNS columns.
  i64 spread() const {
    i64 S = 1;
    const i64 row = a_.hidden_size * i64(sizeof(Element));
    while (2 * S * COLUMNS <= SPLIT && 2 * S * row <= PAGE && a_.inner_size % (2 * S * COLUMNS) == 0) S *= 2;
    return S;
  }
  // The first column of the tile that stands at `i`; the last tile may reach back over columns that are there.
  i64 column(i64 i, i64 S) const {
    const i64 group = S * COLUMNS;
    return S == 1 ? std::min(i, a_.inner_size - COLUMNS) : i / group * group + i % group / COLUMNS;
  }

  Weights<Element> gate_up_weights(i64 column, i64 S) const {
    const Element* expert = a_.gate_up + task_.expert * a_.gate_up_expert_stride;
    const i64 stride = first_row(a_, 1) * a_.gate_up_stride;
    const Element* first = expert + column * stride;
    const Element* second = GATED ? expert + second_row(a_, column) * a_.gate_up_stride : first + HALF * S * stride;
    return {first, second, S * stride};
  }
  Weights<Element> down_weights(i64 h) const {
    const Element* first = a_.down + task_.expert * a_.down_expert_stride + h * a_.down_stride;
    return {first, first + HALF * a_.down_stride, a_.down_stride};
  }

  // Where a token of this task comes from; past the last, the last once more.
  const Element* source(i64 t, float& scale) const {
    const i64 at = task_.first + std::min(t, task_.rows - 1);
    scale = d_.weight[at];
    return a_.hidden + i64(d_.token[at]) * a_.hidden_stride;
  }
  const float* row(const Element* from, float scale, float* copy) const {
    if (std::is_same<Element, float>::value && !a_.weights_on_input) return reinterpret_cast<const float*>(from);
    for (i64 k = 0; k < a_.hidden_size; k += LANES) {
      const i64 n = std::min<i64>(LANES, a_.hidden_size - k);
      const vec x = n == LANES ? load(from + k) : load_some(from + k, n);
      store(copy + k, a_.weights_on_input ? rounded(x * scale) : x);
    }
    return copy;
  }
  static vec rounded(vec x) {
    Element narrow[LANES];
    store(narrow, x);
    return load(narrow);
  }
  const Arguments& a_;
  const Dispatch& d_;
  const Task& task_;
  Element* out_;
  i64 panels_, rest_, inner_;
  float *x_, *x_rest_, *y_, *y_rest_, *first_rest_, *second_rest_;
  float *first_bias_, *second_bias_, *down_bias_, *weights_;
  Tokens x_tokens_, y_tokens_;
};

