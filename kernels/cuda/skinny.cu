// skinny of every format: which file of skinny_format.cu a product belongs to.
#include "skinny.h"

namespace lowbit::cuda {

void skinny(const Product& p, const Plan& plan, Queue& queue) {
  switch (p.format) {
#define FORMAT(name, cpp_type, mode, bits, group, judged) \
  case Format::name:                                      \
    return skinny_format<Format::name>(p, plan, queue);
#include "../formats/formats.def"
#undef FORMAT
    case Format::dense:
      return;
  }
}

}  // namespace lowbit::cuda
