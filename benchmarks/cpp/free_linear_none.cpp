// Where the free variants cannot be built there are none.

#include "free_linear.h"

const FreeVariant kFreeVariants[] = {{"", 0, nullptr}};
const int kFreeVariantCount = 0;
