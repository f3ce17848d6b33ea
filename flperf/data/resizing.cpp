// Resizes and crops a frame of bytes, bit for bit as torch's antialiased bilinear operator does.
//
// Both resize along rows into bytes, then along columns: sums of pixels times 16-bit weights, rounded and shifted back.
// Here each row is resized once, into a ring of rows that stays in the first cache, and only the crop is computed. Two
// neighbours are one multiplication and addition of pairs.

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

#define AVX2 __attribute__((target("avx2")))
#define INLINE inline __attribute__((always_inline))

// How the positions of one axis are computed: from `pairs` pairs of neighbours each, which begin at `first`.
struct Axis {
    int32_t size;
    int32_t pairs;
    int32_t precision;  // bits that weights are shifted by
    const int32_t* first;    // [size]
    const int16_t* weights;  // rows: [size, pairs, 2]; columns: [size / 4, 2, pairs, 2, 4, 2], see resize_row
};

constexpr int SLACK = 64;  // bytes that may be read or written behind a row

// Sums of the channels of two columns, four numbers each, of which the last means nothing.
AVX2 static INLINE __m256i sum_columns(const uint8_t* left, const uint8_t* right, const __m256i* weights, int pairs,
                                       __m256i sums) {
    const __m256i spread =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    for (int pair = 0; pair < pairs; pair++) {
        const __m256i pixels = _mm256_set_m128i(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(right + 6 * pair)),
                                                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(left + 6 * pair)));
        const __m256i weight = _mm256_loadu_si256(weights + pair);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, spread), weight));
    }
    return sums;
}

// One row of pixels, by blocks of four columns: columns 0 and 2 together, then 1 and 3. A number of pairs that is known
// to the compiler makes it twice as fast.
template <int PAIRS>
AVX2 static void resize_row(const uint8_t* row, const Axis columns, uint8_t* out) {
    const __m256i dense =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m256i rounding = _mm256_set1_epi32(1 << (columns.precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(columns.precision);
    const int pairs = PAIRS ? PAIRS : columns.pairs;
    const int32_t* first = columns.first;
    const __m256i* weights = reinterpret_cast<const __m256i*>(columns.weights);
    for (int x = 0; x < columns.size; x += 4, first += 4, weights += 2 * pairs, out += 12) {
        const __m256i even = sum_columns(row + 3 * first[0], row + 3 * first[2], weights, pairs, rounding);
        const __m256i odd = sum_columns(row + 3 * first[1], row + 3 * first[3], weights + pairs, pairs, rounding);
        const __m256i words = _mm256_packus_epi32(_mm256_sra_epi32(even, shift), _mm256_sra_epi32(odd, shift));
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(words, words), dense);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 6), _mm256_extracti128_si256(bytes, 1));
    }
}

// 32 bytes of the result, from pairs of resized rows.
AVX2 static INLINE __m256i sum_rows(const uint8_t* const* rows, int x, const int16_t* weights, int pairs,
                                    int precision) {
    const __m256i zero = _mm256_setzero_si256(), rounding = _mm256_set1_epi32(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
    __m256i sums[4] = {rounding, rounding, rounding, rounding};
    for (int pair = 0; pair < pairs; pair++) {
        int32_t both;
        std::memcpy(&both, weights + 2 * pair, sizeof both);
        const __m256i weight = _mm256_set1_epi32(both);
        const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[2 * pair] + x));
        const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[2 * pair + 1] + x));
        const __m256i low = _mm256_unpacklo_epi8(upper, lower), high = _mm256_unpackhi_epi8(upper, lower);
        sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
        sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
        sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
        sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
    }
    for (__m256i& sum : sums) sum = _mm256_sra_epi32(sum, shift);
    return _mm256_packus_epi16(_mm256_packus_epi32(sums[0], sums[1]), _mm256_packus_epi32(sums[2], sums[3]));
}

template <int PAIRS>
AVX2 static void mix_rows(const uint8_t* const* rows, const int16_t* weights, int pairs, int precision, int bytes,
                          uint8_t* out) {
    pairs = PAIRS ? PAIRS : pairs;
    int x = 0;
    for (; x + 32 <= bytes; x += 32)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + x), sum_rows(rows, x, weights, pairs, precision));
    if (x < bytes) {
        uint8_t last[32];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(last), sum_rows(rows, x, weights, pairs, precision));
        std::memcpy(out + x, last, bytes - x);
    }
}

extern "C" int32_t is_supported() { return __builtin_cpu_supports("avx2"); }

// `source`: `height` rows of `width` pixels of three bytes, `stride` bytes from one to the next. `out`: `rows->size`
// rows of `out_width` pixels, without gaps. `columns->size` is `out_width`, rounded up to a multiple of four.
extern "C" void resize(const uint8_t* source, int64_t stride, int32_t height, int32_t width, uint8_t* out,
                       int32_t out_width, const Axis* columns, const Axis* rows) {
    const auto resize_one = columns->pairs == 1 ? resize_row<1> : resize_row<0>;
    const auto mix = rows->pairs == 1 ? mix_rows<1> : mix_rows<0>;
    const int kept = 2 * rows->pairs, bytes = 3 * columns->size + SLACK;
    std::vector<uint8_t> ring(kept * bytes), last(3 * width + SLACK);
    std::vector<const uint8_t*> taps(kept);
    int next = 0;  // row to resize
    for (int y = 0; y < rows->size; y++, out += 3 * out_width) {
        const int first = rows->first[y];
        for (next = next < first ? first : next; next < first + kept; next++) {
            const uint8_t* row = source + next * stride;
            if (next == height - 1) {  // nothing may be read behind it
                std::memcpy(last.data(), row, 3 * width);
                row = last.data();
            }
            resize_one(row, *columns, ring.data() + next % kept * bytes);
        }
        for (int tap = 0; tap < kept; tap++) taps[tap] = ring.data() + (first + tap) % kept * bytes;
        mix(taps.data(), rows->weights + y * kept, rows->pairs, rows->precision, 3 * out_width, out);
    }
}
