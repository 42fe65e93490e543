// What Python sees: each function checks its tensors, chooses the kernel by dtype and releases the GIL around it.
// Outputs are allocated by fastbert/native.py. The values of ids and labels are checked by fastbert.ops, not here.
#include <omp.h>
#include <pybind11/stl.h>

#include "kernels.h"
#include "bindings_view.h"

namespace fastbert {

void bind_encoder(py::module_& m);  // bindings_encoder.cpp
void bind_plans(py::module_& m);    // bindings_plan.cpp
void bind_cuda(py::module_& m);     // bindings_cuda.cpp

namespace {

// f(kernels of x's dtype), without the GIL.
template <class F>
void launch(const View& x, F f) {
  const bool is_float = x.is(Dtype::float32);
  py::gil_scoped_release nogil;
  if (is_float)
    f(kernels<float>());
  else
    f(kernels<bf16>());
}

Dropout make_dropout(double p, int64_t seed) {
  return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(p * 4294967296.0),
          static_cast<float>(1.0 / (1.0 - p))};
}

void gelu_fwd(Arg x_, Arg bias_, Arg y_, bool tanh) {
  VIEW(x); VIEW(bias); VIEW(y);
  const int64_t rows = x.expect_float().rows(), F = x.columns();
  bias.expect(Dtype::float32, {F});
  y.expect_like(x);
  launch(x, [&](auto& k) { k.gelu_fwd(x, bias, y, rows, F, tanh); });
}

void gelu_bwd(Arg dy_, Arg x_, Arg bias_, Arg dx_, Arg dbias_, bool tanh) {
  VIEW(dy); VIEW(x); VIEW(bias); VIEW(dx); VIEW(dbias);
  const int64_t rows = x.expect_float().rows(), F = x.columns();
  dy.expect_like(x);
  dx.expect_like(x);
  bias.expect(Dtype::float32, {F});
  dbias.expect(Dtype::float32, {F});
  launch(x, [&](auto& k) { k.gelu_bwd(dy, x, bias, dx, dbias, rows, F, tanh); });
}

// residual, y and their gradients have one dtype: that of x, or float32.
template <class Run>
void launch_add_layer_norm(const View& x, const View& y, Run&& run) {
  launch(x, [&](auto& k) {
    if (y.is(Dtype::float32))
      run(k.add_layer_norm_wide);
    else
      run(k.add_layer_norm);
  });
}

void add_layer_norm_fwd(Arg x_, Arg x_bias_, Arg residual_, Arg weight_, Arg bias_, Arg y_, Arg mean_, Arg rstd_,
                        float eps, double p, int64_t seed) {
  VIEW(x); VIEW(x_bias); VIEW(residual); VIEW(weight); VIEW(bias); VIEW(y); VIEW(mean); VIEW(rstd);
  const int64_t rows = x.expect_float().rows(), D = x.columns();
  y.expect_widened(x);
  residual.expect_like(y);
  for (const View* v : {&x_bias, &weight, &bias}) v->expect(Dtype::float32, {D});
  for (const View* v : {&mean, &rstd}) v->expect(Dtype::float32, {rows});
  launch_add_layer_norm(x, y, [&](auto& op) {
    op.fwd(x, x_bias, residual, weight, bias, y, mean, rstd, rows, D, eps, make_dropout(p, seed));
  });
}

void add_layer_norm_bwd(Arg dy_, Arg x_, Arg x_bias_, Arg residual_, Arg weight_, Arg mean_, Arg rstd_, Arg dx_,
                        Arg dx_bias_, Arg dresidual_, Arg dweight_, Arg dbias_, double p, int64_t seed) {
  VIEW(dy); VIEW(x); VIEW(x_bias); VIEW(residual); VIEW(weight); VIEW(mean); VIEW(rstd);
  VIEW(dx); VIEW(dx_bias); VIEW(dresidual); VIEW(dweight); VIEW(dbias);
  const int64_t rows = x.expect_float().rows(), D = x.columns();
  dy.expect_widened(x);
  dx.expect_like(x);
  for (const View* v : {&residual, &dresidual}) v->expect_like(dy);
  for (const View* v : {&x_bias, &dx_bias, &weight, &dweight, &dbias}) v->expect(Dtype::float32, {D});
  for (const View* v : {&mean, &rstd}) v->expect(Dtype::float32, {rows});
  launch_add_layer_norm(x, dy, [&](auto& op) {
    op.bwd(dy, x, x_bias, residual, weight, mean, rstd, dx, dx_bias, dresidual, dweight, dbias, rows, D,
           make_dropout(p, seed));
  });
}

void embed_fwd(Arg input_ids_, Arg position_ids_, Arg type_ids_, Arg word_, Arg position_, Arg token_type_, Arg weight_,
               Arg bias_, Arg y_, Arg mean_, Arg rstd_, float eps, double p, int64_t seed) {
  VIEW(input_ids); VIEW(position_ids); VIEW(type_ids); VIEW(word); VIEW(position); VIEW(token_type);
  VIEW(weight); VIEW(bias); VIEW(y); VIEW(mean); VIEW(rstd);
  const int64_t rows = input_ids.numel(), D = word.expect_float().expect_ndim(2).columns();
  for (const View* v : {&input_ids, &position_ids, &type_ids}) v->expect(Dtype::int64, {rows});
  for (const View* v : {&position, &token_type}) v->expect_like(word, {v->rows(), D});
  for (const View* v : {&weight, &bias}) v->expect(Dtype::float32, {D});
  for (const View* v : {&mean, &rstd}) v->expect(Dtype::float32, {rows});
  y.expect_like(word, {rows, D});
  launch(word, [&](auto& k) {
    k.embed_fwd(input_ids, position_ids, type_ids, word, position, token_type, weight, bias, y, mean, rstd, rows, D,
                eps, make_dropout(p, seed));
  });
}

void embed_bwd(Arg dy_, Arg input_ids_, Arg position_ids_, Arg type_ids_, Arg word_, Arg position_, Arg token_type_,
               Arg weight_, Arg mean_, Arg rstd_, Arg dword_, Arg dposition_, Arg dtoken_type_, Arg dweight_,
               Arg dbias_, int64_t padding_idx, double p, int64_t seed) {
  VIEW(dy); VIEW(input_ids); VIEW(position_ids); VIEW(type_ids); VIEW(word); VIEW(position); VIEW(token_type);
  VIEW(weight); VIEW(mean); VIEW(rstd); VIEW(dword); VIEW(dposition); VIEW(dtoken_type); VIEW(dweight); VIEW(dbias);
  const int64_t rows = input_ids.numel(), D = word.expect_float().expect_ndim(2).columns();
  for (const View* v : {&input_ids, &position_ids, &type_ids}) v->expect(Dtype::int64, {rows});
  for (const View* v : {&position, &token_type}) v->expect_like(word, {v->rows(), D});
  for (const View* v : {&weight, &dweight, &dbias}) v->expect(Dtype::float32, {D});
  for (const View* v : {&mean, &rstd}) v->expect(Dtype::float32, {rows});
  dy.expect_like(word, {rows, D});
  dword.expect(Dtype::float32, {word.rows(), D});
  dposition.expect(Dtype::float32, {position.rows(), D});
  dtoken_type.expect(Dtype::float32, {token_type.rows(), D});
  launch(word, [&](auto& k) {
    k.embed_bwd(dy, input_ids, position_ids, type_ids, word, position, token_type, weight, mean, rstd, dword, dposition,
                dtoken_type, dweight, dbias, rows, D, padding_idx, make_dropout(p, seed));
  });
}

// Columns of rel_bias (H, 2R - 1), a middle one and as many on both sides; 0 without one.
int64_t check_rel_bias(const View& rel_bias, int64_t H) {
  if (!rel_bias.present()) return 0;
  const int64_t num_offsets = rel_bias.expect_ndim(2).columns();
  rel_bias.expect(Dtype::float32, {H, num_offsets});
  if (num_offsets % 2 == 0)
    rel_bias.fail<py::value_error>("must have an odd number of offsets, got " + std::to_string(num_offsets));
  return num_offsets;
}

void attention_fwd(Arg qkv_, Arg rel_bias_, Arg cu_seqlens_, Arg out_, Arg lse_, int64_t max_seqlen, int64_t half,
                   float scale, double p, int64_t seed) {
  VIEW(qkv); VIEW(rel_bias); VIEW(cu_seqlens); VIEW(out); VIEW(lse);
  qkv.expect_float().expect_ndim(4);
  const int64_t T = qkv.size(0), H = qkv.size(2), K = qkv.size(3);
  const int64_t S = check_cu_seqlens(cu_seqlens, T, max_seqlen), num_offsets = check_rel_bias(rel_bias, H);
  out.expect_like(qkv, {T, H, K});
  lse.expect(Dtype::float32, {T, H});
  launch(qkv, [&](auto& k) {
    k.attention_fwd(qkv, rel_bias, cu_seqlens, out, lse, S, H, K, num_offsets, max_seqlen, half, scale,
                    make_dropout(p, seed));
  });
}

void attention_bwd(Arg dout_, Arg qkv_, Arg rel_bias_, Arg out_, Arg lse_, Arg cu_seqlens_, Arg dqkv_, Arg drel_bias_,
                   int64_t max_seqlen, int64_t half, float scale, double p, int64_t seed) {
  VIEW(dout); VIEW(qkv); VIEW(rel_bias); VIEW(out); VIEW(lse); VIEW(cu_seqlens); VIEW(dqkv); VIEW(drel_bias);
  qkv.expect_float().expect_ndim(4);
  const int64_t T = qkv.size(0), H = qkv.size(2), K = qkv.size(3);
  const int64_t S = check_cu_seqlens(cu_seqlens, T, max_seqlen), num_offsets = check_rel_bias(rel_bias, H);
  for (const View* v : {&dout, &out}) v->expect_like(qkv, {T, H, K});
  lse.expect(Dtype::float32, {T, H});
  dqkv.expect_like(qkv);
  if (drel_bias.present() != rel_bias.present()) drel_bias.fail<py::value_error>("goes with rel_bias, and only with it");
  drel_bias.expect_like(rel_bias);
  launch(qkv, [&](auto& k) {
    k.attention_bwd(dout, qkv, rel_bias, out, lse, cu_seqlens, dqkv, drel_bias, S, H, K, num_offsets, max_seqlen, half,
                    scale, make_dropout(p, seed));
  });
}

void pool_fwd(Arg hidden_, Arg cu_seqlens_, Arg out_, Arg argmax_, const std::string& mode_name) {
  VIEW(hidden); VIEW(cu_seqlens); VIEW(out); VIEW(argmax);
  const int64_t T = hidden.expect_float().expect_ndim(2).size(0), D = hidden.columns();
  const int64_t S = check_cu_seqlens(cu_seqlens, T, T);
  out.expect_like(hidden, {S, D});
  argmax.expect(Dtype::int32, {S, D});
  const PoolMode mode = pool_mode(mode_name);
  if (argmax.present() != (mode == PoolMode::max)) argmax.fail<py::value_error>("goes with mode max, and only with it");
  launch(hidden, [&](auto& k) { k.pool_fwd(hidden, cu_seqlens, out, argmax, S, D, mode, omp_get_max_threads()); });
}

void pool_bwd(Arg dout_, Arg cu_seqlens_, Arg argmax_, Arg dhidden_, const std::string& mode_name) {
  VIEW(dout); VIEW(cu_seqlens); VIEW(argmax); VIEW(dhidden);
  const int64_t T = dhidden.expect_float().expect_ndim(2).size(0), D = dhidden.columns();
  const int64_t S = check_cu_seqlens(cu_seqlens, T, T);
  dout.expect_like(dhidden, {S, D});
  argmax.expect(Dtype::int32, {S, D});
  const PoolMode mode = pool_mode(mode_name);
  if (argmax.present() != (mode == PoolMode::max)) argmax.fail<py::value_error>("goes with mode max, and only with it");
  launch(dout, [&](auto& k) { k.pool_bwd(dout, cu_seqlens, argmax, dhidden, S, D, mode); });
}

void l2_normalize_fwd(Arg x_, Arg y_) {
  VIEW(x); VIEW(y);
  const int64_t S = x.expect_float().expect_ndim(2).size(0), D = x.columns();
  y.expect(Dtype::float32, {S, D});
  launch(x, [&](auto& k) { k.l2_normalize_fwd(x, y, S, D, omp_get_max_threads()); });
}

void cross_entropy_fwd(Arg logits_, Arg labels_, Arg losses_, Arg lse_, int64_t ignore_index) {
  VIEW(logits); VIEW(labels); VIEW(losses); VIEW(lse);
  const int64_t M = logits.expect_float().expect_ndim(2).size(0), V = logits.columns();
  labels.expect(Dtype::int64, {M});
  losses.expect(Dtype::float32, {M});
  lse.expect(Dtype::float64, {M});
  launch(logits, [&](auto& k) { k.cross_entropy_fwd(logits, labels, losses, lse, M, V, ignore_index); });
}

void cross_entropy_bwd(Arg scale_, Arg logits_, Arg labels_, Arg lse_, Arg dlogits_, int64_t ignore_index) {
  VIEW(scale); VIEW(logits); VIEW(labels); VIEW(lse); VIEW(dlogits);
  const int64_t M = logits.expect_float().expect_ndim(2).size(0), V = logits.columns();
  scale.expect(Dtype::float32, {});
  labels.expect(Dtype::int64, {M});
  lse.expect(Dtype::float64, {M});
  dlogits.expect_like(logits);
  launch(logits, [&](auto& k) { k.cross_entropy_bwd(scale, logits, labels, lse, dlogits, M, V, ignore_index); });
}

void int8_linear_quantize(Arg x_, Arg q_, Arg scale_) {
  VIEW(x); VIEW(q); VIEW(scale);
  const int64_t rows = x.expect_float().expect_ndim(2).size(0), K = x.columns();
  q.expect(Dtype::int8, {rows, K});
  scale.expect(Dtype::float32, {rows});
  launch(x, [&](auto& k) { k.int8_linear_quantize(x, q, scale, rows, K); });
}

void int8_linear_scale(Arg sums_, Arg scale_, Arg weight_scale_, Arg bias_, Arg y_) {
  VIEW(sums); VIEW(scale); VIEW(weight_scale); VIEW(bias); VIEW(y);
  const int64_t rows = y.expect_float().expect_ndim(2).size(0), N = y.columns();
  sums.expect(Dtype::int32, {rows, N});
  scale.expect(Dtype::float32, {rows});
  for (const View* v : {&weight_scale, &bias}) v->expect(Dtype::float32, {N});
  launch(y, [&](auto& k) { k.int8_linear_scale(sums, scale, weight_scale, bias, y, rows, N); });
}

double peak_operations(const std::string& dtype, int64_t rounds) {
  const bool known = dtype == "float32" || dtype == "bfloat16" || dtype == "int8";
  if (!known || rounds < 1)
    throw py::value_error("expected float32, bfloat16 or int8 and rounds >= 1, got " + dtype + " and " +
                          std::to_string(rounds));
  const Peaks& all = peaks();
  py::gil_scoped_release nogil;
  return (dtype == "float32" ? all.of_float : dtype == "bfloat16" ? all.of_bf16 : all.of_int8)(rounds);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  torch.load();
  m.doc() = "Native kernels; use them through fastbert.ops or fastbert.native.";
  m.def("isa", &isa);
  m.def("supported_isas", &supported_isas);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("gelu_fwd", &gelu_fwd);
  m.def("gelu_bwd", &gelu_bwd);
  m.def("add_layer_norm_fwd", &add_layer_norm_fwd);
  m.def("add_layer_norm_bwd", &add_layer_norm_bwd);
  m.def("embed_fwd", &embed_fwd);
  m.def("embed_bwd", &embed_bwd);
  m.def("attention_fwd", &attention_fwd);
  m.def("attention_bwd", &attention_bwd);
  m.def("pool_fwd", &pool_fwd);
  m.def("pool_bwd", &pool_bwd);
  m.def("l2_normalize_fwd", &l2_normalize_fwd);
  m.def("cross_entropy_fwd", &cross_entropy_fwd);
  m.def("cross_entropy_bwd", &cross_entropy_bwd);
  m.def("int8_linear_quantize", &int8_linear_quantize);
  m.def("int8_linear_scale", &int8_linear_scale);
  m.def("peak_operations", &peak_operations, py::arg("dtype"), py::arg("rounds"));
  bind_encoder(m);
  bind_plans(m);
#ifdef FASTBERT_CUDA
  bind_cuda(m);
#endif
}

}  // namespace fastbert
