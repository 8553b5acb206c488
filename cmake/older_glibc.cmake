# FASTREG_OLDER_GLIBC: modules that run on every system with glibc 2.28, built on a newer one by its own gcc.
#
# A symbol of glibc or libstdc++ has versions, and the linker takes the newest. Three things keep them old:
# the templates of libstdc++'s streams are instantiated here (older_glibc.h), what libstdc++ has only since
# gcc 11 is part of the module, and calls of the functions below jump to their oldest version.
# tools/wheel.py looks at the result.

set(older_functions
  exp exp2 fmod fmodf log log2 pow
  # libcudart_static calls these
  dlclose dlerror dlmopen dlopen dlsym dlvsym shm_open shm_unlink
  pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join pthread_kill
  pthread_key_create pthread_key_delete pthread_once pthread_setspecific
  pthread_mutex_trylock pthread_mutexattr_destroy pthread_mutexattr_init pthread_mutexattr_setpshared
  pthread_mutexattr_settype
  pthread_rwlock_destroy pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock
  pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock
  pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared
  pthread_spin_destroy pthread_spin_init pthread_spin_lock pthread_spin_trylock pthread_spin_unlock
  sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait)

set(oldest GLIBC_2.2.5)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(oldest GLIBC_2.17)
endif()
set(wrapped ${older_functions})
list(TRANSFORM wrapped PREPEND "LINKER:--wrap=")
set(stubs "")
foreach(function IN LISTS older_functions)
  set(version ${oldest})
  if(function STREQUAL "dlmopen" AND oldest STREQUAL "GLIBC_2.2.5")
    set(version GLIBC_2.3.4)  # there since
  endif()
  string(APPEND stubs "FASTREG_OLD(${function}, ${version})\n")
endforeach()
configure_file(csrc/common/older_glibc.cpp.in older_glibc.cpp @ONLY)

add_library(older_glibc OBJECT "${CMAKE_CURRENT_BINARY_DIR}/older_glibc.cpp")
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-include${CMAKE_SOURCE_DIR}/csrc/common/older_glibc.h>")

# older_glibc(<module>): the module needs nothing that glibc 2.28 lacks.
function(older_glibc module)
  target_sources(${module} PRIVATE $<TARGET_OBJECTS:older_glibc>)
  # The linker drops the jumps that a module does not use. Before glibc 2.34 some of their functions were in
  # libraries of their own, which torch needs anyway.
  target_link_options(${module} PRIVATE ${wrapped} LINKER:--gc-sections)
endfunction()
