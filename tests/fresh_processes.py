"""Scripts in processes that have not imported us, without the seconds that torch takes in each.

One new process imports what is below transformers and us, and forks for each script. For what is
imported first, whether it is missing, and in which order: such a script sees neither transformers,
nor a module of ours, nor what it asked to be left out. One real process beside it, that begins with
nothing, shows that the packages below make no difference.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST = ("torch", "tokenizers", "safetensors.torch", "huggingface_hub.hf_api", "PIL.Image", "yaml")
BELOW = (
    *FIRST, "torch._dynamo", "torch.distributed.tensor", "torchao.quantization",
    "torchvision.transforms.v2", "huggingface_hub.serialization", "kernels", "jinja2", "regex",
)  # fmt: skip
CODE = """
import importlib, json, os, sys, traceback
below, scripts = json.load(sys.stdin)
for name in below:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
ours = {"transformers", "hrvlm", "hrvlm_kernels"} & sys.modules.keys()
assert not ours, f"{ours} came with {below}"
before = sys.modules.keys() | set()
found = []
for script in scripts:
    end, start = os.pipe()
    child = os.fork()
    if not child:
        os.close(end)
        os.dup2(start, 1)
        os.dup2(start, 2)
        status = 1
        try:
            exec(compile(script, "script", "exec"), {"__name__": "__main__", "BEFORE": before})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(start)
    with open(end) as pipe:
        text = pipe.read()
    found.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text])
print("FOUND" + json.dumps(found))
"""


def run(code, *flags, given=None):
    """Output of code in a fresh interpreter that sees the packages of this checkout and no GPU."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def run_each(scripts, below=BELOW):
    """(exit code, output) of each script; ``BEFORE`` in it are the modules already there."""
    found = run(CODE, given=json.dumps([below, scripts])).rpartition("FOUND")[2]
    return [tuple(pair) for pair in json.loads(found)]
