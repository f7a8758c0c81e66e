/* Kernels for CPUs with AVX-512, and AMX if they have it: the operations of an encoder, which `avx512.py` compiles and
   describes.

   A sum adds its terms in a fixed order, in one lane of a vector or tile, so its bits depend neither on the number of
   rows or texts nor on the number of threads. The compiler must not contract multiplications and additions on its own,
   because it could do so in one copy of an inlined function only.

   Sizes and strides are in elements. Sums are in fp32, those of 8-bit integers in int32. */

#if defined(AMX) && __GNUC__ >= 11
#pragma GCC target("amx-tile,amx-bf16,amx-int8")
#endif

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")
#define MIN(a, b) ((a) < (b) ? (a) : (b))

enum { F32, BF16, INT8, SPLIT };                // the last two: only as the dtype of factors
enum { NONE, GELU, GELU_TANH, SWIGLU, GEGLU };  // activations
enum { LANES = 16, ROWS = 6, VECS = 4 };        // 6 x 4 vectors of sums leave 8 registers for factors
enum { PANEL = VECS * LANES };                  // columns that are multiplied together
enum { TILE_ROWS = 32 };                        // rows that are multiplied together in tiles
enum { TERMS = 512 };                           // steps that are summed apart, for the precision of long sums
enum { ROW_BLOCK = 192, SPLIT_STEPS = 3 * 384, QUERY_BLOCK = 256, KEY_BLOCK = 128, VOCABULARY_BLOCK = 504 };

INLINE long size_of(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE __mmask16 first(long n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

INLINE __m256i to_bf16(__m512 x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    return _mm256_undefined_si256();  // avx512.py passes no bf16 to such a processor
#endif
}

INLINE __m512i to_pairs(__m512 x, __m512 y) {  // bf16: x[0], y[0], x[1], y[1], ...
    static const uint16_t order[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#ifdef __AVX512BF16__
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)_mm512_cvtne2ps_pbh(y, x));
#else
    return _mm512_loadu_si512(order);  // see to_bf16
#endif
}

INLINE __m512 load(const void *from, long i, int dtype, __mmask16 mask) {
    if (dtype == F32) return _mm512_maskz_loadu_ps(mask, (const float *)from + i);
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

INLINE void store(void *to, long i, int dtype, __mmask16 mask, __m512 x) {
    if (dtype == F32) _mm512_mask_storeu_ps((float *)to + i, mask, x);
    else _mm256_mask_storeu_epi16((uint16_t *)to + i, mask, to_bf16(x));
}

static void *allocate(long bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* ---- functions ---- */

// 2 ** x within 2e-7; 0 for -inf. The polynomial is the best one of degree 5 for 2 ** f, 0 <= f < 1 (Remez).
INLINE __m512 exp2_of(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    __m512 y = _mm512_set1_ps(1.877576658e-3f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(8.989340124e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.582631804e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.401536170e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.931530732e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.999999251e-1f));
    return _mm512_scalef_ps(y, x);  // y * 2 ** floor(x)
}

INLINE __m512 reciprocal(__m512 x) {  // 1 / x within 1.5e-7 for 1 <= x < 2 ** 126, in less time than a division
    __m512 y = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.f)));
}

INLINE __m512 times_sigmoid(__m512 x, __m512 z) {  // x / (1 + exp(-z))
    __m512 power = _mm512_mul_ps(z, _mm512_set1_ps(-1.4426950408889634f));
    __m512 e = exp2_of(_mm512_min_ps(_mm512_set1_ps(125.f), power));
    return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(e, _mm512_set1_ps(1.f))));
}

// max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2, erfc within 1.5e-7 (Abramowitz and Stegun 7.1.26)
INLINE __m512 gelu(__m512 x) {
    __m512 magnitude = _mm512_abs_ps(x), one = _mm512_set1_ps(1.f);
    __m512 t = reciprocal(_mm512_fmadd_ps(magnitude, _mm512_set1_ps(0.3275911f * 0.70710678f), one));
    __m512 series = _mm512_set1_ps(1.061405429f);
    series = _mm512_fmadd_ps(series, t, _mm512_set1_ps(-1.453152027f));
    series = _mm512_fmadd_ps(series, t, _mm512_set1_ps(1.421413741f));
    series = _mm512_fmadd_ps(series, t, _mm512_set1_ps(-0.284496736f));
    series = _mm512_fmadd_ps(series, t, _mm512_set1_ps(0.254829592f));
    __m512 e = exp2_of(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.7213475204444817f)));
    __m512 half = _mm512_mul_ps(magnitude, _mm512_set1_ps(0.5f));
    __m512 erfc = _mm512_mul_ps(_mm512_mul_ps(series, t), e);
    return _mm512_fnmadd_ps(half, erfc, _mm512_max_ps(_mm512_setzero_ps(), x));
}

INLINE __m512 gelu_tanh(__m512 x) {
    __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.f));
    return times_sigmoid(x, _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(1.5957691216057308f)));
}

/* ---- matrix products ---- */

typedef __m512i Sums[VECS];  // of one row over a panel: fp32, or int32 of INT8

static const Sums ZERO[1];

// Four bytes of a row times the same four of 16 columns: one fp32, two bf16, or four u8 of the row and s8 of a column.
INLINE __m512i dot(int dtype, __m512i sum, __m512i row, __m512i columns) {
    __m512 sums = _mm512_castsi512_ps(sum);
#ifdef __AVX512BF16__
    if (dtype == BF16) return _mm512_castps_si512(_mm512_dpbf16_ps(sums, (__m512bh)row, (__m512bh)columns));
#endif
#ifdef __AVX512VNNI__
    if (dtype == INT8) return _mm512_dpbusd_epi32(sum, row, columns);
#endif
    sums = _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(columns), sums);
    return _mm512_castps_si512(sums);
}

INLINE __m512i add(int dtype, __m512i x, __m512i y) {
    if (dtype == INT8) return _mm512_add_epi32(x, y);
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y)));
}

// sums[r] += row a[r] times the columns of a panel b, [steps][PANEL] times four bytes, of which the first 16 * vecs are
// computed.
#define VECTORS int rows, int vecs, const uint32_t **a, const uint32_t *b, long steps, Sums *sums

INLINE void multiply_vectors(int dtype, VECTORS) {
    __m512i sum[ROWS][VECS];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vecs; v++) sum[r][v] = sums[r][v];
    for (long step = 0; step < steps; step++, b += PANEL) {
        __m512i columns[VECS];
        UNROLLED for (int v = 0; v < vecs; v++) columns[v] = _mm512_loadu_si512(b + v * LANES);
        UNROLLED for (int r = 0; r < rows; r++) {
            __m512i row = _mm512_set1_epi32(a[r][step]);
            UNROLLED for (int v = 0; v < vecs; v++) sum[r][v] = dot(dtype, sum[r][v], row, columns[v]);
        }
    }
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vecs; v++) sums[r][v] = sum[r][v];
}

// One function per dtype, in which the numbers of rows and vectors are constants of a case.
#define CASE(DTYPE, R, V) case R * 8 + V: multiply_vectors(DTYPE, R, V, a, b, steps, sums); break;
#define CASES(DTYPE, R) CASE(DTYPE, R, 1) CASE(DTYPE, R, 2) CASE(DTYPE, R, 3) CASE(DTYPE, R, 4)
#define DEFINE(NAME, DTYPE)                                                                                 \
    static void NAME(VECTORS) {                                                                             \
        switch (rows * 8 + vecs) {                                                                          \
            CASES(DTYPE, 1) CASES(DTYPE, 2) CASES(DTYPE, 3) CASES(DTYPE, 4) CASES(DTYPE, 5) CASES(DTYPE, 6) \
        }                                                                                                   \
    }
DEFINE(multiply_f32, F32)
DEFINE(multiply_bf16, BF16)
DEFINE(multiply_int8, INT8)

// sums[r] = from[r * from_stride] + row r of a times the columns of b; `stride` bytes lie between the rows of a.
#define FACTORS                                                                                                    \
    int rows, int vecs, const char *a, long stride, const uint32_t *b, long steps, const Sums *from, long from_stride, \
        Sums *sums

#ifdef __AMX_TILE__

// Add the products of 64 bytes per row and column to tiles 0 to 3, the sums of up to 16 rows and 64 columns. Without
// new_a, the tiles of a are still loaded.
INLINE void multiply_flat(int dtype, int new_a, const char *a, long stride, const uint32_t *b) {
#define DOT(SUM, A, B) if (dtype == INT8) _tile_dpbusd(SUM, A, B); else _tile_dpbf16ps(SUM, A, B);
    if (new_a) _tile_loadd(4, a, stride);
    _tile_loadd(6, b, PANEL * 4);
    DOT(0, 4, 6)
    _tile_loadd(7, b + LANES, PANEL * 4);
    DOT(1, 4, 7)
    _tile_loadd(6, b + 2 * LANES, PANEL * 4);
    DOT(2, 4, 6)
    _tile_loadd(7, b + 3 * LANES, PANEL * 4);
    DOT(3, 4, 7)
}

// The same for sums of up to 32 rows and 32 columns.
INLINE void multiply_square(int dtype, int new_a, int new_b, const char *a, long stride, const uint32_t *b) {
    if (new_a) _tile_loadd(4, a, stride);
    if (new_b) _tile_loadd(6, b, PANEL * 4);
    DOT(0, 4, 6)
    if (new_b) _tile_loadd(7, b + LANES, PANEL * 4);
    DOT(1, 4, 7)
    if (new_a) _tile_loadd(5, a + LANES * stride, stride);
    DOT(2, 5, 6)
    DOT(3, 5, 7)
}

// Up to TILE_ROWS rows by AMX. *configured: the number of rows that the tiles are made for.
// SPLIT: 32 values of fp32 are 3 x 32 of bf16, the large parts first; a value is the sum of its parts. The products of
// parts that are below 2 ** -24 of the product of the values are left out.
INLINE void multiply_tiles(int dtype, int *configured, FACTORS) {
    const int top = MIN(rows, LANES), bottom = rows > LANES ? rows - LANES : rows, square = rows > LANES;
    if (*configured != rows) {
        const struct {
            uint8_t palette, start, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {top, top, bottom, bottom, top, bottom, LANES, LANES}};
        _tile_loadconfig(&tiles);
        *configured = rows;
    }
    __asm__ volatile("" ::: "memory");  // GCC does not know that loading tiles reads memory
    for (int v = 0; v < vecs; v += square ? 2 : VECS) {
        // of tiles 2 and 3: from the second 16 rows or the next 32 columns on
        const long second = square ? LANES : 0, v2 = square ? v : v + 2;
        if (from == ZERO) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, &from[0][v], from_stride * sizeof(Sums));
            _tile_loadd(1, &from[0][v + 1], from_stride * sizeof(Sums));
            _tile_loadd(2, &from[second * from_stride][v2], from_stride * sizeof(Sums));
            _tile_loadd(3, &from[second * from_stride][v2 + 1], from_stride * sizeof(Sums));
        }
        for (long step = 0; step < steps; step += dtype == SPLIT ? 3 * LANES : LANES) {
            static const int a_part[] = {0, 0, 1, 1, 2, 0}, b_part[] = {2, 1, 1, 0, 0, 0};
            const int from_product = dtype == SPLIT ? 0 : 5;
            UNROLLED for (int i = from_product; i < 6; i++) {
                const int new_a = i == from_product || a_part[i] != a_part[i - 1];
                const int new_b = i == from_product || b_part[i] != b_part[i - 1];
                const char *rows_at = a + (step + a_part[i] * LANES) * 4;
                const uint32_t *columns_at = b + (step + b_part[i] * LANES) * PANEL + v * LANES;
                if (square) multiply_square(dtype, new_a, new_b, rows_at, stride, columns_at);
                else multiply_flat(dtype, new_a, rows_at, stride, columns_at);
            }
        }
        _tile_stored(0, &sums[0][v], sizeof(Sums));
        _tile_stored(1, &sums[0][v + 1], sizeof(Sums));
        _tile_stored(2, &sums[second][v2], sizeof(Sums));
        _tile_stored(3, &sums[second][v2 + 1], sizeof(Sums));
    }
}

#endif

// Whether products of so many steps are computed in tiles.
int in_tiles(int dtype, long steps) {
#ifdef __AMX_TILE__
    return dtype != F32 && steps % LANES == 0;
#else
    return 0;
#endif
}

INLINE void release(const int *tiles) {
#ifdef __AMX_TILE__
    if (tiles) _tile_release();
#endif
}

// Any number of rows; tiles: see multiply_tiles, NULL if vectors compute the products.
INLINE void multiply(int dtype, int *tiles, FACTORS) {
    for (int r = 0; r < rows; r += tiles ? TILE_ROWS : ROWS) {
        const Sums *start = from + r * from_stride;
        const int n = MIN(tiles ? TILE_ROWS : ROWS, rows - r);
#ifdef __AMX_TILE__
        if (tiles) {
            multiply_tiles(dtype, tiles, n, vecs, a + r * stride, stride, b, steps, start, from_stride, sums + r);
            continue;
        }
#endif
        for (long step = 0; step < steps; step += TERMS) {
            const uint32_t *a_rows[ROWS];
            Sums part[ROWS], *to = step ? part : sums + r;
            for (int i = 0; i < n; i++) {
                a_rows[i] = (const uint32_t *)(a + (r + i) * stride) + step;
                UNROLLED for (int v = 0; v < VECS; v++)
                    to[i][v] = step ? _mm512_setzero_si512() : start[i * from_stride][v];
            }
#define PASSED n, vecs, a_rows, b + step * PANEL, MIN(TERMS, steps - step), to
            if (dtype == F32) multiply_f32(PASSED);
            if (dtype == BF16) multiply_bf16(PASSED);
            if (dtype == INT8) multiply_int8(PASSED);
            for (int i = 0; step && i < n; i++)
                UNROLLED for (int v = 0; v < VECS; v++) sums[r + i][v] = add(dtype, sums[r + i][v], part[i][v]);
        }
    }
}

// Whether products of bf16 take less time than those of fp32; on a Xeon without AMX they took longer (bench/NOTES.md).
int has_fast_bf16(void) { return in_tiles(BF16, LANES) || __builtin_cpu_is("amd"); }

/* ---- linear layers ---- */

typedef struct {  // avx512.py writes its members, all of 8 bytes
    long dtype, y_dtype, bias_dtype, activation, in_features, out_features, panels, steps;
    const uint32_t *weight;        // [panels][steps][PANEL] times four bytes; a gated panel has 32 of gate, 32 of up
    const float *scales, *totals;  // [panels * PANEL], of INT8: weight_scale and sum(weight[j]), see avx512.py
    const int32_t *starts;         // [panels * PANEL], of INT8: -128 * sum(p), since rows are stored as q + 128
    const void *bias;              // [out_features], twice as many if gated; or NULL
} Linear;

typedef struct {
    const char *first;
    long dtype, stride;
} Rows;

INLINE Rows rows_from(Rows rows, long row) {
    rows.first += row * rows.stride * size_of(rows.dtype);
    return rows;
}

typedef struct {
    float scale, middle;
} Range;

// Write q + 128 of one row; return its scale and middle, which are NaN if a value is not finite.
INLINE Range quantize(const Linear *l, int x_dtype, const void *x, uint8_t *q) {
    __m512 low = _mm512_set1_ps(__builtin_inff()), high = _mm512_set1_ps(-__builtin_inff()), zero = _mm512_setzero_ps();
    __m512 invalid = zero;  // NaN once a value is not finite
    for (long i = 0; i < l->in_features; i += LANES) {
        __mmask16 mask = first(l->in_features - i);
        __m512 x16 = load(x, i, x_dtype, mask);
        low = _mm512_mask_min_ps(low, mask, low, x16);
        high = _mm512_mask_max_ps(high, mask, high, x16);
        invalid = _mm512_fmadd_ps(x16, zero, invalid);
    }
    float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high), scale = (most - least) / 254;
    Range range = {scale > 1e-30f ? scale : 1e-30f, 0.5f * least + 0.5f * most + _mm512_reduce_add_ps(invalid)};
    __m512 middle = _mm512_set1_ps(range.middle), inverse = _mm512_set1_ps(1 / range.scale);
    for (long i = 0; i < l->steps * 4; i += LANES) {
        __m512 x16 = load(x, i, x_dtype, first(l->in_features - i));
        __m512i q16 = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(x16, middle), inverse));
        q16 = _mm512_add_epi32(q16, _mm512_set1_epi32(128));
        _mm_mask_storeu_epi8(q + i, first(l->steps * 4 - i), _mm512_cvtepi32_epi8(q16));
    }
    return range;
}

typedef struct {
    __m512 scale, total, bias;  // scale, total: of INT8
} Columns;

INLINE Columns load_columns(const Linear *l, int dtype, long panel, int v, long bias_at, __mmask16 mask) {
    Columns c = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    if (dtype == INT8) c.scale = _mm512_loadu_ps(l->scales + panel * PANEL + v * LANES);
    if (dtype == INT8) c.total = _mm512_loadu_ps(l->totals + panel * PANEL + v * LANES);
    if (l->bias) c.bias = load(l->bias, bias_at, l->bias_dtype, mask);
    return c;
}

INLINE __m512 result(int dtype, __m512i sum, Columns c, const Range *range) {  // before the activation
    __m512 y = _mm512_castsi512_ps(sum);
    if (dtype == INT8) {
        y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(c.scale, _mm512_set1_ps(range->scale)));
        y = _mm512_fmadd_ps(c.total, _mm512_set1_ps(range->middle), y);
    }
    return _mm512_add_ps(y, c.bias);
}

// Store some rows of the result, given their sums over a panel.
INLINE void finish(const Linear *l, int dtype, int activation, char *y_rows, int rows, long panel, const Sums *sums,
                   const Range *ranges) {
    const int gated = activation >= SWIGLU, stored = gated ? VECS / 2 : VECS;  // vectors
    for (int v = 0; v < stored; v++) {
        const long column = (panel * stored + v) * LANES;  // of y
        const __mmask16 mask = first(l->out_features - column);
        const Columns columns = load_columns(l, dtype, panel, v, column, mask);
        Columns up = columns;
        if (gated) up = load_columns(l, dtype, panel, v + stored, column + l->out_features, mask);
        for (int r = 0; r < rows; r++) {
            __m512 y = result(dtype, sums[r][v], columns, ranges + r);
            if (activation == GELU || activation == GEGLU) y = gelu(y);
            if (activation == GELU_TANH) y = gelu_tanh(y);
            if (activation == SWIGLU) y = times_sigmoid(y, y);
            if (gated) y = _mm512_mul_ps(y, result(dtype, sums[r][v + VECS / 2], up, ranges + r));
            store(y_rows, r * l->out_features + column, l->y_dtype, mask, y);
        }
    }
}

// Write n values as their parts, see multiply_tiles.
INLINE void split(const float *x, long n, uint16_t *parts) {
    for (long i = 0; i < n; i += LANES) {
        __m512 rest = _mm512_loadu_ps(x + i);
        for (int part = 0; part < 3; part++) {
            const long at = (i / 32 * 3 + part) * 32 + i % 32;
            store(parts, at, BF16, 0xffff, rest);
            rest = _mm512_sub_ps(rest, load(parts, at, BF16, 0xffff));
        }
    }
}

// Compute up to ROW_BLOCK rows over some panels, the inner loop over the rows: the panel stays in the cache. Of SPLIT,
// whose rows are larger, a part of the steps at a time.
INLINE void linear_block(const Linear *l, int dtype, int activation, Rows x, char *y, long rows, long panel, long end) {
    Range ranges[ROW_BLOCK];
    Sums sums[TILE_ROWS];
    int configured = 0, *tiles = in_tiles(dtype, l->steps) ? &configured : NULL;
    const int group = tiles ? TILE_ROWS : ROWS, copied = dtype == INT8 || dtype == SPLIT;
    const long y_row = l->out_features * size_of(l->y_dtype), part = dtype == SPLIT ? SPLIT_STEPS : l->steps;
    const long a_row = copied ? MIN(part, l->steps) * 4 : x.stride * size_of(x.dtype);
    char *copy = copied ? allocate(rows * a_row) : NULL;
    Sums *kept = part < l->steps ? allocate((end - panel) * rows * sizeof(Sums)) : NULL;
    for (long step = 0; step < l->steps; step += part) {
        const long steps = MIN(part, l->steps - step);
        for (long r = 0; copied && r < rows; r++) {
            const char *from = rows_from(x, r).first;
            char *to = copy + r * a_row;
            if (dtype == SPLIT) split((const float *)from + step / 3 * 2, steps / 3 * 2, (uint16_t *)to);
            else ranges[r] = quantize(l, x.dtype, from, (uint8_t *)to);
        }
        for (long p = panel; p < end; p++)
            for (long r = 0; r < rows; r += group) {
                const int n = MIN(group, rows - r);
                const char *a = (copied ? copy : x.first) + r * a_row;
                Sums *to = kept ? kept + (p - panel) * rows + r : sums;
                const Sums *start = step ? to : dtype == INT8 ? (const Sums *)(l->starts + p * PANEL) : ZERO;
                const uint32_t *weight = l->weight + (p * l->steps + step) * PANEL;
                multiply(dtype, tiles, n, VECS, a, a_row, weight, steps, start, step ? 1 : 0, to);
                if (step + steps == l->steps) finish(l, dtype, activation, y + r * y_row, n, p, to, ranges + r);
            }
    }
    release(tiles);
    free(copy);
    free(kept);
}

// FOR_ACTIVATION ends the case of its dtype. Both make constants of what they select.
#define FOR_DTYPE(CALL)                                                                                    \
    switch (l->dtype) { case F32: CALL(F32) case BF16: CALL(BF16) case INT8: CALL(INT8) case SPLIT: CALL(SPLIT) }
#define FOR_ACTIVATION(DTYPE)                                                                                  \
    switch (l->activation) {                                                                                   \
        case NONE: linear_block(l, DTYPE, NONE, x, y, rows, panel, end); break;                                \
        case GELU: linear_block(l, DTYPE, GELU, x, y, rows, panel, end); break;                                \
        case GELU_TANH: linear_block(l, DTYPE, GELU_TANH, x, y, rows, panel, end); break;                      \
        case SWIGLU: linear_block(l, DTYPE, SWIGLU, x, y, rows, panel, end); break;                            \
        case GEGLU: linear_block(l, DTYPE, GEGLU, x, y, rows, panel, end); break;                              \
    }                                                                                                          \
    break;

// The same for the dtype and the activation of l.
static void linear_panels(const Linear *l, Rows x, char *y, long rows, long panel, long end) {
    FOR_DTYPE(FOR_ACTIVATION)
}

// Return how many rows a block has, at most ROW_BLOCK, so that each thread gets as many blocks.
INLINE long block_of(long rows, int threads) {
    const long blocks = (rows + ROW_BLOCK * threads - 1) / (ROW_BLOCK * threads) * threads;
    return ((rows + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
}

// Compute rows with all threads of a parallel region, which share blocks of rows, and their panels if rows are few.
static void linear_shared(const Linear *l, Rows x, char *y, long rows, int threads) {
    const int few = rows < ROW_BLOCK * threads;
    const long block = few ? ROW_BLOCK : block_of(rows, threads), blocks = (rows + block - 1) / block;
    const long groups = few ? MIN(l->panels, threads) : 1;  // of panels
#pragma omp for schedule(dynamic)
    for (long task = 0; task < blocks * groups; task++) {
        const long row = task / groups * block, group = task % groups;
        const long panel = l->panels * group / groups, end = l->panels * (group + 1) / groups;
        char *to = y + row * l->out_features * size_of(l->y_dtype);
        linear_panels(l, rows_from(x, row), to, MIN(block, rows - row), panel, end);
    }
}

void linear(int threads, int x_dtype, long rows, long x_stride, const Linear *l, const void *x, void *y) {
    const Rows x_rows = {x, x_dtype, x_stride};
#pragma omp parallel num_threads(threads) if (threads > 1)
    linear_shared(l, x_rows, y, rows, threads);
}

/* ---- attention ---- */

typedef struct {
    long heads, head_dim, steps, stride, window, bias_stride, reach;  // steps of four bytes; stride of a token
    float scale;                                                      // of scores in powers of two
    const float *bias;                                                // see avx512.py, in powers of two; or NULL
} Attention;

// Memory of one thread, for QUERY_BLOCK queries of one head: columns are queries, in panels
typedef struct {
    uint32_t *q;                              // [panels][steps][PANEL] times four bytes
    float *out;                               // [panels][head_dim][PANEL]
    float *scores;                            // [KEY_BLOCK][PANEL], then the weights, in pairs of two keys if bf16
    uint32_t *v;                              // [head_dim][KEY_BLOCK], in the dtype of v
    int configured, *tiles;                   // see multiply
    float max[QUERY_BLOCK], sum[QUERY_BLOCK];  // of the scores and the weights up to here
} Work;

INLINE void transpose(__m512i *rows) {  // 16 rows of 16 times four bytes
    __m512i t[LANES];
    UNROLLED for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLLED for (int i = 0; i < LANES; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    UNROLLED for (int j = 0; j < 4; j++) {
        __m512i even = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xdd);
        __m512i even8 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x88);
        __m512i odd8 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(even, even8, 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(odd, odd8, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(even, even8, 0xdd);
        t[12 + j] = _mm512_shuffle_i32x4(odd, odd8, 0xdd);
    }
    memcpy(rows, t, sizeof t);
}

// Write n rows as columns, [steps][width] times four bytes, and zeros up to a multiple of 32 columns; with halves, as
// [2 * steps][width] times two bytes.
INLINE void pack_columns(int dtype, const char *from, long stride, int n, long steps, uint32_t *to, long width,
                         int halves) {
    __m512i rows[LANES];
    for (int i = 0; i < (n + 31) / 32 * 32; i += LANES)
        for (long step = 0; step < steps; step += LANES) {
            for (int r = 0; r < LANES; r++) {
                __mmask16 mask = i + r < n ? first(steps - step) : 0;
                rows[r] = _mm512_maskz_loadu_epi32(mask, from + (i + r) * stride * size_of(dtype) + step * 4);
            }
            transpose(rows);
            for (int r = 0; r < MIN(LANES, steps - step); r++) {
                uint32_t *row = to + (step + r) * width;
                if (!halves) _mm512_storeu_si512(row + i, rows[r]);
                else for (int half = 0; half < 2; half++) {
                    __m256i column = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rows[r], 16 * half));
                    _mm256_storeu_si256((__m256i *)((uint16_t *)row + half * width + i), column);
                }
            }
        }
}

// Replace a column of 16 x n scores by their weights exp2(scale * score - max), bf16 with zeros up to a multiple of 32
// keys, and return sum + their sum.
INLINE __m512 weigh(int dtype, float *scores, int n, __m512 scale, __m512 max, __m512 sum) {
    float *to = scores;
    for (int j = 0; j < n; j += dtype == F32 ? 1 : 2, to += PANEL) {
        __m512 weight = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j * PANEL), scale, max));
        sum = _mm512_add_ps(sum, weight);
        if (dtype == F32) {
            _mm512_storeu_ps(to, weight);
            continue;
        }
        __m512 second = _mm512_setzero_ps();
        if (j + 1 < n) second = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + (j + 1) * PANEL), scale, max));
        sum = _mm512_add_ps(sum, second);
        _mm512_storeu_si512(to, to_pairs(weight, second));
    }
    for (; dtype == BF16 && (to - scores) % (LANES * PANEL); to += PANEL) _mm512_storeu_ps(to, _mm512_setzero_ps());
    return sum;
}

// Add n keys, k being the first one's row, to the sums of a panel of queries. bias: of the first query and that key.
INLINE void attend(const Attention *a, int dtype, Work *w, int panel, int vecs, const char *k, int n,
                   const float *bias) {
    const long size = size_of(dtype);
    __m512 scale = _mm512_set1_ps(a->scale), max[VECS], decay[VECS];
    int decays = 0;
    multiply(dtype, w->tiles, n, vecs, k, a->stride * size, w->q + panel * a->steps * PANEL, a->steps, ZERO, 0,
             (Sums *)w->scores);
    for (int v = 0; v < vecs; v++) max[v] = _mm512_set1_ps(-__builtin_inff());
    for (int j = 0; j < n; j++)
        for (int v = 0; v < vecs; v++) {
            float *at = w->scores + j * PANEL + v * LANES;
            __m512 score = _mm512_loadu_ps(at);
            if (bias) {
                score = _mm512_fmadd_ps(score, scale, _mm512_loadu_ps(bias + v * LANES - j));
                _mm512_storeu_ps(at, score);
            }
            max[v] = _mm512_max_ps(max[v], score);
        }
    if (bias) scale = _mm512_set1_ps(1.f);
    for (int v = 0; v < vecs; v++) {
        float *old = w->max + panel * PANEL + v * LANES, *sum = w->sum + panel * PANEL + v * LANES;
        max[v] = _mm512_max_ps(_mm512_loadu_ps(old), _mm512_mul_ps(max[v], scale));
        decay[v] = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(old), max[v]));
        decays |= _mm512_cmp_ps_mask(decay[v], _mm512_set1_ps(1.f), _CMP_NEQ_UQ);
        __m512 before = _mm512_mul_ps(_mm512_loadu_ps(sum), decay[v]);
        _mm512_storeu_ps(sum, weigh(dtype, w->scores + v * LANES, n, scale, max[v], before));
        _mm512_storeu_ps(old, max[v]);
    }
    float *out = w->out + panel * a->head_dim * PANEL;
    for (long d = 0; decays && d < a->head_dim; d++)
        for (int v = 0; v < vecs; v++) {
            float *at = out + d * PANEL + v * LANES;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), decay[v]));
        }
    const long steps = dtype == F32 ? n : w->tiles ? (n + 31) / 32 * LANES : (n + 1) / 2;
    multiply(dtype, w->tiles, a->head_dim, vecs, (char *)w->v, KEY_BLOCK * size, (uint32_t *)w->scores, steps,
             (Sums *)out, 1, (Sums *)out);
}

// Compute one head of up to QUERY_BLOCK queries from `begin` on, of a text whose rows of packed qkv and results begin
// at `qkv` and `out`.
INLINE void attention_block(const Attention *a, int dtype, Work *w, const char *qkv, char *out, long length, long keys,
                            long head, long begin) {
    const long size = size_of(dtype), token = a->stride * size, end = MIN(begin + QUERY_BLOCK, length);
    const char *q = qkv + head * a->head_dim * size, *k = q + token / 3, *v = k + token / 3;
    __m512i rows[LANES];
    w->configured = 0;
    w->tiles = dtype == BF16 && in_tiles(dtype, a->steps) ? &w->configured : NULL;
    for (long i = begin; i < end; i += PANEL)
        pack_columns(dtype, q + i * token, a->stride, MIN(PANEL, end - i), a->steps, w->q + (i - begin) * a->steps,
                     PANEL, 0);
    memset(w->out, 0, (end - begin + PANEL - 1) / PANEL * a->head_dim * PANEL * 4);
    for (long i = 0; i < end - begin; i += LANES) {
        _mm512_storeu_ps(w->max + i, _mm512_set1_ps(-1e30f));
        _mm512_storeu_ps(w->sum + i, _mm512_setzero_ps());
    }
    const long reach = a->window < 0 ? length : a->window, first_key = begin > reach ? begin - reach : 0;
    for (long key = first_key; key < MIN(keys, end + reach); key += KEY_BLOCK) {
        const int n = MIN(KEY_BLOCK, MIN(keys, end + reach) - key);
        pack_columns(dtype, v + key * token, a->stride, n, a->steps, w->v, KEY_BLOCK, dtype == BF16);
        for (long query = begin; query < end; query += PANEL) {
            const long last = MIN(query + PANEL, end) - 1;
            if (key > last + reach || key + n <= query - reach) continue;
            const float *bias = a->bias ? a->bias + head * a->bias_stride + a->reach + query - key : NULL;
            attend(a, dtype, w, (query - begin) / PANEL, (last - query) / LANES + 1, k + key * token, n, bias);
        }
    }
    release(w->tiles);
    for (long i = begin; i < end; i += LANES) {
        __m512 sum = _mm512_loadu_ps(w->sum + i - begin), one = _mm512_set1_ps(1.f);
        __m512 inverse = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ), one, sum);
        for (long d = 0; d < a->head_dim; d += LANES) {
            const float *from = w->out + ((i - begin) / PANEL * a->head_dim + d) * PANEL + (i - begin) % PANEL;
            for (int r = 0; r < LANES; r++) {
                __m512 row = _mm512_maskz_loadu_ps(d + r < a->head_dim ? 0xffff : 0, from + r * PANEL);
                rows[r] = _mm512_castps_si512(_mm512_mul_ps(row, inverse));
            }
            transpose(rows);
            for (int r = 0; r < MIN(LANES, end - i); r++) {
                const long at = ((i + r) * a->heads + head) * a->head_dim + d;
                store(out, at, dtype, first(a->head_dim - d), _mm512_castsi512_ps(rows[r]));
            }
        }
    }
}

void attention(int threads, int dtype, long heads, long head_dim, long texts, long window, long bias_stride, long reach,
               float scale, const void *qkv, void *out, const int32_t *cu_seqlens, const int32_t *key_lengths,
               const float *bias) {
    const long size = size_of(dtype);
    const Attention a = {heads, head_dim, head_dim * size / 4, 3 * heads * head_dim, window, bias_stride, reach,
                         scale * 1.4426950408889634f, bias};
    long *tasks = allocate((texts + 1) * sizeof(long)), longest = 0;  // [texts + 1], the first task of each text
    tasks[0] = 0;
    for (long text = 0; text < texts; text++) {
        const long length = cu_seqlens[text + 1] - cu_seqlens[text];
        longest = length > longest ? length : longest;
        tasks[text + 1] = tasks[text] + heads * ((length + QUERY_BLOCK - 1) / QUERY_BLOCK);
    }
    const long panels = (MIN(longest, QUERY_BLOCK) + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Work w;
        w.q = allocate(((panels * (a.steps + head_dim) + KEY_BLOCK) * PANEL + KEY_BLOCK * head_dim) * 4);
        w.out = (float *)w.q + panels * PANEL * a.steps;
        w.scores = w.out + panels * PANEL * head_dim;
        w.v = (uint32_t *)w.scores + KEY_BLOCK * PANEL;
        long text = 0;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks[texts]; task++) {
            while (task >= tasks[text + 1]) text++;
            while (task < tasks[text]) text--;
            const long start = cu_seqlens[text], length = cu_seqlens[text + 1] - start;
            const long keys = key_lengths ? key_lengths[text] : length, block = (task - tasks[text]) / heads;
            const char *from = (const char *)qkv + start * a.stride * size;
            char *to = (char *)out + start * heads * head_dim * size;
            if (dtype == F32) attention_block(&a, F32, &w, from, to, length, keys, task % heads, block * QUERY_BLOCK);
            else attention_block(&a, BF16, &w, from, to, length, keys, task % heads, block * QUERY_BLOCK);
        }
        free(w.q);
    }
    free(tasks);
}

/* ---- rotary embedding ---- */

// Rotate q and k of packed qkv in place, [tokens][3][heads][head_dim]; cos_sin: [tokens][head_dim] fp32.
void rotary(int threads, int dtype, long tokens, long heads, long head_dim, void *qkv, const float *cos_sin) {
    const long half = head_dim / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens >= 64)
    for (long row = 0; row < tokens * 2 * heads; row++) {
        const long token = row / (2 * heads), at = (row + token * heads) * head_dim;
        for (long d = 0; d < half; d += LANES) {
            const __mmask16 mask = first(half - d);
            __m512 x = load(qkv, at + d, dtype, mask), y = load(qkv, at + half + d, dtype, mask);
            __m512 cos = load(cos_sin, token * head_dim + d, F32, mask);
            __m512 sin = load(cos_sin, token * head_dim + half + d, F32, mask);
            store(qkv, at + d, dtype, mask, _mm512_fmsub_ps(x, cos, _mm512_mul_ps(y, sin)));
            store(qkv, at + half + d, dtype, mask, _mm512_fmadd_ps(y, cos, _mm512_mul_ps(x, sin)));
        }
    }
}

/* ---- maxima of logits ---- */

// Set y[text][row] to the maximum of max_t x[t] . weight[row] over the tokens of each text, for some rows of weight.
INLINE void maxima_block(int dtype, long texts, long steps, long vocabulary, long x_stride, long weight_stride,
                         const char *x, const char *weight, const int32_t *cu_seqlens, long row, long end,
                         uint32_t *panel, float *y) {
    int configured = 0, *tiles = dtype == BF16 && in_tiles(dtype, steps) ? &configured : NULL;
    const int group = tiles ? TILE_ROWS : ROWS;
    const long size = size_of(dtype);
    for (long text = 0; text < texts; text++)
        for (long token = cu_seqlens[text]; token < cu_seqlens[text + 1]; token += PANEL) {
            const int n = MIN(PANEL, cu_seqlens[text + 1] - token), vecs = (n + LANES - 1) / LANES;
            pack_columns(dtype, x + token * x_stride * size, x_stride, n, steps, panel, PANEL, 0);
            for (long i = row; i < end; i += group) {
                const int count = MIN(group, end - i);
                Sums sums[TILE_ROWS];
                multiply(dtype, tiles, count, vecs, weight + i * weight_stride * size, weight_stride * size, panel,
                         steps, ZERO, 0, sums);
                for (int r = 0; r < count; r++) {
                    float *to = y + text * vocabulary + i + r;
                    __m512 max = _mm512_set1_ps(*to);
                    __mmask16 invalid = _mm512_cmp_ps_mask(max, max, _CMP_UNORD_Q);
                    for (int v = 0; v < vecs; v++) {
                        const __m512 logits = _mm512_castsi512_ps(sums[r][v]);
                        max = _mm512_mask_max_ps(max, first(n - v * LANES), max, logits);
                        invalid |= _mm512_cmp_ps_mask(logits, logits, _CMP_UNORD_Q);
                    }
                    *to = invalid ? __builtin_nanf("") : _mm512_reduce_max_ps(max);
                }
            }
        }
    release(tiles);
}

void maxima(int threads, int dtype, long texts, long hidden, long vocabulary, long x_stride, long weight_stride,
            const void *x, const void *weight, const int32_t *cu_seqlens, float *y) {
    const long steps = hidden * size_of(dtype) / 4, blocks = (vocabulary + VOCABULARY_BLOCK - 1) / VOCABULARY_BLOCK;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint32_t *panel = allocate(steps * PANEL * 4);
#pragma omp for schedule(dynamic)
        for (long block = 0; block < blocks; block++) {
            const long row = block * VOCABULARY_BLOCK, end = MIN(row + VOCABULARY_BLOCK, vocabulary);
#define SIZES texts, steps, vocabulary, x_stride, weight_stride
            if (dtype == F32) maxima_block(F32, SIZES, x, weight, cu_seqlens, row, end, panel, y);
            else maxima_block(BF16, SIZES, x, weight, cu_seqlens, row, end, panel, y);
        }
        free(panel);
    }
}

/* ---- norms ---- */

typedef struct {  // avx512.py writes its members, all of 8 bytes
    long dtype, hidden;         // dtype: of the weight, the bias and the results
    const void *weight, *bias;  // [hidden]; a LayerNorm has a bias, an RMSNorm NULL
} Norm;

// Normalize a row of x + residual. residual.first, and total for that sum, may be NULL.
static void norm_row(const Norm *n, float eps, Rows x, Rows residual, char *y, char *total, long row) {
    const int dtype = n->dtype;
    const long hidden = n->hidden, at = row * hidden, x_at = row * x.stride, residual_at = row * residual.stride;
    float h[hidden + LANES];
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (long i = 0; i < hidden; i += LANES) {
        __mmask16 mask = first(hidden - i);
        __m512 h16 = load(x.first, x_at + i, x.dtype, mask);
        if (residual.first) h16 = _mm512_add_ps(h16, load(residual.first, residual_at + i, residual.dtype, mask));
        if (total) store(total, at + i, dtype, mask, h16);
        _mm512_storeu_ps(h + i, h16);
        sum = _mm512_add_ps(sum, h16);
    }
    const __m512 mean = _mm512_set1_ps(n->bias ? _mm512_reduce_add_ps(sum) / hidden : 0);
    for (long i = 0; i < hidden; i += LANES) {
        __m512 centered = _mm512_maskz_sub_ps(first(hidden - i), _mm512_loadu_ps(h + i), mean);
        squares = _mm512_fmadd_ps(centered, centered, squares);
    }
    const __m512 rstd = _mm512_set1_ps(1 / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / hidden + eps));
    for (long i = 0; i < hidden; i += LANES) {
        __mmask16 mask = first(hidden - i);
        __m512 y16 = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(h + i), mean), rstd);
        y16 = _mm512_mul_ps(y16, load(n->weight, i, dtype, mask));
        if (n->bias) y16 = _mm512_add_ps(y16, load(n->bias, i, dtype, mask));
        store(y, at + i, dtype, mask, y16);
    }
}

void norm(int threads, long rows, float eps, long dtype, long hidden, const void *weight, const void *bias,
          long x_stride, const void *x, long residual_stride, const void *residual, void *y, void *total) {
    const Norm n = {dtype, hidden, weight, bias};
    const Rows from = {x, dtype, x_stride}, added = {residual, dtype, residual_stride};
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * hidden >= 1 << 16)
    for (long row = 0; row < rows; row++) norm_row(&n, eps, from, added, y, total, row);
}

/* ---- before the layers, and after them ---- */

typedef struct {
    long stride;
    const void *rows;    // or NULL
    const int32_t *ids;  // of each token; NULL for 0
} Table;

// Normalize the sums of each token's rows of three tables, of the norm's dtype.
void embedding(int threads, long tokens, float eps, long dtype, long hidden, const void *weight, const void *bias,
               const Table *tables, void *y) {
    const Norm n = {dtype, hidden, weight, bias};
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * hidden >= 1 << 16)
    for (long token = 0; token < tokens; token++) {
        float sums[hidden + LANES];
        const Rows from = {(const char *)sums, F32, 0}, added = {NULL, F32, 0};
        for (long i = 0; i < hidden; i += LANES) {
            __m512 sum = _mm512_setzero_ps();
            for (int t = 0; t < 3; t++) {
                if (!tables[t].rows) continue;
                const long id = tables[t].ids ? tables[t].ids[token] : 0;
                sum = _mm512_add_ps(sum, load(tables[t].rows, id * tables[t].stride + i, dtype, first(hidden - i)));
            }
            _mm512_storeu_ps(sums + i, sum);
        }
        norm_row(&n, eps, from, added, (char *)y + token * hidden * size_of(dtype), NULL, 0);
    }
}

// y[text] = mean of its rows of x, 0 without any. A sum adds up those of chunks of up to TERMS rows.
void mean_pool(int threads, int dtype, long texts, long hidden, long x_stride, const void *x, const int32_t *cu_seqlens,
               float *y) {
    const long blocks = (hidden + PANEL - 1) / PANEL;  // of columns
    const int many = threads > 1 && cu_seqlens[texts] * hidden >= 1 << 16;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (many)
    for (long task = 0; task < texts * blocks; task++) {
        const long text = task / blocks, begin = task % blocks * PANEL, end = cu_seqlens[text + 1];
        __m512 sums[VECS];
        for (int v = 0; v < VECS; v++) sums[v] = _mm512_setzero_ps();
        for (long row = cu_seqlens[text]; row < end; row += TERMS) {
            __m512 part[VECS];
            for (int v = 0; v < VECS; v++) part[v] = _mm512_setzero_ps();
            for (long token = row; token < MIN(end, row + TERMS); token++)
                UNROLLED for (int v = 0; v < VECS; v++) {
                    const long i = begin + v * LANES;
                    part[v] = _mm512_add_ps(part[v], load(x, token * x_stride + i, dtype, first(hidden - i)));
                }
            for (int v = 0; v < VECS; v++) sums[v] = _mm512_add_ps(sums[v], part[v]);
        }
        const long rows = end - cu_seqlens[text];
        const __m512 number = _mm512_set1_ps(rows ? rows : 1);
        for (int v = 0; v < VECS; v++) {
            const long i = begin + v * LANES;
            store(y, text * hidden + i, F32, first(hidden - i), _mm512_div_ps(sums[v], number));
        }
    }
}

/* ---- a layer ---- */

typedef struct {  // avx512.py writes its members, all of 8 bytes
    Linear qkv, out, up, down;
    Norm attention_norm, mlp_norm;
    long heads;
} Layer;

// Compute rows with all threads of a parallel region, or up to ROW_BLOCK rows with this one alone if threads is 0.
INLINE void linear_step(const Linear *l, Rows x, char *y, long rows, int threads) {
    if (threads) linear_shared(l, x, y, rows, threads);
    else linear_panels(l, x, y, rows, 0, l->panels);
}

INLINE void norm_step(const Norm *n, float eps, Rows x, Rows residual, char *y, char *total, long rows, int threads) {
    if (threads) {
#pragma omp for
        for (long row = 0; row < rows; row++) norm_row(n, eps, x, residual, y, total, row);
    } else
        for (long row = 0; row < rows; row++) norm_row(n, eps, x, residual, y, total, row);
}

// Compute rows of x and of total, the next residual, which is NULL in a post-norm encoder; threads: as above.
static void after_attention_rows(const Layer *l, float eps, Rows attended, Rows residual, char *x, char *total,
                                 long rows, char *work, int threads) {
    const long dtype = l->attention_norm.dtype, hidden = l->attention_norm.hidden;
    const long size = rows * hidden * size_of(dtype);
    char *projected = work, *normed = work + size, *sum = total ? normed + size : NULL, *up = normed + 2 * size;
    const Rows to_norm = {projected, dtype, hidden}, to_up = {normed, dtype, hidden};
    const Rows to_down = {up, l->up.y_dtype, l->up.out_features}, to_add = {sum ? sum : normed, dtype, hidden};
    linear_step(&l->out, attended, projected, rows, threads);
    norm_step(&l->attention_norm, eps, to_norm, residual, normed, sum, rows, threads);
    linear_step(&l->up, to_up, up, rows, threads);
    linear_step(&l->down, to_down, projected, rows, threads);
    norm_step(&l->mlp_norm, eps, to_norm, to_add, x, total, rows, threads);
}

// What follows attention. Threads share every step if rows are few. Otherwise each computes blocks, and intermediate
// results stay in its cache.
static void after_attention(int threads, long rows, float eps, const Layer *l, Rows attended, Rows residual, char *x,
                            char *total) {
    const long dtype = l->attention_norm.dtype, row_size = l->attention_norm.hidden * size_of(dtype);
    const int few = rows < ROW_BLOCK * threads;
    const long block = few ? rows : block_of(rows, threads);
    const long work_size = block * (3 * row_size + l->up.out_features * size_of(l->up.y_dtype));
    char *work = few ? allocate(work_size) : NULL;
#pragma omp parallel num_threads(threads) if (threads > 1)
    if (few)
        after_attention_rows(l, eps, attended, residual, x, total, rows, work, threads);
    else {
        char *own = allocate(work_size);
#pragma omp for schedule(dynamic)
        for (long row = 0; row < rows; row += block)
            after_attention_rows(l, eps, rows_from(attended, row), rows_from(residual, row), x + row * row_size,
                                 total ? total + row * row_size : NULL, MIN(block, rows - row), own, 0);
        free(own);
    }
    free(work);
}

static Rows gather(Rows rows, long hidden, long n, const int32_t *selected) {
    const long size = hidden * size_of(rows.dtype);
    char *to = allocate(n * size);
    for (long i = 0; i < n; i++) memcpy(to + i * size, rows_from(rows, selected[i]).first, size);
    return (Rows){to, rows.dtype, hidden};
}

// Store the results of the `rows` selected tokens in y and total; selected NULL: of all, and y and total may be x and
// residual. memory: for qkv and the result of attention.
void layer(int threads, long tokens, long rows, float eps, long texts, long window, long bias_stride, long reach,
           float scale, const Layer *l, const void *x, const void *residual, const float *cos_sin,
           const int32_t *selected, void *memory, void *y, void *total, const int32_t *cu_seqlens,
           const int32_t *key_lengths, const float *bias) {
    const long dtype = l->attention_norm.dtype, hidden = l->attention_norm.hidden, head_dim = hidden / l->heads;
    char *attended = (char *)memory + 3 * tokens * hidden * size_of(l->qkv.y_dtype);
    Rows out = {attended, l->qkv.y_dtype, hidden}, added = {residual, dtype, hidden};
    linear(threads, dtype, tokens, hidden, &l->qkv, x, memory);
    if (cos_sin) rotary(threads, out.dtype, tokens, l->heads, head_dim, memory, cos_sin);
    attention(threads, out.dtype, l->heads, head_dim, texts, window, bias_stride, reach, scale, memory, attended,
              cu_seqlens, key_lengths, bias);
    if (selected) out = gather(out, hidden, rows, selected), added = gather(added, hidden, rows, selected);
    after_attention(threads, rows, eps, l, out, added, y, total);
    if (selected) free((char *)out.first), free((char *)added.first);
}
