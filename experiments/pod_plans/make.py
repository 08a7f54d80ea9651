# SPDX-License-Identifier: Apache-2.0
"""Plans of large models on two TPU pods and on eight GPUs: results/*.json, results.csv, the tables.

    python experiments/pod_plans/make.py                 # compiles rows without a result
    python experiments/pod_plans/make.py --only H100     # only those whose name contains it
    python experiments/pod_plans/make.py --table         # only writes the tables again

Needs the extra [tpu] for the pods and [cuda] for the GPUs, and neither a TPU nor a GPU; one to
thirty minutes of one core and up to some 10 GiB for each row that is missing. Stopped, it goes on
where it was; delete a result to make it again.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs"
PAGE = CONFIGS / "devices.md"
SLICES = {"v5e:16x16": 256, "v5p:8x8x8": 512}
COATNETS = (0, 4, 7)


def fsdp(ways):
    """Overrides that split parameters and optimizer, and compute blocks again backward."""
    return {
        "parallel.strategy": "fsdp",
        "parallel.mesh": json.dumps({"data": -1, "fsdp": ways}),
        "parallel.remat": "blocks",
    }


# On eight GPUs the batches of the recipes need micro-batches, except for the smallest model's.
GPUS = "h100-8"
ON_GPUS = {
    "coatnet_0": ("coatnet_imagenet.py:variant=0", {}),
    "volo_d5": ("volo_imagenet.py:variant=d5", {"optim.accumulate": "2"}),
    "focal_base": ("focal_imagenet.py:variant=base", {"optim.accumulate": "4"}),
    "muse_wmt_en_fr": ("muse_wmt14.py:pair=en-fr", {"optim.accumulate": "4"}),
    "coatnet_4": ("coatnet_imagenet.py:variant=4", {"optim.accumulate": "8"}),
    "coatnet_7_fsdp": ("coatnet_imagenet.py:variant=7", {"optim.accumulate": "16", **fsdp(8)}),
}


def rows():
    """Returns (name, config, topology, overrides), the cheapest first."""
    for name, (config, overrides) in ON_GPUS.items():
        yield f"{name}_8_H100", config, GPUS, overrides
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
                overrides = fsdp(16) if split else {}
                yield name, f"coatnet_imagenet.py:variant={number}", topology, overrides


def commit():
    """Returns the commit of the compiled code; a star: with changes that are not committed."""
    code = ("localglobal_jax", "configs/*.py")

    def git(*words):
        command = ["git", "-C", str(CONFIGS.parent), *words, "--", *code]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h") + "*" * bool(git("status", "--porcelain"))


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
        "commit": result.get("commit"),
        "topology": result["topology"],
        "micro-batches": int(result["overrides"].get("optim.accumulate", 1)),
        "strategy": result["strategy"],
        "parameters M": round(result["parameters"] / 1e6, 1),
        "items a step": result["items"],
        "fits": "yes" if result["fits"] else "no",
        **{f"{k} GiB": None if n is None else round(n / 2**30, 2) for k, n in gib.items()},
        "GFLOP a device": round(result["flops"] / 1e9),
    }
    if "perfect_fusion" in result:
        line["perfect fusion ms"] = round(result["perfect_fusion"]["bound_ms"], 2)
        line["perfect fusion GB"] = round(result["perfect_fusion"]["bytes"] / 1e9, 2)
    if "step_ms" in result:
        ms, step, mfu = result["bounds_ms"], result["step_ms"], result["mfu"]
        rate = result["items_per_second"]
        line |= {
            "GB a device": round(result["bytes_accessed"] / 1e9, 2),
            "sent MB": round(result["wire_bytes"] / 1e6),
            **{f"{k} ms": round(n, 2) for k, n in ms.items()},
            "step ms, estimate": f"{step['low']:.0f} to {step['high']:.0f}",
            "items/s, estimate": f"{rate['low']:,.0f} to {rate['high']:,.0f}",
            "MFU %, at most": round(100 * mfu["high"]),
            "lint errors": sum(lint["level"] == "error" for lint in result["lints"]),
        }
    return line | {"compile CPU-s": round(result["compile"]["cpu_seconds"])}


def write_tables():
    """Writes results.csv and the tables of table.md and of the page from the results so far."""
    found = [(name, HERE / "results" / f"{name}.json") for name, *_ in rows()]
    lines = [figures(name, json.loads(file.read_text())) for name, file in found if file.is_file()]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    on_gpus = [line for line in lines if line["row"].endswith("H100")]
    tables = {
        "pod_plans": markdown([line for line in lines if line not in on_gpus], "interconnect"),
        "gpu_plans": markdown(on_gpus, "NVLink"),
    }
    (HERE / "table.md").write_text("\n\n".join(tables.values()) + "\n")
    page = PAGE.read_text()
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        page = before + start + table + end + rest.partition(end)[2]
    PAGE.write_text(page)


def markdown(lines, link):
    """Formats the most important columns; the rest is in results.csv."""
    bounds = f"bounds ms: compute / memory / {link}"
    columns = ("plan", "fits", "batch", "activations", "sent", bounds, "perfect fusion ms")
    columns += ("step ms *", "items/s *", "MFU *", "commit")
    text = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for line in lines:
        known, needed = "sent MB" in line, line.get("needed GiB")
        memory = f"{needed or 'more'} of {line['usable GiB']} GiB" if "usable GiB" in line else ""
        links = ("nvlink ms", "communication ms")
        ms = [line[k] for k in ("compute ms", "memory ms", *links) if k in line]
        fused = line.get("perfect fusion ms")
        values = (
            line["row"],
            f"{line['fits']}: {memory}" if memory else line["fits"],
            batch(line) if memory else "",
            f"{line['activations GiB']} GiB" if known else "",
            f"{line['sent MB']:,} MB" if known else "",
            " / ".join(f"{n:.1f}" for n in ms),
            "" if fused is None else f"{fused:.1f}",
            line.get("step ms, estimate", ""),
            line.get("items/s, estimate", ""),
            f"at most {line['MFU %, at most']} %" if known else "",
            line.get("commit", ""),
        )
        text.append("| " + " | ".join(values) + " |")
    return "\n".join(text)


def batch(line):
    """Returns the items of a step, and the number of micro-batches that make it."""
    parts = line["micro-batches"]
    return f"{line['items a step']:,}" + (f" in {parts}" if parts > 1 else "")


def main():
    """Makes every row that has no result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains it")
    args = parser.parse_args()
    (HERE / "results").mkdir(exist_ok=True)
    for name, config, topology, overrides in rows():
        file = HERE / "results" / f"{name}.json"
        if args.table or file.is_file() or args.only not in name:
            continue
        print(name, flush=True)
        result = {"commit": commit(), "overrides": overrides, **plan(config, topology, overrides)}
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(figures(name, result)), flush=True)
        write_tables()
    write_tables()


if __name__ == "__main__":
    main()
