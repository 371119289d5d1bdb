// Products of a few weight rows with the tokens of one task, in float32.
//
// Full vectors of tokens go as panels, [K, LANES]: a lane is a token, a weight is read once for LANES tokens,
// and nothing is summed across lanes. What remains, too few for a vector, goes as rows, [K]: a lane is a k.

#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

constexpr int PANELS_AT_ONCE = 3, ROWS_AT_ONCE = 3, HALF = ROWS / 2;

// ROWS weight rows: HALF from each of two places, `stride` elements apart.
template <class T>
struct Weights {
  const T *first, *second;
  i64 stride;

  const T* row(int r) const { return (r < HALF ? first : second) + (r % HALF) * stride; }
};

// The left side of a product: the tokens of one task.
struct Tokens {
  const float* panels;  // [num_panels, K, LANES], `panel_size` apart
  i64 num_panels, panel_size;
  const float* rest[LANES];  // [num_rest], each [K]
  i64 num_rest;
};

// Values of k in a step of a panel tile: weights are fetched before it, and rows multiplied after it.
constexpr i64 STEP_VECTORS = 4, STEP = STEP_VECTORS * LANES;
// With 32 registers, rows are multiplied beside the last panels, while their weights are in the nearest cache.
constexpr bool ROWS_BESIDE_PANELS = LANES == 16;

// Weights that come next, fetched while the present ones are multiplied.
struct Ahead {
  const char *first, *second;  // `begin` to `end` of HALF rows from either, `stride` bytes apart
  i64 stride, element;
  int begin, end;

  // The rows of tile `i` of `n`: evenly spread, memory and arithmetic work side by side.
  Ahead part(i64 i, i64 n) const {
    return {first, second, stride, element, int(end * i / n), int(end * (i + 1) / n)};
  }
  void fetch(i64 k) const {
    const i64 at = k * element;
    if (at % 64 != 0) return;
    for (int r = begin; r < end; r++) {
      __builtin_prefetch(first + r * stride + at, 0, 2);
      __builtin_prefetch(second + r * stride + at, 0, 2);
    }
  }
};
template <class T>
static inline Ahead ahead_of(const Weights<T>& w) {
  const i64 element = sizeof(T);
  return {(const char*)w.first, (const char*)w.second, w.stride * element, element, 0, HALF};
}

// Rows to multiply beside a panel, and a vector of partial sums for each: lane l holds those of every LANES-th k.
struct Beside {
  const float* const* rows;
  i64 num_rows;
  vec (*sums)[ROWS];

  // Adds STEP values of k. HALF of the weight rows at a time: few enough registers for a panel to keep its own.
  void add(const Weights<float>& w, i64 k) const {
    for (int half = 0; half < ROWS; half += HALF) {
      const float* weights = w.row(half) + k;
      for (i64 t = 0; t < num_rows; t++) {
        vec x[STEP_VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < STEP_VECTORS; i++) x[i] = load(rows[t] + k + i * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < HALF; r++) {
          vec sum = sums[t][half + r];
#pragma GCC unroll 8
          for (int i = 0; i < STEP_VECTORS; i++) sum += load(weights + r * w.stride + i * LANES) * x[i];
          sums[t][half + r] = sum;
        }
      }
    }
  }
};

template <int V>
static inline void panel_tile(const Weights<float>& w, i64 K, const float* x, i64 panel_size, const Ahead& ahead,
                              const Beside& beside, vec (&sums)[ROWS][V]) {
  // Enough sums under way to hide the latency of each.
  constexpr int CHAINS = V == 1 ? 2 : 1;
  vec acc[CHAINS][ROWS][V] = {};
  const i64 stride = w.stride;
  auto add = [&](i64 k, int chain) {
    const float *first = w.first + k, *second = w.second + k;
    vec lanes[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) lanes[v] = load(x + v * panel_size + k * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const vec weight = splat(r < HALF ? first[r * stride] : second[(r - HALF) * stride]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[chain][r][v] += weight * lanes[v];
    }
  };
  for (i64 start = 0; start < K; start += STEP) {
    const i64 end = start + STEP < K ? start + STEP : K;
    for (i64 k = start; k < end; k += LANES) ahead.fetch(k);
    i64 k = start;
    for (; k + CHAINS <= end; k += CHAINS)
#pragma GCC unroll 2
      for (int chain = 0; chain < CHAINS; chain++) add(k + chain, chain);
    if (k < end) add(k, 0);
    if (end == start + STEP) beside.add(w, start);
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) {
      sums[r][v] = acc[0][r][v];
      if (CHAINS == 2) sums[r][v] += acc[CHAINS - 1][r][v];
    }
}

template <int M, class T>
static inline void row_tile(const Weights<T>& w, i64 K, const float* const* x, const Ahead& ahead,
                            float (&sums)[M][ROWS]) {
  vec acc[M][ROWS] = {};
  const i64 stride = w.stride;
  i64 k = 0;
  for (; k + LANES <= K; k += LANES) {
    ahead.fetch(k);
    const T *first = w.first + k, *second = w.second + k;
    vec lanes[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) lanes[m] = load(x[m] + k);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const vec weights = load(r < HALF ? first + r * stride : second + (r - HALF) * stride);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) acc[m][r] += weights * lanes[m];
    }
  }
  for (int m = 0; m < M; m++) {
    sum_lanes(acc[m], sums[m]);
    for (i64 tail = k; tail < K; tail++)
      for (int r = 0; r < ROWS; r++) sums[m][r] += widen(w.row(r)[tail]) * x[m][tail];
  }
}

static inline Weights<float> widened(const Weights<float>& w, i64, float*) { return w; }
static inline Weights<float> widened(const Weights<bfloat16>& w, i64 K, float* scratch) {
  for (int r = 0; r < ROWS; r++) {
    const bfloat16* from = w.row(r);
    float* to = scratch + r * K;
    i64 k = 0;
    for (; k + LANES <= K; k += LANES) store(to + k, load(from + k));
    for (; k < K; k++) to[k] = widen(from[k]);
  }
  return {scratch, scratch + HALF * K, K};
}

template <int N>
using Size = std::integral_constant<int, N>;

// Multiply ROWS weight rows with all tokens of a task: `panels_out(first panel, sums[ROWS][V])` and
// `rows_out(first row, sums[M][ROWS])` take the products. `scratch`: [ROWS, K].
template <class T, class PanelsOut, class RowsOut>
static inline void multiply(const Weights<T>& w, i64 K, const Tokens& x, const Ahead& ahead, float* scratch,
                            PanelsOut panels_out, RowsOut rows_out) {
  const bool beside = ROWS_BESIDE_PANELS && x.num_panels > 0;
  const i64 panel_tiles = (x.num_panels + PANELS_AT_ONCE - 1) / PANELS_AT_ONCE;
  const i64 row_tiles = beside ? 0 : (x.num_rest + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  const i64 tiles = panel_tiles + row_tiles;
  i64 tile = 0;
  auto rows = [&](const auto& weights, i64 t, auto size) {
    float sums[size()][ROWS];
    row_tile<size()>(weights, K, x.rest + t, ahead.part(tile++, tiles), sums);
    rows_out(t, sums);
    return t + size();
  };
  auto rest = [&](const auto& weights) {
    i64 t = 0;
    while (t + ROWS_AT_ONCE <= x.num_rest) t = rows(weights, t, Size<ROWS_AT_ONCE>());
    if (x.num_rest - t == 2) rows(weights, t, Size<2>());
    if (x.num_rest - t == 1) rows(weights, t, Size<1>());
  };
  // Weights that are used once are widened on their way; else once for all.
  if (tiles == 1 && x.num_panels == 0) return rest(w);
  const Weights<float> wide = widened(w, K, scratch);
  vec beside_sums[LANES][ROWS];
  if (beside) std::fill_n(&beside_sums[0][0], x.num_rest * ROWS, vec{});
  // The tile's size is an argument's type, since a lambda of C++17 takes no template arguments.
  auto panels = [&](i64 v, auto size) {
    const bool last = v + size() == x.num_panels;
    vec sums[ROWS][size()];
    panel_tile<size()>(wide, K, x.panels + v * x.panel_size, x.panel_size, ahead.part(tile++, tiles),
                       {x.rest, beside && last ? x.num_rest : 0, beside_sums}, sums);
    panels_out(v, sums);
    return v + size();
  };
  i64 v = 0;
  // Four are two and two: three and one would leave a tile with few sums under way.
  while (v + PANELS_AT_ONCE <= x.num_panels && x.num_panels - v != 4) v = panels(v, Size<PANELS_AT_ONCE>());
  while (x.num_panels - v >= 2) v = panels(v, Size<2>());
  if (x.num_panels - v == 1) panels(v, Size<1>());
  if (!beside) return rest(wide);
  for (i64 t = 0; t < x.num_rest; t++) {
    float sums[1][ROWS];
    sum_lanes(beside_sums[t], sums[0]);
    for (i64 k = K / STEP * STEP; k < K; k++)
      for (int r = 0; r < ROWS; r++) sums[0][r] += wide.row(r)[k] * x.rest[t][k];
    rows_out(t, sums);
  }
}
