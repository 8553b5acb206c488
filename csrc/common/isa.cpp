#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastreg {
namespace {

#if defined(__x86_64__)
constexpr const char* kNames[] = {"sse2", "avx2", "avx512"};
constexpr const char* kList = "sse2,avx2,avx512";
bool runs(Isa isa) {
  if (isa == Isa::kBaseline) return true;
  __builtin_cpu_init();  // the start-up code of gcc's library has done so, that of others need not have
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  if (isa == Isa::kAvx2 || !avx2) return avx2;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
// The first machines with AVX-512 lower their clock for it, which costs the rest of a program more than it
// gains here. Those that do not all have VBMI2 (Ice Lake, Zen 4 and later).
bool gains(Isa isa) { return runs(isa) && (isa != Isa::kAvx512 || __builtin_cpu_supports("avx512vbmi2")); }
constexpr Isa kSets[] = {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline};
#else
#if defined(__aarch64__)
constexpr const char* kNames[] = {"neon"};
#else
constexpr const char* kNames[] = {"portable"};
#endif
constexpr const char* kList = kNames[0];
bool runs(Isa) { return true; }
bool gains(Isa) { return true; }
constexpr Isa kSets[] = {Isa::kBaseline};
#endif

Isa choose() {
  const char* forced = std::getenv("FASTREG_CPU_CAPABILITY");
  const std::string name = forced ? forced : "";
  for (const Isa isa : kSets) {
    if (name.empty() ? gains(isa) : runs(isa) && name == kNames[int(isa)]) return isa;
  }
  if (name == "baseline") return Isa::kBaseline;
  throw std::runtime_error("FASTREG_CPU_CAPABILITY: expected one of " + std::string(kList) +
                           " that this machine can run, got '" + name + "'; unset it to take the best");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}
constexpr int64_t kFew = 1 << 13;  // where dropout gains as much as it loses; the other ops meet at 2^15
Isa isa(int64_t elements) {
  // A processor wakes the upper half of its vector units when they are first used after a while, and is slow
  // for some microseconds: more than they gain on so few elements. The bits are the same.
  static const bool forced = std::getenv("FASTREG_CPU_CAPABILITY") != nullptr;
  return isa() == Isa::kAvx512 && elements < kFew && !forced ? Isa::kAvx2 : isa();
}
const char* isa_name() { return kNames[int(isa())]; }
const char* isa_list() { return kList; }

}  // namespace fastreg
