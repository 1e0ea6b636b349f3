#pragma once
// The one place where the version stands: CMake and the Python package read it here.

#define MICRO_VERSION "0.1.0"
