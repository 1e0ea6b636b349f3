# Decides whether CUDA kernels are built. Sets MICRO_CUDA_ON and MICRO_CUDA_REASON (a clause for the summary); where they
# are, CUDA is an enabled language and CUDA::cudart_static the runtime that is linked.
#   AUTO  where nvcc is found and compiles      OFF  never      ON  always: without nvcc an error
#
# The kernels are compiled once, to PTX of compute_80. It is part of every build, for the driver to compile for devices that
# have no machine code of their own; MICRO_CUDA_ARCHITECTURES are those that have.
set(MICRO_CUDA_ARCHITECTURES 80 89 90 100 120 CACHE STRING "Devices that get machine code: the numbers of sm_<number>")
if(NOT MICRO_CUDA MATCHES "^(AUTO|OFF|ON)$")
  message(FATAL_ERROR "MICRO_CUDA must be AUTO, OFF or ON, got '${MICRO_CUDA}'.")
endif()

set(MICRO_CUDA_ON OFF)
set(MICRO_CUDA_REASON "")
if(MICRO_CUDA STREQUAL "OFF")
  set(MICRO_CUDA_REASON "MICRO_CUDA=OFF")
else()
  find_program(MICRO_NVCC nvcc PATHS /usr/local/cuda/bin)
  # One host compiler for all; and no question to nvcc about devices, since machines that build need none.
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  set(CMAKE_CUDA_ARCHITECTURES 80)
  if(MICRO_NVCC AND NOT DEFINED ENV{CUDACXX})
    set(ENV{CUDACXX} ${MICRO_NVCC})
  endif()
  if(NOT MICRO_NVCC AND NOT DEFINED ENV{CUDACXX})
    set(MICRO_CUDA_REASON "nvcc was not found")
  elseif(MICRO_CUDA STREQUAL "AUTO")
    # Tried apart first: a toolkit that does not compile must not stop a build that can do without.
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      set(MICRO_CUDA_REASON "$ENV{CUDACXX} does not compile with ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
    endif()
  endif()
  if(NOT MICRO_CUDA_REASON)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)  # the first that knows sm_100 and sm_120
      set(MICRO_CUDA_REASON "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.8")
    else()
      find_package(CUDAToolkit REQUIRED)
      # CMake knows nvcc's flag for C++20 from 3.26 on.
      if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
        set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
        set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
      endif()
      set(MICRO_CUDA_ON ON)
      set(MICRO_CUDA_REASON "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
    endif()
  endif()
  if(MICRO_CUDA STREQUAL "ON" AND NOT MICRO_CUDA_ON)
    message(FATAL_ERROR "MICRO_CUDA=ON, but ${MICRO_CUDA_REASON}: install the CUDA toolkit, or use AUTO or OFF.")
  endif()
endif()

# As nvcc writes them.
set(MICRO_CUDA_ARCHS "")
if(MICRO_CUDA_ON)
  set(MICRO_CUDA_ARCHS ${MICRO_CUDA_ARCHITECTURES})
  list(TRANSFORM MICRO_CUDA_ARCHS PREPEND sm_)
  list(APPEND MICRO_CUDA_ARCHS compute_80)
endif()
