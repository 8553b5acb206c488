# Lists of GPU architectures, as people write them and as a compiler knows them.

# cuda_archs_of(<variable> <list>): what torch's extensions read in TORCH_CUDA_ARCH_LIST, "8.0;9.0+PTX" or
# "Ampere Hopper", as CMake's architectures.
function(cuda_archs_of variable listed)
  # The names are torch's, in torch.utils.cpp_extension. Those with Tegra come first because they begin as the
  # others do.
  set(names
    "Volta+Tegra" "7.2" "Ampere+Tegra" "8.7" "Blackwell+Tegra" "11.0" "Maxwell" "5.0 5.2+PTX"
    "Pascal" "6.0 6.1+PTX" "Volta" "7.0+PTX" "Turing" "7.5+PTX" "Ampere" "8.0 8.6+PTX" "Ada" "8.9+PTX"
    "Hopper" "9.0+PTX" "Blackwell" "10.0 10.3 12.0 12.1+PTX" "Rubin" "10.7+PTX")
  string(REPLACE ";" " " listed "${listed}")
  while(names)
    list(POP_FRONT names name numbers)
    string(REPLACE "${name}" "${numbers}" listed "${listed}")
  endwhile()
  string(REPLACE " " ";" listed "${listed}")
  set(archs "")
  foreach(arch IN LISTS listed)
    string(REPLACE "." "" number "${arch}")
    if(arch STREQUAL "")
      continue()
    elseif(number MATCHES "^([0-9]+[a-z]?)(\\+PTX)+$")
      list(APPEND archs "${CMAKE_MATCH_1}")
    elseif(number MATCHES "^[0-9]+[a-z]?$")
      list(APPEND archs "${number}-real")
    else()
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must list numbers such as 8.0 or 9.0+PTX or names such as "
                          "Hopper, got ${arch}; or set FASTREG_CUDA_ARCHS")
    endif()
  endforeach()
  set(${variable} "${archs}" PARENT_SCOPE)
endfunction()

# cuda_archs_known(<variable> <archs>): those that nvcc can build. What it cannot build is left out with one
# warning.
function(cuda_archs_known variable archs)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch
                  OUTPUT_VARIABLE known RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    set(${variable} "${archs}" PARENT_SCOPE)
    return()
  endif()
  set(kept "")
  set(dropped "")
  foreach(arch IN LISTS archs)
    string(REGEX MATCH "^[0-9]+" number "${arch}")
    if(number AND NOT "${known}" MATCHES "compute_${number}[^0-9]")
      list(APPEND dropped "${arch}")
    else()
      list(APPEND kept "${arch}")
    endif()
  endforeach()
  if(dropped AND NOT kept)
    message(FATAL_ERROR "fastreg: ${CMAKE_CUDA_COMPILER} can build none of the architectures ${dropped}; "
                        "set TORCH_CUDA_ARCH_LIST or FASTREG_CUDA_ARCHS to some that it knows")
  elseif(dropped)
    message(WARNING "fastreg: ${CMAKE_CUDA_COMPILER} cannot build for ${dropped}, which is left out; "
                    "GPUs of that kind will have no kernels")
  endif()
  set(${variable} "${kept}" PARENT_SCOPE)
endfunction()
