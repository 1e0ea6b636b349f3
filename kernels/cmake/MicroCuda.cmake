# Decides whether CUDA kernels are built. Sets MICRO_CUDA_ON and MICRO_CUDA_REASON (a clause for the summary).
if(NOT MICRO_CUDA MATCHES "^(AUTO|OFF|ON)$")
  message(FATAL_ERROR "MICRO_CUDA must be AUTO, OFF or ON, got '${MICRO_CUDA}'.")
endif()

set(MICRO_CUDA_ON OFF)
set(MICRO_CUDA_REASON "this version has CPU kernels only")
if(MICRO_CUDA STREQUAL "ON")
  message(FATAL_ERROR "MICRO_CUDA=ON, but ${MICRO_CUDA_REASON}: use AUTO or OFF.")
elseif(MICRO_CUDA STREQUAL "OFF")
  set(MICRO_CUDA_REASON "MICRO_CUDA=OFF")
endif()
