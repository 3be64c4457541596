// Fuses a visible and an infrared image without Python, with a package of `ddrf-fast export
// --format aoti`.
//
//   fuse ddrfnet.pt2 visible.pgm infrared.pgm fused.pgm _schemas.abi3.so _C.abi3.so
//
// Images are binary PGM of 8 bit and of one size. The libraries are those that `ddrf-fast export`
// names; they bring the operators that the package calls.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

// [1, 1, H, W] in [0, 1].
at::Tensor read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string format;
  int64_t width = 0, height = 0, peak = 0;
  file >> format >> width >> height >> peak;
  file.get();  // one character ends the header
  if (!file || format != "P5" || peak != 255)
    throw std::runtime_error(path + " is no PGM of 8 bit");
  at::Tensor image = at::empty({1, 1, height, width}, at::kByte);
  if (!file.read(static_cast<char*>(image.data_ptr()), image.numel()))
    throw std::runtime_error(path + " is truncated");
  return image.to(at::kFloat) / 255;
}

void write(const std::string& path, const at::Tensor& image) {
  const at::Tensor bytes = (image * 255).round().to(at::kByte).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "P5\n" << bytes.size(3) << " " << bytes.size(2) << "\n255\n";
  file.write(static_cast<const char*>(bytes.data_ptr()), bytes.numel());
  if (!file) throw std::runtime_error(path + " cannot be written");
}

int main(int count, char** arguments) try {
  if (count < 5) throw std::runtime_error("usage: fuse PACKAGE VISIBLE INFRARED FUSED LIBRARY...");
  for (int i = 5; i < count; ++i) {
    if (!dlopen(arguments[i], RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  }
  torch::inductor::AOTIModelPackageLoader network(arguments[1]);
  write(arguments[4], network.run({read(arguments[2]), read(arguments[3])})[0]);
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
