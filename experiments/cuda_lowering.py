"""Does the decoding step compile for a GPU, and into how many kernel launches? Found out without
a GPU.

    pip install "torch==2.11.*"        # the CUDA build, in an environment of its own (2.6 GB); no driver, no GPU
    python experiments/cuda_lowering.py --out experiments/results/cuda_lowering.json

The smaller a model, the more of a decoding step is the launching of its kernels, even in a CUDA
graph. This script lets torch.compile believe in an H200: the tensors are fake, shapes without
numbers, and Inductor lowers the step to Triton's kernels, which Triton and ptxas compile to
machine code for sm_90. So it shows what fails to compile, what falls back to a copy, and how many
launches a step takes. It runs nothing: whether the numbers are right, whether the step can be
captured in a CUDA graph and how long it takes, only a GPU can tell.

The operators that PyTorch itself picks at run time are assumed: attention by EFFICIENT_ATTENTION,
as decode.py asks for, and one launch for each matrix product (cuBLAS may split one in two)."""
import collections
import datetime
import json
import re
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent))
from experiments.bench_decode import METHODS, OFFSETS, SIZES, flat_tree
from common import Parser, Progress, check_output, one_line_errors, write_whole
from decode import Decoder, chain, compile_step
from heads import HeadsConfig, MultiTokenGPT, draft_sources
from model import GPT, GPTConfig, InputError

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, max_threads_per_block=1024,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=62914560,
    total_memory=150754820096, gcnArchName="", is_integrated=0, is_multi_gpu_board=0)

TREES = {**{name: chain(draft_sources(offsets)) for name, offsets in METHODS.items()},
         "tree of 8": flat_tree(7), "tree of 64": flat_tree(63)}
DEFAULT = dict(size="124M", tree="MTP", kind="resblock", whs=False, batch=1, dtype="bfloat16",
               temperature=0.0, top_k=None, top_p=None, layers=None)  # layers: fewer than the size has
SAMPLED = dict(temperature=1.0, top_k=50, top_p=0.9)
COUNTED = [dict(size=size, tree=tree) for size in ("toy", "124M", "1.5B") for tree in METHODS]
COMPILED = [dict(layers=2, **variant) for variant in [  # layers are alike, so two will do
    *(dict(tree=tree, **how) for tree in TREES for how in ({}, dict(temperature=1.0), SAMPLED)),
    *(dict(tree=tree, dtype="float32", **how) for tree in TREES for how in ({}, SAMPLED)),
    *(dict(tree=tree, batch=8, **how) for tree in TREES for how in ({}, SAMPLED)),
    *(dict(tree=tree, **heads, **how) for tree in ("MTP", "leap", "tree of 8") for how in ({}, SAMPLED)
      for heads in (dict(kind="block"), dict(whs=True))),
    dict(size="toy", tree="leap", dtype="float32", temperature=1.0),
    dict(size="1.5B", tree="tree of 64", **SAMPLED)]]
GROUPS = {  # what the launches are for, by their names
    "matrix products": r"mm$", "attention": r"_attention$", "norms, residuals": r"layer_norm",
    "keys, values": r"index_copy", "GELU": r"gelu", "picking tokens": r"max|sort|softmax|cumsum|topk|log"}


def imagine_an_h200():
    """Make torch, Inductor and Triton believe that there is one H200. Nothing can run on it."""
    import torch._dynamo.device_interface as device_interface
    import torch._subclasses.fake_tensor as fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    def always(value):
        return lambda *args, **kwargs: value
    torch._C._ensureCUDADeviceGuardSet()
    stream = SimpleNamespace(cuda_stream=0, device=torch.device("cuda", 0))
    said = dict(is_available=True, is_initialized=True, device_count=1, current_device=0, _lazy_init=None,
                _exchange_device=0, _maybe_exchange_device=0, set_device=None, synchronize=None, current_stream=stream,
                get_device_properties=H200, get_device_capability=(9, 0), get_device_name=H200.name,
                is_bf16_supported=True, mem_get_info=(140 << 30, 141 << 30), set_rng_state=None,
                get_rng_state=torch.zeros(16, dtype=torch.uint8))
    for name, value in said.items():
        setattr(torch.cuda, name, always(value))
    for name in ("getDevice", "exchangeDevice", "maybeExchangeDevice", "setDevice", "getCurrentRawStream"):
        setattr(torch._C, f"_cuda_{name}", always(0))
    interface = device_interface.CudaInterface
    for name, value in dict(get_device_properties=H200, get_compute_capability=90, is_available=True, current_device=0,
                            exchange_device=0, maybe_exchange_device=0, set_device=None, synchronize=None,
                            get_raw_stream=0).items():
        setattr(interface, name, staticmethod(always(value)))
    interface.Worker.get_device_properties = staticmethod(always(H200))
    fake_tensor.init_gpu_context = always(None)
    fake_tensor.FakeTensorMode.avoid_device_init = property(always(True))

    class Imagined(DriverBase):  # says for what to compile, and no more
        is_active = classmethod(always(True))
        get_current_target = always(GPUTarget("cuda", 90, 32))
        get_current_device = get_current_stream = always(0)
        get_active_torch_device = always(torch.device("cuda", 0))
        get_device_interface = always(torch.cuda)
        map_python_to_cpp_type = get_benchmarker = get_empty_cache_for_benchmark = clear_cache = always(None)

        def __init__(self):
            pass
    driver.set_active(Imagined())
    import torch._inductor.runtime.triton_helpers as helpers
    helpers.set_driver_to_gpu = always(None)
    # PyTorch chooses the operator by asking the device, so here it is named.
    F.scaled_dot_product_attention = lambda q, k, v, attn_mask, is_causal, dropout_p: \
        torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask.expand(len(q), q.shape[1], q.shape[2], k.shape[2]), False, dropout_p, is_causal)[0]


class Lowered(Exception):
    """Everything is compiled; what remains would run it."""


def lower(size, tree, kind, whs, batch, dtype, temperature, top_k, top_p, layers):
    """Compile one step for the H200. -> its launches, as from `count`, and the seconds that took.

    Raises what the compiler raises when it fails."""
    import torch._inductor.config as config
    import torch._inductor.graph as graph
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    torch._dynamo.reset()
    shape = SIZES[size] if layers is None else {**SIZES[size], "n_layer": layers}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"), torch.no_grad():
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            model = MultiTokenGPT(GPT(GPTConfig(**shape)), HeadsConfig(OFFSETS, kind, 1, False, whs)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        decoder = Decoder(model, tree=TREES[tree], max_length=256, temperature=temperature, top_k=top_k, top_p=top_p)
        s, _ = decoder.state(batch)
    source, compiled = [], []

    def compile_to_machine_code(self):
        code, _ = self.codegen()
        source.append(getattr(code, "value", code))
        PyCodeCache.load_by_key_path(*PyCodeCache.write(source[-1]))  # this is when Triton compiles
        compiled.append(True)
        raise Lowered
    graph.GraphLowering.compile_to_module = compile_to_machine_code
    CachingAutotuner._make_launchers = CachingAutotuner._dynamic_scale_rblock = lambda self: None  # these need a GPU
    start = time.perf_counter()
    try:
        # Off: what needs a device that is there (folded constants, timed paddings, graphs from
        # the cache), and further processes, which would not believe in it.
        with torch.no_grad(), config.patch(joint_graph_constant_folding=False, shape_padding=False,
                                           fx_graph_cache=False, compile_threads=1):
            compile_step(decoder, s)
    except Exception:
        if not compiled:  # else it is Lowered, in whatever wrapping
            raise
    return dict(count(source[0]), seconds=time.perf_counter() - start)


def count(source):
    """The launches in a program that Inductor wrote. -> dict(total, launches: {what for: how
    many}, operators: those that Inductor leaves to PyTorch's own kernels, which may launch
    several)"""
    call = source[source.index("def call("):]
    kernels = re.findall(r"^\s+(triton_\w+?)(?:_\d+)?\.run\(", call, re.M)
    operators = re.findall(r"(?:extern_kernels|torch\.ops\.aten|aten)\.(\w+)[\w.]*\(", call)
    launches = collections.Counter(
        next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), "bookkeeping")
        for name in kernels + operators)
    return dict(total=launches.total(), launches=dict(launches), operators=dict(collections.Counter(operators)))


def parse_args(argv=None):
    """The command line as a namespace."""
    p = Parser(prog="cuda_lowering.py", description="Compile the decoding step for an H200, without "
               "one, and count its kernel launches.")
    p.add_argument("--only", metavar="TEXT", help="only variants whose name contains this, as in: 124M MTP")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON, after every variant")
    return p.parse_args(argv)


def name_of(variant):
    """A variant in words: what differs from DEFAULT, the size and the tree."""
    v = {**DEFAULT, **variant}
    return ", ".join([f"{v['size']} {v['tree']}"] + [
        str(value) if isinstance(value, str) else f"{key} {value}" for key, value in v.items()
        if value != DEFAULT[key] and key not in ("size", "tree")])


def main(argv=None):
    """Bad input is one line and status 2, a variant that does not compile status 1."""
    args = parse_args(argv)
    with one_line_errors("cuda_lowering.py", memory="the number of variants (--only)"):
        variants = [v for v in COUNTED + COMPILED if args.only is None or args.only in name_of(v)]
        if not variants:
            raise InputError(f"no variant's name contains {args.only!r}; there are {name_of(COUNTED[0])!r} and others")
        check_output("out", args.out)
        if torch.version.cuda is None:
            raise InputError(f"this needs the CUDA build of PyTorch, not {torch.__version__}: in an environment of its "
                             "own, pip install 'torch==2.11.*'")
        imagine_an_h200()
        warnings.filterwarnings("ignore", module="torch._inductor")  # advice on speed
        results = dict(command=" ".join(sys.argv), torch=torch.__version__, triton=version("triton"), target="sm_90",
                       date=datetime.date.today().isoformat(), rows=[])
        for variant in (bar := Progress(variants, desc="compile", unit="variant", leave=True)):
            bar.set_postfix_str(name_of(variant))
            try:
                row = lower(**{**DEFAULT, **variant})
            except Exception as error:  # whatever it is: that is the result
                row = dict(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            results["rows"].append(dict(name=name_of(variant), **row))
            with bar.external_write_mode():
                groups = "  ".join(f"{n} {group}" for group, n in sorted(row.get("launches", {}).items()))
                print(f"{name_of(variant):60}{row.get('total', 'FAILED'):>7}  {row.get('error', groups)}")
            if args.out:
                write_whole(args.out, json.dumps(results, indent=1) + "\n")
    return int(any("error" in row for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
