/* The kernel of bank_rows.py: y += B_n A_n x for tokens of many adapters, up to eight of one at a
   time.

   Compiled where it runs, for its processor (native.py). NUMBER_FP32: fp32 tables and activations,
   else bf16; sums are in fp32, and y is rounded once.

   Shape legend as in bank_stretches.py: S tokens, D features in, L layers, O features out of all,
   C pieces of a rank, 16 terms each, E = 16 L. A (N, C, D, E), B (N, C, 16, O), u (S, C, E). */
#include <stddef.h>
#include <stdint.h>

#ifndef __AVX512F__
#error "without AVX-512 PyTorch's operations are quicker" /* 16 registers hold no block's sums */
#endif

#define TERMS 16
#define LANES 16
#define MOST_TOKENS 8 /* of a block: with two vectors each, 16 of 32 registers are sums */
#define MOST_VECTORS 4
#define COLUMNS 512 /* of y, in one step of the second loop */
#define LINE 64 /* bytes */
#define AHEAD 2048 /* bytes that rows of A are asked for before they are read */
#define AHEAD_B (4 * LINE) /* the same of B, of which 16 rows are read side by side */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
#define INLINE static inline __attribute__((always_inline))

#ifdef NUMBER_FP32
typedef float number;

INLINE floats load(const number *p)
{
    floats found;
    __builtin_memcpy(&found, p, sizeof found);
    return found;
}

INLINE void store(number *p, floats values) { __builtin_memcpy(p, &values, sizeof values); }
#else
typedef uint16_t number;

INLINE floats load(const number *p)
{
    halves found;
    __builtin_memcpy(&found, p, sizeof found);
    return (floats)(__builtin_convertvector(found, words) << 16);
}

INLINE void store(number *p, floats values)
{
    words bits = (words)values, is_nan = (words)(values != values);
    words rounded = bits + 0x7fff + ((bits >> 16) & 1); /* to nearest, ties to even */
    rounded = (is_nan & 0x7fc00000u) | (~is_nan & rounded);
    halves found = __builtin_convertvector(rounded >> 16, halves);
    __builtin_memcpy(p, &found, sizeof found);
}
#endif

/* The first `count` of LANES numbers: what lies behind a row's end is not touched. */
INLINE floats load_some(const number *p, int64_t count)
{
    number some[LANES] = {0};
    __builtin_memcpy(some, p, (size_t)count * sizeof *p);
    return load(some);
}

INLINE void store_some(number *p, floats values, int64_t count)
{
    number some[LANES];
    store(some, values);
    __builtin_memcpy(p, some, (size_t)count * sizeof *p);
}

typedef struct {
    int64_t slot, first, tokens, pieces;
} block; /* up to MOST_TOKENS tokens of one slot */

typedef struct {
    const number *a, *b;
    int64_t features, layers, slot_pieces, sum_of_sizes;
    const int64_t *ends; /* (L,) of each layer in O */
} tables;

typedef struct {
    tables in;
    number *y;
    const number *x;
    int64_t stride_y, stride_x;
    float *u, *wide_x; /* room for u (S, C, E), and of each thread for x (MOST_TOKENS, D) in fp32 */
} operands;

/* u (tokens, vectors * LANES) = x A. With constant sizes the sums are registers. */
INLINE void down(const int tokens, const int vectors, const float *x, const number *a, float *u,
                 int64_t features, int64_t stride_a, int64_t stride_u)
{
    floats sums[MOST_TOKENS][MOST_VECTORS];
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++) sums[t][v] = (floats){0};
    for (int64_t d = 0; d < features; d++, a += stride_a) {
        floats row[MOST_VECTORS];
        __builtin_prefetch((const char *)a + AHEAD);
        for (int v = 0; v < vectors; v++) row[v] = load(a + v * LANES);
        for (int t = 0; t < tokens; t++)
            for (int v = 0; v < vectors; v++) sums[t][v] += row[v] * x[t * features + d];
    }
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++)
            __builtin_memcpy(u + t * stride_u + v * LANES, &sums[t][v], sizeof(floats));
}

/* y (tokens, vectors * LANES, or `some` of one vector) += the sum over pieces of u B. */
INLINE void up(const int tokens, const int vectors, int64_t some, const operands *of,
               const block *own, int64_t layer, int64_t column)
{
    const int64_t each = of->in.layers * TERMS, stride_u = of->in.slot_pieces * each;
    const float *u = of->u + own->first * stride_u + layer * TERMS;
    const int64_t stride_b = of->in.sum_of_sizes;
    const number *b = of->in.b + own->slot * of->in.slot_pieces * TERMS * stride_b + column;
    number *y = of->y + own->first * of->stride_y + column;
    floats sums[MOST_TOKENS][MOST_VECTORS];
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++) {
            const number *at = y + t * of->stride_y + v * LANES;
            sums[t][v] = some ? load_some(at, some) : load(at);
        }
    for (int64_t piece = 0; piece < own->pieces; piece++, u += each)
        for (int term = 0; term < TERMS; term++, b += stride_b) {
            floats row[MOST_VECTORS];
            for (int v = 0; v < vectors; v += LINE / (int)sizeof(number) / LANES)
                __builtin_prefetch((const char *)(b + v * LANES) + AHEAD_B);
            for (int v = 0; v < vectors; v++)
                row[v] = some ? load_some(b, some) : load(b + v * LANES);
            for (int t = 0; t < tokens; t++)
                for (int v = 0; v < vectors; v++) sums[t][v] += row[v] * u[t * stride_u + term];
        }
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++) {
            number *at = y + t * of->stride_y + v * LANES;
            if (some) store_some(at, sums[t][v], some);
            else store(at, sums[t][v]);
        }
}

#define BY_VECTORS(call, tokens, count, ...)                  \
    switch (count) {                                          \
    case 1: call(tokens, 1, __VA_ARGS__); break;              \
    case 2: call(tokens, 2, __VA_ARGS__); break;              \
    case 3: call(tokens, 3, __VA_ARGS__); break;              \
    default: call(tokens, 4, __VA_ARGS__);                    \
    }
/* Blocks have 1 to 4 tokens, or 8. */
#define BY_SIZES(call, tokens, vectors, ...)                            \
    switch (tokens) {                                                   \
    case 1: BY_VECTORS(call, 1, vectors, __VA_ARGS__) break;            \
    case 2: BY_VECTORS(call, 2, vectors, __VA_ARGS__) break;            \
    case 3: BY_VECTORS(call, 3, vectors, __VA_ARGS__) break;            \
    case 4: BY_VECTORS(call, 4, vectors, __VA_ARGS__) break;            \
    default: BY_VECTORS(call, MOST_TOKENS, vectors, __VA_ARGS__)        \
    }

static void down_block(const operands *of, const block *own, int thread)
{
    const int64_t each = of->in.layers * TERMS, stride_u = of->in.slot_pieces * each;
    const int64_t wide = own->tokens > 4 ? 3 * LANES : MOST_VECTORS * LANES;
    const int64_t features = of->in.features;
    float *x = of->wide_x + (int64_t)thread * MOST_TOKENS * features;
    for (int64_t t = 0; t < own->tokens; t++) {
        const number *from = of->x + (own->first + t) * of->stride_x;
        for (int64_t d = 0; d < features; d += LANES) {
            int64_t count = features - d < LANES ? features - d : LANES;
            floats values = count < LANES ? load_some(from + d, count) : load(from + d);
            __builtin_memcpy(x + t * features + d, &values, (size_t)count * sizeof(float));
        }
    }
    for (int64_t piece = 0; piece < own->pieces; piece++) {
        const number *a = of->in.a + (own->slot * of->in.slot_pieces + piece) * features * each;
        float *u = of->u + own->first * stride_u + piece * each;
        for (int64_t e = 0; e < each; e += wide) {
            int64_t vectors = (each - e < wide ? each - e : wide) / LANES;
            BY_SIZES(down, own->tokens, vectors, x, a + e, u + e, features, each, stride_u)
        }
    }
}

static void up_columns(const operands *of, const block *own, int64_t left, int64_t right)
{
    const int64_t wide = own->tokens > 4 ? 2 * LANES : MOST_VECTORS * LANES;
    for (int64_t layer = 0, begin = 0; layer < of->in.layers; begin = of->in.ends[layer++]) {
        int64_t column = begin > left ? begin : left;
        int64_t last = of->in.ends[layer] < right ? of->in.ends[layer] : right;
        for (; column + LANES <= last; column += wide) {
            int64_t vectors = (last - column < wide ? last - column : wide) / LANES;
            BY_SIZES(up, own->tokens, vectors, 0, of, own, layer, column)
            if (vectors * LANES < wide) {
                column += vectors * LANES;
                break;
            }
        }
        if (column < last) BY_SIZES(up, own->tokens, 1, last - column, of, own, layer, column)
    }
}

extern int omp_get_thread_num(void);

/* `room` has S * C E + threads * MOST_TOKENS * D numbers. */
void add_rows(const tables *in, number *y, int64_t stride_y, const number *x, int64_t stride_x,
              float *room, int64_t tokens, const block *blocks, int64_t count, int threads)
{
    const int64_t each = in->slot_pieces * in->layers * TERMS;
    const int64_t parts = (in->sum_of_sizes + COLUMNS - 1) / COLUMNS;
    const operands of = {*in, y, x, stride_y, stride_x, room, room + tokens * each};
#pragma omp parallel num_threads(threads)
    if (count >= threads) {
        /* Each block by one thread, which need not wait for the others in between. */
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            down_block(&of, blocks + i, omp_get_thread_num());
            up_columns(&of, blocks + i, 0, in->sum_of_sizes);
        }
    } else {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) down_block(&of, blocks + i, omp_get_thread_num());
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * parts; i++) {
            int64_t left = i % parts * COLUMNS, right = left + COLUMNS;
            up_columns(&of, blocks + i / parts, left,
                       right < in->sum_of_sizes ? right : in->sum_of_sizes);
        }
    }
}
