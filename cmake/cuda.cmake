# The CUDA extension module `_C_cuda<major>`. CMakeLists.txt includes this where find_cuda.cmake found torch's
# CUDA and a compiler for it.

# The module has real code for every generation of GPUs and PTX of the last, for those to come. The GPU of the
# build machine is looked at only where it is asked for.
set(CMAKE_CUDA_ARCHITECTURES "${cuda_archs}")
if(NOT cuda_archs)
  set(CMAKE_CUDA_ARCHITECTURES 75-real)  # until the compiler's version is known
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
if(NOT cuda_archs)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 90)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 90 100-real 120)
  endif()
endif()

# Without -fmad the compiler fuses no multiplication and addition by itself, as on the CPU.
set(nvcc_flags --fmad=false -Werror=all-warnings -Xcompiler=-Wall,-Wextra,-ffp-contract=off)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND nvcc_flags --compress-mode=size)
endif()

# A file may name flags of its own, in a comment.
foreach(file IN LISTS cuda_files)
  file(STRINGS "${file}" own_flags REGEX "^// nvcc flags: ")
  string(REPLACE "// nvcc flags: " "" own_flags "${own_flags}")
  separate_arguments(own_flags)
  set_source_files_properties("${file}" PROPERTIES COMPILE_OPTIONS "${own_flags}")
endforeach()

set(module "_C_cuda${nvcc_major}")
find_library(TORCH_CUDA_LIBRARY torch_cuda PATHS "${torch_dir}/lib" NO_DEFAULT_PATH REQUIRED)
add_library(cuda_kernels OBJECT ${cuda_files})
add_library(cuda_glue OBJECT ${glue_files})
target_compile_options(cuda_kernels PRIVATE -O3 ${nvcc_flags})
target_compile_definitions(cuda_glue PRIVATE FASTREG_CUDA TORCH_TARGET_VERSION=0x020a000000000000)
target_include_directories(cuda_glue SYSTEM PRIVATE
  "${torch_dir}/include" ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})

pybind11_add_module(${module} NO_EXTRAS csrc/module_cuda.cpp
  $<TARGET_OBJECTS:cuda_glue> $<TARGET_OBJECTS:cuda_kernels>)
string(REPLACE ";" " " archs_text "${CMAKE_CUDA_ARCHITECTURES}")
target_compile_definitions(${module} PRIVATE
  FASTREG_CUDA_MODULE=${module} FASTREG_BUILT_WITH_TORCH="${torch_version}"
  FASTREG_NVCC="${CMAKE_CUDA_COMPILER_VERSION}" FASTREG_CUDA_ARCHS="${archs_text}")
target_include_directories(${module} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(${module} PRIVATE "${TORCH_CPU_LIBRARY}" "${TORCH_CUDA_LIBRARY}")
set_target_properties(${module} PROPERTIES LINKER_LANGUAGE CXX CUDA_RESOLVE_DEVICE_SYMBOLS OFF)
finish(${module})
