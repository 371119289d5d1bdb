// Vectors of float32, in the compiler's own vector types: one source for AVX-512, AVX2, NEON and what comes.

#pragma once

#include <cstdint>
#include <cstring>

#include "arguments.h"

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // ROWS: weight rows of one register tile
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t veci __attribute__((vector_size(LANES * 4)));
typedef uint32_t vecu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vech __attribute__((vector_size(LANES * 2)));

struct bfloat16 {
  uint16_t bits;
};

static inline vec splat(float a) { return a - vec{}; }

static inline float widen(float a) { return a; }
static inline float widen(bfloat16 a) {
  uint32_t bits = uint32_t(a.bits) << 16;
  float b;
  memcpy(&b, &bits, 4);
  return b;
}

static inline vec load(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline vec load(const bfloat16* p) {
  vech half;
  memcpy(&half, p, sizeof half);
  return (vec)(__builtin_convertvector(half, vecu) << 16);
}

// Rounded to bfloat16, the upper half of each lane: to the nearest, ties to even, as torch does; NaN stays NaN.
static inline vecu rounded_bits(vec v) {
  const vecu bits = (vecu)v;
  return v == v ? bits + 0x7fff + ((bits >> 16) & 1) : vecu{} + 0x7fc00000;
}
static inline vech narrow(vec v) { return __builtin_convertvector(rounded_bits(v) >> 16, vech); }
// Two values of bfloat16 to a lane.
static inline vec narrow_pairs(vec low, vec high) {
  return (vec)(rounded_bits(low) >> 16 | (rounded_bits(high) & 0xffff0000));
}

static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
static inline void store(bfloat16* p, vec v) {
  vech half = narrow(v);
  memcpy(p, &half, sizeof half);
}

static inline void assign(float& a, float b) { a = b; }
static inline void assign(bfloat16& a, float b) { a.bits = narrow(splat(b))[0]; }

// The first `n` of a vector; what lies behind is not touched, and read as zero.
template <class T>
static inline vec load_some(const T* p, i64 n) {
  T full[LANES] = {};
  memcpy(full, p, n * sizeof(T));
  return load(full);
}
template <class T>
static inline void store_some(T* p, vec v, i64 n) {
  T full[LANES];
  store(full, v);
  memcpy(p, full, n * sizeof(T));
}

// a0 b0 a1 b1 ... of the lower and of the upper halves.
#if defined(__AVX512F__)
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif
static inline vec zip_low(vec a, vec b) { return __builtin_shufflevector(a, b, ZIP_LOW); }
static inline vec zip_high(vec a, vec b) { return __builtin_shufflevector(a, b, ZIP_HIGH); }

// Transpose N vectors as a matrix [N, LANES]: read in a row, they are [LANES, N] after it. Each round of zips
// moves the highest bit of a row number to the lowest of a column number.
template <int N>
static inline void transpose(vec (&rows)[N]) {
  for (int round = 1; round < N; round *= 2) {
    vec zipped[N];
    for (int i = 0; i < N / 2; i++) {
      zipped[2 * i] = zip_low(rows[i], rows[i + N / 2]);
      zipped[2 * i + 1] = zip_high(rows[i], rows[i + N / 2]);
    }
    for (int i = 0; i < N; i++) rows[i] = zipped[i];
  }
}

// The sum over the lanes of each of ROWS vectors.
static inline void sum_lanes(const vec (&rows)[ROWS], float (&sums)[ROWS]) {
  vec v[ROWS];
  for (int i = 0; i < ROWS; i++) v[i] = rows[i];
#pragma GCC unroll 8
  for (int n = ROWS / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) v[i] = zip_low(v[i], v[i + n]) + zip_high(v[i], v[i + n]);
#if defined(__AVX2__)  // two sums of each row are left, half a vector apart
  memcpy(sums, &v[0], sizeof sums);
  float others[ROWS];
  memcpy(others, (const float*)&v[0] + ROWS, sizeof others);
  for (int i = 0; i < ROWS; i++) sums[i] += others[i];
#else
  memcpy(sums, &v[0], sizeof sums);
#endif
}

// Functions that formulas use, off by about 1e-7 of the result or of 1, whichever is more.

static inline vec v_exp(vec x) {
  // exp(x) = 2^n * exp(r), |r| <= ln(2) / 2; n in two factors, since 2^n alone leaves the range before exp(x).
  vec bounded = x < splat(-104.f) ? splat(-104.f) : x > splat(89.f) ? splat(89.f) : x;
  vec n = bounded * 1.44269504f + 12582912.f;  // rounds: 1.5 * 2^23 leaves no bits for a fraction
  n = n - 12582912.f;
  vec r = bounded - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  veci whole = __builtin_convertvector(n == n ? n : splat(0.f), veci);
  veci half = whole >> 1;
  vec first = (vec)((half + 127) << 23), second = (vec)((whole - half + 127) << 23);
  return p * first * second;
}

static inline vec v_log(vec x) {
  // x = 2^n * m, m in [sqrt(1/2), sqrt(2)); polynomial of Cephes' logf.
  vec scaled = x < splat(1.17549435e-38f) ? x * 8388608.f : x;
  veci bits = (veci)scaled;
  veci n = ((bits - 0x3f3504f3) >> 23);
  vec m = (vec)(bits - (n << 23)) - 1.f;
  vec exponent = __builtin_convertvector(n, vec) - (x < splat(1.17549435e-38f) ? splat(23.f) : splat(0.f));
  vec p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  vec y = p * m * m * m + exponent * -2.12194440e-4f - 0.5f * m * m + m + exponent * 0.693359375f;
  const float infinity = __builtin_inff();
  y = x == splat(infinity) ? x : y;
  y = x == splat(0.f) ? splat(-infinity) : y;
  return x < splat(0.f) || x != x ? splat(__builtin_nanf("")) : y;
}

static inline vec v_abs(vec x) { return (vec)((veci)x & 0x7fffffff); }
static inline vec v_sqrt(vec x) {
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
static inline vec v_sigmoid(vec x) { return 1.f / (1.f + v_exp(-x)); }
static inline vec v_silu(vec x) { return x / (1.f + v_exp(-x)); }
static inline vec v_tanh(vec x) { return 2.f * v_sigmoid(2.f * x) - 1.f; }
static inline vec v_erf(vec x) {
  // Abramowitz and Stegun, 7.1.26.
  vec a = v_abs(x), t = 1.f / (1.f + 0.3275911f * a);
  vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  vec y = 1.f - p * t * v_exp(-a * a);
  return x < splat(0.f) ? -y : y;
}
static inline vec v_gelu(vec x) { return 0.5f * x * (1.f + v_erf(x * 0.70710678f)); }
static inline vec v_gelu_tanh(vec x) { return x * v_sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }
static inline vec v_relu(vec x) { return x < splat(0.f) ? splat(0.f) : x; }
static inline vec v_softplus(vec x) { return v_relu(x) + v_log(1.f + v_exp(-v_abs(x))); }
// Comparisons are written so that a NaN comes through, as in torch.
static inline vec v_minimum(vec a, vec b) { return (a < b) | (a != a) ? a : b; }
static inline vec v_maximum(vec a, vec b) { return (a > b) | (a != a) ? a : b; }
static inline vec v_clamp_min(vec a, vec b) { return a < b ? b : a; }
static inline vec v_clamp_max(vec a, vec b) { return a > b ? b : a; }
static inline vec v_pow(vec a, float exponent) { return v_exp(exponent * v_log(a)); }
