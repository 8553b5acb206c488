// Dropout on the CPU, formula in dropout_math.h.
// Bytes per float32 element: forward reads 4, writes 4 and 1/8 of mask; backward reads 4 1/8, writes 4: the
// floor. With a residual added forward reads 4 more.
#include <type_traits>

#include "../common/simd.h"
#include "dropout_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// Mask bytes of whole global groups.
void draw_groups(const DropoutArgs& a, uint64_t group, int64_t count, uint8_t* out) {
  if (a.threshold == 0 || a.threshold >> 32) {
    memset(out, a.threshold ? 0xff : 0, size_t(count));
    return;
  }
  const PhiloxKeys keys(a.seed.get());
  const bool exact = (a.threshold & 0xffff) == 0;  // 16 bits decide all
  for (int64_t g = 0; g < count; g += kGroupLanes) {
    const uint64_t at = group + uint64_t(g);
    const Comparison c =
        compare_groups(philox_groups(keys, at, 0, Purpose::kDropout), uint16_t(a.threshold >> 16));
    uint8_t bytes[8];
    memcpy(bytes, &c.less, 8);
    if (c.ties && !exact)
      for (int j = 0; j < kGroupLanes; ++j)
        bytes[j] = dropout_bits(a.seed.get(), at + uint64_t(j), a.threshold);
    if (count - g >= kGroupLanes)
      memcpy(out + g, bytes, kGroupLanes);
    else
      memcpy(out + g, bytes, size_t(count - g));
  }
}

// Mask bytes [begin, end), at most kTile of them. Where the offset is not a multiple of 8, each straddles two
// groups.
void draw_bytes(const DropoutArgs& a, int64_t begin, int64_t end, uint8_t* out) {
  const uint64_t group = a.offset / 8 + uint64_t(begin);
  const unsigned shift = unsigned(a.offset % 8);
  if (shift == 0) {
    draw_groups(a, group, end - begin, out);
  } else {
    uint8_t bytes[kTile + 1];
    draw_groups(a, group, end - begin + 1, bytes);
    for (int64_t i = 0; i < end - begin; ++i)
      out[i] = uint8_t(bytes[i] >> shift | bytes[i + 1] << (8 - shift));
  }
  const int64_t bytes = (a.decisions + 7) / 8;
  if (end == bytes && a.decisions % 8) out[end - 1 - begin] &= uint8_t((1u << (a.decisions % 8)) - 1u);
}

void draw(const DropoutArgs& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; b += kTile)
    draw_bytes(a, b, b + kTile < end ? b + kTile : end, a.mask + b);
}

// The whole blocks of 32 among n bfloat16; gives how many elements that were.
template <bool kShift, class V>
FR_INLINE int64_t apply_pairs(const BFloat16* in, BFloat16* out, const uint8_t* mask, int64_t n, V scale,
                              V shift, V dropped) {
  BFloat16 other;
  from_float(dropped.part[0][0], &other);
  const Pairs others = all_pairs(other);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    V even, odd;
    load_pairs(in + i, even, odd);
    even = even * scale;
    odd = odd * scale;
    if (kShift) even = even + shift, odd = odd + shift;
    uint32_t bits;
    memcpy(&bits, mask + i / 8, 4);
    store_pairs(out + i, select_pairs(bits, pack_pairs(even, odd), others));
  }
  return i;
}

template <bool kShift, class T>
void apply_tiles(const DropoutArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  const V scale{A(a.scale)}, shift{A(a.shift)}, dropped{A(a.dropped)};
  T in_buffer[kTile], out_buffer[kTile];
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t n = end - tile < kTile ? end - tile : kTile;
    const T* in = read_tile(a.input_layout, static_cast<const T*>(a.input), tile, tile + n, in_buffer);
    T* out = tile_to_write(a.output_layout, static_cast<T*>(a.output), tile, out_buffer);
    if (a.inner == 1) {
      int64_t done = 0;
      if constexpr (std::is_same_v<T, BFloat16>)
        done = apply_pairs<kShift>(in, out, a.mask + tile / 8, n, scale, shift, dropped);
      for_each_vector<A>(n - done, [&](int64_t j, int lanes) __attribute__((always_inline)) {
        const int64_t i = done + j;
        uint32_t bits = a.mask[(tile + i) / 8];
        if (V::kLanes == 16 && lanes > 8) bits |= uint32_t(a.mask[(tile + i) / 8 + 1]) << 8;
        store(out + i,
              dropout_element<kShift>(load(in + i, lanes), V::from_bits(bits), scale, shift, dropped), lanes);
      });
    } else {
      for (int64_t i = 0; i < n;) {
        const int64_t decision = (tile + i) / a.inner, rest = (decision + 1) * a.inner - (tile + i);
        const int64_t run = rest < n - i ? rest : n - i;
        const auto kept = V::from_bits(a.mask[decision / 8] >> (decision % 8) & 1 ? 0xffff : 0);
        for_each_vector<A>(run, [&](int64_t j, int lanes) __attribute__((always_inline)) {
          store(out + i + j, dropout_element<kShift>(load(in + i + j, lanes), kept, scale, shift, dropped),
                lanes);
        });
        i += run;
      }
    }
    write_tile(a.output_layout, static_cast<T*>(a.output), tile, tile + n, out);
  }
}

void apply(const DropoutArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    a.shift != 0 ? apply_tiles<true, T>(a, begin, end) : apply_tiles<false, T>(a, begin, end);
  });
}

void forward(const DropoutArgs& a, int64_t begin,
             int64_t end) {  // tile by tile, so that the mask is still in cache
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t stop = tile + kTile < end ? tile + kTile : end;
    draw(a, tile / 8, (stop + 7) / 8);
    apply(a, tile, stop);
  }
}

// bias[(position + i) % columns] for a tile, i < kTile, in one piece. A short bias is repeated once, so that
// a tile may start anywhere in it.
template <class T>
class BiasTiles {
 public:
  BiasTiles(const DropoutAddArgs& a, int64_t room)
      : bias_(static_cast<const T*>(a.bias)), columns_(a.columns) {
    if (!bias_ || columns_ >= kTile) return;
    const int64_t count = columns_ + (room < kTile ? room : kTile);
    memcpy(buffer_, bias_, size_t(columns_) * sizeof(T));
    for (int64_t done = columns_; done < count; done *= 2)
      memcpy(buffer_ + done, buffer_, size_t(done < count - done ? done : count - done) * sizeof(T));
  }
  const T* at(int64_t position, int64_t n) {
    const int64_t column = position % columns_, rest = columns_ - column;
    if (columns_ < kTile) return buffer_ + column;
    if (n <= rest) return bias_ + column;
    memcpy(buffer_, bias_ + column, size_t(rest) * sizeof(T));
    memcpy(buffer_ + rest, bias_, size_t(n - rest) * sizeof(T));
    return buffer_;
  }

 private:
  const T* bias_;
  int64_t columns_;
  T buffer_[2 * kTile];
};

// As apply_pairs; where dropped, the residual needs no rounding.
template <bool kBias, class V>
FR_INLINE int64_t add_pairs(const BFloat16* in, const BFloat16* residual, const BFloat16* bias, BFloat16* out,
                            const uint8_t* mask, int64_t n, V scale) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    V even, odd, even_more, odd_more;
    load_pairs(in + i, even, odd);
    if (kBias) {
      load_pairs(bias + i, even_more, odd_more);
      even = even + even_more;
      odd = odd + odd_more;
    }
    load_pairs(residual + i, even_more, odd_more);
    even = even * scale + even_more;
    odd = odd * scale + odd_more;
    uint32_t bits;
    memcpy(&bits, mask + i / 8, 4);
    store_pairs(out + i, select_pairs(bits, pack_pairs(even, odd), load_pairs(residual + i)));
  }
  return i;
}

template <bool kBias, class T>
void add_tiles(const DropoutAddArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  const V scale{A(a.scale)};
  BiasTiles<T> bias_tiles(a, end - begin);
  T in_buffer[kTile], residual_buffer[kTile], out_buffer[kTile];
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t n = end - tile < kTile ? end - tile : kTile;
    draw(a, tile / 8, (tile + n + 7) / 8);
    const uint8_t* mask = a.mask + tile / 8;
    const T* in = read_tile(a.input_layout, static_cast<const T*>(a.input), tile, tile + n, in_buffer);
    const T* residual =
        read_tile(a.residual_layout, static_cast<const T*>(a.residual), tile, tile + n, residual_buffer);
    const T* bias = kBias ? bias_tiles.at(tile, n) : nullptr;
    T* out = tile_to_write(a.output_layout, static_cast<T*>(a.output), tile, out_buffer);
    int64_t done = 0;
    if constexpr (std::is_same_v<T, BFloat16>)
      done = add_pairs<kBias>(in, residual, bias, out, mask, n, scale);
    for_each_vector<A>(n - done, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      const int64_t i = done + j;
      uint32_t bits = mask[i / 8];
      if (V::kLanes == 16 && lanes > 8) bits |= uint32_t(mask[i / 8 + 1]) << 8;
      V x = load(in + i, lanes);
      if (kBias) x = x + load(bias + i, lanes);
      store(out + i, dropout_add_element(x, V::from_bits(bits), scale, load(residual + i, lanes)), lanes);
    });
    write_tile(a.output_layout, static_cast<T*>(a.output), tile, tile + n, out);
  }
}

void add(const DropoutAddArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    a.bias ? add_tiles<true, T>(a, begin, end) : add_tiles<false, T>(a, begin, end);
  });
}

}  // namespace

extern const DropoutKernels dropout_kernels;
const DropoutKernels dropout_kernels = {draw, apply, forward, add};

}  // namespace fastreg::FASTREG_ISA
