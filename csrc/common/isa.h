// Which instruction sets this build has, and which one runs. Each kernel file is compiled once per set into a namespace of that
// name; an op declares its table of kernels with FR_DECLARE_KERNELS and takes the one for this machine with FR_KERNELS.
#pragma once

namespace fastreg {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa isa();               // the best this machine has, or what FASTREG_CPU_CAPABILITY names; std::runtime_error if it cannot
const char* isa_name();  // "sse2" or "neon" for the baseline, "avx2", "avx512"
const char* isa_list();  // all that were compiled, comma-separated

#define FR_DECLARE_KERNELS_OF(set, Table, name) \
  namespace set {                               \
  extern const Table name;                      \
  }

#ifdef __x86_64__
#define FR_DECLARE_KERNELS(Table, name)        \
  FR_DECLARE_KERNELS_OF(baseline, Table, name) \
  FR_DECLARE_KERNELS_OF(avx2, Table, name)     \
  FR_DECLARE_KERNELS_OF(avx512, Table, name)
#define FR_KERNELS(name)                                              \
  (::fastreg::isa() == ::fastreg::Isa::kAvx512 ? ::fastreg::avx512::name \
   : ::fastreg::isa() == ::fastreg::Isa::kAvx2 ? ::fastreg::avx2::name   \
                                               : ::fastreg::baseline::name)
#else
#define FR_DECLARE_KERNELS(Table, name) FR_DECLARE_KERNELS_OF(baseline, Table, name)
#define FR_KERNELS(name) (::fastreg::baseline::name)
#endif

}  // namespace fastreg
