// matvec of every format: which file of matvec_format.cu's a product belongs to.
#include "matvec.h"

#include "formats.h"

namespace lowbit::cuda {

void matvec(const Product& p, const Plan& plan, Queue& queue) {
  with_format(p.format, [&](auto f) { matvec_format<f.value>(p, plan, queue); });
}

}  // namespace lowbit::cuda
