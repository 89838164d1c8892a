// matvec of every format: which file of matvec_format.cu's a product belongs to.
#include "matvec.h"

namespace lowbit::cuda {

void matvec(const Product& p, const Plan& plan, Queue& queue) {
  switch (p.format) {
#define FORMAT(name, cpp_type, mode, bits, group, judged) \
  case Format::name:                                      \
    return matvec_format<Format::name>(p, plan, queue);
#include "../formats/formats.def"
#undef FORMAT
    case Format::dense:
      return;
  }
}

}  // namespace lowbit::cuda
