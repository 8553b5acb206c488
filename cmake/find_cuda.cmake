# Whether the CUDA kernels are built, and for which GPUs. It sets
#   build_cuda   whether they are,
#   why_no_cuda  why not, in one sentence, which `fastreg doctor` repeats,
#   nvcc_major   the major version of CUDA that the module is for,
#   cuda_archs   the architectures that were asked for and that this nvcc knows; empty for the usual ones.

include(cmake/cuda_archs.cmake)

# A torch of CUDA 13 takes the kernels that were built for CUDA 12, which have their own runtime within: a
# toolkit 12 that is named makes one module for both.
if(DEFINED ENV{CUDA12_HOME})
  set(ENV{CUDACXX} "$ENV{CUDA12_HOME}/bin/nvcc")
endif()

set(build_cuda OFF)
set(why_no_cuda "")
set(worth_a_warning OFF)  # there is a compiler or a GPU, so that somebody may have counted on the kernels
find_program(FASTREG_NVIDIA_SMI nvidia-smi)
find_program(FASTREG_NVCC nvcc)
mark_as_advanced(FASTREG_NVIDIA_SMI FASTREG_NVCC)
if(FASTREG_NVIDIA_SMI)
  execute_process(COMMAND "${FASTREG_NVIDIA_SMI}" -L OUTPUT_VARIABLE gpus RESULT_VARIABLE no_gpu ERROR_QUIET)
  if(NOT no_gpu AND gpus)
    set(worth_a_warning ON)
  endif()
endif()

if(NOT FASTREG_CUDA)
  set(why_no_cuda "FASTREG_CUDA is ${FASTREG_CUDA}")
  set(worth_a_warning OFF)
elseif(torch_cuda STREQUAL "none")
  set(why_no_cuda "torch ${torch_version} is built without CUDA")
else()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(worth_a_warning ON)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_says)
    string(REGEX MATCH "release ([0-9]+)\\.[0-9.]+" nvcc_release "${nvcc_says}")
    set(nvcc_major "${CMAKE_MATCH_1}")
    string(REGEX MATCH "^[0-9]+" torch_cuda_major "${torch_cuda}")
    if(NOT nvcc_major)
      set(nvcc_major "${torch_cuda_major}")
    endif()
    if(DEFINED ENV{CUDA12_HOME} AND nvcc_major EQUAL 12 AND torch_cuda_major GREATER 12)
      set(build_cuda ON)
    elseif(NOT nvcc_major EQUAL torch_cuda_major)
      string(CONCAT why_no_cuda "torch ${torch_version} has CUDA ${torch_cuda} and ${CMAKE_CUDA_COMPILER} is "
             "of ${nvcc_release}; set CUDACXX to an nvcc ${torch_cuda_major}.x")
    else()
      set(build_cuda ON)
    endif()
  else()
    # Which program it was, and what it said last, is what a reader needs to mend it.
    if(DEFINED ENV{CUDACXX})
      set(tried "$ENV{CUDACXX}")
    else()
      set(tried "${FASTREG_NVCC}")
    endif()
    if(tried)
      file(WRITE "${CMAKE_BINARY_DIR}/try.cu" "__global__ void kernel() {}\n")
      execute_process(COMMAND "${tried}" -c "${CMAKE_BINARY_DIR}/try.cu" -o "${CMAKE_BINARY_DIR}/try.o"
                      OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE status)
      string(STRIP "${said}" said)
      string(REGEX REPLACE ".*\n" "" said "${said}")
      if(said STREQUAL "")
        set(said "${status}")
      endif()
      set(why_no_cuda "${tried} does not compile CUDA (${said}); mend it or set CUDACXX to another nvcc")
      set(worth_a_warning ON)
      if(DEFINED ENV{CUDACXX})
        message(FATAL_ERROR "fastreg: CUDACXX is set, but ${why_no_cuda}, unset it, "
                            "or build without CUDA by FASTREG_CUDA=OFF")
      endif()
    else()
      set(why_no_cuda "there is no nvcc; install the CUDA toolkit or set CUDACXX")
    endif()
  endif()
endif()

if(why_no_cuda AND FASTREG_CUDA AND NOT FASTREG_CUDA STREQUAL "AUTO")
  message(FATAL_ERROR "FASTREG_CUDA=${FASTREG_CUDA}, but ${why_no_cuda}")
elseif(why_no_cuda AND worth_a_warning)
  message(WARNING "fastreg: no CUDA kernels: ${why_no_cuda}")
  # pip keeps to itself what a build says, unless it fails or pip has -v; where somebody sits at a terminal it
  # is said there too. A terminal that takes no output from behind would stop the command, hence the limit.
  if(DEFINED SKBUILD)
    execute_process(COMMAND sh -c "printf '\\n%s\\n' \"$1\" > /dev/tty" sh
                            "WARNING: fastreg is built without CUDA kernels: ${why_no_cuda}"
                    TIMEOUT 5 RESULT_VARIABLE ignored OUTPUT_QUIET ERROR_QUIET)
  endif()
elseif(why_no_cuda)
  message(STATUS "fastreg: no CUDA kernels: ${why_no_cuda}")
else()
  set(cuda_archs "${FASTREG_CUDA_ARCHS}")
  if(NOT cuda_archs AND DEFINED ENV{TORCH_CUDA_ARCH_LIST})
    cuda_archs_of(cuda_archs "$ENV{TORCH_CUDA_ARCH_LIST}")
  endif()
  string(REPLACE " " ";" cuda_archs "${cuda_archs}")
  if("native" IN_LIST cuda_archs AND NOT gpus)
    message(FATAL_ERROR "FASTREG_CUDA_ARCHS=native asks for the GPUs of this machine, and nvidia-smi sees "
                        "none; name architectures, such as \"80-real 90\"")
  endif()
  cuda_archs_known(cuda_archs "${cuda_archs}")
endif()
