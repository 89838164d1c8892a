// The command line of the check.
#pragma once

#include <algorithm>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/plan.h"

namespace lowbit::check {

inline constexpr std::string_view kSections[] = {"simt",   "matvec", "skinny",
                                                 "matmul", "run",    "quantize"};
inline constexpr const char* kUsage =
    "usage: check [simt] [matvec] [skinny] [matmul] [run] [quantize] [options]\n"
    "  --quick          few small cases, for compute-sanitizer (implies --exact)\n"
    "  --exact          one allocation an operand: memcheck sees every byte beyond\n"
    "  --plan LIST      kernel=NAME,tokens=N,rows=N,stages=N,split_k=N: what to run instead\n"
    "  --only LIST      cases whose description has all of these, say format=nvfp4,M=1\n"
    "  --threads N      for the reference\n"
    "  --verbose        every case\n";

using Fields = std::map<std::string, std::string>;

inline Fields fields(const std::string& list) {
  Fields out;
  for (size_t at = 0; at < list.size();) {
    const size_t end = std::min(list.find(',', at), list.size());
    const size_t equals = list.find('=', at);
    if (equals >= end) throw std::invalid_argument("expected key=value in '" + list + "'");
    out[list.substr(at, equals - at)] = list.substr(equals + 1, end - equals - 1);
    at = end + 1;
  }
  return out;
}

struct Options {
  std::vector<std::string> selected;  // empty: all
  Fields plan, only;
  bool quick = false, exact = false, verbose = false;
  unsigned threads = 0;

  bool selects(const std::string& name) const {
    if (selected.empty()) return true;
    for (const std::string& s : selected)
      if (s == name) return true;
    return false;
  }
  bool keeps(const std::string& text) const {
    if (only.empty()) return true;
    const Fields have = fields(text);
    for (const auto& [key, value] : only) {
      const auto found = have.find(key);
      if (found == have.end()) throw std::invalid_argument("no field '" + key + "' in " + text);
      if (found->second != value) return false;
    }
    return true;
  }
  void override(cuda::Plan& p) const {
    for (const auto& [key, value] : plan) {
      if (key == "kernel") continue;
      int* field = key == "tokens"    ? &p.tokens
                   : key == "rows"    ? &p.rows
                   : key == "stages"  ? &p.stages
                   : key == "split_k" ? &p.split_k
                                      : nullptr;
      if (!field) throw std::invalid_argument("a plan has no field '" + key + "'");
      *field = std::stoi(value);
    }
  }
};

inline Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i++) {
    const std::string a = argv[i];
    const auto value = [&]() -> std::string {
      if (++i >= argc) throw std::invalid_argument(a + " needs a value");
      return argv[i];
    };
    if (a == "--quick") {
      o.quick = o.exact = true;
    } else if (a == "--exact") {
      o.exact = true;
    } else if (a == "--verbose") {
      o.verbose = true;
    } else if (a == "--plan") {
      o.plan = fields(value());
      if (o.plan.count("kernel")) o.selected.push_back(o.plan["kernel"]);
    } else if (a == "--only") {
      o.only = fields(value());
    } else if (a == "--threads") {
      o.threads = unsigned(std::stoi(value()));
    } else if (std::find(std::begin(kSections), std::end(kSections), a) !=
               std::end(kSections)) {
      o.selected.push_back(a);
    } else {
      throw std::invalid_argument("unknown argument '" + a + "'");
    }
  }
  return o;
}

}  // namespace lowbit::check
