// Augmentation on the CPU: the loop over the rows of a sample, stages as in augment_math.h. Each row passes
// through buffers in the first-level cache: resampled, coloured, blurred from a ring of rows, normalised, and
// written once. Only contrast, which needs the mean of the image at that point, keeps a whole sample.
//
// There is neither multiply_add nor a reduction in another order: the bits are the same on every instruction
// set. Bytes per value: the source is read once, apart from rows that the cache has lost, and the output is
// written once.
#include "../common/flush_mode.h"
#include "augment_backward_cpu.h"

namespace fastreg::FASTREG_ISA {
namespace {

// ---- geometry: rows of a sample, made by the resampler of its type

template <class A>
struct RowMaker {
  const void* resampler;
  void (*make)(const void* resampler, int64_t y, int64_t n, A* out, int64_t pitch);
  // null where bytes must become numbers on the way
  void (*make_bytes)(const void* resampler, int64_t y, int64_t n, uint8_t* out, int64_t pitch);
  void operator()(int64_t y, int64_t n, A* out, int64_t pitch) const { make(resampler, y, n, out, pitch); }
};
template <class T, class A>
RowMaker<A> maker_of(const Resampler<T, A>& resampler) {
  using R = Resampler<T, A>;
  RowMaker<A> maker = {&resampler,
                       [](const void* r, int64_t y, int64_t n, A* out, int64_t pitch) {
                         static_cast<const R*>(r)->row(y, n, out, pitch);
                       },
                       nullptr};
  if (resampler.gives_bytes())
    maker.make_bytes = [](const void* r, int64_t y, int64_t n, uint8_t* out, int64_t pitch) {
      static_cast<const R*>(r)->row_of_bytes(y, n, out, pitch);
    };
  return maker;
}

// f(row maker) with the sample's resampler alive.
template <class A, class F>
void with_rows(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, F f) {
  const Shrink shrink = shrink_of(a, sample);
  if (shrink.on) {
    const int64_t width = shrink.size[0], height = shrink.size[1];
    const Source<A> shrunken = {
        static_cast<const A*>(scratch.source), width * height, width, height, width, a.channels};
    const Resampler<A, A> resampler(a, sample, shrunken, shrink.rest);
    return f(maker_of(resampler));
  }
  with_pixels(a.in_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<typename Accumulate<T>::type, A>) {
      const Resampler<T, A> resampler(a, sample, source_of<T>(a, scratch.source, sample),
                                      matrix_of(a, sample));
      f(maker_of(resampler));
    }
  });
}

template <class A>
void resampled_row(const AugmentArgs& a, const RowMaker<A>& maker, int64_t y, A* out, int64_t pitch) {
  maker(y, a.out_width, out, pitch);
  if (!quantises(a) || !a.matrices) return;
  const Vec<A> bound(A(255));
  for (int64_t c = 0; c < a.channels; ++c)
    for (int64_t x = 0; x < a.out_width; x += Vec<A>::kLanes)
      store(out + c * pitch + x, quantised(load(out + c * pitch + x), bound));
}

// ---- colour: contrast needs the mean of a whole sample first

// Rows of an image that contrast needs whole: their distance, and that of their channels.
int64_t image_width(const AugmentArgs& a) { return padded_width(a.out_width); }
int64_t image_pitch(const AugmentArgs& a) { return a.out_height * image_width(a); }

template <class A>
void prepare_rows(const AugmentArgs& a, const AugmentScratch& scratch, const RowMaker<A>& maker,
                  int64_t sample, int64_t begin, int64_t end) {
  const int64_t pitch = image_pitch(a);
  const Colour<A> colour(a, sample, 0);
  double* sums = static_cast<double*>(scratch.sums);
  for (int64_t y = begin; y < end; ++y) {
    A* row = static_cast<A*>(scratch.image) + y * image_width(a);
    resampled_row(a, maker, y, row, pitch);
    if (a.colour_steps & kBrightness) colour.row(kBrightness, row, pitch, row, pitch, a.out_width);
    sums[y] = grey_sum(row, pitch, a.channels, a.out_width, quantises(a));
  }
}

template <class A>
A prepared_mean(const AugmentArgs& a, const AugmentScratch& scratch) {
  double sum = 0;
  if (scratch.image)
    for (int64_t y = 0; y < a.out_height; ++y) sum += static_cast<const double*>(scratch.sums)[y];
  return mean_of_sum<A>(sum, a.out_height * a.out_width);
}

// ---- the end of a row: normalise, erase, store

template <class A, class T>
void emit_row(const AugmentArgs& a, int64_t sample, int64_t y, A* row, int64_t pitch, T* out) {
  using V = Vec<A>;
  const int64_t n = a.out_width;
  const Erased erased(a, sample, y);
  const bool normalise = a.normalise, plain = a.out_stride[3] == 1 && erased.begin == erased.end;
  T* line = out + sample * a.out_stride[0] + y * a.out_stride[2];
  for (int64_t c = 0; c < a.channels; ++c, row += pitch, line += a.out_stride[1]) {
    const V scale(A(a.constant(kScaleRow, c))), shift(A(a.constant(kShiftRow, c)));
    int64_t x = 0;
    if (plain)
      for (; x + V::kLanes <= n; x += V::kLanes) {
        const V p = load(row + x);
        store(line + x, normalise ? p * scale + shift : p);
      }
    if (x == n) continue;
    if (normalise)
      for (int64_t i = x; i < n; i += V::kLanes) store(row + i, load(row + i) * scale + shift);
    for (int64_t i = erased.begin; i < erased.end; ++i) row[i] = A(a.constant(kErasedRow, c));
    for (; x < n; ++x) from_float(row[x], line + x * a.out_stride[3]);
  }
}

// ---- a sample, row by row

template <class A, class T>
void finish_rows(const AugmentArgs& a, const AugmentScratch& scratch, const RowMaker<A>& maker,
                 int64_t sample, int64_t begin, int64_t end, T* out) {
  const int64_t n = a.out_width, pitch = RowsLayout(a).pitch;
  const bool has_image = scratch.image != nullptr;
  const Colour<A> colour(a, sample, prepared_mean<A>(a, scratch));
  const int steps = has_image ? a.colour_steps & ~kBrightness : a.colour_steps;
  const auto coloured_row = [&](int64_t y, A* row) {
    if (has_image) {
      const A* image = static_cast<const A*>(scratch.image) + y * image_width(a);
      return colour.row(steps, image, image_pitch(a), row, pitch, n);
    }
    resampled_row(a, maker, y, row, pitch);
    if (steps) colour.row(steps, row, pitch, row, pitch, n);
  };
  if (a.blur) {
    BlurredRows<A> rows(a, sample, begin, end, scratch.rows);
    for (int64_t y = begin; y < end; ++y) emit_row(a, sample, y, rows.blurred(y, coloured_row), pitch, out);
    return;
  }
  // Nothing but geometry needs no detour through a buffer.
  if (!steps && !has_image && !a.normalise && !a.boxes && a.out_stride[3] == 1) {
    const auto line = [&](int64_t y) { return out + sample * a.out_stride[0] + y * a.out_stride[2]; };
    if constexpr (std::is_same_v<T, A>)
      if (n % Vec<A>::kLanes == 0) {
        for (int64_t y = begin; y < end; ++y) maker(y, n, line(y), a.out_stride[1]);
        return;
      }
    if constexpr (std::is_same_v<T, uint8_t>)
      if (maker.make_bytes) {
        for (int64_t y = begin; y < end; ++y)
          maker.make_bytes(maker.resampler, y, n, line(y), a.out_stride[1]);
        return;
      }
  }
  A* row = static_cast<A*>(scratch.rows);
  for (int64_t y = begin; y < end; ++y) {
    coloured_row(y, row);
    emit_row(a, sample, y, row, pitch, out);
  }
}

// ---- the table

int64_t source_bytes(const AugmentArgs& a) {
  int64_t bytes = copies_images(a) ? a.channels * a.in_height * a.in_width * pixel_bytes(a.in_type) : 0;
  for_each_shrink(a, [&](const Shrink& s) {
    bytes = most(bytes, a.channels * s.size[0] * s.size[1] * accumulated_bytes(a));
  });
  return rounded_up(bytes, kCacheLine);
}
int64_t source_rows(const AugmentArgs& a) {
  int64_t rows = a.in_height;
  for_each_shrink(a, [&](const Shrink& s) { rows = most(rows, s.size[1]); });
  return rows;
}
int64_t image_bytes(const AugmentArgs& a) {
  return a.colour_steps & kContrast ? a.channels * image_pitch(a) * accumulated_bytes(a) : 0;
}
int64_t rows_bytes(const AugmentArgs& a) {
  int64_t bytes = RowsLayout(a).bytes(a);
  for_each_shrink(a, [&](const Shrink& s) {
    bytes = most(bytes, filters_bytes(a, s) + a.in_width * accumulated_bytes(a));
  });
  return bytes;
}

void source(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, int64_t begin, int64_t end) {
  const Shrink shrink = shrink_of(a, sample);
  with_pixels(a.in_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    const FlushMode<A> mode;
    if (shrink.on) {
      A* line = reinterpret_cast<A*>(static_cast<char*>(scratch.rows) + filters_bytes<A>(a, shrink));
      Shrinker<T, A>(a, shrink, sample, scratch.rows)
          .make_rows(begin, least(end, shrink.size[1]), static_cast<A*>(scratch.source), line);
      return;
    }
    if (!copies_images(a)) return;
    for (int64_t c = 0; c < a.channels; ++c)
      for (int64_t y = begin; y < least(end, a.in_height); ++y) {
        const T* from = static_cast<const T*>(a.images) + sample * a.in_stride[0] + c * a.in_stride[1] +
                        y * a.in_stride[2];
        T* to = static_cast<T*>(scratch.source) + (c * a.in_height + y) * a.in_width;
        for (int64_t x = 0; x < a.in_width; ++x) to[x] = from[x * a.in_stride[3]];
      }
  });
}
template <class A>
void prepare_sample(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, int64_t begin,
                    int64_t end) {
  const FlushMode<A> mode;
  with_rows<A>(a, scratch, sample,
               [&](const RowMaker<A>& maker) { prepare_rows<A>(a, scratch, maker, sample, begin, end); });
}
void prepare(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, int64_t begin,
             int64_t end) {
  accumulated_bytes(a) == 8 ? prepare_sample<double>(a, scratch, sample, begin, end)
                            : prepare_sample<float>(a, scratch, sample, begin, end);
}
template <class A>
void finish_sample(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, int64_t begin,
                   int64_t end) {
  const FlushMode<A> mode;
  with_rows<A>(a, scratch, sample, [&](const RowMaker<A>& maker) {
    with_pixels(a.out_type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if constexpr (std::is_same_v<typename Accumulate<T>::type, A>)
        finish_rows<A>(a, scratch, maker, sample, begin, end, static_cast<T*>(a.output));
    });
  });
}
void finish(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, int64_t begin, int64_t end) {
  accumulated_bytes(a) == 8 ? finish_sample<double>(a, scratch, sample, begin, end)
                            : finish_sample<float>(a, scratch, sample, begin, end);
}
template <class A>
void backward_sample(const AugmentArgs& a, void* scratch, int64_t sample) {
  const FlushMode<A> mode;
  SampleBackward<A>(a, scratch, sample).images_gradient();
}
void backward(const AugmentArgs& a, void* scratch, int64_t sample) {
  accumulated_bytes(a) == 8 ? backward_sample<double>(a, scratch, sample)
                            : backward_sample<float>(a, scratch, sample);
}

}  // namespace

extern const AugmentKernels augment_kernels;
const AugmentKernels augment_kernels = {source_bytes, source_rows, image_bytes, rows_bytes, backward_bytes,
                                        source,       prepare,     finish,      backward};

}  // namespace fastreg::FASTREG_ISA
