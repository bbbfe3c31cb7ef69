// torch.ops.dino_d2_cpu: forward and backward of multi-scale deformable attention on processors.
//
// Written against PyTorch's stable ABI: one library serves every PyTorch from 2.10 on and every
// Python. Arguments are contiguous and of the right shapes: dino_d2/ops/compiled.py sees to it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "kernels.h"

namespace {

using torch::stable::Tensor;

template <typename T>
struct Kernels {
  void (*forward)(const Geometry&, const Slice<T>&);
  void (*backward)(const Geometry&, const Slice<T>&);
  void (*add_up)(const float*, int, int64_t, int64_t, int, T*, int64_t);
};

// By the names of torch.backends.cpu.get_cpu_capability().
template <typename T>
Kernels<T> kernels_for(const std::string& capability) {
#ifdef X86
  if (capability == "AVX512") return {avx512::forward<T>, avx512::backward<T>, avx512::add_up<T>};
  if (capability == "AVX2") return {avx2::forward<T>, avx2::backward<T>, avx2::add_up<T>};
#endif
  return {baseline::forward<T>, baseline::backward<T>, baseline::add_up<T>};
}

// One call: its tensors as pointers, its sizes, and how it is divided among threads.
template <typename T>
struct Call {
  int64_t batch, tokens, heads, channels, queries, padded;
  Geometry geometry;
  const T* value;
  const float *points, *weights;
  std::vector<float> frames;  // see Slice
  int64_t frame_stride;
  // Neighbouring queries read the same tokens again and again: where there are many, a copy of one
  // head's tokens, one after the other, is worth its time, as it stays in the cache.
  bool packed;
  int64_t parts;  // of the queries of each head

  Call(const Tensor& value_, const std::vector<int64_t>& shapes, const Tensor& points_,
       const Tensor& weights_, const std::optional<Tensor>& reference_)
      : batch(value_.size(0)), tokens(value_.size(1)), heads(value_.size(2)),
        channels(value_.size(3)), queries(points_.size(1)),
        padded((channels + BLOCK - 1) / BLOCK * BLOCK),
        value(static_cast<const T*>(value_.const_data_ptr())),
        points(static_cast<const float*>(points_.const_data_ptr())),
        weights(static_cast<const float*>(weights_.const_data_ptr())) {
    const int per_level = int(points_.size(4));
    int32_t start = 0;
    for (size_t level = 0; level < shapes.size(); level += 2) {
      const int32_t height = int32_t(shapes[level]), width = int32_t(shapes[level + 1]);
      for (int point = 0; point < per_level; point++) {
        geometry.width.push_back(float(width)), geometry.height.push_back(float(height));
        geometry.columns.push_back(width), geometry.rows.push_back(height);
        geometry.start.push_back(start);
      }
      start += height * width;
    }
    geometry.levels = int(shapes.size() / 2);
    geometry.points = geometry.levels * per_level;
    geometry.logits = reference_.has_value();
    make_frames(reference_);

    packed = channels % BLOCK != 0 || queries * geometry.points > 4 * tokens;
    const int64_t threads = torch::stable::get_num_threads(), slices = batch * heads;
    for (parts = 1; slices * parts < 4 * threads && slices * parts % threads;) parts++;
  }

  int64_t tasks() const { return batch * heads * parts; }

  void make_frames(const std::optional<Tensor>& reference) {
    const int n = geometry.points, per_level = n / geometry.levels;
    frame_stride = reference ? 4 * n : 0;
    frames.resize(reference ? batch * queries * frame_stride : 4 * n, -0.5f);
    if (!reference) {
      std::copy(geometry.width.begin(), geometry.width.end(), frames.begin());
      std::copy(geometry.height.begin(), geometry.height.end(), frames.begin() + 2 * n);
      return;
    }
    const int64_t size = reference->size(3);  // 2 for points, 4 for boxes
    const float* places = static_cast<const float*>(reference->const_data_ptr());
    torch::stable::parallel_for(0, batch * queries, 256, [&](int64_t begin, int64_t end) {
      for (int64_t query = begin; query < end; query++)
        for (int i = 0; i < n; i++) {
          const float* place = places + (query * geometry.levels + i / per_level) * size;
          const float width = geometry.width[i], height = geometry.height[i];
          const float share = 0.5f / per_level;
          float* frame = frames.data() + query * frame_stride + i;
          frame[0] = size == 4 ? place[2] * share * width : 1.0f;
          frame[n] = place[0] * width - 0.5f;
          frame[2 * n] = size == 4 ? place[3] * share * height : 1.0f;
          frame[3 * n] = place[1] * height - 0.5f;
        }
    });
  }

  // Runs `task(index, image, head, slice, buffer)` for every head of every image and part of its
  // queries; tasks of one thread get the same buffer.
  template <typename F>
  void for_each_slice(const F& task) const {
    torch::stable::parallel_for(0, tasks(), 1, [&](int64_t begin, int64_t end) {
      std::vector<T> copy(packed ? tokens * padded : 0);
      std::vector<float> buffer;
      for (int64_t index = begin; index < end; index++) {
        const int64_t part = index % parts, head = index / parts % heads;
        const int64_t image = index / parts / heads;
        Slice<T> s{};
        s.first = queries * part / parts, s.last = queries * (part + 1) / parts;
        s.channels = int(channels);
        s.value = value + (image * tokens * heads + head) * channels;
        s.value_stride = heads * channels;
        if (packed && s.first < s.last) {
          for (int64_t token = 0; token < tokens; token++)
            std::memcpy(copy.data() + token * padded, s.value + token * s.value_stride,
                        channels * sizeof(T));
          s.value = copy.data(), s.value_stride = padded;
        }
        const int64_t first = (image * queries * heads + head) * geometry.points;
        s.points = points + first * 2, s.weights = weights + first;
        s.weights_stride = heads * geometry.points;
        s.frame = frames.data() + image * queries * frame_stride, s.frame_stride = frame_stride;
        s.prefetch = !packed;
        s.out_stride = heads * channels;
        task(index, image, head, s, buffer);
      }
    });
  }
};

template <typename T>
void zero(T* memory, int64_t count) {
  torch::stable::parallel_for(0, count, 1 << 16, [&](int64_t begin, int64_t end) {
    std::memset(memory + begin, 0, (end - begin) * sizeof(T));
  });
}

template <typename T>
void run_forward(const Call<T>& call, const Kernels<T>& kernels, T* out) {
  call.for_each_slice([&](int64_t, int64_t image, int64_t head, Slice<T>& s, auto&) {
    s.out = out + (image * call.queries * call.heads + head) * call.channels;
    kernels.forward(call.geometry, s);
  });
}

// One task writes what belongs to a head, or each has a buffer of its own: no races, and the sum is
// the same every time.
template <typename T>
void run_backward(Call<T>& call, const Kernels<T>& kernels, const T* grad, T* grad_value,
                  float* grad_locations, float* grad_weights) {
  const int64_t size = call.tokens * call.padded, stride = call.heads * call.channels;
  const auto write = [&](const float* buffers, int64_t slice, int64_t begin, int64_t end) {
    const int64_t image = slice / call.heads, head = slice % call.heads;
    T* to = grad_value + (image * call.tokens + begin) * stride + head * call.channels;
    kernels.add_up(buffers + begin * call.padded, int(call.parts), size, end - begin,
                   int(call.channels), to, stride);
  };
  if (!call.packed) call.parts = 1;  // few points: buffers would cost more than they save
  const bool split = call.parts > 1, direct = !call.packed && std::is_same_v<T, float>;
  std::vector<float> all(split ? call.tasks() * size : 0);
  if (direct) zero(grad_value, call.batch * call.tokens * stride);
  call.for_each_slice([&](int64_t index, int64_t image, int64_t head, Slice<T>& s,
                          std::vector<float>& own) {
    s.grad_value_stride = call.padded;
    if (direct) {
      s.grad_value = reinterpret_cast<float*>(grad_value) + image * call.tokens * stride +
                     head * call.channels;
      s.grad_value_stride = stride;
    } else if (split) {
      s.grad_value = all.data() + index * size;
    } else {
      own.assign(size, 0.0f);
      s.grad_value = own.data();
    }
    const int64_t first = image * call.queries * call.heads + head;
    s.grad = grad + first * call.channels;
    s.grad_locations = grad_locations + first * call.geometry.points * 2;
    s.grad_weights = grad_weights + first * call.geometry.points;
    kernels.backward(call.geometry, s);
    // While it is in the cache.
    if (!direct && !split) write(own.data(), index, 0, call.tokens);
  });
  if (!split) return;
  const int64_t blocks = 16;  // of the tokens of a head, to have work for all threads
  torch::stable::parallel_for(
      0, call.batch * call.heads * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
          write(all.data() + i / blocks * call.parts * size, i / blocks,
                call.tokens * (i % blocks) / blocks, call.tokens * (i % blocks + 1) / blocks);
      });
}

bool is_float(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; }

Tensor forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& points,
               const Tensor& weights, std::optional<Tensor> reference, std::string capability) {
  Tensor out = torch::stable::new_empty(
      value, {value.size(0), points.size(1), value.size(2) * value.size(3)});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Call<T> call(value, shapes, points, weights, reference);
    run_forward(call, kernels_for<T>(capability), static_cast<T*>(out.mutable_data_ptr()));
  };
  is_float(value) ? run(float()) : run(bfloat16());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& value,
                                            std::vector<int64_t> shapes, const Tensor& points,
                                            const Tensor& weights,
                                            std::optional<Tensor> reference,
                                            std::string capability) {
  Tensor grad_value = torch::stable::empty_like(value);
  Tensor grad_locations = torch::stable::empty_like(points);
  Tensor grad_weights = torch::stable::empty_like(weights);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(value, shapes, points, weights, reference);
    run_backward(call, kernels_for<T>(capability), static_cast<const T*>(grad.const_data_ptr()),
                 static_cast<T*>(grad_value.mutable_data_ptr()),
                 static_cast<float*>(grad_locations.mutable_data_ptr()),
                 static_cast<float*>(grad_weights.mutable_data_ptr()));
  };
  is_float(value) ? run(float()) : run(bfloat16());
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY(dino_d2_cpu, library) {
  library.def(
      "forward(Tensor value, int[] shapes, Tensor points, Tensor weights, Tensor? reference, "
      "str capability) -> Tensor");
  library.def(
      "backward(Tensor grad, Tensor value, int[] shapes, Tensor points, Tensor weights, "
      "Tensor? reference, str capability) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dino_d2_cpu, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("backward", TORCH_BOX(&backward));
}
