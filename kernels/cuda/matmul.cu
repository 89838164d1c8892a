// matmul of every format: which instance of matmul_format.cu a product belongs to.
#include "matmul.h"

#include "formats.h"

namespace lowbit::cuda {

void matmul(const Product& p, const Plan& plan, Queue& queue) {
  with_format(p.format, [&](auto f) { matmul_format<f.value>(p, plan, queue); });
}

}  // namespace lowbit::cuda
