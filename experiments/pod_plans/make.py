# SPDX-License-Identifier: Apache-2.0
"""Plans of large models on two TPU pods: results/*.json, then results.csv and table.md.

    python experiments/pod_plans/make.py            # compiles rows without a result
    python experiments/pod_plans/make.py --table    # only writes the tables again

Needs the extra [tpu], no TPU; five to thirty minutes of one core and up to some 10 GiB for each row
that is missing. Stopped, it goes on where it was; delete a result to make it again.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs"
SLICES = {"v5e:16x16": 256, "v5p:8x8x8": 512}
COATNETS = (0, 4, 7)
BOUNDS = ("compute", "memory", "communication")
FSDP = {
    "parallel.strategy": "fsdp",
    "parallel.mesh": '{"data": -1, "fsdp": 16}',
    "parallel.remat": "blocks",
}


def rows():
    """Returns (name, config, topology, overrides), the cheapest first."""
    for variant in (COATNETS[0], "muse", *COATNETS[1:], "7 fsdp"):
        for topology, devices in SLICES.items():
            kind = topology.split(":")[0]
            if variant == "muse":
                # The config is meant for 32 devices: a row for each here, and no micro-batches.
                # The batch is that of the results, from before En-Fr had one of its own (655,360).
                overrides = {"data.rows_multiple": str(devices), "optim.accumulate": "1"}
                overrides["batch_size"] = "458752"
                yield f"muse_wmt_en_fr_{kind}", "muse_wmt14.py:pair=en-fr", topology, overrides
            else:
                number, _, split = str(variant).partition(" ")
                name = f"coatnet_{number}_{split or 'replicate'}_{kind}"
                overrides = FSDP if split else {}
                yield name, f"coatnet_imagenet.py:variant={number}", topology, overrides


def plan(config, topology, overrides):
    """Returns the report of `localglobal plan`, or its error."""
    command = ["-m", "localglobal_jax", "plan", "--config", f"{CONFIGS}/{config}"]
    command += ["--topology", topology, "--json", "--timeout", "5400"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    report = json.loads(done.stdout)
    del report["compile"]["kept"]  # a path of this machine
    return {**report, "config": f"configs/{config}", "layers": report.get("layers", [])[:30]}


def figures(name, result):
    """One line of the tables."""
    if "error" in result:
        return {"row": name, "fits": "failed: " + result["error"][:120]}
    memory, split = result["memory"], result["memory"]["split"]
    gib = {
        "needed": memory["needed"],
        "usable": memory["usable"],
        "parameters": split["parameters"],
        "optimizer": split["optimizer"],
        "activations": memory.get("temporary"),
        "code": memory.get("code"),
    }
    line = {
        "row": name,
        "topology": result["topology"],
        "strategy": result["strategy"],
        "parameters M": round(result["parameters"] / 1e6, 1),
        "items a step": result["items"],
        "fits": "yes" if result["fits"] else "no",
        **{f"{k} GiB": None if n is None else round(n / 2**30, 2) for k, n in gib.items()},
        "GFLOP a device": round(result["flops"] / 1e9),
    }
    if "step_ms" in result:
        ms, step, mfu = result["bounds_ms"], result["step_ms"], result["mfu"]
        rate = result["items_per_second"]
        line |= {
            "sent MB": round(result["wire_bytes"] / 1e6),
            **{f"{k} ms": round(n, 2) for k, n in ms.items()},
            "step ms, estimate": f"{step['low']:.0f} to {step['high']:.0f}",
            "items/s, estimate": f"{rate['low']:,.0f} to {rate['high']:,.0f}",
            "MFU %, at most": round(100 * mfu["high"]),
            "lint errors": sum(lint["level"] == "error" for lint in result["lints"]),
        }
    return line | {"compile CPU-s": round(result["compile"]["cpu_seconds"])}


def write_tables():
    """Writes results.csv and table.md from the results so far."""
    found = [(name, HERE / "results" / f"{name}.json") for name, *_ in rows()]
    lines = [figures(name, json.loads(file.read_text())) for name, file in found if file.is_file()]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    (HERE / "table.md").write_text("\n".join(markdown(lines)) + "\n")


def markdown(lines):
    """Formats the most important columns; the rest is in results.csv."""
    columns = (
        "plan",
        "fits",
        "activations",
        "sent",
        "bounds ms",
        "step ms *",
        "items/s *",
        "MFU *",
    )
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for line in lines:
        known, needed = "sent MB" in line, line.get("needed GiB")
        memory = f"{needed or 'more'} of {line['usable GiB']} GiB" if "usable GiB" in line else ""
        bounds = [f"{line[f'{k} ms']:.1f}" for k in BOUNDS] if known else []
        values = (
            line["row"],
            f"{line['fits']}: {memory}" if memory else line["fits"],
            f"{line['activations GiB']} GiB" if known else "",
            f"{line['sent MB']:,} MB" if known else "",
            " / ".join(bounds),
            line.get("step ms, estimate", ""),
            line.get("items/s, estimate", ""),
            f"at most {line['MFU %, at most']} %" if known else "",
        )
        yield "| " + " | ".join(values) + " |"


def main():
    """Makes every row that has no result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="of the rows, e.g. in parallel")
    args = parser.parse_args()
    (HERE / "results").mkdir(exist_ok=True)
    for name, config, topology, overrides in rows():
        file = HERE / "results" / f"{name}.json"
        if args.table or file.is_file() or name not in (args.only or [name]):
            continue
        print(name, flush=True)
        result = {"overrides": overrides, **plan(config, topology, overrides)}
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(figures(name, result)), flush=True)
        write_tables()
    write_tables()


if __name__ == "__main__":
    main()
