// Multi-scale deformable attention of one head of one image, for the processor at hand.
//
// kernels.cpp is compiled once per instruction set, each time into a namespace of its own;
// operators.cpp cuts the work into slices, hands them to threads and chooses the namespace.

#pragma once

#include <cstdint>
#include <vector>

// What all slices of a call have in common. Per sampling point, i.e. per (level, point of it):
struct Geometry {
  std::vector<float> width, height;           // of the point's level
  std::vector<int32_t> columns, rows, start;  // the same as integers; its first token
  int levels, points;                         // L; L * P
  bool logits;                                // whether weights are to be softmaxed
};

// Some queries of one head of one image. Strides are in elements, from one token or query to the
// next. `value` and `grad_value` have a multiple of BLOCK channels, the last of them may be padding.
template <typename T>
struct Slice {
  const T* value;
  int64_t value_stride;
  const float *points, *weights;
  // Where points are in pixels: points * scale + shift, x and y. Per query x scales, x shifts,
  // y scales and y shifts of all points; queries are frame_stride apart, 0 if all have the same.
  const float* frame;
  int64_t frame_stride;
  int64_t weights_stride;  // that of points is twice as much
  bool prefetch;
  int64_t first, last;     // the queries
  int channels;            // without the padding
  int64_t out_stride;      // of out and grad
  T* out;                  // forward: the result

  const T* grad;           // backward: its gradient, and what it becomes
  float* grad_value;       // added to
  int64_t grad_value_stride;
  float *grad_locations, *grad_weights;
};

constexpr int BLOCK = 32;  // channels that are kept in registers

using bfloat16 = uint16_t;  // its bits are the upper half of those of a float

// forward and backward do as the slice says; add_up writes the sum of the `parts` buffers of padded
// gradients that are `size` apart to `to`, where tokens are `stride` apart.
#define DECLARE_KERNELS(ISA)                                                                      \
  namespace ISA {                                                                                 \
  template <typename T> void forward(const Geometry&, const Slice<T>&);                           \
  template <typename T> void backward(const Geometry&, const Slice<T>&);                          \
  template <typename T> void add_up(const float* buffers, int parts, int64_t size, int64_t tokens, \
                                    int channels, T* to, int64_t stride);                         \
  }

DECLARE_KERNELS(baseline)
#ifdef X86
DECLARE_KERNELS(avx2)
DECLARE_KERNELS(avx512)
#endif
