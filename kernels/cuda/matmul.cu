// matmul of every format: which instance of matmul_format.cu a product belongs to.
#include "matmul.h"

namespace lowbit::cuda {

void matmul(const Product& p, const Plan& plan, Queue& queue) {
  switch (p.format) {
#define FORMAT(name, cpp_type, mode, bits, group, judged) \
  case Format::name:                                      \
    return matmul_format<Format::name>(p, plan, queue);
#include "../formats/formats.def"
#undef FORMAT
    case Format::dense:
      return;
  }
}

}  // namespace lowbit::cuda
