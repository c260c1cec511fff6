/* The inner loops of merging, compiled on this machine; merging/ops/kernels/build.py says how, kernels.py what each takes.

   Every function computes what the methods' torch expressions compute, one operation after the other in fp32 (no fused
   multiply-add, which would round differently), a tile at a time, so that all but the inputs and the output stays in
   the first-level cache. Where an input or the result is not finite, a non-zero number is returned and the caller takes
   the torch expression instead. */

#include <stdint.h>
#include <string.h>

#define TILE 512
#define MOST 64 /* models */

enum { FP32, BF16 };

typedef struct {
    const void *data;
    int64_t kind;
} source;

static int load(float *restrict to, source from, int64_t at, int64_t n)
{
    int bad = 0;
    if (from.kind == BF16) {
        const uint16_t *x = (const uint16_t *)from.data + at;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)x[i] << 16;
            memcpy(to + i, &bits, 4);
        }
    } else
        memcpy(to, (const float *)from.data + at, 4 * n);
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, to + i, 4);
        bad |= (bits & 0x7F800000) == 0x7F800000;
    }
    return bad;
}

/* Round to nearest, ties to even. */
static int store(void *out, int64_t kind, int64_t at, const float *restrict from, int64_t n)
{
    int bad = 0;
    if (kind == BF16) {
        uint16_t *to = (uint16_t *)out + at;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, from + i, 4);
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
            bad |= (bits & 0x7F80) == 0x7F80;
            to[i] = (uint16_t)bits;
        }
        return bad;
    }
    memcpy((float *)out + at, from, 4 * n);
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        bad |= (bits & 0x7F800000) == 0x7F800000;
    }
    return bad;
}

/* ---- random masks: words of numpy's Philox stream (4 x 64 bits, 10 rounds; Salmon et al. 2011) ---- */

#define ROUNDS 10

static inline void philox(uint64_t step, const uint64_t keys[ROUNDS][2], uint64_t out[4])
{
    uint64_t c0 = step + 1, c1 = c0 == 0, c2 = 0, c3 = 0; /* numpy counts first */
#pragma GCC unroll 10
    for (int r = 0; r < ROUNDS; r++) { /* unrolled, so that the processor works on the next steps meanwhile */
        unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93 * c0;
        unsigned __int128 b = (unsigned __int128)0xCA5A826395121157 * c2;
        c0 = (uint64_t)(b >> 64) ^ c1 ^ keys[r][0];
        c1 = (uint64_t)b;
        c2 = (uint64_t)(a >> 64) ^ c3 ^ keys[r][1];
        c3 = (uint64_t)a;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* Words first .. first + n of the stream, 8 to a step. */
void words(const uint64_t key[2], int64_t first, uint32_t *restrict to, int64_t n)
{
    uint64_t keys[ROUNDS][2], drawn[4];
    for (int r = 0; r < ROUNDS; r++) {
        keys[r][0] = key[0] + r * 0x9E3779B97F4A7C15;
        keys[r][1] = key[1] + r * 0xBB67AE8584CAA73B;
    }
    int64_t step = first / 8, skip = first % 8, i = 0;
    if (skip && n > 0) {
        philox(step++, keys, drawn);
        i = 8 - skip < n ? 8 - skip : n;
        memcpy(to, (const uint32_t *)drawn + skip, 4 * i);
    }
    for (; i + 8 <= n; i += 8) {
        philox(step++, keys, drawn);
        memcpy(to + i, drawn, 32);
    }
    if (i < n) {
        philox(step, keys, drawn);
        memcpy(to + i, drawn, 4 * (n - i));
    }
}

/* ---- sums of task vectors ---- */

typedef struct {
    source from;
    float weight;
    float factor;          /* of what a mask keeps */
    const float *factors;  /* or one for each entry, or null */
    const uint8_t *mask;   /* given, or null */
    const uint64_t *key;   /* or drawn: kept where a word of this stream is below the limit */
    uint64_t limit;        /* up to 2^32 */
    int64_t trim;          /* whether entries up to the threshold are dropped */
    float threshold;
    int64_t equal, kept;   /* entries equal to it in the whole tensor, and how many of those stay, evenly spread */
    int64_t before;        /* how many of them come before this block */
} term;

static void times(float *restrict x, const float *restrict keep, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] *= keep[i];
}

/* The places i of bytes that are 1 and not 0: for each, the body. */
#define EACH_HIT(hits, n, i, body)                                                                                     \
    for (int64_t at_ = 0; at_ < (n); at_ += 8) {                                                                       \
        uint64_t eight_ = 0;                                                                                           \
        memcpy(&eight_, (hits) + at_, (n) - at_ < 8 ? (n) - at_ : 8);                                                  \
        for (; eight_; eight_ &= eight_ - 1) {                                                                         \
            int64_t i = at_ + (__builtin_ctzll(eight_) >> 3);                                                          \
            body;                                                                                                      \
        }                                                                                                              \
    }

static void trim_tile(float *restrict x, term *t, int64_t n)
{
    const float threshold = t->threshold;
    float keep[TILE];
    uint8_t same[TILE];
    for (int64_t i = 0; i < n; i++) {
        float size = __builtin_fabsf(x[i]);
        keep[i] = size > threshold ? 1.0f : 0.0f;
        same[i] = size == threshold;
    }
    if (t->kept) {
        const int64_t kept = t->kept, equal = t->equal;
        int64_t before = t->before;
        EACH_HIT(same, n, i, before += kept; /* (rank + 1) kept / equal > rank kept / equal: a carry */
                 int64_t carry = before >= equal; before -= carry ? equal : 0; keep[i] = carry ? 1.0f : 0.0f)
        t->before = before;
    }
    times(x, keep, n);
}

static void mask_tile(float *restrict x, const term *t, int64_t at, int64_t offset, int64_t n)
{
    float keep[TILE];
    if (t->mask)
        for (int64_t i = 0; i < n; i++)
            keep[i] = t->mask[at + i] ? 1.0f : 0.0f;
    else {
        uint32_t drawn[TILE];
        words(t->key, offset + at, drawn, n);
        const uint32_t last = (uint32_t)(t->limit - 1);
        for (int64_t i = 0; i < n; i++)
            keep[i] = t->limit && drawn[i] <= last ? 1.0f : 0.0f;
    }
    times(x, keep, n);
    if (t->factors)
        times(x, t->factors + at, n);
    else
        for (int64_t i = 0; i < n; i++)
            x[i] *= t->factor;
}

/* The entries that have the sign of their weighted sum, added up or averaged: result in `sum`, which holds that sum. */
static void agree(float *restrict sum, float (*restrict x)[TILE], const term *terms, int64_t count, int64_t zero_sign,
                  int64_t normalize, int64_t n)
{
    float total[TILE] = {0}, weight[TILE] = {0};
    for (int64_t t = 0; t < count; t++) {
        const float w = terms[t].weight, *restrict tau = x[t];
        for (int64_t i = 0; i < n; i++) {
            float weighted = tau[i] * w, e = sum[i];
            int positive = zero_sign > 0 ? !(e < 0) : e > 0, negative = zero_sign < 0 ? !(e > 0) : e < 0;
            float agrees = ((weighted > 0) & positive) | ((weighted < 0) & negative) ? 1.0f : 0.0f;
            total[i] += weighted * agrees;
            weight[i] += agrees * w;
        }
    }
    for (int64_t i = 0; i < n; i++)
        sum[i] = normalize ? total[i] / (weight[i] == 0 ? 1.0f : weight[i]) : total[i];
}

/* anchor + step, the anchor's own bits where the step is zero. */
static inline float add_to(float anchor, float step)
{
    float total = anchor + step;
    return step == 0 ? anchor : total;
}

/* out = anchor + scaling * [agreeing] sum of weight * kept(x - anchor) [/ total]; anchor null: no differences. */
int64_t combine(source anchor, const term *given, int64_t count, int64_t elect, int64_t zero_sign, int64_t normalize,
                float total, float scaling, int64_t offset, void *out, int64_t kind, int64_t n)
{
    float base[TILE], sum[TILE], x[MOST][TILE];
    term terms[MOST];
    int bad = 0;
    memcpy(terms, given, count * sizeof(term));
    for (int64_t t = 0; t < count; t++)
        if (terms[t].kept)
            terms[t].before = (int64_t)((unsigned __int128)terms[t].before * terms[t].kept % terms[t].equal);
    for (int64_t at = 0; at < n; at += TILE) {
        int64_t m = n - at < TILE ? n - at : TILE;
        if (anchor.data)
            bad |= load(base, anchor, at, m);
        for (int64_t t = 0; t < count; t++) {
            float *restrict tau = x[t];
            const float w = terms[t].weight;
            bad |= load(tau, terms[t].from, at, m);
            if (anchor.data)
                for (int64_t i = 0; i < m; i++)
                    tau[i] -= base[i];
            if (terms[t].trim)
                trim_tile(tau, terms + t, m);
            if (terms[t].mask || terms[t].key)
                mask_tile(tau, terms + t, at, offset, m);
            if (t == 0)
                for (int64_t i = 0; i < m; i++)
                    sum[i] = tau[i] * w;
            else
                for (int64_t i = 0; i < m; i++)
                    sum[i] += tau[i] * w;
        }
        if (elect)
            agree(sum, x, terms, count, zero_sign, normalize, m);
        else if (normalize)
            for (int64_t i = 0; i < m; i++)
                sum[i] /= total;
        if (anchor.data)
            for (int64_t i = 0; i < m; i++)
                sum[i] = add_to(base[i], sum[i] * scaling);
        bad |= store(out, kind, at, sum, m);
    }
    return bad;
}

/* out = base + sum of coefficient * (x - base), coefficients (count, columns), over whole rows. WIDEN. */
int64_t by_column(source base, const source *from, const float *coefficients, int64_t count, void *out, int64_t kind,
                  int64_t rows, int64_t columns)
{
    float theta[TILE], sum[TILE], x[TILE];
    int bad = 0;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t c = 0; c < columns; c += TILE) {
            int64_t m = columns - c < TILE ? columns - c : TILE, at = row * columns + c;
            bad |= load(theta, base, at, m);
            memset(sum, 0, 4 * m);
            for (int64_t t = 0; t < count; t++) {
                const float *restrict w = coefficients + t * columns + c;
                bad |= load(x, from[t], at, m);
                for (int64_t i = 0; i < m; i++)
                    sum[i] += (x[i] - theta[i]) * w[i];
            }
            for (int64_t i = 0; i < m; i++)
                sum[i] = add_to(theta[i], sum[i]);
            bad |= store(out, kind, at, sum, m);
        }
    return bad;
}

/* AIM: towards the base by pull, (columns) along each row, or (rows) one for each row. */
int64_t relax(source base, source merged, const float *pull, int64_t by_row, void *out, int64_t kind, int64_t rows,
              int64_t columns)
{
    float theta[TILE], x[TILE], same[TILE];
    int bad = 0;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t c = 0; c < columns; c += TILE) {
            int64_t m = columns - c < TILE ? columns - c : TILE, at = row * columns + c;
            const float *restrict p = pull + c;
            if (by_row) {
                for (int64_t i = 0; i < m; i++)
                    same[i] = pull[row];
                p = same;
            }
            bad |= load(theta, base, at, m) | load(x, merged, at, m);
            for (int64_t i = 0; i < m; i++) {
                float difference = x[i] - theta[i];
                float near = x[i] - difference * p[i], far = add_to(theta[i], difference * (1.0f - p[i]));
                float value = p[i] <= 0.5f ? near : far;
                value = p[i] == 1.0f ? theta[i] : value;
                x[i] = p[i] == 0.0f ? x[i] : value;
            }
            bad |= store(out, kind, at, x, m);
        }
    return bad;
}

/* ---- what a method must know of a whole tensor ---- */

#define TABLES 8
static __thread uint32_t part[TABLES << 15]; /* counts of one block */

/* Bit patterns of |x - base|. */
static int sizes(uint32_t *restrict bits, source base, source from, int64_t at, int64_t n)
{
    float theta[TILE], x[TILE];
    int bad = load(theta, base, at, n) | load(x, from, at, n);
    for (int64_t i = 0; i < n; i++) {
        float tau = x[i] - theta[i];
        memcpy(bits + i, &tau, 4);
        bits[i] &= 0x7FFFFFFF;
        bad |= bits[i] >= 0x7F800000;
    }
    return bad;
}

/* How many of |x - base| have each upper half of their bits. */
int64_t upper_halves(source base, source from, int64_t *counts, int64_t n)
{
    uint32_t bins[TILE], *table = part;
    int bad = 0;
    memset(table, 0, sizeof part);
    for (int64_t at = 0; at < n; at += TILE) {
        int64_t m = n - at < TILE ? n - at : TILE, i = 0;
        bad |= sizes(bins, base, from, at, m);
        for (; i + TABLES <= m; i += TABLES) /* several tables: equal neighbours need not wait for each other */
#pragma GCC unroll 8
            for (int64_t k = 0; k < TABLES; k++)
                table[k << 15 | bins[i + k] >> 16]++;
        for (; i < m; i++)
            table[bins[i] >> 16]++;
    }
    for (int64_t k = 0; k < TABLES; k++)
        for (int64_t j = 0; j < 1 << 15; j++)
            counts[j] += table[k << 15 | j];
    return bad;
}

/* The lower halves that |x - base| with the given upper half have, ascending, and how many have each; returns how many
   there are, at most the smaller of n and 65536. */
int64_t lower_halves(source base, source from, int64_t upper, uint32_t *restrict lower, uint32_t *restrict number,
                     int64_t n)
{
    uint32_t *table = part;
    int64_t found = 0;
    memset(table, 0, 4 << 16);
    for (int64_t at = 0; at < n; at += TILE) {
        int64_t m = n - at < TILE ? n - at : TILE;
        uint32_t bits[TILE];
        uint8_t hit[TILE];
        sizes(bits, base, from, at, m);
        for (int64_t i = 0; i < m; i++)
            hit[i] = bits[i] >> 16 == (uint32_t)upper;
        EACH_HIT(hit, m, i, table[bits[i] & 0xFFFF]++)
    }
    for (int64_t j = 0; j < 1 << 16; j++)
        if (table[j])
            lower[found] = (uint32_t)j, number[found++] = table[j];
    return found;
}

/* DELLA: each entry's rank by |x - base| within its row, equal ones in index order, gives the chance p that it stays;
   mask: where its word of the stream says so; chances: p. scratch: 4 numbers for each column. */
int64_t magprune(source base, source from, int64_t rows, int64_t columns, double density, double epsilon,
                 const uint64_t key[2], int64_t offset, uint32_t *scratch, uint8_t *mask, float *chances)
{
    uint32_t *size = scratch, *order = scratch + columns, *other = scratch + 2 * columns, *drawn = scratch + 3 * columns;
    const float least = (float)(density - epsilon), range = (float)(2 * epsilon), last = (float)(columns - 1);
    int bad = 0;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t c = 0; c < columns; c += TILE) {
            int64_t m = columns - c < TILE ? columns - c : TILE;
            bad |= sizes(size + c, base, from, row * columns + c, m);
        }
        for (int64_t c = 0; c < columns; c++)
            order[c] = (uint32_t)c;
        for (int shift = 0; shift < 32; shift += 11) { /* by 11 bits at a time, the lowest first: stable */
            uint32_t at[1 << 11] = {0}, sum = 0;
            for (int64_t c = 0; c < columns; c++)
                at[size[c] >> shift & 2047]++;
            for (int b = 0; b < 1 << 11; b++) {
                uint32_t count = at[b];
                at[b] = sum, sum += count;
            }
            for (int64_t c = 0; c < columns; c++)
                other[at[size[order[c]] >> shift & 2047]++] = order[c];
            uint32_t *swapped = order;
            order = other, other = swapped;
        }
        float *p = chances + row * columns;
        for (int64_t c = 0; c < columns; c++)
            p[order[c]] = columns == 1 ? (float)density : least + range * ((float)c / last);
        words(key, offset + row * columns, drawn, columns);
        for (int64_t c = 0; c < columns; c++)
            mask[row * columns + c] = (double)drawn[c] < __builtin_rint((double)p[c] * 4294967296.0);
    }
    return bad;
}

/* The variance over the models of x - base, in fp64, rounded once: Welford's way, as torch has it. SCE. */
int64_t variances(source base, const source *from, int64_t count, float *restrict out, int64_t n)
{
    float theta[TILE], x[TILE];
    int bad = 0;
    for (int64_t at = 0; at < n; at += TILE) {
        double mean[TILE] = {0}, square[TILE] = {0};
        int64_t m = n - at < TILE ? n - at : TILE;
        bad |= load(theta, base, at, m);
        for (int64_t t = 0; t < count; t++) {
            const double seen = (double)(t + 1);
            bad |= load(x, from[t], at, m);
            for (int64_t i = 0; i < m; i++) {
                double tau = x[i] - theta[i], moved = tau - mean[i];
                mean[i] += moved / seen;
                square[i] += moved * (tau - mean[i]);
            }
        }
        for (int64_t i = 0; i < m; i++)
            out[at + i] = (float)(square[i] / (double)count);
    }
    return bad;
}

/* How many values are NaN or infinite. */
int64_t nonfinite(const void *data, int64_t kind, int64_t n)
{
    int64_t count = 0;
    if (kind == BF16)
        for (int64_t i = 0; i < n; i++)
            count += (((const uint16_t *)data)[i] & 0x7F80) == 0x7F80;
    else
        for (int64_t i = 0; i < n; i++)
            count += (((const uint32_t *)data)[i] & 0x7F800000) == 0x7F800000;
    return count;
}

/* Sums over the rows of x * x, base * base and x * base for each column, in fp64, in the order of torch's sum over rows
   (of columns in multiples of 64):
   runs of `step` rows, `step` of those, and so on. sums: (2 count + 1, columns), models, base, products. */
#define LEVELS 4
#define WIDE 64
int64_t squares(source base, const source *from, int64_t count, int64_t rows, int64_t columns, double *sums)
{
    int bad = 0, power = 0;
    while ((int64_t)1 << power < rows)
        power++;
    power = power / LEVELS > 4 ? power / LEVELS : 4;
    const int64_t step = (int64_t)1 << power, mask = step - 1;
    for (int64_t c = 0; c < columns; c += WIDE) {
        int64_t m = columns - c < WIDE ? columns - c : WIDE;
        for (int64_t t = 0; t < count; t++) { /* the base's own square with the first model */
            double acc[3][LEVELS][WIDE];
            float theta[WIDE], x[WIDE];
            memset(acc, 0, sizeof acc);
            for (int64_t row = 0; row < rows;) {
                int64_t stop = row + step <= rows ? row + step : rows;
                int whole = stop - row == step;
                for (; row < stop; row++) {
                    bad |= load(theta, base, row * columns + c, m) | load(x, from[t], row * columns + c, m);
                    for (int64_t i = 0; i < m; i++) {
                        double a = x[i], b = theta[i];
                        acc[0][0][i] += a * a;
                        acc[1][0][i] += a * b;
                    }
                    if (t == 0)
                        for (int64_t i = 0; i < m; i++) {
                            double b = theta[i];
                            acc[2][0][i] += b * b;
                        }
                }
                for (int j = 1; whole && j < LEVELS; j++) {
                    for (int k = 0; k < 3; k++)
                        for (int64_t i = 0; i < WIDE; i++) {
                            acc[k][j][i] += acc[k][j - 1][i];
                            acc[k][j - 1][i] = 0;
                        }
                    if (row & mask << j * power)
                        break;
                }
            }
            for (int j = 1; j < LEVELS; j++)
                for (int k = 0; k < 3; k++)
                    for (int64_t i = 0; i < WIDE; i++)
                        acc[k][0][i] += acc[k][j][i];
            double *to[3] = {sums + t * columns, sums + (count + 1 + t) * columns, sums + count * columns};
            for (int k = 0; k < (t == 0 ? 3 : 2); k++)
                for (int64_t i = 0; i < m; i++)
                    to[k][c + i] += acc[k][0][i];
        }
    }
    return bad;
}
