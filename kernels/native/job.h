// The work of one task in float32; bfloat16 is widened on the way.

#pragma once

#include <iterator>

#include "dispatch.h"
#include "products.h"

// From so many tokens on, a vector with idle lanes is quicker than rows.
constexpr i64 WORTH_A_PANEL = LANES == 16 ? 11 : LANES - 1;
// Columns of the formula's value that a tile gives.
constexpr i64 COLUMNS = GATED ? HALF : ROWS;
// Bytes that one tile after the other reads from each of a tile's places.
constexpr i64 RUN = 16384;

// One task with its memory.
class Job {
 public:
  struct Unit {};  // nothing to set up in a thread
  // Of a thread: widened weights, then the products of a group of output columns.
  static i64 scratch(const Arguments& a) { return widest(a) + DOWN_SPLIT * MAX_ROWS; }
  static i64 bytes(const Arguments& a, i64 rows) {
    const i64 widths = padded(a.hidden_size) + 3 * padded(a.inner_size) + 4 * 64;
    const i64 products = LANES * padded(a.output_size);
    const i64 biases = 2 * padded(a.inner_size) + padded(a.output_size);
    return 4 * ((rows + 2 * LANES) * widths + products + biases + MAX_ROWS) + 4096;
  }

  Job(const Arguments& a, const Dispatch& d, const Task& task, Element* rows, Arena& arena)
      : a_(a), d_(d), task_(task) {
    for (i64 t = 0; t < task.rows; t++) out_[t] = destination(a, d, rows, task.first + t);
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
    products_rest_ = arena.take<float>(rest_ * padded(a.output_size));
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

  // Columns [begin, end) of what the formula gives; `begin` is a multiple of UP_SPLIT.
  void gate_up(i64 begin, i64 end, float* scratch) {
    const Tiles tiles = up_tiles();
    const i64 S = tiles.spread;
    for (i64 i = begin; i < end; i += COLUMNS) {
      const i64 at = tiles.column(i), next = i + COLUMNS;
      const Ahead ahead = ahead_of(next < end ? gate_up_weights(tiles.column(next), S)
                                              : down_weights(0, down_tiles().spread));
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

  // Columns [begin, end) of the rows of this task; `begin` is a multiple of DOWN_SPLIT.
  void down(i64 begin, i64 end, float* scratch) {
    const Tiles tiles = down_tiles();
    const i64 O = a_.output_size, S = tiles.spread;
    float* products = scratch + widest(a_);  // [columns, panels, LANES]
    for (i64 group = begin; group < end; group += S * ROWS) {
      const i64 first = tiles.column(group), stop = std::min(group + S * ROWS, end);
      for (i64 i = group; i < stop; i += ROWS) {
        const i64 at = tiles.column(i), next = i + ROWS;
        const Ahead ahead = next < end ? ahead_of(down_weights(tiles.column(next), S)) : Ahead();
        multiply(
            down_weights(at, S), a_.inner_size, y_tokens_, ahead, scratch,
            [&](i64 panel, auto& sums) {
              for (i64 r = 0; r < ROWS; r++)
                for (i64 v = 0; v < i64(std::size(sums[0])); v++)
                  store(products + ((at - first + r * S) * panels_ + panel + v) * LANES, sums[r][v]);
            },
            [&](i64 t, auto& sums) {
              for (auto& row : sums) {
                for (i64 r = 0; r < ROWS; r++) products_rest_[t * padded(O) + at + r * S] = row[r];
                t++;
              }
            });
      }
      for (i64 panel = 0; panel < panels_; panel++)
        for (i64 h = first; h < stop; h += ROWS)
          write_panel(panel, h, products + ((h - first) * panels_ + panel) * LANES);
    }
    for (i64 t = 0; t < rest_; t++) {
      const i64 at = panels_ * LANES + t;
      Element* out = out_[at];
      for (i64 h = begin; h < end; h += LANES) {
        const vec sum = load(products_rest_ + t * padded(O) + h) + load(down_bias_ + h);
        if (h + LANES <= O)
          store(out + h, sum * weights_[at]);
        else
          store_some(out + h, sum * weights_[at], O - h);
      }
    }
  }

 private:
  static i64 widest(const Arguments& a) { return padded(ROWS * std::max(a.hidden_size, a.inner_size)); }

  // The columns of a product, `size` to a tile. A processor fetches ahead along one run of addresses in each page.
  // So the rows of a tile lie apart, and the next tile goes on where each of them ends: a tile takes every
  // `spread`-th of a group of spread * size columns.
  struct Tiles {
    i64 width, size, spread;

    Tiles(i64 width, i64 size, i64 split, i64 row_bytes) : width(width), size(size), spread(1) {
      while (2 * spread * size <= split && spread * row_bytes < RUN && width % (2 * spread * size) == 0) spread *= 2;
    }
    // The first column of the tile that stands at `i`; the last may reach back over columns that are there.
    i64 column(i64 i) const {
      const i64 group = spread * size;
      return spread == 1 ? std::min(i, width - size) : i / group * group + i % group / size;
    }
  };
  Tiles up_tiles() const { return {a_.inner_size, COLUMNS, UP_SPLIT, a_.hidden_size * i64(sizeof(Element))}; }
  Tiles down_tiles() const { return {a_.output_size, ROWS, DOWN_SPLIT, a_.inner_size * i64(sizeof(Element))}; }

  // ROWS columns from `h` on to the outputs of a panel's tokens; the columns are `panels_` vectors apart.
  void write_panel(i64 panel, i64 h, const float* products) {
    const vec weight = load(weights_ + panel * LANES);
    vec block[ROWS];
    for (i64 r = 0; r < ROWS; r++) block[r] = (load(products + r * panels_ * LANES) + down_bias_[h + r]) * weight;
    transpose(block);
    Element tokens[LANES][ROWS];
    for (i64 r = 0; r < ROWS; r++) store(&tokens[0][0] + r * LANES, block[r]);
    const i64 first = panel * LANES, num = std::min<i64>(LANES, task_.rows - first);
    for (i64 t = 0; t < num; t++) memcpy(out_[first + t] + h, tokens[t], sizeof tokens[t]);
  }

  Weights<Element> gate_up_weights(i64 column, i64 S) const {
    const Element* expert = a_.gate_up + task_.expert * a_.gate_up_expert_stride;
    const i64 stride = first_row(a_, 1) * a_.gate_up_stride;
    const Element* first = expert + column * stride;
    const Element* second = GATED ? expert + second_row(a_, column) * a_.gate_up_stride : first + HALF * S * stride;
    return {first, second, S * stride};
  }
  Weights<Element> down_weights(i64 column, i64 S) const {
    const Element* first = a_.down + task_.expert * a_.down_expert_stride + column * a_.down_stride;
    return {first, first + HALF * S * a_.down_stride, S * a_.down_stride};
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
  Element* out_[MAX_ROWS];  // of each position
  i64 panels_, rest_, inner_;
  float *x_, *x_rest_, *y_, *y_rest_, *first_rest_, *second_rest_;
  float *first_bias_, *second_bias_, *down_bias_, *weights_, *products_rest_;
  Tokens x_tokens_, y_tokens_;
};

