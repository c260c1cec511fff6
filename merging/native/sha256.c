/* SHA-256 (FIPS 180-4) of one or two streams at once with the processor's own instructions.

   One stream waits for each round's result before the next; a second one, interleaved, fills the wait (a third gains
   nothing). Compiled only where the processor has the instructions; elsewhere hashlib does the work. */

#ifdef __SHA__
#include <immintrin.h>
#include <stdint.h>

static const uint32_t K[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

#define EACH for (int s = 0; s < streams; s++)

static inline __attribute__((always_inline)) void run(uint32_t (*state)[8], const uint8_t *const *data, int64_t blocks,
                                                      const int streams)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i abef[2], cdgh[2], abef_before[2], cdgh_before[2], w[2][4];
    EACH
    {
        __m128i abcd = _mm_loadu_si128((const __m128i *)state[s]), efgh = _mm_loadu_si128((const __m128i *)(state[s] + 4));
        __m128i cdab = _mm_shuffle_epi32(abcd, 0xB1), hgfe = _mm_shuffle_epi32(efgh, 0x1B);
        abef[s] = _mm_alignr_epi8(cdab, hgfe, 8);
        cdgh[s] = _mm_blend_epi16(hgfe, cdab, 0xF0);
    }
    for (int64_t block = 0; block < blocks; block++) {
        EACH
        {
            const __m128i *from = (const __m128i *)(data[s] + 64 * block);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                w[s][i] = _mm_shuffle_epi8(_mm_loadu_si128(from + i), big_endian);
            abef_before[s] = abef[s], cdgh_before[s] = cdgh[s];
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const __m128i k = _mm_load_si128((const __m128i *)(K + 4 * i));
            __m128i sum[2];
            EACH sum[s] = _mm_add_epi32(w[s][i & 3], k);
            EACH cdgh[s] = _mm_sha256rnds2_epu32(cdgh[s], abef[s], sum[s]);
            EACH abef[s] = _mm_sha256rnds2_epu32(abef[s], cdgh[s], _mm_shuffle_epi32(sum[s], 0x0E));
            if (i < 12)
                EACH
                {
                    __m128i last = w[s][(i + 3) & 3], seventh = _mm_alignr_epi8(last, w[s][(i + 2) & 3], 4);
                    __m128i next = _mm_sha256msg1_epu32(w[s][i & 3], w[s][(i + 1) & 3]);
                    w[s][i & 3] = _mm_sha256msg2_epu32(_mm_add_epi32(next, seventh), last);
                }
        }
        EACH
        {
            abef[s] = _mm_add_epi32(abef[s], abef_before[s]);
            cdgh[s] = _mm_add_epi32(cdgh[s], cdgh_before[s]);
        }
    }
    EACH
    {
        __m128i feba = _mm_shuffle_epi32(abef[s], 0x1B), dchg = _mm_shuffle_epi32(cdgh[s], 0xB1);
        _mm_storeu_si128((__m128i *)state[s], _mm_blend_epi16(feba, dchg, 0xF0));
        _mm_storeu_si128((__m128i *)(state[s] + 4), _mm_alignr_epi8(dchg, feba, 8));
    }
}

/* Take `blocks` times 64 bytes of each stream into its state (streams, 8). */
void sha256_blocks(uint32_t (*state)[8], const uint8_t *const *data, int64_t blocks, int64_t streams)
{
    if (streams == 1)
        run(state, data, blocks, 1);
    else
        run(state, data, blocks, 2);
}
#endif
