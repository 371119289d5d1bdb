"""What compiling costs: time and memory against the number of layers, and what the proofs take of it.

    python bench/compile_time.py                      # 12, 24 and 48 layers, 128 experts each, tiny width
    python bench/compile_time.py --lowering eager     # without Inductor: capture, passes and proofs alone

Each model is compiled in a process of its own, on one thread, cold; times are CPU seconds of that process.
"""

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LINEAR = 2.3
RESULT = Path(__file__).parent / "results" / "compile_time.json"


def measure(num_layers: int, lowering: Any) -> dict[str, Any]:
    """Compile one model and run it once, here."""
    import resource

    import torch

    import modes_fx
    from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

    torch.set_num_threads(1)
    model = tiny_qwen3_vl_moe(num_layers=num_layers, num_experts=128, top_k=8)
    inputs = tiny_inputs(grid=None, text=15)
    profile = tiny_profile(model)
    with torch.no_grad():
        model(**inputs)
    proofs = 0.0
    # The package has the function under this name, not the module.
    rewriting: Any = importlib.import_module("modes_fx.passes.skip_experts")
    prove = rewriting.prove

    def timed(*args: Any) -> Any:
        nonlocal proofs
        start = time.process_time()
        proof = prove(*args)
        proofs += time.process_time() - start
        return proof

    rewriting.prove = timed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if lowering == "plain":
        backend: Any = "inductor"
    else:
        backend = modes_fx.backend(profile, lowering=lowering)
    model.compile(backend=backend)
    start = time.process_time()
    with torch.no_grad():
        model(**inputs)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    units = [] if lowering == "plain" else backend.graphs
    return {
        "lowering": lowering,
        "layers": num_layers,
        "rewritten": sum(len(unit.layers()) for unit in units),
        "executed": [] if lowering == "plain" else backend.run.executed,
        "graphs": len(units),
        "compile_s": round(seconds, 2),
        "proofs_s": round(proofs, 3),
        "peak_mb": peak // 1024,
        "grown_mb": (peak - before) // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--lowering", choices=["inductor", "eager", "plain"], default="inductor")
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--gate", action="store_true", help="fail where twice the layers take over 2.3 times")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.lowering)))
        return
    rows = []
    for layers in arguments.layers:
        # No cache of an earlier run, of Inductor's or of Dynamo's.
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
            command = [sys.executable, __file__, "--one", str(layers), "--lowering", arguments.lowering]
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        row = json.loads(output.stdout.splitlines()[-1])
        rows.append(row)
        shown = {key: value for key, value in row.items() if key != "executed"}
        ran = row["executed"] == [1] * layers
        print(shown | {"every layer ran": ran}, flush=True)
        if arguments.gate and not ran:
            sys.exit("A layer did not run rewritten.")
    for less, more in itertools.pairwise(rows):
        if more["layers"] == 2 * less["layers"]:
            ratio = more["compile_s"] / less["compile_s"]
            print(f"{more['layers']} / {less['layers']} layers: {ratio:.2f} times the compile time")
            if arguments.gate and ratio > LINEAR:
                sys.exit(f"Compile time is not linear in the layers: {ratio:.2f} times, at most {LINEAR}.")
    if arguments.record:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
