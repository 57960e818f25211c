// What ptxas wrote about the kernels of a cubin: names, registers, static shared memory.
//
// A cubin is an ELF file with a section .text.NAME for each kernel, whose sh_info holds the number
// of registers in its highest byte, and .nv.shared.NAME, as large as its static shared memory.
// Inductor chooses block sizes by the registers, so they are told as they are.
#include "pretend.h"

#include <cstring>

#include <elf.h>

namespace pretend {

std::map<std::string, Kernel> kernels_of(const void* image) {
  std::map<std::string, Kernel> kernels;
  auto* bytes = static_cast<const char*>(image);
  if (!image || memcmp(bytes, ELFMAG, SELFMAG) != 0) return kernels;
  auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes);
  auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes + header->e_shoff);
  const char* names = bytes + sections[header->e_shstrndx].sh_offset;
  auto rest = [&](const Elf64_Shdr& section, const std::string& prefix) -> std::string {
    std::string name = names + section.sh_name;
    return name.rfind(prefix, 0) == 0 ? name.substr(prefix.size()) : "";
  };
  for (int i = 0; i < header->e_shnum; ++i)
    if (std::string name = rest(sections[i], ".text."); !name.empty()) {
      kernels[name].name = name;
      kernels[name].registers = static_cast<int>(sections[i].sh_info >> 24);
    }
  for (int i = 0; i < header->e_shnum; ++i)
    if (auto found = kernels.find(rest(sections[i], ".nv.shared.")); found != kernels.end())
      found->second.shared_static = sections[i].sh_size;
  return kernels;
}

}  // namespace pretend
