"""Does the decoding step compile for a GPU, and into how many kernel launches? An answer without a
GPU.

    pip install "torch==2.11.*"    # the CUDA build, in its own environment (2.6 GB); no driver
    python experiments/cuda_lowering.py --out experiments/results/cuda_lowering.json

The smaller a model, the larger the fraction of a decoding step that goes into launching kernels,
even in a CUDA graph. This script makes torch.compile believe in an H200. The tensors are fake:
shapes without numbers. Inductor lowers the step to Triton kernels, which Triton and ptxas compile
to machine code for sm_90. (The prefill is never compiled: it is one eager pass.) So the script
shows what fails to compile, what falls back to a copy, and how many launches a step takes. It runs
nothing: only a GPU can tell whether the numbers are right, whether a CUDA graph can capture the
step, and how long it takes.

PyTorch picks some operators at run time, so the script assumes them: attention by
EFFICIENT_ATTENTION, as decode.py asks for, and one launch for each matrix product (cuBLAS may
split one in two)."""
import datetime
import json
import re
import sys
import time
import warnings
from collections import Counter
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, Progress, check_output, one_line_errors, write_whole
from decode import Decoder, chain, compile_step
from experiments.bench_decode import FEW, METHODS, OFFSETS, SIZES, flat_tree
from heads import HeadsConfig, MultiTokenGPT, draft_sources
from model import GPT, GPTConfig, InputError

# ----------------------------------------------------------------------------------------------
# What is compiled

TREES = {**{name: chain(draft_sources(offsets)) for name, offsets in METHODS.items()},
         "tree of 8": flat_tree(7), "tree of 64": flat_tree(63)}
DEFAULT = dict(size="124M", tree="MTP", kind="resblock", whs=False, conditional=False,
               own_unembedding=False, draft_vocab=None, batch=1, dtype="bfloat16", temperature=0.0,
               top_k=None, top_p=None, layers=None)  # all of the size's
SAMPLED = dict(temperature=1.0, top_k=50, top_p=0.9)
COUNTED = [dict(size=size, tree=tree) for size, tree in product(SIZES, METHODS)]
COUNTED += [dict(tree=tree, conditional=True) for tree in ("MTP", "leap")]
COMPILED = [dict(layers=2, **variant) for variant in [  # layers are alike, so two will do
    *(dict(tree=tree, **how) for tree in TREES for how in ({}, dict(temperature=1.0), SAMPLED)),
    *(dict(tree=tree, dtype="float32", **how) for tree in TREES for how in ({}, SAMPLED)),
    *(dict(tree=tree, batch=8, **how) for tree in TREES for how in ({}, SAMPLED)),
    *(dict(tree=tree, **heads, **how) for tree in ("MTP", "leap", "tree of 8")
      for how in ({}, SAMPLED)
      for heads in (dict(kind="block"), dict(whs=True), dict(conditional=True))),
    *(dict(tree=tree, **more) for tree in ("MTP", "leap")
      for more in (dict(own_unembedding=True), dict(draft_vocab=range(FEW)))),
    dict(size="toy", tree="leap", dtype="float32", temperature=1.0),
    dict(size="1.5B", tree="tree of 64", **SAMPLED)]]


def name_of(variant):
    """A variant in words: the size, the tree, and what else differs from DEFAULT."""
    v = DEFAULT | variant
    more = [value if isinstance(value, str) else f"{key} {value}" for key, value in v.items()
            if value != DEFAULT[key] and key not in ("size", "tree")]
    return ", ".join([f"{v['size']} {v['tree']}", *more])


# ----------------------------------------------------------------------------------------------
# Compiling for a GPU that is not there

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32,
    max_threads_per_block=1024, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536)


def imagine_an_h200():
    """Make PyTorch, Inductor and Triton believe that there is an H200. Nothing can run on it."""
    import torch._inductor.runtime.triton_helpers as triton_helpers
    import torch._subclasses.fake_tensor as fake_tensor
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    def always(value):
        return lambda *args, **kwargs: value

    class Imagined(DriverBase):
        is_active = classmethod(always(True))
        get_current_target = always(GPUTarget("cuda", 90, 32))
        get_active_torch_device = always(torch.device("cuda", 0))
        map_python_to_cpp_type = get_benchmarker = always(None)  # abstract, but never called
    driver.set_active(Imagined())
    triton_helpers.set_driver_to_gpu = always(None)  # it would replace this driver
    answers = dict(is_available=True, _lazy_init=None, _exchange_device=0,
                   _maybe_exchange_device=0, get_device_properties=H200,
                   get_rng_state=torch.zeros(16, dtype=torch.uint8))
    for name, value in answers.items():
        setattr(torch.cuda, name, always(value))
    torch._C._cuda_getDevice = always(0)
    for interface in (CudaInterface, CudaInterface.Worker):
        interface.get_device_properties = staticmethod(always(H200))
    fake_tensor.init_gpu_context = always(None)
    FakeTensorMode.avoid_device_init = property(always(True))

    # PyTorch chooses the operator by asking the device, so this names it.
    def attention(q, k, v, attn_mask, is_causal, dropout_p):
        mask = attn_mask.expand(len(q), q.shape[1], q.shape[2], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, False, dropout_p, is_causal)[0]
    F.scaled_dot_product_attention = attention


class Lowered(Exception):
    """The step is compiled. What remains would run it."""


def lower(size, tree, kind, whs, conditional, own_unembedding, batch, dtype, layers, **how):
    """Compile one step for the H200. -> what `count` returns, and the seconds that it took.
    Raises what the compiler raises if it fails."""
    import torch._inductor.config as config
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    torch._dynamo.reset()
    shape = SIZES[size] if layers is None else SIZES[size] | dict(n_layer=layers)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"), torch.no_grad():
        torch.set_default_dtype(getattr(torch, dtype))  # fake parameters have no .to(dtype)
        heads = HeadsConfig(OFFSETS, kind, own_unembedding=own_unembedding, whs=whs,
                            conditional=conditional)
        model = MultiTokenGPT(GPT(GPTConfig(**shape)), heads).eval()
        torch.set_default_dtype(torch.float32)
        decoder = Decoder(model, tree=TREES[tree], max_length=256, **how)
        s, _ = decoder.state(batch)
    programs = []

    def compile_to_machine_code(graph):
        code, _ = graph.codegen()
        code = getattr(code, "value", code)
        PyCodeCache.load_by_key_path(*PyCodeCache.write(code))  # this is when Triton compiles
        programs.append(code)
        raise Lowered
    GraphLowering.compile_to_module = compile_to_machine_code
    for needs_a_gpu in ("_make_launchers", "_dynamic_scale_rblock"):
        setattr(CachingAutotuner, needs_a_gpu, lambda self: None)
    start = time.perf_counter()
    try:
        # Off: what needs a device that is there (folded constants, timed paddings, graphs from
        # the cache), and further processes, which would not believe in it.
        with torch.no_grad(), config.patch(joint_graph_constant_folding=False, shape_padding=False,
                                           fx_graph_cache=False, compile_threads=1):
            compile_step(decoder, s)
    except Exception:
        if not programs:  # else it is Lowered, in whatever wrapping
            raise
    return count(programs[0]) | dict(seconds=time.perf_counter() - start)


GROUPS = {  # what the launches are for, by their names
    "matrix products": r"mm$", "attention": r"_attention$", "norms, residuals": r"layer_norm",
    "keys, values": r"index_copy", "GELU": r"gelu",
    "picking tokens": r"max|sort|softmax|cumsum|topk|log"}


def count(source):
    """The launches in a program that Inductor wrote. -> dict(total, launches: {what for: how
    many}, operators: those that Inductor leaves to PyTorch's own kernels, which may launch
    several)"""
    call = source[source.index("def call("):]
    kernels = re.findall(r"^\s+(triton_\w+?)(?:_\d+)?\.run\(", call, re.M)
    operators = re.findall(r"(?:extern_kernels|torch\.ops\.aten|aten)\.(\w+)[\w.]*\(", call)

    def group_of(name):
        found = (group for group, pattern in GROUPS.items() if re.search(pattern, name))
        return next(found, "bookkeeping")
    launches = Counter(group_of(name) for name in kernels + operators)
    return dict(total=launches.total(), launches=dict(launches),
                operators=dict(Counter(operators)))


# ----------------------------------------------------------------------------------------------
# The command line

def main(argv=None):
    """Bad input is one line and status 2, a variant that does not compile status 1."""
    p = Parser(prog="cuda_lowering.py", description="Compile the decoding step for an H200, "
               "without one, and count its kernel launches.")
    p.add_argument("--only", metavar="TEXT", help="only variants whose name contains this, as in: "
                   "124M MTP")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON, after every variant")
    args = p.parse_args(argv)
    with one_line_errors("cuda_lowering.py", memory="the number of variants (--only)"):
        variants = [v for v in COUNTED + COMPILED if (args.only or "") in name_of(v)]
        if not variants:
            raise InputError(f"no variant's name contains {args.only!r}; there are "
                             f"{name_of(COUNTED[0])!r} and others")
        check_output("out", args.out)
        if torch.version.cuda is None:
            raise InputError(f"this needs the CUDA build of PyTorch, not {torch.__version__}: in "
                             "an environment of its own, pip install 'torch==2.11.*'")
        imagine_an_h200()
        warnings.filterwarnings("ignore", module="torch._inductor")  # advice on speed
        results = dict(command=" ".join(sys.argv), torch=torch.__version__,
                       triton=version("triton"), target="sm_90",
                       date=datetime.date.today().isoformat(), rows=[])
        for variant in (bar := Progress(variants, desc="compile", unit="variant", leave=True)):
            name = name_of(variant)
            bar.set_postfix_str(name)
            try:
                row = lower(**(DEFAULT | variant))
            except Exception as error:  # whatever it is: that is the result
                reason = str(error).strip().splitlines()[0]
                row = dict(error=f"{type(error).__name__}: {reason}")
            results["rows"].append(dict(name=name, **row))
            with bar.external_write_mode():
                launches = sorted(row.get("launches", {}).items())
                groups = "  ".join(f"{n} {group}" for group, n in launches)
                print(f"{name:60}{row.get('total', 'FAILED'):>7}  {row.get('error', groups)}")
            if args.out:
                write_whole(args.out, json.dumps(results, indent=1) + "\n")
    return int(any("error" in row for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
