#include "block_forward/add_rows_loop.h"

namespace micro_kernels::cpu {

const AddRowLoops kAddRowAvx512 = kLoops;

}  // namespace micro_kernels::cpu
