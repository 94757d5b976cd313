// Products of bfloat16 weights for processors without instructions for them; compiled.py builds and calls this.
//
// A weight is read and widened once for all rows of a pass, and every sum keeps an order of its own: 16 partial sums, each over every
// 16th term, then these one after the other. So a row has the same bits however many rows there are.

#include <cstdint>
#include <cstring>
#include <vector>

typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

template <typename Vector, typename Number> static inline Vector load(const Number* from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

// Eight bfloat16 numbers as float32: their bits are the upper half.
static inline Floats widen(const uint16_t* from) { return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16); }

// The nearest bfloat16 number, of two as near the even one.
static inline uint16_t narrow(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return number == number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// x (ROWS, in) times the weight (out, in) -> y (ROWS, out). A thread reads the weight in PLACES places at once, and asks for what it
// will need 2 kB before it does: memory is slow to begin and quick to go on.
template <int ROWS, int PLACES> static void product(const float* x, const uint16_t* weight, uint16_t* y, long in, long out) {
    const long part = out / PLACES;
#pragma omp parallel for
    for (long i = 0; i < part; i++) {
        Floats sums[PLACES][ROWS][2] = {};
        for (long j = 0; j < in; j += 32)
            for (int place = 0; place < PLACES; place++) {
                const uint16_t* w = weight + (i + place * part) * in + j;
                __builtin_prefetch(w + 1024);
                for (int k = 0; k < 4; k++) {
                    const Floats wide = widen(w + 8 * k);
                    for (int row = 0; row < ROWS; row++) sums[place][row][k % 2] += wide * load<Floats>(x + row * in + j + 8 * k);
                }
            }
        for (int place = 0; place < PLACES; place++)
            for (int row = 0; row < ROWS; row++) {
                float sum = 0;
                for (int k = 0; k < 16; k++) sum += sums[place][row][k / 8][k % 8];
                y[row * out + i + place * part] = narrow(sum);
            }
    }
}

// For 1 to 8 rows; in divides by 32 and out by 4.
extern "C" void row_products(long rows, const uint16_t* x, const uint16_t* weight, uint16_t* y, long in, long out) {
    static void (*const kinds[])(const float*, const uint16_t*, uint16_t*, long, long) = {
        product<1, 4>, product<2, 4>, product<3, 2>, product<4, 2>, product<5, 1>, product<6, 1>, product<7, 1>, product<8, 1>};
    static thread_local std::vector<float> wide;  // kept: memory that is asked for after a weight has passed through the caches is slow to come
    wide.resize(rows * in);
    for (long i = 0; i < rows * in; i += 8) {
        const Floats eight = widen(x + i);
        memcpy(&wide[i], &eight, sizeof eight);
    }
    kinds[rows - 1](wide.data(), weight, y, in, out);
}
