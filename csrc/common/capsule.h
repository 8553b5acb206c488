// Functions of an op that other modules of this package call without Python: module.cpp makes a capsule of
// each, named as PyCapsule_Import wants it. An op registers its own where it defines the function:
//
//   const Capsule step_capsule("fastreg._C.sgd_step", reinterpret_cast<const void*>(&sgd_step));
#pragma once

namespace fastreg {

struct Capsule {
  inline static const Capsule* last = nullptr;  // initialised before any constructor runs
  Capsule(const char* name, const void* function) : name(name), function(function), before(last) {
    last = this;
  }
  const char* const name;
  const void* const function;
  const Capsule* const before;
};

}  // namespace fastreg
