// One optimizer step in one pass over memory: kernels/native.py compiles it and kernels/one_pass.py says what it does.
//
// An element's gradient is widened, scaled and squared, its master and moments are stepped in fp32, and the master is
// rounded into the copy, while all of them are in registers. Loops are written for the compiler to vectorise.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

constexpr std::ptrdiff_t BLOCK = 2048;  // elements whose squares are summed in fp32

struct None {};
struct Half { std::uint16_t bits; };
struct Brain { std::uint16_t bits; };

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }
inline float widen(Brain value) { return float_of(std::uint32_t(value.bits) << 16); }

inline float widen(Half value) {
  // The exponent is moved by multiplication, which is exact, subnormal numbers included; inf and nan keep theirs.
  const std::uint32_t magnitude = std::uint32_t(value.bits & 0x7fffu) << 13;
  const float scaled = float_of(magnitude) * 0x1p112f;
  const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return float_of(bits_of(scaled) | special | (std::uint32_t(value.bits & 0x8000u) << 16));
}

inline void narrow(float value, float& copy) { copy = value; }

inline void narrow(float value, Brain& copy) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  copy.bits = std::uint16_t((nan ? bits | 0x400000u : rounded) >> 16);
}

inline void narrow(float value, Half& copy) {
  const std::uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  // Normal numbers: round away 13 bits to nearest even, and move the exponent. From 65520 on the carry makes inf.
  const std::uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 the sum with 0.5 has its last bit where fp16 has its own: the addition rounds.
  const std::uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  std::uint32_t result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  copy.bits = std::uint16_t(result | ((bits >> 16) & 0x8000u));
}

// Rules: `values` are those of kernels/native.py, in its order; values[0] is what gradients are multiplied by.

struct AdamW {
  static constexpr int moments = 2;
  static inline void step(float& x, float g, float& m, float& v, const float* values) {
    const float keep = values[1], l2 = values[2], b1 = values[3], c1 = values[4], b2 = values[5], c2 = values[6];
    const float rate = values[7], spread = values[8], eps = values[9];
    g += l2 * x;
    m = b1 * m + c1 * g;
    v = b2 * v + c2 * g * g;
    x = keep * x - rate * m / (std::sqrt(v) * spread + eps);
  }
};

template <int Moments>
struct Sgd {
  static constexpr int moments = Moments;
  static inline void step(float& x, float g, float& m, float&, const float* values) {
    const float lr = values[1], decay = values[2], mu = values[3], share = values[4];
    const float of_momentum = values[5], of_gradient = values[6];
    g += decay * x;
    if (Moments) {
      m = mu * m + share * g;
      g = of_momentum * m + of_gradient * g;
    }
    x -= lr * g;
  }
};

struct Lion {
  static constexpr int moments = 1;
  static inline void step(float& x, float g, float& m, float&, const float* values) {
    const float lr = values[1], keep = values[2], b1 = values[3], c1 = values[4], b2 = values[5], c2 = values[6];
    const float c = b1 * m + c1 * g;
    x = keep * x - lr * (float(c > 0.0f) - float(c < 0.0f));
    m = b2 * m + c2 * g;
  }
};

struct Range {
  float* master;
  const void* gradient;
  float* first;
  float* second;
  void* copy;
  std::ptrdiff_t begin, end;
};

template <class Rule, class Gradient, class Copy>
double run(const Range& range, const float* values) {
  float* __restrict x = range.master;
  const Gradient* g = static_cast<const Gradient*>(range.gradient);  // may be the memory of the copy
  float* __restrict m = range.first;
  float* __restrict v = range.second;
  Copy* copy = static_cast<Copy*>(range.copy);
  double total = 0.0;
  for (std::ptrdiff_t start = range.begin; start < range.end; start += BLOCK) {
    const std::ptrdiff_t stop = start + BLOCK < range.end ? start + BLOCK : range.end;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::ptrdiff_t i = start; i < stop; ++i) {
      float unused = 0.0f;
      const float gradient = widen(g[i]) * values[0];
      sum += gradient * gradient;
      if constexpr (Rule::moments == 2) Rule::step(x[i], gradient, m[i], v[i], values);
      if constexpr (Rule::moments == 1) Rule::step(x[i], gradient, m[i], unused, values);
      if constexpr (Rule::moments == 0) Rule::step(x[i], gradient, unused, unused, values);
      if constexpr (!std::is_same_v<Copy, None>) narrow(x[i], copy[i]);
    }
    total += sum;
  }
  return total;
}

using Run = double (*)(const Range&, const float*);

template <class Rule, class Gradient>
Run with_copy(int copy) {
  switch (copy) {
    case 0: return run<Rule, Gradient, None>;
    case 1: return run<Rule, Gradient, float>;
    case 2: return run<Rule, Gradient, Brain>;
    case 3: return run<Rule, Gradient, Half>;
  }
  return nullptr;
}

template <class Rule>
Run with_gradient(int gradient, int copy) {
  switch (gradient) {
    case 1: return with_copy<Rule, float>(copy);
    case 2: return with_copy<Rule, Brain>(copy);
    case 3: return with_copy<Rule, Half>(copy);
  }
  return nullptr;
}

Run find(int rule, int gradient, int copy) {
  switch (rule) {
    case 0: return with_gradient<AdamW>(gradient, copy);
    case 1: return with_gradient<Sgd<0>>(gradient, copy);
    case 2: return with_gradient<Sgd<1>>(gradient, copy);
    case 3: return with_gradient<Lion>(gradient, copy);
  }
  return nullptr;
}

}  // namespace

// Steps elements `begin` to `end` of `tensors` tensors that are counted one after another. Pointers of a tensor are
// master, gradient, two moments (null where the rule has fewer) and the copy (null if there is none); `values` has
// `width` numbers for each. Types: 1 fp32, 2 bf16, 3 fp16; 0 for no copy. Returns the sum of squares of the multiplied
// gradients; -1 for types that there are not.
extern "C" double windtunnel_step(
    int rule, int gradient, int copy, std::int64_t tensors, const std::int64_t* sizes, void* const* pointers,
    const float* values, std::int64_t width, std::int64_t begin, std::int64_t end) {
  const Run one = find(rule, gradient, copy);
  if (!one) return -1.0;
  double total = 0.0;
  std::int64_t offset = 0;
  for (std::int64_t n = 0; n < tensors && offset < end; offset += sizes[n], ++n) {
    const std::int64_t first = begin > offset ? begin - offset : 0;
    const std::int64_t last = end - offset < sizes[n] ? end - offset : sizes[n];
    if (first >= last) continue;
    void* const* its = pointers + 5 * n;
    const Range range{static_cast<float*>(its[0]), its[1], static_cast<float*>(its[2]), static_cast<float*>(its[3]),
                      its[4], first, last};
    total += one(range, values + width * n);
  }
  return total;
}
