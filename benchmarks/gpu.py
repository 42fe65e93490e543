"""`python -m benchmarks.gpu`: ops and whole models on a CUDA device against every peer that the machine has.

One command of at most nine minutes: each section has a box of time, and writes its rows as it goes. `--dry-run` takes
every step once, at tiny sizes, on a CPU: what a peer lacks there is named as it would be on the GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness
from fastbert import BertConfig, BertForMaskedLM, BertModel, kernels, ops, testing, use_engine
from fastbert.ops import dispatch
from fastbert.ops.float8_linear import float8_linear_ref, quantize_rows_float8
from fastbert.packing import PackedBatch, pack

BACKEND = "triton"
NEED_KERNELS = ("fused", "torch._scaled_mm")
OURS = ("fastbert", "fused", "float8")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """Where and how large. `seconds` is the box of a section; what does not fit it is not measured, and said."""

    device: str
    dtype: torch.dtype
    tokens: int
    rounds: int
    seconds: float
    lengths: tuple[int, ...]
    config: BertConfig
    large: BertConfig
    dry: bool

    def model_lengths(self, length: int) -> list[int]:
        return [length] * (self.tokens // length)


def setting(dry: bool, dtype: str, seconds: float) -> Setting:
    """The H100's sizes, or tiny ones."""
    if dry:
        tiny = BertConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        return Setting("cpu", torch.float32, 32, 2, seconds, (8, 16), tiny, tiny, True)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --dry-run takes every step on the CPU")
    large = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    return Setting(
        "cuda", getattr(torch, dtype), 16384, 30, seconds, (32, 64, 128, 256, 512), BertConfig(), large, False
    )


def captured(run: Run, at: Setting) -> Run:
    """The call as a CUDA graph, so that a short kernel's time is not its launch's."""
    if at.device == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"not captured, its launches are in its time: {str(error).splitlines()[0][:150]}")
        return run
    return graph.replay


def timed(runs: dict[str, Run], at: Setting) -> dict[str, list[float]]:
    """Milliseconds of each, interleaved; on a GPU by events, with the L2 cache overwritten in between."""
    if at.device == "cpu":
        return harness.interleave(runs, at.rounds, warmup=1)
    for run in runs.values():
        for _ in range(3):
            run()
    flush = torch.empty(64 << 20, dtype=torch.int32, device=at.device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(at.rounds):
        for name, run in runs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


@dataclass(frozen=True)
class Peak:
    """Memory of a training step over what is allocated before it."""

    op: str
    case: str
    backend: str
    peak_mb: float
    device: str
    torch: str
    commit: str
    date: str


class Report:
    """Rows as they come: each is printed and in the file before the next is measured."""

    def __init__(self, at: Setting) -> None:
        self.at, self.rows = at, []
        self.roofs = roofs(at)
        name = f"gpu-{harness.device_name(at.device)}".lower()
        self.name = "".join(c if c.isalnum() else "-" for c in name) + ("-dry-run" if at.dry else "")
        what = f"copy {self.roofs.bytes_s / 1e12:.2f} TB/s, GEMM {self.roofs.flop_s / 1e12:.0f} TFLOP/s"
        print(f"{harness.device_name(at.device)}, torch {torch.__version__}; measured roofs: {what}", flush=True)

    def add(
        self, op: str, case: str, mode: str, runs: dict[str, Run], nbytes: float, flop: float, graphs: bool = True
    ) -> None:
        """Measure variants of one thing, as CUDA graphs unless a whole model is called as users call it."""
        runs = {name: captured(run, self.at) for name, run in runs.items()} if graphs else runs
        for backend, ms in timed(runs, self.at).items():
            p50, p20, p80 = harness.percentiles(ms)
            row = harness.Row(
                op, case, backend, mode, str(self.at.dtype)[6:], *(round(v, 5) for v in (p50, p20, p80)),
                round(nbytes / p50 / 1e6, 2), round(flop / p50 / 1e9, 4),
                round(100 * self.roofs.bound_ms(nbytes, flop) / p50, 1),
                device=harness.device_name(self.at.device), isa=BACKEND,
            )  # fmt: skip
            self.keep(row)

    def keep(self, row: harness.Row) -> None:
        """Write and print one row."""
        self.rows.append(row)
        harness.write([row], self.name)
        print(
            f"{row.op:20}{row.case:16}{row.mode:10}{row.backend:24}{row.ms_p50:10.4f} ms{row.gb_s:10.0f} GB/s"
            f"{row.tflop_s:9.2f} TFLOP/s{row.roof_percent:7.1f} %",
            flush=True,
        )

    def table(self) -> str:
        """Ours beside the best of the others, at the end."""
        lines = [f"{'op':20}{'case':18}{'mode':10}{'ours ms':>10}{'% roof':>8}   best other"]
        ours = [r for r in self.rows if r.backend in OURS]
        for r in ours:
            rest = [
                o for o in self.rows if (o.op, o.case, o.mode) == (r.op, r.case, r.mode) and "fastbert" not in o.backend
            ]
            best = min(rest, key=lambda o: o.ms_p50, default=None)
            other = "" if best is None else f"{best.ms_p50:.4f} ms ({best.ms_p50 / r.ms_p50:.2f}x) {best.backend}"
            lines.append(f"{r.op:20}{r.case:18}{r.mode:10}{r.ms_p50:10.4f}{r.roof_percent:8.1f}   {other}")
        return "\n".join(lines)


def roofs(at: Setting) -> harness.Roofs:
    """A copy of 1 GiB and an 8192^3 GEMM of random numbers."""
    words, n = (1 << 12, 64) if at.dry else (1 << 28, 8192)
    source = torch.randn(words, device=at.device)
    target, a = torch.empty_like(source), torch.randn(n, n, device=at.device).to(at.dtype)
    times = timed({"copy": lambda: target.copy_(source), "gemm": lambda: a @ a}, at)
    copy, gemm = (min(times[name]) for name in ("copy", "gemm"))
    return harness.Roofs(2 * source.nbytes / copy * 1e3, 2 * n**3 / gemm * 1e3)


def tensors(at: Setting, *shape: int) -> torch.Tensor:
    """Random values: zeros draw less power, and run faster."""
    return torch.randn(*shape, device=at.device).to(at.dtype)


def checked(name: str, at: Setting, runs: dict[str, Run], right: torch.Tensor) -> dict[str, Run]:
    """The variants that run here and give what `right` says; the others are named with the reason."""
    good = {}
    if not has_kernels(at):  # called by name, without a choice of the backend
        runs = {variant: run for variant, run in runs.items() if variant not in NEED_KERNELS}
    for variant, run in runs.items():
        try:
            found = run()
        except (RuntimeError, ImportError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines() or [type(error).__name__]
            print(f"{name}: {variant} does not run here: {reason[0][:150]}")
            continue
        error = (found.float() - right.float()).abs().max().item() / right.float().abs().max().item()
        if error < (1e-4 if at.dtype == torch.float32 else 0.05):
            good[variant] = run
        else:
            print(f"{name}: {variant} is wrong (relative error {error:.2e}): no number")
    return good


def has_kernels(at: Setting) -> bool:
    """Whether our kernels run here."""
    return dispatch.has(BACKEND, "attention", at.device, at.dtype)


def forced(run: Run, at: Setting) -> Run:
    """On our kernels (on a CPU without them: on what is there)."""

    def call() -> Any:
        with ops.use_backend(BACKEND if has_kernels(at) else "reference"):
            return run()

    return call


# Attention


def varlen(qkv: torch.Tensor, cu: torch.Tensor, length: int) -> torch.Tensor:
    """torch.nn.attention.varlen, FlashAttention 2 beneath."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*qkv.unbind(1), cu, cu, length, length)


def padded_sdpa(backend: str, qkv: torch.Tensor, length: int) -> torch.Tensor:
    """scaled_dot_product_attention of equally long sequences with one of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    T, _, H, K = qkv.shape
    q, k, v = qkv.view(-1, length, 3, H, K).permute(2, 0, 3, 1, 4)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(T, H, K)


class Flex:
    """FlexAttention with a document mask, its compiled kernel."""

    def __init__(self, qkv: torch.Tensor, length: int) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        T = qkv.shape[0]
        document = torch.arange(T, device=qkv.device) // length
        self.mask = create_block_mask(
            lambda b, h, i, j: document[i] == document[j], None, None, T, T, device=str(qkv.device)
        )
        self.run = flex_attention if qkv.device.type == "cpu" else torch.compile(flex_attention)
        self.qkv = qkv

    def __call__(self) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in self.qkv.unbind(1))
        return self.run(q, k, v, block_mask=self.mask)[0].transpose(0, 1)


def attention(report: Report) -> Iterator[None]:
    """Heads of 64, equally long sequences; forward, then forward and backward."""
    at = report.at
    H, K = at.config.num_attention_heads, at.config.hidden_size // at.config.num_attention_heads
    for length in at.lengths:
        qkv = tensors(at, at.tokens, 3, H, K)
        cu = torch.arange(0, at.tokens + 1, length, dtype=torch.int32, device=at.device)
        flex: list[Flex] = []

        def flexed(qkv: torch.Tensor = qkv, length: int = length, flex: list[Flex] = flex) -> torch.Tensor:
            flex or flex.append(Flex(qkv, length))  # made once, and where it fails, in the check
            return flex[0]()

        runs = {
            "fastbert": forced(partial(ops.attention, qkv, cu, length), at),
            "torch varlen_attn": partial(varlen, qkv, cu, length),
            "cudnn": partial(padded_sdpa, "CUDNN_ATTENTION", qkv, length),
            "flash (padded)": partial(padded_sdpa, "FLASH_ATTENTION", qkv, length),
            "flex": flexed,
        }
        right = padded_sdpa("MATH", qkv, length)
        nbytes, flop = qkv.nbytes / 3 * 4, 4 * at.tokens * length * H * K
        case = f"T{at.tokens}_S{length}"
        with torch.no_grad():
            report.add("attention", case, "forward", checked("attention", at, runs, right), nbytes, flop)
        yield
        dout = tensors(at, at.tokens, H, K)
        leaf = qkv.detach().requires_grad_()
        runs = {
            "fastbert": forced(partial(ops.attention, leaf, cu, length), at),
            "torch varlen_attn": partial(varlen, leaf, cu, length),
            "cudnn": partial(padded_sdpa, "CUDNN_ATTENTION", leaf, length),
        }

        def both(run: Run, leaf: torch.Tensor = leaf, dout: torch.Tensor = dout) -> torch.Tensor:
            return torch.autograd.grad(run(), leaf, dout)[0]

        both_ways = {name: partial(both, run) for name, run in runs.items()}
        right = both(partial(padded_sdpa, "MATH", leaf, length))
        good = checked("attention", at, both_ways, right)
        good = {name: forced(run, at) if name == "fastbert" else run for name, run in good.items()}
        report.add("attention", case, "training", good, 3 * nbytes, 3.5 * flop)
        yield


def memory_bound(report: Report) -> Iterator[None]:
    """The op kernels that move bytes, beside plain torch and torch.compile, forward and backward."""
    at = report.at
    T = at.tokens * (1 if at.dry else 4)
    for D in (at.config.hidden_size, at.large.hidden_size):
        x, residual, dy = (tensors(at, T, D) for _ in range(3))
        leaves = [t.detach().requires_grad_() for t in (x, residual, tensors(at, D), tensors(at, D))]
        run = partial(ops.add_layer_norm, *leaves)
        variants: dict[str, Run] = {"fastbert": forced(run, at), "torch": partial(_add_layer_norm, *leaves)}
        if not at.dry:
            variants["torch.compile"] = partial(torch.compile(_add_layer_norm), *leaves)
        with torch.no_grad():
            good = checked("add_layer_norm", at, variants, variants["torch"]())
            report.add("add_layer_norm", f"T{T}_D{D}", "forward", good, 3 * x.nbytes, 0)
        both: dict[str, Run] = {name: partial(_both, variant, leaves, dy) for name, variant in variants.items()}
        both["fastbert"] = forced(both["fastbert"], at)
        good = checked("add_layer_norm", at, both, both["torch"]())
        report.add("add_layer_norm", f"T{T}_D{D}", "training", good, 8 * x.nbytes, 0)
        yield
    inner, bias = tensors(at, at.tokens, at.config.intermediate_size), tensors(at, at.config.intermediate_size)
    with torch.no_grad():
        runs = {
            "fastbert": forced(partial(ops.gelu, inner, bias), at),
            "torch": lambda: F.gelu(inner + bias),
        }
        good = checked("gelu", at, runs, F.gelu(inner.float() + bias.float()))
        report.add("gelu", f"T{at.tokens}_F{inner.shape[1]}", "forward", good, 2 * inner.nbytes, 0)
    yield


def _add_layer_norm(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x + residual, w.shape, w, b, 1e-12)


def _both(run: Run, leaves: list[torch.Tensor], dy: torch.Tensor) -> torch.Tensor:
    """Forward and backward; dx."""
    return torch.autograd.grad(run(), leaves, dy)[0]


def epilogues(report: Report) -> Iterator[None]:
    """What `kernels/configs.EPILOGUES` should name on this architecture: one kernel against GEMM and kernel."""
    at = report.at
    D, N = at.config.hidden_size, at.config.intermediate_size
    with torch.no_grad():
        for T in dict.fromkeys((min(128, at.tokens), at.tokens)):
            x, up, inner, down = tensors(at, T, D), tensors(at, N, D), tensors(at, T, N), tensors(at, D, N)
            up, down = up * D**-0.5, down * N**-0.5
            b_up, b_down, residual = tensors(at, N), tensors(at, D), tensors(at, T, D)
            flop = 2 * T * D * N
            nbytes = x.nbytes + up.nbytes + inner.nbytes
            runs = {
                "fused": lambda x=x, up=up, b=b_up: kernels.linear_gelu_fwd(x, up, b, "none"),
                "cublas + fastbert": forced(lambda x=x, up=up, b=b_up: ops.gelu(F.linear(x, up, b)), at),
            }
            good = checked("linear_gelu", at, runs, F.gelu(F.linear(x, up, b_up)))
            report.add("linear_gelu", f"T{T}", "forward", good, nbytes, flop)
            runs = {
                "fused": lambda x=inner, w=down, b=b_down, r=residual: kernels.linear_add_fwd(x, w, b, r),
                "cublas + torch": lambda x=inner, w=down, b=b_down, r=residual: F.linear(x, w, b) + r,
            }
            good = checked("linear_add", at, runs, F.linear(inner, down, b_down) + residual)
            report.add("linear_add", f"T{T}", "forward", good, nbytes + x.nbytes, flop)
            yield
            weight, scale = quantize_rows_float8(up)
            runs = {
                "float8": forced(lambda x=x, w=weight, s=scale, b=b_up: ops.float8_linear(x, w, s, b), at),
                "torch._scaled_mm": partial(scaled_mm, x, weight, scale, b_up),
            }
            good = checked("float8_linear", at, runs, float8_linear_ref(x, weight, scale, b_up))
            if good:
                good["cublas, not 8 bits"] = lambda x=x, up=up, b=b_up: F.linear(x, up, b)
            report.add("float8_linear", f"T{T}", "forward", good, nbytes, flop)
            yield


def scaled_mm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """torch's float8 product with our quantisation of the rows."""
    q, row_scale = kernels.quantize_rows_fwd(x)
    return torch._scaled_mm(q, weight.mT, scale_a=row_scale[:, None], scale_b=scale[None], bias=bias, out_dtype=x.dtype)


# Whole models


def batch_of(at: Setting, lengths: list[int], config: BertConfig) -> PackedBatch:
    """Random ids."""
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, config.vocab_size, (n,), generator=g).tolist() for n in lengths]
    return pack(ids, [[0] * n for n in lengths]).to(at.device)


def model_flop(config: BertConfig, lengths: list[int]) -> float:
    """Multiply-adds of a forward pass, times two."""
    D, L, n = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    dense = 2 * (4 * D * D + 2 * D * n) * sum(lengths)
    return L * (dense + 4 * D * sum(s * s for s in lengths))


def hugging_face(model: BertModel, at: Setting, batch: PackedBatch, compile: bool = False) -> dict[str, Run]:
    """transformers' BERT with the same weights on the same texts, padded to the longest."""
    import transformers

    config = transformers.BertConfig(**{
        k: getattr(model.config, k)
        for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    })  # fmt: skip
    config._attn_implementation = "sdpa"
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict({k: v.cpu().float() for k, v in model.state_dict().items()})
    theirs = theirs.to(at.device, at.dtype)
    rows = batch.split(batch.input_ids)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    keep = mask.bool()
    if compile:
        best = theirs if at.dry else torch.compile(theirs, mode="max-autotune")
        return {"hf torch.compile padded": lambda: best(ids, attention_mask=mask).last_hidden_state[keep]}
    return {
        "hf sdpa padded": lambda: theirs(ids, attention_mask=mask).last_hidden_state[keep],
        "hf packed varlen_attn": partial(packed_hugging_face, theirs, batch),
    }


def packed_hugging_face(theirs: Any, batch: PackedBatch) -> torch.Tensor:
    """transformers' modules on packed tokens, with torch's varlen attention: what one could write by hand."""
    x = theirs.embeddings(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None])[0]
    for layer in theirs.encoder.layer:
        own = layer.attention.self
        q, k, v = (p(x).view(x.shape[0], own.num_attention_heads, -1) for p in (own.query, own.key, own.value))
        context = varlen(torch.stack([q, k, v], 1), batch.cu_seqlens, batch.max_seqlen).flatten(1)
        x = layer.attention.output(context, x)
        x = layer.output(layer.intermediate(x), x)
    return x


def engine_run(model: BertModel, batch: PackedBatch, at: Setting) -> Run:
    """As users call it: the CUDA engine if `execution_plan` says so."""
    run = forced(lambda: model.forward_packed(batch), at)
    with torch.inference_mode():
        print(forced(model.execution_plan, at)())
    return run


def eager(model: BertModel, batch: PackedBatch) -> torch.Tensor:
    """The chain of ops without graphs."""
    with use_engine("off"):
        return model.forward_packed(batch)


def inference(report: Report) -> Iterator[None]:
    """Tokens to hidden states: fixed lengths, a mix, one text alone; real tokens per second are T / ms."""
    at = report.at
    for name, config in (("base", at.config), ("large", at.large)):
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False).eval().to(at.device, at.dtype)
        g = torch.Generator().manual_seed(1)
        mix = torch.empty(at.tokens // 8).exponential_(1 / (at.lengths[-1] / 4), generator=g).clamp(2, at.lengths[-1])
        mixed = [int(n) for n in mix if n >= 2]
        total = [sum(mixed[: i + 1]) for i in range(len(mixed))]
        cases = {"batch1_S128": [min(128, at.tokens)], "mix": mixed[: max(1, sum(t <= at.tokens for t in total))]}
        for length in (at.lengths[0], at.lengths[-3 if len(at.lengths) > 2 else 0], at.lengths[-1]):
            cases[f"S{length}"] = at.model_lengths(length)
        for case, lengths in cases.items():
            batch = batch_of(at, lengths, config)
            with torch.no_grad():
                runs = {
                    "fastbert": engine_run(model, batch, at),
                    "fastbert ops": forced(partial(eager, model, batch), at),
                }
                try:
                    runs |= hugging_face(model, at, batch)
                except ImportError as error:
                    print(f"{name}: peers of transformers are missing: {error}")
                with ops.use_backend("reference"):
                    right = eager(model, batch)
                good = checked(name, at, runs, right)
                nbytes = sum(p.nbytes for p in model.encoder.parameters())
                report.add(
                    f"bert-{name}", f"{case}_T{sum(lengths)}", "forward", good, nbytes,
                    model_flop(config, lengths), graphs=False,
                )  # fmt: skip
            yield


def compiled(report: Report) -> Iterator[None]:
    """Beside transformers under torch.compile, which takes minutes to tune: two cases, last of all."""
    at = report.at
    torch.manual_seed(0)
    model = BertModel(at.config, add_pooling_layer=False).eval().to(at.device, at.dtype)
    for lengths in ([min(128, at.tokens)], at.model_lengths(at.lengths[len(at.lengths) // 2])):
        batch = batch_of(at, lengths, at.config)
        with torch.no_grad():
            with ops.use_backend("reference"):
                right = eager(model, batch)
            try:
                runs = {"fastbert": engine_run(model, batch, at)} | hugging_face(model, at, batch, compile=True)
            except ImportError as error:
                print(f"compiled: transformers is missing: {error}")
                return
            case, good = f"{len(lengths)}x{lengths[0]}", checked("compiled", at, runs, right)
            nbytes = sum(p.nbytes for p in model.encoder.parameters())
            report.add("bert-base", case, "compiled", good, nbytes, model_flop(at.config, lengths), graphs=False)
        yield


def training(report: Report) -> Iterator[None]:
    """A masked-LM step: time, and the peak of memory beside transformers' on the same tokens."""
    at = report.at
    lengths = at.model_lengths(at.lengths[-1])
    batch = batch_of(at, lengths, at.config)
    model = BertForMaskedLM(at.config).train().to(at.device)
    label = torch.full_like(batch.input_ids, -100)
    label[::7] = batch.input_ids[::7]
    chosen = (label != -100).nonzero()[:, 0]
    cast = partial(torch.autocast, at.device, dtype=torch.bfloat16, enabled=not at.dry)

    def ours() -> None:
        with cast():
            hidden = model.base_model.forward_packed(batch)
            loss = ops.cross_entropy(model.logits(hidden[chosen]), label[chosen])
        loss.backward()
        model.zero_grad()

    runs = {"fastbert": forced(ours, at)}
    try:
        import transformers

        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        config = transformers.BertConfig(**{k: getattr(at.config, k) for k in sizes})
        theirs = transformers.BertForMaskedLM(config).train().to(at.device)
        ids = batch.input_ids.view(len(lengths), -1)

        def hf() -> None:
            with cast():
                loss = theirs(ids, labels=label.view_as(ids)).loss
            loss.backward()
            theirs.zero_grad()

        runs["hf sdpa padded"] = hf
    except ImportError as error:
        print(f"training: transformers is missing: {error}")
    case = f"S{at.lengths[-1]}_T{at.tokens}"
    flop = 3 * (model_flop(at.config, lengths) + 2 * len(chosen) * at.config.hidden_size * at.config.vocab_size)
    report.add("bert-base mlm", case, "training", runs, 0, flop, graphs=False)
    yield
    for name, run in runs.items():
        peak = Peak("bert-base mlm", case, name, round(peak_mb(run, at), 1), harness.device_name(at.device),
                    torch.__version__, harness.commit(), harness.today())  # fmt: skip
        harness.write([peak], f"{report.name}-peak", ("op", "case", "backend"))
        print(f"peak memory of a step, {case}, {name}: {peak.peak_mb} MB", flush=True)
        yield


def peak_mb(run: Run, at: Setting) -> float:
    """MB that a call allocates at its peak, over what was allocated before."""
    if at.device == "cpu":
        run()
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


SECTIONS: dict[str, Callable[[Report], Iterator[None]]] = {
    "attention": attention,
    "memory": memory_bound,
    "inference": inference,
    "training": training,
    "epilogues": epilogues,
    "compiled": compiled,
}


def correct(at: Setting) -> None:
    """Every op's BERT-sized case against the oracle first: a red check prints no number."""
    for case in testing.CASES:
        if "base" in case.name and dispatch.has(BACKEND, case.op, at.device, at.dtype):
            with ops.use_backend(BACKEND):
                testing.check_case(case, at.dtype, at.device)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="every step once, tiny, on the CPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=80, help="box of a section")
    parser.add_argument("--total", type=float, default=480, help="seconds after which no section begins")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    at = setting(args.dry_run, args.dtype, args.seconds)
    correct(at)
    report = Report(at)
    for name in args.only.split(","):
        if time.monotonic() - begun > args.total:
            print(f"{name}: out of time, not measured (--only {name})")
            continue
        start, finished = time.monotonic(), True
        for _ in SECTIONS[name](report):
            if time.monotonic() - start > at.seconds:
                finished = False
                break
        print(
            f"{name}: {time.monotonic() - start:.0f} s{'' if finished else ', out of time: the rest is not measured'}"
        )
    print(report.table())
    print(f"{len(report.rows)} rows in benchmarks/results/{report.name}.csv")


if __name__ == "__main__":
    main()
