"""The command line. Exit 0: done and within tolerance; 1: a check failed; 2: bad input; 3: a rank or the system failed.

Results go to stdout (one JSON object with --json), progress and errors to stderr, never a traceback. Starting costs no
torch: each verb imports what it needs.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="windtunnel",
    help="Fly a training program through a simulated cluster, prove it on CPU ranks, run it on GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for files.", show_default=False)]


@app.command()
def demo(as_json: AsJson = False, out: Out = None) -> None:
    """Train a small GPT under ZeRO 0 to 3, check it, predict it, and fly it on 1 to 1,024 GPUs."""
    from .demo import demo as run
    from .demo import to_dict
    from .tables import demo_table, show, verification_table

    result = run(out or Path("out/demo"), say=_say)
    if as_json:
        _print_json(to_dict(result))
    else:
        show(verification_table(result.verification))
        show(demo_table(result))
        last = result.scaling[-1]
        print(f"flown on {last.gpus:,} GPUs: {last.step_time_s:.3f} s per step, {last.tflops_per_gpu:.0f} TFLOP/s each")
        print(f"plot: {result.plot}")
    _notes(result.verification.notes)
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def simulate(
    cluster: Annotated[str, typer.Option(help="Catalogue name or TOML file; several, with commas, by price.")],
    model: Annotated[
        str | None,
        typer.Option(help="Catalogue name, TOML file, or MODULE:FUNCTION: (model, batch).", show_default=False),
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="N, or N,N,... for a table and a plot.", show_default=False)] = None,
    dp: Annotated[
        int | None, typer.Option(help="Data-parallel ranks; gpus / (tp * pp * cp).", show_default=False)
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    cp: Annotated[int, typer.Option(help="Ranks that share each sequence (context parallelism).")] = 1,
    ep: Annotated[int, typer.Option(help="Data-parallel ranks that share the experts.")] = 1,
    interleave: Annotated[int, typer.Option(help="Virtual stages per rank.")] = 1,
    schedule: Annotated[str, typer.Option(help="gpipe, 1f1b, interleaved, zb-h1, zb-v, ...")] = "1f1b",
    zero: Annotated[int | None, typer.Option(help="ZeRO stage 0 to 3; 0.", show_default=False)] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Sequences per rank and forward; 1.", show_default=False)
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Sequences per step; micro-batch * dp.", show_default=False)
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens per sequence; the model's.", show_default=False)] = None,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="With tensor parallelism.")] = False,
    recompute: Annotated[
        str | None, typer.Option(help="none, selective, attention, full or budget; none.", show_default=False)
    ] = None,
    recompute_budget: Annotated[
        int | None, typer.Option(help="Bytes of activations that a rank may keep.", show_default=False)
    ] = None,
    offload: Annotated[str, typer.Option(help="none, optimizer or parameters.")] = "none",
    offload_to: Annotated[str, typer.Option(help="host or nvme.")] = "host",
    attention: Annotated[str | None, typer.Option(help="fused or plain; the model's.", show_default=False)] = None,
    overlap: Annotated[
        bool, typer.Option(help="Reduce gradients while backward runs, gather parameters while forward does.")
    ] = True,
    precision: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; bf16, or fp16 where there is none.", show_default=False)
    ] = None,
    fidelity: Annotated[str, typer.Option(help="closed_form, or events to play every message.")] = "closed_form",
    expandable_segments: Annotated[
        bool, typer.Option("--expandable-segments", help="The CUDA allocator grows its segments in place.")
    ] = False,
    no_remedies: Annotated[
        bool, typer.Option("--no-remedies", help="Do not look for options under which it would fit.")
    ] = False,
    fusion: Annotated[str, typer.Option(help="none, or elementwise: chains of such kernels as one.")] = "none",
    slow_ranks: Annotated[
        float, typer.Option(help="Slow ranks, drawn at random: below 1 a share of all, else how many.")
    ] = 0.0,
    slow_factor: Annotated[float, typer.Option(help="How many times as long they compute.")] = 1.0,
    slow_seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on: days, price.", show_default=False)] = None,
    goodput: Annotated[bool, typer.Option("--goodput", help="What failures leave of the speed.")] = False,
    failures: Annotated[
        str | None, typer.Option(help="Failure rates: catalogue name or TOML file; llama3.", show_default=False)
    ] = None,
    mtbf_hours: Annotated[
        float | None, typer.Option(help="Hours between interruptions of the job.", show_default=False)
    ] = None,
    restart_s: Annotated[
        float | None, typer.Option(help="From a failure to the next step.", show_default=False)
    ] = None,
    checkpoint_s: Annotated[
        float | None, typer.Option(help="For which a checkpoint halts training.", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="DeepSpeed JSON.", show_default=False)] = None,
    perfetto: Annotated[Path | None, typer.Option(help="Write a timeline here.", show_default=False)] = None,
    save_trace: Annotated[Path | None, typer.Option(help="Write the trace here.", show_default=False)] = None,
    chakra: Annotated[
        Path | None, typer.Option(help="Write Chakra traces here, a file per rank.", show_default=False)
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Price this saved trace instead of a model.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Simulate a training step: time, where it goes, memory, bytes."""
    from ..sim.hardware import load_cluster
    from . import failures as faulty
    from . import prices
    from . import simulate as simulation
    from .files import write_csv, write_whole

    chosen: dict[str, Any] = {
        "dp": dp, "tp": tp, "pp": pp, "cp": cp, "ep": ep, "interleave": interleave, "schedule": schedule, "zero": zero,
        "micro_batch": micro_batch, "global_batch": global_batch, "seq": seq, "sequence_parallel": sequence_parallel,
        "recompute": recompute, "recompute_budget": recompute_budget, "offload": offload, "offload_to": offload_to,
        "precision": precision, "fidelity": fidelity, "fusion": fusion, "slow_ranks": slow_ranks,
        "slow_factor": slow_factor, "slow_seed": slow_seed, "expandable_segments": expandable_segments,
        "attention": attention, "overlap": overlap,
    }  # fmt: skip
    if tokens is not None and tokens <= 0:
        raise ValueError(f"tokens = {tokens:g}; allowed: a number > 0")
    found = None if model is None else simulation.find_model(model)
    machines = [load_cluster(name) for name in cluster.split(",")]
    asked = goodput or any(value is not None for value in (failures, mtbf_hours, restart_s, checkpoint_s))
    job: Callable[[], Any]
    if trace is not None:
        _alone_with_trace({"model": model, "gpus": gpus, "config": config, "goodput": asked or None, **chosen})
        job = cache(partial(simulation.load_job, trace))
        jobs: list[tuple[Any, int | None]] = [(machine, None) for machine in machines]
        results = [simulation.simulate_trace(job(), machine, fidelity=fidelity) for machine in machines]
    elif found is None:
        raise ValueError("Missing option '--model'; allowed: a model, or a saved trace by --trace FILE")
    else:
        jobs = [(machine, count) for machine in machines for count in _counts(gpus)]
        results = [simulation.simulate(found, machine, config=config, gpus=count, **chosen) for machine, count in jobs]
        job = cache(partial(simulation.job, found, results[-1]))
    answers = [simulation.to_dict(result) for result in results]
    remedies = () if no_remedies or found is None or len(results) > 1 else _remedies(found, machines[0], results[0])
    faults = (
        faulty.Faults(
            failures=failures or faulty.DEFAULT, mtbf_hours=mtbf_hours, restart_s=restart_s, checkpoint_s=checkpoint_s
        )
        if asked
        else None
    )
    for answer, result, (machine, _) in zip(answers, results, jobs, strict=True):
        answer["remedies"] = [asdict(remedy) for remedy in remedies]
        answer |= prices.costs(result, machine, tokens, compared=len(machines) > 1)
        if faults is not None and found is not None:
            answer["goodput"] = faulty.goodput(result, found.parameters, machine, faults, tokens=tokens)
    shapes = prices.shape_rows(answers, [machine for machine, _ in jobs]) if len(machines) > 1 else []
    files: dict[str, str] = {}
    if shapes:
        files["csv"] = str(write_csv((out or Path("out/simulate")) / "shapes.csv", shapes))
    elif len(results) > 1 or out is not None:
        files = _scaling_files(results, out)
    if faults is not None and found is not None and out is not None:
        savings = faulty.savings_by_size(results[-1], found.parameters, machines[-1], faults)
        files["goodput_plot"] = str(_goodput_plot(savings, results[-1], out))
    if out is not None:
        from .step_files import write_step

        files |= write_step(job(), machines[-1], results, answers, out)
    if perfetto is not None:
        files["perfetto"] = str(write_whole(perfetto, simulation.timeline_of(job(), machines[-1], fidelity)))
    if save_trace is not None:
        from ..collectives.job_file import dumps

        files["trace"] = str(write_whole(save_trace, dumps(job())))
    if chakra is not None:
        from .step_files import write_chakra

        files["chakra"] = str(write_chakra(job(), machines[-1], chakra, fidelity))
    if found is not None:
        _notes(simulation.notes(found))
    if as_json:
        _print_json({**answers[0], **files} if len(results) == 1 else {"results": answers, **files})
        return
    _show_steps(results, answers, shapes)
    if len(results) == 1 and not results[0].fits:
        _show_overflow(results[0], remedies, searched=not no_remedies)
    for name, path in files.items():
        print(f"{name}: {path}")


def _alone_with_trace(options: dict[str, Any]) -> None:
    """A saved trace has its layout: only how it is priced is open."""
    from .layout import Options

    for name, value in options.items():
        if name != "fidelity" and value != getattr(Options(), name, None):
            raise ValueError(
                f"{name.replace('_', '-')} = {value} beside --trace; allowed: --cluster, --fidelity and where to write,"
                " since the saved trace has its own layout"
            )


def _counts(gpus: str | None) -> list[int | None]:
    return [None] if gpus is None else [*_integers("gpus", gpus)]


def _remedies(model: Any, machine: Any, result: Any) -> tuple[Any, ...]:
    """Options under which a job fits that does not."""
    from .remedies import remedies

    return remedies(model, machine, result, say=_say)


def _show_overflow(result: Any, found: tuple[Any, ...], searched: bool) -> None:
    from .tables import overflow

    for line in overflow(result, found, searched=searched):
        print(line)


def _show_steps(results: list[Any], answers: list[dict[str, Any]], shapes: list[dict[str, Any]]) -> None:
    from .failures import lines
    from .prices import shape_table, usd
    from .tables import memory_table, show, step_table

    show(shape_table(shapes, results[0].layout["model"]) if shapes else step_table(results))
    if len(results) == 1:
        show(memory_table(results[0]))
    for answer in answers:
        if "training" in answer and not shapes:
            training = answer["training"]
            print(
                f"{training['tokens']:.3g} {answer['layout']['counts']} on {answer['layout']['gpus']:,} GPUs:"
                f" {training['days']:.1f} days, {training['gpu_hours']:,.0f} GPU hours, {usd(training['price_usd'])}"
            )
        if "goodput" in answer:
            print("\n".join(lines(answer)))


def _goodput_plot(savings: Any, result: Any, folder: Path) -> Path:
    from .plots import plot_goodput

    return plot_goodput(savings, result.layout, folder / "goodput.png")


def _scaling_files(results: list[Any], out: Path | None) -> dict[str, str]:
    """CSV and plot of several sizes."""
    from .files import write_csv
    from .plots import plot_scaling
    from .simulate import to_rows

    folder = out or Path("out/simulate")
    csv = write_csv(folder / "scaling.csv", to_rows(results))
    return {"csv": str(csv), "plot": str(plot_scaling(results, folder / "scaling.png"))}


@app.command()
def verify(
    target: Annotated[str, typer.Argument(help="MODULE:FUNCTION or FILE.py:FUNCTION that returns (model, batches).")],
    world: Annotated[str, typer.Option(help="Gloo ranks: N, or N,N,...")] = "2",
    zero: Annotated[str, typer.Option(help="ZeRO stages.")] = "0,1,2,3",
    steps: Annotated[int | None, typer.Option(help="How many batches; all.", show_default=False)] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp64, bf16, fp16, or several; the config's or fp32.", show_default=False)
    ] = None,
    accumulation: Annotated[
        str | None, typer.Option(help="Micro-steps per step, or several; the config's or 1.", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="DeepSpeed JSON for every run.", show_default=False)] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative distance of the parameters.", show_default=False)
    ] = None,
    gradient_tolerance: Annotated[
        float | None, typer.Option(help="The same of gradients and optimizer state.", show_default=False)
    ] = None,
    loss_tolerance: Annotated[float | None, typer.Option(help="The same of losses.", show_default=False)] = None,
    every_step: Annotated[
        bool, typer.Option("--every-step", help="Compare tensors of all steps, not the last.")
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit report here.", show_default=False)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a rank waits for the others.")] = 60.0,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Check that ZeRO training of your model computes what one process would."""
    from .files import write_whole
    from .junit import junit_report
    from .tables import failures, show, verification_table
    from .verify import to_dict, verify_all

    results = verify_all(
        target, worlds=_integers("world", world), zero=_integers("zero", zero), steps=steps,
        precisions=[None] if precision is None else precision.split(","),
        accumulations=[None] if accumulation is None else _integers("accumulation", accumulation),
        config=config, tolerance=tolerance, gradient_tolerance=gradient_tolerance, loss_tolerance=loss_tolerance,
        every_step=every_step, timeout_s=timeout, say=_say,
    )  # fmt: skip
    if junit is not None:
        write_whole(junit, junit_report(target, results))
    answer = to_dict(results[0]) if len(results) == 1 else {"cases": [to_dict(result) for result in results]}
    if out is not None:
        write_whole(out / "verify.json", json.dumps(answer, indent=2))
    if as_json:
        _print_json(answer)
    for result in results:
        if not as_json:
            show(verification_table(result))
        for line in failures(result):
            _say(line) if as_json else print(line)
        _notes(result.notes)
    raise typer.Exit(0 if all(result.ok for result in results) else 1)


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} = {text!r}; allowed: an integer, or several with commas between") from None


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def launch(
    ranks: Annotated[int, typer.Option(help="Processes to start.")],
    script: Annotated[str, typer.Argument(help="A Python file.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.", show_default=False)] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of each rank; an equal share of the cores.", show_default=False)
    ] = None,
) -> None:
    """Run a training script on several ranks of this machine; its output is its own. torchrun serves many machines."""
    from .launch import launch as run

    run(script, arguments or (), ranks=ranks, threads=threads)


@app.command()
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all.", show_default=False)] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Say what there is, and stop.")] = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Make published tables and figures again, with the published points on them."""
    from . import reproduce as reproduction

    if only_list:
        there_is = reproduction.listing()
        if as_json:
            _print_json({"names": there_is})
        else:
            print("\n".join(f"{name}: {title}" for name, title in there_is.items()))
        return
    items = reproduction.reproduce(names or (), out or Path("out/reproduce"), say=_say)
    if as_json:
        _print_json(reproduction.to_dict(items))
        return
    from .tables import show

    for item in items:
        for table in item.tables:
            show(table)
        print(f"{item.name}: {item.sentence}\n  plot: {item.plot}\n  csv: {item.csv}")


@app.command()
def validate(
    source: Annotated[str | None, typer.Option(help="Name, or several; all.", show_default=False)] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="iteration time, throughput, memory, collective, scaling; all.", show_default=False),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All figures of a source, not a sample.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Train on Gloo ranks of this machine too.")] = False,
    cases: Annotated[bool, typer.Option("--cases", help="A line for each case.")] = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Hold predictions against published measurements, and against Gloo on this machine."""
    from .validate import to_dict
    from .validate import validate as run

    result = run(
        sources=source.split(",") if source else (), kinds=kind.split(",") if kind else (), everything=everything,
        live=live, out=out, say=_say,
    )  # fmt: skip
    if as_json:
        _print_json(to_dict(result))
    else:
        from .tables import show
        from .validate_report import case_table, excluded_table, summary_table

        if cases:
            show(case_table(result.cases))
        show(excluded_table(result))
        show(summary_table(result))
        for name, path in result.files.items():
            print(f"{name}: {path}")
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def calibrate(
    ranks: Annotated[int, typer.Option(help="Ranks that share this machine.")] = 2,
    redo: Annotated[bool, typer.Option("--redo", help="Measure again although a profile is kept.")] = False,
    from_profile: Annotated[
        Path | None, typer.Option(help="Take kernel times from this torch.profiler trace.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="With --from-profile: the cluster that was profiled.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Measure this machine's primitives into a hardware profile, or take one from a profiler's trace."""
    if from_profile is not None:
        _calibrate_from_profile(from_profile, base, as_json, out)
        return
    from .calibrate import calibrate as run
    from .calibrate import profile
    from .files import write_whole
    from .tables import entry_table, show

    cluster = run(ranks=ranks, redo=redo, progress=_say)
    answer = profile(cluster)
    if out is not None:
        write_whole(out / "profile.json", json.dumps(answer, indent=2))
    if as_json:
        _print_json(answer)
    else:
        measured = {"matmul_points", "kernel_curves", "sources"}
        figures = {name: value for name, value in answer["processor"].items() if name not in measured}
        show(entry_table(cluster.name, {**figures, "ring": answer["intra_node"]}, {}))


def _calibrate_from_profile(path: Path, base: str | None, as_json: bool, out: Path | None) -> None:
    from .profiled import calibrate_from_profile, operator_table, to_dict
    from .tables import show

    if base is None:
        raise ValueError("base is missing; allowed: the cluster that was profiled, from the catalogue or a TOML file")
    hardware = calibrate_from_profile(path, base, out or Path("out/profile"))
    if as_json:
        _print_json(to_dict(hardware))
    else:
        show(operator_table(hardware))
        print(f"cluster: {hardware.written}")
    _notes(tuple(f"{name} is not understood: {why}" for name, (why, _) in hardware.unknown.items()))


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="One model.", show_default=False)] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """The catalogue of models, each with its source."""
    from .listings import list_models

    _listing(list_models(name), as_json, out)


@app.command()
def hardware(
    name: Annotated[
        str | None, typer.Argument(help="One GPU, cluster, fabric or failure profile.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """The catalogue of GPUs, clusters, fabrics and failure rates, each figure with its source."""
    from .listings import list_hardware

    _listing(list_hardware(name), as_json, out)


def _listing(listing: Any, as_json: bool, out: Path | None) -> None:
    from .files import write_whole

    if out is not None:
        write_whole(out / "catalogue.json", json.dumps(listing.entries, indent=2))
    if as_json:
        _print_json(listing.entries)
        return
    from .tables import show

    for table in listing.tables():
        show(table)


def _print_json(answer: dict[str, Any]) -> None:
    json.dump(answer, sys.stdout, default=str)
    sys.stdout.write("\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        _say(f"note: {note}")


def main() -> NoReturn:
    """The console script: run a verb and turn every failure into one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = _fail("stopped", 3)
    except KeyboardInterrupt:
        code = _fail("stopped", 3)
    except (ValueError, OSError) as error:
        code = _fail(str(error), 3 if isinstance(error, OSError) else 2)
    except Exception as error:
        # A usage error of the command-line library says so itself; anything else is the system's failure.
        ours = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
        if hasattr(error, "format_message"):
            code = _fail(_usage(error), 2)
        else:
            code = _fail(str(error) if ours else f"{type(error).__name__}: {error}", 3)
    sys.stdout.flush()
    sys.exit(code or 0)


def _usage(error: Any) -> str:
    """What the command-line library says, and the value that it leaves out."""
    names = getattr(getattr(error, "param", None), "opts", [])
    values = [value for name, value in zip(sys.argv, sys.argv[1:], strict=False) if name in names]
    return str(error.format_message()) + (f" (got {values[-1]!r})" if values else "")


def _fail(message: str, code: int) -> int:
    if os.environ.get("WINDTUNNEL_TRACEBACK"):
        import traceback

        traceback.print_exc()
    _say("windtunnel: " + " ".join(message.split()))
    return code


if __name__ == "__main__":
    main()
