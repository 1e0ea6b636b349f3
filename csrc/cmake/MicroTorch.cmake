# Finds the torch that the Python interpreter would import, without importing it, and the OpenMP runtime it carries.
# Sets MICRO_TORCH_VERSION, MICRO_TORCH_CUDA (its CUDA version, or none), MICRO_TORCH_LIB_DIR, MICRO_TORCH_OPENMP.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.Module)

execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u, runpy, pathlib\nd = pathlib.Path(u.find_spec('torch').submodule_search_locations[0])\nv = runpy.run_path(str(d / 'version.py'))\nprint(d, v['__version__'], v['cuda'] or 'none', sep=';')"
  OUTPUT_VARIABLE MICRO_TORCH_FOUND
  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
  RESULT_VARIABLE MICRO_TORCH_RESULT)
if(NOT MICRO_TORCH_RESULT EQUAL 0)
  message(
    FATAL_ERROR
      "${Python_EXECUTABLE} has no torch: install torch first, then build with `pip install --no-build-isolation`, "
      "so that micro is built against the torch that it will run with.")
endif()
list(GET MICRO_TORCH_FOUND 0 MICRO_TORCH_DIR)
list(GET MICRO_TORCH_FOUND 1 MICRO_TORCH_VERSION)
list(GET MICRO_TORCH_FOUND 2 MICRO_TORCH_CUDA)
set(MICRO_TORCH_LIB_DIR ${MICRO_TORCH_DIR}/lib)

# Another torch in the same environment: configure again, so that `make build` mends what the loader complains about.
set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${MICRO_TORCH_DIR}/version.py)

if(MICRO_TORCH_CUDA STREQUAL "none")
  list(PREPEND CMAKE_PREFIX_PATH ${MICRO_TORCH_DIR}/share/cmake)
  # torch warns of a library of its own build that wheels do not carry (kineto); nobody can act on it.
  set(CMAKE_MESSAGE_LOG_LEVEL ERROR)
  find_package(Torch REQUIRED)
  unset(CMAKE_MESSAGE_LOG_LEVEL)
else()
  # A torch for CUDA asks its users for the whole toolkit, cuBLAS and all. micro needs headers and two libraries, and
  # reaches CUDA through c10 alone; what those libraries need themselves is there when torch has been imported.
  add_library(torch INTERFACE IMPORTED GLOBAL)
  set_target_properties(torch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${MICRO_TORCH_DIR}/include;${MICRO_TORCH_DIR}/include/torch/csrc/api/include"
    INTERFACE_LINK_LIBRARIES "${MICRO_TORCH_LIB_DIR}/libtorch_cpu.so;${MICRO_TORCH_LIB_DIR}/libc10.so"
    INTERFACE_LINK_OPTIONS "LINKER:--allow-shlib-undefined")
  set(TORCH_LIBRARIES torch)
endif()
find_package(Threads REQUIRED)

# torch's inline parallel_for needs OpenMP in the compiler; the runtime must be the one that torch has loaded, or the
# process would hold two pools of threads.
file(GLOB MICRO_TORCH_OPENMP ${MICRO_TORCH_LIB_DIR}/libgomp*.so* ${MICRO_TORCH_DIR}/../torch.libs/libgomp*.so*)
if(MICRO_TORCH_OPENMP)
  list(GET MICRO_TORCH_OPENMP 0 MICRO_TORCH_OPENMP)
else()
  set(MICRO_TORCH_OPENMP gomp)
endif()
