/* The sums of lanes.py for words in the host's memory, at the speed of the memory. It needs no header of Python: lanes.py
   loads what setup.py makes of it with ctypes, and does without where there is none.

   The factor m of a block leaves the sum over its words: Σ v·t·m = m·Σ v·t. So the inner loop multiplies words by a piece
   of the table that stays in the cache, and four rows of words read that piece at once. */

#include <stdint.h>

#define LANES 2
#define ROWS 4
#define MOST_COLUMNS 16384 /* 16 bytes each: COLUMNS of lanes.py, in half of a core's second cache */

typedef int16_t __attribute__((aligned(1), may_alias)) word16; /* a mapped file need not be aligned */
typedef int32_t __attribute__((aligned(1), may_alias)) word32;

/* Sums of four rows of `count` words by both lanes' numbers of the table. */
#define SUM(TARGET, NAME, WORD)                                                                                        \
    TARGET static void NAME(const char *const rows[ROWS], const uint64_t *t, const uint64_t *u, int64_t count,         \
                            uint64_t sums[ROWS][LANES]) {                                                              \
        const WORD *p = (const WORD *)rows[0], *q = (const WORD *)rows[1];                                             \
        const WORD *r = (const WORD *)rows[2], *s = (const WORD *)rows[3];                                             \
        uint64_t pt = 0, pu = 0, qt = 0, qu = 0, rt = 0, ru = 0, st = 0, su = 0;                                       \
        for (int64_t i = 0; i < count; i++) {                                                                          \
            uint64_t a = (uint64_t)(int64_t)p[i], b = (uint64_t)(int64_t)q[i];                                         \
            uint64_t c = (uint64_t)(int64_t)r[i], d = (uint64_t)(int64_t)s[i];                                         \
            pt += a * t[i], pu += a * u[i];                                                                            \
            qt += b * t[i], qu += b * u[i];                                                                            \
            rt += c * t[i], ru += c * u[i];                                                                            \
            st += d * t[i], su += d * u[i];                                                                            \
        }                                                                                                              \
        sums[0][0] = pt, sums[0][1] = pu, sums[1][0] = qt, sums[1][1] = qu;                                            \
        sums[2][0] = rt, sums[2][1] = ru, sums[3][0] = st, sums[3][1] = su;                                            \
    }

static inline uint64_t odd_number(uint64_t index) { /* splitmix64 with seed 0, made odd */
    uint64_t z = (index + 1) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return (z ^ (z >> 31)) | 1;
}

#define FILL(TARGET, NAME)                                                                                             \
    TARGET static void NAME(uint64_t *numbers, uint64_t first, int64_t count) {                                        \
        for (int64_t i = 0; i < count; i++)                                                                            \
            numbers[i] = odd_number(first + (uint64_t)i);                                                              \
    }

typedef struct {
    void (*fill)(uint64_t *, uint64_t, int64_t);
    void (*sum[3])(const char *const *, const uint64_t *, const uint64_t *, int64_t, uint64_t (*)[LANES]);
} loops; /* the sums are of words of 1, 2 and 4 bytes */

#define LOOPS(TARGET, NAME)                                                                                            \
    FILL(TARGET, NAME##_fill)                                                                                          \
    SUM(TARGET, NAME##_8, uint8_t)                                                                                     \
    SUM(TARGET, NAME##_16, word16)                                                                                     \
    SUM(TARGET, NAME##_32, word32)                                                                                     \
    static const loops NAME = {NAME##_fill, {NAME##_8, NAME##_16, NAME##_32}};

LOOPS(, plain)
#if defined(__x86_64__)
LOOPS(__attribute__((target("avx2"))), with_avx2)
LOOPS(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))), with_avx512)
#endif

/* The fastest that this CPU and its operating system can run. */
static const loops *best(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return &with_avx512;
    if (__builtin_cpu_supports("avx2"))
        return &with_avx2;
#endif
    return &plain;
}

typedef struct { /* rows that wait for each other: of words as wide, as many, in the same columns */
    int waiting;
    int64_t width, column, count;
    const char *words[ROWS];
    uint64_t *sums[ROWS], rows[ROWS];
} group;

static void add_up(const loops *l, group *g, uint64_t table[LANES][MOST_COLUMNS], int64_t block) {
    uint64_t found[ROWS][LANES];
    if (g->waiting == 0)
        return;
    for (int i = g->waiting; i < ROWS; i++)
        g->words[i] = g->words[0]; /* summed and not used */
    l->sum[g->width / 2](g->words, table[0] + g->column, table[1] + g->column, g->count, found);
    for (int i = 0; i < g->waiting; i++)
        for (int lane = 0; lane < LANES; lane++)
            g->sums[i][lane] += found[i][lane] * odd_number((uint64_t)LANES * ((uint64_t)block + g->rows[i]) + (uint64_t)lane);
    g->waiting = 0;
}

/* Adds to `sums` what lies in the columns first … last − 1 of every block. A span is consecutive words: their address,
   bytes a word, position of the first in the whole tensor, number, and which sum they belong to. */
void dpo_fast_fold(const int64_t (*spans)[5], int64_t num_spans, int64_t block, int64_t first, int64_t last,
                   uint64_t (*sums)[LANES]) {
    uint64_t table[LANES][MOST_COLUMNS];
    const loops *l = best();
    group g = {0};
    for (int lane = 0; lane < LANES; lane++)
        l->fill(table[lane], (uint64_t)(lane * block + first), last - first);
    for (int64_t k = 0; k < num_spans; k++) {
        const char *words = (const char *)(intptr_t)spans[k][0];
        int64_t width = spans[k][1], start = spans[k][2], end = start + spans[k][3];
        for (int64_t row = start / block; row * block < end; row++) {
            int64_t begin = row * block + first, stop = row * block + last;
            begin = begin < start ? start : begin;
            stop = stop > end ? end : stop;
            if (begin >= stop)
                continue;
            int64_t column = begin - row * block - first, count = stop - begin;
            if (g.waiting == ROWS || width != g.width || column != g.column || count != g.count) {
                add_up(l, &g, table, block);
                g.width = width, g.column = column, g.count = count;
            }
            g.words[g.waiting] = words + (begin - start) * width;
            g.sums[g.waiting] = sums[spans[k][4]];
            g.rows[g.waiting++] = (uint64_t)row;
        }
    }
    add_up(l, &g, table, block);
}
