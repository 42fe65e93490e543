// The bindings of the CUDA kernels as a module of their own, linked with kernels of g++. PYBIND11_MODULE would
// give every library of this name the first one's module, so a mutant would run what came before it.
#include <pybind11/pybind11.h>

namespace fastbert {
void bind_cuda(pybind11::module_& m);
}

extern "C" PYBIND11_EXPORT PyObject* PyInit_cuda_on_cpu() {
  pybind11::detail::get_internals();
  static PyModuleDef definition;
  auto m = pybind11::module_::create_extension_module("cuda_on_cpu", nullptr, &definition);
  fastbert::bind_cuda(m);
  return m.release().ptr();
}
