"""Times a family's cases, contestants interleaved in one process, and writes the table, a JSON and a chart.

    python benchmarks/report.py recurrent                     # measure and print
    python benchmarks/report.py recurrent --write             # ... and update benchmarks/results and the README
    python benchmarks/report.py recurrent --case generate     # only cases with that in their name
    python benchmarks/report.py recurrent --render FILE       # write the README and the chart from an earlier JSON
    python benchmarks/report.py recurrent --quick             # small sizes: does the tool itself work?

How time is measured. Every contestant is built, called twice and held against the others' results. Then, in each round,
each contestant runs once; the round's starting place rotates. A sample is as many calls as make 5 ms, after a pause in
which the threads of the contestant before go to sleep and, for short calls, one call that is not timed. Rounds go on
until the medians' confidence intervals are narrow or the case's time is used up. A speed-up is the median over rounds
of theirs / ours, so that a slow drift of the machine cancels; its spread is the interquartile range. Garbage collection
is off while samples run.

How memory is measured. Each contestant gets a process of its own. Peak extra memory is the high-water mark of the
resident set (VmHWM, reset through /proc/self/clear_refs) over three calls minus the resident set before them, so it
counts what any allocator took, scratch memory of a library included. Two things that would blur it are off: huge pages,
and malloc's keeping of freed blocks (its mmap threshold is fixed, and it is trimmed). What a contestant holds on to
after its first call at full size (packed weights, a workspace) is added as `kept`; not so for torch.compile, whose
first call leaves the compiler itself behind. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from cases import HERE, Case, Setting, UnavailableError, Work, assert_agree, families, load, synchronize

ROOT = HERE.parent
RESULTS = HERE / "results"
Record = dict[str, Any]

SAMPLE_SECONDS = 0.005
PAUSE_SECONDS = 0.005
SHORT_CALL_SECONDS = 0.02
PRECISION = 0.01  # half-width of a median's 95 % confidence interval, relative, at which a case is done
MAX_ROUNDS = 300


# ---------------------------------------------------------------------------------------------------------- the machine


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()

    def value(key: str) -> str:
        found = re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE)
        return found.group(1).strip() if found else ""

    name = value("model name") or platform.machine()
    return f"{name} (family {value('cpu family')}, model {value('model')})" if value("cpu family") else name


def git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "no commit"
    # The files that a report writes itself do not make the code another one.
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!README.md", ":!benchmarks/results")
    return head + (" + changes" if dirty else "")


def machine(threads: int, device: str) -> Record:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    header: Record = {
        "cpu": cpu_model(),
        "cores": cores,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if device != "cpu":
        header["gpu"] = torch.cuda.get_device_name()
    try:
        import genfuse

        header["genfuse"] = {k: v for k, v in genfuse.build_info().items() if isinstance(v, (str, int, bool, list))}
    except Exception as e:
        header["genfuse"] = f"not importable: {e}"
    return header


def machine_slug(header: Mapping[str, Any]) -> str:
    name = str(header.get("gpu") or f"{header['cpu']} {header['cores']}c")
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("family ", "").replace("model ", "")).strip("-")


# ----------------------------------------------------------------------------------------------------------------- time


def half_width(samples: list[float]) -> float:
    """Of the median's 95 % confidence interval, from order statistics, relative to the median."""
    ordered, n = sorted(samples), len(samples)
    reach = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return (ordered[high] - ordered[low]) / 2 / statistics.median(ordered)


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def timed(work: Work, calls: int, device: str) -> float:
    """Seconds a call."""
    synchronize(device)
    start = time.perf_counter_ns()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter_ns() - start) * 1e-9 / calls


def sample(work: Work, calls: int, device: str, expected: float) -> float:
    time.sleep(PAUSE_SECONDS)
    if expected < SHORT_CALL_SECONDS:
        work()
    return timed(work, calls, device)


def build(case: Case, setting: Setting) -> tuple[dict[str, Work], dict[str, str], dict[str, str], dict[str, float]]:
    """(works, skipped, failed, seconds until the first result) of a case, checked against each other."""
    # Each case brings shapes of its own: what was compiled for earlier ones only lengthens the list of guards to walk.
    torch._dynamo.reset()
    works: dict[str, Work] = {}
    results: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    first: dict[str, float] = {}
    for name, factory in case.build(setting).items():
        start = time.perf_counter()
        try:
            work = factory()
            result = work()
            first[name] = time.perf_counter() - start
            work()
        except UnavailableError as e:
            skipped[name] = str(e)
        except Exception as e:
            traceback.print_exc()
            failed[name] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
        else:
            works[name] = work
            if case.rtol is not None and name not in case.unchecked and not case.random:
                results[name] = result
    if case.rtol is not None and case.random:
        exact = Setting(quick=True, exact=True, backend="aot_eager", threads=setting.threads)
        for name, factory in case.build(exact).items():
            if name in works and name not in case.unchecked:
                results[name] = factory()()
    standard = results.get(case.standard()) if case.rtol is not None else None
    for name, result in results.items():
        if standard is not None and case.rtol is not None:
            try:
                assert_agree(result, standard, case.rtol, name)
            except AssertionError as e:
                failed[name] = str(e)  # a contestant that computes something else is not timed
                del works[name]
    return works, skipped, failed, first


def measure(case: Case, setting: Setting, min_rounds: int, seconds: float) -> Record:
    works, skipped, failed, first = build(case, setting)
    names = list(works)
    expected = {name: min(timed(work, 1, case.device) for _ in range(2)) for name, work in works.items()}
    calls = {name: max(1, math.ceil(SAMPLE_SECONDS / expected[name])) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for n in range(MAX_ROUNDS if names else 0):
            for k in range(len(names)):
                name = names[(n + k) % len(names)]
                parts = 1 if setting.quick else case.parts.get(name, 1)
                samples[name].append(parts * sample(works[name], calls[name], case.device, expected[name]))
            if n + 1 < min_rounds:
                continue
            if time.perf_counter() - start > seconds or max(half_width(s) for s in samples.values()) < PRECISION:
                break
    finally:
        gc.enable()
    record: Record = {"title": case.title, "ours": case.ours, "contestants": {}, "skipped": skipped, "failed": failed}
    for name in names:
        low, middle, high = quartiles(samples[name])
        entry: Record = {
            "seconds": middle,
            "quartiles": [low, high],
            "rounds": len(samples[name]),
            "calls": calls[name],
            "first_call_seconds": first[name],
        }
        if name in case.parts and not setting.quick:
            entry["parts"] = case.parts[name]
        if case.ours in samples and name != case.ours:
            ratios = [a / b for a, b in zip(samples[name], samples[case.ours], strict=True)]
            low, middle, high = quartiles(ratios)
            entry |= {"speedup": middle, "speedup_quartiles": [low, high]}
        record["contestants"][name] = entry
    return record


# --------------------------------------------------------------------------------------------------------------- memory


def status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found.group(1)) * 1024


def trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def memory_of(case: Case, contestant: str, setting: Setting) -> dict[str, int]:
    """{"peak": ..., "kept": ...} in bytes, of this process: to be called in one that did nothing else."""
    if case.device != "cpu":
        work = case.build(setting)[contestant]()
        work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return {"peak": torch.cuda.max_memory_allocated() - before, "kept": 0}
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is counted whole
    if not contestant.startswith("torch.compile"):
        case.build(Setting(quick=True, threads=setting.threads))[contestant]()()  # code paged in, threads started
    work = case.build(setting)[contestant]()
    trim()
    before = status_bytes("RssAnon")
    work()
    trim()
    kept = max(0, status_bytes("RssAnon") - before)
    base = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        work()
    peak = status_bytes("VmHWM") - base
    return {"peak": peak, "kept": 0 if contestant.startswith("torch.compile") else kept}


def measure_memory(family: str, case: Case, record: Record, setting: Setting) -> bool:
    """Whether there was anything to measure."""
    if not case.memory or not Path("/proc/self/clear_refs").exists():
        return False
    # glibc raises its mmap threshold whenever a block is freed, and would keep what it frees: fix it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    for name, entry in record["contestants"].items():
        command = [sys.executable, __file__, family, "--memory-of", case.name, name, "--threads", str(setting.threads)]
        if setting.quick:
            command.append("--quick")
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(f"memory of {name} in {case.name} was not measured:\n{done.stderr}", file=sys.stderr)
        else:
            entry["memory"] = json.loads(done.stdout.splitlines()[-1])
    return True


# ----------------------------------------------------------------------------------------------------------- comparison


def peers(record: Record) -> list[str]:
    """Contestants that are not a version of ours."""
    ours = record["ours"]
    return [] if ours is None else [name for name in record["contestants"] if not name.startswith(ours)]


def judge(case: Case, record: Record) -> None:
    """Add the project's promises to a record, and whether they are kept."""
    contestants = record["contestants"]
    for peer, least in case.targets.items():
        if "speedup" in contestants.get(peer, {}):
            contestants[peer] |= {"target": least, "met": contestants[peer]["speedup"] >= least}
    for peer, most in case.memory_targets.items():
        theirs, ours = (contestants.get(name, {}).get("memory") for name in (peer, case.ours))
        if theirs and ours:
            ratio = (ours["peak"] + ours["kept"]) / (theirs["peak"] + theirs["kept"])
            contestants[peer] |= {"memory_target": most, "memory_ratio": ratio, "memory_met": ratio <= most}
    for name, bound in case.bounds_us.items():
        if name in contestants:
            contestants[name] |= {"bound_us": bound, "bound_met": contestants[name]["seconds"] * 1e6 <= bound}


def show_time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * scale or unit == "us":
            value = seconds / scale
            return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-3))))}f} {unit}"
    raise AssertionError


def show_spread(entry: Record) -> str:
    low, high = entry["quartiles"]
    return f"{show_time(entry['seconds'])} ±{50 * (high - low) / entry['seconds']:.0f} %"


def show_ratio(value: float) -> str:
    return f"{value:.{max(0, min(2, 2 - math.floor(math.log10(value))))}f}" if value >= 0.1 else f"{value:.2g}"


def show_speedup(entry: Record) -> str:
    value, (low, high) = entry["speedup"], entry["speedup_quartiles"]
    text = f"{show_ratio(value)}x"
    return f"{text if value >= 1 else f'**{text}**'} ({show_ratio(low)}-{show_ratio(high)})"


def verdict(text: str, met: bool) -> str:
    return f"{text}, met" if met else f"{text}, **missed**"


def table(rows: Iterable[Iterable[str]], head: Iterable[str], left: int = 1) -> list[str]:
    head = list(head)
    rule = ["---" if k < left else "---:" for k in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def render(result: Record) -> str:
    """The family's part of the README."""
    header, cases = result["machine"], result["cases"]
    where = f"{header['gpu']}, " if "gpu" in header else ""
    note = (
        f"{where}{header['cpu']}, {header['cores']} cores, {header['isa']}, {header['threads']} threads; "
        f"torch {header['torch']}, Python {header['python']}, {header['system']}; commit {header['commit']}; "
        f"{header['date'][:10]}. Medians with half the interquartile range; a speed-up is theirs / ours, the median "
        "over interleaved rounds with its quartiles. Below 1 (bold) genfuse is the slower one."
    )
    lines = [note, ""]
    speed, memory, calls = [], [], []
    won = total = met = promised = 0
    for record in cases.values():
        contestants, ours, title = record["contestants"], record["ours"], record["title"]
        if ours is None:
            for name, entry in contestants.items():
                bound = verdict(f"{entry['bound_us']:g} us", entry["bound_met"]) if "bound_us" in entry else ""
                calls.append([name, show_spread(entry), bound])
                met, promised = met + entry.get("bound_met", 0), promised + ("bound_us" in entry)
            continue
        if ours not in contestants:
            speed.append([title, "failed", "", "", "", ""])
            continue
        shown, mine = title, show_spread(contestants[ours])
        for peer in peers(record):
            entry = contestants[peer]
            target = verdict(f"{entry['target']:g}x", entry["met"]) if "target" in entry else ""
            whose = f"{peer} (timed: one of {entry['parts']} equal steps)" if "parts" in entry else peer
            speed.append([shown, mine, whose, show_spread(entry), show_speedup(entry), target])
            won, total = won + (entry["speedup"] >= 1), total + 1
            met, promised = met + entry.get("met", 0), promised + ("target" in entry)
            shown = mine = ""
        for name, entry in contestants.items():
            if name.startswith(ours) and name != ours:
                ratio = f"{show_ratio(1 / entry['speedup'])}x of {ours}"
                speed.append(["", show_spread(entry), f"({name})", "", ratio, ""])
        shown = title
        for name, entry in contestants.items():
            if "memory" not in entry:
                continue
            ratio = f"{entry['memory_ratio']:.2f}" if "memory_ratio" in entry else ""
            wanted = verdict(f"{entry['memory_target']:g}", entry["memory_met"]) if ratio else ""
            peak, kept = (f"{entry['memory'][key] / 2**20:.1f}" for key in ("peak", "kept"))
            memory.append([shown, name, peak, kept, ratio, wanted])
            met, promised = met + entry.get("memory_met", 0), promised + ("memory_met" in entry)
            shown = ""
    lines += [f"Faster in {won} of {total} comparisons; {met} of {promised} targets met.", ""]
    if "chart" in result:
        lines += [f"![Speed-up of every case, by contestant]({result['chart']})", ""]
    lines += table(speed, ["case", "genfuse", "against", "theirs", "speed-up", "target, at least"])
    if calls:
        lines += ["", *table(calls, ["one call of the smallest op", "time", "bound"])]
    if memory:
        lines += ["", "Extra memory, MiB: peak of a call, and what stays allocated after the first.", ""]
        lines += table(memory, ["case", "", "peak", "kept", "genfuse / theirs", "target, at most"], left=2)
    skipped = {f"{name}: {why}" for record in cases.values() for name, why in record["skipped"].items()}
    failed = [f"{r['title']}, {name}: {why}" for r in cases.values() for name, why in r["failed"].items()]
    if skipped or failed:
        lines += ["", *(f"- Not run. {text}" for text in sorted(skipped)), *(f"- Failed. {text}" for text in failed)]
    return "\n".join(lines)


def category(peer: str) -> str:
    return next((prefix for prefix in ("torch.compile", "torch.nn", "eager loop") if peer.startswith(prefix)), peer)


def draw_chart(result: Record, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in result["cases"].values() if any("speedup" in e for e in r["contestants"].values())]
    kinds = list(dict.fromkeys(category(peer) for record in records for peer in peers(record)))
    palette = plt.get_cmap("tab10" if len(kinds) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    colours = {kind: palette[index % len(palette)] for index, kind in enumerate(kinds)}
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.32 * len(records)), layout="constrained")
    for row, record in enumerate(records):
        for peer in peers(record):
            entry = record["contestants"][peer]
            if "target" in entry:
                axes.plot(entry["target"], row, "|", color="black", markersize=13, markeredgewidth=1.5, zorder=2)
            axes.plot(entry["speedup"], row, "o", color=colours[category(peer)], markersize=7, alpha=0.9, zorder=3)
    axes.axvline(1, color="grey", linewidth=1, zorder=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(records)), [record["title"] for record in records])
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("speed-up of genfuse (theirs / ours); right of 1x genfuse is faster;\n| marks the target")
    handles = [axes.plot([], [], "o", color=colours[kind], label=kind)[0] for kind in kinds]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------------------- output


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def update_readme(family: str, text: str, readme: Path) -> bool:
    start, end = f"<!-- benchmarks:{family} -->", f"<!-- /benchmarks:{family} -->"
    content = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if content.count(start) != 1 or content.count(end) != 1 or content.index(start) > content.index(end):
        print(f"{readme.name} has no one pair of {start} and {end}: not updated", file=sys.stderr)
        return False
    before, rest = content.split(start)
    write_text(readme, f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")
    return True


def publish(family: str, path: Path) -> bool:
    """Chart and README from a stored result."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    if family not in stored:
        print(f"{path.name} has no results of {family}", file=sys.stderr)
        return False
    result = stored[family]
    chart = path.with_name(f"{path.stem}-{family}.png")
    draw_chart(result, chart)
    if chart.is_relative_to(ROOT):
        result["chart"] = chart.relative_to(ROOT).as_posix()
    return update_readme(family, render(result), ROOT / "README.md")


def save(path: Path, family: str, header: Record, cases: Mapping[str, Record], order: list[str]) -> None:
    """Merge into the day's file: other families stay, and so do this family's cases that were not run again."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merged = stored.get(family, {}).get("cases", {}) | cases
    ordered = {name: merged[name] for name in order if name in merged}
    stored[family] = {"machine": header, "cases": ordered}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(stored, indent=1) + "\n")


def progress(case: Case, record: Record) -> None:
    print(f"\n{case.title}")
    for name, entry in record["contestants"].items():
        parts = [f"  {name:<40}", f"{show_spread(entry):>16}"]
        if "speedup" in entry:
            parts.append(f"{entry['speedup']:7.2f}x")
        if "target" in entry:
            parts.append(f"(target {entry['target']:g}x {'met' if entry['met'] else 'MISSED'})")
        if "bound_us" in entry:
            parts.append(f"(bound {entry['bound_us']:g} us {'met' if entry['bound_met'] else 'MISSED'})")
        if "memory" in entry:
            parts.append(f"{entry['memory']['peak'] / 2**20:.1f} MiB + {entry['memory']['kept'] / 2**20:.1f} kept")
        if "memory_met" in entry:
            parts.append("(memory met)" if entry["memory_met"] else "(memory MISSED)")
        parts.append(f"[{entry['rounds']} rounds, first call {entry['first_call_seconds']:.1f} s]")
        print(" ".join(parts))
    for kind in ("skipped", "failed"):
        for name, why in record[kind].items():
            print(f"  {name:<40} {kind}: {why}")
    sys.stdout.flush()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("family", choices=families())
    parser.add_argument("--write", action="store_true", help="update benchmarks/results and the README")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds; nothing is written")
    parser.add_argument("--case", action="append", default=[], metavar="TEXT", help="only cases with TEXT in the name")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing: README and chart from this file")
    parser.add_argument("--threads", type=int, default=2, help="of every contestant (default 2)")
    parser.add_argument("--rounds", type=int, default=15, help="at least so many a case (default 15)")
    parser.add_argument("--seconds", type=float, default=40, help="rounds beyond those stop here (default 40 a case)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory measurements")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "CONTESTANT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick and options.write:
        parser.error("--quick times nothing worth writing: leave out --write or --quick")
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds are at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.render:
        if not options.render.is_file():
            print(f"{options.render}: no such file", file=sys.stderr)
            return 2
        return 0 if publish(options.family, options.render.resolve()) else 2
    cases = load(options.family)
    setting = Setting(
        quick=options.quick, threads=options.threads, backend="aot_eager" if options.quick else "inductor"
    )
    if options.memory_of:
        name, contestant = options.memory_of
        print(json.dumps(memory_of(next(case for case in cases if case.name == name), contestant, setting)))
        return 0
    chosen = [case for case in cases if not options.case or any(text in case.name for text in options.case)]
    if not chosen:
        print(f"no case matches; there are: {', '.join(case.name for case in cases)}", file=sys.stderr)
        return 2
    header = machine(options.threads, chosen[0].device)
    print(", ".join(f"{key}: {value}" for key, value in header.items()))
    if (header["load"] or 0) > 0.5:
        print(f"Warning: the load average is {header['load']}; something else is running.", file=sys.stderr)
    path = RESULTS / f"{machine_slug(header)}-{header['date'][:10]}.json"
    records: dict[str, Record] = {}
    memory_done = False  # once is enough to see that it works
    for case in chosen:
        rounds, seconds = (2, 0.0) if options.quick else (options.rounds, options.seconds)
        record = measure(case, setting, rounds, seconds)
        if not options.no_memory and not (options.quick and memory_done):
            memory_done = measure_memory(options.family, case, record, setting) or memory_done
        judge(case, record)
        record["commit"], record["date"] = header["commit"], header["date"]
        records[case.name] = record
        progress(case, record)
        if options.write:  # after each case: an interrupted run keeps what it has measured
            save(path, options.family, header, records, [c.name for c in cases])
    print("\n" + render({"machine": header, "cases": records}))
    failed = any(record["failed"] for record in records.values())
    if options.write:
        print(f"\nwritten: {path.relative_to(ROOT)}")
        if not publish(options.family, path):
            return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
