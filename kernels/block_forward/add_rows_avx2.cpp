#include "block_forward/add_rows_loop.h"

namespace micro_kernels::cpu {

const AddRowLoops kAddRowAvx2 = kLoops;

}  // namespace micro_kernels::cpu
