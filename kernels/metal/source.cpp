#include "source.h"

#include <set>
#include <stdexcept>

namespace lowbit::metal {

// Written by CMake from the files themselves: name ("metal/load.h") and text, a null name last.
struct File {
  const char *name, *text;
};
extern const File kFiles[];

namespace {

constexpr const char* kTypes[] = {
#define FORMAT(name, type, mode, bits, group, judged) #type,
#include "../formats/formats.def"
#undef FORMAT
};
constexpr const char* kDtypes[] = {"float", "half", "bfloat"};
constexpr const char* kNames[kKernels] = {"matvec",     "matmul",     "vecmat", "quantize",
                                          "dequantize", "round_trip", "group"};

// quantize, dequantize and round_trip are one file.
std::string file_of(Kernel kernel) {
  const bool elements = kernel == Kernel::dequantize || kernel == Kernel::round_trip;
  return std::string("metal/") + kNames[int(elements ? Kernel::quantize : kernel)] + ".h";
}

std::string find(const std::string& name) {
  for (const File* file = kFiles; file->name; file++)
    if (name == file->name) return file->text;
  throw std::logic_error("[lowbit] internal: no embedded source " + name);
}

// "metal/../formats/nvfp4.h" without its way back.
std::string beside(const std::string& name, const std::string& included) {
  std::string folder = name.substr(0, name.rfind('/') + 1), rest = included;
  while (rest.rfind("../", 0) == 0) {
    folder = folder.substr(0, folder.rfind('/', folder.size() - 2) + 1);
    rest = rest.substr(3);
  }
  return folder + rest;
}

// The text of a file with the files that it includes in their places, each once.
void append(const std::string& name, std::set<std::string>& seen, std::string& text) {
  if (!seen.insert(name).second) return;
  const std::string of_file = find(name), begin = "#include \"";
  for (size_t at = 0; at < of_file.size();) {
    const size_t end = of_file.find('\n', at) + 1;
    const std::string line = of_file.substr(at, end - at);
    at = end;
    if (line.rfind(begin, 0) == 0)
      append(beside(name, line.substr(begin.size(), line.rfind('"') - begin.size())), seen,
             text);
    else if (line.rfind("#pragma once", 0) != 0)
      text += line;
  }
}

std::string entry_point(const Instance& i) {
  if (i.kernel == Kernel::group) return "";  // no template
  std::string function = std::string(kNames[int(i.kernel)]) + "<" + kTypes[int(i.format)] +
                         ", " + kDtypes[int(i.dtype)];
  if (i.tokens) function += ", " + std::to_string(i.tokens);
  function += ">";
  return "template [[host_name(\"" + name(i) + "\")]] [[kernel]] decltype(" + function + ") " +
         function + ";\n";
}

}  // namespace

std::vector<Instance> instances(Kernel kernel, Format format) {
  if (kernel == Kernel::group) return {{kernel, format, Dtype::f32, 0}};
  if (kernel == Kernel::round_trip && kFormats[int(format)].affine()) return {};
  std::vector<Instance> all;
  for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
    for (int tokens : tiles(kernel)) all.push_back({kernel, format, dtype, tokens});
  return all;
}

std::string name(const Instance& i) {
  std::string text = kNames[int(i.kernel)];
  if (i.kernel == Kernel::group) return text;
  text += "_" + std::string(kFormats[int(i.format)].name) + "_" + std::string(name(i.dtype));
  return i.tokens ? text + "_" + std::to_string(i.tokens) : text;
}

std::string text(const std::vector<Instance>& instances) {
  std::set<std::string> seen;
  std::string text;
  append(file_of(instances.at(0).kernel), seen, text);
  text += "namespace lowbit {\n";
  for (const Instance& i : instances) text += entry_point(i);
  return text + "}\n";
}

}  // namespace lowbit::metal
