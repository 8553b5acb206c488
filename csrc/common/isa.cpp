#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastreg {
namespace {

#if defined(__x86_64__)
constexpr const char* kBaselineName = "sse2";
#elif defined(__aarch64__)
constexpr const char* kBaselineName = "neon";
#else
constexpr const char* kBaselineName = "portable";
#endif

bool has_avx2() {
#ifdef FASTREG_HAVE_AVX2
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

Isa choose() {
  const char* forced = std::getenv("FASTREG_CPU_CAPABILITY");
  const std::string name = forced ? forced : "";
  if (name.empty()) return has_avx2() ? Isa::kAvx2 : Isa::kBaseline;
  if (name == kBaselineName || name == "baseline") return Isa::kBaseline;
  if (name == "avx2" && has_avx2()) return Isa::kAvx2;
  throw std::runtime_error("FASTREG_CPU_CAPABILITY: expected one of " + std::string(isa_list()) +
                           " that this machine can run, got '" + name + "'; unset it to take the best");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}
const char* isa_name() { return isa() == Isa::kAvx2 ? "avx2" : kBaselineName; }
const char* isa_list() {
#if defined(FASTREG_HAVE_AVX2)
  return "sse2,avx2";
#else
  return kBaselineName;
#endif
}

}  // namespace fastreg
