#pragma once
// What this machine gives, measured with code that does nothing else: multiply-adds in registers, a read of memory that
// no cache holds, a copy of it. One call is one measurement; whoever wants the best of several calls several times.

#include <cstdint>
#include <string>

namespace probe {

// Floating-point operations per second, a multiply-add counted as two. `threads` run side by side.
double float32_peak(int threads);
double bfloat16_peak(int threads);  // 0 where the CPU has no bfloat16 dot product
// Bytes per second. Of a copy, bytes read and bytes written are both counted.
double stream_read(int threads);
double memory_copy(int threads);

double seconds();  // of a clock that never goes back

}  // namespace probe
