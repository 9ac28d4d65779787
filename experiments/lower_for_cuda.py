"""Does the decoding step compile for a GPU, and into how many launches? An answer without a GPU.

    pip install "torch==2.11.*"    # the CUDA build, in its own environment (2.6 GB); no driver
    python experiments/lower_for_cuda.py --out experiments/results/lower_for_cuda.json

The smaller a model, the larger the fraction of a decoding step that goes into launching kernels,
even in a CUDA graph. This script makes torch.compile believe in an H200. The tensors are fake:
shapes without numbers. Inductor lowers the step to Triton kernels, which Triton and ptxas compile
to machine code for sm_90. So the script shows what fails to compile and how many launches a step
takes. It runs nothing: only a GPU can tell whether the numbers are right, whether a CUDA graph can
capture the step, and how long it takes.

PyTorch picks some operators at run time, so the script assumes them: memory-efficient attention,
and one launch for each matrix product (cuBLAS may split one in two).
"""
import re
import sys
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # before PyTorch: Ctrl-C is one line from here on
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from common import Parser, check_output, one_line_errors, progress_bar, write_results
from data.prepare import require
from decode import Decoder, compile_step, drafting
from experiments.bench_decode import FEW, METHODS, OFFSETS, SIZES
from heads import HeadsConfig, MultiTokenGPT
from model import GPT, GPTConfig

# ---- What is compiled ------------------------------------------------------------------------

DEFAULT = dict(method="MTP", size="124M", layers=None, dtype="bfloat16", batch_size=1,
               kind="resblock", whs=False, sequential=False, draft_vocab=None, temperature=0.0,
               top_k=None, top_p=1.0)
SAMPLED = dict(temperature=1.0, top_k=50, top_p=0.9)
COUNTED = ("NTP", "MTP", "leap", "all", "lookup")


def all_variants():
    """What differs from DEFAULT, a list of dicts. Where the question is only whether a variant
    compiles, two layers will do."""
    variants = [dict(method=method) for method in COUNTED]
    for method in ("MTP", "leap"):
        variants.append(dict(method=method, sequential=True))
        variants.append(dict(method=method, sequential=True, draft_vocab=FEW))
        for options in (dict(kind="block"), dict(whs=True), dict(kind="block", sequential=True)):
            variants.append(dict(method=method, layers=2) | options)
    variants.append(dict(method="leap", size="toy", dtype="float32"))
    for method in COUNTED:
        for options in (SAMPLED, dict(batch_size=8), dict(dtype="float32")):
            variants.append(dict(method=method, layers=2) | options)
    variants.append(dict(method="leap", sequential=True, batch_size=8, layers=2) | SAMPLED)
    variants += [dict(method=method, size="1.5B") for method in COUNTED]
    return variants


def name_of(variant):
    """A variant in words."""
    v = DEFAULT | variant
    words = [f"{v['size']} {v['method']}"]
    for key, value in v.items():
        if value != DEFAULT[key] and key not in ("size", "method"):
            word = key if value is True else f"{key} {value}"
            words.append(value if isinstance(value, str) else word)
    return ", ".join(words)


# ---- Compiling for a GPU that is not there ---------------------------------------------------

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32,
    max_threads_per_block=1024, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536)


def always(value):
    """A function that returns the value, whatever it is asked."""
    return lambda *args, **kwargs: value


def imagine_an_h200():
    """Make PyTorch, Inductor and Triton believe that there is an H200. Nothing can run on it."""
    import torch._inductor.runtime.triton_helpers as triton_helpers
    import torch._subclasses.fake_tensor as fake_tensor
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class Imagined(DriverBase):
        is_active = classmethod(always(True))
        get_current_target = always(GPUTarget("cuda", 90, 32))
        get_active_torch_device = always(torch.device("cuda", 0))
        map_python_to_cpp_type = always(None)  # abstract, but never called
        get_benchmarker = always(None)
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


def imagined_decoder(method, size, layers, dtype, kind, whs, sequential, draft_vocab, **options):
    """A Decoder whose tensors have shapes but no numbers."""
    shape = dict(SIZES[size])
    shape["n_layer"] = layers or shape["n_layer"]
    options["draft_vocab"] = draft_vocab and range(draft_vocab)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"):
        torch.set_default_dtype(getattr(torch, dtype))  # fake parameters have no .to(dtype)
        heads = HeadsConfig(OFFSETS, kind, whs=whs, sequential=sequential)
        model = MultiTokenGPT(GPT(GPTConfig(**shape)), heads).eval()
        torch.set_default_dtype(torch.float32)
        return Decoder(model, max_length=256, **options, **drafting(METHODS[method], OFFSETS))


class Lowered(Exception):
    """The step is compiled. What remains would run it."""


def lower(variant):
    """Compile one step. -> Inductor's program. Raises what the compiler raises if it fails."""
    import torch._inductor.config as config
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    torch._dynamo.reset()
    decoder = imagined_decoder(**(DEFAULT | variant))
    programs = []

    def compile_to_machine_code(graph):
        code, _ = graph.codegen()
        code = getattr(code, "value", code)
        PyCodeCache.load_by_key_path(*PyCodeCache.write(code))  # this is when Triton compiles
        programs.append(code)
        raise Lowered
    GraphLowering.compile_to_module = compile_to_machine_code
    CachingAutotuner._make_launchers = always(None)  # needs a GPU
    CachingAutotuner._dynamic_scale_rblock = always(None)
    try:
        # Off: what needs a device that is there (folded constants, timed paddings, graphs from
        # the cache), and further processes, which would not believe in it.
        with config.patch(joint_graph_constant_folding=False, shape_padding=False,
                          fx_graph_cache=False, compile_threads=1):
            compile_step(decoder)
    except Exception:
        if not programs:  # else it is Lowered, in whatever wrapping
            raise
    return programs[0]


def count(program):
    """The launches in a program that Inductor wrote. -> dict(total, kernels: {name: number} of
    Triton, operators: those that Inductor leaves to PyTorch's own kernels, which may launch
    several)"""
    call = program[program.index("def call("):]
    kernels = re.findall(r"^\s+triton_(\w+?)(?:_\d+)?\.run\(", call, re.M)
    operators = re.findall(r"(?:extern_kernels|torch\.ops\.aten|aten)\.(\w+)[\w.]*\(", call)
    return dict(total=len(kernels + operators), kernels=Counter(kernels),
                operators=Counter(operators))


# ---- The command line ------------------------------------------------------------------------

def main(argv=None):
    """Bad input is one line and status 2, a variant that does not compile status 1."""
    p = Parser(prog="lower_for_cuda.py", description="Compile the decoding step for an H200, "
               "without one, and count its kernel launches.")
    p.option("only", "", "only variants whose name contains this, as in: 124M MTP", metavar="TEXT")
    p.option("out", None, "write the results as JSON, after every variant", metavar="FILE")
    args = p.parse_args(argv)
    with one_line_errors("lower_for_cuda.py"):
        variants = [v for v in all_variants() if args.only in name_of(v)]
        require(variants, f"no variant's name contains {args.only!r}, as in: 124M MTP")
        check_output(args.out)
        require(torch.version.cuda, f"this needs the CUDA build of PyTorch, not "
                f"{torch.__version__}: in an environment of its own, pip install 'torch==2.11.*'")
        imagine_an_h200()
        warnings.filterwarnings("ignore", module="torch._inductor")  # advice on speed
        rows = []
        results = dict(torch=torch.__version__, triton=version("triton"), target="sm_90",
                       date=time.strftime("%Y-%m-%d"), rows=rows)
        for variant in (bar := progress_bar(variants, desc="compile", unit="variant")):
            row = dict(name=name_of(variant))
            rows.append(row)
            try:
                row |= count(lower(variant))
            except Exception as error:  # whatever it is: that is the result
                row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            with bar.external_write_mode():
                print(f"{row['name']:60}{row.get('total', 'FAILED'):>7}  {row.get('error', '')}",
                      flush=True)
            write_results(args.out, results)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
