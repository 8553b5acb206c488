// Which instruction sets this build has, and which one runs. Each kernel file is compiled once per set into a
// namespace of that name; an op declares its table of kernels with FR_DECLARE_KERNELS and takes the one for
// this machine, and for so many elements, with FR_KERNELS.
#pragma once
#include <cstdint>

namespace fastreg {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa isa();  // the best this machine has, or what FASTREG_CPU_CAPABILITY names; std::runtime_error if it
            // cannot
Isa isa(int64_t elements);  // the same for a call on so many elements
const char* isa_name();     // "sse2" or "neon" for the baseline, "avx2", "avx512"
const char* isa_list();     // all that were compiled, comma-separated

#define FR_DECLARE_KERNELS_OF(set, Table, name) \
  namespace set {                               \
  extern const Table name;                      \
  }

#ifdef __x86_64__
#define FR_DECLARE_KERNELS(Table, name)        \
  FR_DECLARE_KERNELS_OF(baseline, Table, name) \
  FR_DECLARE_KERNELS_OF(avx2, Table, name)     \
  FR_DECLARE_KERNELS_OF(avx512, Table, name)
namespace detail {
template <class Table>
const Table& pick(Isa isa, const Table& baseline, const Table& avx2, const Table& avx512) {
  return isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : baseline;
}
}  // namespace detail
#define FR_KERNELS(name, elements)                                                                     \
  (::fastreg::detail::pick(::fastreg::isa(elements), ::fastreg::baseline::name, ::fastreg::avx2::name, \
                           ::fastreg::avx512::name))
#else
#define FR_DECLARE_KERNELS(Table, name) FR_DECLARE_KERNELS_OF(baseline, Table, name)
#define FR_KERNELS(name, elements) ((void)(elements), ::fastreg::baseline::name)
#endif

}  // namespace fastreg
