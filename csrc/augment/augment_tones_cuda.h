// The steps of a policy on bytes, on CUDA. The formulas are in augment_tones.h. A thread takes four
// neighbouring pixels, all channels of them, so that a warp's loads and stores are whole sectors. Part of
// augment_cuda.cu.
//
// Launches: two, and scratch set to zero. The first looks at what contrast, autocontrast and equalize must
// know of a whole image; blocks of other samples leave at once. Bytes per pixel of a channel: it is read and
// written, 2, which is the floor; of samples with those three steps it is read once more, and with each
// sample go 3 KiB of counts, which are cleared, added to, and read by each of its blocks.
#pragma once
#include "augment_launch_cuda.h"
#include "augment_tones.h"

namespace fastreg {
inline namespace augment_kernels {

constexpr int kTonePixels = 4;                              // of a thread at a time
constexpr int64_t kTonePiece = 8 * kThreads * kTonePixels;  // pixels of an item

struct TonesPass {
  TonesArgs a;
  int64_t items;
  Divider pieces, width;
  bool wide;  // whether four pixels can be read and written as words
  uint64_t* greys;
  uint32_t* counts;

  // f(sample, first pixel, end) for the items of a block.
  template <class F>
  __device__ __forceinline__ void for_each_item(F f) const {
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const int64_t sample = pieces.divide(item),
                    first = (item - sample * int64_t(pieces.divisor)) * kTonePiece, end = first + kTonePiece;
      f(sample, first, end < a.pixels() ? end : a.pixels());
    }
  }
  __device__ __forceinline__ Tone step(int64_t sample) const { return Tone(a.steps[sample]); }
};

// Four pixels in C words: by channels, or, where the channels of a pixel are neighbours, as they lie in
// memory.
template <int C, bool kLast>
struct Pixels {
  uint32_t word[C] = {};

  static __device__ __forceinline__ constexpr int place(int c, int j) {
    return kLast ? j * C + c : c * kTonePixels + j;
  }
  static __device__ __forceinline__ int64_t offset(const TonesArgs& a, int c, int64_t pixel) {
    return kLast ? pixel * C + c : c * a.pixels() + pixel;
  }
  // Word i of pixels that begin there.
  static __device__ __forceinline__ int64_t word_offset(const TonesArgs& a, int i, int64_t first) {
    return kLast ? first * C + i * 4 : i * a.pixels() + first;
  }
  __device__ __forceinline__ uint8_t get(int c, int j) const {
    return uint8_t(word[place(c, j) / 4] >> (8 * (place(c, j) % 4)));
  }
  __device__ __forceinline__ void set(int c, int j, uint8_t value) {
    const int shift = 8 * (place(c, j) % 4);
    uint32_t& to = word[place(c, j) / 4];
    to = (to & ~(0xffu << shift)) | uint32_t(value) << shift;
  }
  // `number` of the pixels are there.
  __device__ __forceinline__ void load(const TonesPass& pass, const uint8_t* from, int64_t first,
                                       int number) {
    if (pass.wide) {
#pragma unroll
      for (int i = 0; i < C; ++i)
        word[i] = *reinterpret_cast<const uint32_t*>(from + word_offset(pass.a, i, first));
      return;
    }
#pragma unroll
    for (int j = 0; j < kTonePixels; ++j)
#pragma unroll
      for (int c = 0; c < C; ++c)
        if (j < number) set(c, j, from[offset(pass.a, c, first + j)]);
  }
  __device__ __forceinline__ void store(const TonesPass& pass, uint8_t* to, int64_t first, int number) const {
    if (pass.wide) {
#pragma unroll
      for (int i = 0; i < C; ++i) *reinterpret_cast<uint32_t*>(to + word_offset(pass.a, i, first)) = word[i];
      return;
    }
#pragma unroll
    for (int j = 0; j < kTonePixels; ++j)
#pragma unroll
      for (int c = 0; c < C; ++c)
        if (j < number) to[offset(pass.a, c, first + j)] = get(c, j);
  }
};

// f(four pixels of the item, the first of them, how many there are) for those of this thread.
template <int C, bool kLast, class F>
__device__ __forceinline__ void for_each_pixels(const TonesPass& pass, int64_t sample, int64_t begin,
                                                int64_t end, F f) {
  const uint8_t* from = pass.a.images + sample * pass.a.sample_bytes();
  for (int64_t first = begin + threadIdx.x * kTonePixels; first < end; first += kThreads * kTonePixels) {
    const int number = end - first < kTonePixels ? int(end - first) : kTonePixels;
    Pixels<C, kLast> pixels;
    pixels.load(pass, from, first, number);
    f(pixels, first, number);
  }
}

// ---- what a step must know of the whole image

template <int C, bool kLast>
__global__ void __launch_bounds__(kThreads) tone_counts(const TonesPass pass) {
  __shared__ uint32_t count[C][kLevels], grey;
  pass.for_each_item([&](int64_t sample, int64_t begin, int64_t end) {
    const Tone step = pass.step(sample);
    if (step != Tone::kContrast && step != Tone::kAutocontrast && step != Tone::kEqualize) return;
    for (int c = 0; c < C; ++c) count[c][threadIdx.x] = 0;
    if (threadIdx.x == 0) grey = 0;
    __syncthreads();
    uint32_t mine = 0;
    for_each_pixels<C, kLast>(pass, sample, begin, end, [&](const auto& pixels, int64_t, int number) {
#pragma unroll
      for (int j = 0; j < kTonePixels; ++j) {
        if (j >= number) continue;
        if (step == Tone::kContrast) {
          float p[C];
#pragma unroll
          for (int c = 0; c < C; ++c) p[c] = load_float(pixels.get(c, j));
          mine += uint32_t(grey_of_channels<true>(p));
        } else {
#pragma unroll
          for (int c = 0; c < C; ++c) atomicAdd(&count[c][pixels.get(c, j)], 1u);
        }
      }
    });
    if (step == Tone::kContrast) atomicAdd(&grey, mine);
    __syncthreads();
    if (step == Tone::kContrast) {
      if (threadIdx.x == 0)
        atomicAdd(reinterpret_cast<unsigned long long*>(pass.greys + sample), (unsigned long long)(grey));
    } else {
      for (int c = 0; c < C; ++c)
        if (count[c][threadIdx.x])
          atomicAdd(pass.counts + (sample * C + c) * kLevels + threadIdx.x, count[c][threadIdx.x]);
    }
    __syncthreads();
  });
}
static_assert(kThreads == kLevels && kTonePiece * 255 < int64_t(1) << 32,
              "a thread has a level, and the grey of an item fits into 32 bits");

// ---- the step

// Of a block's sample.
template <int C>
struct Toned {
  uint8_t table[C][kLevels];
  ColourFactors<float> factors;
  float keep, rest;  // of saturation; `rest` is the weight of sharpness too
  uint8_t bits, threshold;
};

// The tables of autocontrast or of equalize, of each channel by a warp, of whose lanes each has eight levels.
template <int C>
__device__ __forceinline__ void make_tables(const TonesPass& pass, int64_t sample, bool equalizes,
                                            uint8_t (&table)[C][kLevels]) {
  constexpr int kMine = kLevels / kLanes;
  const int channel = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (channel >= C) return;
  const uint32_t* counts = pass.counts + (sample * C + channel) * kLevels;
  uint32_t count[kMine], sum = 0;
  int low = kLevels, high = -1;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int level = lane * kMine + i;
    count[i] = counts[level];
    sum += count[i];
    if (count[i]) {
      low = low < level ? low : level;
      high = level;
    }
  }
  uint32_t below = sum;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int lower = __shfl_xor_sync(kAllLanes, low, distance),
              higher = __shfl_xor_sync(kAllLanes, high, distance);
    low = low < lower ? low : lower;
    high = high > higher ? high : higher;
    const uint32_t before = __shfl_up_sync(kAllLanes, below, unsigned(distance));
    if (lane >= distance) below += before;
  }
  below -= sum;
  const uint32_t step = step_of(pass.a.pixels(), counts[high]);
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int level = lane * kMine + i;
    if (equalizes)
      table[channel][level] = equalized<uint32_t>(level, below, step);
    else if (level >= low && level <= high)
      table[channel][level] = uint8_t(autocontrasted(level, low, high));
    below += count[i];
  }
}

template <int C>
__device__ __forceinline__ void begin_toned(const TonesPass& pass, int64_t sample, Tone step, Toned<C>& s) {
  if (step == Tone::kAutocontrast || step == Tone::kEqualize)
    make_tables(pass, sample, step == Tone::kEqualize, s.table);
  if (threadIdx.x != 0) return;
  const double strength = pass.a.strengths[sample], factor = 1 + strength;
  float mean = 0;
  if (step == Tone::kContrast) {
    const uint64_t sum = pass.greys[sample];
    const float high = float(sum);
    mean = mean_of(high, float(int64_t(sum) - int64_t(high)), float(pass.a.pixels()));
  }
  double row[kColourColumns] = {};
  row[kBrightnessColumn] = row[kContrastColumn] = factor;
  s.factors = ColourFactors<float>(row, 255.f, mean);
  s.keep = float(factor);
  s.rest = float(1 - factor);
  s.bits = kept_bits(strength);
  s.threshold = threshold_of(strength);
}

// Sharpens pixels [begin, end), a pixel of a channel by a thread. Its neighbours come from the cache.
template <int C, bool kLast>
__device__ __forceinline__ void sharpen(const TonesPass& pass, const uint8_t* from, uint8_t* to, float weight,
                                        int64_t begin, int64_t end) {
  const TonesArgs& a = pass.a;
  for (int64_t pixel = begin + threadIdx.x; pixel < end; pixel += kThreads) {
    const int64_t y = pass.width.divide(pixel), x = pixel - y * a.width;
    const bool inside = y > 0 && y < a.height - 1 && x > 0 && x < a.width - 1;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t at = Pixels<C, kLast>::offset(a, c, pixel);
      uint8_t level = from[at];
      if (inside) {
        const int p = level;
        int nine = 0;
#pragma unroll
        for (int i = -1; i <= 1; ++i)
#pragma unroll
          for (int j = -1; j <= 1; ++j) nine += from[at + (i * a.width + j) * (kLast ? C : 1)];
        store_float(level_of(multiply_add(float(change_to_smooth(nine, p)), weight, float(p))), &level);
      }
      to[at] = level;
    }
  }
}

// What a pixel becomes by one of the steps that need not know its neighbours.
template <int C>
__device__ __forceinline__ void tone_pixel(const Toned<C>& s, Tone step, uint8_t (&level)[C]) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int c = 0; c < C; ++c) level[c] = f(level[c], c);
  };
  switch (step) {
    case Tone::kPosterize:
      return each([&](uint8_t p, int) { return uint8_t(p & s.bits); });
    case Tone::kSolarize:
      return each([&](uint8_t p, int) { return uint8_t(p >= s.threshold ? 255 - p : p); });
    case Tone::kAutocontrast:
    case Tone::kEqualize:
      return each([&](uint8_t p, int c) { return s.table[c][p]; });
    case Tone::kInvert:
      return each([&](uint8_t p, int) { return uint8_t(255 - p); });
    case Tone::kBrightness:
    case Tone::kContrast:
    case Tone::kSaturation:
      break;
    default:
      return;
  }
  float p[C];
#pragma unroll
  for (int c = 0; c < C; ++c) p[c] = load_float(level[c]);
  if (step != Tone::kSaturation) {
    const int colour = step == Tone::kContrast ? kContrast : kBrightness;
#pragma unroll
    for (int c = 0; c < C; ++c) colour_pixel<true>(s.factors, colour, p[c]);
  } else if constexpr (C == 3) {
    saturate_pixel(s.keep, s.rest, p[0], p[1], p[2],
                   [](float a, float b, float c) { return multiply_add(a, b, c); });
  }
#pragma unroll
  for (int c = 0; c < C; ++c) store_float(p[c], &level[c]);
}

template <int C, bool kLast>
__global__ void __launch_bounds__(kThreads) tone_pixels(const TonesPass pass) {
  __shared__ Toned<C> s;
  pass.for_each_item([&](int64_t sample, int64_t begin, int64_t end) {
    const Tone step = pass.step(sample);
    const uint8_t* from = pass.a.images + sample * pass.a.sample_bytes();
    uint8_t* to = pass.a.output + sample * pass.a.sample_bytes();
    begin_toned(pass, sample, step, s);
    __syncthreads();
    if (step == Tone::kSharpness)
      sharpen<C, kLast>(pass, from, to, s.rest, begin, end);
    else
      for_each_pixels<C, kLast>(pass, sample, begin, end, [&](auto& pixels, int64_t first, int number) {
#pragma unroll
        for (int j = 0; j < kTonePixels; ++j) {
          if (j >= number) continue;
          uint8_t level[C];
#pragma unroll
          for (int c = 0; c < C; ++c) level[c] = pixels.get(c, j);
          tone_pixel(s, step, level);
#pragma unroll
          for (int c = 0; c < C; ++c) pixels.set(c, j, level[c]);
        }
        pixels.store(pass, to, first, number);
      });
    __syncthreads();
  });
}

template <int C, bool kLast>
int tones(const TonesArgs& a, void* stream) {
  TonesPass pass;
  const int64_t pieces = divide_up(a.pixels(), kTonePiece);
  pass.a = a;
  pass.items = a.batch * pieces;
  pass.pieces = Divider(pieces);
  pass.width = Divider(a.width);
  pass.wide = a.pixels() % kTonePixels == 0 && reinterpret_cast<uintptr_t>(a.images) % 4 == 0 &&
              reinterpret_cast<uintptr_t>(a.output) % 4 == 0;
  pass.greys = static_cast<uint64_t*>(a.scratch);
  pass.counts = reinterpret_cast<uint32_t*>(pass.greys + a.batch);
  if (const int error = zero(static_cast<char*>(a.scratch), tones_scratch_bytes(a), stream)) return error;
  const unsigned blocks = blocks_for(pass.items, 1);
  if (const int error = launch(tone_counts<C, kLast>, blocks, kThreads, 0, stream, pass)) return error;
  return launch(tone_pixels<C, kLast>, blocks, kThreads, 0, stream, pass);
}

}  // namespace augment_kernels
}  // namespace fastreg
