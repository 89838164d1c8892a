// skinny of every format: which file of skinny_format.cu a product belongs to.
#include "skinny.h"

#include "formats.h"

namespace lowbit::cuda {

void skinny(const Product& p, const Plan& plan, Queue& queue) {
  with_format(p.format, [&](auto f) { skinny_format<f.value>(p, plan, queue); });
}

}  // namespace lowbit::cuda
