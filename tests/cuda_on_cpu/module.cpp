// The bindings of the CUDA kernels as a module of their own, linked with kernels that g++ compiled.
#include <pybind11/pybind11.h>

namespace fastbert {
void bind_cuda(pybind11::module_& m);
}

PYBIND11_MODULE(cuda_on_cpu, m) { fastbert::bind_cuda(m); }
