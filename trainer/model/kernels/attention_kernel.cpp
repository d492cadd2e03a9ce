// Softmax attention along edges on the CPU: what attention.py computes by gathering, one node at a time.
//
// A thread has a destination and all its heads, and writes that node's results alone; then it has a range of sources, and
// goes through all edges for those that start there: no atomic operation, no list of edges by source, and sums in the
// order of the edges, whatever the number of threads. What is [heads, depth] in memory is walked through depth by depth;
// what is [features, heads] is kept so that the loop over heads is the inner one. attention_kernel.py compiles and
// calls the two functions at the end. bfloat16 is widened when loaded, summed in float.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using Index = int64_t;
constexpr Index PIECES = 8;  // into which a thread's sources are cut where results are narrower than sums

struct BFloat16 {
    uint16_t bits;
};

inline double load(double value) { return value; }
inline float load(float value) { return value; }
inline float load(BFloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void store(double value, double& to) { to = value; }
inline void store(float value, float& to) { to = value; }
inline void store(float value, BFloat16& to) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T>
using Sum = decltype(load(T{}));

struct Sizes {
    Index batch, destinations, sources, heads, depth, features, edges, most, threads;  // most: edges of one node
};

struct Lists {  // edges of destination i: offsets[i] to offsets[i + 1], or `most` for each; ends: where they start
    const int32_t *offsets, *ends;
    Index first(Index node, Index most) const { return offsets ? Index(offsets[node]) : node * most; }
};

// DEPTH 0 stands for any; a depth known beforehand makes loops of vectors only.
template <int DEPTH, class A, class T>
inline A dot(const A* left, const T* right, Index depth) {
    const Index size = DEPTH ? DEPTH : depth;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < size; ++i) sum += left[i] * load(right[i]);
    return sum;
}

// to[h] += weight[h] * row[h], of [heads, depth]
template <int DEPTH, class A, class T>
inline void add(A* __restrict to, const A* weight, const T* __restrict row, const Sizes& n) {
    const Index size = DEPTH ? DEPTH : n.depth;
    for (Index h = 0; h < n.heads; ++h) {
        const A factor = weight[h];
#pragma omp simd
        for (Index i = 0; i < size; ++i) to[h * size + i] += factor * load(row[h * size + i]);
    }
}

// logits[h] = left[h] . right[h] + sum over features of tilt[f, h] feature[f]
template <int DEPTH, class A, class T>
inline void logits(A* __restrict to, const A* left, const T* right, const A* tilt, const A* feature, const Sizes& n) {
    const Index size = DEPTH ? DEPTH : n.depth;
    for (Index h = 0; h < n.heads; ++h) to[h] = dot<DEPTH>(left + h * size, right + h * size, size);
    for (Index f = 0; f < n.features; ++f)
        for (Index h = 0; h < n.heads; ++h) to[h] += tilt[f * n.heads + h] * feature[f];
}

template <class A, class T>
inline void widen(A* to, const T* from, Index size, A factor) {
    for (Index i = 0; i < size; ++i) to[i] = factor * load(from[i]);
}

template <class A, class T>
inline void narrow(T* to, const A* from, Index size) {
    for (Index i = 0; i < size; ++i) store(from[i], to[i]);
}

template <class A, class T>
inline void widen_tilt(A* to, const T* from, const Sizes& n, A factor) {  // [heads, features] -> [features, heads]
    for (Index h = 0; h < n.heads; ++h)
        for (Index f = 0; f < n.features; ++f) to[f * n.heads + h] = factor * load(from[h * n.features + f]);
}

template <class A, class T>
inline void narrow_tilt(T* to, const A* from, const Sizes& n) {
    for (Index h = 0; h < n.heads; ++h)
        for (Index f = 0; f < n.features; ++f) store(from[f * n.heads + h], to[h * n.features + f]);
}

// tilt[f, h] += weight[h] * feature[f]
template <class A>
inline void add_tilt(A* to, const A* weight, const A* feature, const Sizes& n) {
    for (Index f = 0; f < n.features; ++f)
        for (Index h = 0; h < n.heads; ++h) to[f * n.heads + h] += weight[h] * feature[f];
}

inline double exponential(double value) { return std::exp(value); }
inline float exponential(float value) {  // to 1e-7, in vectors, which std::exp is not: 2^n e^r, |r| <= ln 2 / 2
    const float shift = 12582912.0f;  // 1.5 * 2^23: a number this large has no fraction left
    value = value < -87.0f ? -87.0f : value > 88.0f ? 88.0f : value;
    const float rounded = value * 1.44269504f + shift, n = rounded - shift;
    const float r = value - n * 0.693145752f - n * 1.42860677e-6f;
    float e = 1.0f / 5040;
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) e = e * r + term;
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits = (bits + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return e * power;
}

template <class A>
inline void exponentiate(A* values, Index size) {
#pragma omp simd
    for (Index i = 0; i < size; ++i) values[i] = exponential(values[i]);
}

template <class T>
struct Forward {
    using A = Sum<T>;
    Sizes n;
    Lists in;
    const T *query, *key, *value, *tilt;
    const A* features;
    T *out, *carried;
    A* offset;

    template <int DEPTH>
    void run() const {
        const Index row = n.heads * n.depth, tilts = n.heads * n.features, nodes = n.batch * n.destinations;
        const A scale = A(1) / std::sqrt(A(n.depth));
#pragma omp parallel num_threads(int(n.threads))
        {
            std::vector<A> wide(row), slant(tilts), sum(row), lean(tilts), top(n.heads), total(n.heads);
            std::vector<A> table(n.most * n.heads);
#pragma omp for schedule(dynamic, 64)
            for (Index node = 0; node < nodes; ++node) {
                const Index first = in.first(node % n.destinations, n.most);
                const Index count = in.first(node % n.destinations + 1, n.most) - first;
                const Index other = node / n.destinations * n.sources;
                A* p = table.data();
                widen(wide.data(), query + node * row, row, scale);
                widen_tilt(slant.data(), tilt + node * tilts, n, scale);
                std::fill(top.begin(), top.end(), -std::numeric_limits<A>::infinity());
                std::fill(total.begin(), total.end(), A(0));
                std::fill(sum.begin(), sum.end(), A(0));
                std::fill(lean.begin(), lean.end(), A(0));
                for (Index e = 0; e < count; ++e) {
                    const T* there = key + (other + in.ends[first + e]) * row;
                    logits<DEPTH>(p + e * n.heads, wide.data(), there, slant.data(),
                                  features + (first + e) * n.features, n);
                    for (Index h = 0; h < n.heads; ++h) top[h] = std::max(top[h], p[e * n.heads + h]);
                }
                for (Index e = 0; e < count; ++e)
                    for (Index h = 0; h < n.heads; ++h) p[e * n.heads + h] -= top[h];
                exponentiate(p, count * n.heads);
                for (Index e = 0; e < count; ++e) {
                    const A* weight = p + e * n.heads;
                    for (Index h = 0; h < n.heads; ++h) total[h] += weight[h];
                    add<DEPTH>(sum.data(), weight, value + (other + in.ends[first + e]) * row, n);
                    add_tilt(lean.data(), weight, features + (first + e) * n.features, n);
                }
                for (Index h = 0; h < n.heads; ++h) {
                    offset[node * n.heads + h] = count ? top[h] + std::log(total[h]) : A(0);
                    const A part = count ? A(1) / total[h] : A(0);
                    for (Index i = 0; i < n.depth; ++i) sum[h * n.depth + i] *= part;
                    for (Index f = 0; f < n.features; ++f) lean[f * n.heads + h] *= part;
                }
                narrow(out + node * row, sum.data(), row);
                narrow_tilt(carried + node * tilts, lean.data(), n);
            }
        }
    }
};

template <class T>
struct Backward {
    using A = Sum<T>;
    Sizes n;
    Lists in;
    const T *query, *key, *value, *tilt;
    const A *features, *offset;
    const T *out, *carried;
    T *d_query, *d_key, *d_value, *d_tilt;
    A *weights, *slopes;  // [batch, edges, heads]: p, and the gradient of the logit times the scale; by destination

    template <int DEPTH>
    void run() const {
        destinations<DEPTH>();
        sources<DEPTH>();
    }

    template <int DEPTH>
    void destinations() const {
        const Index row = n.heads * n.depth, tilts = n.heads * n.features, nodes = n.batch * n.destinations;
        const A scale = A(1) / std::sqrt(A(n.depth));
#pragma omp parallel num_threads(int(n.threads))
        {
            std::vector<A> wide(row), slant(tilts), up(row), up_tilt(tilts), sum(row), lean(tilts), mean(n.heads);
#pragma omp for schedule(dynamic, 64)
            for (Index node = 0; node < nodes; ++node) {
                const Index first = in.first(node % n.destinations, n.most);
                const Index count = in.first(node % n.destinations + 1, n.most) - first;
                const Index batch = node / n.destinations, other = batch * n.sources;
                A* p = weights + (batch * n.edges + first) * n.heads;
                A* slope = slopes + (batch * n.edges + first) * n.heads;
                const A* shift = offset + node * n.heads;
                widen(wide.data(), query + node * row, row, scale);
                widen_tilt(slant.data(), tilt + node * tilts, n, scale);
                widen(up.data(), out + node * row, row, A(1));
                widen_tilt(up_tilt.data(), carried + node * tilts, n, A(1));
                std::fill(sum.begin(), sum.end(), A(0));
                std::fill(lean.begin(), lean.end(), A(0));
                std::fill(mean.begin(), mean.end(), A(0));
                for (Index e = 0; e < count; ++e) {
                    const Index there = (other + in.ends[first + e]) * row;
                    const A* feature = features + (first + e) * n.features;
                    logits<DEPTH>(p + e * n.heads, wide.data(), key + there, slant.data(), feature, n);
                    logits<DEPTH>(slope + e * n.heads, up.data(), value + there, up_tilt.data(), feature, n);
                    for (Index h = 0; h < n.heads; ++h) p[e * n.heads + h] -= shift[h];
                }
                exponentiate(p, count * n.heads);
                for (Index e = 0; e < count; ++e)
                    for (Index h = 0; h < n.heads; ++h) mean[h] += p[e * n.heads + h] * slope[e * n.heads + h];
                for (Index e = 0; e < count; ++e) {
                    A* steep = slope + e * n.heads;
                    for (Index h = 0; h < n.heads; ++h) steep[h] = p[e * n.heads + h] * (steep[h] - mean[h]) * scale;
                    add<DEPTH>(sum.data(), steep, key + (other + in.ends[first + e]) * row, n);
                    add_tilt(lean.data(), steep, features + (first + e) * n.features, n);
                }
                narrow(d_query + node * row, sum.data(), row);
                narrow_tilt(d_tilt + node * tilts, lean.data(), n);
            }
        }
    }

    // Sums are taken where the results are, or, of narrow types, in memory of the thread's own, piece by piece.
    template <int DEPTH>
    void sources() const {
        constexpr bool narrows = !std::is_same_v<A, T>;
        const Index row = n.heads * n.depth, pieces = std::min(n.sources, narrows ? n.threads * PIECES : n.threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(n.threads))
        for (Index piece = 0; piece < pieces * n.batch; ++piece) {
            const Index batch = piece / pieces, part = piece % pieces;
            const Index begin = n.sources * part / pieces, end = n.sources * (part + 1) / pieces;
            const Index size = (end - begin) * row, place = (batch * n.sources + begin) * row;
            std::vector<A> room(narrows ? 2 * size : 0);
            A *of_key, *of_value;
            if constexpr (narrows) {
                of_key = room.data(), of_value = room.data() + size;
            } else {
                of_key = d_key + place, of_value = d_value + place;
                std::fill(of_key, of_key + size, A(0));
                std::fill(of_value, of_value + size, A(0));
            }
            for (Index node = 0; node < n.destinations; ++node) {
                const Index last = in.first(node + 1, n.most), there = (batch * n.destinations + node) * row;
                for (Index e = in.first(node, n.most); e < last; ++e) {
                    const Index source = in.ends[e];
                    if (source < begin || source >= end) continue;
                    const Index edge = (batch * n.edges + e) * n.heads, to = (source - begin) * row;
                    add<DEPTH>(of_key + to, slopes + edge, query + there, n);
                    add<DEPTH>(of_value + to, weights + edge, out + there, n);
                }
            }
            if constexpr (narrows) {
                narrow(d_key + place, of_key, size);
                narrow(d_value + place, of_value, size);
            }
        }
    }
};

template <class Task>
void run(const Task& task) {
    if constexpr (std::is_same_v<typename Task::A, float>) switch (task.n.depth) {  // double is for tests
            case 8: return task.template run<8>();
            case 16: return task.template run<16>();
            case 32: return task.template run<32>();
            case 64: return task.template run<64>();
        }
    task.template run<0>();
}

struct Arrays {  // hands out one pointer after the other, of whatever type is wanted
    void* const* next;
    template <class T>
    operator T*() {
        return static_cast<T*>(*next++);
    }
};

// Braced lists are read from left to right: the order of the members is that of attention_kernel.py.
template <class T>
void forward(const Sizes& n, Arrays a) {
    run(Forward<T>{n, {a, a}, a, a, a, a, a, a, a, a});
}

template <class T>
void backward(const Sizes& n, Arrays a) {
    run(Backward<T>{n, {a, a}, a, a, a, a, a, a, a, a, a, a, a, a, a, a});
}

}  // namespace

// width: bytes of a number; 2 is bfloat16.
extern "C" void attend_forward(Index width, const Index* sizes, void* const* arrays) {
    Sizes n;
    std::memcpy(&n, sizes, sizeof n);
    width == 2 ? forward<BFloat16>(n, {arrays}) : width == 4 ? forward<float>(n, {arrays}) : forward<double>(n, {arrays});
}

extern "C" void attend_backward(Index width, const Index* sizes, void* const* arrays) {
    Sizes n;
    std::memcpy(&n, sizes, sizeof n);
    width == 2   ? backward<BFloat16>(n, {arrays})
    : width == 4 ? backward<float>(n, {arrays})
                 : backward<double>(n, {arrays});
}
