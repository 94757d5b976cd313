// Products and attention in bfloat16 for processors without instructions for it, as operations of PyTorch; compiled.py builds this.
//
// A weight is read and widened once for all rows of a pass, and every sum keeps an order of its own: 8 partial sums, each over every
// 8th term, then these one after the other. So a row has the same bits however many rows there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

template <typename Vector, typename Number> static inline Vector load(const Number* from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

static inline void store(float* to, Floats vector) { memcpy(to, &vector, sizeof vector); }

// Eight bfloat16 numbers as float32: their bits are the upper half.
static inline Floats widen(const uint16_t* from) { return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16); }

static inline uint16_t* numbers(const Tensor& x) { return (uint16_t*)x.data_ptr(); }  // of a contiguous tensor

// The nearest bfloat16 number, of two as near the even one.
static inline uint16_t narrow(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return number == number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// x (ROWS, in) times the weight (out, in) -> y (ROWS, out). A thread reads the weight in PLACES places at once, as many as leave the sums in
// registers, so that x is read once for all of them; and asks for what it will need 2 kB before it does: memory is slow to begin and quick to go on.
// Threads take what is left in ever smaller pieces: where one is held up the other does more (2% of a product).
template <int ROWS, int PLACES> static void product(const float* x, const uint16_t* weight, uint16_t* y, long in, long out) {
    const long part = out / PLACES;
#pragma omp parallel for schedule(guided, 16)
    for (long i = 0; i < part; i++) {
        Floats sums[PLACES][ROWS] = {};
        for (long j = 0; j < in; j += 32)
            for (int place = 0; place < PLACES; place++) {
                const uint16_t* w = weight + (i + place * part) * in + j;
                __builtin_prefetch(w + 1024);
                for (int k = 0; k < 4; k++) {
                    const Floats wide = widen(w + 8 * k);
                    for (int row = 0; row < ROWS; row++) sums[place][row] += wide * load<Floats>(x + row * in + j + 8 * k);
                }
            }
        for (int place = 0; place < PLACES; place++)
            for (int row = 0; row < ROWS; row++) {
                float sum = 0;
                for (int k = 0; k < 8; k++) sum += sums[place][row][k];
                y[row * out + i + place * part] = narrow(sum);
            }
    }
}

// x (rows, in) times the weight (out, in) -> (rows, out), 8 rows at a time; in divides by 32 and out by 4.
static Tensor widened_product(Tensor x, Tensor weight) {
    static void (*const kinds[])(const float*, const uint16_t*, uint16_t*, long, long) = {
        product<1, 4>, product<2, 4>, product<3, 2>, product<4, 2>, product<5, 2>, product<6, 2>, product<7, 2>, product<8, 1>};
    static thread_local std::vector<float> wide;  // kept: memory that is asked for after a weight has passed through the caches is slow to come
    const long rows = x.size(0), in = x.size(1), out = weight.size(0);
    Tensor y = torch::stable::new_empty(x, {rows, out});
    wide.resize(rows * in);
    for (long i = 0; i < rows * in; i += 8) store(&wide[i], widen(numbers(x) + i));
    for (long row = 0; row < rows; row += 8)
        kinds[std::min(rows - row, 8L) - 1](&wide[row * in], numbers(weight), numbers(y) + row * out, in, out);
    return y;
}

// Attention of queries q (rows, groups, shared, SIZE) at positions start, start + 1, ... -> y, the same shape, over keys and values of a layer of the
// cache, (groups, length, SIZE). A key is read and widened once for all heads that share it; every sum is a row's own.
template <int SIZE>
static void attention(long rows, long groups, long shared, long start, long length, const uint16_t* q, const uint16_t* keys, const uint16_t* values, uint16_t* y) {
    const long N = SIZE / 8;
#pragma omp parallel for
    for (long task = 0; task < rows * groups; task++) {
        const long end = start + task / groups + 1, first = task * shared * SIZE;
        const uint16_t *key = keys + task % groups * length * SIZE, *value = values + task % groups * length * SIZE;
        static thread_local std::vector<float> kept;
        kept.resize(shared * (end + 2 * SIZE));
        float *const weights = kept.data(), *const wide = weights + shared * end, *const mixed = wide + shared * SIZE;
        for (long i = 0; i < shared * SIZE; i += 8) store(wide + i, widen(q + first + i) / std::sqrt((float)SIZE));
        std::fill(mixed, mixed + shared * SIZE, 0.f);
        for (long p = 0; p < end; p++) {
            Floats k[N];
            for (int i = 0; i < N; i++) k[i] = widen(key + p * SIZE + 8 * i);
            for (long head = 0; head < shared; head++) {
                Floats sums = {};
                for (int i = 0; i < N; i++) sums += k[i] * load<Floats>(wide + head * SIZE + 8 * i);
                weights[head * end + p] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
            }
        }
        for (long head = 0; head < shared; head++) {
            float* const w = weights + head * end;
            float highest = *std::max_element(w, w + end), sum = 0;
            for (long p = 0; p < end; p++) sum += w[p] = std::exp(w[p] - highest);
            for (long p = 0; p < end; p++) w[p] /= sum;
        }
        for (long p = 0; p < end; p++) {
            Floats v[N];
            for (int i = 0; i < N; i++) v[i] = widen(value + p * SIZE + 8 * i);
            for (long head = 0; head < shared; head++)
                for (int i = 0; i < N; i++) {
                    float* const to = mixed + head * SIZE + 8 * i;
                    store(to, load<Floats>(to) + weights[head * end + p] * v[i]);
                }
        }
        for (long i = 0; i < shared * SIZE; i++) y[first + i] = narrow(mixed[i]);
    }
}

// The same for heads of 64 or 128 numbers, after keys k and values v (rows, groups, size) are written to keys and values (layers, groups, length, size).
static Tensor widened_attention(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, int64_t layer, int64_t start) {
    const long rows = k.size(0), groups = k.size(1), size = k.size(2), length = keys.size(2), first = layer * groups * length * size;
    for (long row = 0; row < rows; row++)
        for (long group = 0; group < groups; group++) {
            const long from = (row * groups + group) * size, to = first + (group * length + start + row) * size;
            memcpy(numbers(keys) + to, numbers(k) + from, size * sizeof(uint16_t));
            memcpy(numbers(values) + to, numbers(v) + from, size * sizeof(uint16_t));
        }
    Tensor y = torch::stable::empty_like(q);
    const auto attend = size == 64 ? attention<64> : attention<128>;
    attend(rows, groups, q.size(1) / groups, start, length, numbers(q), numbers(keys) + first, numbers(values) + first, numbers(y));
    return y;
}

STABLE_TORCH_LIBRARY_IMPL(layerskip, CPU, m) {
    m.impl("widened_product", TORCH_BOX(&widened_product));
    m.impl("widened_attention", TORCH_BOX(&widened_attention));
}
