// Dropout on the CPU, formula in dropout_math.h.
// Bytes per float32 element: forward reads 4, writes 4 and 1/8 of mask; backward reads 4 1/8, writes 4: the
// floor. With a residual added forward reads 4 more.
#include <type_traits>

#include "../common/simd.h"
#include "dropout_draw_cpu.h"
#include "dropout_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// Mask bytes [begin, end), at most kBlock of them.
void draw_block(const DropoutArgs& a, int64_t begin, int64_t end, uint8_t* out) {
  draw_bytes(a.seed.get(), a.threshold, a.offset + uint64_t(begin) * 8, end - begin, out);
  const int64_t bytes = (a.decisions + 7) / 8;
  if (end == bytes && a.decisions % 8) out[end - 1 - begin] &= uint8_t((1u << (a.decisions % 8)) - 1u);
}

void draw(const DropoutArgs& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; b += kBlock)
    draw_block(a, b, b + kBlock < end ? b + kBlock : end, a.mask + b);
}

// Does the bfloat16 among n that fill vectors of pairs, 32 at a time, and gives how many those are.
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
    even = product(even, scale);
    odd = product(odd, scale);
    if (kShift) even = even + shift, odd = odd + shift;
    uint32_t bits;
    memcpy(&bits, mask + i / 8, 4);
    store_pairs(out + i, select_pairs(bits, pack_pairs(even, odd), others));
  }
  return i;
}

template <bool kShift, class T>
void apply_blocks(const DropoutArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  const V scale{A(a.scale)}, shift{A(a.shift)}, dropped{A(a.dropped)};
  T in_buffer[kBlock], out_buffer[kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t n = end - block < kBlock ? end - block : kBlock;
    const T* in = read_block(a.input_layout, static_cast<const T*>(a.input), block, block + n, in_buffer);
    T* out = block_to_write(a.output_layout, static_cast<T*>(a.output), block, out_buffer);
    if (a.inner == 1) {
      int64_t done = 0;
      if constexpr (std::is_same_v<T, BFloat16>)
        done = apply_pairs<kShift>(in, out, a.mask + block / 8, n, scale, shift, dropped);
      for_each_vector<A>(n - done, [&](int64_t j, int lanes) __attribute__((always_inline)) {
        const int64_t i = done + j;
        uint32_t bits = a.mask[(block + i) / 8];
        if (V::kLanes == 16 && lanes > 8) bits |= uint32_t(a.mask[(block + i) / 8 + 1]) << 8;
        store(out + i,
              dropout_element<kShift>(load(in + i, lanes), V::from_bits(bits), scale, shift, dropped), lanes);
      });
    } else {
      for (int64_t i = 0; i < n;) {
        const int64_t decision = (block + i) / a.inner, rest = (decision + 1) * a.inner - (block + i);
        const int64_t run = rest < n - i ? rest : n - i;
        const auto kept = V::from_bits(a.mask[decision / 8] >> (decision % 8) & 1 ? 0xffff : 0);
        for_each_vector<A>(run, [&](int64_t j, int lanes) __attribute__((always_inline)) {
          store(out + i + j, dropout_element<kShift>(load(in + i + j, lanes), kept, scale, shift, dropped),
                lanes);
        });
        i += run;
      }
    }
    write_block(a.output_layout, static_cast<T*>(a.output), block, block + n, out);
  }
}

void apply(const DropoutArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    a.shift != 0 ? apply_blocks<true, T>(a, begin, end) : apply_blocks<false, T>(a, begin, end);
  });
}

// Block by block, so that the mask is read while it is in the cache.
void forward(const DropoutArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    draw(a, block / 8, (stop + 7) / 8);
    apply(a, block, stop);
  }
}

// bias[(position + i) % columns] of a block, i < kBlock, as contiguous memory. A short bias is repeated, so
// that a block may start anywhere in it.
template <class T>
class BiasBlocks {
 public:
  BiasBlocks(const DropoutAddArgs& a, int64_t room)
      : bias_(static_cast<const T*>(a.bias)), columns_(a.columns) {
    if (!bias_ || columns_ >= kBlock) return;
    const int64_t count = columns_ + (room < kBlock ? room : kBlock);
    memcpy(buffer_, bias_, size_t(columns_) * sizeof(T));
    for (int64_t done = columns_; done < count; done *= 2)
      memcpy(buffer_ + done, buffer_, size_t(done < count - done ? done : count - done) * sizeof(T));
  }
  const T* at(int64_t position, int64_t n) {
    const int64_t column = position % columns_, rest = columns_ - column;
    if (columns_ < kBlock) return buffer_ + column;
    if (n <= rest) return bias_ + column;
    memcpy(buffer_, bias_ + column, size_t(rest) * sizeof(T));
    memcpy(buffer_ + rest, bias_, size_t(n - rest) * sizeof(T));
    return buffer_;
  }

 private:
  const T* bias_;
  int64_t columns_;
  T buffer_[2 * kBlock];
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
    even = product(even, scale) + even_more;
    odd = product(odd, scale) + odd_more;
    uint32_t bits;
    memcpy(&bits, mask + i / 8, 4);
    store_pairs(out + i, select_pairs(bits, pack_pairs(even, odd), load_pairs(residual + i)));
  }
  return i;
}

template <bool kBias, class T>
void add_blocks(const DropoutAddArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  const V scale{A(a.scale)};
  BiasBlocks<T> bias_blocks(a, end - begin);
  T in_buffer[kBlock], residual_buffer[kBlock], out_buffer[kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t n = end - block < kBlock ? end - block : kBlock;
    draw(a, block / 8, (block + n + 7) / 8);
    const uint8_t* mask = a.mask + block / 8;
    const T* in = read_block(a.input_layout, static_cast<const T*>(a.input), block, block + n, in_buffer);
    const T* residual =
        read_block(a.residual_layout, static_cast<const T*>(a.residual), block, block + n, residual_buffer);
    const T* bias = kBias ? bias_blocks.at(block, n) : nullptr;
    T* out = block_to_write(a.output_layout, static_cast<T*>(a.output), block, out_buffer);
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
    write_block(a.output_layout, static_cast<T*>(a.output), block, block + n, out);
  }
}

void add(const DropoutAddArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    a.bias ? add_blocks<true, T>(a, begin, end) : add_blocks<false, T>(a, begin, end);
  });
}

// Piece by piece of the rows. One that begins within a byte shares it with the piece before.
void mask(const DropoutMaskArgs& a, int64_t begin, int64_t end) {
  const int64_t last = a.decisions < 8 * end ? a.decisions : 8 * end;
  memset(a.mask + begin, 0, size_t(end - begin));
  for (int64_t i = 8 * begin; i < last;) {
    const DropoutPiece piece = dropout_piece(a, i, last - i < 8 * kBlock ? last - i : 8 * kBlock);
    const int64_t bytes = (piece.count + 7) / 8;
    const unsigned skip = unsigned(i % 8), rest = unsigned(piece.count % 8);
    uint8_t drawn[kBlock], *out = a.mask + i / 8;
    draw_bytes(a.seed.get(), a.threshold, piece.at, bytes, drawn);
    if (rest) drawn[bytes - 1] &= uint8_t((1u << rest) - 1u);
    for (int64_t j = 0; j < bytes; ++j) {
      out[j] |= uint8_t(drawn[j] << skip);
      if (skip && drawn[j] >> (8 - skip)) out[j + 1] |= uint8_t(drawn[j] >> (8 - skip));
    }
    i += piece.count;
  }
}

}  // namespace

extern const DropoutKernels dropout_kernels;
const DropoutKernels dropout_kernels = {draw, apply, forward, add, mask};

}  // namespace fastreg::FASTREG_ISA
