// The arithmetic, in vectors of LANES floats; compiled with -DISA=name -DLANES=n and the options
// of that instruction set. All sums are float32.
//
// Per query, weights and addresses of all sampling points are computed first, vectorised over the
// points: a corner outside the image keeps a valid address and gets weight zero. What remains is
// a loop without branches over 4 corners a point: broadcast a weight, load a row, multiply-add.

#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace ISA {
namespace {

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

constexpr int VECTORS = BLOCK / LANES;
// Independent sums: a multiply-add takes four cycles, and two start in each.
constexpr int CHAINS = VECTORS >= 8 ? 1 : VECTORS >= 4 ? 2 : 4;

inline Floats splat(float x) { return x - Floats{}; }

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load(const bfloat16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  const Words bits = __builtin_convertvector(x, Words) << 16;
  Floats y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// 2 * LANES channels in whatever order is cheapest, the same for all rows of a type ...
inline void load_two(const float* from, Floats& x, Floats& y) {
  x = load(from), y = load(from + LANES);
}

inline void load_two(const bfloat16* from, Floats& x, Floats& y) {  // even channels, odd channels
  Words both;
  std::memcpy(&both, from, sizeof both);
  const Words even = both << 16, odd = both & 0xffff0000u;
  std::memcpy(&x, &even, sizeof x), std::memcpy(&y, &odd, sizeof y);
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Adds neighbouring runs of lanes of x, and behind them those of y: x0+x1 x2+x3 .. y0+y1 y2+y3 ..
template <int RUN, size_t... I>
inline Floats fold(Floats x, Floats y, std::index_sequence<I...>) {
  constexpr size_t HALF = LANES / 2;
  constexpr auto from = [](size_t i) { return i % HALF / RUN * 2 * RUN + i % RUN; };
  return Floats{(I < HALF ? x[from(I)] : y[from(I)])...} +
         Floats{(I < HALF ? x[from(I) + RUN] : y[from(I) + RUN])...};
}

template <int RUN>
inline Floats fold(Floats x, Floats y) {
  return fold<RUN>(x, y, std::make_index_sequence<LANES>());
}

// The sums of the lanes of four vectors.
inline void sum(const Floats (&x)[4], float* to) {
  Floats total = fold<LANES / 4>(fold<LANES / 2>(x[0], x[1]), fold<LANES / 2>(x[2], x[3]));
  if constexpr (LANES >= 16) total = fold<LANES / 8>(total, total);
  if constexpr (LANES >= 8) total = fold<1>(total, total);
  std::memcpy(to, &total, 4 * sizeof(float));
}

inline void narrow(float x, float* to) { *to = x; }

inline void narrow(float x, bfloat16* to) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *to = x != x ? 0x7fc0 : rounded;
}

// ... and back in their own order, from the two vectors one after the other.
inline void narrow_two(const float* x, float* to) { std::memcpy(to, x, 2 * LANES * sizeof(float)); }

inline void narrow_two(const float* x, bfloat16* to) {
  for (int i = 0; i < LANES; i++) narrow(x[i], to + 2 * i), narrow(x[i + LANES], to + 2 * i + 1);
}

inline float widen(float x) { return x; }

inline float widen(bfloat16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// e^x for x <= 0 within 2e-7 of itself. NaN stays NaN; below e^-87 it stays at that.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float scaled = x * 1.44269504f - 0.5f;
  const int32_t power = int32_t(scaled > -126.0f ? scaled : -126.0f);  // NaN is no integer
  const float r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const uint32_t bits = uint32_t(power + 127) << 23;
  float factor;
  std::memcpy(&factor, &bits, sizeof factor);
  return y * factor;
}

// The sampling points of one query in one head, and where they are in the image.
class Samples {
 public:
  explicit Samples(const Geometry& geometry) : g(geometry), n(geometry.points), floats(16 * n), rows(4 * n) {
    float* next = floats.data();
    for (float** array : {&x_part, &y_part, &attention, &grad_attention})
      *array = next, next += n;
    for (int corner = 0; corner < 4; corner++) {
      inside[corner] = next, next += n;
      share[corner] = next, next += n;
      row[corner] = rows.data() + corner * n;
    }
    dot = next;
  }

  template <typename T>
  void prepare(const Slice<T>& s, int64_t query) {
    if (g.logits) {
      softmax(s.weights + query * s.weights_stride);
    } else {
      std::memcpy(attention, s.weights + query * s.weights_stride, n * sizeof(float));
    }
    locate(s.points + query * s.weights_stride * 2, s.frame + query * s.frame_stride);
  }

  const Geometry& g;
  const int n;
  float *x_part, *y_part;  // how far between two pixels
  float *attention, *grad_attention;
  float* inside[4];  // corners: 1 inside the image, 0 outside
  float* share[4];   // of the corner in the value of the point
  int32_t* row[4];   // token of the corner
  float* dot;        // backward: of its value and the gradient, the corners of a point in a row

 private:
  std::vector<float> floats;
  std::vector<int32_t> rows;

  void softmax(const float* logits) {
    float* __restrict to = attention;
    float largest = logits[0], total = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < n; i++) largest = logits[i] > largest ? logits[i] : largest;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < n; i++) total += to[i] = exponential(logits[i] - largest);
    const float scale = 1 / total;
    for (int i = 0; i < n; i++) to[i] *= scale;
  }

  void locate(const float* points, const float* frame) {
    const float *width = g.width.data(), *height = g.height.data();
    const int32_t *columns = g.columns.data(), *lines = g.rows.data(), *start = g.start.data();
    const float *xs = frame, *x_0 = frame + n, *ys = frame + 2 * n, *y_0 = frame + 3 * n;
    const float* a = attention;
    float *xp = x_part, *yp = y_part;
    float *in0 = inside[0], *in1 = inside[1], *in2 = inside[2], *in3 = inside[3];
    float *s0 = share[0], *s1 = share[1], *s2 = share[2], *s3 = share[3];
    int32_t *r0 = row[0], *r1 = row[1], *r2 = row[2], *r3 = row[3];
#pragma omp simd
    for (int i = 0; i < n; i++) {
      const float x = points[2 * i] * xs[i] + x_0[i], y = points[2 * i + 1] * ys[i] + y_0[i];
      // Far outside is as good as just outside. NaN, too, gets a valid address...
      const float right_end = width[i] + 1, lower_end = height[i] + 1;
      float xc = x > -2 ? x : -2, yc = y > -2 ? y : -2;
      xc = xc < right_end ? xc : right_end, yc = yc < lower_end ? yc : lower_end;
      const int32_t left = int32_t(xc + 2) - 2, top = int32_t(yc + 2) - 2;  // rounded down
      const int32_t right = left + 1, bottom = top + 1;
      // ... and a weight of NaN.
      const float u = (xc - left) + (x - x), v = (yc - top) + (y - y);
      const int32_t last_x = columns[i] - 1, last_y = lines[i] - 1;
      const int32_t x0 = std::min(std::max(left, 0), last_x), x1 = std::min(std::max(right, 0), last_x);
      const int32_t y0 = std::min(std::max(top, 0), last_y), y1 = std::min(std::max(bottom, 0), last_y);
      const float has_x0 = left == x0 ? 1.0f : 0.0f, has_x1 = right == x1 ? 1.0f : 0.0f;
      const float has_y0 = top == y0 ? 1.0f : 0.0f, has_y1 = bottom == y1 ? 1.0f : 0.0f;
      r0[i] = start[i] + y0 * columns[i] + x0, r1[i] = start[i] + y0 * columns[i] + x1;
      r2[i] = start[i] + y1 * columns[i] + x0, r3[i] = start[i] + y1 * columns[i] + x1;
      in0[i] = has_y0 * has_x0, in1[i] = has_y0 * has_x1;
      in2[i] = has_y1 * has_x0, in3[i] = has_y1 * has_x1;
      xp[i] = u, yp[i] = v;
      s0[i] = a[i] * (1 - v) * (1 - u) * in0[i], s1[i] = a[i] * (1 - v) * u * in1[i];
      s2[i] = a[i] * v * (1 - u) * in2[i], s3[i] = a[i] * v * u * in3[i];
    }
  }
};

// From the dot products of the corners with the gradient to the gradients of one query.
template <typename T>
void differentiate(const Samples& p, const Slice<T>& s, int64_t query) {
  const Geometry& g = p.g;
  float* __restrict grad_locations = s.grad_locations + query * s.weights_stride * 2;
  float* __restrict grad_weights = s.grad_weights + query * s.weights_stride;
  float* __restrict grad_attention = p.grad_attention;
  const float *width = g.width.data(), *height = g.height.data(), *dot = p.dot;
  const float *in0 = p.inside[0], *in1 = p.inside[1], *in2 = p.inside[2], *in3 = p.inside[3];
  const float *xp = p.x_part, *yp = p.y_part, *attention = p.attention;
  const int n = p.n;
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const float a = dot[4 * i] * in0[i], b = dot[4 * i + 1] * in1[i];
    const float c = dot[4 * i + 2] * in2[i], d = dot[4 * i + 3] * in3[i];
    const float x = xp[i], y = yp[i];
    grad_attention[i] = (1 - y) * ((1 - x) * a + x * b) + y * ((1 - x) * c + x * d);
    grad_locations[2 * i] = attention[i] * width[i] * ((1 - y) * (b - a) + y * (d - c));
    grad_locations[2 * i + 1] = attention[i] * height[i] * ((1 - x) * (c - a) + x * (d - b));
  }
  if (!g.logits) {
    std::memcpy(grad_weights, grad_attention, p.n * sizeof(float));
    return;
  }
  float mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int i = 0; i < n; i++) mean += attention[i] * grad_attention[i];
  for (int i = 0; i < n; i++) grad_weights[i] = attention[i] * (grad_attention[i] - mean);
}

// Asks for the rows of a query before they are needed.
template <typename R>
void fetch(const Samples& p, const R* rows, int64_t stride) {
  for (int i = 0; i < 4 * p.n; i++) {
    const char* row = reinterpret_cast<const char*>(rows + p.row[0][i] * stride);
    __builtin_prefetch(row);
    __builtin_prefetch(row + 64);
  }
}

}  // namespace

template <typename T>
void forward(const Geometry& g, const Slice<T>& s) {
  Samples samples[2] = {Samples(g), Samples(g)};  // of this query and of the next one
  float wide[BLOCK];
  T out[BLOCK];
  if (s.first < s.last) samples[s.first % 2].prepare(s, s.first);
  for (int64_t query = s.first; query < s.last; query++) {
    const Samples& p = samples[query % 2];
    Samples& next = samples[(query + 1) % 2];
    if (query + 1 < s.last) next.prepare(s, query + 1);
    if (query + 1 < s.last && s.prefetch) fetch(next, s.value, s.value_stride);
    for (int channel = 0; channel < s.channels; channel += BLOCK) {
      Floats sums[CHAINS][VECTORS] = {};
      for (int i = 0; i < p.n; i++)
        for (int corner = 0; corner < 4; corner++) {
          const T* row = s.value + p.row[corner][i] * s.value_stride + channel;
          const Floats share = splat(p.share[corner][i]);
          for (int v = 0; v < VECTORS; v += 2) {
            Floats x, y;
            load_two(row + v * LANES, x, y);
            sums[corner % CHAINS][v] += share * x, sums[corner % CHAINS][v + 1] += share * y;
          }
        }
      for (int v = 0; v < VECTORS; v++) {
        for (int chain = 1; chain < CHAINS; chain++) sums[0][v] += sums[chain][v];
        store(wide + v * LANES, sums[0][v]);
      }
      for (int v = 0; v < VECTORS; v += 2) narrow_two(wide + v * LANES, out + v * LANES);
      const int count = std::min(s.channels - channel, BLOCK);
      std::memcpy(s.out + query * s.out_stride + channel, out, count * sizeof(T));
    }
  }
}

template <typename T>
void backward(const Geometry& g, const Slice<T>& s) {
  Samples samples[2] = {Samples(g), Samples(g)};
  if (s.first < s.last) samples[s.first % 2].prepare(s, s.first);
  for (int64_t query = s.first; query < s.last; query++) {
    const Samples& p = samples[query % 2];
    Samples& next = samples[(query + 1) % 2];
    if (query + 1 < s.last) next.prepare(s, query + 1);
    if (query + 1 < s.last && s.prefetch) {
      fetch(next, s.value, s.value_stride);
      fetch(next, s.grad_value, s.grad_value_stride);
    }
    std::memset(p.dot, 0, 4 * p.n * sizeof(float));
    for (int channel = 0; channel < s.channels; channel += BLOCK) {
      float grad[BLOCK] = {};
      const int count = std::min(s.channels - channel, BLOCK);
      const T* from = s.grad + query * s.out_stride + channel;
      for (int c = 0; c < count; c++) grad[c] = widen(from[c]);
      Floats grads[VECTORS];
      for (int v = 0; v < VECTORS; v++) grads[v] = load(grad + v * LANES);
      for (int i = 0; i < p.n; i++) {
        Floats products[4] = {};
        for (int corner = 0; corner < 4; corner++) {
          const T* row = s.value + p.row[corner][i] * s.value_stride + channel;
          float* grad_row = s.grad_value + p.row[corner][i] * s.grad_value_stride + channel;
          const Floats share = splat(p.share[corner][i]);
          for (int v = 0; v < VECTORS; v++) {
            products[corner] += grads[v] * load(row + v * LANES);
            store(grad_row + v * LANES, load(grad_row + v * LANES) + share * grads[v]);
          }
        }
        float dots[4];
        sum(products, dots);
        for (int corner = 0; corner < 4; corner++) p.dot[4 * i + corner] += dots[corner];
      }
    }
    differentiate(p, s, query);
  }
}

template <typename T>
void add_up(const float* buffers, int parts, int64_t size, int64_t tokens, int channels, T* to,
            int64_t stride) {
  const int64_t padded = (channels + BLOCK - 1) / BLOCK * BLOCK;
  for (int64_t token = 0; token < tokens; token++)
    for (int channel = 0; channel < channels; channel += BLOCK) {
      float total[BLOCK];
      T out[BLOCK];
      const float* from = buffers + token * padded + channel;
      std::memcpy(total, from, sizeof total);
      for (int part = 1; part < parts; part++)
        for (int c = 0; c < BLOCK; c++) total[c] += from[part * size + c];
      for (int c = 0; c < BLOCK; c++) narrow(total[c], out + c);
      const int count = std::min(channels - channel, BLOCK);
      std::memcpy(to + token * stride + channel, out, count * sizeof(T));
    }
}

template void forward<float>(const Geometry&, const Slice<float>&);
template void forward<bfloat16>(const Geometry&, const Slice<bfloat16>&);
template void backward<float>(const Geometry&, const Slice<float>&);
template void backward<bfloat16>(const Geometry&, const Slice<bfloat16>&);
template void add_up<float>(const float*, int, int64_t, int64_t, int, float*, int64_t);
template void add_up<bfloat16>(const float*, int, int64_t, int64_t, int, bfloat16*, int64_t);

}  // namespace ISA
